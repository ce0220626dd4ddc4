"""What each setting is worth: short runs on CIFAR-10 that differ from `base` in one thing.

    python results/recipe/sweep.py IMAGES WEIGHTS                     # every row
    python results/recipe/sweep.py IMAGES WEIGHTS "head linear" "base #2"  # some, one of seed 2
    python results/recipe/sweep.py --jobs=15 IMAGES WEIGHTS                # 15 at once, on a GPU
    python results/recipe/sweep.py --table                            # runs.jsonl as Markdown

IMAGES is CIFAR-10 as train.py's --dataset takes it, WEIGHTS those of the stand-in teacher (any timm
model: see TEACHER). The teacher is asked once about each view; its answers are kept as they are,
and in memory, so that rows with other heads and losses read the same ones. Student, heads, views,
schedule and verdict are the project's modules; the loop is train.py's without its precautions. What
train.py does not have is below: the peers' objectives, the naive ones, and what was an option of
train.py until it lost here (colour jitter, local crops, an MLP head, smooth L1). Each run adds
a line to runs.jsonl; runs that are there already are not repeated.
"""

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / "assets")]

from make_demo_teacher import jitter as jittered  # noqa: E402

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from config import Config  # noqa: E402
from model import Features  # noqa: E402

RUNS = HERE / "runs.jsonl"
TEACHER = "tf_efficientnet_lite0"
BASE = dict(teacher=TEACHER, teacher_size=96, student="vit_tiny_patch16_224", student_size=64,
            student_args="depth=4", batch_size=128, epochs=6, teacher_views=2, num_workers=1)
JUDGED = 20_000, 10_000  # training and test images of the verdict
# Where views come again and again: as many epochs as long runs have, over fewer images.
FEW = dict(max_samples=5_000, epochs=60, teacher_views=4)
LONG = dict(max_samples=12_500, epochs=50, teacher_views=4)
# Patches of CIFAR's own pixels; what gained, together; the patch loss without that of the CLS.
SMALL = dict(student_size=32, student_args="depth=4 patch_size=8")
WON = dict(SMALL, crop_scale=0.7, lr=2e-3)
ALONE = dict(cls_weight=0.0, patch_weight=1.0, pool="mean")
# The naive recipe needs a teacher grid (6 x 6) that is larger than the student's (4 x 4).
NAIVE = dict(teacher_size=192, max_samples=5_000, epochs=20, teacher_views=2, jitter=0.4)

LOCAL_AREA, LOCAL_SIZE = (0.05, 0.32), 32  # of a local crop: DINOv2's share of the view; pixels

# ---------------------------------------------------------------------------- other objectives


def smooth_l1(student, target):
    return F.smooth_l1_loss(student.float(), target.float())


class SmoothL1(model.Distiller):
    """Huber's distance (beta 1) to whole whitened targets."""

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        self.distance = smooth_l1
        self.cls_head.whiten = self.patch_head.whiten = 1.0


class MLP(model.Distiller):
    """`--head linear` with a hidden layer, twice the teacher's width."""

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, dataclasses.replace(cfg, head="linear"))
        wide = 2 * teacher.embed_dim
        for head in (self.cls_head, self.patch_head):
            head.predict = nn.Sequential(nn.Linear(student.embed_dim, wide), nn.GELU(),
                                         nn.Linear(wide, teacher.embed_dim))


class LocalCrops(model.Distiller):
    """Multi-crop: small parts of the view, each of which is to tell what the whole is."""

    def forward(self, images, targets, *crops):
        said = self.student(images)
        cls = [said.cls, *(self.student(crop).cls for crop in crops)]
        loss = sum(self.distance(each, targets[:, 0]) for each in cls) / len(cls)
        return loss + self.patch_weight * self.distance(said.patches, targets[:, 1:]), None


class Uncentred(model.Distiller):
    """Targets keep the mean that all images share."""

    def fit_heads(self, features):
        super().fit_heads(features)
        self.cls_head.mean.zero_()
        self.patch_head.mean.zero_()


class Whitened(model.Distiller):
    """Targets are divided by their standard deviation to another power than Head's own."""

    POWER = 1.0

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        self.cls_head.whiten = self.patch_head.whiten = self.POWER


class NotWhitened(Whitened):
    POWER = 0.0


class QuarterWhitened(Whitened):
    POWER = 0.25


