"""Any collection of images -> a store: folders as people lay them out, tables, odd labels."""

import dataclasses
import json
import os
import shutil

import datasets
import numpy as np
import pytest
from conftest import png

import data
import eval as evaluation
import train
from config import EvalConfig, UserError
from test_smoke import latest


def test_a_folder_is_decoded_once_into_upright_rgb(tiny, photos):
    cfg = tiny(dataset=str(photos))
    store = data.open_store(cfg, "train")
    images = store.images[np.arange(33)].numpy()
    assert images.shape == store.images.shape == (33, 3, 32, 32) and images.dtype == np.uint8
    assert sorted(set(store.labels.tolist())) == [0, 1]
    before = store.images.path.stat().st_mtime_ns
    assert data.open_store(cfg, "train").images.path.stat().st_mtime_ns == before
    turned = [im for im in images if im[:, :14].mean() > 240 and im[:, 18:].mean() < 15]
    assert len(turned) == 1, "EXIF orientation is applied"


def test_a_moved_folder_is_found_again_and_a_changed_one_is_not(tiny, photos, tmp_path):
    first = data.open_store(tiny(dataset=str(photos)), "train")
    shutil.copytree(photos, tmp_path / "moved", copy_function=shutil.copy)  # other times
    moved = data.open_store(tiny(dataset=str(tmp_path / "moved")), "train")
    assert moved.fingerprint == first.fingerprint
    (tmp_path / "moved" / "train" / "cat" / "new.png").write_bytes(png(0))
    changed = data.open_store(tiny(dataset=str(tmp_path / "moved")), "train")
    assert changed.fingerprint != first.fingerprint


def test_unreadable_images_are_left_out_and_counted(tiny, photos, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(data.log, "propagate", True)
    shutil.copytree(photos, tmp_path / "photos")
    cats = tmp_path / "photos" / "train" / "cat"
    (cats / "empty.jpg").write_bytes(b"")
    (cats / "text.png").write_text("no image")
    (cats / "cut.png").write_bytes(png(0)[:900])
    store = data.open_store(tiny(dataset=str(tmp_path / "photos")), "train")
    info = json.loads(store.images.path.with_name("info.json").read_text())
    assert len(store) == 33 and len(info["unreadable"]) == 4  # one of 16 bits
    assert "4 of 37 images cannot be read" in caplog.text


def test_parquet_files_and_save_to_disk_are_read_and_string_labels_numbered(tiny, tmp_path):
    columns = dict(photo=[png(i) for i in range(6)], label=["cat", "dog"] * 3, note=["x"] * 6)
    columns |= dict(score=[0.0, 0.5, float("nan")] * 2, labels=[[1, 2]] * 6)
    foreign = datasets.Dataset.from_dict(columns)  # bytes, but no image type: named
    (tmp_path / "parquet").mkdir()
    foreign.to_parquet(tmp_path / "parquet" / "train.parquet")
    foreign.cast_column("photo", datasets.Image()).save_to_disk(tmp_path / "disk")
    stores = [data.open_store(tiny(dataset=str(tmp_path / name), image_column=column), "train")
              for name, column in (("parquet", "photo"), ("disk", ""))]
    for store in stores:
        assert store.labels.tolist() == [0, 1] * 3 and store.images.shape == (6, 3, 32, 32)
    a, b = (store.images[np.arange(6)].numpy() for store in stores)
    assert (a == b).all()
    odd = [data.open_store(tiny(dataset=str(tmp_path / "disk"), label_column=c), "train")
           for c in ("score", "labels")]
    assert [store.labels.tolist() for store in odd] == [[0, 1, -1] * 2, [-1] * 6]


@pytest.mark.parametrize("columns, words", [
    (dict(note=["x"]), "not one image column among note: set --image_column"),
    (dict(left=[png(0)], right=[png(1)]), "not one image column among left, right"),
])
def test_data_without_one_image_column_is_refused_by_name(tiny, tmp_path, columns, words):
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "disk")
    with pytest.raises(UserError, match=words):
        data.open_store(tiny(dataset=str(tmp_path / "disk")), "train")


# ---------------------------------------------------------------------------- folders


def splits(*names: str) -> dict:
    return data.image_splits(list(names))


def test_class_folders_may_be_called_like_a_split():
    names = [f"{c}/{i}.jpg" for c in ("bus", "car", "train", "test_tube") for i in (1, 2)]
    (split,) = splits(*names).items()
    assert split[0] == "train" and {*split[1].values()} == {"bus", "car", "train", "test_tube"}


def test_a_file_may_be_called_like_a_split():
    assert [*splits("IMG_1.jpg", "train_station.jpg", "test.jpg")] == ["train"]


def test_splits_are_found_in_any_case_and_by_their_other_names():
    for first, second in (("Train", "Test"), ("Training", "Testing"), ("train", "val")):
        found = splits(f"{first}/cat/1.jpg", f"{first}/dog/2.jpg", f"{second}/cat/3.jpg")
        assert [*found] == [first.lower(), second.lower()]
        assert found[first.lower()][f"{first}/cat/1.jpg"] == "cat"


