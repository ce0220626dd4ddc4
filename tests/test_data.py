"""Any collection of images -> a store: folders as people lay them out, tables, data that change.

No image is left out without a word, and no old pixels or labels are taken for new ones."""

import dataclasses
import errno
import io
import os
import shutil
import tarfile
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import drawn, png, put, tables

import data
import eval as evaluation
import train
from config import DATASETS, Config, UserError, parse
from test_smoke import latest


def of(store) -> list:
    return store.labels().tolist()


def pixels(store) -> np.ndarray:
    return store.images[np.arange(len(store))].numpy()


def stores(cfg) -> list:
    return [path.parent.name for path in data.Path(cfg.cache_dir).glob("stores/*/info.json")]


@pytest.fixture
def own(tiny, tmp_path):
    """The settings of a run on the folder "own", with a cache of its own."""
    folders = dict(dataset=str(tmp_path / "own"), cache_dir=str(tmp_path / "cache"))
    return lambda **changes: tiny(**dict(max_samples=0, epochs=1) | folders | changes)


def test_a_folder_is_decoded_once_into_upright_rgb(tiny, photos):
    cfg = tiny(dataset=str(photos))
    store = data.open_store(cfg, "train")
    images = pixels(store)
    assert images.shape == store.images.shape == (33, 3, 32, 32) and images.dtype == np.uint8
    assert {*of(store)} == {"cat", "dog"}
    before = store.images.paths[0].stat().st_mtime_ns
    assert data.open_store(cfg, "train").images.paths[0].stat().st_mtime_ns == before
    turned = [im for im in images if im[:, :14].mean() > 240 and im[:, 18:].mean() < 15]
    assert len(turned) == 1, "EXIF orientation is applied"


def test_parquet_files_and_save_to_disk_are_read(tiny, tmp_path):
    columns = dict(photo=[png(i) for i in range(6)], label=["cat", "dog"] * 3, note=["x"] * 6)
    foreign = datasets.Dataset.from_dict(columns)  # bytes, but no image type: named
    (tmp_path / "parquet").mkdir()
    foreign.to_parquet(tmp_path / "parquet" / "train.parquet")
    foreign.cast_column("photo", datasets.Image()).save_to_disk(tmp_path / "disk")
    a, b = (data.open_store(tiny(dataset=str(tmp_path / name), image_column=column), "train")
            for name, column in (("parquet", "photo"), ("disk", "")))
    assert of(a) == of(b) == ["cat", "dog"] * 3 and a.images.shape == (6, 3, 32, 32)
    assert (pixels(a) == pixels(b)).all() and a.fingerprint == b.fingerprint


def test_a_data_set_that_is_not_there_is_said_once(own):
    with pytest.raises(UserError) as raised:
        train.main(own(dataset="nowhere"))
    assert str(raised.value).count("nowhere") == 1


@pytest.mark.parametrize("columns, words", [
    (dict(note=["x"]), "not one image column among note: set --image_column; what is read: JPEG"),
    (dict(left=[png(0)], right=[png(1)]), "not one image column among left, right"),
])
def test_data_without_one_image_column_are_refused_by_name(tiny, tmp_path, columns, words):
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "disk")
    with pytest.raises(UserError, match=words):
        data.open_store(tiny(dataset=str(tmp_path / "disk")), "train")


@pytest.mark.parametrize("column", ["note", "missing"])
def test_a_column_that_holds_no_images_is_refused_with_the_cause(tiny, tmp_path, column):
    datasets.Dataset.from_dict(dict(photo=[png(0)], note=["x"])).save_to_disk(tmp_path / "disk")
    with pytest.raises(UserError, match="not one image column among photo, note|no image of train"):
        data.open_store(tiny(dataset=str(tmp_path / "disk"), image_column=column), "train")


@pytest.mark.parametrize("kind", [datasets.Array3D((3, 8, 8), "uint16"),
                                  datasets.Array2D((8, 8), "uint8"),
                                  datasets.List(datasets.List(datasets.Value("uint8")))])
def test_a_column_of_arrays_is_refused(tiny, tmp_path, kind):
    array = np.full((3, 8, 8) if "3D" in str(kind) else (8, 8), 200, np.uint8).tolist()
    rows = datasets.Dataset.from_dict(dict(photo=[array]), datasets.Features(photo=kind))
    rows.save_to_disk(tmp_path / "disk")
    with pytest.raises(UserError, match="photo holds arrays: write images"):
        data.open_store(tiny(dataset=str(tmp_path / "disk"), image_column="photo"), "train")


def test_a_function_that_returns_no_splits_is_refused(tiny, monkeypatch):
    monkeypatch.setitem(DATASETS, "mine", lambda: drawn(["cat"] * 3))
    with pytest.raises(UserError, match="cannot read the dataset mine|no split"):
        data.open_store(tiny(dataset="mine"), "train")


def test_a_transform_that_would_have_no_effect_is_refused(tiny, monkeypatch):
    rows = drawn(["cat"] * 3).with_transform(lambda batch: batch)
    monkeypatch.setitem(DATASETS, "mine", lambda: dict(train=rows))
    with pytest.raises(UserError, match="set_transform has no effect"):
        data.open_store(tiny(dataset="mine"), "train")


def test_the_cause_of_a_failure_is_shown(tiny, tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="cannot read the dataset .*(magic bytes|[Pp]arquet)"):
        data.open_store(tiny(dataset=str(tmp_path)), "train")


@pytest.mark.parametrize("name", ["1.heic", "1.npy", "cifar-10-batches-py/data_batch_1", "none"])
def test_a_folder_of_other_formats_is_refused_with_those_that_are_read(own, tmp_path, name):
    put(tmp_path, f"own/{name}")
    with pytest.raises(UserError, match="what is read: JPEG, PNG.*recipes.md"):
        data.open_store(own(), "train")


def test_one_image_can_be_learned(own, tmp_path):
    tables(tmp_path, [0])
    cfg = own(batch_size=1)
    train.main(cfg)
    assert (cfg.run_path / "student.safetensors").exists()


@pytest.mark.parametrize("labels", [[], None])
def test_no_images_are_refused(own, tmp_path, labels):
    tables(tmp_path, labels)
    with pytest.raises(UserError, match="cannot read the dataset|no image"):
        train.main(own())


# ---------------------------------------------------------------------------- data that change


def test_touched_copied_and_moved_data_continue_a_run_and_changed_images_do_not(own, tmp_path):
    put(tmp_path / "own", *[f"{i}.png" for i in range(16)])
    cfg = own()
    train.main(cfg)
    for path in (tmp_path / "own").iterdir():
        os.utime(path, (1, 1))
    train.main(dataclasses.replace(cfg, epochs=2))
    shutil.copytree(tmp_path / "own", tmp_path / "copy", copy_function=shutil.copy)
    shutil.rmtree(tmp_path / "own")
    moved = dataclasses.replace(cfg, epochs=3, dataset=str(tmp_path / "copy"))
    train.main(moved)
    assert evaluation.main(evaluation.EvalConfig((latest(cfg),), dataset=moved.dataset))
    put(tmp_path / "copy", "one_more.png")
    with pytest.raises(UserError, match="images"):
        train.main(dataclasses.replace(moved, epochs=4))


def fill(folder, first, kind):
    """Eight images whose names and sizes do not tell one filling from another."""
    images = [png(first + i, "bmp") for i in range(8)]
    shutil.rmtree(folder, ignore_errors=True)
    if kind == "files":
        folder.mkdir()
        for i, image in enumerate(images):
            (folder / f"{i}.bmp").write_bytes(image)
        return
    cells = [dict(bytes=image, path=None) for image in images]
    rows = datasets.Dataset.from_dict(dict(image=cells, label=[first] * 8))
    rows = rows.cast_column("image", datasets.Image())
    if kind == "disk":
        rows.save_to_disk(folder)
    else:
        folder.mkdir()
        rows.to_parquet(folder / "train.parquet")


