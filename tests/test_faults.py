"""A full disk, a second process, signals: what has been saved stays, and the same command goes on.

results/faults/kill.py does the same with SIGKILL, at random instants and many times.
"""

import contextlib
import errno
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import config
import data
import train
from config import Config, UserError

ROOT = Path(__file__).parents[1]
# So that files are, in ascending order: images.u8 245,760 bytes, the bank's tokens, a checkpoint.
TINY = dict(
    dataset="shapes", teacher="demo", teacher_size=32, student="vit_tiny_patch16_224",
    student_size=32, student_args="embed_dim=48,depth=2,num_heads=2,patch_size=4", batch_size=16,
    max_samples=80, epochs=3, teacher_views=1, save_every=1, log_every=1, precision="fp32",
    device="cpu", num_workers=0,
)  # fmt: skip


def settings(folder: Path) -> Config:
    return Config(**TINY, run_dir=str(folder / "run"), cache_dir=str(folder / "cache"))


def state(folder: Path) -> dict:
    return torch.load(folder / "run" / "checkpoint_latest.pth", weights_only=True)["student"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes below
    folder = tmp_path_factory.mktemp("undisturbed")
    train.main(settings(folder))
    yield state(folder)
    torch.set_num_threads(threads)


@contextlib.contextmanager
def files_of_at_most(size: int):
    """Longer files cannot be written, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("what", "most"),
    [("stores", 200_000), ("banks", 247_000), ("checkpoint_epoch_1.pth", 400_000)],
)
def test_a_full_disk_is_a_message_and_the_same_command_goes_on(tmp_path, undisturbed, what, most):
    with files_of_at_most(most), pytest.raises(UserError, match=f"cannot (make|write) .*{what}"):
        train.main(settings(tmp_path))
    assert not list(tmp_path.rglob("*.tmp"))
    train.main(settings(tmp_path))
    assert same(state(tmp_path), undisturbed)


def test_a_store_that_does_not_fit_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: type("Usage", (), dict(free=5000)))
    with pytest.raises(UserError, match="the store needs .* --store_size and --max_samples"):
        data.open_store(settings(tmp_path), "train", 32, 80)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path):
    path = tmp_path / "checkpoint_latest.pth"
    train.write_atomically(path, lambda temporary: torch.save(dict(step=1), temporary))
    large = dict(step=2, weights=torch.zeros(100_000))
    with files_of_at_most(50_000), pytest.raises(UserError, match="cannot write .*Make space"):
        train.write_atomically(path, lambda temporary: torch.save(large, temporary))
    assert torch.load(path) == dict(step=1) and os.listdir(tmp_path) == [path.name]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_log_line_that_cannot_be_written_stops_the_run_with_a_message(capsys, monkeypatch):
    def write_a_line(cfg):
        handler = train.LogFile("/dev/full")
        handler.emit(logging.makeLogRecord(dict(msg="a line")))

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as stopped:
        config.cli(write_a_line, Config)
    assert stopped.value.code == 2 and os.strerror(errno.ENOSPC) in (
        text := capsys.readouterr().err
    )
    assert "make space, then the same command goes on" in text


def test_a_second_process_on_the_same_run_is_refused(tmp_path):
    refused = pytest.raises(UserError, match="another process is training in .*run")
    with FileLock(tmp_path / "run.lock"), refused:
        train.main(settings(tmp_path))
    assert os.listdir(tmp_path) == ["run.lock"], "nothing was written"


def test_who_needs_a_store_that_another_process_builds_waits_and_says_so(tmp_path, caplog):
    path = data.open_store(settings(tmp_path), "train", 32, 20).path
    held = threading.Event()

    def build():
        with FileLock(f"{path}.lock"):
            held.set()
            time.sleep(0.5)

    threading.Thread(target=build).start()
    held.wait()
    logging.getLogger("distill").propagate = True
    begin = time.time()
    with caplog.at_level("WARNING", "distill"):
        assert len(data.open_store(settings(tmp_path), "train", 32, 20)) == 20
    assert time.time() - begin > 0.4 and "waiting for another process" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_says_how_to_go_on_and_sets_the_status(tmp_path, undisturbed, number):
    cfg = settings(tmp_path)
    flags = [f"--{name}={value}" for name, value in TINY.items()]
    command = [sys.executable, "train.py", *flags]
    command += ["--run_dir", cfg.run_dir, "--cache_dir", cfg.cache_dir]
    env = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while process.poll() is None and not (cfg.run_path / "metrics.jsonl").exists():
        time.sleep(0.001)
    process.send_signal(number)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, text[-2000:]
    assert "the same command goes on" in text and "Traceback" not in text
    train.main(cfg)
    assert same(state(tmp_path), undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_processes_that_load_outlive_a_signal_to_the_whole_group(number):
    program = (
        "import os, numpy, data\nfrom signal import SIGINT, SIGTERM, signal\n"
        "for each in (SIGINT, SIGTERM): signal(each, lambda *_: None)\n"
        "for step, (_, rows, _) in enumerate(data.loader(None, numpy.arange(60), 2, workers=2)):\n"
        f"    if step == 3: os.killpg(0, {int(number)})\n"
        "print('rows', rows.tolist())\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, start_new_session=True,
                          timeout=60)
    assert done.stdout == "rows [58, 59]\n", done.stderr[-1000:]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once_when_there_is_one_process(number):
    for alone in (True, False):
        if not (child := os.fork()):
            with train.stop_signals(alone) as received:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)  # twice, as `timeout` does
                if received != [number] * 2:
                    os._exit(100)
                time.sleep(1.1)
                os.kill(os.getpid(), number)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == (-number if alone else 0)