class PatchMSE(nn.Module):
    """Patch features only: the mean squared error to the teacher's, unnormalised (LightlyTrain v2).

    A linear map of the student's patches, resampled to the teacher's grid. The student's embedding
    is the mean of its patches: its class token learns nothing.
    """

    def __init__(self, student, teacher, cfg):
        super().__init__()
        self.student, self.teacher_grid = student, teacher.grid
        self.predict = nn.Linear(student.embed_dim, teacher.embed_dim)

    def fit_heads(self, features):
        pass

    def targets(self, features):
        return features

    def forward(self, images, targets):
        patches = self.predict(self.student(images).patches)
        patches = model.resample_patches(patches, self.student.grid, self.teacher_grid)
        return F.mse_loss(patches.float(), targets.patches.float()), None


class QueueKL(PatchMSE):
    """The global embedding only: the teacher's similarities to a queue of its earlier answers.

    KL divergence of softmax(T Q / 0.07) and softmax(S Q / 0.07), all of unit length, S behind a
    linear map (LightlyTrain v1).
    """

    SIZE, TEMPERATURE = 8192, 0.07

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        generator = torch.Generator().manual_seed(0)
        queue = torch.randn(self.SIZE, teacher.embed_dim, generator=generator)
        self.register_buffer("queue", F.normalize(queue, dim=1))

    def fit_heads(self, features):
        seen = F.normalize(torch.cat([f.cls for f in features]).float(), dim=1)
        self.queue[: len(seen)] = seen

    def forward(self, images, targets):
        said = F.normalize(self.predict(self.student(images).cls).float(), dim=1)
        asked = F.normalize(targets.cls.float(), dim=1)
        queue = self.queue.clone()
        theirs = (asked @ queue.T / self.TEMPERATURE).log_softmax(1)
        ours = (said @ queue.T / self.TEMPERATURE).log_softmax(1)
        self.queue = torch.cat([asked, self.queue[: -len(asked)]])
        return F.kl_div(ours, theirs, log_target=True, reduction="batchmean"), None


class Truncated(model.Distiller):
    """The teacher's first N patches in raster order stand for the student's N."""

    def targets(self, features):
        patches = features.patches[:, : self.grid[0] * self.grid[1]]
        targets = self.cls_head.target(features.cls)[:, None], self.patch_head.target(patches)
        return torch.cat(targets, 1)


class TrainedMap(model.Distiller):
    """A trained linear map on the teacher's side in place of the fixed one."""

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        self.maps = nn.ModuleList(nn.Linear(teacher.embed_dim, student.embed_dim) for _ in "12")

    def patches(self, features):
        return model.resample_patches(features.patches, self.teacher_grid, self.grid)

    def targets(self, features):
        patches = self.maps[1](self.patches(features))
        return torch.cat([self.maps[0](features.cls)[:, None], patches], 1)


class TrainedTruncated(TrainedMap):
    def patches(self, features):
        return features.patches[:, : self.grid[0] * self.grid[1]]


# ---------------------------------------------------------------------------- rows

