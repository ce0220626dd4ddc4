"""What is there to look at: figures, curves, progress, and what a run says of itself."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import safetensors
import torch
import tqdm.std
from torch import nn

import data
import eval as evaluation
import model
import train
from config import EvalConfig


@pytest.fixture(autouse=True)
def small_pixels(monkeypatch):
    """The effective rank of raw pixels takes the eigenvalues of a matrix of their number."""
    monkeypatch.setattr(evaluation, "PIXELS", 8)


def pixels(path: Path, row: int) -> np.ndarray:
    """A row of tiles of a figure, int [TILE, width, 3]."""
    top = evaluation.GAP + row * (evaluation.TILE + evaluation.GAP)
    page = np.asarray(PIL.Image.open(path)).astype(int)
    return page[top : top + evaluation.TILE, evaluation.MARGIN :]


def count(path: Path, colour: str) -> int:
    page = np.asarray(PIL.Image.open(path).convert("RGB"))
    return int((page == np.array(PIL.ImageColor.getrgb(colour))).all(-1).sum())


@pytest.fixture
def bench(tiny):
    return evaluation.Bench(tiny(), 40, 20)


# ---------------------------------------------------------------------------- figures


@pytest.mark.parametrize("kind", ["pca", "frozen", "linear"])
def test_a_student_that_says_what_its_teacher_says_has_its_colours(bench, tiny, tmp_path, kind):
    """Whatever the head, and however long its vectors are: the loss compares directions."""
    teacher = model.load_teacher("demo", 32)
    cfg = tiny(head=kind)
    distiller = model.Distiller(evaluation.student_of(cfg), teacher, cfg)
    stored = torch.from_numpy(bench.train.images[np.arange(40)])
    distiller.fit_heads([teacher(data.render(stored, None, 32))])
    heads = distiller.heads
    heads["patch_head"].predict = nn.Identity()

    class Student(nn.Module):
        image_size, grid, noise = 32, teacher.grid, 0.0

        def forward(self, images):
            patches = 7 * heads["patch_head"].target(teacher(images).patches)
            return model.Features(None, patches + self.noise * torch.randn_like(patches))

    features, student, head = bench.features(teacher), Student(), heads["patch_head"]
    sides = dict(teacher=(teacher, head.target), student=(student, head.predict))
    evaluation.draw_figures(tmp_path, bench, features, sides)
    image, asked, said = (pixels(tmp_path / "patches.png", row) for row in range(3))
    assert abs(asked - said).max() <= 1 and asked.std() > 30
    student.noise = 100.0
    evaluation.draw_figures(tmp_path, bench, features, sides)
    assert abs(asked - pixels(tmp_path / "patches.png", 2)).mean() > 10


def test_neighbours_are_framed_by_their_labels_and_not_at_all_without(bench, tmp_path):
    sides = dict(student=(model.load_teacher("demo", 32), nn.Identity()))
    train, test = torch.eye(10)[bench.y], torch.eye(10)[bench.y_test]
    tiles = (evaluation.TILE + 2 * evaluation.FRAME) ** 2 - evaluation.TILE**2
    shown = bench.y_test[data.subset(np.arange(20), evaluation.SHOWN)]
    right = sum(min(5, int((bench.y == label).sum())) for label in shown)
    for queries, expected in ((test, right), (-test, 0)):  # most and least like their own class
        evaluation.draw_figures(tmp_path, bench, (train, queries), sides)
        assert count(tmp_path / "neighbors.png", evaluation.RIGHT) == expected * tiles
        assert count(tmp_path / "neighbors.png", evaluation.WRONG) == (40 - expected) * tiles
    bench.labelled = False
    evaluation.draw_figures(tmp_path, bench, (train, test), sides)
    assert count(tmp_path / "neighbors.png", evaluation.RIGHT) == 0


def test_figures_of_a_conv_net_with_one_patch_and_without_a_teacher(tiny, tmp_path, capsys):
    student = dict(student="resnet10t", student_args="", pool="mean")
    cfg = tiny(**student, epochs=1)
    train.main(cfg)
    checkpoint, folder = str(cfg.run_path / "checkpoint_latest.pth"), tmp_path / "new" / "figures"
    told = dict(figures=str(folder), max_test=3, probe=False, device="cpu", num_workers=0)
    side = evaluation.TILE + evaluation.GAP
    for baselines in (True, False):
        rows = evaluation.main(EvalConfig((checkpoint,), baselines=baselines, **told))
        said = capsys.readouterr().out
        size = evaluation.MARGIN + 3 * side, evaluation.GAP + (2 + baselines) * side
        assert PIL.Image.open(folder / "patches.png").size == size
        assert PIL.Image.open(folder / "neighbors.png").size == (size[0], evaluation.GAP + 6 * side)
        assert ("patches.png is without the teacher" in said) is not baselines
        if baselines:
            assert (pixels(folder / "patches.png", 2).std((0, 1)) > 0).any(), "a colour an image"
            speed, share = (rows[-1][k] / rows[0][k] for k in ("images_per_s", "parameters"))
            line = f"student: {speed:.1f} x the teacher's images/s, {share:.0%} of its parameters"
            assert line in said and share > 10


def test_speeds_are_measured_in_turn_on_batches_of_one_size():
    calls = []

    class Net(nn.Module):
        image_size, mean = 8, torch.zeros(1)

        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, images):
            calls.append((self.name, len(images)))
            return SimpleNamespace(cls=images.mean((2, 3)))

    fast, slow = evaluation.throughput([Net("a"), Net("b")], 4, torch.float32)
    assert fast > 0 and slow > 0 and calls == [("a", 4), ("b", 4)] * 6


# ---------------------------------------------------------------------------- a run


def test_every_field_of_the_log_is_explained_in_the_readme(tiny):
    cfg = tiny(epochs=1, eval_every=1)
    train.main(cfg)
    *_, last = map(json.loads, (cfg.run_path / "metrics.jsonl").read_text().splitlines())
    readme = (Path(train.__file__).parent / "README.md").read_text()
    section = readme.split("## What the log says")[1].split("\n## ")[0]
    assert {"knn20", "spread", "step"} <= last.keys()
    assert [name for name in last if f"`{name}`" not in section] == []


def test_curves_of_a_continued_run_are_those_of_metrics_jsonl(tiny):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = tiny(log_every=1, epochs=2, max_samples=48)  # three steps an epoch
    train.main(cfg)
    latest = cfg.run_path / "checkpoint_latest.pth"
    state = torch.load(latest, weights_only=True)
    first = copy.deepcopy(state) | dict(step=3, epoch=1.0)  # as if killed after its first epoch
    torch.save(first, latest)
    train.main(cfg)
    events = EventAccumulator(str(cfg.run_path))
    events.Reload()
    lines = list(map(json.loads, (cfg.run_path / "metrics.jsonl").read_text().splitlines()))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "lr", "images_per_s"):
        drawn = [(e.step, e.value) for e in events.Scalars(name)]
        assert drawn == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
    assert len(events.Images("views")) == 1


def test_without_tensorboard_a_run_is_the_same_and_nothing_is_said(tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    cfg = tiny(epochs=1)
    train.main(cfg)
    assert not list(cfg.run_path.glob("*tfevents*"))
    assert capsys.readouterr().err == ""


def test_an_exported_student_says_what_made_it(tiny, monkeypatch):
    train.commit.cache_clear()  # somebody may have committed since
    cfg = tiny(epochs=1)
    train.main(cfg)
    with safetensors.safe_open(cfg.run_path / "student.safetensors", "pt") as file:
        said = file.metadata()
    known = "model image_size mean std pool teacher dataset commit args embedding"
    assert said.keys() == set(known.split())
    assert f"commit {said['commit']}" in (cfg.run_path / "train.log").read_text()
    git = ["git", "-C", str(Path(train.__file__).parent), "rev-parse", "HEAD"]
    if (head := subprocess.run(git, capture_output=True, text=True)).returncode == 0:
        assert said["commit"].removesuffix("-dirty") == head.stdout.strip()
    monkeypatch.setenv("PATH", "")
    train.commit.cache_clear()
    assert train.commit() == "unknown"
    train.commit.cache_clear()


# ---------------------------------------------------------------------------- progress


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(monkeypatch, capfd):
    assert list(data.progress(range(3), "decoding", 3)) == [0, 1, 2]
    assert capfd.readouterr().err == "", "nothing is said of what is quick"
    monkeypatch.setattr(data, "PLAIN_SECONDS", -1)
    list(data.progress(range(3), "decoding", 700, each=256))
    lines = "decoding: 256 of 700\ndecoding: 512 of 700\ndecoding: 700 of 700\n"
    assert capfd.readouterr().err == lines


def test_progress_is_a_bar_on_a_terminal_after_two_seconds(monkeypatch):
    class Terminal(list):
        write, flush, isatty, encoding = list.append, lambda self: None, lambda self: True, "utf-8"

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    list(data.progress(range(3), "quick", 3))
    assert "".join(terminal).strip() == ""
    clock = iter(range(100))
    monkeypatch.setattr(tqdm.std, "time", lambda: next(clock))  # a second each time it looks
    list(data.progress(range(5), "slow", 1100, each=256))
    assert "slow:  70%" in "".join(terminal) and "768/1100" in "".join(terminal)
