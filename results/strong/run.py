"""Students of a strong teacher, one row each: what limits them.

    python results/strong/run.py "R9" "R9, cutmix"   # rows, one after the other
    python results/strong/run.py --test "R9"         # the row's checkpoint on the test images
    python results/strong/run.py --held "R9"         # the same on the held-out ones, again
    python results/strong/run.py --table             # runs.jsonl as Markdown

Every row is a call of `train.main` on the 25,000 training images that the teacher has not seen, in
cache/strong/half (teacher.py). Rows are chosen on its split "held": 5,000 images of the teacher's
half, which no student, no k-NN and no probe has learned from. --test is for what has been chosen.
Each run adds a line to runs.jsonl. "map" is k-NN in the space that the head's trained map leads to,
the teacher's."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1])]

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from config import Config  # noqa: E402

RUNS = HERE / "runs.jsonl"

# ---------------------------------------------------------------------------- objectives


class Cutmix(model.Distiller):
    """A part of the images have a rectangle of another image's view. Teacher and student see the
    same, which follows from (seed, view, image): targets are cached as ever."""

    share = 0.5  # of the images
    areas = 0.1, 0.6  # of the rectangle
    steps = 16  # edges lie on sixteenths of the image, which are pixels of both networks

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        self.store = data.open_store(cfg, cfg.train_split, cfg.max_samples)
        self.plan = lru_cache(2)(self.make_plan)

    def make_plan(self, view):
        """Of every image: its partner, and the rectangle's edges in sixteenths, float [I, 4]."""
        random = np.random.default_rng([self.cfg.seed, 2, view])
        partner = torch.from_numpy(random.permutation(len(self.store)))
        mixed, area, x, y = torch.from_numpy(random.random((len(self.store), 4), np.float32)).T
        low, high = self.areas
        side = (low + (high - low) * area).sqrt() * (mixed < self.share)
        x, y = x * (1 - side), y * (1 - side)
        return partner, (torch.stack([x, y, x + side, y + side], 1) * self.steps).round()

    def shared_view(self, images, view, index):
        partner, edges = self.plan(view)
        partner, (left, top, right, bottom) = partner[index], edges[index, :, None].unbind(1)
        boxes = data.view_boxes(self.cfg.seed, view, len(self.store), self.cfg.crop_scale)[partner]
        others = self.store.images[partner].to(images.device)
        others = data.render(others, boxes, images.shape[-1])
        place = (torch.arange(images.shape[-1]) + 0.5) * self.steps / images.shape[-1]
        across, down = (left < place) & (place < right), (top < place) & (place < bottom)
        inside = (down[:, None, :, None] & across[:, None, None, :]).to(images.device)
        return torch.where(inside, others, images)


class Muon(torch.optim.Optimizer):
    """Matrices and kernels: momentum, made orthogonal (Newton-Schulz), as large as AdamW's steps
    (Liu et al. 2025). Others: AdamW."""

    def __init__(self, groups, lr, momentum=0.95, betas=(0.9, 0.99), steps=5):
        self.steps = steps
        super().__init__(groups, dict(lr=lr, weight_decay=0.0, momentum=momentum, betas=betas))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr = group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                p.mul_(1 - lr * group["weight_decay"])
                if group.get("muon", p.ndim > 1):
                    m = state.setdefault("m", torch.zeros_like(p))
                    m.lerp_(p.grad, 1 - group["momentum"])
                    update = p.grad.lerp(m, group["momentum"]).flatten(1)
                    update = orthogonal(update, self.steps)
                    p.add_(update.view_as(p), alpha=-0.2 * lr * max(update.shape) ** 0.5)
                else:
                    m = state.setdefault("m", torch.zeros_like(p))
                    v = state.setdefault("v", torch.zeros_like(p))
                    t = state["t"] = state.get("t", 0) + 1
                    b1, b2 = group["betas"]
                    m.lerp_(p.grad, 1 - b1)
                    v.lerp_(p.grad.square(), 1 - b2)
                    p.sub_(lr * m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + 1e-8))


