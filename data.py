"""Pixels: any image collection -> a uint8 store on disk -> batches and views.

Images are decoded once. `open_store` reads CIFAR, a Hub dataset or a local folder through Hugging
Face `datasets`, decodes in parallel and keeps `uint8 [N, 3, S, S]` in a file; training only reads
rows of it. Everything random here is a pure function of (seed, epoch or view number,
image index), so that batch size, ranks and interruptions change nothing.

Axes: B batch, S stored size in pixels. A box is (x, y, w, h) in shares of the image; a box of
negative width is mirrored.
"""

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
from functools import cached_property
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageOps
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from config import DATASETS, UserError, hub_error, hub_online, slug

log = logging.getLogger("distill")

DECODING = 2  # to be raised when `decode` changes: stores made before are then made again
MAX_PIXELS = 100_000_000  # of one encoded image
PLAIN_SECONDS = 30  # between two lines of progress where there is no terminal
WORKER_SECONDS = 20  # that a process which loads lives on after SIGTERM
ORDER, VIEW = range(2)  # streams of random numbers


def progress(items, text: str, total: int, each: int = 1):
    """Yield items, each of which counts as `each` of `total`, and show how far one is.

    A bar on a terminal, after two seconds; elsewhere a line of text every PLAIN_SECONDS.
    """
    said = time.monotonic()
    with tqdm(total=total, desc=text, leave=False, delay=2, disable=None) as bar:
        for number, item in enumerate(items, 1):
            yield item
            bar.update(min(each, total - bar.n))
            if bar.disable and time.monotonic() - said > PLAIN_SECONDS:
                print(f"{text}: {min(number * each, total)} of {total}", file=sys.stderr)
                said = time.monotonic()


# ---------------------------------------------------------------------------- sources


class NoSplit(UserError):
    """The data set exists, but has no such split."""


