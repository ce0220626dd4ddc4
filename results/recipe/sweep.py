"""What each setting is worth: short runs on CIFAR-10 that differ from `base` in one thing.

    python results/recipe/sweep.py IMAGES WEIGHTS                  # every row, three seeds
    python results/recipe/sweep.py IMAGES WEIGHTS base "lr 2e-3"   # some
    python results/recipe/sweep.py IMAGES WEIGHTS "lr 2e-3@1"      # one seed of one
    python results/recipe/sweep.py --table                         # runs.jsonl as Markdown

IMAGES is CIFAR-10 as train.py's --dataset takes it, WEIGHTS those of the stand-in teacher. Every
row is a call of `train.main` and is evaluated by `eval.Evaluator`. Nothing is chosen on test
images: a fixed tenth of the training images is held out, from students and from the k-NN and probe
that are tested on it. Objectives that train.py does not have are below. Each run adds a line to
runs.jsonl; runs that are there already are not repeated. The rows with a ViT teacher read
runs/vit-teacher.safetensors (README.md: how it is made); without it they are run only by name.
"""

import dataclasses
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1])]

import eval as evaluation  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from config import Config  # noqa: E402
from examples.forks import queue_kl  # noqa: E402
from results.records import add, known, markdown, mean_and_spread  # noqa: E402

RUNS = HERE / "runs.jsonl"
HELD_OUT = 5_000  # of the 50,000 training images
SEEDS = 3
BASE = dict(
    teacher="tf_efficientnet_lite0", teacher_size=96, student="vit_tiny_patch16_224",
    student_size=32, student_args="depth=4 patch_size=8", batch_size=128, epochs=10,
    max_samples=20_000, teacher_views=2, save_every=0)
VIT_S = dict(
    student="vit_small_patch16_224", student_size=48, student_args="", batch_size=256,
    max_samples=0)
VIT_TEACHER = dict(  # a ViT-S/14 in DINOv2's layout that has not seen the held-out images
    teacher="dinov2_vits14", teacher_size=112, teacher_weights="runs/vit-teacher.safetensors")
CONV = dict(student="resnet10t", student_size=64, student_args="", epochs=4)

# ---------------------------------------------------------------------------- other objectives


class Whitened(model.Distiller):
    """Targets are divided by their standard deviation to another power than Head's own."""

    power = 1.0

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        self.cls_head.whiten = self.patch_head.whiten = self.power


class NotWhitened(Whitened):
    power = 0.0


class RandomAxes(model.Distiller):
    """Targets on random orthonormal axes, not whitened."""

    def fit(self, features):
        super().fit(features)
        for head in (self.cls_head, self.patch_head):
            generator = torch.Generator().manual_seed(0)
            axes = nn.init.orthogonal_(torch.empty(head.basis.shape), generator=generator)
            head.basis.copy_(axes)
            head.scale.fill_(1)


class MSE(model.Distiller):
    """Mean squared difference of unit vectors: (2 - 2 cos) / D."""

    def losses(self, features, target):
        loss, stats = super().losses(features, target)
        return loss * 2 / target.shape[-1], stats


class Raw(model.Distiller):
    """Trained maps to the teacher's width; targets as the teacher outputs them."""

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, dataclasses.replace(cfg, head="linear"))

    def fit(self, features):
        pass


class QueueAndPatchKL(queue_kl.QueueKL, Raw):
    """LightlyTrain's v3: KL of the similarities to a queue of earlier targets, and of each patch's
    similarities to all patches of its image."""

    size = 8192

    def losses(self, features, target):
        _, stats = super().losses(features, target)
        patches = self.patch_head.predict(features.patches), target[:, 1:]
        student, teacher = (F.normalize(x.float(), dim=-1) for x in patches)
        student, teacher = ((x @ x.mT / self.temperature).log_softmax(-1)
                            for x in (student, teacher))
        kl = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1).mean()
        return stats["cls"] + kl, stats | dict(patch=kl)