@pytest.mark.parametrize("kind", ["files", "disk", "parquet"])
def test_replaced_images_of_the_same_names_and_sizes_are_seen(own, tmp_path, kind):
    fill(tmp_path / "own", 0, kind)
    first = data.open_store(own(), "train")
    fill(tmp_path / "own", 100, kind)
    second = data.open_store(own(), "train")
    assert second.fingerprint != first.fingerprint and (pixels(first) != pixels(second)).any()


@pytest.mark.parametrize("kept", [False, True], ids="times_{}".format)
def test_other_images_of_the_same_names_and_sizes_are_seen(own, tmp_path, monkeypatch, kept):
    """Also of those that a table names, which is not changed itself. Where they have also the same
    times, as a copy may, the store of the old ones is refused."""
    files = [tmp_path / "own" / f"{i}.bmp" for i in range(4)]
    paths = dict(image=list(map(str, files)))
    monkeypatch.setitem(DATASETS, "mine", lambda: dict(
        train=datasets.Dataset.from_dict(paths).cast_column("image", datasets.Image())))
    files[0].parent.mkdir()
    found = set()
    for first in (0, 10):
        for i, file in enumerate(files):
            file.write_bytes(png(first + i, "bmp"))
            os.utime(file, (1e9 + first * (not kept), 1e9 + first * (not kept)))
        for cfg in (own(), own(dataset="mine")):
            if first and kept:
                with pytest.raises(UserError, match="holds other images than the data now"):
                    data.open_store(cfg, "train")
            else:
                found.add(data.open_store(cfg, "train").fingerprint)
    assert len(found) == 2 - kept, "the folder and the table hold the same"


def test_a_store_of_other_code_is_refused(own, tmp_path, monkeypatch):
    put(tmp_path / "own", "1.png", "2.png")
    data.open_store(own(), "train")
    decode = data.decode
    monkeypatch.setattr(data, "decode", lambda *how: 255 - decode(*how))
    with pytest.raises(UserError, match="or of other code: delete it"):
        data.open_store(own(), "train")


def test_corrected_labels_and_another_label_column_decode_nothing_and_are_seen(own, tmp_path):
    def write(labels):
        shutil.rmtree(tmp_path / "own", ignore_errors=True)
        cells = [dict(bytes=png(i), path=None) for i in range(4)]
        rows = dict(image=cells, label=labels, Label=["x", "y"] * 2, la_bel=["u", "v"] * 2)
        rows = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        rows.save_to_disk(tmp_path / "own")

    write([0, 0, 1, 1])
    store = data.open_store(own(), "train")
    assert of(store) == ["0", "0", "1", "1"]
    for column, expected in (("Label", ["x", "y"] * 2), ("la_bel", ["u", "v"] * 2)):
        again = data.open_store(own(label_column=column), "train")
        assert again.labels(column).tolist() == expected and len(stores(own())) == 1
    write([1, 0, 1, 0])
    corrected = data.open_store(own(), "train")
    assert of(corrected) == ["1", "0", "1", "0"] and corrected.fingerprint == store.fingerprint


def test_a_function_may_name_a_data_set_and_what_it_returns_now_is_used(own, tmp_path, monkeypatch):
    first = [0]

    def mine():
        cells = [dict(bytes=png(first[0] + i), path=None) for i in range(4)]
        rows = datasets.Dataset.from_dict(dict(image=cells, label=[first[0]] * 4))
        return dict(train=rows.cast_column("image", datasets.Image()))

    monkeypatch.setitem(DATASETS, "mine", mine)
    before = data.open_store(own(dataset="mine"), "train")
    assert data.open_store(own(dataset="mine"), "train").fingerprint == before.fingerprint
    assert len(stores(own())) == 1
    first[0] = 10
    after = data.open_store(own(dataset="mine"), "train")
    assert of(after) == ["10"] * 4 and after.fingerprint != before.fingerprint


def test_other_rows_of_the_same_file_are_other_images(own, tmp_path, monkeypatch):
    fill(tmp_path / "disk", 0, "disk")
    found = []
    for first in (0, 2):
        rows = datasets.load_from_disk(str(tmp_path / "disk")).select(range(first, first + 4))
        monkeypatch.setitem(DATASETS, "mine", lambda rows=rows: dict(train=rows))
        found.append(pixels(data.open_store(own(dataset="mine"), "train")))
    assert (found[0][2:] == found[1][:2]).all() and (found[0] != found[1]).any()


def test_a_function_may_return_paths_of_own_files(own, tmp_path, monkeypatch):
    put(tmp_path, "elsewhere/1.png", "elsewhere/2.png")
    monkeypatch.chdir(tmp_path)
    paths = [str(tmp_path / "elsewhere" / "1.png"), "elsewhere/2.png"]
    rows = datasets.Dataset.from_dict(dict(image=paths)).cast_column("image", datasets.Image())
    monkeypatch.setitem(DATASETS, "mine", lambda: dict(train=rows))
    assert len(data.open_store(own(dataset="mine"), "train")) == 2


@pytest.mark.parametrize("file, content", [
    ("info.json", b""), ("info.json", b"{}"), ("rows.i64", b""), ("images.u8", b"short")])
def test_a_damaged_store_is_refused_by_name(own, tmp_path, file, content):
    put(tmp_path / "own", "1.png", "2.png")
    data.open_store(own(), "train").images.paths[0].with_name(file).write_bytes(content)
    with pytest.raises(UserError, match="is damaged .*delete it"):
        data.open_store(own(), "train")


# ---------------------------------------------------------------------------- nothing left out


def test_what_is_left_out_is_said_at_every_start(own, tmp_path):
    put(tmp_path / "own", *[f"train/{c}/{i}.png" for c in ("cat", "dog") for i in range(4)],
        "test/cat/1.png", "train/cat/new.heic", "train/dog/noname", "notes.csv", "more.parquet",
        "train/cat/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg", "train/cat/._1.png")
    cats = tmp_path / "own" / "train" / "cat"
    (cats / "empty.jpg").write_bytes(b"")
    (cats / "text.png").write_text("no image")
    (cats / "cut.png").write_bytes(png(0)[:900])
    data.Image.fromarray(np.full((50, 50), 40000, np.uint16)).save(cats / "deep.png")
    for _ in range(2):
        summary = data.open_store(own(), "train").summary
        for words in ("12 of train, 1 of test", "8 cat, 4 dog", "8 of 12 are used",
                      "4 images cannot be read", "1 .heic", "1 without extension", "1 .csv",
                      "1 .parquet", "1 .jpg", "more than 8 bits"):
            assert words in summary.replace("1 of test, 12 of train", "12 of train, 1 of test")


@pytest.mark.parametrize("error", [
    OSError(errno.EACCES, "Permission denied"), OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"), OSError(errno.ENOENT, "No such file"),
    OSError(errno.EMFILE, "Too many open files"), MemoryError()])
def test_a_failure_that_may_pass_leaves_no_store_of_fewer_images(
        own, tmp_path, monkeypatch, error):
    put(tmp_path / "own", *[f"{i}.png" for i in range(4)])
    decode, calls = data.decode, []

    def breaks(*arguments, **named):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return decode(*arguments, **named)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="nothing was left out"):
        patch.setattr(data, "decode", breaks)
        data.open_store(own(), "train")
    assert not stores(own()) and len(data.open_store(own(), "train")) == 4