def test_folders_around_the_splits_do_not_matter():
    found = splits("a/b/train/cat/1.jpg", "a/b/train/dog/2.jpg", "a/b/test/cat/3.jpg")
    assert {*found} == {"train", "test"} and found["train"]["a/b/train/dog/2.jpg"] == "dog"
    assert [*splits("a/images/1.jpg", "a/images/2.jpg")] == ["train"]


def test_images_below_a_class_folder_have_its_class():
    found = splits("train/n01/images/1.JPEG", "train/n02/images/2.JPEG", "val/images/3.JPEG")
    assert [*found["train"].values()] == ["n01", "n02"]


def test_what_lies_beside_splits_is_in_neither_and_a_stray_image_has_no_class():
    found = splits("train/cat/1.jpg", "test/cat/2.jpg", "new/3.jpg", "4.jpg")
    assert {split: [*names] for split, names in found.items()} == {
        "train": ["train/cat/1.jpg"], "test": ["test/cat/2.jpg"], "new": ["new/3.jpg"],
        "": ["4.jpg"]}
    assert splits("cat/1.jpg", "dog/2.jpg", "3.jpg")["train"]["3.jpg"] is None


def make(root, *names: str) -> None:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number))


def test_links_are_followed_and_annotations_ignored(tiny, tmp_path, monkeypatch):
    make(tmp_path, "elsewhere/1.png", "elsewhere/2.png", "own/dog/3.png", "own/4.png")
    (tmp_path / "own" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "own" / "labels").mkdir()
    for i in range(20):
        (tmp_path / "own" / "labels" / f"{i}.txt").write_text("0 0.5 0.5 1 1")
    store = data.open_store(tiny(dataset=str(tmp_path / "own")), "train")
    assert sorted(store.labels.tolist()) == [-1, 0, 0, 1]
    monkeypatch.chdir(tmp_path / "own")
    assert len(data.open_store(tiny(dataset="."), "train")) == 4


def test_what_is_not_used_is_logged(tiny, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(data.log, "propagate", True)
    make(tmp_path, "train/1.png", "test/2.png", "more/3.png", "more/4.png")
    with caplog.at_level("INFO"):
        assert len(data.open_store(tiny(dataset=str(tmp_path)), "train")) == 1
    assert "split 'more': 2 images, such as more/3.png" in caplog.text


def test_a_split_that_is_not_there_is_refused_by_name(tiny, tmp_path):
    make(tmp_path, "val/1.png", "test/2.png")
    with pytest.raises(UserError, match="no split 'train', only test, val"):
        data.open_store(tiny(dataset=str(tmp_path)), "train")


@pytest.mark.parametrize("column", ["note", "missing"])
def test_a_column_that_holds_no_images_is_refused_with_the_cause(tiny, tmp_path, column):
    rows = dict(photo=[png(0)], note=["x"])
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "disk")
    with pytest.raises(UserError, match=f"cannot read.*{column}|has no image|cannot read the data"):
        data.open_store(tiny(dataset=str(tmp_path / "disk"), image_column=column), "train")


def test_the_cause_of_a_failure_is_shown(tiny, tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="cannot read the dataset .*(magic bytes|[Pp]arquet)"):
        data.open_store(tiny(dataset=str(tmp_path)), "train")


@pytest.mark.parametrize("file, content", [
    ("info.json", b""), ("info.json", b"{}"), ("info.json", b"short")])
def test_a_damaged_store_is_refused_by_name(tiny, tmp_path, file, content):
    make(tmp_path, "own/1.png", "own/2.png")
    cfg = tiny(dataset=str(tmp_path / "own"), cache_dir=str(tmp_path / "cache"))
    data.open_store(cfg, "train").images.path.with_name(file).write_bytes(content)
    with pytest.raises(UserError, match="is damaged .*delete it"):
        data.open_store(cfg, "train")


# ---------------------------------------------------------------------------- odd labels


def tables(folder, labels, test_labels=None) -> str:
    """A folder of parquet files, with an image for each label; None: no such split."""
    folder = folder / "own"
    folder.mkdir()
    for split, given in (("train", labels), ("test", test_labels)):
        if given is not None:
            rows = dict(image=[png(len(split) * 100 + i) for i in range(len(given))], label=given)
            rows = datasets.Dataset.from_dict(rows)
            rows = rows.cast_column("image", datasets.Image())
            rows.to_parquet(folder / f"{split}.parquet")
    return str(folder)


NONE = [None] * 4


