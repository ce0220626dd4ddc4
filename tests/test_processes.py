"""Several processes: torchrun on CPU (gloo) gives what one process gives, and the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TINY = (
    "--dataset shapes --teacher demo --teacher_size 32 --student vit_tiny_patch16_224 "
    "--student_size 32 --student_args embed_dim=48,depth=2,num_heads=2 --batch_size 16 "
    "--max_samples 64 --precision fp32 --device cpu --log_every 1 --head linear "
    "--local_crops 1 --local_size 16 --num_workers 0 --teacher_views 1"
).split()


def run(tmp_path: Path, name: str, *more: str, ranks: int = 1) -> subprocess.CompletedProcess:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*launcher, "train.py", *TINY, "--cache_dir", str(tmp_path / "cache")]
    command += ["--run_dir", str(tmp_path / name), *more]
    env = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def metrics(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_two_ranks_give_the_losses_of_one_and_resume(tmp_path):
    assert run(tmp_path, "one", "--epochs", "2").returncode == 0
    first = run(tmp_path, "two", "--epochs", "1", "--warmup_epochs", "0", ranks=2)
    assert first.returncode == 0, first.stderr[-2000:]
    again = run(tmp_path, "two", "--epochs", "2", "--warmup_epochs", "0", ranks=2)
    assert again.returncode == 0 and "continuing" in again.stdout, again.stderr[-2000:]
    assert run(tmp_path, "straight", "--epochs", "2", ranks=2).returncode == 0
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "straight")
    assert [m["step"] for m in one] == [m["step"] for m in two] == list(range(1, 9))
    for key in ("loss", "cls", "patch", "cos", "norm"):
        assert all(abs(a[key] - b[key]) < 1e-3 for a, b in zip(one, two, strict=True)), key
    a, b = (
        torch.load(tmp_path / n / "checkpoint_latest.pth")["student"] for n in ("one", "straight")
    )
    assert all(torch.allclose(a[k], b[k], atol=2e-4) for k in a)


@pytest.mark.slow
def test_compiled_runs_keep_plain_names_and_nearly_the_losses(tmp_path):
    plain, compiled = (run(tmp_path, n, "--epochs", "1", "--compile", n) for n in ("off", "on"))
    if compiled.returncode and "compiler" in compiled.stderr:
        pytest.skip("torch.compile needs a C++ compiler")
    assert plain.returncode == compiled.returncode == 0, compiled.stderr[-2000:]
    off, on = metrics(tmp_path / "off"), metrics(tmp_path / "on")
    assert all(abs(a["loss"] - b["loss"]) < 1e-2 for a, b in zip(off, on, strict=True))
    a, b = (
        torch.load(tmp_path / n / "checkpoint_latest.pth")["student"].keys() for n in ("off", "on")
    )
    assert a == b


@pytest.mark.parametrize("command", ["train.py --epoch 3 --loss cosin", "eval.py nowhere.pth"])
def test_mistakes_end_with_a_message_and_status_2(command):
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert (
        done.returncode == 2 and done.stderr.startswith("error:") and "Traceback" not in done.stderr
    )


def test_an_indivisible_batch_is_refused(tmp_path):
    done = run(tmp_path, "odd", "--batch_size", "15", ranks=2)
    assert done.returncode != 0 and "not a multiple of the 2 ranks" in done.stderr