def orthogonal(G, steps):
    X = (G.mT if len(G) > G.shape[1] else G).bfloat16()
    X = X / (X.norm() + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return (X.mT if len(G) > G.shape[1] else X).to(G)


class MuonRun(train.Run):
    def __init__(self, cfg, *others):
        super().__init__(cfg, *others)
        groups = self.objective.parameter_groups(cfg.weight_decay)
        self.optimiser = Muon(groups, cfg.lr)


class MuonBody(train.Run):
    """Muon for the student's kernels; AdamW at a fifth of the rate for all else, the heads too."""

    steps = 3  # of Newton-Schulz, as in airbench

    def __init__(self, cfg, *others):
        super().__init__(cfg, *others)
        body = {id(p) for p in self.objective.student.parameters() if p.ndim in (2, 4)}
        groups = []
        for group in self.objective.parameter_groups(cfg.weight_decay):
            for muon in (True, False):
                some = [p for p in group["params"] if (id(p) in body) == muon]
                scale = {} if muon else dict(lr_scale=0.2)
                groups.append(group | dict(params=some, muon=muon) | scale)
        groups = [group for group in groups if group["params"]]
        self.optimiser = Muon(groups, cfg.lr, steps=self.steps)


# ---------------------------------------------------------------------------- rows

R9 = "layers=(1,1,1,0) channels=(64,128,256,256) stem_width=16"
R11 = "layers=(1,1,2,0) channels=(64,128,224,224) stem_width=16"
BASE = dict(
    teacher="tf_efficientnet_lite0", teacher_weights="runs/strong/teacher.safetensors",
    teacher_size=128, student="resnet10t", student_args=R9, student_size=64, batch_size=128,
    epochs=12, teacher_views=4, dataset="cache/strong/half", test_split="held", save_every=0,
    log_every=1000)
EARLY = dict(teacher_weights="runs/strong/early.safetensors", teacher_size=96, epochs=4,
             teacher_views=2)  # the teacher after two epochs at 96 px, while the other one trained
LONG = dict(lr=7e-3, run=MuonBody, batch_size=256, student_args=R11, teacher_views=6, epochs=30,
            eval_every=5)
R9_8 = dict(lr=2e-3, batch_size=256, student_args=R9, teacher_views=4, epochs=8, eval_every=2)
ADAMW = dict(LONG, run=train.Run, lr=2e-3)
ROWS = {  # settings of train.py that differ, and perhaps an objective, a Run
    "early: R9": EARLY,
    "early: R9, lr 3e-3": dict(EARLY, lr=3e-3),
    "early: R9, lr 1e-2": dict(EARLY, lr=1e-2),
    "early: R9, lr 2e-2": dict(EARLY, lr=2e-2),
    "R11, Muon, 20 epochs": dict(LONG, epochs=20, teacher_views=4),
    "early: R9, Muon 5e-3": dict(EARLY, lr=5e-3, run=MuonRun),
    "early: R9, Muon 5e-3 in the body": dict(EARLY, lr=5e-3, run=MuonBody),
    "early: R9, Muon 1e-2 in the body": dict(EARLY, lr=1e-2, run=MuonBody),
    "early: R9, Muon 1e-2 in the body, batch 256": dict(
        EARLY, lr=1e-2, run=MuonBody, batch_size=256),
    "early: R11, Muon 1e-2 in the body, batch 256": dict(
        EARLY, lr=1e-2, run=MuonBody, batch_size=256, student_args=R11),
    "R9, Muon, 8 epochs": dict(R9_8, run=MuonBody, lr=7e-3),
    "R9, AdamW, 8 epochs": R9_8,
    "R9, Muon, two views, by the clock": dict(
        R9_8, run=MuonBody, lr=7e-3, teacher_views=2, epochs=100, clock=True, eval_every=2),
    "R11, Muon, 30 epochs": LONG,
    "R11, Muon, 12 epochs": dict(LONG, epochs=12),
    "R11, AdamW, 12 epochs": dict(ADAMW, epochs=12),
    "R11, AdamW, 30 epochs": ADAMW,
    "R11, Muon, cutmix, 30 epochs": dict(LONG, objective=Cutmix),
    "early: R9, patch weight 0": dict(EARLY, patch_weight=0.0),
    "early: ResNet-10t": dict(EARLY, student_args=""),
    "early: R9 of 3 blocks": dict(EARLY, student_args=R9.replace("1,1,1", "1,1,2")),
}

# ---------------------------------------------------------------------------- a run


def config(row, seed):
    changes = {k: v for k, v in ROWS[row].items() if k not in ("objective", "run", "clock")}
    name = "".join(c if c.isalnum() else "_" for c in row)
    return Config(**BASE | changes | dict(seed=seed, run_dir=f"runs/strong/{name}-{seed}"))


def one(row, seed):
    cfg, begin = config(row, seed), time.time()
    train.Run = ROWS[row].get("run", PLAIN)
    train.learning_rate = by_the_clock if ROWS[row].get("clock") else BY_STEPS
    with contextlib.suppress(SystemExit):  # by the clock
        train.main(cfg, objective=ROWS[row].get("objective", model.Distiller))
    return evaluate(row, seed) | dict(all_minutes=(time.time() - begin) / 60)


PLAIN, BY_STEPS = train.Run, train.learning_rate


def by_the_clock(step, steps_per_epoch, cfg):
    """A rate that ends at the time of day that END states in seconds, for a machine whose load
    nobody knows; the run then stops as on Ctrl-C."""
    begin = STARTED.setdefault("at", time.time())
    share = min(1, (time.time() - begin) / (float(os.environ["END"]) - begin))
    if share == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return cfg.lr * min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * share)))


