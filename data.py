"""Pixels: any image collection -> a uint8 store on disk -> batches and views.

Part I is what every step needs: the order of an epoch, reading rows, crops, rendering, the format
of cached targets. Part II runs once: it finds the images of a data set, decodes them into a store,
and reads their labels for the evaluation.

Orders and crops follow from (seed, epoch or view, image) alone, whatever the batches or processes.
Axes: I images, B batch, T tokens, D width, S pixels of a stored image."""

import errno
import glob
import hashlib
import json
import math
import os
import re
import shutil
import stat
import tarfile
import unicodedata
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from io import BytesIO
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import torch
from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image, ImageOps
from pyarrow import compute, parquet
from tqdm import tqdm

from config import DATASETS, UserError, from_hub, log, printable, reason, slug, write_atomically

progress = partial(tqdm, leave=False, delay=2, disable=None)  # a bar on terminals, after 2 s
CHUNK = 64  # images that are decoded or embedded at once
THREADS = min(32, os.cpu_count() or 8)  # that decode and read
SHARD = 65_536  # rows of a file of targets
WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])  # the box of an image
UNFLIPPED = torch.tensor([False])
SUBSET, ORDER, VIEW, STEP, HELD_OUT = range(1, 6)  # keep uses of random numbers apart

# ================================================================ I. every step


def subset(rows, count, use=SUBSET):
    """`count` random ones of `rows` (0 = all), in order, for one use the same every time."""
    order = np.random.default_rng([use]).permutation(rows)
    return np.sort(order[: count or None])


def epoch_order(count, seed, epoch):
    """The rows of an epoch, int64 [I]: a permutation of range(count) from (seed, epoch)."""
    return np.random.default_rng([ORDER, seed, epoch]).permutation(count)


