"""Pixels: any image collection -> a uint8 store on disk -> batches and views.

Orders and crops follow from (seed, epoch or view, image) alone, whatever the batches or processes.
Axes: I images, B batch, T tokens, D width, S pixels of a stored image. A box is (x, y, w, h) in
fractions of the image; a box of negative width is mirrored."""

import glob
import hashlib
import json
import math
import os
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from io import BytesIO
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pandas
import torch
from filelock import FileLock
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image, ImageOps
from tqdm import tqdm

from config import DATASETS, UserError, from_hub, log, reason, slug, write_atomically

progress = partial(tqdm, leave=False, delay=2)  # a bar, after two seconds
STORE_FORMAT = 6  # raise it when decoding changes: older stores are then not found
CHUNK = 64  # images that are decoded or embedded at once
ORDER, VIEW = range(2)  # keep the random numbers of epochs and views apart
THREADS = 8  # that decode and read
LABEL_COLUMNS = "label", "fine_label", "cls"
FORMATS = "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"  # of Pillow's; EPS runs programs
SPLITS = dict(train=["train", "training"],  # what a split may be called, the first that is there
              test=["test", "testing", "validation", "valid", "val", "dev"])

class NoSplit(UserError):
    """The data set exists, but has no such split."""

def read_ahead(function, arguments):
    """Yield function(*each) for each of `arguments`, in order; threads work a few ahead."""
    with ThreadPoolExecutor(THREADS) as pool:
        pending = deque()
        for each in arguments:
            pending.append(pool.submit(function, *each))
            if len(pending) > THREADS:
                yield pending.popleft().result()
        for future in pending:
            yield future.result()

def chunks(rows):
    return np.split(rows, range(CHUNK, len(rows), CHUNK))

def make_once(path, make):
    """Unless `path` exists, make(temporary path) a file or folder; other processes wait for it."""
    if path.exists():  # without a lock, as the disk may be read-only
        return
    with FileLock(f"{path}.lock"):  # also makes the folders around it
        if not path.exists():
            write_atomically(path, make)

def check_space(folder, need, advice):
    """Raise UserError where a disk has less space than is needed."""
    if need > shutil.disk_usage(folder).free:
        raise UserError(f"{need / 1e9:.1f} GB do not fit into {folder}: see --cache_dir, {advice}")

def list_files(folder):
    """Relative name -> size of a data set's files: its images, or all files if it has tables or no
    images. Links are followed, hidden files are left out."""
    folder, names = Path(folder), sorted(glob.glob("**", root_dir=folder, recursive=True))
    files = {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}
    images = {name: size for name, size in files.items() if is_image(name)}
    has_tables = any(name.endswith((".parquet", ".arrow")) for name in files)
    return images if images and not has_tables else files

def is_image(name):
    return Image.registered_extensions().get(Path(name).suffix.lower()) in FORMATS

def image_splits(names):
    """Relative names of image files, as train/cat/1.jpg -> split -> name -> class, or None.
    Top folders are splits if all of them, or two of them, are named as in SPLITS. The next folder
    is the class. The split of images beside split folders is ""."""
    root = os.path.commonpath([os.path.dirname(name) for name in names])
    folders = {name: Path(name).relative_to(root).parts[:-1] for name in names}
    tops = {path[0].lower() for path in folders.values() if path}
    known = tops.intersection(SPLITS["train"] + SPLITS["test"])
    has_splits = len(known) > 1 or (known and known == tops)
    splits = {}
    for name, path in folders.items():
        split = "train"
        if has_splits:
            split, path = "".join(path[:1]).lower(), path[1:]
        splits.setdefault(split, {})[name] = path[0] if path else None
    return splits

def load_folder(folder, names):
    """Split -> `datasets.Dataset` of a folder of images; logs how the folder was understood."""
    kinds = datasets.Features(image=datasets.Image(), label=datasets.Value("string"))
    tables = {}
    for split, files in image_splits(names).items():
        images, labels = list(files), list(files.values())
        log.info(f"{folder}, split {split!r}: {len(images)} images, such as {images[0]}; "
                 f"{len({*labels} - {None})} classes, {labels.count(None)} images of none")
        tables[split] = datasets.Dataset.from_dict(dict(image=images, label=labels), kinds)
    return tables