# Beside settings of train.py: objective, a class in place of model.Distiller; ema, the decay of a
# weight average that is judged in place of the last weights; jitter, the strength of the student's;
# crops, how many local ones; seeds, how many runs.
ROWS = {
    "base": dict(seeds=3),
    # head, targets, loss
    "head frozen": dict(head="frozen"),
    "head linear": dict(head="linear", seeds=3),
    "head mlp": dict(objective=MLP),
    "targets uncentred": dict(objective=Uncentred),
    "targets not whitened": dict(objective=NotWhitened, seeds=3),
    "targets quarter whitened": dict(objective=QuarterWhitened),
    "targets whitened": dict(objective=Whitened, seeds=3),
    "loss smooth_l1": dict(objective=SmoothL1),
    "loss mse": dict(loss="mse"),
    "patch weight 0": dict(patch_weight=0.0, seeds=3),
    "patch weight 0.25": dict(patch_weight=0.25),
    "patch weight 1": dict(patch_weight=1.0, seeds=3),
    "patch weight 2": dict(patch_weight=2.0),
    "cls weight 0, mean of patches": dict(ALONE),
    "pool mean": dict(pool="mean", seeds=3),
    "pool mean, patch weight 2": dict(pool="mean", patch_weight=2.0),
    # views
    "jitter 0.2": dict(jitter=0.2),
    "jitter 0.4": dict(jitter=0.4, seeds=3),
    "crop 0.2": dict(crop_scale=0.2),
    "crop 0.7": dict(crop_scale=0.7),
    "local crops 2 of 32 px": dict(
        objective=LocalCrops, crops=2, student_args="depth=4 dynamic_img_size=True"),
    "V = 1": dict(teacher_views=1, seeds=3),
    "V = 3": dict(teacher_views=3, seeds=3),
    "V = 6, no view twice": dict(teacher_views=6, seeds=3),
    "5,000 images, 60 epochs": dict(FEW, seeds=3),
    "5,000 images, 60 epochs, jitter 0.4": dict(FEW, jitter=0.4, seeds=3),
    "5,000 images, 60 epochs, V = 1": dict(FEW, teacher_views=1),
    "5,000 images, 60 epochs, V = 16": dict(FEW, teacher_views=16),
    "5,000 images, 60 epochs, crop 0.7": dict(FEW, crop_scale=0.7),
    "12,500 images, 50 epochs": dict(LONG),
    "12,500 images, 50 epochs, jitter 0.4": dict(LONG, jitter=0.4),
    "12,500 images, 50 epochs, V = 8": dict(LONG, teacher_views=8),
    "12,500 images, 50 epochs, crop 0.7": dict(LONG, crop_scale=0.7),
    "12,500 images, 50 epochs, lr 2e-3": dict(LONG, lr=2e-3),
    # optimisation
    "lr 5e-4": dict(lr=5e-4),
    "lr 2e-3": dict(lr=2e-3, seeds=3),
    "lr 4e-3": dict(lr=4e-3),
    "weight decay 0": dict(weight_decay=0.0),
    "weight decay 0.2": dict(weight_decay=0.2),
    "warm-up 0.2 epochs": dict(warmup_epochs=0.2),
    "batch 64": dict(batch_size=64),
    "batch 256": dict(batch_size=256),
    "batch 256, lr 2e-3": dict(batch_size=256, lr=2e-3),
    "ema 0.999": dict(ema=0.999),
    "ema 0.99": dict(ema=0.99),
    # students, and the teacher's size
    "teacher 128 px, grid 4 x 4": dict(teacher_size=128),
    "48 px, grid 3 x 3": dict(student_size=48),
    "96 px, grid 6 x 6": dict(student_size=96),
    "32 px, patch 8, grid 4 x 4": dict(SMALL),
    "48 px, patch 8, grid 6 x 6": dict(student_size=48, student_args="depth=4 patch_size=8"),
    "64 px, patch 8, grid 8 x 8": dict(student_args="depth=4 patch_size=8"),
    "ResNet stem, 128 px, grid 4 x 4": dict(student="vit_tiny_r_s16_p8_224", student_size=128),
    "width 256": dict(student_args="depth=4 embed_dim=256 num_heads=4"),
    "width 384": dict(student_args="depth=4 embed_dim=384 num_heads=6"),
    "depth 8": dict(student_args="depth=8"),
    "init jax": dict(student_args="depth=4 weight_init=jax"),
    # what won, together, with the CLS and without it
    "32 px, patch 8, crop 0.7, lr 2e-3": dict(WON),
    "32 px, patch 8, crop 0.7, lr 2e-3, patches alone": dict(WON, **ALONE),
} | {
    f"{name}{', head pca' * (head == 'pca')}": dict(
        student=name, student_args="", head=head, seeds=3 if name == "resnet10t" else 1)
    for name in ("resnet10t", "resnet18", "mobilenetv3_small_100", "convnext_atto",
                 "swin_tiny_patch4_window7_224")
    for head in ("linear", "pca")
} | {
    # what others do
    "normalised MSE, frozen random map": dict(loss="mse", head="frozen", seeds=3),
    "patch MSE only": dict(objective=PatchMSE, pool="mean", seeds=3),
    "KL over a queue, CLS only": dict(objective=QueueKL, seeds=3),
    # what went wrong
    "naive: none of the mistakes": dict(NAIVE),
    "naive: trained map on the teacher's side": dict(NAIVE, objective=TrainedMap),
    "naive: truncated patches": dict(NAIVE, objective=Truncated),
    "naive: mean MSE": dict(NAIVE, loss="mse"),
    "naive: trained map, truncated": dict(NAIVE, objective=TrainedTruncated),
    "naive: trained map, mean MSE": dict(NAIVE, objective=TrainedMap, loss="mse"),
    "naive: truncated, mean MSE": dict(NAIVE, objective=Truncated, loss="mse"),
    "naive: all three": dict(NAIVE, objective=TrainedTruncated, loss="mse"),
}


def config_of(row: str, images: str, weights: str, seed: int = 0) -> Config:
    names = {field.name for field in dataclasses.fields(Config)}
    changes = {k: v for k, v in ROWS[row].items() if k in names}
    return Config(**BASE | changes | dict(dataset=images, teacher_weights=weights, seed=seed))


