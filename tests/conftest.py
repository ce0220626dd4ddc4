"""The tests in this folder use the fixtures of the specification, and some images."""

import io
import os
import timeit

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from test_smoke import cache, tiny  # noqa: F401

# Networks this small are slower on two threads, here and in the processes that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def quick_timing(monkeypatch):
    """An evaluation times one forward, not 0.2 seconds of them."""
    monkeypatch.setattr(timeit.Timer, "autorange", lambda timer: (1, timer.timeit(1)))


def png(seed: int, kind: str = "png") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def put(root, *names: str) -> None:
    """Different images in files of these names."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number))


def drawn(labels, first=0):
    """A `datasets.Dataset` with an image for each label."""
    cells = [png(first + number) for number in range(len(labels))]
    rows = datasets.Dataset.from_dict(dict(image=cells, label=labels))
    return rows.cast_column("image", datasets.Image())


def tables(root, labels, test_labels=None, first: int = 0) -> str:
    """The folder "own" of parquet files, with an image for each label; None: no such split."""
    folder = root / "own"
    folder.mkdir(parents=True)
    for split, given in (("train", labels), ("test", test_labels)):
        if given is not None:
            drawn(given, first + len(split) * 100).to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of images in all the shapes people have them."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 8)):
        for i in range(count):
            folder = root / split / ("cat" if i % 2 else "dog")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (60, 40 + i, 3), np.uint8)
            PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
    cats = root / "train" / "cat"
    PIL.Image.fromarray(np.full((50, 50), 40000, np.uint16)).save(cats / "deep.png")
    PIL.Image.new("CMYK", (50, 70)).save(cats / "print.jpg")
    PIL.Image.new("LA", (50, 50)).save(cats / "gray.png")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    half = np.zeros((60, 60, 3), np.uint8)
    half[:, :30] = 255  # white left half, which is the upper half once upright
    PIL.Image.fromarray(half).save(cats / "turned.jpg", exif=exif, quality=95)
    return root
