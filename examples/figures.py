"""Pictures of a run: its views, its patch embeddings, and which images its student finds alike.

    python examples/figures.py runs/x           # into the run folder, beside eval.json
    python examples/figures.py runs/x FOLDER

views.png: training images as they are stored, and the crops of them in the cached views.
patches.png, where the student has at least 6 x 6 patches: three principal components of their
embeddings as a colour, teacher and student in one basis. neighbors.png: test images, and the
training images that the student finds most alike, framed green where the class is the same and
orange where it is not.

Where matplotlib is installed also curve.png, the losses by epoch, and of a run with --eval_every 1
progress.png: k-NN accuracy against minutes, and the nearest neighbour of the first test image of
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
FEWEST = 6, 6  # patches of which a picture shows something
TILE, GAP, MARGIN, FRAME = 96, 8, 76, 3  # pixels
SAME, OTHER = "#009e73", "#d55e00"  # distinct for colour-blind readers too (Okabe and Ito)
RANKS = "nearest second third fourth fifth".split()


def sheet(path: Path, title: str, rows: list[tuple], names=()) -> PIL.Image.Image:
    """Write and return a picture of rows: (label, images float [n, 3, H, W] in [0, 1], colours).

    The colours, of a frame around each image, may be left out; names are those of the columns.
    """
    side, across, top = TILE + GAP, len(rows[0][1]), 52 if len(names) else 32
    page = PIL.Image.new("RGB", (MARGIN + across * side, top + len(rows) * side), "white")
    draw = PIL.ImageDraw.Draw(page)
    draw.text((page.width // 2, GAP), title, "black", anchor="ma", font_size=16)
    for i, name in enumerate(names):
        draw.text((MARGIN + i * side + TILE // 2, top - GAP), name[:14], "black", anchor="ms",
                  font_size=12)
    for y, (label, images, *frames) in zip(range(top, page.height, side), rows, strict=True):
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
    return sheet(path, "patch embeddings, three principal components as a colour", rows)


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
    names = [evaluator.classes[y] for y in evaluator.y_test[some]] if evaluator.labelled else ()
    return sheet(path, "the training images that the student finds most alike", rows, names)


def history(cfg) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (cfg.run_path / "metrics.jsonl").read_text().splitlines()]


def curve(path: Path, cfg) -> None:
    """The losses of a run's metrics.jsonl by epoch, and its quick k-NN accuracy, if it has one."""
    import matplotlib.pyplot as plt

    lines = history(cfg)
    quick = [line for line in lines if "test_knn20" in line]
    figure, axes = plt.subplots(1, 2 if quick else 1, figsize=(10 if quick else 5, 3),
                                squeeze=False, layout="constrained")
    ends = np.array([line["epoch"] for line in lines])
    middles = (ends + np.insert(ends[:-1], 0, 0)) / 2  # of what a line averages over
    for name, colour in zip(("loss", "cls", "patch"), ("#0072b2", OTHER, SAME), strict=True):
        if name in lines[-1]:
            axes[0, 0].plot(middles, [line[name] for line in lines], color=colour, label=name)
    axes[0, 0].set(title="loss", xlabel="epoch", ylim=(0, None))
    axes[0, 0].legend()
    if quick:
        axes[0, 1].plot([line["epoch"] for line in quick],
                        [100 * line["test_knn20"] for line in quick], "o-", markersize=3,
                        color="#0072b2")
        axes[0, 1].set(title="k-NN accuracy, %", xlabel="epoch", ylim=(0, 103))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def progress(path: Path, cfg, evaluator: evaluation.Evaluator, teacher: model.Backbone) -> None:
    """From metrics.jsonl and the checkpoints in the run folder of cfg."""
    import matplotlib.pyplot as plt

    lines = [line for line in history(cfg) if "test_knn20" in line]
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
    axis.set(title="k-NN accuracy, %", xlabel="minutes of training", ylim=(0, 103))
    axis.legend()
    right.suptitle("the nearest training image")
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


def main(checkpoint: str, folder: str = "") -> None:
    saved, cfg = model.load_checkpoint(checkpoint)
    folder = Path(folder or saved["path"].parent)
    folder.mkdir(parents=True, exist_ok=True)
    evaluator = evaluation.Evaluator(cfg)
    teacher = model.load_teacher(cfg)
    distiller = model.Distiller(model.build_student(cfg, saved["student"]), teacher, cfg).eval()
    head = distiller.patch_head
    head.load_state_dict({name.removeprefix("patch_head."): value
                          for name, value in saved["objective"].items()
                          if name.startswith("patch_head.")})
    some = data.subset(evaluator.test_rows, SHOWN)
    if distiller.student.grid >= FEWEST:
        patches(folder / "patches.png", evaluator.test.images[some],
                dict(teacher=(teacher, head.target), student=(distiller.student, head.predict)))
    else:
        print(f"no patches.png: the student has {distiller.student.grid} patches, at least "
              f"{FEWEST} show something")
    rows = data.subset(np.arange(len(evaluator.train)), SHOWN)
    images = evaluator.train.images[rows]
    views = [(f"view {view + 1}", data.render(images, cfg.student_size, *data.view_crops(
        rows, cfg.seed, view, cfg.crop_scale))) for view in range(max(cfg.teacher_views, 1))]
    title = "crops, the same for teacher and student"
    sheet(folder / "views.png", title, [("image", images / 255), *views])
    neighbours(folder / "neighbors.png", evaluator, *evaluator.features(distiller.student))
    try:
        curve(folder / "curve.png", cfg)
        if cfg.eval_every:
            progress(folder / "progress.png", cfg, evaluator, teacher)
    except ImportError:
        print("no curves: pip install matplotlib")
    print(f"written to {folder}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or "--help" in sys.argv:
        sys.exit(__doc__)
    main(*sys.argv[1:])
