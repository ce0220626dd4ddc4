"""Pictures of a run: its views, its patch embeddings, and which images its student finds alike.

    python examples/figures.py runs/x/checkpoint_latest.pth FOLDER

views.png: training images as they are stored, and the crops of them in the cached views.
patches.png: three principal components of the patch embeddings as a colour, teacher and student in
one basis. neighbors.png: test images, and the training images that the student finds most alike,
framed green where the class is the same and orange where it is not. progress.png, of a run with
--eval_every 1: k-NN accuracy against minutes, and the nearest neighbour of the first test image of
each class, for the untrained student, after one epoch and at the end.
"""

import json
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import eval as evaluation
import model
from train import QUICK_EVAL

SHOWN = 8  # images
TILE, GAP, MARGIN, FRAME = 96, 8, 76, 3  # pixels
SAME, OTHER = "#009e73", "#d55e00"  # distinct for colour-blind readers too (Okabe and Ito)
RANKS = "nearest second third fourth fifth".split()


def sheet(path: Path, rows: list[tuple]) -> PIL.Image.Image:
    """Write and return a picture of rows: (label, images float [n, 3, H, W] in [0, 1], colours).

    The colours, of a frame around each image, may be left out.
    """
    side, across = TILE + GAP, len(rows[0][1])
    page = PIL.Image.new("RGB", (MARGIN + across * side, GAP + len(rows) * side), "white")
    draw = PIL.ImageDraw.Draw(page)
    for y, (label, images, *frames) in zip(range(GAP, page.height, side), rows, strict=True):
        draw.text((GAP, y + TILE // 2), label, "black", anchor="lm", font_size=14)
        tiles = F.interpolate(images.float().cpu(), TILE, mode="bicubic", antialias=True)
        for i, tile in enumerate(tiles.clamp(0, 1)):
            x = MARGIN + i * side
            if frames:
                corners = x - FRAME, y - FRAME, x + TILE + FRAME - 1, y + TILE + FRAME - 1
                draw.rectangle(corners, frames[0][i])
            page.paste(to_pil_image(tile), (x, y))
    page.save(path)
    return page


@torch.inference_mode()
def patches(path: Path, images: torch.Tensor, sides: dict) -> PIL.Image.Image:
    """sides: name -> (backbone, map of its patch embeddings to a common space)."""
    rows, axes = [("image", images / 255)], None
    for name, (net, project) in sides.items():
        features = net(data.render(images, net.image_size))
        tokens = F.normalize(project(features.patches), dim=-1)
        if axes is None:  # one basis and one scale for all sides, so that colours compare
            basis = tokens.flatten(0, 1)
            axes = torch.linalg.eigh(torch.cov(basis.T, correction=0)).eigenvectors[:, -3:].flip(1)
            low, high = (basis @ axes).quantile(torch.tensor([0.02, 0.98]), 0)
        colours = (tokens @ axes - low) / (high - low).clamp_min(1e-6)
        rows.append((f"{name}\n{net.grid[0]} x {net.grid[1]}", colours.mT.unflatten(2, net.grid)))
    return sheet(path, rows)


def neighbours(path: Path, evaluator: evaluation.Evaluator, train, test) -> PIL.Image.Image:
    """train, test: embeddings of all images of the evaluator, float32 [I, D] and [Q, D]."""
    some = data.subset(np.arange(len(test)), SHOWN)
    queries = F.normalize(test[some], dim=1)
    found = (queries @ F.normalize(train, dim=1).T).topk(min(len(RANKS), len(train))).indices
    images = evaluator.test.images[evaluator.test_rows[some]]
    rows = [("query", images / 255)]
    for label, column in zip(RANKS, found.T, strict=False):
        images = evaluator.train.images[evaluator.train_rows[column.numpy()]] / 255
        right = (evaluator.y[column] == evaluator.y_test[some]).tolist()
        frames = [[SAME if r else OTHER for r in right]] if evaluator.labelled else []
        rows.append((label, images, *frames))
    return sheet(path, rows)


def progress(path: Path, cfg, evaluator: evaluation.Evaluator, teacher: model.Backbone) -> None:
    """From metrics.jsonl and the checkpoints in the run folder of cfg."""
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in (cfg.run_path / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "test_knn20" in line]
    checkpoints = [cfg.run_path / f"checkpoint_epoch_{n}.pth" for n in (1, cfg.epochs)]
    students = {"untrained": model.build_student(cfg)}
    for file, name in zip(checkpoints, ("epoch 1", f"epoch {cfg.epochs}"), strict=True):
        students[name] = model.build_student(cfg, model.load_checkpoint(file)[0]["student"])

    some = np.unique(evaluator.y_test, return_index=True)[1][:SHOWN]  # the first of each class
    figure = plt.figure(figsize=(12, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 3))
    axis = left.subplots()
    minutes = [0.0] + [line["seconds"] / 60 for line in lines]
    quick = evaluation.Evaluator(cfg, *QUICK_EVAL)  # the images of --eval_every
    best, least = (100 * quick.evaluate(*quick.features(net), probe=False)["knn20"]
                   for net in (teacher, model.build_student(cfg)))
    axis.plot(minutes, [least] + [100 * line["test_knn20"] for line in lines], "o-",
              color="#0072b2", label="student")
    axis.axhline(best, color="black", linestyle="--", label="teacher")
    axis.axhline(least, color="#999999", linestyle=":", label="untrained")
    axis.set(xlabel="minutes of training", ylabel="k-NN accuracy, %", ylim=(0, 103))
    axis.legend()
    axes = right.subplots(1 + len(students), SHOWN)
    for row in axes:
        for cell in row:
            cell.set(xticks=[], yticks=[])
    for cell, image, label in zip(axes[0], evaluator.test.images[evaluator.test_rows[some]],
                                  evaluator.y_test[some], strict=True):
        cell.imshow(to_pil_image(image))
        cell.set_title(evaluator.classes[label], fontsize=9)
    axes[0, 0].set_ylabel("query", rotation=0, ha="right", va="center")
    for row, (name, student) in zip(axes[1:], students.items(), strict=True):
        train, test = (F.normalize(x, dim=1) for x in evaluator.features(student))
        nearest = (test[some] @ train.T).argmax(1)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        images = evaluator.train.images[evaluator.train_rows[nearest.numpy()]]
        for cell, image, same in zip(row, images, evaluator.y[nearest] == evaluator.y_test[some],
                                     strict=True):
            cell.imshow(to_pil_image(image))
            for spine in cell.spines.values():
                spine.set(color=SAME if same else OTHER, linewidth=3)
    figure.savefig(path, dpi=100)


def main(checkpoint: str, folder: str) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    saved, cfg = model.load_checkpoint(checkpoint)
    evaluator = evaluation.Evaluator(cfg)
    teacher = model.load_teacher(cfg)
    distiller = model.Distiller(model.build_student(cfg, saved["student"]), teacher, cfg).eval()
    head = distiller.patch_head
    head.load_state_dict({name.removeprefix("patch_head."): value
                          for name, value in saved["objective"].items()
                          if name.startswith("patch_head.")})
    some = data.subset(evaluator.test_rows, SHOWN)
    patches(folder / "patches.png", evaluator.test.images[some],
            dict(teacher=(teacher, head.target), student=(distiller.student, head.predict)))
    rows = data.subset(np.arange(len(evaluator.train)), SHOWN)
    images = evaluator.train.images[rows]
    views = [(f"view {view}", data.render(images, cfg.student_size, *data.view_crops(
        rows, cfg.seed, view, cfg.crop_scale))) for view in range(max(cfg.teacher_views, 1))]
    sheet(folder / "views.png", [("image", images / 255), *views])
    neighbours(folder / "neighbors.png", evaluator, *evaluator.features(distiller.student))
    if cfg.eval_every:
        progress(folder / "progress.png", cfg, evaluator, teacher)
    print(f"written to {folder}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
