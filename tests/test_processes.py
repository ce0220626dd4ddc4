"""Several processes give what one gives, and end together; and the command line.

Most tests fork the ranks from a process that has imported everything, with the variables that
torchrun sets; one goes through torchrun. A machine is a folder: its cache and runs are relative.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from config import Config, parse

slow = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TINY = [*(
    "--dataset shapes --teacher demo --teacher_size 32 --student vit_tiny_patch16_224 "
    "--student_size 32 --batch_size 16 "
    "--max_samples 64 --precision fp32 --device cpu --log_every 1 --head linear "
    "--run_dir run --epochs 3 --teacher_views 1 "
    "--save_every 1"
).split(), "--student_args", "embed_dim=48 depth=2 num_heads=2"]
ENV = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")

# One JSON a line: the folder and the flags of each rank, and a file: once something is in it, ranks
# are sent signals. Answers with their statuses; what they print is in their logs. A rank says when
# it leaves whether rank 0 has written, which takes its time.
RANKS = f"""
import json, os, sys, time, traceback
sys.path.insert(0, {str(ROOT)!r})
import config, model, train
model.build_student(config.parse(config.Config, {TINY}))  # what is imported for it stays
export = train.export
train.export = lambda *arguments: (time.sleep(0.5), export(*arguments))

def main(cfg):
    train.main(cfg)
    print("rank 0 has written:", os.path.exists("run/student.safetensors"))

def rank_of(world, rank, machine, machines, port, folder, flags, log):
    os.environ.update(WORLD_SIZE=str(world), RANK=str(rank), LOCAL_RANK="0", MASTER_PORT=str(port),
                      MASTER_ADDR="127.0.0.1", GROUP_RANK=str(machine),
                      GROUP_WORLD_SIZE=str(machines))
    os.chdir(folder)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    sys.argv = ["train.py", *flags]
    try:
        config.cli(main, config.Config)
    except SystemExit as stop:
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    folders, flags, port, path, signals, logs = json.loads(line)
    machines, children = list(dict.fromkeys(folders)), []
    for rank, (folder, log) in enumerate(zip(folders, logs)):
        if not (child := os.fork()):
            machine = machines.index(folder), len(machines)
            arguments = len(folders), rank, *machine, port, folder, flags[rank], log
            status = rank_of(*arguments)
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
        children.append(child)
    while path and not (os.path.exists(path) and os.path.getsize(path)):
        time.sleep(0.001)
    for rank, number in signals:
        os.kill(children[rank], number)
        time.sleep(0.01)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(statuses), flush=True)