def open_source(name: str, split: str, image_column: str, label_column: str):
    """A dataset of undecoded images -> (rows, image column, label column, label numbers, split).

    name: cifar10, cifar100, owner/name on the Hub, or a folder of images, parquet files or by
    `save_to_disk`. Rows are indexable; images stay encoded, so that a corrupt one harms no other.
    In a folder a directory called x.jpg and a link to nothing are no images. The label column is ""
    where there is none; label numbers: of each label that is a string, the same in all splits.
    Raises UserError: not found, no network, no such split, no or several image columns.
    """
    import datasets

    hub_name, known_label = DATASETS.get(name, (name, ""))
    try:
        if name in DATASETS or not Path(name).is_dir():
            hub_online()
            found = datasets.load_dataset(hub_name)
        elif any((Path(name) / f).exists() for f in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(name)
        else:
            if set("[*?") & set(os.path.realpath(name)):
                raise ValueError("`datasets` takes [, * and ? for a pattern: rename the folder")
            endings = PIL.Image.registered_extensions()
            odd = [p for p in Path(name).rglob("*.*") if p.suffix not in endings
                   and p.suffix.lower() in endings and not p.suffix.isupper()]
            if odd:
                log.warning(f"{len(odd)} files of {name}, such as {odd[0].name}, are passed over: "
                            "`datasets` reads .png and .PNG, but not .Png")
            found = datasets.load_dataset(name)
    except Exception as error:  # the libraries below raise what they like
        if Path(name).is_dir():
            empty = isinstance(error, IndexError) or "corresponds to no data" in str(error)
            hint = " (it, or a split of it, is empty: remove its files)" * empty
            raise UserError(f"cannot read the dataset in {name}: {error}{hint}") from error
        what = f"the dataset {hub_name}" + " (no such folder here)" * (name not in DATASETS)
        raise hub_error(what, "--dataset DIR with a copy", error) from error
    found = {"train": found} if isinstance(found, datasets.Dataset) else found
    wanted = [split] if split else ["test", "validation", "valid", "val"]
    split = next((s for s in wanted if s in found), None)
    if split is None:
        raise NoSplit(f"dataset {name} has no split {wanted[0]!r}, only {', '.join(found)}: "
                      "set --train_split or --test_split")
    rows, columns = found[split], found[split].features
    for flag, column in (("image_column", image_column), ("label_column", label_column)):
        if column and column not in columns:
            raise UserError(f"dataset {name} has no column {column!r}, only {', '.join(columns)}: "
                            f"set --{flag}")
    images = [image_column] if image_column else _image_columns(columns)
    if len(images) != 1:
        what = f"{len(images)} image columns ({', '.join(images)})" if images else "no image column"
        raise UserError(f"dataset {name} has {what} among {', '.join(columns)}: set --image_column")
    classes = [c for c, f in columns.items() if isinstance(f, datasets.ClassLabel)]
    label = label_column or known_label or (classes[0] if len(classes) == 1 else "")
    label = label or next((c for c in ("label", "labels") if c in columns), "")
    kind = getattr(columns.get(label), "dtype", "")  # "" for a list: several labels are no class
    label = label if kind else ""
    numbers = {}
    if kind in ("string", "large_string"):
        names = {name for part in found.values() for name in part.unique(label)} - {None}
        numbers = {name: number for number, name in enumerate(sorted(names))}
    rows = rows.cast_column(images[0], datasets.Image(decode=False))
    return rows, images[0], label, numbers, split


def _image_columns(columns) -> list[str]:
    import datasets

    typed = [c for c, f in columns.items() if isinstance(f, datasets.Image)]
    # Parquet files written elsewhere hold the bytes, but not the type.
    return typed or [c for c, f in columns.items() if "bytes" in (f if isinstance(f, dict) else ())
                     or getattr(f, "dtype", "") in ("binary", "large_binary")]


# ---------------------------------------------------------------------------- drawn shapes

RADIUS, TURN = (0.2, 0.34), 0.3  # of the shape: share of the image's side, radians either way
BACKGROUND, CONTRAST = (0, 120), (70, 130)  # colour, and how much lighter the shape is, per channel
TEXTURE, NOISE = 30, 6.0  # largest deviation of the background; standard deviation on every pixel
SUPERSAMPLE, DISTRACTORS = 2, 3  # draw larger and average: smooth edges; at most so many strokes

CIRCLE = np.exp(2j * np.pi * np.arange(33) / 32)  # a point of the plane is one complex number
HALF = CIRCLE[:17]
OUTLINES = {  # corners in order, about one unit from the centre
    "disc": 0.85 * CIRCLE,
    "ring": np.concatenate([CIRCLE, 0.55 * CIRCLE]),  # PIL leaves what is enclosed twice empty
    "triangle": np.exp(2j * np.pi * np.arange(3) / 3),
    "square": np.exp(2j * np.pi * np.arange(4) / 4),
    "star": np.tile([1, 0.4], 5) * np.exp(2j * np.pi * np.arange(10) / 10),
    "cross": np.outer([1, 1j, -1, -1j], [3-1j, 3+1j, 1+1j]).ravel() / 3,  # one arm, turned
    "crescent": np.concatenate([HALF, HALF[::-1].real + 0.4j * HALF[::-1].imag]) - 0.5j,
    "arrow": np.array([-3+0.7j, 0.5+0.7j, 0.5+2j, 3, 0.5-2j, 0.5-0.7j, -3-0.7j]) / 3,
    "heart": np.concatenate([0.5 + 0.3j + HALF / 2, -0.5 + 0.3j + HALF / 2, [-0.9j]]),
    "hourglass": np.array([-1.8+2.4j, 1.8+2.4j, -1.8-2.4j, 1.8-2.4j]) / 3,
}


def draw_shape(seed: int, index: int, size: int = 32) -> tuple[np.ndarray, int]:
    """Draw image `index` of the data set `seed`: uint8 [size, size, 3], and its class, index % 10.

    Place, size, rotation, colours, background and strokes are random, so none tells the class.
    """
    rng = np.random.default_rng([seed, index])
    label, side = index % len(OUTLINES), size * SUPERSAMPLE
    back = rng.uniform(*BACKGROUND, 3)
    fore = back + rng.uniform(*CONTRAST, 3)
    cells = back + rng.uniform(-TEXTURE, TEXTURE, (*rng.integers(1, 7, 2), 3))
    texture = PIL.Image.fromarray(np.clip(cells, 0, 255).astype(np.uint8))
    canvas = texture.resize((side, side), PIL.Image.BICUBIC)  # few cells: plain, or a gradient
    draw = PIL.ImageDraw.Draw(canvas)
    for _ in range(rng.integers(DISTRACTORS + 1)):
        start, colour = rng.uniform(0, side, 2), tuple(rng.integers(0, 256, 3).tolist())
        stop = start + rng.uniform(-0.2, 0.2, 2) * side
        draw.line([*start, *stop], fill=colour, width=int(rng.integers(1, 8)))
    radius = rng.uniform(*RADIUS) * side
    centre = complex(*rng.uniform(radius, side - radius, 2))
    turned = radius * np.exp(1j * rng.uniform(-TURN, TURN)) * list(OUTLINES.values())[label]
    draw.polygon([(p.real, p.imag) for p in centre + turned], fill=tuple(fore.astype(int).tolist()))
    pixels = np.asarray(canvas.reduce(SUPERSAMPLE), np.float32)
    noise = NOISE * rng.standard_normal(pixels.shape, np.float32)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8), label