def test_a_picture_beside_parquet_files_does_not_hide_them(own, tmp_path):
    tables(tmp_path, [0, 1] * 3)
    (tmp_path / "own" / "logo.png").write_bytes(png(0)[:500])
    store = data.open_store(own(), "train")
    assert len(store) == 6 and "left out: 1 .png" in store.summary


def test_a_word_of_a_parquet_files_name_makes_no_split(own, tmp_path):
    for number, name in enumerate(("airport", "harbour", "train_station")):
        tables(tmp_path / name, [0] * 3, first=10 * number)
        (tmp_path / "own").mkdir(exist_ok=True)
        shutil.move(tmp_path / name / "own" / "train.parquet", tmp_path / "own" / f"{name}.parquet")
    assert len({image.tobytes() for image in pixels(data.open_store(own(), "train"))}) == 9


def test_the_parts_of_a_parquet_split_belong_together(own, tmp_path):
    tables(tmp_path, [0, 1], [1])
    folder = tmp_path / "own"
    for part in (1, 2):
        shutil.copy(folder / "train.parquet", folder / f"train-0000{part}-of-00003.parquet")
    os.rename(folder / "train.parquet", folder / "train-00000-of-00003.parquet")
    assert [len(data.open_store(own(), split)) for split in ("train", "test")] == [6, 1]


def test_parquet_splits_may_have_other_columns_and_classes(own, tmp_path):
    def write(split, names, words):
        cells = [dict(bytes=png(i), path=None) for i in range(len(words))]
        kinds = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
        rows = datasets.Dataset.from_dict(dict(image=cells, label=words), kinds)
        rows.to_parquet(tmp_path / "own" / f"{split}.parquet")

    tables(tmp_path, None)
    write("train", ["ant", "cat", "dog"], ["ant", "cat", "dog"])
    write("test", ["dog", "cat"], ["cat", "dog"])
    rows = datasets.Dataset.from_dict(dict(image=[dict(bytes=png(9), path=None)]))
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "own" / "new.parquet")
    found = [of(data.open_store(own(), split)) for split in ("train", "test", "new")]
    assert found == [["ant", "cat", "dog"], ["cat", "dog"], [None]]


def test_parquet_files_beside_those_of_splits_are_none(own, tmp_path):
    tables(tmp_path, [0, 1], [1])
    os.rename(tmp_path / "own", tmp_path / "data")
    tables(tmp_path, [0] * 3)
    os.rename(tmp_path / "own" / "train.parquet", tmp_path / "own" / "extra.parquet")
    os.rename(tmp_path / "data", tmp_path / "own" / "data")
    store = data.open_store(own(), "train")
    assert len(store) == 2 and "3 of no split" in store.summary


# ---------------------------------------------------------------------------- folders


def splits(*names: str) -> dict:
    return data.folder_splits({name: os.path.dirname(name) for name in names})


def test_class_folders_may_be_called_like_a_split():
    names = [f"{c}/{i}.jpg" for c in ("bus", "car", "train", "test_tube") for i in (1, 2)]
    (split,) = splits(*names).items()
    assert split[0] == "train" and {*split[1].values()} == {"bus", "car", "train", "test_tube"}
    found = splits(*[f"{s}/{c}/1.jpg" for s in ("train", "test") for c in ("bus", "train")])
    assert [[*some.values()] for some in found.values()] == [["bus", "train"]] * 2


def test_a_file_may_be_called_like_a_split():
    assert [*splits("IMG_1.jpg", "train_station.jpg", "test.jpg")] == ["train"]


@pytest.mark.parametrize("first, second", [
    ("Train", "Test"), ("Training", "Testing"), ("train", "val"), ("seg_train", "seg_test"),
    ("train_images", "test_images"), ("Train Images", "Test Images"), ("train2017", "val2017"),
    ("training_set/training_set", "test_set/test_set"), ("data/train-01", "data/dev-02"),
    ("train", "holdout"), ("train", "eval"),
])
def test_splits_are_found_by_what_people_call_them(first, second):
    found = splits(f"{first}/cat/1.jpg", f"{first}/dog/2.jpg", f"{second}/cat/3.jpg")
    assert len(found) == 2 and len({*found} & {*data.TRAIN}) == len({*found} & {*data.TEST}) == 1
    learned, tested = found.values()
    assert [*learned.values(), *tested.values()] == ["cat", "dog", "cat"]


def test_splits_may_be_far_below():
    names = [f"ILSVRC/Data/CLS-LOC/{split}/{i}" for split in ("train", "val") for i in "ab"]
    splits = data.folder_splits({f"{name}/1.jpg": name for name in names})
    assert {split: [*some.values()] for split, some in splits.items()} == dict(
        train=["a", "b"], val=["a", "b"])


def test_a_third_folder_beside_the_splits_is_neither():
    found = splits("seg_train/seg_train/sea/1.jpg", "seg_train/seg_train/ice/2.jpg",
                   "seg_test/seg_test/sea/3.jpg", "seg_pred/seg_pred/4.jpg")
    assert {split: [*some.values()] for split, some in found.items()} == dict(
        train=["sea", "ice"], test=["sea"], pred=[None])
    found = splits("train/cat/1.jpg", "test/cat/2.jpg", "new/3.jpg", "4.jpg")
    assert {split: [*names] for split, names in found.items()} == {
        "train": ["train/cat/1.jpg"], "test": ["test/cat/2.jpg"], "new": ["new/3.jpg"],
        "": ["4.jpg"]}


def test_splits_may_be_below_the_classes():
    found = splits(*[f"{c}/{s}/1.jpg" for c in ("cat", "dog") for s in ("train", "test")])
    assert {split: [*some.values()] for split, some in found.items()} == dict(
        train=["cat", "dog"], test=["cat", "dog"])


@pytest.mark.parametrize("names, train, test", [
    ("seg_train/seg_train/sea/1 seg_train/seg_train/ice/2 seg_test/sea/3", "sea ice", "sea"),
    ("train/images/sea/1 train/images/ice/2 test/images/sea/3", "sea ice", "sea"),
    ("cover data/train/sea/1 data/train/ice/2 data/test/sea/3", "sea ice", "sea"),
    ("training_set/sea/1 test_set/sea/2 single_prediction/3", "sea", "sea"),
    ("train_images/sea/1 test_images/ice/2 masks/3", "sea", "ice"),
])
def test_folders_around_the_classes_are_none(names, train, test):
    found = splits(*[f"{name}.jpg" for name in names.split()])
    learned = next(some for split, some in found.items() if split in data.TRAIN)
    assert [*learned.values()] == train.split() and [*found["test"].values()] == test.split()


def test_one_folder_for_all_images_is_no_class():
    assert splits("images/1.jpg", "images/2.jpg")["train"]["images/1.jpg"] is None
    found = splits("train/images/1.jpg", "test/images/2.jpg")
    assert [[*some.values()] for some in found.values()] == [[None], [None]]


def test_classes_may_be_called_like_splits_below_a_split():
    found = splits("train/test/1.jpg", "train/val/2.jpg", "train/car/3.jpg")
    assert {split: [*some.values()] for split, some in found.items()} == dict(
        train=["test", "val", "car"])


def test_a_single_split_keeps_its_name(own, tmp_path):
    put(tmp_path / "own", "val/cat/1.png", "val/dog/2.png")
    assert of(data.open_store(own(), "val")) == ["cat", "dog"]
    with pytest.raises(UserError, match="no split 'train', only val"):
        data.open_store(own(), "train")


