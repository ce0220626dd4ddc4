"""Pixels: any image collection -> a uint8 store on disk -> batches and views.

Images are decoded once: `open_store` reads CIFAR, the Hub, a folder of images or what Hugging Face
`datasets` reads, and keeps `uint8 [I, 3, S, S]` in a file, of which training only reads rows. The
order of an epoch and the crops of a view are pure functions of (seed, epoch or view, image): batch
size, number of processes and interruptions do not change them.

Axes: I images, B batch, T tokens, D width, S pixels of a stored image. A box is (x, y, w, h) in
fractions of the image; a box of negative width is mirrored.
"""

import collections
import contextlib
import functools
import hashlib
import io
import json
import logging
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import torch
from filelock import FileLock
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from config import DATASETS, UserError, from_hub, reason, slug

log = logging.getLogger("distill")
progress = functools.partial(tqdm, leave=False, delay=2)  # a bar, after two seconds

STORE_FORMAT = 5  # raise it when decoding changes: older stores are then not found
CHUNK = 64  # images that are decoded or embedded at once
ORDER, VIEW = range(2)  # keep the random numbers of epochs and views apart
THREADS = min(16, os.cpu_count() or 1)  # that decode and read
LABEL_COLUMNS = "label", "fine_label", "cls"
BYTES = datasets.Value("binary"), datasets.Value("large_binary")
TABLES = ".parquet", ".arrow"  # a folder with one of these is for `datasets`
SPLIT_NAMES = dict(  # a folder's name -> the split it holds
    train="train", training="train", test="test", testing="test", validation="validation",
    valid="validation", val="validation", dev="validation")


class NoSplit(UserError):
    """The data set exists, but has no such split."""


def read_ahead(function, arguments):
    """Yield function(*each) for each of `arguments`, in order; threads work a few ahead."""
    with ThreadPoolExecutor(THREADS) as pool:
        pending = collections.deque()
        for each in arguments:
            pending.append(pool.submit(function, *each))
            if len(pending) > THREADS:
                yield pending.popleft().result()
        for future in pending:
            yield future.result()


def chunks(rows):
    return [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]


def make_once(path, make):
    """Unless `path` exists, make(part) a file or folder and rename it to `path`.

    Other processes wait. A part that an interrupted process has left is there when `make` begins.
    """
    if path.exists():  # perhaps on a disk that is read-only
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            part = path.with_name(path.name + ".part")
            try:
                make(part)
                part.rename(path)
            except OSError as error:
                raise UserError(f"cannot write {part}: {reason(error)}") from error