def load_splits(cfg):
    """Split -> `datasets.Dataset`, of any data set. Raises UserError: not found, no network."""
    if cfg.dataset == "shapes":
        from demo.shapes import shapes
        return shapes()
    if cfg.dataset in DATASETS or not Path(cfg.dataset).is_dir():
        name = DATASETS.get(cfg.dataset, cfg.dataset)
        return from_hub(f"the dataset {name}", f"--dataset FOLDER ({cfg.dataset} is none)",
                        datasets.load_dataset, name, cfg.dataset_config or None)
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
    Raises UserError: not found, no network, no such split, no or several image columns."""
    splits = load_splits(cfg)
    found = [name for name in SPLITS.get(split, [split]) if name in splits]
    if not found:
        raise NoSplit(f"{cfg.dataset} has no split {split!r}, only {', '.join(splits)}")
    split, columns = found[0], splits[found[0]].features
    images = [name for name, kind in columns.items() if isinstance(kind, datasets.Image)]
    images = [cfg.image_column] if cfg.image_column else images
    if len(images) != 1:
        raise UserError(f"not one image column among {', '.join(columns)}: set --image_column")
    labels = [name for name in LABEL_COLUMNS if name in columns]
    labels += [name for name, kind in columns.items() if isinstance(kind, datasets.ClassLabel)]
    source = splits[split].select_columns(images).rename_columns({images[0]: "image"})
    source = source.cast_column("image", datasets.Image(decode=False))
    return split, source, read_labels(splits, split, cfg.label_column or (labels or [""])[0])

def read_labels(splits, split, column):
    """Classes int64 [I], numbered alike in all splits; -1 for NULL, NaN, -1, or a single class."""
    kind = splits[split].features.get(column)
    if not isinstance(kind, (datasets.Value, datasets.ClassLabel)):
        return np.full(len(splits[split]), -1)
    values = pandas.concat({name: part.select_columns(column).to_pandas()[column]
                            for name, part in splits.items() if column in part.features})
    numbers, classes = pandas.factorize(values.where(values != -1), sort=True)
    if len(classes) < 2:
        numbers[:] = -1
    return numbers[values.index.get_level_values(0) == split]

def open_image(cell, folders):
    """A cell of a source, {"bytes", "path"} or None, as a PIL image that is not decoded yet.
    A path counts only inside of `folders`: a stranger's data may name any file."""
    cell = cell or {}
    if cell.get("bytes") is not None:  # then the path is only a name
        return Image.open(BytesIO(cell["bytes"]), formats=FORMATS)
    if not cell.get("path"):
        raise ValueError("no image")
    path = os.path.abspath(os.path.join(folders[0], cell["path"]))
    if not any(Path(path).is_relative_to(folder) for folder in folders):
        raise ValueError("a file outside the data set's folder")
    return Image.open(path, formats=FORMATS)

def decode(cell, size, folders=("",)):
    """A cell -> uint8 [3, size, size]: upright RGB, short side resized, centre-cropped."""
    image = open_image(cell, folders)
    if image.mode[0] in "IF":
        raise ValueError("pixels of more than 8 bits, which PIL would clip at 255")
    image.draft("RGB", (size, size))  # JPEG: decode at 1/2, 1/4, 1/8 where that suffices
    with suppress(Exception):  # a broken EXIF block is no reason to lose the pixels
        ImageOps.exif_transpose(image, in_place=True)
    image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))

def decode_chunk(cells, size, folders):
    """Cells -> an image each, or in its place the reason why there is none."""
    decoded = []
    for cell in cells:
        try:
            decoded.append(decode(cell, size, folders))
        except Exception as error:  # PIL raises nearly anything on hostile bytes
            why = reason(error).split(" <_io")[0]  # PIL appends the address of a BytesIO
            decoded.append(f"{(cell or {}).get('path')}: {why}")
    return decoded

class RowFile:
    """An array [I, ...] of bytes in a file: `file[rows]` is a tensor of some rows, in any thread.
    A memory map is ten times slower from a cold disk (results/first_version/cpu.txt)."""
    def __init__(self, path, dtype, shape):
        self.path, self.dtype, self.shape = path, dtype, shape
        self.file, self.nbytes = open(path, "rb", buffering=0), math.prod(shape)
        if (size := path.stat().st_size) != self.nbytes:
            raise UserError(f"{path} has {size} bytes, not {self.nbytes}: delete {path.parent}")

    def __getitem__(self, rows):
        file, n = self.file.fileno(), self.nbytes // self.shape[0]
        content = bytearray().join([os.pread(file, n, row * n) for row in rows.tolist()])
        return torch.frombuffer(content, dtype=self.dtype).view(-1, *self.shape[1:])

    def to(self, device):
        """All of it as a tensor on a device."""
        content = torch.from_file(str(self.path), size=self.nbytes, dtype=self.dtype)
        return content.view(self.shape).to(device)

class Store:
    """Decoded images in a folder: images `uint8 [I, 3, S, S]`, labels `int64 [I]`, -1 for none."""
    def __init__(self, path):
        info = json.loads((path / "info.json").read_text())
        self.split, self.size = info["split"], info["size"]
        self.labels, self.fingerprint = np.array(info["labels"]), path.name[-12:]
        shape = len(self), 3, self.size, self.size
        self.images = RowFile(path / "images.u8", torch.uint8, shape)

    def __len__(self):
        return len(self.labels)