STARTED = {}


def evaluate(row, seed, split="held"):
    cfg = config(row, seed)
    saved, _ = model.load_checkpoint(cfg.run_path / "checkpoint_latest.pth")
    student = model.student_of(cfg, saved["student"])
    bench = evaluation.Bench(dataclasses.replace(cfg, test_split=split))
    result = dict(row=row, seed=seed, split=split, epoch=saved["epoch"])
    features = bench.features(student)
    result |= bench.evaluate(*features)
    weight = saved["objective"].get("heads.cls.predict.weight")
    if weight is not None:
        bias = saved["objective"]["heads.cls.predict.bias"]
        mapped = [torch.nn.functional.linear(x, weight, bias) for x in features]
        result["map_knn20"] = bench.evaluate(*mapped, probe=False)["knn20"]
    last = saved["history"][-1]
    result |= dict(loss=last["loss"], cos_cls=last["cos_cls"], memory_gb=last["memory_gb"],
                   train_minutes=last["seconds"] / 60)
    result |= dict(params_m=student.parameter_count / 1e6) | bench.speed(student)
    settings = {k: getattr(v, "__name__", v) for k, v in ROWS[row].items()}
    return result | dict(threads=torch.get_num_threads(), base=BASE, settings=settings,
                         **model.environment(bench.device))


def add(run):
    with open(RUNS, "a") as file:
        file.write(json.dumps(run) + "\n")
    print(json.dumps(run), flush=True)


def table():
    lines = ["| row | seed | split | k-NN | linear | k-NN, map | GFLOPs | minutes |",
             "|---" * 8 + "|"]
    for text in RUNS.read_text().splitlines():
        r = json.loads(text)
        lines.append(f"| {r['row']} | {r['seed']} | {r['split']} | {r['knn20']:.1%} | "
                     f"{r['linear']:.1%} | {r.get('map_knn20', 0):.1%} | {r['gflops']:.3f} | "
                     f"{r['train_minutes']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    rows = [row for row in sys.argv[1:] if not row.startswith("--")]
    if "--table" in sys.argv:
        print(table())
    for name in rows:
        row, _, seed = name.partition("@")
        if "--test" in sys.argv or "--held" in sys.argv:
            add(evaluate(row, int(seed or 0), split="test" if "--test" in sys.argv else "held"))
        else:
            add(one(row, int(seed or 0)))