def test_an_archive_beside_its_images_does_not_hide_them(own, tmp_path):
    put(tmp_path / "own", *[f"Images/{c}/{i}.png" for c in ("cat", "dog") for i in range(3)])
    with tarfile.open(tmp_path / "own" / "images.tar", "w") as tar:
        tar.add(tmp_path / "own" / "Images", "Images")
    assert of(data.open_store(own(), "train")) == ["cat"] * 3 + ["dog"] * 3


def test_dead_links_are_said_to_be_left_out(own, tmp_path):
    put(tmp_path / "own", "cat/1.png", "dog/2.png")
    (tmp_path / "own" / "cat" / "3.png").symlink_to(tmp_path / "away.png")
    for _ in range(2):
        assert "left out: 1 .png (dead link)" in data.open_store(own(), "train").summary


def test_what_cannot_be_reached_now_ends_with_a_message(own, tmp_path, monkeypatch):
    put(tmp_path / "own", "cat/1.png", "dog/2.png")
    look = os.stat

    def away(path, **options):
        if str(path).endswith("dog/2.png"):
            raise OSError(errno.ESTALE, "Stale file handle", path)
        return look(path, **options)

    monkeypatch.setattr(data.os, "stat", away)
    with pytest.raises(UserError, match="Stale file handle.*dog/2.png"):
        data.open_store(own(), "train")


def test_folders_have_no_columns_of_images(own, tmp_path):
    put(tmp_path / "own", "a/1.png", "b/2.png")
    with pytest.raises(UserError, match="has no columns"):
        data.open_store(own(image_column="photo"), "train")


def test_folders_have_no_label_columns(own, tmp_path):
    put(tmp_path / "own", "cat/1.png", "dog/2.png")
    with pytest.raises(UserError, match="--label_column species: neither split has labels"):
        evaluation.Evaluator(own(label_column="species"))


@pytest.mark.parametrize("folders, expected", [
    ("train_val2018 test2018", "trainval test"), ("TrainVal Test", "trainval test"),
    ("rps rps-test-set", "train test"), ("data_256 val_256 test_256", "train val test"),
    ("horse-or-human validation-horse-or-human", "train validation"),
    ("trainset valset", "train val"), ("TRAINSET TESTSET", "train test"),
    ("trainingset testset", "training test"), ("train_labeled test", "train test"),
    ("train-jpg test-jpg-v2", "train test"), ("train_imgs test", "train test"),
    ("train_clean train_noisy test", "train_clean train_noisy test"),
    ("train test_id test_ood", "train test_id test_ood"),
    ("Training PublicTest PrivateTest", "training public_test private_test"),
    ("trainA trainB testA testB", "train_a train_b test_a test_b"),
    ("train train_masks test", "train train_masks test"), ("train unlabeled", "train unlabeled"),
    ("steam_train bus test_tube", "train"), ("steam_train bullet_train", "train"),
    ("images other test", "train"), ("test_photos", "train"), ("1 2 test", "train")])
def test_folders_with_words_for_splits_are_splits(folders, expected):
    names = [f"{folder}/{name}/1.jpg" for folder in folders.split() for name in ("cat", "dog")]
    found = splits(*names)
    assert [*found] == expected.split()
    if expected != "train":
        assert all({*files.values()} == {"cat", "dog"} for files in found.values())


def test_parquet_files_with_words_for_splits_are_splits(own, tmp_path):
    tables(tmp_path, [0, 1] * 2, [1, 0])
    os.rename(tmp_path / "own" / "test.parquet", tmp_path / "own" / "test_id.parquet")
    shutil.copy(tmp_path / "own" / "test_id.parquet", tmp_path / "own" / "test_ood.parquet")
    assert len(data.open_store(own(), "train")) == 4
    assert len(data.open_store(own(), "test_ood")) == 2


def test_numbered_parts_are_no_splits():
    assert [*splits("part_1/1.jpg", "part_2/2.jpg")] == ["train"]


def test_folders_around_the_splits_do_not_matter():
    found = splits("a/b/train/cat/1.jpg", "a/b/train/dog/2.jpg", "a/b/test/cat/3.jpg")
    assert {*found} == {"train", "test"} and found["train"]["a/b/train/dog/2.jpg"] == "dog"
    assert [*splits("a/images/1.jpg", "a/images/2.jpg")] == ["train"]
    found = splits("training/train/cat/1.png", "training/val/dog/2.png")
    assert {name: len(files) for name, files in found.items()} == dict(train=1, val=1)


def test_images_below_a_class_folder_have_its_class():
    found = splits("train/n01/images/1.JPEG", "train/n02/images/2.JPEG", "val/images/3.JPEG")
    assert [*found["train"].values()] == ["n01", "n02"]
    assert splits("cat/1.jpg", "dog/2.jpg", "3.jpg")["train"]["3.jpg"] is None


@pytest.mark.parametrize("names, words", [
    (["part_1/1.png", "part_2/2.png"], "1 part_1, 1 part_2"),
    (["images/1.png", "images/2.png", "masks/3.png"], "2 images, 1 masks"),
    (["images/1.png", "images/2.png", "masks/1.png"], "2 of train; classes: 2 no class; other "
     "files, left out: 1 .png"),
    (["a/images/1.jpg", "b/Images/2.jpg", "a/masks/1.png"], "classes: 1 a, 1 b; other files, left "
     "out: 1 .png"),
    (["a/1.png", "b/2.png", "b/2_mask.png", "b/2_mask_1.png"], "classes: 1 a, 1 b; other files, "
     "left out: 2 .png"),
    (["mask/1.png", "no_mask/1.png", "no_mask/2.png"], "classes: 2 no_mask, 1 mask;"),
    (["mask/1.png", "no_mask/1.jpg", "no_mask/2.jpg"], "classes: 2 no_mask, 1 mask;"),
    (["a/1.jpg", "b/2.jpg", "annotations/trimaps/1.png", "SegmentationClass/2.png"],
     "classes: 1 a, 1 b; other files, left out: 2 .png"),
    (["annotation/1.jpg", "photo/1.png"], "classes: 1 annotation, 1 photo;"),
    ([".357 Magnum/1.png", "9mm/2.png", ".DS_Store"], "left out: 1 .hidden;"),
    (["a::b/1.png", "c/2::3.png"], "2 of 2 are used"),
    (["train/1.png", "test/2.png", "more/3.png", "more/4.png"], "2 of more"),
])
def test_what_is_taken_for_classes_and_splits_is_said_with_counts(own, tmp_path, names, words):
    put(tmp_path / "own", *names)
    assert words in data.open_store(own(), "train").summary


def test_a_split_that_is_not_there_is_refused_by_name(own, tmp_path):
    put(tmp_path / "own", "val/1.png", "test/2.png")
    with pytest.raises(UserError, match="no split 'train', only test, val"):
        data.open_store(own(), "train")


def test_a_test_split_of_one_class_keeps_its_labels(own, tmp_path):
    put(tmp_path / "own", "train/cat/1.png", "train/dog/2.png", "test/cat/3.png")
    found = [data.open_store(own(), split) for split in ("train", "test")]
    assert [of(store) for store in found] == [["cat", "dog"], ["cat"]]


def test_links_are_followed_but_not_in_circles(own, tmp_path, monkeypatch):
    put(tmp_path, "elsewhere/1.png", "elsewhere/2.png", "own/dog/3.png", "own/4.png")
    folder = tmp_path / "own"
    (folder / "cat").symlink_to(tmp_path / "elsewhere")
    (folder / "dog" / "up").symlink_to(folder)
    (folder / "dog" / "self").symlink_to(".")
    (folder / "itself.png").symlink_to("itself.png")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    store = data.open_store(own(), "train")
    assert sorted(map(str, of(store))) == ["None", "cat", "cat", "dog"]
    monkeypatch.chdir(folder)
    assert len(data.open_store(own(dataset="."), "train")) == 4