def batches(order, batch_size, rank=0, world=1):
    """A process's share: int64 [batches, batch_size / world]; the last is filled from the front."""
    count = math.ceil(len(order) / batch_size)
    return np.resize(order, (count, world, batch_size // world))[:, rank]


def chunks(rows, size=CHUNK):
    """Rows int64 [n] -> a list of parts of `size` rows; the last may be shorter."""
    return np.split(rows, range(size, len(rows), size))


def read_ahead(function, arguments, ahead):
    """Yield function(argument) for each of `arguments`, in order; threads work `ahead` of them."""
    with ThreadPoolExecutor(THREADS) as pool:
        pending = deque()
        for argument in arguments:
            pending.append(pool.submit(function, argument))
            if len(pending) > ahead:
                yield pending.popleft().result()
        for future in pending:
            yield future.result()


class Rows:
    """An array [I, ...] of bytes in a file or in shards, on a GPU that has room for it also in its
    memory. `rows[index]` is a tensor of some rows, on the CPU while they are in files. A memory map
    is ten times slower from a cold disk (results/speed/first_version.txt)."""

    def __init__(self, paths, dtype, shape):
        self.paths = paths
        self.dtype = dtype
        self.shape = shape
        self.nbytes = math.prod(shape)
        self.resident = None
        self.shard = SHARD if len(paths) > 1 else shape[0]  # images are one file
        self.files = [open(path, "rb", buffering=0) for path in paths]
        size = sum(path.stat().st_size for path in paths)
        if size != self.nbytes:
            raise UserError(f"{paths[0].parent}: {size} bytes, not {self.nbytes}: delete it")

    def __getitem__(self, index):
        if self.resident is not None:
            return self.resident[to_device(torch.from_numpy(index), self.resident.device)]
        out = torch.empty(len(index), *self.shape[1:], dtype=self.dtype,
                          pin_memory=torch.cuda.is_initialized())
        for row, place in zip(index.tolist(), out.flatten(1).numpy(), strict=True):
            number, row = divmod(row, self.shard)
            file = self.files[number]
            count = os.preadv(file.fileno(), [place], row * place.nbytes)
            if count != place.nbytes:
                raise UserError(f"{file.name} was cut short while it was read")
        return out

    def move(self, device):
        """Keep all rows in a device's memory from now on."""
        self.resident = torch.empty(self.shape, dtype=self.dtype, device=device)
        for path, part in zip(self.paths, self.resident.split(self.shard), strict=True):
            content = torch.from_file(str(path), size=part.numel(), dtype=self.dtype)
            part.copy_(content.view_as(part))


def read(parts, device, *arrays):
    """Yield (index int64 [B], some rows of each array) for each index of `parts`. The index stays
    on the CPU, the rows are on the device; those of files are read ahead."""
    def read_part(index):
        return torch.from_numpy(index), *(array[index] for array in arrays)

    if arrays[0].resident is None:  # they are moved together
        found = read_ahead(read_part, parts, 8)
    else:
        found = map(read_part, parts)
    for index, *rows in found:
        yield index, *(to_device(some, device) for some in rows)


def to_device(tensor, device):
    """Move to a device; for CUDA by way of pinned memory, so that nothing waits for the copy."""
    if device.type == "cpu" or tensor.device == device:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def digest(text, tensors=()):
    """Twelve hexadecimal digits that name a text and the bits of some tensors."""
    found = hashlib.sha256(text.encode())
    for tensor in tensors:
        found.update(tensor.cpu().numpy().tobytes())
    return found.hexdigest()[:12]


def uniform(index, count, *key):
    """`count` random numbers in [0, 1) for each image: float32 [B, count].
    index: int64 [B]. A pure function of key (integers) and image: each image takes its part of one
    SplitMix64 sequence (Steele et al. 2014), which the key starts, so nothing is drawn in order."""
    start = np.random.SeedSequence(key).generate_state(1, np.uint64)
    place = np.asarray(index)[:, None] * count + np.arange(1, count + 1)
    x = start + place.astype(np.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return torch.from_numpy((x >> 40).astype(np.float32) / 2**24)


def view_crops(index, seed, view, crop_scale):
    """View `view` of some images: a random crop and flip of each.

    index: int64 [B], the images' rows in the store.
    Returns boxes float32 [B, 4], (x, y, w, h) in fractions of the image, and flips bool [B]. The
    area is uniform from crop_scale to 1, the aspect ratio log-uniform from 3/4 to 4/3; sides are
    clipped to the image; half of the views are mirrored. A pure function of (seed, view, image)."""
    area, ratio, x, y, side = uniform(index, 5, VIEW, seed, view).unbind(1)
    area = crop_scale + (1 - crop_scale) * area
    ratio = (4 / 3) ** (2 * ratio - 1)
    w = (area * ratio).sqrt().clamp(max=1)
    h = (area / ratio).sqrt().clamp(max=1)
    boxes = torch.stack([x * (1 - w), y * (1 - h), w, h], 1)
    return boxes, side < 0.5


def render(images, size, boxes=WHOLE, flips=UNFLIPPED):
    """Cut boxes out of stored images and resize them.

    images: uint8 [B, 3, S, S]. boxes: float [B, 4]; flips: bool [B]; or one for all images.
    Returns float32 [B, 3, size, size] in [0, 1]. Bicubic with anti-aliasing, as PIL's
    `resize(box=...)`; it is separable, so two matrix products per image do it."""
    x, y, w, h = to_device(boxes, images.device)[..., None, None].unbind(1)
    across = resize_matrix(x, w, size, images.shape[-1])
    down = resize_matrix(y, h, size, images.shape[-1])
    flips = to_device(flips, images.device)[:, None, None]
    across = torch.where(flips, across.flip(1), across)
    with torch.autocast(images.device.type, enabled=False):
        pixels = images.float() / 255
        return torch.einsum("biy, bcyx, bjx -> bcij", down, pixels, across).clamp_(0, 1)


def resize_matrix(start, length, size, stored):
    """start, length [B, 1, 1] -> weights [B, size, stored] of the stored pixels (Keys 1981, a =
    -0.5)."""
    steps = (torch.arange(size, device=start.device)[:, None] + 0.5) / size
    centre = (start + length * steps) * stored  # [B, size, 1]
    width = (length * stored / size).clamp(min=1)  # > 1 when shrinking: anti-aliasing
    source = torch.arange(stored, device=start.device) + 0.5
    d = ((source - centre).abs() / width).clamp(max=2)
    weights = (1 - d) * torch.where(d < 1, 1 + d - 1.5 * d * d, (2 - d) ** 2 / 2)
    return weights / weights.sum(-1, keepdim=True)


def quantise(targets):
    """Targets float32 [B, T, D] -> int8 [B, T, D + 2]: at the end of a token its float16 scale."""
    scale = (targets.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-6).half()
    values = (targets / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([values, scale.view(torch.int8)], -1)


def dequantise(quantised):
    """int8 [B, T, D + 2] -> float32 [B, T, D], of embeddings with a cosine above 0.9995."""
    scale = quantised[..., -2:].contiguous().view(torch.float16)
    return quantised[..., :-2].float() * scale.float()


# ================================================================ II. once: a data set -> a store

STORE_FORMAT = 8  # raise it when decoding changes: older stores are then not found
LABEL_COLUMNS = "label", "fine_label", "cls"
FORMATS = "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"  # of Pillow's; EPS runs programs
READ = ("what is read: JPEG, PNG, WebP, BMP, GIF, TIFF and PPM files, parquet files, WebDataset's "
        "tar shards, what save_to_disk wrote, the Hub; for others see docs/recipes.md, Your own "
        "data")
TRAIN = "train", "training", "trainval"  # what a split may be called: the first one there is
TEST = ("test", "testing", "validation", "validate", "valid", "val", "dev", "evaluation", "eval",
        "holdout")
USUAL = {*TRAIN, *TEST}
OTHERS = {"extra", "pred", "unlabeled", "unlabelled"}  # splits, but beside others
ADDED = set("data dataset image images img imgs part photos pictures seg set".split())  # beside it
ARCHIVES = ".zip", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"
MAPS = "annotation|segmentation|trimap"  # folders of PNGs that tell what each pixel shows
NO_DATA = {"@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN"}  # thumbnails and bins of disks
NUMBERS = r"([-_]\d+)?(-of-\d+)?(-[0-9a-f]{16})?\.\w+$"  # the end of a shard's name
NOT_THERE = errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP


class NoSplit(UserError):
    """The data set exists, but has no such split."""


# A source is a split of which nothing has been decoded: an object with `key`, by which its store
# is found, `len`, `cells(rows)`, what `open_image` takes, and `labels(column)`. `Files` and `Table`
# are two kinds, demo/shapes.py has a third; `open_source` adds `split`, `notes` and `folders`.


class Files:
    """A split of a folder of images. classes: relative name -> class or None."""

    def __init__(self, folder, classes):
        self.names = list(classes)
        self.classes = list(classes.values())
        self.key = [stamp(folder, name) for name in self.names]

    def __len__(self):
        return len(self.names)

    def cells(self, rows):
        """What `open_image` takes, for each of some rows."""
        return [dict(path=self.names[row]) for row in rows]

    def labels(self, column):
        """The class name of each image, or None where it has none; folders have no columns."""
        return self.classes if column in ("", "label") else None


class Table:
    """A split of tables: a `datasets.Dataset` with an image column, which is not decoded."""

    def __init__(self, part, image_column):
        kinds = part.features
        images = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
        if image_column:
            images = [name for name in kinds if name == image_column]
        if len(images) != 1:
            some = printable(", ".join([*kinds][:10]))
            raise UserError(f"not one image column among {some}: set --image_column; {READ}")
        (name,) = images
        if not isinstance(kinds[name], (datasets.Image, datasets.Value, dict)):
            raise UserError(f"{name} holds arrays: write images, as docs/recipes.md does")
        if part.format["type"] == "custom":
            raise UserError("set_transform has no effect on what is decoded: use map")
        self.part = part.with_format(None)
        undecoded = self.part.cast_column(name, datasets.Image(decode=False))
        self.images = undecoded[name]
        self.column = undecoded.data.column(name)
        times = [stamp(*os.path.split(file["filename"])) for file in part.cache_files]
        self.key = [image_column, times, part._fingerprint]  # which rows, or the content in memory

    def __len__(self):
        return len(self.part)

    def stamps(self, folder):
        """Of the files that cells name in place of bytes; None for one that is not there."""
        content, paths = (compute.struct_field(self.column, name) for name in ("bytes", "path"))
        found = []
        for name in paths.filter(compute.is_null(content)).drop_null().to_pylist():
            found.append(None)
            with suppress(OSError, ValueError):
                path = os.path.abspath(os.path.join(folder, name))
                found[-1] = stamp(*os.path.split(path))
        return found

    def cells(self, rows):
        return [cell or {} for cell in self.images[rows]]

    def label_column(self, column):
        """The column that labels(column) takes, or None."""
        kinds = self.part.features
        classes = [name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
        for name in [column] if column else [*LABEL_COLUMNS, *classes]:
            if isinstance(kinds.get(name), (datasets.Value, datasets.ClassLabel)):
                column = self.part.data.column(name)  # of all rows, also of those not selected
                if column.null_count < len(column):
                    return name
        return None

    def labels(self, column):
        name = self.label_column(column)
        if name is None:
            return None
        kind = self.part.features[name]
        return [class_name(kind, value) for value in self.part[name][:]]


def stamp(folder, name):
    """By which a file is known: when it changes, so does this. A copy has the same."""
    file = os.stat(f"{folder}/{name}")
    return name, file.st_size, file.st_mtime_ns


def class_name(kind, value):
    """A cell of a label column as text, the same for a class in whatever form a split has it;
    None for NULL, NaN, -1 and empty text."""
    if value in (None, -1, "") or value != value:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # some tools make floats of integers that have gaps
    with suppress(AttributeError, ValueError):  # no ClassLabel; a number without a name
        value = kind.int2str(value)
    return str(value)


def is_image(name):
    kind = Image.registered_extensions().get(Path(name).suffix.lower())
    return kind in FORMATS and not NO_DATA & {*name.split("/")}


def list_files(folder, root, skipped, linked=False):
    """Yield the relative names of all files below a folder, in order, of a dead link "NAME (dead
    link)". Links are followed. A link to a folder within `root` is not followed below another such
    link, or folders that link to each other would be listed without end. What begins with a dot is
    left out, of folders "NAME.hidden" is listed, and so are the folders of `skipped`."""
    real = os.path.realpath(folder)
    is_link = os.path.islink(folder) and Path(root) in Path(real).parents
    if real in skipped or is_link and linked:
        return
    for name in sorted(os.listdir(folder)):
        path = f"{folder}/{name}"
        if name.startswith(".") or name == "lost+found":
            if os.path.isdir(path):
                yield f"{name}.hidden"
            continue
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            if error.errno not in NOT_THERE:  # such as a disk that is away
                raise
            yield f"{name} (dead link)"
            continue
        if stat.S_ISREG(mode):
            yield name
        elif stat.S_ISDIR(mode):
            for inner in list_files(path, root, {*skipped, real}, linked or is_link):
                yield f"{name}/{inner}"


def split_names(folders):
    """Names of folders -> {folder: split}, or {} if they are no splits. They are if one is called
    for training and one for tests (TRAIN, TEST), or if each has such a word, as train_clean and
    test_2018 do, but perhaps one without any word of its own. Words that all names have do not
    count, as in cats_train and cats_test, nor those of ADDED."""
    usual = "|".join(USUAL)
    added = "|".join(ADDED)
    words = {}
    for folder in folders:  # testImages, testset, trainVal -> test images, test set, trainval
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", folder).lower()
        name = re.sub(rf"({usual})(?=({added})(?![a-z]))", r"\1 ", name)
        name = re.sub(r"train[-_ ]val", "trainval", name)
        words[folder] = re.findall(r"[^\W\d_]+", name)
    ignored = set().union(*words.values()).intersection(*words.values()) | ADDED
    own = {}
    names = {}
    for folder, some in words.items():
        own[folder] = [word for word in some if word not in ignored]
        names[folder] = "_".join(own[folder] or some)
    found = {*names.values()}
    if found & {*TRAIN} and found & {*TEST} or found <= USUAL:
        return names
    counts = Counter(chain.from_iterable(own.values()))
    bare = [folder for folder in own if not own[folder]]  # 256 beside val_256
    if len(bare) == 1 and counts and not counts.keys() & {*TRAIN}:
        own[bare[0]] = ["train"]
    for folder, some in own.items():
        known = [word for word in some if word in USUAL | OTHERS]
        if not known:
            return {}
        if counts[known[0]] < 2:  # no other folder has the word
            names[folder] = known[0]
    return names


def folder_splits(places):
    """File -> its folder, such as train/cat -> split -> file -> class or None. Splits are folders
    of that level, of the first five, which has most of them, as in cat/train. The class is the
    first other folder that is not the same for all of the split. Files beside splits are in ""."""
    paths = {name: place.split("/") if place else [] for name, place in places.items()}
    levels = []
    for i in range(5):
        folders = {path[i] for path in paths.values() if len(path) > i}
        levels.append(split_names(folders))
    known = max(levels, key=lambda names: (len(USUAL & {*names.values()}), bool(names)))
    level = levels.index(known)
    beside = "" if known else "train"
    splits = {}
    for name, path in paths.items():
        folder = path.pop(level) if known and len(path) > level else ""
        # A last folder is a class, but for seg_train/seg_train/1.jpg, as archives unpack.
        around = path if path[-1:] == [folder] else path[:-1]
        splits.setdefault(known.get(folder, beside), {})[name] = path, around
    for split, some in splits.items():
        shared = len(os.path.commonprefix([around for path, around in some.values() if path]))
        splits[split] = {name: next(iter(path[shared:]), None)
                         for name, (path, around) in some.items()}
    if len({label for some in splits.values() for label in some.values()}) == 1:
        splits = {split: dict.fromkeys(some) for split, some in splits.items()}  # as images/1.jpg
    return splits


def open_folder(cfg):
    """A local folder -> split -> `Files` or `datasets.Dataset`, and the names of files that are
    left out. Of images and parquet files it holds what takes more of the disk. Tar shards that
    are not much larger are archives of the images beside them."""
    folder = os.path.abspath(cfg.dataset)
    root = os.path.realpath(folder)
    skipped = {os.path.realpath(cfg.cache_dir), os.path.realpath(cfg.run_path)} - {root}
    names = list(list_files(folder, root, skipped))
    images = without_masks([name for name in names if is_image(name)])
    if "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= {*names}:
        return open_saved(folder, names), images
    tables = [name for name in names if name.lower().endswith(".parquet")]
    tars = [name for name in names if name.endswith(".tar")]  # of WebDataset
    card = ""
    if "README.md" in names:
        card = Path(folder, "README.md").read_text(errors="replace")

    def size(some):
        return sum(os.path.getsize(f"{folder}/{name}") for name in some)

    used = tars if size(tars) > 4 * size(images) else images
    if tables:  # img2dataset writes one of captions beside each tar; some lay samples beside tables
        used = max(used, tables, key=size)
    configs = card.count("config_name:")
    # Images need a card only where it names files, or several configurations.
    stated = configs > 1 or configs and (used is not images or re.search("data_(dir|files):", card))
    if not used and not card and any(name.lower().endswith(ARCHIVES) for name in names):
        raise UserError("archives, which have to be unpacked: docs/recipes.md")
    if cfg.dataset_config or stated or not used:
        return open_with_card(folder, cfg.dataset_config or None, names)
    if used is images:
        places = {name: os.path.dirname(name) for name in images}
        splits = {split: Files(folder, once(folder, classes))
                  for split, classes in folder_splits(places).items()}
        used = chain.from_iterable(files.names for files in splits.values())
    else:
        splits = open_tables(folder, used)
    return splits, {*names} - {*used}


def without_masks(images):
    """The same names, but for masks/1.png beside images/1.png, 1_mask.png beside 1.png, and a PNG
    in a folder of MAPS that is called like a JPEG."""
    stems = {name: os.path.splitext(name)[0] for name in images}
    known = {*stems.values()}
    photos = {os.path.basename(stem) for name, stem in stems.items()
              if name.lower().endswith((".jpg", ".jpeg"))}
    kept = []
    for name, stem in stems.items():
        image = re.sub(r"(^|/)[Mm]asks?(?=/)", r"\1images", stem)
        image = re.sub(r"_mask(_\d+)?$", "", image)
        place, base = os.path.split(image)
        is_map = name.endswith(".png") and re.search(MAPS, place.lower()) and base in photos
        if not is_map and (image == stem or image not in known):
            kept.append(name)
    return kept


def once(folder, classes):
    """The same files, but a folder that links also lead to has one name, the shortest way to it."""
    places = {os.path.dirname(name) for name in classes}
    names = {}
    for place in sorted(places, key=lambda place: (place.count("/"), place)):
        names.setdefault(os.path.realpath(f"{folder}/{place}"), place)
    kept = {*names.values()}
    return {name: label for name, label in classes.items() if os.path.dirname(name) in kept}


def cache_of(folder, names):
    """A place in the cache of `datasets` for these files as they are now. By itself it knows a
    folder by its last name and its card, and a table by its time."""
    content = repr([folder, *(stamp(folder, name) for name in names)])
    return str(Path(datasets.config.HF_DATASETS_CACHE, digest(content)))


def open_with_card(folder, name, names):
    """What `datasets` makes of a folder, for example as its README.md states it -> split ->
    `datasets.Dataset`, and the names that are left out."""
    for path in names:
        place, file = os.path.split(path)
        if file in ("dataset_dict.json", "state.json"):
            raise UserError(f"save_to_disk wrote {place} within it: give that folder")
    there = [name for name in names if os.path.exists(f"{folder}/{name}")]
    builder = datasets.load_dataset_builder(folder, name, cache_dir=cache_of(folder, there))
    files = chain.from_iterable((builder.config.data_files or {}).values())
    files = {*map(os.path.abspath, files)}
    roots = folder, os.path.realpath(folder)
    for file in files:
        if not any(Path(file).is_relative_to(root) for root in roots):
            raise UserError(f"README.md names {printable(file)}, which is outside of the folder")
    builder.download_and_prepare()
    left_out = [name for name in names if not files & {f"{root}/{name}" for root in roots}]
    return builder.as_dataset(), left_out


def open_tables(folder, names):
    """Parquet files or tar shards -> split -> `datasets.Dataset`. `datasets` is not asked for the
    splits: it takes train_station.parquet for one. Each has columns and classes of its own."""
    kind = "webdataset" if names[0].endswith(".tar") else "parquet"
    if kind == "webdataset":
        for name in names:
            if lacks_end(f"{folder}/{name}"):
                raise UserError(f"{name} is cut off: it does not end as tar files do")
    # train-0-of-2.parquet is taken for a file in a folder `train`.
    places = {name: re.sub(NUMBERS, "", name) for name in names}
    splits = {}
    for split, some in folder_splits(places).items():
        files = [f"{folder}/{name}" for name in some]
        if kind == "parquet" and len({*map(class_names, files)}) > 1:
            raise UserError(f"the files of {split or 'no split'} have other names or numbers of "
                            "classes: write them as one, with datasets")
        splits[split] = datasets.load_dataset(kind, data_files=[*map(glob.escape, files)],
                                              split="train", cache_dir=cache_of(folder, some))
        splits[split].remark = about_files(some)
        if kind == "webdataset":
            splits[split].tars = files
    return splits


def about_files(names):
    """Of the files of a split: their names, where these differ, and how many are missing."""
    kinds = []
    stated = {}
    for name in names:
        kind = re.sub(rf"[-_]?\d*{NUMBERS}", "", name)
        if found := re.search(r"-of-(\d+)", name):
            kind += " in parts"
            stated[kind] = int(found[1])
        kinds.append(kind)
    text = ""
    if len({*kinds}) > 1:
        text = f"; files: {commonest(kinds)}"
    whole = sum(stated.values())
    there = sum("-of-" in name for name in names)
    if whole != there:
        text += f"; {there} of {whole} files are there"
    return text


def lacks_end(tar):
    """Whether a tar shard does not end with 1,024 zeros: cut between two images, it reads well."""
    with open(tar, "rb") as file:
        if file.read(2) == b"\x1f\x8b":  # compressed
            return False
        start = os.path.getsize(tar) - 1024
        file.seek(max(start, 0))
        return file.read() != bytes(1024)


def check_tars(part):
    """Raise UserError for tar shards of which `datasets` has not read all: it passes over names
    that begin with a dot or two underscores, takes the kinds of files from the first five samples,
    and does not tell folders."""
    places = set()
    count = 0
    for file in getattr(part, "tars", []):
        with tarfile.open(file) as tar:
            names = [member.name for member in tar if not member.isdir()]
        for name in names:
            place, base = os.path.split(os.path.normpath(name))
            if not base.startswith("._"):  # what a Mac adds
                places.add(place)
                count += 1
    columns = [name for name in part.column_names if name[:2] != "__"]
    lost = count
    for name in columns:
        column = part.data.column(name)
        lost -= len(column) - column.null_count
    if lost > 0:
        kinds = ", ".join(columns)
        raise UserError(f"{lost} of {count} files in tar shards cannot be read as {kinds}, by "
                        "their names: unpack them")
    if len(places) > 1 and len(columns) == 1:
        raise UserError("tar files of folders, which may be classes: unpack them")


def class_names(file):
    """The columns of a parquet file that may hold classes, and their names or type, as text."""
    try:
        schema = parquet.read_schema(file)
    except Exception as error:
        raise UserError(f"{os.path.basename(file)}: {reason(error)}") from error
    kinds = datasets.Features.from_arrow_schema(schema)
    found = []
    for name, kind in kinds.items():
        if isinstance(kind, datasets.ClassLabel):
            found.append((name, kind.names))
        elif name in LABEL_COLUMNS:  # words, true or false, numbers
            type_name = re.sub(r"large_|^u|\d+", "", str(getattr(kind, "dtype", kind)))
            found.append((name, type_name.replace("float", "int")))
    return str(found)


def open_saved(folder, names):
    """What `save_to_disk` wrote -> split -> `datasets.Dataset`. Its lists may name any file: the
    last names count. Other files are left from an earlier save, or cached by `map`."""
    if "state.json" in names:
        lists = ["state.json"]
    else:  # other folders are of an earlier save, too
        splits = json.loads(Path(folder, "dataset_dict.json").read_text())["splits"]
        lists = [f"{split}/state.json" for split in splits]
    opened = {}
    for name in lists:
        place = os.path.dirname(name)
        if name not in names:
            raise UserError(f"dataset_dict.json lists {place}, which is not there")
        listed = json.loads(Path(folder, name).read_text())["_data_files"]
        files = [os.path.basename(some["filename"]) for some in listed]
        files = [file for file in files if os.path.join(place, file) in names]
        if listed and not files:
            raise UserError(f"state.json of {place or 'it'} lists files, of which none is there")
        parts = [datasets.Dataset.from_file(os.path.join(folder, place, file)) for file in files]
        if parts:
            split = place or "train"
            opened[split] = datasets.concatenate_datasets(parts)
            opened[split].remark = about_files(files)
    return opened


def open_splits(cfg):
    """A data set -> split -> `datasets.Dataset` or `Files`, the files that are left out, and its
    folder or "". A named one may be a function that returns split -> `datasets.Dataset`, or -> an
    object as described above `Files` (demo/shapes.py). Raises UserError: not found, no network."""
    named = DATASETS.get(cfg.dataset, cfg.dataset)
    try:
        if callable(named):
            return dict(named()), [], "/"  # the user's own code may name any file
        if Path(cfg.dataset).is_dir():
            return *open_folder(cfg), cfg.dataset
    except Exception as error:  # `datasets` and what it stands on raise what they like
        raise UserError(
            f"cannot read the dataset {cfg.dataset}: {reason(error)}; {READ}") from error
    name, _, revision = named.partition("@")
    splits = from_hub(f"the dataset {name}", f"--dataset FOLDER ({name} is none)",
                      datasets.load_dataset, name, cfg.dataset_config or None,
                      revision=revision or None)
    return splits, [], ""


def open_source(cfg, split):
    """A split of a data set: an object as described above `Files`, with attributes split; notes, a
    line on what was found; folders: first the base of relative paths in cells, "" where the program
    runs, then those within which all paths have to lead.
    Raises UserError as `open_splits`; no such split; no or several image columns."""
    splits, left_out, folder = open_splits(cfg)
    words = dict(train=TRAIN, test=TEST).get(split.lower(), [split.lower()])
    found = [name for word in words for name in splits if str(name).lower() == word]
    if not found:
        known = printable(", ".join(splits))
        raise NoSplit(f"{cfg.dataset} has no split {split!r}, only {known}")
    source = splits[found[0]]
    remark = getattr(source, "remark", "")
    if isinstance(source, datasets.Dataset):
        try:
            source = Table(source, cfg.image_column)
        except Exception as error:
            raise UserError(f"cannot read the images of {cfg.dataset}: {reason(error)}") from error
    source.split = str(found[0])
    counts = [f"{len(part)} of {name or 'no split'}" for name, part in splits.items()]
    notes = f"images: {', '.join(counts)}{remark}"
    if isinstance(source, Files):
        if cfg.image_column:
            raise UserError("--image_column: a folder of images has no columns")
        notes += f"; classes: {commonest(name or 'no class' for name in source.classes)}"
    elif isinstance(source, Table):
        kinds = source.part.features
        name = source.label_column(cfg.label_column)
        notes += f"; labels: {name or 'no column'}"
        if classes := getattr(kinds.get(name), "names", []):
            notes += f" ({first_ten(classes)})"
        if isinstance(kinds.get("split"), datasets.Value):  # rows are not split by it
            notes += f"; column split: {commonest(source.part['split'][:])}"
    if left_out:
        kinds = (Path(name).suffix or "without extension" for name in sorted(left_out))
        notes += f"; other files, left out: {commonest(kinds)}"
    source.notes = printable(notes)
    trusted = [HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE]
    if folder:
        trusted.append(folder)
    source.folders = [folder.rstrip("/")]  # of a function's "/" none: where the program runs
    source.folders += map(os.path.abspath, trusted)
    source.folders += map(os.path.realpath, trusted)
    return source


def commonest(names):
    """'3 cat, 2 dog': what there is most of, and of how many others."""
    return first_ten([f"{count} {name}" for name, count in Counter(names).most_common()])


def first_ten(texts):
    """'cat, dog', and how many others there are."""
    text = ", ".join(texts[:10])
    if len(texts) > 10:
        text += f" and {len(texts) - 10} others"
    return text


def open_image(cell, folders):
    """A cell of a source, a dict of "bytes" or "path", as a PIL image that is not decoded yet.
    folders: of the source. A stranger's data may name any file, so a path has to lead there."""
    if cell.get("bytes") is not None:  # then the path is only a name
        return Image.open(BytesIO(cell["bytes"]), formats=FORMATS)
    if not cell.get("path"):
        raise UserError("no image")
    base, *trusted = folders
    path = os.path.abspath(os.path.join(base, cell["path"]))
    if "::" in cell["path"] and not os.path.exists(path):
        raise UserError("it is in an archive, which has to be unpacked: docs/recipes.md")
    if not any(Path(path).is_relative_to(folder) for folder in trusted):
        raise UserError("a file outside the data set's folder")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError("no regular file")
    return Image.open(path, formats=FORMATS)


def decode(cell, size, folders=("",)):
    """A cell -> uint8 [3, size, size]: upright RGB, short side resized, centre-cropped."""
    image = open_image(cell, folders)
    # Colours of 16 bits: RGB;16B in PNG and TIFF, a largest value in PPM, tag 258 of TIFF planes.
    # BGR;16 of BMP has 5, 6 and 5 bits.
    deep = re.search(r"[^R];16|'RGB', \d{4}", str(image.tile))
    bits = getattr(image, "tag_v2", {}).get(258, (8,))
    if image.mode[0] in "IF" or deep or max(bits) > 8:
        raise UserError("pixels of more than 8 bits, which would lose their contrast")
    image.draft("RGB", (size, size))  # JPEG: decode at 1/2, 1/4, 1/8 where that suffices
    with suppress(Exception):  # a broken EXIF block is no reason to lose the pixels
        ImageOps.exif_transpose(image, in_place=True)
    image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1).copy()


def try_decode(cell, size, folders):
    """A cell -> an image, or the reason why there is none. Raises UserError for what may pass, such
    as a disk that is away: the store would lack the image for good."""
    try:
        return decode(cell, size, folders)
    except Exception as error:  # PIL raises nearly anything on hostile bytes
        why = re.sub(r":? (<_io|'/).*", "", reason(error))  # PIL appends an address or the path
        name = printable(cell.get("path") or "an image")
        text = f"{name[:200]}: {why}"
        number = getattr(error, "errno", None)
        # A table may name files that never were; a file of a folder was there. EINVAL: an offset.
        lasting = number in NOT_THERE and "bytes" in cell or number == errno.EINVAL
        if isinstance(error, MemoryError) or number and not lasting:
            raise UserError(f"cannot read {text}; nothing was left out, try again") from error
        return text


class Busy(UserError):
    """Another process holds a lock."""


def locked(path, wait=True):
    """Hold the lock `path`, as a context. If another process has it, wait, and say so, or raise
    Busy. A disk that knows no locks does without."""
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=5 if wait else 0)
    except Timeout as error:
        if not wait:
            raise Busy(f"another process holds {path}") from error
        log.info(f"waiting for {path}, which another process holds")
        return lock.acquire()
    except (NotImplementedError, OSError) as error:
        log.warning(f"{path}: no lock ({reason(error)}): run one process at a time")
        return nullcontext()


def make_once(path, make, wait=True):
    """Unless `path` exists, make(temporary path) a file or folder; if another process is at it,
    wait for it, or leave it to that."""
    if path.exists():  # without a lock, as the disk may be read-only
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(Busy), locked(f"{path}.lock", wait):
        if not path.exists():
            write_atomically(path, make)


def check_space(folder, need, advice):
    """Raise UserError where a disk has less space than is needed."""
    if need > shutil.disk_usage(folder).free:
        raise UserError(f"{need / 1e9:.1f} GB do not fit into {folder}: see --cache_dir, {advice}")


class Store:
    """Decoded images in a folder: `images` uint8 [I, 3, S, S]; fingerprint, a digest of them;
    summary, a line on what is used and what is left out. Labels are the source's as it is now."""

    def __init__(self, path, source):
        info = json.loads((path / "info.json").read_text())
        self.source = source
        self.split = source.split
        self.size = info["size"]
        self.fingerprint = info["fingerprint"]
        self.note = info["note"]  # how many images are used, and what cannot be read
        self.summary = f"{source.notes}; {self.note}"
        self.rows = np.fromfile(path / "rows.i64", np.int64)  # of the images in their source
        self.digests = np.fromfile(path / "digests.i64", np.int64)  # equal ones: equal pixels
        shape = len(self), 3, self.size, self.size
        self.images = Rows([path / "images.u8"], torch.uint8, shape)

    def __len__(self):
        return len(self.rows)

    def label_column(self, column):
        """The column that labels(column) takes; folders have none."""
        if isinstance(self.source, Table):
            return self.source.label_column(column) or column
        return column

    def labels(self, column=""):
        """The class name of each image, or None: an array of objects [I]."""
        return self.source_labels(column)[self.rows]

    def source_labels(self, column=""):
        """The same of all images of the source, also of those that are not in the store."""
        names = self.source.labels(column)
        if names is None:
            names = [None] * len(self.source)
        # An accent may be a letter's own or a character behind it.
        names = [None if name is None else unicodedata.normalize("NFC", str(name))
                 for name in names]
        return np.array(names, dtype=object)

    def names(self, rows):
        """The file name, or else the row in the source, of some images."""
        rows = self.rows[rows]
        cells = self.source.cells(rows)
        return [printable(cell.get("path") or row) for cell, row in zip(cells, rows, strict=True)]


def open_store(cfg, split, max_samples=0):
    """The store of one split, built first if it is not there yet. It is found by the names, sizes
    and times of the source's files; it is known by a digest of its pixels, which names the caches
    of targets and says whether a run goes on with the same images.
    Raises UserError as `open_source`."""
    source = open_source(cfg, split)
    size = cfg.stored_size or max(cfg.teacher_size, cfg.student_size)
    key = [STORE_FORMAT, size, max_samples, source.split, source.key]
    if isinstance(source, Table):
        key += source.stamps(source.folders[0])
    what = digest(json.dumps(key))
    name = f"{slug(cfg.dataset)}-{slug(source.split)}-{what}"
    path = Path(cfg.cache_dir, "stores", name)
    make_once(path, partial(build_store, source, max_samples, size))
    try:
        store = Store(path, source)
    except Exception as error:
        raise UserError(f"{path} is damaged ({reason(error)}): delete it") from error
    some = np.linspace(0, len(store) - 1, 8).astype(int)  # files may change and keep their times
    cells = source.cells(store.rows[some])
    for cell, kept in zip(cells, store.images[some].numpy(), strict=True):
        image = try_decode(cell, store.size, source.folders)
        if isinstance(image, str) or abs(image - kept.astype(float)).mean() > 2:
            raise UserError(f"{path} holds other images than the data now, or of other code: "
                            "delete it")
    return store


def build_store(source, max_samples, size, path):
    """Decode a source into a folder, at `size` or the median of 64 short sides if that is less:
    images of 32 px are not stored at 224."""
    rows = subset(np.arange(len(source)), max_samples)
    sides = []
    for cell in source.cells(subset(rows, 64)):
        with suppress(Exception):  # counted and reported below
            sides.append(min(open_image(cell, source.folders).size))
    size = min(size, int(np.median(sides or size)))
    shutil.rmtree(path, ignore_errors=True)  # left by a process that was killed
    check_space(path.parent, 3 * size**2 * len(rows), "--max_samples")
    if isinstance(source, Table):
        check_tars(source.part)
    path.mkdir()
    parts = progress(chunks(rows), "decoding images")
    cells = chain.from_iterable(map(source.cells, parts))
    decoded = read_ahead(partial(try_decode, size=size, folders=source.folders), cells, CHUNK)
    pixels = hashlib.sha256()
    digests = []  # of each image, by which copies are found
    bad = {}  # row -> why it has no image
    with open(path / "images.u8", "wb") as file:
        for row, image in zip(rows.tolist(), decoded, strict=True):
            if isinstance(image, str):
                bad[row] = image
            else:
                pixels.update(image)
                digests.append(hashlib.sha256(image).digest()[:8])
                file.write(image)
        os.fsync(file.fileno())
    kept = np.setdiff1d(rows, list(bad))
    kept.tofile(path / "rows.i64")
    (path / "digests.i64").write_bytes(b"".join(digests))
    note = f"{len(kept)} of {len(source)} are used"
    if bad:
        examples = ", ".join(list(bad.values())[:3])
        note += f", {len(bad)} images cannot be read, such as {examples}"
    if not len(kept):
        raise UserError(f"no image of {source.split} can be read ({note}); {READ}")
    fingerprint = f"{pixels.hexdigest()[:12]}-{size}"
    info = dict(split=source.split, size=size, fingerprint=fingerprint, note=note,
                unreadable=list(bad.items())[:1000])
    (path / "info.json").write_text(json.dumps(info))