"""


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """train(folders, flags, path, signals, last) -> the status and the output of each rank.
    last: more flags of the last rank."""
    logs, calls = tmp_path_factory.mktemp("logs"), iter(range(1000))
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    zygote = subprocess.Popen([sys.executable, "-c", RANKS], env=ENV, **pipes)

    def call(folders, *flags, path="", signals=(), last=()):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        call_logs = [str(logs / f"{next(calls)}") for _ in folders]
        all_flags = [[*TINY, *flags]] * (len(folders) - 1) + [[*TINY, *flags, *last]]
        todo = [*map(str, folders)], all_flags, port, str(path), list(signals), call_logs
        zygote.stdin.write(json.dumps(todo) + "\n")
        statuses = json.loads(zygote.stdout.readline())
        return statuses, [Path(log).read_text() for log in call_logs]

    yield call
    zygote.kill()


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict:
    return torch.load(folder / "run/checkpoint_latest.pth")["student"]


def close(one: Path, other: Path) -> bool:
    """The same losses to 1e-3, and weights to 2e-4: only the order of sums differs."""
    a, b = metrics(one), metrics(other)
    assert [m["step"] for m in a] == [m["step"] for m in b] == list(range(1, 13))
    for key in ("loss", "cls", "patch", "norm"):
        assert all(abs(m[key] - n[key]) < 1e-3 for m, n in zip(a, b, strict=True)), key
    a, b = weights(one), weights(other)
    return all(torch.allclose(a[k], b[k], atol=2e-4) for k in a)


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def ranks(train, tmp_path_factory):
    """Folders of runs that nobody disturbed, by their number of processes."""
    found = {}
    for count in (1, 2, 4):
        found[count] = folder = tmp_path_factory.mktemp(f"ranks_{count}")
        statuses, texts = train([folder] * count)
        assert statuses == [0] * count, texts
        assert all("rank 0 has written: True" in text for text in texts), texts
    return found


@slow
def test_two_and_four_processes_give_the_losses_of_one_and_leave_together(ranks):
    assert close(ranks[1], ranks[2]) and close(ranks[1], ranks[4])


@slow
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_run_of_two_processes_goes_on_with_any_number(train, ranks, tmp_path, count):
    """To the bit with as many, else as close as if it had been begun so."""
    (tmp_path / "run").mkdir()
    shutil.copy(ranks[2] / "run/checkpoint_epoch_1.pth", tmp_path / "run/checkpoint_latest.pth")
    shutil.copy(ranks[2] / "run/metrics.jsonl", tmp_path / "run")
    statuses, texts = train([tmp_path] * count)
    assert statuses == [0] * count and "continuing" in texts[0], texts
    assert close(ranks[2], tmp_path) and same(ranks[2], tmp_path) == (count == 2)


@slow
def test_machines_have_a_store_and_cache_each_and_need_not_share_the_run_folder(
        train, ranks, tmp_path):
    machines = [tmp_path / "a", tmp_path / "b"]
    for machine in machines:
        machine.mkdir()
    statuses, texts = train(machines)
    assert statuses == [0, 0] and close(ranks[2], machines[0]), texts
    assert len(list(tmp_path.glob("*/cache/stores/*/images.u8"))) == 2
    assert len(list(tmp_path.glob("*/cache/targets/*/view_0_0.i8"))) == 2
    run = machines[0] / "run"
    shutil.copy(run / "checkpoint_epoch_1.pth", run / "checkpoint_latest.pth")
    statuses, texts = train(machines)
    assert statuses == [0, 0] and close(ranks[2], machines[0]), texts
    assert not (machines[1] / "run").exists()


@slow
def test_machines_with_other_images_are_refused(train, tmp_path):
    """The same names and sizes, but on one machine a file is damaged."""
    machines = [tmp_path / "a", tmp_path / "b"]
    for machine in machines:
        (machine / "images").mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (32, 32), (9 * i, 0, 0)).save(machine / f"images/{i:02}.png")
    damaged = machines[1] / "images/07.png"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    statuses, texts = train(machines, "--dataset", "images")
    assert statuses[1] == 2, texts
    assert re.search("need the same command, images .*\n  - images: '.+', now '", texts[1]), texts


@slow
@pytest.mark.parametrize("last, words", [
    (["--precision", "bf16"], "dtype: 'torch.float32', now 'torch.bfloat16'"),
    (["--lr", "0.5"], "lr: 0.001, now 0.5"), (["--epochs", "4"], "epochs: 3, now 4"),
    pytest.param(["--teacher_weights", "other.safetensors"], "teacher: '", id="other_weights")])
def test_processes_of_other_settings_are_refused(train, tmp_path, last, words):
    demo = ROOT / "demo" / "teacher.safetensors"
    state = load_file(demo)
    other = state | {"norm.bias": state["norm.bias"] + 0.01}
    save_file(other, tmp_path / "other.safetensors", safe_open(demo, "pt").metadata())
    statuses, texts = train([tmp_path] * 2, last=last)
    assert statuses[1] == 2 and statuses[0] > 0, texts
    assert re.search(f"need the same command, images and hardware.*\n  - {words}", texts[1]), texts


@slow
def test_a_second_run_in_the_same_folder_ends_at_once(train, ranks):
    with FileLock(ranks[2] / "run.lock"):
        statuses, texts = train([ranks[2]] * 2)
    assert statuses[0] == 2 and statuses[1] and "another process" in texts[0], texts


@slow
def test_an_indivisible_batch_is_refused(train, tmp_path):
    statuses, texts = train([tmp_path] * 2, "--batch_size", "15")
    assert statuses == [2, 2] and "not a multiple of 2 processes" in texts[0]


@slow
@pytest.mark.parametrize("signalled", [[1], [0, 1, 0, 1]])
def test_a_signal_to_one_or_all_processes_saves_and_ends_all(train, ranks, tmp_path, signalled):
    """SLURM signals everyone, and torchrun hands it on; or only one is signalled."""
    signals = [(rank, signal.SIGTERM) for rank in signalled]
    path = tmp_path / "run/metrics.jsonl"
    statuses, texts = train([tmp_path] * 2, path=path, signals=signals)
    assert statuses == [143, 143] and "run the same command to continue" in texts[0], texts
    assert 0 < metrics(tmp_path)[-1]["step"] < 12
    statuses, texts = train([tmp_path] * 2)
    assert statuses == [0, 0] and same(ranks[2], tmp_path), texts


@slow
@pytest.mark.parametrize("killed", [0, 1])
def test_who_loses_a_process_ends_too(train, ranks, tmp_path, killed):
    path = tmp_path / "run/metrics.jsonl"
    statuses, _ = train([tmp_path] * 2, path=path, signals=[(killed, signal.SIGKILL)])
    assert statuses[killed] == -signal.SIGKILL and statuses[1 - killed] > 0
    statuses, texts = train([tmp_path] * 2)
    assert statuses == [0, 0] and same(ranks[2], tmp_path), texts


@slow
@pytest.mark.skipif(not os.path.exists("/proc"), reason="needs Linux's list of children")
def test_a_killed_worker_ends_torchrun_and_the_same_command_goes_on(train, ranks, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "train.py"), *TINY]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    torchrun = subprocess.Popen(command, cwd=tmp_path, env=ENV, **pipes)
    while torchrun.poll() is None and not list(tmp_path.glob("run/checkpoint_epoch_1.pth")):
        time.sleep(0.001)
    workers = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    text, _ = torchrun.communicate(timeout=200)
    assert torchrun.returncode == 1 and "exitcode  : -9" in text, text
    statuses, texts = train([tmp_path] * 2)
    assert statuses == [0, 0] and same(ranks[2], tmp_path), texts


@slow
def test_compiled_runs_keep_plain_names_and_nearly_the_losses(train, ranks, tmp_path):
    statuses, texts = train([tmp_path], "--compile", "on")
    if statuses[0] and "compiler" in texts[0]:
        pytest.skip("torch.compile needs a C++ compiler")
    assert statuses == [0], texts
    off, on = metrics(ranks[1]), metrics(tmp_path)
    assert all(abs(a["loss"] - b["loss"]) < 1e-2 for a, b in zip(off, on, strict=True))
    assert weights(ranks[1]).keys() == weights(tmp_path).keys()


@slow
def test_mistakes_end_with_a_message_and_status_2(train, tmp_path):
    command = [sys.executable, "eval.py", "nowhere.pth"]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    (status,), (text,) = train([tmp_path], "--epoch", "3", "--loss", "cosin")
    for code, message in ((done.returncode, done.stderr), (status, text)):
        assert code == 2 and message.startswith("error:") and "Traceback" not in message


def test_help_spells_flags_as_they_are(capsys):
    with pytest.raises(SystemExit):
        parse(Config, ["--help"])
    out = capsys.readouterr().out
    assert "--no_resume" in out and "--no-" not in out
