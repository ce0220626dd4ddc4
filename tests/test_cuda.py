"""On a GPU: CUDA graphs, precisions, the forks, and two processes that share it."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval as evaluation
import train
from config import EvalConfig
from examples.forks.queue_kl import QueueKL
from model import Distiller
from test_smoke import latest, metrics, stop_at, weights

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
ROOT = Path(__file__).parents[1]
LONGER = dict(device="cuda", epochs=6, teacher_views=2, log_every=5)  # 30 steps


@pytest.fixture(autouse=True)
def compile_afresh():
    torch._dynamo.reset()  # beyond eight compilations of a function torch runs it eagerly


@pytest.fixture
def cuda(tiny, tmp_path):
    return lambda name="run", **changes: tiny(run_dir=str(tmp_path / name), **LONGER | changes)


def difference(one, other) -> float:
    """Largest between the weights of two runs."""
    a, b = weights(one), weights(other)
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def loss_difference(one, other) -> float:
    """Largest between the log lines of two runs."""
    pairs = zip(metrics(one), metrics(other), strict=True)
    return max(abs(a["loss"] - b["loss"]) for a, b in pairs)


@pytest.mark.parametrize("changes, allowed", [
    (dict(), 1e-5), (dict(teacher_views=0), 1e-5),
    (dict(student="resnet10t", student_args=""), 2e-2)])  # cuDNN chooses other algorithms
def test_cuda_graphs_train_as_eager_does(cuda, changes, allowed):
    eager, graphs = cuda("eager", compile="off", **changes), cuda("graphs", **changes)
    for cfg in (eager, graphs):
        train.main(cfg)
    worst = loss_difference(eager, graphs)
    print(f"{changes}: losses differ by {worst:.1e}, weights by {difference(eager, graphs):.1e}")
    assert worst < allowed


@pytest.mark.parametrize("fork", [Distiller, QueueKL])
def test_a_run_continues_on_the_gpu(cuda, monkeypatch, fork):
    straight, stopped = cuda("straight"), cuda("stopped")
    train.main(straight, objective=fork)
    for step in (3, 14):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop_at(patch, step, signal.SIGTERM)
            train.main(stopped, objective=fork)
    train.main(stopped, objective=fork)
    print(f"{fork.__name__}, continued: weights differ by {difference(straight, stopped):.1e}")
    assert difference(straight, stopped) < 1e-4


@pytest.mark.parametrize("changes", [dict(), dict(precision="bf16"), dict(teacher_views=0)])
@pytest.mark.parametrize("fork", [Distiller, QueueKL])
def test_the_host_waits_at_log_lines_alone(cuda, monkeypatch, fork, changes):
    learning_rate, average = train.learning_rate, train.Journal.average

    def watched_rate(step, *rest):
        if step >= 10:  # once everything is compiled and recorded
            torch.cuda.set_sync_debug_mode("error")
        return learning_rate(step, *rest)

    def unwatched_average(*arguments):
        torch.cuda.set_sync_debug_mode("default")
        return average(*arguments)

    monkeypatch.setattr(train, "learning_rate", watched_rate)
    monkeypatch.setattr(train.Journal, "average", unwatched_average)
    try:
        train.main(cuda(**changes), objective=fork)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_images_that_do_not_fit_on_the_gpu_are_read_from_files(cuda, monkeypatch):
    resident, streamed = cuda("resident"), cuda("streamed")
    train.main(resident)
    monkeypatch.setattr(train, "DEVICE_SHARE", 0)
    train.main(streamed)
    print(f"streamed: weights differ by {difference(resident, streamed):.1e}")
    assert difference(resident, streamed) < 1e-4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_as_float32_does(cuda, precision):
    full, half = cuda("full"), cuda("half", precision=precision)
    a, b = train.main(full), train.main(half)
    assert abs(a["loss"] - b["loss"]) < 0.05 and b["loss"] < 0.95 * metrics(half)[0]["loss"]


def test_the_gpu_evaluates_as_the_cpu_does(cuda):
    cfg = cuda()
    train.main(cfg)
    for_gpu, for_cpu = (evaluation.main(EvalConfig((latest(cfg),), device=device))
                        for device in ("cuda", "cpu"))
    for a, b in zip(for_gpu, for_cpu, strict=True):
        print([(a[name], b[name]) for name in ("knn20", "linear", "similarity")])
        assert abs(a["knn20"] - b["knn20"]) < 0.01 and abs(a["linear"] - b["linear"]) < 0.01


ONE_RANK = """
import json, sys
sys.path.insert(0, sys.argv[1])
import train
from config import Config
start = train.dist.init_process_group
train.dist.init_process_group = lambda backend: start("gloo")  # NCCL wants a GPU for each
train.main(Config(**json.loads(sys.argv[2])))
"""


def test_processes_with_gpus_exchange_tensors_of_both_devices(cuda):
    dist = train.dist
    dist.init_process_group(train.BACKENDS["cuda"], store=dist.HashStore(), rank=0, world_size=1)
    try:
        for device in ("cpu", "cuda"):
            dist.all_reduce(torch.ones(3, device=device))
        objects = [dict(a=torch.ones(3))]
        dist.broadcast_object_list(objects, 0)
    finally:
        dist.destroy_process_group()


def test_two_processes_on_a_gpu_train_as_one(cuda):
    one, two = cuda("one"), cuda("two")
    train.main(one)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = dict(WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    command = [sys.executable, "-c", ONE_RANK, str(ROOT), json.dumps(dataclasses.asdict(two))]
    ranks = [subprocess.Popen(command, env=os.environ | place | dict(RANK=str(rank)))
             for rank in range(2)]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    worst = loss_difference(one, two)
    print(f"two processes: losses differ by {worst:.1e}, weights by {difference(one, two):.1e}")
    assert worst < 1e-3