class Shapes:
    """The drawn data set as a source of rows; each split is drawn from a seed of its own."""

    SIZES = dict(train=8000, test=2000)

    def __init__(self, split: str):
        if split not in self.SIZES:
            raise NoSplit(f"dataset shapes has no split {split!r}, only train, test")
        self.seed, self.count = list(self.SIZES).index(split), self.SIZES[split]

    def __len__(self):
        return self.count

    def __getitem__(self, rows: slice | list[int]) -> dict[str, list]:
        rows = range(*rows.indices(self.count)) if isinstance(rows, slice) else rows
        pixels, labels = zip(*(draw_shape(self.seed, row) for row in rows), strict=True)
        return dict(image=[PIL.Image.fromarray(each) for each in pixels], label=list(labels))


# ---------------------------------------------------------------------------- decoding


def file_folders(dataset: str) -> set[Path]:
    """Where a data set's image files may lie: in its own folder, or where downloads are kept."""
    import datasets
    import huggingface_hub as hub

    caches = hub.constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE
    return {folder for f in map(Path, (dataset, *caches)) for folder in (f.absolute(), f.resolve())}


def decode(cell, size: int, folders=()) -> np.ndarray:
    """An encoded image -> uint8 [3, size, size]: upright RGB, short side resized, centre-cropped.

    cell: a PIL image, or {"bytes", "path"} as `datasets` gives it; a path counts only inside one of
    `folders`, for a stranger's data may name any file of ours. size 0 keeps the image as it is.
    What is transparent is laid on white; of an animation the first frame counts. White is 65535 in
    gray images of more than 8 bits, 1.0 in those of floats, and the brightest pixel if it is above.
    Raises ValueError, OSError or a PIL error when the image cannot be read.
    """
    if isinstance(cell, PIL.Image.Image):
        image = cell
    else:
        cell = cell or {}  # NULL
        # Beside bytes, even none at all, a path is only a name, and not of a file here.
        file = cell.get("path") if cell.get("bytes") is None else io.BytesIO(cell["bytes"])
        if not file:
            raise ValueError("no image")
        absolute = isinstance(file, str) and Path(os.path.abspath(file))
        if absolute and not any(map(absolute.is_relative_to, folders)):
            raise ValueError("a file outside the data set's folder")
        image = PIL.Image.open(file)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, a decompression bomb?")
    if image.format == "EPS":
        raise ValueError("PostScript is a program, which Pillow would have Ghostscript run")
    if size:
        image.draft("RGB", (size, size))  # JPEG: decode at 1/2, 1/4, 1/8 where that suffices
    image.load()
    with contextlib.suppress(Exception):  # a broken EXIF block is no reason to lose the pixels
        PIL.ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # 16 bits, 32 bits, floats: PIL would clip at 255 instead of scaling
        deep = np.nan_to_num(np.asarray(image, np.float32), posinf=0).clip(0)
        white = max(65535 if image.mode[0] == "I" else 1, deep.max())
        image = PIL.Image.fromarray((deep * (255 / white)).round().astype(np.uint8))
    if image.has_transparency_data:  # PIL would show the colour that nobody was meant to see
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if size and image.size != (size, size):
        image = PIL.ImageOps.fit(image, (size, size), PIL.Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


# ---------------------------------------------------------------------------- store


class RowFile:
    """An array [N, ...] in a file, read and written by rows: `file[rows]` is a copy [B, ...].

    Plain reads, where a memory map would fault in each page: that reads far ahead (from disk 104 ms
    a batch of 64 images of 96 px, against 9: results/speed/cpu.txt) and what it has touched counts
    as the process's memory. Safe to share between threads and forked processes.
    """

    def __init__(self, path: Path, dtype, shape: tuple, write: bool = False):
        self.dtype, self.shape = np.dtype(dtype), shape
        self.row_bytes = self.dtype.itemsize * math.prod(shape[1:])
        self.nbytes = shape[0] * self.row_bytes
        self.file = open(path, "r+b" if write else "rb", buffering=0)

    def __getitem__(self, rows) -> np.ndarray:
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for view, row in zip(out.reshape(len(rows), -1), np.asarray(rows).tolist(), strict=True):
            if os.preadv(self.file.fileno(), [view], row * self.row_bytes) != self.row_bytes:
                raise OSError(f"{self.file.name} is cut short: delete its folder")
        return out

    def __setitem__(self, rows, values: np.ndarray) -> None:
        for row, value in zip(rows.tolist(), np.ascontiguousarray(values), strict=True):
            if os.pwritev(self.file.fileno(), [value], row * self.row_bytes) != self.row_bytes:
                raise OSError(f"{self.file.name}: a row was written in part")  # a full disk

    def on(self, device, what: str) -> Tensor:
        """All of it as a tensor on a device, copied in parts."""
        kind = torch.from_numpy(np.empty(0, self.dtype)).dtype
        out = torch.empty(self.shape, dtype=kind, device=device)
        parts = torch.arange(len(out)).split(4096)
        for rows in progress(parts, f"{what} to the device", len(out), 4096):
            out[rows[0] : rows[-1] + 1] = torch.from_numpy(self[rows])
        return out


class Store:
    """Decoded images in a folder: images `uint8 [N, 3, S, S]` (RowFile), labels `int64 [N]`.

    Labels are -1 where there are none. `rows` are the images' positions in the source; `info` says
    what the store was made from and lists (row, file, reason) of what could not be read.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.info = json.loads((self.path / "info.json").read_text())
        self.size = self.info["size"]

    def __len__(self) -> int:
        return self.info["images"]

    def __reduce__(self):  # a loader process that is not forked opens the files itself
        return Store, (self.path,)

    @cached_property
    def images(self) -> RowFile:
        shape = (len(self), 3, self.size, self.size)
        return RowFile(self.path / "images.u8", np.uint8, shape)

    @cached_property
    def labels(self) -> np.ndarray:
        return np.load(self.path / "labels.npy")

    @cached_property
    def rows(self) -> np.ndarray:
        return np.load(self.path / "rows.npy")


class _Decoder(Dataset):
    """Batches of row numbers -> decoded images, labels, kept rows and what could not be read."""

    def __init__(self, source, image: str, label: str, numbers: dict, size: int, folders):
        self.source, self.image, self.label, self.numbers = source, image, label, numbers
        self.size, self.folders = size, folders

    def __getitems__(self, rows: list[int]):
        images, labels, kept, bad = [], [], [], []
        # `datasets` reads a slice twenty times faster than a list of rows.
        in_one = rows[-1] - rows[0] == len(rows) - 1
        columns = self.source[rows[0] : rows[-1] + 1] if in_one else self.source[rows]
        given = columns.get(self.label, [None] * len(rows))
        for row, cell, label in zip(rows, columns[self.image], given, strict=True):
            try:
                images.append(torch.from_numpy(decode(cell, self.size, self.folders)))
                kept.append(row)
            except Exception as error:  # PIL raises nearly anything on hostile bytes
                file = (cell or {}).get("path") or ""
                why = f"{type(error).__name__}: {error}".split(" <_io.")[0]  # bytes have no name
                bad.append((row, file, why[:200]))
                continue
            try:
                labels.append(int(self.numbers.get(label, label)))
            except (TypeError, ValueError, OverflowError):  # none, NULL, NaN
                labels.append(-1)
        return torch.stack(images) if images else None, labels, kept, bad


def _same(batch):
    return batch


def _outlive_signals(worker: int) -> None:
    """Ctrl-C, `timeout` and SLURM reach every process; only the first decides what to do about it.

    It has a while for that, and ends this one; SIGTERM may also be its way of doing so.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_SECONDS))