def test_folders_that_link_to_each_other_are_read_once(own, tmp_path):
    folder, count = tmp_path / "own", 9
    put(folder, *[f"{i}/{i}.png" for i in range(count)])
    for i in range(count):
        for j in range(count):
            (folder / f"{i}" / f"to-{j}").symlink_to(folder / f"{j}")
    store = data.open_store(own(), "train")
    assert of(store) == [f"{i}" for i in range(count)]


def test_two_links_to_a_folder_are_two_splits(own, tmp_path):
    put(tmp_path / "own", "src/cat/1.png", "src/dog/2.png")
    for link in ("train", "test"):
        (tmp_path / "own" / link).symlink_to("src")
    assert [len(data.open_store(own(), split)) for split in ("train", "test")] == [2, 2]


def test_a_cache_and_a_run_inside_the_data_are_not_read_as_data(own, tmp_path, monkeypatch):
    put(tmp_path / "own", *[f"{i}.png" for i in range(16)])
    monkeypatch.chdir(tmp_path / "own")
    cfg = own(dataset=".", cache_dir="cache", run_dir="")
    for epochs in (1, 2):
        cfg = dataclasses.replace(cfg, epochs=epochs)
        train.main(cfg)
        put(cfg.run_path, "plot.png")
    assert cfg.run_path.parent.name == "runs" and len(data.open_store(cfg, "train")) == 16


@pytest.mark.parametrize("name", ["[2024] photos", "a*b?", "~", "{x}", "#1%20"])
@pytest.mark.parametrize("kind", ["files", "disk", "parquet"])
def test_a_folders_name_is_no_pattern(own, tmp_path, name, kind):
    fill(tmp_path / name, 0, kind)
    assert len(data.open_store(own(dataset=str(tmp_path / name)), "train")) == 8


def test_names_that_are_no_utf8_or_have_escapes_are_read_and_printed_without(own, tmp_path):
    put(tmp_path / "own", "a/1.png", "b/2.png", "\x1b[31mred/3.png")
    folder = os.fsencode(tmp_path / "own")
    os.rename(folder + b"/a/1.png", folder + b"/a/caf\xe9.png")
    (tmp_path / "own" / "b" / "\x1b]0;title\x07.png").write_bytes(b"broken")
    store = data.open_store(own(), "train")
    assert len(store) == 3 and "\x1b" not in store.summary and "?[31mred" in store.summary
    store.summary.encode()
    assert "\udce9" not in "".join(store.names(np.arange(3)))


@pytest.mark.parametrize("name", ["shapes", "cifar10"])
def test_a_folder_that_is_called_like_a_named_data_set_has_to_be_told_apart(
        own, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, f"{name}/1.png")
    with pytest.raises(UserError, match=rf"\./{name}"):
        train.main(own(dataset=name))
    train.main(own(dataset=f"./{name}", batch_size=1))
    assert len(data.open_store(own(dataset=f"./{name}"), "train")) == 1


def test_a_tilde_after_an_equals_sign_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = parse(Config, ["--run_dir=~/run", "--cache_dir=~/cache", "--dataset=~"])
    assert (cfg.run_dir, cfg.cache_dir, cfg.dataset) == (
        f"{tmp_path}/run", f"{tmp_path}/cache", str(tmp_path))


# ---------------------------------------------------------------------------- nothing outside


@pytest.mark.parametrize("part, file", [
    ("../other", ""), ("..", ""), ("train", "../../other/{}"), ("train", "{root}/other/{}")])
def test_saved_tables_that_name_files_outside_of_their_folder_do_not_reach_them(
        own, tmp_path, part, file):
    fill(tmp_path / "other", 0, "disk")
    fill(tmp_path / "own" / "train", 50, "disk")
    (arrow,) = (tmp_path / "other").glob("*.arrow")
    (tmp_path / "own" / "dataset_dict.json").write_text(f'{{"splits": ["{part}"]}}')
    if file:
        name = file.format(arrow.name, root=tmp_path)
        state = f'{{"_data_files": [{{"filename": "{name}"}}]}}'
        (tmp_path / "own" / "train" / "state.json").write_text(state)
    if file:
        splits, _ = data.open_folder(own())
        assert list(splits) == ["train"] and splits["train"]["label"] == [50] * 8
        return
    with pytest.raises(UserError, match="which is not there"):
        data.open_folder(own())


def test_a_pipe_in_the_place_of_a_file_hangs_nothing(own, tmp_path):
    fill(tmp_path / "own" / "train", 0, "disk")
    (tmp_path / "own" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (path,) = (tmp_path / "own").glob("train/*.arrow")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="train lists files, of which none is there"):
        data.open_store(own(), "train")


def test_a_pipe_beside_images_hangs_nothing(own, tmp_path):
    put(tmp_path / "own", "1.png", "2.png")
    for name in ("pipe.png", "README.md", "state.json"):
        os.mkfifo(tmp_path / "own" / name)
    assert len(data.open_store(own(), "train")) == 2


# ---------------------------------------------------------------------------- hub and clusters


def test_a_local_copy_of_several_configurations_takes_one_by_name(own, tmp_path):
    card = ["---", "configs:"]
    for name, count in (("small", 4), ("large", 6)):
        tables(tmp_path / name, [0] * count)
        (tmp_path / "own" / name).mkdir(parents=True)
        shutil.move(tmp_path / name / "own" / "train.parquet", tmp_path / "own" / name)
        card += [f"- config_name: {name}", f"  data_files: {name}/*.parquet"]
    (tmp_path / "own" / "README.md").write_text("\n".join([*card, "---", ""]))
    with pytest.raises(UserError, match="small.*large"):
        data.open_store(own(), "train")
    found = [data.open_store(own(dataset_config=name), "train") for name in ("small", "large")]
    assert [len(store) for store in found] == [4, 6]


def test_a_data_card_reads_nothing_outside_of_its_folder(own, tmp_path):
    tables(tmp_path, [0, 1])
    (tmp_path / "own").rename(tmp_path / "private")
    tables(tmp_path, [0, 1])
    card = "---\nconfigs:\n- config_name: default\n  data_files: %s/train.parquet\n---\n"
    for place in ("../private", tmp_path / "private"):
        (tmp_path / "own" / "README.md").write_text(card % place)
        with pytest.raises(UserError, match="private/train.parquet, which is outside"):
            data.open_store(own(), "train")
    (tmp_path / "own" / "README.md").write_text(card % ".")
    (tmp_path / "own" / "more.heic").write_bytes(b"")
    assert "left out: 1 .md, 1 .heic" in data.open_store(own(), "train").summary
    (tmp_path / "link").symlink_to(tmp_path / "own")
    assert len(data.open_store(own(dataset=str(tmp_path / "link")), "train")) == 2


def test_a_data_card_states_the_splits_of_tables_beside_which_there_is_an_image(own, tmp_path):
    tables(tmp_path, [0, 1], [0])
    folder = tmp_path / "own"
    (folder / "train.parquet").rename(folder / "learn.parquet")
    (folder / "test.parquet").rename(folder / "held.parquet")
    put(folder, "logo.png")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
        "    path: learn.parquet\n  - split: test\n    path: held.parquet\n---\n")
    assert [len(data.open_store(own(), split)) for split in ("train", "test")] == [2, 1]