# ---------------------------------------------------------------------------- a run


class Answers:
    """Images on the device, and what the teacher says of each view of each, as it says it.

    Asked once, kept on disk, the same for every seed.
    """

    def __init__(self, cfg: Config, device):
        dtype = model.pick_dtype(cfg.precision, device)
        self.store = data.open_store(cfg, "train", cfg.teacher_size, cfg.max_samples)
        self.images, self.crop_scale = self.store.images.on(device, "images"), cfg.crop_scale
        teacher = model.load_teacher(cfg.teacher, cfg.teacher_size, cfg.teacher_weights).to(device)
        key = model.fingerprint(teacher, self.store.path.name, cfg.teacher_size, cfg.crop_scale)
        path = Path(cfg.cache_dir) / "answers" / key
        shape = len(self.store), 1 + teacher.grid[0] * teacher.grid[1], teacher.embed_dim
        bank = data.Bank(path, cfg.teacher_views, *shape)
        with data.locked(path.with_suffix(".filling")), torch.inference_mode():
            for number, done in enumerate(bank.done):
                rest = torch.from_numpy(np.flatnonzero(done == 0)).split(256)
                for index in data.progress(rest, f"asking about view {number}", len(rest)):
                    views = data.render(self.images[index], self.box(number, index),
                                        cfg.teacher_size)
                    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                        said = teacher(views)
                    values = torch.cat([said.cls[:, None], said.patches], 1).float()
                    bank.write(number, index, *data.quantise(values))
                bank.flush()
        self.views, self.teacher = bank.on(device), teacher

    def box(self, number: int, index) -> torch.Tensor:
        return data.view(0, number, index, (self.crop_scale, 1.0))

    def said(self, number: int, index) -> Features:
        values = data.dequantise(*(part[index] for part in self.views[number]))
        return Features(values[:, 0], values[:, 1:])


@functools.lru_cache(1)
def answers_of(about: tuple, device) -> Answers:
    return Answers(Config(**dict(about)), device)


