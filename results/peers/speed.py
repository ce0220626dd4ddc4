"""CPU time of 50 epochs with LightlyTrain and this program: ViT-S/14 -> ViT-Ti/16, both at 112 px.

    OMP_NUM_THREADS=1 taskset -c 0 python results/peers/speed.py LIGHTLY_PYTHON  # > speed.txt

Each side runs for a few epochs of different lengths, whose differences are free of starting up:
the time of an epoch of LightlyTrain, of an epoch on cached targets, and of caching a view. Weights
are random, which cost what trained ones cost; images are drawn. CPU seconds, so that other work on
the core does not count.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1])]

import model  # noqa: E402
import train  # noqa: E402
from config import Config  # noqa: E402
from demo.shapes import draw_shape  # noqa: E402

IMAGES, BATCH, SIZE = 640, 64, 112
EPOCHS, VIEWS = 50, 4  # that the answer is for
TEACHER, STUDENT = "vit_small_patch14_dinov2", "vit_tiny_patch16_224"


def cpu_seconds() -> float:
    """Of this process and those that it has waited for."""
    return sum(os.times()[:4])


def lightly(folder: Path, python: str, epochs: int) -> float:
    out = folder / f"lightly-{epochs}"
    out.mkdir()
    settings = dict(
        images=str(folder / "images"), weights=str(folder / "teacher.safetensors"), out=str(out),
        lr=5e-4, teacher=TEACHER, student=STUDENT, size=SIZE, epochs=epochs, batch_size=BATCH,
        seed=0)
    begin = cpu_seconds()
    subprocess.run([python, HERE / "peer.py", json.dumps(settings)], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return cpu_seconds() - begin


def ours(folder: Path, epochs: int, views: int) -> float:
    name = f"ours-{epochs}-{views}"
    cfg = Config(
        dataset=str(folder / "images"), teacher=TEACHER, teacher_size=SIZE, student=STUDENT,
        teacher_weights=str(folder / "teacher.safetensors"), student_size=SIZE, batch_size=BATCH,
        epochs=epochs, teacher_views=views, precision="bf16", run_dir=str(folder / name),
        cache_dir=str(folder / f"{name}-cache"), save_every=0)
    begin = cpu_seconds()
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(cfg)
    return cpu_seconds() - begin


def main(python: str) -> None:
    folder = Path(tempfile.mkdtemp())
    (folder / "images" / "a").mkdir(parents=True)
    for i in range(IMAGES):
        pixels, _ = draw_shape(0, i, SIZE)
        Image.fromarray(np.asarray(pixels)).save(folder / "images" / "a" / f"{i:04}.png")
    torch.manual_seed(0)
    weights = timm.create_model(TEACHER, num_classes=0).state_dict()
    safetensors.torch.save_file(weights, folder / "teacher.safetensors")
    begin = time.time()
    live = (lightly(folder, python, 4) - lightly(folder, python, 2)) / 2
    short, long, more = ours(folder, 2, 1), ours(folder, 6, 1), ours(folder, 6, 2)
    cached, view = (long - short) / 4, more - long
    print(model.environment(torch.device("cpu")), f"{(time.time() - begin) / 60:.0f} minutes")
    print(f"{TEACHER} -> {STUDENT}, both at {SIZE} px, batch {BATCH}, {IMAGES} images, bf16")
    print(f"LightlyTrain: {live:.1f} CPU s an epoch; this program: {cached:.1f} on cached targets,"
          f" {view:.1f} to cache a view")
    ratio = EPOCHS * live / (VIEWS * view + EPOCHS * cached)
    print(f"{EPOCHS} epochs with {VIEWS} views: {ratio:.2f} times as fast")


if __name__ == "__main__":
    main(*sys.argv[1:])