def test_images_with_a_data_card_are_read_as_without(own, tmp_path, monkeypatch):
    put(tmp_path / "own", "train/cat/1.png", "train/dog/2.png", "train/dog/@eaDir/2.png/SYNO.jpg")
    (tmp_path / "own" / "train" / "dog" / "photo").write_bytes(b"")
    (tmp_path / "own" / "README.md").write_text("---\nconfigs:\n- config_name: default\n---\n")
    monkeypatch.chdir(tmp_path / "own")
    for _ in range(2):  # the cache is inside
        store = data.open_store(own(dataset=".", cache_dir="cache"), "train")
        assert of(store) == ["cat", "dog"] and "1 without extension" in store.summary
    with pytest.raises(UserError, match="BuilderConfig 'small' not found"):
        data.open_store(own(dataset_config="small"), "train")


def test_a_folder_with_a_data_card_is_read_again_when_it_changes(own, tmp_path):
    """Also another folder of the same name: `datasets` knows both by it."""
    card = "---\nconfigs:\n- config_name: default\n  data_files: train.parquet\n---\n"
    for root, labels, first in (("a", [0] * 4, 0), ("b", [1] * 4, 50), ("a", [2] * 6, 90)):
        shutil.rmtree(tmp_path / root, ignore_errors=True)
        folder = Path(tables(tmp_path / root, labels, first=first))
        (folder / "README.md").write_text(card)
        store = data.open_store(own(dataset=str(folder)), "train")
        assert of(store) == [str(label) for label in labels]
        assert (pixels(store)[0] == data.decode(dict(bytes=png(first + 500)), 32)).all()


def test_files_of_one_split_that_number_their_classes_differently_are_refused(own, tmp_path):
    for number, names in enumerate((["cat", "dog"], ["dog", "cat"])):
        folder = Path(tables(tmp_path / str(number), [0, 1]))
        rows = datasets.load_dataset("parquet", data_dir=str(folder), split="train")
        rows = rows.cast_column("label", datasets.ClassLabel(names=names))
        (tmp_path / "own").mkdir(exist_ok=True)
        rows.to_parquet(tmp_path / "own" / f"train-{number}.parquet")
    with pytest.raises(UserError, match="have other names or numbers of classes"):
        data.open_store(own(), "train")


def test_images_with_several_labels_have_no_class(own, tmp_path):
    tables(tmp_path, [[0, 1], [1], []])
    store = data.open_store(own(), "train")
    assert of(store) == [None] * 3 and "labels: no column" in store.summary


def test_names_of_shards_may_end_in_a_digest(own, tmp_path):
    folder = Path(tables(tmp_path, [0] * 4, [1] * 2))
    for split, digest in (("train", "4746b8785c874cc7"), ("test", "aa3d9f1e2b7c6d5e")):
        (folder / f"{split}.parquet").rename(folder / f"{split}-00000-of-00001-{digest}.parquet")
    assert [len(data.open_store(own(), split)) for split in ("train", "test")] == [4, 2]


def test_splits_may_be_written_in_other_letters(own, tmp_path):
    rows = dict(image=[dict(bytes=png(i), path=None) for i in range(3)])
    rows = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict(Train=rows, Test=rows.select([0])).save_to_disk(tmp_path / "own")
    assert [len(data.open_store(own(), split)) for split in ("train", "test")] == [3, 1]


def test_a_readme_of_ones_own_is_no_data_card(own, tmp_path):
    put(tmp_path / "own", "1.png", "2.png")
    (tmp_path / "own" / "README.md").write_bytes(b"my caf\xe9")
    assert len(data.open_store(own(), "train")) == 2