def open_store(cfg, split: str, size_limit: int, max_samples: int = 0) -> Store:
    """The store of one split, built first if it is not there yet.

    cfg: anything with the data fields of Config. split: a name, or "" for test, else validation.
    size_limit: stored size at most, unless cfg.store_size says otherwise. Found again by a
    fingerprint of all that determines it; a Hub dataset counts by its name, a folder by its files.
    Raises UserError as `open_source` does, and when too many images are unreadable.
    """
    wanted = [DECODING, cfg.dataset, split, cfg.image_column, cfg.label_column, max_samples,
              cfg.store_size or -size_limit]
    folder = Path(cfg.dataset)
    if cfg.dataset == "shapes":  # drawn anew when the drawing changes
        wanted.append(hashlib.sha256(Path(__file__).read_bytes()).hexdigest())
    elif cfg.dataset not in DATASETS and folder.is_dir():
        files = [(str(p.relative_to(folder)), p.stat()) for p in folder.rglob("*") if p.is_file()]
        wanted += sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)
    digest = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:12]
    path = Path(cfg.cache_dir) / "stores" / f"{slug(cfg.dataset)}-{split or 'test'}-{digest}"
    with locked(path):  # other ranks and other runs wait here for the one that builds
        if not path.exists():
            _build_store(cfg, split, size_limit, max_samples, path)
    store = Store(path)
    bad, total = store.info["unreadable"], len(store) + len(store.info["unreadable"])
    if not len(store) or len(bad) > cfg.max_bad * total:
        some = "".join(f"\n  row {row}{' ' * bool(file)}{file}: {why}"
                       for row, file, why in bad[:5])
        raise UserError(f"{len(bad)} of {total} images of {cfg.dataset} {store.info['split']} "
                        f"cannot be read, and --max_bad {cfg.max_bad:g} is the largest share to "
                        f"skip:{some}")
    return store


