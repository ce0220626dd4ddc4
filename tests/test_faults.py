"""A full disk, a second process, signals: what has been saved stays, and the same command goes on.

results/faults/kill.py does the same with SIGKILL, at random instants and many times.
"""

import contextlib
import dataclasses
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from filelock import FileLock

import config
import data
import train
from config import Config, UserError
from test_smoke import stop_at, weights

ROOT = Path(__file__).parents[1]
# So that files are, in ascending order: images.u8 245,760 bytes, the cached targets, a checkpoint.
TINY = dict(
    dataset="shapes", teacher="demo", teacher_size=32, student="vit_tiny_patch16_224",
    student_size=32, student_args="embed_dim=48 depth=2 num_heads=2 patch_size=4", batch_size=16,
    max_samples=80, epochs=3, teacher_views=1, save_every=1, log_every=1, precision="fp32",
    device="cpu")


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
    [("stores", 200_000), ("view_0_0.i8", 250_000), ("checkpoint_epoch_1.pth", 500_000)],
)
def test_a_full_disk_is_a_message_and_the_same_command_goes_on(
        tmp_path, undisturbed, what, most):
    with files_of_at_most(most), pytest.raises((UserError, OSError)) as error:
        train.main(settings(tmp_path))
    assert what == "stores" or what in str(error.value), error.value
    assert not list(tmp_path.glob("run/*.tmp")) and not list(tmp_path.glob("cache/targets/*/*.tmp"))
    train.main(settings(tmp_path))
    assert same(state(tmp_path), undisturbed)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path):
    path = tmp_path / "checkpoint_latest.pth"
    config.write_atomically(path, lambda temporary: temporary.write_bytes(b"first"))
    with files_of_at_most(50_000), pytest.raises(UserError, match="cannot write .*latest"):
        config.write_atomically(path, lambda temporary: temporary.write_bytes(bytes(400_000)))
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == [path.name]


def test_a_second_process_on_the_same_run_is_refused(tmp_path):
    refused = pytest.raises(UserError, match="another process .*run.lock")
    with FileLock(tmp_path / "run.lock"), refused:
        train.main(settings(tmp_path))
    assert os.listdir(tmp_path) == ["run.lock"], "nothing was written"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
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
    assert "run the same command to continue" in text and "Traceback" not in text
    train.main(cfg)
    assert same(state(tmp_path), undisturbed)


def test_a_second_signal_ends_the_process_at_once():
    before = signal.getsignal(signal.SIGINT)
    with contextlib.ExitStack() as stack:
        received = train.stop_signals(stack)
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert received == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is before


def test_an_interrupted_command_is_not_told_to_begin_afresh(monkeypatch, capsys):
    def interrupted(cfg):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["train.py", "--no_resume"])
    monkeypatch.setattr(sys, "stdout", open(os.devnull, "w"))
    with pytest.raises(SystemExit):
        config.cli(interrupted, config.Config)
    assert "without --no_resume, continues" in capsys.readouterr().err


def test_a_run_that_began_afresh_is_told_to_continue_without_no_resume(tiny, monkeypatch):
    cfg = tiny(resume=False)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 3, signal.SIGTERM)
        train.main(cfg)
    log = cfg.run_path / "train.log"
    assert log.read_text().endswith("same command to continue, without --no_resume\n")
    student = safetensors.torch.load_file(cfg.run_path / "student.safetensors")
    assert same(student, weights(cfg)), "what is exported is as far as the run"
    cfg = dataclasses.replace(cfg, resume=True)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 5, signal.SIGTERM)
        train.main(cfg)
    assert log.read_text().endswith("same command to continue\n")
    assert train.main(cfg)["step"] == 10


def test_a_file_of_a_wrong_size_is_refused_as_such(tiny, tmp_path):
    cfg = tiny(cache_dir=str(tmp_path / "cache"))
    train.main(cfg)
    for path in ("targets/*/view_0_0.i8", "stores/shapes-train*/images.u8"):
        (file,) = (tmp_path / "cache").glob(path)
        os.truncate(file, file.stat().st_size - 1)
        with pytest.raises(UserError, match="bytes, not .*: delete"):
            train.main(dataclasses.replace(cfg, resume=False))


def test_a_cache_that_does_not_fit_is_refused(tiny, tmp_path, monkeypatch):
    data.open_store(tiny(), "train", 80)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: type("Usage", (), dict(free=5000)))
    with pytest.raises(UserError, match="do not fit into .*--teacher_views"):
        train.main(tiny(teacher_views=9, epochs=10, seed=9))
