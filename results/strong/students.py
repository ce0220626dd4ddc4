"""Which student, and which settings of one: runs that learn from one teacher for equal minutes on a
CPU.

    python results/strong/students.py "resnet10t" "convnext_atto"  # some rows
    python results/strong/students.py                              # all rows, one after the other
    python results/strong/students.py --table

The teacher and the images are those of teacher.py; two views. Tested are the 5,000 held-out images;
k-NN and probe learn from the labels of the students' 25,000. Each row is a process of its own: it
times a few steps in bf16 and in fp32, takes the faster, and trains for MINUTES, at whose end the
learning rate is zero. Each run adds a line to students.jsonl."""

import math
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from time import monotonic

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import records  # noqa: E402

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from config import Config  # noqa: E402
from examples.forks import jitter  # noqa: E402

RUNS = HERE / "students.jsonl"
MINUTES = 5
BASE = dict(dataset="cache/strong/half", test_split="held", teacher="tf_efficientnet_lite0",
            teacher_weights="runs/strong/teacher.safetensors", teacher_size=128, teacher_views=2,
            student_size=64, batch_size=128, optimiser="muon", lr=5e-3, epochs=1000, save_every=0)
THREE_STAGES = dict(student="resnet10t", student_args="layers=(1,1,2,0) "
                    "channels=(64,128,224,224) stem_width=16")
ROWS = {  # settings that differ from BASE
    "resnet10t": dict(student="resnet10t"),
    "mobilenetv4_conv_small": dict(student="mobilenetv4_conv_small"),
    "convnext_atto": dict(student="convnext_atto"),
    "regnetx_002": dict(student="regnetx_002"),
    "repvit_m0_9": dict(student="repvit_m0_9"),
    "ViT, patches of 8 at 32 px": dict(student="vit_tiny_patch16_224", student_size=32,
                                       student_args="patch_size=8 depth=4"),
    "resnet10t, three stages": THREE_STAGES,
    "the same, cutmix": THREE_STAGES,
    "edgenext_xx_small": dict(student="edgenext_xx_small"),
    "efficientvit_b0": dict(student="efficientvit_b0"),
    "fastvit_t8": dict(student="fastvit_t8"),
    "ViT, patches of 4 at 32 px": dict(student="vit_tiny_patch16_224", student_size=32,
                                       student_args="patch_size=4 depth=4"),
}
ROWS |= {f"three stages, {name}": THREE_STAGES | change for name, change in {
    "as above": {}, "seed 1": dict(seed=1), "1 view": dict(teacher_views=1),
    "4 views": dict(teacher_views=4), "8 views": dict(teacher_views=8),
    "crops from 0.08": dict(crop_scale=0.08), "crops from 0.2": dict(crop_scale=0.2),
    "crops from 0.7": dict(crop_scale=0.7), "patch weight 0": dict(patch_weight=0.0),
    "patch weight 1": dict(patch_weight=1.0), "patch weight 2": dict(patch_weight=2.0),
    "not whitened": {}, "half whitened": {}, "jitter": {},
    "batches of 256, rate 7e-3": dict(batch_size=256, lr=7e-3),
    "batches of 64, rate 3.5e-3": dict(batch_size=64, lr=3.5e-3),
    "rate 1e-2": dict(lr=1e-2), "weight decay 0.2": dict(weight_decay=0.2),
}.items()}
WHITEN = {"three stages, not whitened": 0.0, "three stages, half whitened": 0.5}


class Cutmix(model.Distiller):
    """Half of the images have a rectangle of another image's view, the same for teacher and student
    (function matching, Beyer et al. 2021). It follows from (seed, view, image): targets are cached
    as ever."""

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        self.store = data.open_store(cfg, cfg.train_split, cfg.max_samples)

    def shared_view(self, images, view, index):
        size, seed = images.shape[-1], self.cfg.seed
        mixed, other, area, x, y = data.uniform(index, 5, 36, seed, view).unbind(1)
        other = (other * len(self.store)).long().numpy()
        crops = data.view_crops(other, seed, view, self.cfg.crop_scale)
        others = data.render(self.store.images[other], size, *crops)
        side = (0.1 + 0.5 * area).sqrt() * (mixed < 0.5)  # of the rectangle
        place = (torch.arange(size) + 0.5) * 16 / size  # its edges lie on sixteenths
        inside = [((start * (1 - side) * 16).round()[:, None] < place)
                  & (place < ((start * (1 - side) + side) * 16).round()[:, None])
                  for start in (y, x)]
        return torch.where((inside[0][:, :, None] & inside[1][:, None])[:, None], others, images)