def _build_store(cfg, split: str, size_limit: int, max_samples: int, path: Path) -> None:
    if cfg.dataset == "shapes":
        split = split or "test"
        source, image, label, numbers, folders = Shapes(split), "image", "label", {}, ()
    else:
        columns = cfg.image_column, cfg.label_column
        source, image, label, numbers, split = open_source(cfg.dataset, split, *columns)
        folders = file_folders(cfg.dataset)
    rows = subset(np.arange(len(source)), max_samples)
    size = cfg.store_size or _native_size(source, image, rows, size_limit, folders)
    need, free = 3 * size**2 * len(rows), shutil.disk_usage(path.parent).free
    if need > free:
        raise UserError(f"the store needs {need / 1e9:.1f} GB in {path.parent}, where "
                        f"{free / 1e9:.1f} GB are free: --store_size and --max_samples make it "
                        "smaller, or choose another --cache_dir")
    decoder = _Decoder(source, image, label, numbers, size, folders)
    batches = DataLoader(decoder, 256, sampler=rows.tolist(), num_workers=cfg.workers,
                         collate_fn=_same, worker_init_fn=_outlive_signals)
    name, labels, kept, bad = f"{cfg.dataset} {split}", [], [], []
    batches = progress(batches, f"decoding {name}", len(rows), 256)
    with new_folder(path) as folder, open(folder / "images.u8", "wb") as file:
        for images, batch_labels, batch_kept, batch_bad in batches:
            if images is not None:
                file.write(images.numpy().data)
            labels += batch_labels
            kept += batch_kept
            bad += batch_bad
        if not len(rows):
            raise NoSplit(f"dataset {name} is empty: set --train_split or --test_split")
        np.save(folder / "labels.npy", np.array(labels, np.int64))
        np.save(folder / "rows.npy", np.array(kept, np.int64))
        info = dict(dataset=cfg.dataset, split=split, label_column=label, images=len(kept),
                    size=size, unreadable=bad)
        (folder / "info.json").write_text(json.dumps(info))
    if bad:
        log.warning(f"skipped {len(bad)} unreadable images of {name}, listed in {path}/info.json")