class Truncated(model.Distiller):
    """The teacher's first N patches in raster order stand for the student's N."""

    def on_student_grid(self, features):
        return features._replace(patches=features.patches[:, : self.student.grid[0] ** 2])


class TrainedMap(Raw):
    """A trained map on the teacher's side, in place of a fixed one."""

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        self.cls_map = nn.Linear(teacher.cls_dim, student.cls_dim)
        self.patch_map = nn.Linear(teacher.patch_dim, student.patch_dim)
        self.cls_head.predict = self.patch_head.predict = nn.Identity()

    def losses(self, features, target):
        cls, patches = self.cls_map(target[:, :1]), self.patch_map(target[:, 1:])
        return super().losses(features, torch.cat([cls, patches], 1))


# ---------------------------------------------------------------------------- rows

NAIVE = dict(teacher_size=192, max_samples=5_000, epochs=20)
ROWS = {  # settings of train.py that differ, and perhaps an objective
    "base": {},
    "random axes, not whitened": dict(objective=RandomAxes),
    "head linear": dict(head="linear"),
    "targets not whitened": dict(objective=NotWhitened),
    "targets whole whitened": dict(objective=Whitened),
    "loss mse": dict(objective=MSE),
    "patch weight 0": dict(patch_weight=0.0),
    "patch weight 1": dict(patch_weight=1.0),
    "pool mean": dict(pool="mean"),
    "crop 0.2": dict(crop_scale=0.2),
    "crop 0.7": dict(crop_scale=0.7),
    "40 epochs": dict(epochs=40),
    "40 epochs, V = 4": dict(epochs=40, teacher_views=4),
    "40 epochs, V = 4, crop 0.7": dict(epochs=40, teacher_views=4, crop_scale=0.7),
    "40 epochs, V = 4, patch weight 1": dict(epochs=40, teacher_views=4, patch_weight=1.0),
    "lr 5e-4": dict(lr=5e-4),
    "lr 2e-3": dict(lr=2e-3),
    "ViT-S/16": VIT_S,
    "ViT-S/16, lr 5e-4": dict(VIT_S, lr=5e-4),
    "ViT-S/16, lr 2e-3": dict(VIT_S, lr=2e-3),
    "ViT teacher": VIT_TEACHER,
    "ViT teacher, pool mean": dict(VIT_TEACHER, pool="mean"),
    "ViT teacher, patch weight 0": dict(VIT_TEACHER, patch_weight=0.0),
    "ViT teacher, head linear": dict(VIT_TEACHER, head="linear"),
    "V = 1": dict(teacher_views=1),
    "V = 5": dict(teacher_views=5),
    "64 px, patches of 16": dict(student_size=64, student_args="depth=4"),
    "32 px, patches of 4": dict(student_args="depth=4 patch_size=4"),
    "conv net, head linear": CONV,
    "conv net, head pca": dict(CONV, head="pca"),
    # what others do
    "queue KL, patch KL (v3)": dict(objective=QueueAndPatchKL, pool="mean"),
    "queue KL, patch KL (v3), lr 2e-3": dict(objective=QueueAndPatchKL, pool="mean", lr=2e-3),
    "queue KL, patch KL (v3), lr 5e-4": dict(objective=QueueAndPatchKL, pool="mean", lr=5e-4),
    # what went wrong: a teacher's grid (6 x 6) that is larger than the student's (4 x 4)
    "naive: none of the mistakes": NAIVE,
    "naive: trained map on the teacher's side": dict(NAIVE, objective=TrainedMap),
    "naive: truncated patches": dict(NAIVE, objective=Truncated),
    "naive: mean MSE": dict(NAIVE, objective=MSE),
}
BESIDE = {  # first words of a row -> the row that the table compares it with; others with base
    "ViT-S/16": "ViT-S/16",
    "ViT teacher": "ViT teacher",
    "40 epochs": "40 epochs, V = 4",
    "conv net": "conv net, head linear",
    "naive": "naive: none of the mistakes",
}