def inside(outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """Boxes [B, 4] given in shares of other boxes [B, 4] -> boxes in shares of the image."""
    origin, extent = outer[:, :2], outer[:, 2:]
    return torch.cat([origin + extent * inner[:, :2], extent * inner[:, 2:]], 1)


def run(cfg: Config, objective=model.Distiller, ema=0.0, jitter=0.0, crops=0) -> dict:
    """Train and judge one student; returns its row."""
    device = model.pick_device(cfg.device)
    dtype = model.pick_dtype(cfg.precision, device)
    about = "dataset max_samples cache_dir crop_scale teacher teacher_weights teacher_size " \
            "teacher_views".split()
    answers = answers_of(tuple((name, getattr(cfg, name)) for name in about), device)
    store, student = answers.store, evaluation.student_of(cfg).train()
    distiller = objective(student, answers.teacher, cfg).to(device)

    def batches(epoch: int, samples: int = 0):
        order = data.epoch_order(len(store), samples, cfg.seed, epoch)
        for _, index, _ in data.loader(None, order, cfg.batch_size):
            yield index

    distiller.fit_heads([answers.said(0, index) for index in batches(0, train.STAT_IMAGES)])
    groups = train.parameter_groups(distiller, cfg.weight_decay)
    optimiser = torch.optim.AdamW(groups, lr=cfg.lr, betas=train.BETAS, fused=True)
    average = torch.optim.swa_utils.AveragedModel(
        student, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema)) if ema else None
    per_epoch, step, total = -(-len(store) // cfg.batch_size), 0, torch.zeros((), device=device)
    begin = time.perf_counter()
    progress = tqdm(total=cfg.epochs * per_epoch, disable=None)
    for epoch in range(cfg.epochs):
        number = epoch % cfg.teacher_views
        for index in batches(epoch):
            images, box = answers.images[index], answers.box(number, index)
            views, local = data.render(images, box, cfg.student_size), []
            if jitter:
                views = jittered(views, cfg.seed, epoch, index, jitter)
            for crop in range(crops * epoch, crops * (epoch + 1)):
                part = inside(box, data.view(cfg.seed + 1, crop, index, LOCAL_AREA))
                local.append(data.render(images, part, LOCAL_SIZE))
            for group in optimiser.param_groups:
                group["lr"] = train.learning_rate(step, per_epoch, cfg)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss, _ = distiller(views, distiller.targets(answers.said(number, index)), *local)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(distiller.parameters(), cfg.grad_clip)
            optimiser.step()
            if average:
                average.update_parameters(student)
            step += 1
            total += loss.detach() * (epoch + 1 == cfg.epochs)
            progress.update()
    loss = float(total / per_epoch)
    seconds = time.perf_counter() - begin
    bench = evaluation.Bench(cfg, *JUDGED)
    judged = average.module.eval() if average else student
    row = bench.judge(*bench.features(judged))
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return row | dict(parameters=student.parameter_count, seconds=round(seconds), loss=loss,
                      device=where)


def judge_teacher(cfg: Config) -> dict:
    device = model.pick_device(cfg.device)
    teacher = model.load_teacher(cfg.teacher, cfg.teacher_size, cfg.teacher_weights).to(device)
    bench = evaluation.Bench(cfg, *JUDGED)
    return bench.judge(*bench.features(teacher)) | dict(parameters=teacher.parameter_count)


# ---------------------------------------------------------------------------- the table


def known_runs(path: Path = RUNS) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def image_count(cfg: Config) -> int:
    return cfg.max_samples or 50_000


def teacher_row(size: int, images: int) -> str:
    return f"teacher, {size} px, {images:,} images"


def table(path: Path) -> str:
    """A file of runs as Markdown: means over seeds and devices; in brackets lowest and highest."""
    runs = known_runs(path)
    lines = ["| row | runs | k-NN | linear | keeps k-NN | keeps linear | spread | rank | "
             "seconds |", "|---|---|---|---|---|---|---|---|---|"]
    names = dict.fromkeys([*ROWS, *(r["row"] for r in runs)])
    for name in sorted(names, key=lambda name: not name.startswith("teacher, ")):
        of = [r for r in runs if r["row"] == name]
        if not of:
            continue
        mean = {k: statistics.mean(r[k] for r in of) for k in ("knn20", "linear", "spread", "rank")}
        accuracies = []
        for k in ("knn20", "linear"):
            low, high = min(r[k] for r in of), max(r[k] for r in of)
            accuracies.append(f"{mean[k]:.1%}" + f" [{low:.1%}, {high:.1%}]" * (len(of) > 1))
        keeps, seconds = ["-", "-"], "-"
        if "settings" in of[0]:
            size = of[0]["settings"].get("teacher_size", BASE["teacher_size"])
            (ref,) = (r for r in runs if r["row"] == teacher_row(size, of[0]["images"]))
            keeps = [f"{mean[k] / ref[k]:.1%}" for k in ("knn20", "linear")]
            taken = {r["device"]: r["seconds"] for r in of}  # of the last seed there
            seconds = ", ".join(f"{seconds} {device}" for device, seconds in taken.items())
        lines.append(
            f"| {name} | {len(of)} | {' | '.join(accuracies + keeps)} | {mean['spread']:.2f} | "
            f"{mean['rank']:.0f} | {seconds} |")
    return "\n".join(lines)


def judge_row(row: str, seed: int, images: str, weights: str) -> dict:
    cfg, given = config_of(row, images, weights, seed), ROWS[row]
    extras = {k: v for k, v in given.items() if k in ("objective", "ema", "jitter", "crops")}
    settings = {k: getattr(v, "__name__", v) for k, v in given.items() if k != "seeds"}
    return dict(row=row, seed=seed, images=image_count(cfg), epochs=cfg.epochs,
                settings=settings, **run(cfg, **extras))


def main(images: str, weights: str, *rows: str, jobs: int = 1) -> None:
    wanted = []
    for row in rows or ROWS:
        row, _, only = row.partition(" #")
        seeds = [int(only)] if only else range(ROWS[row].get("seeds", 1))
        wanted += [(row, seed) for seed in seeds]
    known = {(r["row"], r["seed"]) for r in known_runs()}
    for row, _ in wanted:
        cfg = config_of(row, images, weights)
        name = teacher_row(cfg.teacher_size, image_count(cfg))
        if (name, 0) not in known:
            known.add((name, 0))
            add(dict(row=name, seed=0, images=image_count(cfg), **judge_teacher(cfg)))
    wanted = sorted((w for w in wanted if w not in known), key=lambda w: w[1])
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        done = [pool.submit(judge_row, *w, images, weights) for w in wanted]
        for each in concurrent.futures.as_completed(done):
            add(each.result())


def add(row: dict) -> None:
    with open(RUNS, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    if "--table" in sys.argv:
        print(table(Path(words[0]) if words else RUNS))
    else:
        jobs = [int(word.partition("=")[2]) for word in sys.argv if word.startswith("--jobs=")]
        main(*words, jobs=jobs[0] if jobs else 1)
