"""A million images against a hundred thousand: minutes and peak memory of each phase.

    python results/speed/million.py IMAGES FOLDER   # 1,000,000 and 100,000; about 6 GB in FOLDER

IMAGES is CIFAR-10 as --dataset takes it. Its 50,000 encoded images, again and again, are parquet
files as the Hub has them. Each phase is a process of its own: decoding into the store, filling two
cached views and half an epoch, the rest of the run after a stop, and the evaluation (k-NN and a
probe of ten classes, on 100,000 training images at most). Teacher and student are tiny, so that
the program itself is what is measured."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

COUNTS = 100_000, 1_000_000
FLAGS = ("--teacher test_vit --teacher_weights teacher.safetensors --teacher_size 32 "
         "--teacher_views 2 --student test_vit2 --student_size 32 --batch_size 512 --epochs 2 "
         "--run_dir run --cache_dir cache --device cpu")
STOPS = """
import os, signal, sys
sys.path.insert(0, {root!r})
import model
import train
from config import Config, cli

class Distiller(model.Distiller):  # of the same name: train.py continues the run
    def after_step(self, step):
        if step == {step}:
            os.kill(os.getpid(), signal.SIGTERM)

cli(lambda cfg: train.main(cfg, Distiller), Config)
"""


def tables(images: str, folder: Path, count: int) -> None:
    """Parquet files of 50,000 images."""
    part = datasets.load_dataset(images, split="train")
    column = next(name for name, kind in part.features.items() if isinstance(kind, datasets.Image))
    label = next(name for name, kind in part.features.items()
                 if isinstance(kind, datasets.ClassLabel))
    part = part.cast_column(column, datasets.Image(decode=False))
    table = pa.table(dict(image=[cell["bytes"] for cell in part[column]], label=part[label]))
    folder.mkdir(parents=True)
    for number in range(count // len(part)):
        pq.write_table(table, folder / f"train-{number:05d}-of-{count // len(part):05d}.parquet")


def phase(name: str, command: list, folder: Path) -> str:
    begin = time.time()
    process = subprocess.Popen(command, cwd=folder, stdout=open(folder / "log.txt", "a"),
                               stderr=subprocess.STDOUT)
    _, status, used = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 143), (name, code, (folder / "log.txt").read_text()[-2000:])
    seconds = time.time() - begin
    return f"{name}: {seconds / 60:.1f} minutes, {used.ru_maxrss / 2**20:.2f} GB"


def main(images: str, folder: Path) -> None:
    import timm
    import torch
    from safetensors.torch import save_file

    import model

    print(model.environment(torch.device("cpu")), flush=True)
    for count in COUNTS:
        here = folder / str(count)
        tables(images, here / "images", count)
        torch.manual_seed(0)
        save_file(timm.create_model("test_vit", num_classes=0).state_dict(),
                  here / "teacher.safetensors")
        flags = ["--dataset", "images", "--image_column", "image", *FLAGS.split()]
        store = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data; from config import *"
                 f"; data.open_store(parse(Config, sys.argv[1:]), 'train')")
        stops = STOPS.format(root=str(ROOT), step=count // 512 // 2)
        print(f"{count:,} images", flush=True)
        for name, command in {
                "decoding into the store": ["-c", store, *flags],
                "filling two views, half an epoch": ["-c", stops, *flags],
                "the rest of two epochs": [str(ROOT / "train.py"), *flags],
                "evaluating": [str(ROOT / "eval.py"), "run", "--max_train", "100000",
                               "--no_baselines"]}.items():
            print("  " + phase(name, [sys.executable, *command], here), flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]))