# ---------------------------------------------------------------------------- a run


def held_out(images: str, cache: str = "cache") -> str:
    """The training images as a data set of its own, 45,000 to learn from and 5,000 to test on."""
    import datasets

    folder = Path(cache) / "cifar10-held-out"
    if not folder.exists():
        name = "uoft-cs/cifar10" if images == "cifar10" else images
        rows = datasets.load_dataset(name)["train"].shuffle(seed=0)
        parts = dict(train=rows.select(range(HELD_OUT, len(rows))),
                     test=rows.select(range(HELD_OUT)))
        datasets.DatasetDict(parts).save_to_disk(str(folder))
    return str(folder)


def one(row: str, seed: int, images: str, weights: str) -> dict:
    changes = {k: v for k, v in ROWS[row].items() if k != "objective"}
    objective = ROWS[row].get("objective", model.Distiller)
    name = "".join(c if c.isalnum() else "_" for c in row)
    cfg = Config(**BASE | dict(teacher_weights=weights) | changes | dict(
        dataset=held_out(images), seed=seed, run_dir=f"runs/recipe/{name}-{seed}"))
    begin = time.time()
    last = train.main(cfg, objective=objective)
    minutes = (time.time() - begin) / 60
    saved, _ = model.load_checkpoint(cfg.run_path)
    student = model.build_student(cfg, saved["student"])
    evaluator = evaluation.Evaluator(dataclasses.replace(cfg, max_samples=0))
    return dict(row=row, seed=seed, **evaluator.row(row, student), loss=last["loss"],
                minutes=minutes, memory_gb=last["memory_gb"], base=BASE,
                **model.environment(evaluator.device),
                settings={k: getattr(v, "__name__", v) for k, v in ROWS[row].items()})


def table() -> str:
    """Means over seeds ± standard deviations; differences to another row, taken seed by seed,
    ± standard errors."""
    runs = {(run["row"], run["seed"]): run for run in known(RUNS)}
    rows = [["row", "seeds", "k-NN", "linear", "beside", "k-NN", "linear"]]
    for name in dict.fromkeys(row for row, _ in runs):
        seeds = [seed for row, seed in runs if row == name]
        base = "base, on a CPU" if runs[name, seeds[0]].get("device") == "cpu" else "base"
        other = next((row for kind, row in BESIDE.items() if name.startswith(kind)), base)
        both = [seed for seed in seeds if (other, seed) in runs]
        means, differences = [], []
        for key in ("knn20", "linear"):
            means.append(mean_and_spread([100 * runs[name, seed][key] for seed in seeds]))
            differences.append(mean_and_spread(
                [100 * (runs[name, seed][key] - runs[other, seed][key]) for seed in both],
                len(both) ** 0.5))
        rows.append([name, len(seeds), *means, other, *differences])
    return markdown(*rows)


def main(images: str, weights: str, *rows: str) -> None:
    done = {(run["row"], run["seed"]) for run in known(RUNS)}
    if ("teacher", 0) not in done:
        cfg = Config(**BASE | dict(
            dataset=held_out(images), max_samples=0, teacher_weights=weights))
        teacher = evaluation.Evaluator(cfg).row("teacher", model.load_teacher(cfg))
        add(RUNS, dict(row="teacher", seed=0) | teacher)
    rows = rows or [row for row, changes in ROWS.items()
                    if Path(changes.get("teacher_weights", HERE)).exists()]
    for seed in range(SEEDS):
        for name in rows:
            row, _, only = name.partition("@")
            if only in ("", str(seed)) and (row, seed) not in done:
                add(RUNS, one(row, seed, images, weights))


if __name__ == "__main__":
    if "--table" in sys.argv:
        print(table())
    else:
        main(*sys.argv[1:])
