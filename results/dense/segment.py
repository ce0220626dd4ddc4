"""What the patch loss is worth for dense embeddings: a linear probe on patches of drawn shapes.

    python results/dense/segment.py            # every row, students with three seeds
    python results/dense/segment.py --table    # runs.jsonl as Markdown

A patch embedding predicts the class of its 8 x 8 pixels: the shape that covers most of them, or
background. The probe learns from training images and is tested on test images. Each run adds a
line to runs.jsonl; those that are there are not repeated.
"""

import statistics
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1])]

import eval as evaluation  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from config import PRESETS, Config  # noqa: E402
from demo import shapes  # noqa: E402
from results.records import add, known, markdown, mean_and_spread  # noqa: E402

RUNS = HERE / "runs.jsonl"
SEEDS = 3
ROWS = {"teacher": {}, "untrained": {}, "patch weight 0": dict(patch_weight=0.0),
        "patch weight 0.5": dict(patch_weight=0.5), "pool mean": dict(pool="mean")}
SCORES = {"miou": "mIoU", "shape_iou": "IoU of shape", "accuracy": "accuracy"}
PROBED, HELD_OUT = 3000, 1000  # training images for the probe; those of them that choose its C
STRENGTHS = (0.01, 0.1, 1.0, 10.0)  # C
CLASSES = len(shapes.OUTLINES) + 1  # 0 is background


def covered(seed: int, index: int) -> np.ndarray:
    """The share of each pixel that the shape covers: float [32, 32].

    It is what differs between two drawings whose shapes differ in nothing but their colour.
    """
    drawn = []
    for contrast in (0, 100):
        with mock.patch.multiple(shapes, CONTRAST=(contrast, contrast), NOISE=0.0):
            drawn.append(shapes.draw_shape(seed, index)[0].astype(float))
    return (drawn[1] - drawn[0]).mean(2) / 100


def patch_labels(split: str, rows: np.ndarray, grid: tuple) -> torch.Tensor:
    """Classes of the patches of some images of a split: int64 [images * N]."""
    seed = list(shapes.SIZES).index(split)
    masks = torch.from_numpy(np.stack([covered(seed, index) for index in rows]))
    share = F.adaptive_avg_pool2d(masks[:, None], grid).flatten(1)
    classes = torch.from_numpy(rows % len(shapes.OUTLINES) + 1)
    return torch.where(share > 0.5, classes[:, None], 0).flatten()


def probe(x: torch.Tensor, y: torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Patches [P, D] of images and their classes int64 [P] -> predicted classes of queries, C.

    As eval.linear_probe, but C is chosen on images of which the fit has seen no patch.
    """
    mean, std = x.double().mean(0), x.double().std(0)
    x, queries = (x - mean) / std, (queries - mean) / std
    held = len(x) * HELD_OUT // PROBED
    found, w = {}, x.new_zeros(CLASSES, x.shape[1] + 1)
    for C in STRENGTHS:
        w = evaluation.fit_probe(x[held:], y[held:], C, w, tolerance=1e-4)
        predicted = evaluation.probe_scores(w, x[:held]).argmax(1)
        found[C] = evaluation.accuracy(predicted, y[:held])
    best = max(found, key=found.get)
    w = evaluation.fit_probe(x, y, best, w)
    return evaluation.probe_scores(w, queries).argmax(1), best


def iou(predicted: torch.Tensor, true: torch.Tensor) -> float:
    """Intersection over union of two masks bool [P], over all images together."""
    return float((predicted & true).sum() / (predicted | true).sum())


def segment(backbone: model.Backbone, evaluator: evaluation.Evaluator) -> dict:
    """Scores of the probe on the patches of the test images."""
    x, y = {}, {}
    for split, store in dict(train=evaluator.train, test=evaluator.test).items():
        rows = getattr(evaluator, f"{split}_rows")
        embedded = evaluator.embed(backbone.eval(), store, rows)
        x[split] = torch.cat([features.patches for _, features in embedded]).flatten(0, 1)
        y[split] = patch_labels(split, rows, backbone.grid)
    predicted, C = probe(x["train"], y["train"], x["test"])
    of_class = [iou(predicted == c, y["test"] == c) for c in range(CLASSES)]
    return dict(miou=statistics.mean(of_class), shape_iou=iou(predicted > 0, y["test"] > 0),
                accuracy=evaluation.accuracy(predicted, y["test"]), C=C, iou_of_class=of_class,
                background=evaluation.accuracy(y["test"], 0))


def run(row: str, seed: int) -> dict:
    """Train, if the row has settings of its own, and evaluate."""
    cfg = Config(**PRESETS["demo"] | dict(optimiser="adamw", lr=3e-3, epochs=14) | ROWS[row] | dict(
        seed=seed, eval_at_end=False, run_dir=f"runs/dense/{row.replace(' ', '_')}-{seed}"))
    last, weights = {}, None
    if ROWS[row]:
        last = train.main(cfg)  # finds a finished run, if there is one
        weights = model.load_checkpoint(cfg.run_path)[0]["student"]
    evaluator = evaluation.Evaluator(cfg, max_train=PROBED)
    teacher = row == "teacher"
    backbone = model.load_teacher(cfg) if teacher else model.build_student(cfg, weights)
    return (dict(row=row, seed=seed) | segment(backbone, evaluator) | dict(train=last)
            | model.environment(evaluator.device))


def table() -> str:
    """Means over seeds in percent, and their standard deviations where there are several."""
    rows = [["model", "seeds", *SCORES.values()]]
    for row in ROWS:
        runs = [line for line in known(RUNS) if line["row"] == row]
        scores = [mean_and_spread([100 * line[key] for line in runs]) for key in SCORES]
        rows.append([row, len(runs), *scores])
    return markdown(*rows)


def main() -> None:
    for seed in range(SEEDS):
        for row in ROWS if seed == 0 else list(ROWS)[1:]:  # there is one teacher
            if (row, seed) not in {(line["row"], line["seed"]) for line in known(RUNS)}:
                add(RUNS, run(row, seed))


if __name__ == "__main__":
    if "--table" not in sys.argv:
        main()
    print(table())