@contextlib.contextmanager
def locked(path: Path):
    """Let one process at a time make `path`; the others say that they wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        log.warning(f"waiting for another process that makes {path}")
        held = lock.acquire()
    with held:
        yield


@contextlib.contextmanager
def new_folder(path: Path):
    """A temporary folder that is given its name when all is in it, and removed when that fails."""
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot make {path}: {error.strerror or error}") from error
        raise


def subset(rows: np.ndarray, count: int) -> np.ndarray:
    """`count` random ones of `rows` (0 = all), in order, the same every time."""
    if not 0 < count < len(rows):
        return rows
    return np.sort(np.random.default_rng(0).permutation(rows)[:count])


def _native_size(source, image: str, rows, limit: int, folders) -> int:
    sides = []
    for cell in source[rows[:64].tolist()][image]:
        try:
            sides.append(min(decode(cell, 0, folders).shape[1:]))
        except Exception:  # counted and reported by the build
            continue
    return min(int(np.median(sides)), limit) if sides else limit


# ---------------------------------------------------------------------------- batches


class _Rows(Dataset):
    """A whole batch at once: indices -> (images, index, what the bank holds of them).

    Images are None when they need not be fetched, and so is the bank's part when there is no bank.
    """

    def __init__(self, store: Store | None, bank, view: int):
        self.store, self.bank, self.view = store, bank, view

    def __getitems__(self, indices):
        images = torch.from_numpy(self.store.images[indices]) if self.store else None
        stored = self.bank.read(self.view, indices) if self.bank else None
        return images, torch.as_tensor(indices), stored


def epoch_order(images: int, samples: int, seed: int, epoch: int) -> np.ndarray:
    """The images of an epoch, in order: a permutation from (seed, epoch), its first `samples`."""
    order = np.random.default_rng([seed, ORDER, epoch]).permutation(images)
    return order[: samples or images]


def loader(store: Store | None, order: np.ndarray, batch_size: int, first: int = 0, rank: int = 0,
           world: int = 1, bank=None, view: int = 0, workers: int = 0) -> DataLoader:
    """Batches `first`, `first + 1`, ... of `order`, this rank's share of each.

    The last is filled up from the front. An image has nearly the same rank in every epoch: what
    its machine's bank holds need not be asked again on another. Yields images uint8
    [B / world, 3, S, S], their index int64 [B / world], and what `bank` holds of this view of them;
    None for a missing store or bank.
    """
    full = np.resize(order, -(-len(order) // batch_size) * batch_size).reshape(-1, batch_size)
    if world > 1:  # in order of a hash (Knuth's multiplicative), so that no rank gets a class alone
        place = full.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        full = np.take_along_axis(full, place.argsort(1), 1)
    full = full.reshape(-1, world, batch_size // world)
    return DataLoader(_Rows(store, bank, view), batch_sampler=list(full[first:, rank]),
                      num_workers=workers, collate_fn=_same, pin_memory=workers > 0,
                      worker_init_fn=_outlive_signals)


def to_device(tensor: Tensor, device) -> Tensor:
    """A copy on the device; for CUDA by way of pinned memory, so that nothing waits for it."""
    cuda = torch.device(device).type == "cuda"
    return (tensor.pin_memory() if cuda else tensor).to(device, non_blocking=cuda)


# ---------------------------------------------------------------------------- teacher bank


class Bank:
    """What the teacher said of each view of each image: asked once, read ever after.

    A folder for each view holds `tokens int8 [N, T, K]`, T the CLS and the patches, their `scale
    float16 [N, T]`, and `done uint8 [N]`, set after its row, so that a torn row is asked again
    (after a killed process; after a power cut delete the bank). It keeps *targets*: features
    behind the heads' fixed maps, on the student's grid and with a pca or frozen head at its width.
    That is the smallest form (a ViT-B/14 at 224 px says 257 x 768 numbers, a ViT-S/16 at 96 px
    needs 37 x 384 of them), and costs that a run with another head, width, grid, seed, precision,
    teacher_size or crop_scale needs a bank of its own. All processes of one machine share it, and
    so do runs with more or fewer views.
    """

    def __init__(self, path: Path, views: int, images: int, tokens: int, width: int):
        """Open the bank in `path`, reserving disk space for the views that it lacks.

        Raises UserError if the disk has less.
        """
        self.path, self.arguments, self.pending = path, (path, views, images, tokens, width), None
        self.kinds = dict(tokens=("i1", (images, tokens, width)), scale=("f2", (images, tokens)),
                          done=("u1", (images,)))
        folders = [path / f"view_{number}" for number in range(views)]
        with locked(path):
            self._reserve(folders)
        self.tokens, self.scale = (
            [RowFile(folder / name, *self.kinds[name], write=True) for folder in folders]
            for name in ("tokens", "scale"))
        self.done = [np.memmap(folder / "done", np.uint8, "r+") for folder in folders]

    def __reduce__(self):  # a loader process that is not forked opens the files itself
        return Bank, self.arguments

    def _reserve(self, folders: list[Path]) -> None:
        sizes = {n: np.dtype(kind).itemsize * math.prod(s) for n, (kind, s) in self.kinds.items()}
        new, each = [f for f in folders if not f.exists()], sum(sizes.values())
        free = shutil.disk_usage(self.path.parent).free
        if new:
            log.info(f"teacher bank: {len(new)} of {len(folders)} views are new, "
                     f"{len(new) * each / 1e9:.2f} GB in {self.path}")
        if len(new) * each > free:
            fit = len(folders) - len(new) + free // each
            raise UserError(f"the teacher bank needs {len(new) * each / 1e9:.1f} GB in "
                            f"{self.path.parent}; {free / 1e9:.1f} GB are free: --teacher_views "
                            f"{fit} {'fits' if fit else 'needs none'}, or choose another "
                            "--cache_dir")
        for folder in new:
            with new_folder(folder) as temporary:
                for name, size in sizes.items():
                    with open(temporary / name, "wb") as file:
                        os.truncate(file.fileno(), size)
                        if hasattr(os, "posix_fallocate"):  # else a full disk breaks a later write
                            os.posix_fallocate(file.fileno(), 0, size)

    def read(self, view: int, rows) -> tuple[Tensor, Tensor, Tensor]:
        """What is stored of a view: tokens int8 [B, T, K], scale float16 [B, T], done uint8 [B].

        Where done is 0 the others mean nothing.
        """
        parts = self.done, self.scale, self.tokens  # done before what it vouches for
        return tuple(torch.from_numpy(part[view][rows]) for part in parts)[::-1]

    def write(self, view: int, index: Tensor, tokens: Tensor, scale: Tensor) -> None:
        """Store rows. On CUDA without waiting: they are put down when the next ones come."""
        self.flush()
        cuda = tokens.is_cuda
        tokens, scale = (part.to("cpu", non_blocking=cuda) for part in (tokens, scale))
        copied = torch.cuda.Event() if cuda else None
        self.pending = view, index.numpy(), tokens, scale, copied
        copied.record() if cuda else self.flush()

    def flush(self) -> None:
        if self.pending:
            view, rows, tokens, scale, copied = self.pending
            if copied:
                copied.synchronize()
            self.tokens[view][rows], self.scale[view][rows] = tokens.numpy(), scale.numpy()
            self.done[view][rows] = 1  # last: until here the rows do not count
            self.pending = None

    def complete(self) -> bool:
        self.flush()
        return all(done.all() for done in self.done)

    def on(self, device) -> list[tuple[Tensor, Tensor]]:
        """For each view tokens int8 [N, T, K] and scale float16 [N, T], on a device."""
        return [(tokens.on(device, "answers"), scale.on(device, "their scale"))
                for tokens, scale in zip(self.tokens, self.scale, strict=True)]


def quantise(targets: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [B, T, K] -> int8 [B, T, K] and a scale for each token, float16 [B, T]."""
    scale = (targets.abs().amax(-1) / 127).clamp_min(1e-6).half()
    tokens = (targets / scale.float()[..., None]).round().clamp(-127, 127)
    return tokens.to(torch.int8), scale