def check_space(folder, need, advice):
    """Raise UserError where a disk has less space than is needed."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(f"{folder} needs {need / 1e9:.1f} GB and has {free / 1e9:.1f} GB: choose "
                        f"another --cache_dir, or a smaller {advice}")


def list_files(folder):
    """Relative name -> size of the files of a data set: its images, or with tables all files.

    Links are followed, hidden files and folders are left out.
    """
    found = {}
    for where, folders, names in os.walk(folder, followlinks=True):
        above = Path(where).parent.resolve()
        if where != folder and above.is_relative_to(Path(where).resolve()):  # a link to above
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(where, name) for name in names if not name.startswith(".")):
            if path.is_file():
                found[str(path.relative_to(folder))] = path.stat().st_size
    images = {name: size for name, size in found.items() if is_image(name)}
    has_tables = any(name.endswith(TABLES) for name in found)
    return dict(sorted((images if images and not has_tables else found).items()))


def is_image(name):
    return Image.registered_extensions().get(Path(name).suffix.lower()) in Image.OPEN


def image_splits(names):
    """Relative names of image files -> split -> name -> class, or None.

        train/cat/1.jpg  test/cat/2.jpg      splits and classes, also Train, testing, val
        cat/1.jpg  dog/2.jpg  train/3.jpg    classes: one of them happens to be called train

    Top folders are splits if all of them, or two different ones, are named as in SPLIT_NAMES. The
    next folder is the class. Images outside of split folders are not used: their split is "".
    """
    root = Path(os.path.commonpath([os.path.dirname(name) for name in names]))
    paths = {name: Path(name).relative_to(root).parts for name in names}
    tops = {SPLIT_NAMES.get(path[0].lower(), "") for path in paths.values() if len(path) > 1}
    has_splits = len(tops - {""}) > 1 or (tops and "" not in tops)
    only = "train"
    for folder in reversed(root.parts):  # the only split may be a folder of all images
        only = SPLIT_NAMES.get(folder.lower(), only)
    splits = {}
    for name, path in paths.items():
        split = only
        if has_splits:
            split, path = SPLIT_NAMES.get(path[0].lower(), ""), path[1:]
        splits.setdefault(split, {})[name] = path[0] if len(path) > 1 else None
    return splits


def load_folder(folder, names):
    """Split -> `datasets.Dataset` of a folder of images; logs how the folder was understood."""
    kinds = datasets.Features(image=datasets.Image(), label=datasets.Value("string"))
    splits, tables = image_splits(names), {}
    classes = {label for files in splits.values() for label in files.values()} - {None}
    for split, files in splits.items():
        images, labels = list(files), list(files.values())
        use = split or "no split and not used"
        log.info(f"{folder}: {len(images)} images in {use}, such as {images[0]}; "
                 f"{len(classes)} classes, {labels.count(None)} images of none")
        if len(classes) == 1:  # then it is no class, but where all images lie
            labels = [None] * len(images)
        if split:
            tables[split] = datasets.Dataset.from_dict(dict(image=images, label=labels), kinds)
    return tables


def load_splits(cfg):
    """Split -> `datasets.Dataset`, of any data set. Raises UserError: not found, no network."""
    if cfg.dataset == "shapes":
        from demo.shapes import shapes

        return shapes()
    if cfg.dataset in DATASETS or not Path(cfg.dataset).is_dir():
        name = DATASETS.get(cfg.dataset, cfg.dataset)
        what = f"the dataset {name} {cfg.dataset_config}".rstrip()
        config = cfg.dataset_config or None
        return from_hub(what, "--dataset FOLDER", datasets.load_dataset, name, config)
    folder, files = os.path.realpath(cfg.dataset), list_files(cfg.dataset)
    if "dataset_dict.json" in files:
        return datasets.load_from_disk(folder)
    if "state.json" in files:
        return dict(train=datasets.load_from_disk(folder))
    if files and all(map(is_image, files)):
        return load_folder(folder, files)
    return datasets.load_dataset(folder)


def open_source(cfg, split):
    """One split -> (its name, `datasets.Dataset` of undecoded images, labels int64 [I]).

    split "" is test, else validation. Raises UserError: not found, no network, no such split, no or
    several image columns.
    """
    splits = load_splits(cfg)
    wanted = [split, SPLIT_NAMES.get(split)] if split else ["test", "validation", "valid", "val"]
    found = [name for name in wanted if name in splits]
    if not found:
        raise NoSplit(f"dataset {cfg.dataset} has no split {wanted[0]!r}, only "
                      f"{', '.join(splits)}: set --train_split or --test_split")
    split, columns = found[0], splits[found[0]].features
    images = [name for name, kind in columns.items() if isinstance(kind, datasets.Image)]
    if not images:  # files written elsewhere hold the bytes, but not the type
        images = [name for name, kind in columns.items() if kind in BYTES
                  or (isinstance(kind, dict) and "bytes" in kind)]
    if cfg.image_column:
        images = [cfg.image_column]
    if len(images) != 1:
        raise UserError(f"dataset {cfg.dataset} has {len(images)} image columns among "
                        f"{', '.join(columns)}: set --image_column")
    labels = [name for name in LABEL_COLUMNS if name in columns]
    labels += [name for name, kind in columns.items() if isinstance(kind, datasets.ClassLabel)]
    source = splits[split].select_columns(images).rename_columns({images[0]: "image"})
    source = source.cast_column("image", datasets.Image(decode=False))
    return split, source, read_labels(splits, split, cfg.label_column or (labels or [""])[0])


def read_labels(splits, split, column):
    """Classes int64 [I], numbered alike in all splits; -1 for NULL, NaN, -1, lists, no column."""
    rows = splits[split]
    kind = rows.features.get(column)
    if not isinstance(kind, (datasets.Value, datasets.ClassLabel)):
        return np.full(len(rows), -1)
    known = {value for part in splits.values() if column in part.features
             for value in part.unique(column)}
    classes = sorted(value for value in known - {None, -1} if value == value)
    numbers = {value: number for number, value in enumerate(classes)}
    return np.array([numbers.get(value, -1) for value in rows[column][:]])


def open_image(cell, folders):
    """A cell of a source, {"bytes", "path"} or None, as a PIL image that is not decoded yet.

    A path, relative to the first of `folders`, counts only inside of one: a stranger's data may
    name any file. Raises ValueError, OSError or a PIL error.
    """
    cell = cell or {}
    if cell.get("bytes") is not None:  # then the path is only a name
        image = Image.open(io.BytesIO(cell["bytes"]))
    elif not cell.get("path"):
        raise ValueError("no image")
    else:
        path = os.path.abspath(os.path.join(folders[0], cell["path"]))
        if not any(Path(path).is_relative_to(folder) for folder in folders):
            raise ValueError("a file outside the data set's folder")
        image = Image.open(path)
    if image.format == "EPS":
        raise ValueError("PostScript is a program, which Pillow would have Ghostscript run")
    return image


def decode(cell, size, folders=("",)):
    """A cell -> uint8 [3, size, size]: upright RGB, short side resized, centre-cropped.

    What is transparent is laid on white. The white of gray images is 65535 where they have integers
    of more than 8 bits, 1.0 where they have floats, or the brightest pixel if that is above.
    """
    image = open_image(cell, folders)
    image.draft("RGB", (size, size))  # JPEG: decode at 1/2, 1/4, 1/8 where that suffices
    image.load()
    with contextlib.suppress(Exception):  # a broken EXIF block is no reason to lose the pixels
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # 16 bits, 32 bits, floats: PIL would clip at 255 instead of scaling
        deep = np.nan_to_num(np.asarray(image, np.float32), posinf=0).clip(0)
        brightest = max(65535 if image.mode[0] == "I" else 1, deep.max())
        image = Image.fromarray((deep * (255 / brightest)).round().astype(np.uint8))
    if image.has_transparency_data:  # PIL would show the colour below
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def decode_chunk(cells, rows, size, folders):
    """Cells and their rows -> images, the rows of these, and (row, file, reason) of the others."""
    images, kept, bad = [], [], []
    for row, cell in zip(rows.tolist(), cells, strict=True):
        try:
            images.append(decode(cell, size, folders))
            kept.append(row)
        except Exception as error:  # PIL raises nearly anything on hostile bytes
            why = f"{type(error).__name__}: {error}".split(" <_io")[0]
            bad.append((row, (cell or {}).get("path"), why))
    return images, kept, bad


class RowFile:
    """An array [I, ...] of bytes in a file: `file[rows]` is a tensor of some rows, in any thread.

    Plain reads: a memory map faults page by page, which is ten times slower from a disk, and what
    it has touched counts as the process's memory (results/first_version/cpu.txt).
    """

    def __init__(self, path, dtype, shape):
        self.path, self.dtype, self.shape = path, dtype, shape
        self.file, self.nbytes = open(path, "rb", buffering=0), math.prod(shape)
        if (size := path.stat().st_size) != self.nbytes:
            raise UserError(f"{path} has {size} bytes, not {self.nbytes}: it is damaged; delete "
                            f"the folder {path.parent}")

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        file, n = self.file.fileno(), self.nbytes // self.shape[0]
        content = bytearray().join([os.pread(file, n, row * n) for row in rows.tolist()])
        return torch.frombuffer(content, dtype=self.dtype).view(-1, *self.shape[1:])

    def to(self, device):
        """All of it as a tensor on a device."""
        content = torch.from_file(str(self.path), size=self.nbytes, dtype=self.dtype)
        return content.view(self.shape).to(device)


class Store:
    """Decoded images in a folder: images `uint8 [I, 3, S, S]`, labels `int64 [I]`, -1 for none.

    rows: their positions in the source. split: its name. unreadable: (row, file, reason) of what
    could not be read. fingerprint: of all that determines the images.
    """

    def __init__(self, path):
        info = json.loads((path / "info.json").read_text())
        self.path, self.split, self.unreadable = path, info["split"], info["unreadable"]
        self.size, self.fingerprint = info["size"], path.name[-12:]
        self.rows, self.labels = np.load(path / "rows.npy")
        shape = len(self), 3, self.size, self.size
        self.images = RowFile(path / "images.u8", torch.uint8, shape)

    def __len__(self):
        return len(self.rows)

    def __str__(self):
        return f"{len(self)} images of {self.size} px, {len(self.unreadable)} unreadable"


def open_store(cfg, split, max_samples=0):
    """The store of one split, built first if it is not there yet.

    cfg: anything with the data fields of Config. split: a name, or "" for test, else validation.
    The store is found again by a fingerprint of all that determines its pixels: of a Hub data set
    its name, of a folder the names and sizes of its files. Raises UserError as `open_source`.
    """
    content = cfg.dataset
    if content == "shapes":
        from demo.shapes import drawing

        content = drawing()
    elif content not in DATASETS and Path(content).is_dir():
        content = list_files(content)
    what = [STORE_FORMAT, split, cfg.stored_size, max_samples, cfg.dataset_config,
            cfg.image_column, content]
    fingerprint = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
    names = slug(cfg.dataset), slug(split or "test"), slug(cfg.label_column), fingerprint
    path = Path(cfg.cache_dir) / "stores" / "-".join(filter(None, names))
    make_once(path, functools.partial(build_store, cfg, split, max_samples))
    try:
        return Store(path)
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged ({reason(error)}): delete it") from error


def build_store(cfg, split, max_samples, path):
    """Decode a split into a folder. The stored size is the median of 64 short sides, at most."""
    try:
        split, source, labels = open_source(cfg, split)
    except UserError:
        raise
    except Exception as error:  # `datasets` and what it stands on raise what they like
        raise UserError(f"cannot read the dataset {cfg.dataset}: {reason(error)}") from error
    folders = [os.path.abspath(cfg.dataset), os.path.realpath(cfg.dataset), HF_HUB_CACHE,
               str(datasets.config.HF_DATASETS_CACHE)]
    rows, sides = subset(np.arange(len(source)), max_samples), []
    for cell in source[subset(rows, 64)]["image"]:
        with contextlib.suppress(Exception):  # counted and reported below
            sides.append(min(open_image(cell, folders).size))
    size = min(cfg.stored_size, int(np.median(sides or cfg.stored_size)))
    shutil.rmtree(path, ignore_errors=True)  # left by a process that was killed
    check_space(path.parent, 3 * size**2 * len(rows), "--max_samples")
    path.mkdir()
    parts, kept, bad = chunks(rows), [], []
    jobs = ((source[part]["image"], part, size, folders) for part in parts)
    with open(path / "images.u8", "wb") as file:
        for decoded in progress(read_ahead(decode_chunk, jobs), "decoding", len(parts)):
            images, good, unreadable = decoded
            file.writelines(images)
            kept += good
            bad += unreadable
        os.fsync(file.fileno())
    if not kept:
        raise UserError(f"dataset {cfg.dataset} {split} has no image that can be read {bad[:1]}")
    np.save(path / "rows.npy", np.stack([kept, labels[kept]]))
    (path / "info.json").write_text(json.dumps(dict(split=split, size=size, unreadable=bad)))
    if bad:
        log.warning(f"{len(bad)} of {len(rows)} images cannot be read and are left out, such as "
                    f"{bad[0]}; {path}/info.json lists them")


def subset(rows, count):
    """`count` random ones of `rows` (0 = all), in order, the same every time."""
    order = np.random.default_rng(0).permutation(rows)
    return np.sort(order[: count or None])


def epoch_order(images, seed, epoch):
    """The images of an epoch, in order: a permutation from (seed, epoch)."""
    return np.random.default_rng([seed, ORDER, epoch]).permutation(images)


def batch_rows(order, batch_size, rank=0, world=1):
    """A process's share of each batch: int64 [batches, batch_size / world].

    The last batch is filled up from the front.
    """
    batches = -(-len(order) // batch_size)
    return np.resize(order, (batches, world, batch_size // world))[:, rank]


def view_boxes(seed: int, view: int, images: int, crop_scale: float) -> Tensor:
    """View `view` of every image: a random crop and flip, boxes float32 [I, 4].

    The area is uniform from crop_scale to 1, the aspect ratio from 3/4 to 4/3, sides are clipped
    to the image, and half of the boxes are mirrored (torchvision's RandomResizedCrop clips by
    drawing again). Row i does not depend on the number of images.
    """
    random = np.random.default_rng([seed, VIEW, view]).random((images, 5), np.float32)
    area, ratio, x, y, side = torch.from_numpy(random).unbind(1)
    area, ratio = crop_scale + (1 - crop_scale) * area, (4 / 3) ** (2 * ratio - 1)
    w, h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    x, y, mirrored = x * (1 - w), y * (1 - h), side < 0.5
    return torch.stack([torch.where(mirrored, x + w, x), y, torch.where(mirrored, -w, w), h], 1)


def render(images: Tensor, boxes: Tensor | None, size: int) -> Tensor:
    """Cut boxes out of stored images and resize them: float32 [B, 3, size, size] in [0, 1].

    images: uint8 [B, 3, S, S]. boxes: float [B, 4], None for whole images. Bicubic with
    anti-aliasing, as PIL's `resize(box=...)`; separable, so two matrix products per image do it.
    """
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]) if boxes is None else boxes
    x, y, w, h = to_device(boxes, images.device).unbind(1)
    across = resize_matrix(x, w, size, images.shape[-1])
    down = resize_matrix(y, h, size, images.shape[-1])
    with torch.autocast(images.device.type, enabled=False):
        pixels = images.float() / 255
        return (down[:, None] @ (pixels @ across[:, None].mT)).clamp_(0, 1)


def resize_matrix(start, length, size, stored):
    """Weights [B, size, stored] of the stored pixels in each output pixel (Keys 1981, a = -0.5)."""
    steps = (torch.arange(size, device=start.device) + 0.5) / size
    centre = (start[:, None] + length[:, None] * steps) * stored
    width = (length.abs() * stored / size).clamp(min=1)  # > 1 when shrinking: anti-aliasing
    source = torch.arange(stored, device=start.device) + 0.5
    d = (source - centre[..., None]).abs() / width[:, None, None]
    near, far = (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2
    weights = torch.where(d < 1, near, torch.where(d < 2, far, 0.0))
    return weights / weights.sum(-1, keepdim=True)


def to_device(tensor, device):
    """Move to a device; for CUDA by way of pinned memory, so that nothing waits for the copy."""
    if tensor is None or device.type == "cpu":
        return tensor
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def quantise(targets: Tensor) -> Tensor:
    """Targets float32 [B, T, D] -> codes int8 [B, T, D + 2].

    The last two bytes of a token are its scale in float16.
    """
    scale = (targets.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-6).half()
    codes = (targets / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([codes, scale.view(torch.int8)], -1)


def dequantise(codes: Tensor) -> Tensor:
    """Codes -> float32 [B, T, D], with a cosine above 0.9995 to targets as networks output them."""
    scale = codes[..., -2:].contiguous().view(torch.float16)
    return codes[..., :-2].float() * scale.float()
