"""Which student: timm models that learn from one teacher for equal minutes on a CPU.

    python results/strong/students.py TINY_IMAGENET WEIGHTS "resnet10t" "convnext_atto"  # some rows
    python results/strong/students.py TINY_IMAGENET WEIGHTS  # all rows, one after the other
    python results/strong/students.py --table

EfficientNet-Lite0 with ImageNet's WEIGHTS, at 128 px, teaches from 10,000 training images of Tiny
ImageNet, two views; k-NN and probe learn from them, too. Tested are 2,000 others of the training
split. Each row is a process of its own: first it times a few steps, then it trains for as
many epochs as take MINUTES. Each run adds a line to students.jsonl."""

import subprocess
import sys
from pathlib import Path
from time import monotonic

import datasets
import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import eval as evaluation  # noqa: E402
import model  # noqa: E402
import runs  # noqa: E402
import train  # noqa: E402
from config import Config  # noqa: E402

FOLDER, RUNS = Path("cache/strong/tiny"), HERE / "students.jsonl"
MINUTES, IMAGES, TEST = 8, 10_000, 2_000
BASE = dict(dataset=str(FOLDER), teacher="tf_efficientnet_lite0", teacher_size=128,
            teacher_views=2, student_size=64, batch_size=128, optimiser="muon", lr=5e-3,
            save_every=0)
ROWS = {  # settings that differ from BASE
    "resnet10t, three stages": dict(
        student="resnet10t",
        student_args="layers=(1,1,2,0) channels=(64,128,224,224) stem_width=16"),
    "ViT, patches of 8 at 32 px": dict(student="vit_tiny_patch16_224", student_size=32,
                                       student_args="patch_size=8 depth=4"),
    "resnet10t": dict(student="resnet10t"),
    "mobilenetv4_conv_small": dict(student="mobilenetv4_conv_small"),
    "convnext_atto": dict(student="convnext_atto"),
    "regnetx_002": dict(student="regnetx_002"),
    "edgenext_xx_small": dict(student="edgenext_xx_small"),
    "ViT, patches of 16": dict(student="vit_tiny_patch16_224", student_args="depth=6"),
    "repvit_m0_9": dict(student="repvit_m0_9"),
}


def split(images):
    """Write the data set of the students."""
    if not FOLDER.exists():
        rows = datasets.load_dataset(images)["train"]
        order = np.random.default_rng(0).permutation(len(rows))
        parts = dict(train=order[:IMAGES], test=order[IMAGES : IMAGES + TEST])
        parts = {name: rows.select(np.sort(part)) for name, part in parts.items()}
        datasets.DatasetDict(parts).save_to_disk(str(FOLDER))


def step_seconds(cfg):
    """The median of seven training steps of the student, with its optimiser."""
    student = model.build_student(cfg).train()
    optimiser = train.Muon([dict(params=list(student.parameters()))], cfg.lr, torch.float32)
    images = torch.rand(cfg.batch_size, 3, cfg.student_size, cfg.student_size)
    seconds = []
    for _ in range(8):
        begin = monotonic()
        features = student(images)
        (features.cls.mean() + features.patches.mean()).backward()
        optimiser.step()
        optimiser.zero_grad()
        seconds.append(monotonic() - begin)
    return float(np.median(seconds[1:]))


def run(row, weights):
    cfg = Config(**BASE | ROWS[row] | dict(teacher_weights=weights, run_dir=f"runs/students/{row}"))
    epochs = max(2, round(60 * MINUTES / step_seconds(cfg) * cfg.batch_size / IMAGES))
    last = train.main(Config(**vars(cfg) | dict(epochs=epochs)))
    saved, cfg = model.load_checkpoint(cfg.run_path)
    evaluator = evaluation.Evaluator(cfg)
    student = model.build_student(cfg, saved["student"])
    rows = [evaluator.row("student", student)]
    if not any(line["row"] == "teacher" for line in runs.known(RUNS)):
        runs.add(RUNS, dict(row="teacher", **evaluator.row("teacher", model.load_teacher(cfg))))
    line = dict(row=row, settings=ROWS[row] | dict(epochs=epochs), steps=last["step"],
                loss=last["loss"], seconds=last["seconds"], memory_gb=last["memory_gb"],
                trained_per_s=last["step"] * cfg.batch_size / last["seconds"], **rows[0])
    runs.add(RUNS, line | model.environment(torch.device("cpu")))


def table():
    teacher, *found = sorted(runs.known(RUNS), key=lambda line: line["row"] != "teacher")
    head = "student|parameters, M|GFLOPs|trained, images/s|minutes|steps|GB|k-NN|linear|keeps"
    rows = [head.split("|")]
    for line in sorted(found, key=lambda line: -line["knn20"]):
        kept = [f"{100 * line[key] / teacher[key]:.0f}" for key in ("knn20", "linear")]
        rows.append([line["row"], f"{line['params_m']:.2f}", f"{line['gflops']:.3f}",
                     f"{line['trained_per_s']:.0f}", f"{line['seconds'] / 60:.1f}", line["steps"],
                     f"{line['memory_gb']:.1f}", f"{100 * line['knn20']:.1f}",
                     f"{100 * line['linear']:.1f}", " / ".join(kept)])
    return runs.markdown(*rows)


if __name__ == "__main__":
    if "--table" in sys.argv:
        print(table())
    elif "--row" in sys.argv:
        run(sys.argv[-1], sys.argv[-2])
    else:
        images, weights, *names = sys.argv[1:]
        split(images)
        for row in names or ROWS:
            subprocess.run([sys.executable, __file__, "--row", weights, row], check=False)
