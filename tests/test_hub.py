"""The command users type, against a loopback Hub that the real client libraries talk to.

Skipped where the Hub's script and data are not beside the repository.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
needs_shared = pytest.mark.skipif(
    not (SHARED / "hub" / "serve.py").exists(),
    reason="needs ../shared/hub, a loopback Hub with CIFAR-10",
)
SMALL = (
    "--student vit_tiny_patch16_224 --student_args depth=1 --teacher_size 28 --student_size 32"
).split()


def environment(tmp_path: Path, endpoint: str) -> dict:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return dict(
        clean, HF_ENDPOINT=endpoint, HF_HUB_DISABLE_XET="1", HF_HOME=str(tmp_path / "hf"), CI="1"
    )


def call(tmp_path: Path, endpoint: str, *command: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / command[0]), *command[1:]]
    return subprocess.run(
        command,
        cwd=tmp_path,
        env=environment(tmp_path, endpoint),
        capture_output=True,
        text=True,
        timeout=400,
    )


@contextlib.contextmanager
def hub(*arguments: str):
    command = [sys.executable, str(SHARED / "hub" / "serve.py"), "--port", "0", *arguments]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield re.search(r"http://\S+", server.stdout.readline())[0]
    finally:
        server.kill()


@needs_shared
def test_the_default_path_downloads_trains_and_evaluates(tmp_path):
    weights = tmp_path / "dinov2"
    weights.mkdir()
    make = [sys.executable, str(SHARED / "fixtures" / "make_dinov2.py"), "dinov2_vits14"]
    subprocess.run([*make, str(weights / "model.safetensors")], check=True)
    with hub("--repo", f"models/timm/vit_small_patch14_dinov2.lvd142m={weights}") as endpoint:
        flags = (
            "--dataset cifar10 --teacher dinov2_vits14 --samples_per_epoch 64 --batch_size 32 "
            "--epochs 1"
        )
        trained = call(tmp_path, endpoint, "train.py", *flags.split(), *SMALL)
        assert trained.returncode == 0, trained.stderr[-3000:]
        checkpoint = (
            tmp_path
            / "runs"
            / "cifar10-dinov2_vits14-vit_tiny_patch16_224"
            / "checkpoint_latest.pth"
        )
        assert "50000 images, 32 px" in trained.stdout and checkpoint.exists()
        judged = call(
            tmp_path,
            endpoint,
            "eval.py",
            str(checkpoint),
            "--max_train",
            "300",
            "--max_test",
            "100",
        )
        assert judged.returncode == 0, judged.stderr[-3000:]
        rows = json.loads((checkpoint.parent / "eval.json").read_text())
        assert rows[0]["model"] == "teacher dinov2_vits14" and "linear" in rows[-1]
        wrong = call(tmp_path, endpoint, "train.py", "--dataset", "uoft-cs/cifar11", *SMALL)
        assert wrong.returncode == 2 and "the name may be wrong or private" in wrong.stderr
    # What was downloaded serves without the Hub.
    again = call(
        tmp_path, "http://127.0.0.1:9", "train.py", *flags.split(), *SMALL, "--run_dir", "offline"
    )
    assert again.returncode == 0, again.stderr[-3000:]


@needs_shared
def test_cifar100_is_judged_by_its_fine_labels(tmp_path):
    folder = tmp_path / "cifar100" / "data"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
        columns = dict(
            img=[PIL.Image.fromarray(p) for p in pixels],
            fine_label=list(range(40)),
            coarse_label=[i % 4 for i in range(40)],
        )
        rows = datasets.Dataset.from_dict(columns)
        for name, count in (("fine_label", 100), ("coarse_label", 20)):
            rows = rows.cast_column(name, datasets.ClassLabel(num_classes=count))
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    with hub("--repo", f"datasets/uoft-cs/cifar100={tmp_path / 'cifar100'}") as endpoint:
        flags = "--dataset cifar100 --teacher demo --epochs 1 --batch_size 40"
        sizes = "--student_args depth=1 --teacher_size 32 --student_size 32"
        done = call(tmp_path, endpoint, "train.py", *flags.split(), *sizes.split(), *SMALL[:2])
    assert done.returncode == 0, done.stderr[-3000:]
    (labels,) = (tmp_path / "cache" / "stores").glob("cifar100-train-*/labels.npy")
    assert np.load(labels).tolist() == list(range(40))


@pytest.mark.parametrize("missing", ["dataset", "teacher"])
def test_without_a_hub_the_message_comes_within_seconds_and_says_what_to_do(tmp_path, missing):
    begin = time.time()
    dataset = "cifar10" if missing == "dataset" else "shapes"
    teacher = ("--max_samples", "64", "--batch_size", "64")
    failed = call(tmp_path, "http://127.0.0.1:9", "train.py", "--dataset", dataset, *teacher)
    assert time.time() - begin < 60 and failed.returncode == 2
    asked = "uoft-cs/cifar10" if missing == "dataset" else "vit_base_patch14_dinov2"
    for words in (
        asked,
        "does not answer",
        "--preset demo",
        "--dataset DIR" if missing == "dataset" else "--teacher_weights FILE",
    ):
        assert words in failed.stderr, failed.stderr
    assert "Traceback" not in failed.stderr