def dequantise(tokens: Tensor, scale: Tensor) -> Tensor:
    """float32 [B, T, K]: a cosine of at least 0.9995 to what `quantise` was given."""
    return tokens.float() * scale.float()[..., None]


# ---------------------------------------------------------------------------- views


def uniform(seed: int, stream: int, number: int, index: Tensor, count: int) -> Tensor:
    """Counter-based random numbers: float64 [B, count] in [0, 1), a function of the arguments.

    SplitMix64 (Steele, Lea, Flood 2014), applied to each part of the key in turn.
    """
    key = np.zeros((len(index), count), np.uint64)
    parts = (seed, stream, number, index.cpu().numpy()[:, None], np.arange(count))
    for part in parts:
        key = (key ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        key = key ^ (key >> np.uint64(31))
    return torch.from_numpy((key >> np.uint64(11)) * 2.0**-53)


def view(seed: int, number: int, index: Tensor, scale: tuple) -> Tensor:
    """View `number` of each image: a random crop and flip, boxes float32 [B, 4].

    index: int64 [B]. scale: smallest and largest area. Aspect ratio 3/4 to 4/3, mirrored half of
    the time (torchvision's RandomResizedCrop, without its rejection loop).
    """
    u = uniform(seed, VIEW, number, index, 5).unbind(1)
    area = scale[0] + (scale[1] - scale[0]) * u[0]
    ratio = (4 / 3) ** (2 * u[1] - 1)
    w, h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    x, y = u[2] * (1 - w), u[3] * (1 - h)
    mirrored = u[4] < 0.5
    x, w = torch.where(mirrored, x + w, x), torch.where(mirrored, -w, w)
    return torch.stack([x, y, w, h], 1).float()


def render(images: Tensor, boxes: Tensor | None, size: int) -> Tensor:
    """Cut boxes out of stored images and resize them: float32 [B, 3, size, size] in [0, 1].

    images: uint8 [B, 3, S, S]. boxes: float [B, 4], None for the whole image. Bicubic with
    anti-aliasing, as PIL's `resize(box=...)`; separable, so two matrix products per image do it.
    """
    if boxes is None and images.device.type == "cpu":  # four times faster, rounded as PIL does
        whole = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
        return whole.float().div_(255)
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]) if boxes is None else boxes
    x, y, w, h = to_device(boxes, images.device).unbind(1)
    across, down = (_resize_matrix(*side, size, images.shape[-1]) for side in ((x, w), (y, h)))
    with torch.autocast(images.device.type, enabled=False):
        pixels = images.float() / 255
        return (down[:, None] @ (pixels @ across[:, None].mT)).clamp_(0, 1)


def _resize_matrix(start: Tensor, length: Tensor, size: int, stored: int) -> Tensor:
    """Weights [B, size, stored] of the stored pixels in each output pixel (Keys 1981, a = -0.5)."""
    steps = (torch.arange(size, device=start.device) + 0.5) / size
    centre = (start[:, None] + length[:, None] * steps) * stored
    spread = (length.abs() * stored / size).clamp(min=1)  # > 1 when shrinking: anti-aliasing
    source = torch.arange(stored, device=start.device) + 0.5
    d = ((source - centre[..., None]) / spread[:, None, None]).abs()
    near = (1.5 * d - 2.5) * d * d + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    weights = torch.where(d < 1, near, torch.where(d < 2, far, 0.0))
    return weights / weights.sum(-1, keepdim=True)
