"""CPU time of 50 epochs with LightlyTrain and this program: ViT-S/14 -> ViT-Ti/16.

    export OMP_NUM_THREADS=1
    taskset -c 0 python results/peers/speed.py LIGHTLY_PYTHON          # both at 112 px
    taskset -c 0 python results/peers/speed.py LIGHTLY_PYTHON 224 96   # teacher, student: defaults

LightlyTrain shows both networks the teacher's size, as it has one size alone. Adds to speed.txt.

Each side runs for a few epochs of different lengths, whose differences are free of starting up:
the time of an epoch of LightlyTrain, of an epoch on cached targets, and of caching a view. Weights
are random, which cost what trained ones cost; images are drawn. CPU seconds, so that other work on
the core does not count.
"""

import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import safetensors.torch
import timm
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import compare  # noqa: E402

import model  # noqa: E402
import train  # noqa: E402
from config import Config  # noqa: E402
from demo.shapes import draw_shape  # noqa: E402

IMAGES, BATCH = 640, 64
EPOCHS, VIEWS = 50, 4  # that the ratio is for
TEACHER, STUDENT = "vit_small_patch14_dinov2", "vit_tiny_patch16_224"


def seconds(folder: Path, sizes, job, name: str, epochs: int, views: int = VIEWS) -> float:
    """CPU seconds of job(cfg), a run in a folder of its own. sizes: (teacher's, student's)."""
    name = f"{name}-{epochs}-{views}"
    cfg = Config(
        dataset=str(folder / "images"), teacher=TEACHER, teacher_size=sizes[0],
        teacher_weights=str(folder / "teacher.safetensors"), student=STUDENT,
        student_size=sizes[1], batch_size=BATCH, epochs=epochs, teacher_views=views,
        precision="bf16", run_dir=str(folder / name), cache_dir=str(folder / f"{name}-cache"),
        save_every=0)
    begin = compare.cpu_seconds()
    job(cfg)
    return compare.cpu_seconds() - begin


def main(python: str, teacher_size: str = "112", student_size: str = "112") -> None:
    large, small = int(teacher_size), int(student_size)
    folder = Path(tempfile.mkdtemp())
    images = folder / "images" / "train"
    images.mkdir(parents=True)
    for i in range(IMAGES):
        pixels, _ = draw_shape(0, i, large)
        Image.fromarray(pixels).save(images / f"{i:04}.png")
    torch.manual_seed(0)
    weights = timm.create_model(TEACHER, num_classes=0).state_dict()
    safetensors.torch.save_file(weights, folder / "teacher.safetensors")
    begin = time.time()
    peer = partial(compare.train_lightly, python=python)
    lightly = partial(seconds, folder, (large, large), peer, compare.LIGHTLY)
    live = (lightly(4) - lightly(2)) / 2
    ours = partial(seconds, folder, (large, small), train.main, compare.OURS)
    short, long, more = ours(2, 2), ours(6, 2), ours(6, 3)
    cached, view = (long - short) / 4, more - long
    ratio = EPOCHS * live / (VIEWS * view + EPOCHS * cached)
    minutes = (time.time() - begin) / 60
    with open(HERE / "speed.txt", "a") as log:
        log.write(
            f"{model.environment(torch.device('cpu'))} {minutes:.0f} minutes\n"
            f"{TEACHER} at {large} px -> {STUDENT} at {small} px (LightlyTrain: both at {large}), "
            f"batch {BATCH}, {IMAGES} images, bf16\n"
            f"LightlyTrain: {live:.1f} CPU s an epoch; this program: {cached:.1f} on cached "
            f"targets, {view:.1f} to cache a view\n"
            f"{EPOCHS} epochs with {VIEWS} views: {ratio:.2f} times as fast\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