@pytest.mark.parametrize("labels, test_labels, accuracies", [
    ([0, 1], None, "k-NN and probe"),  # one is held out, whose class the other does not have
    ([0], [0], "none"),
    ([3] * 4, [3] * 4, "none"),  # one class is none
    ([0, 1] * 2, [2] * 4, "k-NN and probe"),  # no class in common
    (NONE, NONE, "none"),
    ([-1] * 4, [-1] * 4, "none"),
    ([0, 1] * 2, [-1] * 4, "none"),
    ([0, 1, None, -5], [None, 1, -5, 0], "k-NN and probe"),
    ([float("inf"), 1.0, float("nan"), 0.5], [1.0, 0.0] * 2, "k-NN and probe"),
    (["cat", "dog"] * 2, ["dog", "cat"] * 2, "k-NN and probe"),
    ([True, False] * 2, [False] * 4, "k-NN and probe"),
    ([10**12, 7] * 2, [7] * 4, "k-NN and probe"),
])
def test_odd_labels_are_learned_from_and_evaluated(
        tiny, tmp_path, labels, test_labels, accuracies):
    cfg = tiny(dataset=tables(tmp_path, labels, test_labels), max_samples=0, epochs=1,
               batch_size=min(4, len(labels)), cache_dir=str(tmp_path / "cache"))
    train.main(cfg)
    student = evaluation.main(EvalConfig((latest(cfg),)))[-1]
    found = "knn20" in student, "linear" in student
    assert found == ("k-NN" in accuracies, "probe" in accuracies)


def test_words_are_numbered_alike_in_all_splits(tiny, tmp_path):
    folder = tables(tmp_path, ["cat", "eel", None, "cat"], ["eel", "dog", "eel", None])
    stores = [data.open_store(tiny(dataset=folder), split) for split in ("train", "test")]
    assert [s.labels.tolist() for s in stores] == [[0, 2, -1, 0], [2, 1, 2, -1]]


@pytest.mark.parametrize("labels", [[], None])
def test_no_images_are_refused(tiny, tmp_path, labels):
    cfg = tiny(dataset=tables(tmp_path, labels), max_samples=0)
    with pytest.raises(UserError, match="cannot read the dataset|has no image") as error:
        train.main(cfg)
    assert "\n" not in str(error.value)


def test_one_image_can_be_learned(tiny, tmp_path):
    cfg = tiny(dataset=tables(tmp_path, [0]), max_samples=0, batch_size=1, epochs=1)
    train.main(cfg)
    assert (cfg.run_path / "student.safetensors").exists()


def test_a_run_is_not_continued_on_data_that_changed(tiny, tmp_path):
    make(tmp_path / "own", *[f"{i}.png" for i in range(16)])
    cfg = tiny(dataset=str(tmp_path / "own"), max_samples=0, epochs=1)
    train.main(cfg)
    shutil.move(tmp_path / "own", tmp_path / "moved")
    train.main(dataclasses.replace(cfg, dataset=str(tmp_path / "moved"), epochs=2,
                                   cache_dir=str(tmp_path / "another cache")))
    make(tmp_path / "moved", "one_more.png")
    with pytest.raises(UserError, match="images_hash: '[0-9a-f]*', now"):
        train.main(dataclasses.replace(cfg, dataset=str(tmp_path / "moved"), epochs=3))


def test_a_store_that_does_not_fit_is_refused_before_it_is_decoded(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: type("Usage", (), dict(free=5000)))
    with pytest.raises(UserError, match="do not fit into .*--max_samples"):
        data.open_store(tiny(cache_dir=str(tmp_path)), "train", 80)
    assert not list(tmp_path.glob("stores/*.tmp")) and os.listdir(tmp_path / "stores")


def test_a_test_split_of_one_class_keeps_its_labels(tiny, tmp_path):
    for name in ("train/cat/1.png", "train/dog/2.png", "test/cat/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(1))
    stores = [data.open_store(tiny(dataset=str(tmp_path)), split) for split in ("train", "test")]
    assert [store.labels.tolist() for store in stores] == [[0, 1], [0]]


def test_a_picture_beside_parquet_files_does_not_hide_them(tiny, tmp_path):
    cells = [dict(bytes=png(i), path=None) for i in range(5)]
    table = datasets.Dataset.from_dict(dict(image=cells))
    (tmp_path / "p").mkdir()
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "p" / "train.parquet")
    (tmp_path / "p" / "logo.png").write_bytes(png(9))
    assert len(data.open_store(tiny(dataset=str(tmp_path / "p")), "train")) == 5


def test_archives_nested_splits_and_two_links_to_a_folder_do_not_confuse(tiny, tmp_path):
    split = data.image_splits(["training/train/cat/1.png", "training/val/dog/2.png"])
    assert {name: len(files) for name, files in split.items()} == dict(train=1, val=1)
    for name in ("a/src/cat/1.png", "a/src/dog/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(1))
    (tmp_path / "a" / "backup.zip").write_bytes(b"PK")
    for link in ("train", "test"):
        (tmp_path / "a" / link).symlink_to("src")
    assert len(data.list_files(str(tmp_path / "a"))) == 6


def test_a_label_column_of_the_evaluation_may_be_missing_in_training(tiny, tmp_path):
    rows = datasets.Dataset.from_dict(dict(image=[dict(bytes=png(i), path=None) for i in range(4)]))
    rows.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "disk"))
    stores = [data.open_store(tiny(dataset=str(tmp_path / "disk"), label_column=column), "train")
              for column in ("", "breed")]
    assert stores[0].fingerprint == stores[1].fingerprint and stores[1].labels.max() == -1