OBJECTIVES = {"the same, cutmix": Cutmix, "three stages, jitter": jitter.Jitter}


def step_seconds(cfg, precision):
    """The median of seven training steps of the student: rendering, both passes, optimiser."""
    dtype = model.pick_dtype(precision, torch.device("cpu"))
    student = model.build_student(cfg).train()
    optimiser = train.Muon(student.parameters(), cfg.lr, dtype)
    stored = torch.randint(256, (cfg.batch_size, 3, 32, 32), dtype=torch.uint8)
    boxes, flips = data.view_crops(np.arange(cfg.batch_size), 0, 0, cfg.crop_scale)
    seconds = []
    for _ in range(8):
        begin = monotonic()
        images = data.render(stored, cfg.student_size, boxes, flips)
        with torch.autocast("cpu", dtype, enabled=precision == "bf16"):
            features = student(images)
            loss = features.cls.square().mean() + features.patches.square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        seconds.append(monotonic() - begin)
    return float(np.median(seconds[1:]))


def by_the_clock(step, steps_per_epoch, cfg):
    """The learning rate; at its end the run stops as on Ctrl-C."""
    began = BEGAN.setdefault(cfg.run_dir, monotonic())
    share = min(1, (monotonic() - began) / (60 * MINUTES))
    if share == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return cfg.lr * min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * share)))


BEGAN = {}
train.learning_rate = by_the_clock


def run(row):
    cfg = Config(**BASE | ROWS[row] | dict(run_dir=f"runs/students/{row}"))
    seconds = {precision: step_seconds(cfg, precision) for precision in ("bf16", "fp32")}
    chosen = dict(precision=min(seconds, key=seconds.get))
    model.WHITEN["linear"] = WHITEN.get(row, 1.0)
    with suppress(SystemExit):
        train.main(Config(**vars(cfg) | chosen), OBJECTIVES.get(row, model.Distiller))
    saved, cfg = model.load_checkpoint(cfg.run_path)
    last = saved["history"][-1]
    evaluator = evaluation.Evaluator(cfg)
    student = model.build_student(cfg, saved["student"])
    found = evaluator.row("student", student)
    if not any(line["row"] == "teacher" for line in records.known(RUNS)):
        records.add(RUNS, dict(row="teacher", **evaluator.row("teacher", model.load_teacher(cfg))))
    line = dict(row=row, settings=ROWS[row] | chosen, epochs=last["epoch"],
                loss=last["loss"], seconds=last["seconds"], memory_gb=last["memory_gb"],
                trained_per_s=last["step"] * cfg.batch_size / last["seconds"], **found)
    records.add(RUNS, line | model.environment(torch.device("cpu")))


def table():
    """As README.md has it, the best first."""
    found = [line for line in records.known(RUNS) if line["row"] != "teacher"]
    lines = [f"{'':36}  M params  GFLOPs  images/s  epochs   GB  k-NN  linear"]
    for line in sorted(found, key=lambda line: -line["knn20"]):
        lines.append(f"{line['row']:36}{line['params_m']:10.2f}{line['gflops']:8.3f}"
                     f"{line['trained_per_s']:10.0f}{line['epochs']:8.1f}{line['memory_gb']:5.1f}"
                     f"{100 * line['knn20']:6.1f}{100 * line['linear']:8.1f}")
    return "\n".join(lines)


if __name__ == "__main__":
    if "--table" in sys.argv:
        print(table())
    elif "--row" in sys.argv:
        run(sys.argv[-1])
    else:
        for row in sys.argv[1:] or ROWS:
            subprocess.run([sys.executable, __file__, "--row", row], check=False)