def test_files_of_the_hubs_cache_are_read_behind_a_link(own, tmp_path, monkeypatch):
    put(tmp_path, "disk/hub/1.png", "private/2.png")
    (tmp_path / "cache").symlink_to("disk")
    asked = []

    def from_hub(what, instead, load, *arguments, **options):
        asked.append((arguments, options))
        paths = [str(tmp_path / name) for name in ("disk/hub/1.png", "private/2.png")]
        rows = datasets.Dataset.from_dict(dict(image=paths))
        return dict(train=rows.cast_column("image", datasets.Image()))

    monkeypatch.setattr(data, "from_hub", from_hub)
    monkeypatch.setattr(data, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    store = data.open_store(own(dataset="me/pets@v1.0", cache_dir=str(tmp_path / "c")), "train")
    assert len(store) == 1 and "outside the data set's folder" in store.summary
    assert asked == [(("me/pets", None), dict(revision="v1.0"))]


def test_another_processs_lock_is_waited_for_with_a_word(tmp_path, monkeypatch, caplog):
    class Held:
        def __init__(self, path):
            self.waits = []

        def acquire(self, timeout=-1):
            self.waits.append(timeout)
            if timeout >= 0:
                raise data.Timeout("lock")
            assert self.waits == [5, -1]
            return data.nullcontext()

    monkeypatch.setattr(data, "FileLock", Held)
    monkeypatch.setattr(data.log, "propagate", True)
    with caplog.at_level("INFO"), data.locked(tmp_path / "x.lock"):
        assert f"waiting for {tmp_path / 'x.lock'}, which another" in caplog.text
    with pytest.raises(data.Busy, match="another process holds .*x.lock"):
        data.locked(tmp_path / "x.lock", wait=False)


@pytest.mark.parametrize("error", [
    NotImplementedError(), OSError(errno.ENOLCK, "No locks"), OSError(errno.ENOTSUP, "No")])
def test_a_disk_without_locks_does_without(own, tmp_path, monkeypatch, caplog, error):
    class None_(data.FileLock):
        def acquire(self, *arguments, **named):
            raise error

    put(tmp_path / "own", "1.png")
    monkeypatch.setattr(data, "FileLock", None_)
    monkeypatch.setattr(data.log, "propagate", True)
    assert len(data.open_store(own(), "train")) == 1
    assert "run one process at a time" in caplog.text


def test_a_disk_that_does_not_synchronise_folders_will_do(own, tmp_path, monkeypatch):
    fsync = os.fsync

    def files_only(file):
        if os.path.isdir(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        return fsync(file)

    put(tmp_path / "own", "1.png")
    monkeypatch.setattr(os, "fsync", files_only)
    train.main(own(batch_size=1))


def test_a_store_that_does_not_fit_is_refused_before_it_is_decoded(own, monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: type("Usage", (), dict(free=5000)))
    with pytest.raises(UserError, match="do not fit into .*--max_samples"):
        data.open_store(own(dataset="shapes"), "train", 80)
    assert not stores(own())


def test_a_bad_offset_in_a_file_leaves_out_its_image(monkeypatch):
    def seeks(*arguments):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(data, "decode", seeks)
    assert data.try_decode(dict(path="bad.tif"), 32, [""]).startswith("bad.tif: OSError")


@pytest.mark.parametrize("path", ["gone.png", "1.png/inside.png", "x" * 5000, "circle.png"])
def test_a_path_of_a_table_that_leads_nowhere_leaves_out_its_row(tmp_path, path):
    (tmp_path / "1.png").write_bytes(png(1))
    (tmp_path / "circle.png").symlink_to("circle.png")
    reason = data.try_decode(dict(bytes=None, path=path), 32, [str(tmp_path)] * 2)
    assert isinstance(reason, str) and reason.startswith(path[:200]) and len(reason) < 300


# ---------------------------------------------------------------------------- names of classes


def test_class_names_are_the_same_in_whatever_form_a_split_has_them(own, tmp_path):
    words = datasets.ClassLabel(names=["ant", "café"])
    apart = unicodedata.normalize("NFD", "café")
    for given, kind, expected in (
            ([0, 1, -1, None], words, ["ant", "café", None, None]),
            (["ant", apart, "", None], datasets.Value("string"), ["ant", "café", None, None]),
            ([9, 10, -1, None], datasets.Value("int64"), ["9", "10", None, None]),
            ([9.0, 10.0, float("nan"), 0.5], datasets.Value("float32"), ["9", "10", None, "0.5"]),
            (["9", "10", "-1", None], datasets.Value("string"), ["9", "10", "-1", None])):
        shutil.rmtree(tmp_path / "own", ignore_errors=True)
        rows = dict(image=[dict(bytes=png(i), path=None) for i in range(4)], label=given)
        rows = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        rows.cast_column("label", kind).save_to_disk(tmp_path / "own")
        assert of(data.open_store(own(), "train")) == expected


def test_class_names_of_folders_are_the_same_however_their_accents_are_composed(own, tmp_path):
    apart = unicodedata.normalize("NFD", "café")
    put(tmp_path / "own", "train/café/1.png", f"test/{apart}/2.png")
    assert of(data.open_store(own(), "train")) == of(data.open_store(own(), "test")) == ["café"]


def test_a_number_without_a_name_is_its_own_name(own, tmp_path):
    rows = dict(image=[dict(bytes=png(i), path=None) for i in range(2)], label=[0, 255])
    kinds = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    rows = datasets.Dataset.from_dict(rows, kinds)
    rows.info.features["label"] = datasets.ClassLabel(names=["ant"])
    rows.save_to_disk(tmp_path / "own")
    assert of(data.open_store(own(), "train")) == ["ant", "255"]


def test_the_column_of_the_labels_is_said(own, tmp_path):
    rows = drawn(["cat", "dog"]).rename_column("label", "animal")
    rows = rows.cast_column("animal", datasets.ClassLabel(names=["cat", "dog"]))
    rows = rows.add_column("label", [["a"], ["b"]]).add_column("note", [5, 6])
    rows.save_to_disk(tmp_path / "own")
    for column, said in (("", "animal (cat, dog)"), ("note", "note"), ("label", "no column")):
        store = data.open_store(own(label_column=column), "train")
        assert f"; labels: {said};" in store.summary
    assert of(data.open_store(own(), "train")) == ["cat", "dog"]


@pytest.mark.parametrize("column", ["boxes", "missing", "image"])
def test_a_column_that_holds_no_classes_gives_no_labels(own, tmp_path, column):
    rows = dict(image=[dict(bytes=png(0), path=None)], boxes=[[1, 2]])
    rows = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    rows.save_to_disk(tmp_path / "own")
    assert data.open_store(own(), "train").labels(column).tolist() == [None]


# ---------------------------------------------------------------------------- large sets


def shard(path, first, count=4):
    """A tar shard of WebDataset: an image and its class under one key."""
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + count):
            for name, content in ((f"{i:06d}.png", png(i)), (f"{i:06d}.cls", f"{i % 2}".encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def test_tar_shards_are_read_with_their_classes(own, tmp_path):
    """Also where img2dataset has written a table of captions beside each."""
    (tmp_path / "own").mkdir()
    for name, first in (("train-000000", 0), ("train-000001", 4), ("test-000000", 8)):
        shard(tmp_path / "own" / f"{name}.tar", first)
    captions = datasets.Dataset.from_dict(dict(key=["000000"], caption=["a dot"]))
    captions.to_parquet(tmp_path / "own" / "train-000000.parquet")
    train_store, test_store = (data.open_store(own(), split) for split in ("train", "test"))
    assert len(train_store) == 8 and len(test_store) == 4
    assert list(train_store.labels()) == ["0", "1"] * 4
    assert "left out: 1 .parquet" in train_store.summary


def test_missing_shards_and_shards_of_several_names_are_said(own, tmp_path):
    rows = datasets.load_dataset("parquet", data_files=f"{tables(tmp_path, [0, 1])}/*.parquet")
    (tmp_path / "own" / "train.parquet").unlink()
    for number in (0, 2):
        rows["train"].to_parquet(tmp_path / "own" / f"train-0000{number}-of-00004.parquet")
    assert "4 of train; 2 of 4 files are there;" in data.open_store(own(), "train").summary
    rows["train"].to_parquet(tmp_path / "own" / "more.parquet")
    assert "6 of train; files: 2 train in parts, 1 more;" in data.open_store(own(), "train").summary
    saved = datasets.concatenate_datasets([rows["train"]] * 3)
    saved.save_to_disk(tmp_path / "saved", num_shards=3)
    (tmp_path / "saved" / "data-00001-of-00003.arrow").unlink()
    store = data.open_store(own(dataset=str(tmp_path / "saved")), "train")
    assert "4 of train; 2 of 3 files are there;" in store.summary


@pytest.mark.parametrize("members, words", [
    ([f"{split}/{name}/{i}.png" for split, i in (("train", 1), ("test", 2)) for name in "ab"],
     "tar files of folders"),
    ([f"{i}.png" for i in range(6)] + ["__a.png", ".b.png", "c", "._d.png"], "3 of 9 files"),
    ([f"{i}.png" for i in range(6)] + [f"{i}.{kind}" for i in (6, 7) for kind in ("png", "cls")],
     "2 of 10 files"),
    ([f"{i}.png" for i in range(6)] + ["6.jpg", "7.PNG"], "[12] of 8 files"),
    (["./1.png", "./2.png"], ""), (["a/1.png", "a/1.cls", "b/2.png", "b/2.cls"], "")])
def test_a_tar_shard_of_which_something_would_be_lost_is_refused(own, tmp_path, members, words):
    (tmp_path / "own").mkdir()
    with tarfile.open(tmp_path / "own" / "0.tar", "w") as tar:
        for i, name in enumerate(members):
            content = b"1" if name.endswith("cls") else png(i)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    for _ in range(2):
        if not words:
            assert len(data.open_store(own(), "train")) == 2
            continue
        with pytest.raises(UserError, match=words):
            data.open_store(own(), "train")


@pytest.mark.parametrize("first, second", [(["cat", "dog"], [0, 1]), ([True, False], [0, 2])])
def test_labels_of_other_types_are_not_mixed(own, tmp_path, first, second):
    (tmp_path / "own").mkdir()
    for number, labels in enumerate((first, second)):
        drawn(labels).to_parquet(tmp_path / "own" / f"train-{number}.parquet")
    with pytest.raises(UserError, match="have other names or numbers of classes"):
        data.open_store(own(), "train")
    drawn([3, 4]).cast_column("label", datasets.Value("int8")).to_parquet(
        tmp_path / "own" / "train-0.parquet")
    drawn([5, 6]).to_parquet(tmp_path / "own" / "train-1.parquet")
    assert of(data.open_store(own(), "train")) == ["3", "4", "5", "6"]


def test_images_that_changed_places_and_kept_sizes_and_times_are_found(own, tmp_path):
    for i in range(20):
        path = tmp_path / "own" / "ab"[i % 2] / f"{i // 2}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        data.Image.open(io.BytesIO(png(i))).save(path)
        os.utime(path, (1e9, 1e9))
    data.open_store(own(), "train")
    for old, new in ("ac", "ba", "cb"):
        os.rename(tmp_path / "own" / old, tmp_path / "own" / new)
    with pytest.raises(UserError, match="holds other images than the data now"):
        data.open_store(own(), "train")


def test_a_card_may_name_a_folder(own, tmp_path):
    put(tmp_path / "own", "v1/cat/1.png", "v1/dog/2.png", "v2/cat/3.png", "v2/dog/4.png")
    card = "---\nconfigs:\n- config_name: default\n  data_dir: v2\n---\n"
    (tmp_path / "own" / "README.md").write_text(card)
    assert of(data.open_store(own(), "train")) == ["cat", "dog"]


def test_a_folder_of_archives_alone_is_refused_with_the_way_out(own, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "train.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="archives, which have to be unpacked"):
        data.open_store(own(), "train")


@pytest.mark.parametrize("end", ["between two images", "within an image", "empty"])
def test_a_tar_shard_that_is_cut_off_is_refused(own, tmp_path, end):
    (tmp_path / "own").mkdir()
    shard(tmp_path / "own" / "0.tar", 0)
    shard(tmp_path / "own" / "1.tar", 4)
    with tarfile.open(tmp_path / "own" / "1.tar") as tar:
        third = tar.getmembers()[4].offset
    size = {"between two images": third, "within an image": third + 600, "empty": 0}[end]
    os.truncate(tmp_path / "own" / "1.tar", size)
    with pytest.raises(UserError, match="1.tar is cut off"):
        data.open_store(own(), "train")


def test_what_takes_most_of_the_disk_is_taken_for_the_images(own, tmp_path):
    put(tmp_path / "own", *[f"{i}.png" for i in range(40)])
    shard(tmp_path / "own" / "few.tar", 0, 1)
    store = data.open_store(own(), "train")
    assert len(store) == 40 and "left out: 1 .tar" in store.summary


def test_stored_size_keeps_more_pixels_than_the_networks_see(own, tmp_path):
    put(tmp_path / "own", "1.png")
    assert data.open_store(own(), "train").size == 32
    assert data.open_store(own(stored_size=36), "train").size == 36
    assert data.open_store(own(stored_size=400), "train").size == 40, "as many as there are"


def test_what_an_earlier_save_has_left_is_not_read(tmp_path, own):
    folder = tmp_path / "own"
    drawn([0, 1] * 6).save_to_disk(folder, num_shards=3)
    drawn([5, 6] * 2, 50).save_to_disk(folder, num_shards=2)
    store = data.open_store(own(), "train")
    assert store.labels().tolist() == ["5", "6"] * 2 and "4 of train" in store.summary
    # A set in the place of several splits: datasets.load_from_disk takes it, too.
    splits = datasets.DatasetDict(train=drawn([0] * 3), test=drawn([1] * 3))
    splits.save_to_disk(tmp_path / "both")
    drawn([7, 8], 90).save_to_disk(tmp_path / "both")
    store = data.open_store(own(dataset=str(tmp_path / "both")), "train")
    assert store.labels().tolist() == ["7", "8"]


def test_what_save_to_disk_wrote_is_not_read_from_the_folder_around_it(tmp_path, own):
    splits = datasets.DatasetDict(train=drawn([0] * 3), test=drawn([1] * 3))
    splits.save_to_disk(tmp_path / "own" / "set")
    with pytest.raises(UserError, match="save_to_disk wrote set within it: give that folder"):
        data.open_store(own(), "train")


def test_a_split_of_an_earlier_save_is_not_read(tmp_path, own):
    for other, first in (("test", 0), ("validation", 10)):
        splits = datasets.DatasetDict({"train": drawn([0, 1] * 2), other: drawn([1, 0], first)})
        splits.save_to_disk(tmp_path / "own")
    with pytest.raises(UserError, match="no split 'nonsense', only train, validation"):
        data.open_store(own(), "nonsense")
    assert data.open_store(own(), "test").split == "validation"


@pytest.mark.parametrize("gone", ["", "data-00000-of-00001.arrow"])
def test_a_split_that_a_saved_set_lists_and_lacks_is_said(tmp_path, own, gone):
    datasets.DatasetDict(train=drawn([0, 1]), test=drawn([1])).save_to_disk(tmp_path / "own")
    if gone:
        (tmp_path / "own" / "test" / gone).unlink()
    else:
        shutil.rmtree(tmp_path / "own" / "test")
    with pytest.raises(UserError, match="lists test, which is not there|test lists files, of"):
        data.open_store(own(), "train")


def test_an_export_that_lies_beside_an_earlier_one_is_said(tmp_path, own):
    tables(tmp_path, [0, 1])
    drawn([0, 1]).to_parquet(tmp_path / "own" / "train-00000-of-00001.parquet")
    assert "files: 1 train in parts, 1 train;" in data.open_store(own(), "train").summary


def test_labels_of_selected_rows_are_found_where_most_others_have_none(own, monkeypatch):
    rows = drawn(["cat"] + [None] * 9 + ["dog"]).select([10, 0])
    monkeypatch.setitem(DATASETS, "mine", lambda: dict(train=rows))
    assert of(data.open_store(own(dataset="mine"), "train")) == ["dog", "cat"]


def test_a_column_called_split_is_said(tmp_path, own):
    rows = drawn([0, 1] * 3).add_column("split", ["train", "train", "test"] * 2)
    (tmp_path / "own").mkdir()
    rows.to_parquet(tmp_path / "own" / "data.parquet")
    assert "; column split: 4 train, 2 test;" in data.open_store(own(), "train").summary


def test_a_picture_beside_tar_shards_is_not_taken_for_the_data(tmp_path, own):
    put(tmp_path / "own", "logo.png")
    shard(tmp_path / "own" / "0.tar", 0, 40)
    store = data.open_store(own(), "train")
    assert len(store) == 40 and "left out: 1 .png" in store.summary


def test_a_smaller_copy_of_the_splits_is_not_taken_for_the_data(tmp_path, own):
    for split, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog", "owl"):
            put(tmp_path, *(f"own/{split}/{name}/{number}.png" for number in range(count)))
            put(tmp_path, f"own/old/{split}/{name}/0.png")
    store = data.open_store(own(), "train")
    assert len(store) == 12 and {*store.labels()} == {"cat", "dog", "owl"}


def test_a_parquet_file_that_is_replaced_with_the_same_time_is_read_anew(tmp_path, own):
    found = []
    for number, labels in enumerate(([0, 1] * 3, [5, 6, 7] * 3)):
        tables(tmp_path / str(number), labels)
        (tmp_path / "own").mkdir(exist_ok=True)
        shutil.copy(tmp_path / str(number) / "own" / "train.parquet", tmp_path / "own")
        os.utime(tmp_path / "own" / "train.parquet", (1e9, 1e9))
        cfg = own(cache_dir=str(tmp_path / f"cache{number}"))
        found.append(data.open_store(cfg, "train").labels().tolist())
    assert found == [["0", "1"] * 3, ["5", "6", "7"] * 3]


def test_more_files_than_their_names_state_are_said(tmp_path, own):
    for whole in (2, 3):
        for number in range(whole):
            drawn([0, 1], 10 * whole + number).to_parquet(
                tmp_path / f"own-{whole}-{number}.parquet")
            (tmp_path / "own").mkdir(exist_ok=True)
            shutil.move(tmp_path / f"own-{whole}-{number}.parquet",
                        tmp_path / "own" / f"train-0000{number}-of-0000{whole}.parquet")
    assert "5 of 3 files are there" in data.open_store(own(), "train").summary


def test_a_damaged_parquet_file_is_named(tmp_path, own):
    tables(tmp_path, [0, 1] * 3)
    (tmp_path / "own" / "train-1.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"train-1.parquet: .*0 bytes"):
        data.open_store(own(), "train")


def test_images_without_a_label_are_counted(tmp_path, own):
    tables(tmp_path, [0, 1, -1, -1] * 3, [0, 1, -1])
    assert "7 images have no label, or it is -1" in str(evaluation.Evaluator(own()))


def test_an_image_in_an_archive_is_said_to_be_in_one():
    with pytest.raises(UserError, match="in an archive, which has to be unpacked"):
        data.open_image(dict(path="zip://0.png::all.zip"), ["", "/"])