def open_store(cfg, split, max_samples=0):
    """The store of one split, built first if it is not there yet. Its folder is named by a hash of
    what determines the pixels: a Hub data set's name, or the names and sizes of a folder's files.
    Raises UserError as `open_source`."""
    content = cfg.dataset
    if content == "shapes":
        from demo.shapes import drawing
        content = drawing()
    elif content not in DATASETS and Path(content).is_dir():
        content = list_files(content)
    largest = max(cfg.teacher_size, cfg.student_size)  # what the networks see
    what = [STORE_FORMAT, split, largest, max_samples, cfg.dataset_config, cfg.image_column]
    fingerprint = hashlib.sha256(json.dumps([*what, content]).encode()).hexdigest()[:12]
    names = slug(cfg.dataset), slug(split), slug(cfg.label_column), fingerprint
    path = Path(cfg.cache_dir) / "stores" / "-".join(names)
    make_once(path, partial(build_store, cfg, split, max_samples, largest))
    try:
        return Store(path)
    except Exception as error:
        raise UserError(f"{path} is damaged ({reason(error)}): delete it") from error

def build_store(cfg, split, max_samples, size, path):
    """Decode a split into a folder, at `size` or the median of 64 short sides if that is less."""
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
        with suppress(Exception):  # counted and reported below
            sides.append(min(open_image(cell, folders).size))
    size = min(size, int(np.median(sides or size)))
    shutil.rmtree(path, ignore_errors=True)  # left by a process that was killed
    check_space(path.parent, 3 * size**2 * len(rows), "--max_samples")
    path.mkdir()
    parts, kept, bad = progress(chunks(rows), "decoding"), [], []
    decoded = read_ahead(decode_chunk, ((source[part]["image"], size, folders) for part in parts))
    with open(path / "images.u8", "wb") as file:
        for row, image in zip(rows.tolist(), chain.from_iterable(decoded), strict=True):
            if isinstance(image, str):
                bad.append((row, image))
            else:
                kept.append(row)
                file.write(image)
        os.fsync(file.fileno())
    if not kept:
        raise UserError(f"dataset {cfg.dataset} {split} has no image that can be read {bad[:1]}")
    info = dict(split=split, size=size, labels=labels[kept].tolist(), unreadable=bad)
    (path / "info.json").write_text(json.dumps(info))
    if bad:
        log.warning(f"{len(bad)} of {len(rows)} images cannot be read, such as {bad[0]}")

def subset(rows, count):
    """`count` random ones of `rows` (0 = all), in order, the same every time."""
    order = np.random.default_rng(0).permutation(rows)
    return np.sort(order[: count or None])

def epoch_order(count, seed, epoch):
    """The rows of an epoch, int64 [I]: a permutation of range(count) from (seed, epoch)."""
    return np.random.default_rng([seed, ORDER, epoch]).permutation(count)

def batch_rows(order, batch_size, rank=0, world=1):
    """A process's share: int64 [batches, batch_size / world]; the last is filled from the front."""
    batches = -(-len(order) // batch_size)
    return np.resize(order, (batches, world, batch_size // world))[:, rank]

@lru_cache(2)
def view_boxes(seed, view, count, crop_scale):
    """View `view` of every image: a random crop and flip, boxes float32 [I, 4]. The area is uniform
    from crop_scale to 1, the aspect ratio from 3/4 to 4/3, sides are clipped to the image, half of
    the boxes are mirrored. Row i does not depend on the number of images."""
    random = np.random.default_rng([seed, VIEW, view]).random((count, 5), np.float32)
    area, ratio, x, y, side = torch.from_numpy(random).unbind(1)
    area, ratio = crop_scale + (1 - crop_scale) * area, (4 / 3) ** (2 * ratio - 1)
    w, h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    x, y, mirrored = x * (1 - w), y * (1 - h), side < 0.5
    return torch.stack([torch.where(mirrored, x + w, x), y, torch.where(mirrored, -w, w), h], 1)

def render(images, boxes, size):
    """Cut boxes out of stored images and resize them: float32 [B, 3, size, size] in [0, 1].
    images: uint8 [B, 3, S, S]. boxes: float [B, 4], None for whole images. Bicubic with
    anti-aliasing, as PIL's `resize(box=...)`; separable, so two matrix products per image do it."""
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]) if boxes is None else boxes
    x, y, w, h = to_device(boxes, images.device).unbind(1)
    across = resize_matrix(x, w, size, images.shape[-1])
    down = resize_matrix(y, h, size, images.shape[-1])
    with torch.autocast(images.device.type, enabled=False):
        pixels = images.float() / 255
        return torch.einsum("biy, bcyx, bjx -> bcij", down, pixels, across).clamp_(0, 1)

def resize_matrix(start, length, size, stored):
    """start, length [B] -> weights [B, size, stored] of the stored pixels (Keys 1981, a = -0.5)."""
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
    return tensor.pin_memory().to(device, non_blocking=True)

def quantise(targets):
    """Targets float32 [B, T, D] -> codes int8 [B, T, D + 2], at the end a token's float16 scale."""
    scale = (targets.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-6).half()
    codes = (targets / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([codes, scale.view(torch.int8)], -1)

def dequantise(codes):
    """Codes -> float32 [B, T, D], with a cosine above 0.9995 to targets as networks output them."""
    scale = codes[..., -2:].contiguous().view(torch.float16)
    return codes[..., :-2].float() * scale.float()
