"""Data sets of few images and odd labels: each is learned from and judged, or refused in a line."""

import dataclasses
import io

import datasets
import numpy as np
import PIL.Image
import pytest

import data
import eval as evaluation
import train
from config import Config, EvalConfig, UserError

NONE = [None] * 4


@pytest.fixture(autouse=True)
def small_pixels(monkeypatch):
    """The effective rank of raw pixels takes the eigenvalues of a matrix of their number."""
    monkeypatch.setattr(evaluation, "PIXELS", 8)


def images(count: int, first: int = 0) -> list[bytes]:
    def png(seed: int) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(buffer := io.BytesIO(), "png")
        return buffer.getvalue()

    return [png(first + i) for i in range(count)]


def config(tmp_path, labels, test_labels=None, **changes) -> Config:
    """A run on a folder of parquet files, with an image for each label; None: no such split."""
    folder = tmp_path / "own"
    folder.mkdir()
    for split, given in (("train", labels), ("test", test_labels)):
        if given is None:
            continue
        pictures = images(len(given), 0 if split == "train" else 100)
        rows = datasets.Dataset.from_dict(dict(image=pictures, label=given))
        # An empty list does not say of what.
        rows = rows.cast_column("image", datasets.Value("binary"))
        rows.to_parquet(folder / f"{split}.parquet")
    tiny = dict(
        dataset=str(folder), teacher="demo", teacher_size=32, student="vit_tiny_patch16_224",
        student_size=32, student_args="embed_dim=48 depth=1 num_heads=2", batch_size=4, epochs=1,
        precision="fp32", device="cpu", num_workers=0, cache_dir=str(tmp_path / "cache"),
        run_dir=str(tmp_path / "run"),
    )  # fmt: skip
    return Config(**{**tiny, **changes})


def judged(cfg: Config) -> list[dict]:
    train.main(cfg)
    checkpoint = str(cfg.run_path / "checkpoint_latest.pth")
    return evaluation.main(EvalConfig((checkpoint,), device="cpu", num_workers=0, batch_size=4))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_images_than_a_batch_are_refused(tmp_path, count):
    with pytest.raises(UserError, match=f"{count} images, fewer than --batch_size 4") as error:
        train.main(config(tmp_path, list(range(count))))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("empty_file", [True, False])
def test_no_images_are_refused(tmp_path, empty_file):
    cfg = config(tmp_path, [] if empty_file else None)
    with pytest.raises(UserError, match="cannot read the dataset in .*own") as error:
        train.main(cfg)
    assert "\n" not in str(error.value)


def test_one_image_can_be_learned_but_not_judged_without_another(tmp_path):
    cfg = config(tmp_path, [0], batch_size=1)
    with pytest.raises(UserError, match="one image and no test split"):
        judged(cfg)
    assert (cfg.run_path / "student.safetensors").exists()


@pytest.mark.parametrize(
    "labels, test_labels, judges",
    [
        ([0, 1], None, "k-NN"),  # one is held out, whose class the other does not have
        ([0], [0], "k-NN"),
        ([3] * 4, [3] * 4, "k-NN and probe"),  # one class
        ([3] * 12, None, "k-NN and probe"),
        ([0, 1] * 2, [2] * 4, "k-NN and probe"),  # no class in common: nobody keeps anything
        (NONE, NONE, "none"),
        ([-1] * 4, [-1] * 4, "none"),
        ([0, 1] * 2, [-1] * 4, "none"),
        ([0 if i == 9 else -1 for i in range(12)], None, "none"),  # 9 is the one held out
        ([0, 1, None, -5], [None, 1, -5, 0], "k-NN and probe"),
        ([float("inf"), 1.0, float("nan"), 0.0], [1.0, 0.0] * 2, "k-NN and probe"),
        (["cat", "dog"] * 2, ["dog", "cat"] * 2, "k-NN and probe"),
        ([True, False] * 2, [False] * 4, "k-NN and probe"),
    ],
)
def test_few_images_and_odd_labels_are_learned_from_and_judged(
    tmp_path, labels, test_labels, judges
):
    cfg = config(tmp_path, labels, test_labels, batch_size=min(4, len(labels)))
    *_, student = judged(cfg)
    assert ("knn20" in student, "linear" in student) == ("k-NN" in judges, "probe" in judges)
    assert student["step"] == -(-len(labels) // 4) and -1 <= student["cos"] <= 1


def test_one_class_is_told_with_certainty(tmp_path):
    *_, student = judged(config(tmp_path, ["cat"] * 4, ["cat"] * 4))
    assert student["knn20"] == student["linear"] == 1


def test_strings_are_numbered_alike_in_all_splits(tmp_path):
    cfg = config(tmp_path, ["cat", "eel", None, "cat"], ["eel", "dog", "eel", None])
    train_store, test_store = (data.open_store(cfg, split, 32) for split in ("train", "test"))
    assert train_store.labels.tolist() == [0, 2, -1, 0]
    assert test_store.labels.tolist() == [2, 1, 2, -1]
    (tmp_path / "large").mkdir()
    large = datasets.Dataset.from_dict(dict(image=images(2), label=["dog", "cat"]))
    large = large.cast_column("label", datasets.Value("large_string"))  # what polars writes
    large.to_parquet(tmp_path / "large" / "train.parquet")
    cfg = Config(dataset=str(tmp_path / "large"), cache_dir=cfg.cache_dir, num_workers=0)
    assert data.open_store(cfg, "train", 32).labels.tolist() == [1, 0]


def test_an_empty_test_split_is_named_before_anything_is_written(tmp_path):
    cfg = config(tmp_path, [0, 1] * 6)
    rows = datasets.Dataset.from_parquet(f"{cfg.dataset}/train.parquet")
    rows.select([]).to_parquet(f"{cfg.dataset}/test.parquet")
    said = r'"test" corresponds to no data! \(it, or a split of it, is empty: remove its files\)'
    with pytest.raises(UserError, match=said):
        train.main(cfg)
    empty = datasets.DatasetDict(train=rows, test=rows.select([]))
    saved = str(tmp_path / "saved")
    empty.save_to_disk(saved)
    try:
        datasets.load_from_disk(saved)  # 4.0 can, 5.2 cannot
    except IndexError:
        with pytest.raises(UserError, match="a split of it, is empty: remove its files"):
            train.main(dataclasses.replace(cfg, dataset=saved))
    assert not cfg.run_path.exists()
