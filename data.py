"""Pixels: any image collection -> a uint8 store on disk -> batches, views, augmentation.

Images are decoded once. `open_store` reads CIFAR, a Hub dataset or a local folder through Hugging
Face `datasets`, decodes in parallel and keeps `uint8 [N, 3, S, S]` in a memory map; training only
copies rows out of it. Everything random here is a pure function of (seed, epoch or view number,
image index), so that batch size, ranks and interruptions change nothing.

Axes: B batch, S stored size in pixels. A box is (x, y, w, h) in shares of the image; a box of
negative width is mirrored.
"""

import hashlib
import io
import json
import os
import shutil
import warnings
from functools import cached_property
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageOps
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from config import DATASETS, UserError, hub_error, hub_online

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
# RGB -> YIQ (NTSC, FCC 1953): hue is a rotation of its last two axes.
YIQ = torch.tensor([LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])
LOCAL_SCALE = (0.05, 0.32)  # area of a local crop, DINOv2
ORDER, VIEW, LOCAL, JITTER = range(4)  # streams of random numbers


# ---------------------------------------------------------------------------- sources


def open_source(name: str, split: str, image_column: str, label_column: str):
    """A dataset of undecoded images -> (rows, image column, label column or "", split).

    name: cifar10, cifar100, owner/name on the Hub, or a folder of images, parquet files or
    `save_to_disk`. Rows are indexable; images stay encoded so that a corrupt one harms nobody else.
    Raises UserError: not found, no network, no such split, no or several image columns.
    """
    import datasets

    hub_name, known_label = DATASETS.get(name, (name, ""))
    local = name not in DATASETS and Path(name).is_dir()
    advice = "--dataset DIR with a local copy, or --preset demo"
    try:
        if local and ((Path(name) / "state.json").exists() or (Path(name) / "dataset_dict.json").exists()):
            found = datasets.load_from_disk(name)
        elif local:
            found = datasets.load_dataset(name)
        else:
            hub_online()
            found = datasets.load_dataset(hub_name)
    except Exception as error:
        if local:
            raise UserError(f"cannot read the dataset in {name}: {error}") from error
        raise hub_error(f"the dataset {hub_name}", advice, error) from error
    if isinstance(found, datasets.Dataset):
        found = {"train": found}
    wanted = [split] if split else ["test", "validation", "valid", "val"]
    split = next((s for s in wanted if s in found), None)
    if split is None:
        raise UserError(
            f"dataset {name} has no split {wanted[0]!r}, only {', '.join(found)}: "
            "set --train_split or --test_split"
        )
    rows = found[split]
    image = _image_column(rows, name, image_column)
    label = _label_column(rows, name, label_column or known_label)
    rows = rows.cast_column(image, datasets.Image(decode=False))
    if label and rows.features[label].dtype == "string":
        rows = rows.class_encode_column(label)
    return rows, image, label, split


def _image_column(rows, name: str, asked: str) -> str:
    import datasets

    columns = ", ".join(rows.column_names)
    if asked and asked not in rows.column_names:
        raise UserError(f"dataset {name} has no column {asked!r}, only {columns}: set --image_column")
    images = [c for c, f in rows.features.items() if isinstance(f, datasets.Image)]
    # Parquet files written elsewhere hold the bytes, but not the type.
    images = images or [
        c for c, f in rows.features.items()
        if getattr(f, "dtype", "") in ("binary", "large_binary") or (isinstance(f, dict) and "bytes" in f)
    ]
    if not asked and len(images) != 1:
        what = f"{len(images)} image columns ({', '.join(images)})" if images else "no image column"
        raise UserError(f"dataset {name} has {what}; its columns are {columns}: set --image_column")
    return asked or images[0]


def _label_column(rows, name: str, asked: str) -> str:
    import datasets

    if asked and asked not in rows.column_names:
        raise UserError(
            f"dataset {name} has no column {asked!r}, only {', '.join(rows.column_names)}: "
            "set --label_column"
        )
    classes = [c for c, f in rows.features.items() if isinstance(f, datasets.ClassLabel)]
    named = [c for c in ("label", "labels") if c in rows.column_names]
    return asked or (classes[0] if len(classes) == 1 else "") or (named[0] if named else "")


# ---------------------------------------------------------------------------- drawn shapes

RADIUS = (0.23, 0.38)  # of the shape, as a fraction of the image side
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
    canvas = texture.resize((side, side), PIL.Image.BICUBIC)  # few cells: plain, gradient or stripes
    draw = PIL.ImageDraw.Draw(canvas)
    for _ in range(rng.integers(DISTRACTORS + 1)):
        start, colour = rng.uniform(0, side, 2), tuple(rng.integers(0, 256, 3).tolist())
        stop = start + rng.uniform(-0.2, 0.2, 2) * side
        draw.line([*start, *stop], fill=colour, width=int(rng.integers(1, 8)))
    radius = rng.uniform(*RADIUS) * side
    centre = complex(*rng.uniform(radius, side - radius, 2))
    turned = radius * np.exp(1j * rng.uniform(-np.pi, np.pi)) * list(OUTLINES.values())[label]
    draw.polygon([(p.real, p.imag) for p in centre + turned], fill=tuple(fore.astype(int).tolist()))
    pixels = np.asarray(canvas.reduce(SUPERSAMPLE), np.float32)
    noise = NOISE * rng.standard_normal(pixels.shape, np.float32)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8), label


class Shapes:
    """The drawn data set as a source of rows; the test split is drawn from other seeds."""

    SIZES = dict(train=8000, test=2000)

    def __init__(self, split: str):
        if split not in self.SIZES:
            raise UserError(f"dataset shapes has no split {split!r}, only train, test")
        self.seed, self.count = list(self.SIZES).index(split), self.SIZES[split]

    def __len__(self):
        return self.count

    def __getitem__(self, row: int) -> dict:
        pixels, label = draw_shape(self.seed, row)
        return dict(image=PIL.Image.fromarray(pixels), label=label)


# ---------------------------------------------------------------------------- decoding


def decode(cell, size: int) -> np.ndarray:
    """An encoded image -> uint8 [3, size, size]: upright RGB, short side resized, centre-cropped.

    cell: a PIL image, or {"bytes", "path"} as `datasets` gives it. size 0 keeps the image as it is.
    Raises ValueError, OSError or a PIL error when the image cannot be read.
    """
    if isinstance(cell, PIL.Image.Image):
        image = cell
    elif not cell or not (cell.get("bytes") or cell.get("path")):
        raise ValueError("no image")
    else:
        image = PIL.Image.open(io.BytesIO(cell["bytes"]) if cell.get("bytes") else cell["path"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        if size:
            image.draft("RGB", (size, size))  # lets JPEG decode at 1/2, 1/4 or 1/8 where that suffices
        image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit: PIL would clip at 255 instead of scaling
        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGB")
    if size:
        image = PIL.ImageOps.fit(image, (size, size), PIL.Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


# ---------------------------------------------------------------------------- store


class Store:
    """Decoded images in a folder: images `uint8 [N, 3, S, S]` (memory map), labels `int64 [N]`.

    Labels are -1 where there are none. `rows` are the images' positions in the source; `info` says
    what the store was made from and lists the images that could not be read.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.info = json.loads((self.path / "info.json").read_text())
        self.size = self.info["size"]

    def __len__(self) -> int:
        return self.info["images"]

    def __reduce__(self):  # a loader process opens the map itself instead of receiving a copy
        return Store, (self.path,)

    @cached_property
    def images(self) -> np.memmap:
        return np.memmap(self.path / "images.u8", np.uint8, "r", shape=(len(self), 3, self.size, self.size))

    @cached_property
    def labels(self) -> np.ndarray:
        return np.load(self.path / "labels.npy")

    @cached_property
    def rows(self) -> np.ndarray:
        return np.load(self.path / "rows.npy")


class _Decoder(Dataset):
    """Batches of row numbers -> decoded images, labels, kept rows and what could not be read."""

    def __init__(self, source, image: str, label: str, size: int):
        self.source, self.image, self.label, self.size = source, image, label, size

    def __getitems__(self, rows: list[int]):
        images, labels, kept, bad = [], [], [], []
        for row in rows:
            try:
                item = self.source[row]
                images.append(decode(item[self.image], self.size))
                label = item[self.label] if self.label else None
                labels.append(-1 if label is None else int(label))
                kept.append(row)
            except Exception as error:  # PIL raises nearly anything on hostile bytes
                bad.append((row, f"{type(error).__name__}: {error}"[:200]))
        return images, labels, kept, bad


def _same(batch):
    return batch


def open_store(cfg, split: str, size_limit: int, max_samples: int = 0) -> Store:
    """The store of one split, built first if it is not there yet.

    cfg: anything with the data fields of Config. split: a name, or "" for test, else validation.
    size_limit: stored size at most, unless cfg.store_size says otherwise. Found again by a
    fingerprint of all that determines it; a Hub dataset counts by its name, a folder by its files.
    Raises UserError as `open_source` does, and when too many images are unreadable.
    """
    wanted = [cfg.dataset, split, cfg.image_column, cfg.label_column, cfg.store_size or -size_limit, max_samples]
    if cfg.dataset not in DATASETS and Path(cfg.dataset).is_dir():
        wanted += sorted(
            (str(p.relative_to(cfg.dataset)), p.stat().st_size, p.stat().st_mtime_ns)
            for p in Path(cfg.dataset).rglob("*") if p.is_file()
        )
    digest = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:12]
    slug = "".join(c if c.isalnum() else "_" for c in cfg.dataset).strip("_").lower()[-40:]
    path = Path(cfg.cache_dir) / "stores" / f"{slug}-{split or 'test'}-{digest}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # other ranks and other runs wait here for the one that builds
        if not path.exists():
            _build_store(cfg, split, size_limit, max_samples, path)
    return Store(path)


def _build_store(cfg, split: str, size_limit: int, max_samples: int, path: Path) -> None:
    if cfg.dataset == "shapes":
        split = split or "test"
        source, image, label = Shapes(split), "image", "label"
    else:
        source, image, label, split = open_source(cfg.dataset, split, cfg.image_column, cfg.label_column)
    rows = np.arange(len(source))
    if 0 < max_samples < len(rows):
        rows = np.sort(np.random.default_rng(0).permutation(len(rows))[:max_samples])
    size = cfg.store_size or _native_size(source, image, rows, size_limit)
    workers = cfg.num_workers if cfg.num_workers >= 0 else os.cpu_count()
    loader = DataLoader(
        _Decoder(source, image, label, size), batch_size=256, sampler=rows.tolist(),
        num_workers=workers, collate_fn=_same,
    )
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a build that was killed
    temporary.mkdir()
    labels, kept, bad = [], [], []
    progress = tqdm(total=len(rows), unit="img", desc=f"decoding {cfg.dataset} {split}", disable=None)
    with open(temporary / "images.u8", "wb") as file, progress:
        for images, batch_labels, batch_kept, batch_bad in loader:
            file.writelines(image.tobytes() for image in images)
            labels += batch_labels
            kept += batch_kept
            bad += batch_bad
            progress.update(len(batch_kept) + len(batch_bad))
    if not kept or len(bad) > cfg.max_bad * len(rows):
        shutil.rmtree(temporary)
        some = "".join(f"\n  row {row}: {why}" for row, why in bad[:5])
        raise UserError(
            f"{len(bad)} of {len(rows)} images of {cfg.dataset} {split} cannot be read "
            f"(--max_bad allows {cfg.max_bad:.0%}):{some}" if len(rows) else f"dataset {cfg.dataset} {split} is empty"
        )
    if bad:
        warnings.warn(f"skipped {len(bad)} unreadable images, listed in {path / 'info.json'}", stacklevel=2)
    np.save(temporary / "labels.npy", np.array(labels, np.int64))
    np.save(temporary / "rows.npy", np.array(kept, np.int64))
    info = dict(dataset=cfg.dataset, split=split, images=len(kept), size=size, label_column=label, unreadable=bad)
    (temporary / "info.json").write_text(json.dumps(info))
    temporary.rename(path)


def _native_size(source, image: str, rows, limit: int) -> int:
    sides = []
    for row in rows[:64]:
        try:
            sides.append(min(decode(source[int(row)][image], 0).shape[1:]))
        except Exception:  # counted and reported by the build
            continue
    return min(int(np.median(sides)), limit) if sides else limit


# ---------------------------------------------------------------------------- batches


class _Rows(Dataset):
    """A whole batch in one copy out of the map: indices -> (uint8 [B, 3, S, S], int64 [B])."""

    def __init__(self, store: Store):
        self.store = store

    def __getitems__(self, indices):
        return torch.from_numpy(self.store.images[indices]), torch.as_tensor(indices)


def epoch_order(images: int, samples: int, seed: int, epoch: int) -> np.ndarray:
    """The images of an epoch, in order: a permutation from (seed, epoch), its first `samples`."""
    order = np.random.default_rng([seed, ORDER, epoch]).permutation(images)
    return order[: samples or images]


def loader(store: Store, order: np.ndarray, batch_size: int, rank: int, world: int, first: int,
           workers: int, pin: bool) -> DataLoader:
    """Batches `first`, `first + 1`, ... of `order`, this rank's share of each; the last, incomplete
    one is left out. Yields (uint8 [B / world, 3, S, S], int64 [B / world])."""
    full = order[: len(order) // batch_size * batch_size].reshape(-1, world, batch_size // world)
    return DataLoader(
        _Rows(store), batch_sampler=list(full[first:, rank]), num_workers=workers, collate_fn=_same,
        pin_memory=pin, persistent_workers=False,
    )


# ---------------------------------------------------------------------------- views


def uniform(seed: int, stream: int, number: int, index: Tensor, count: int) -> Tensor:
    """Counter-based random numbers: float64 [B, count] in [0, 1), a function of the arguments alone.

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


def view(seed: int, number: int, index: Tensor, scale: tuple, stream: int = VIEW) -> Tensor:
    """View `number` of each image: a random crop and flip, boxes float32 [B, 4].

    index: int64 [B]. scale: smallest and largest area. Aspect ratio 3/4 to 4/3, mirrored half of
    the time (torchvision's RandomResizedCrop, without its rejection loop).
    """
    u = uniform(seed, stream, number, index, 5).unbind(1)
    area = scale[0] + (scale[1] - scale[0]) * u[0]
    ratio = (4 / 3) ** (2 * u[1] - 1)
    w, h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    x, y = u[2] * (1 - w), u[3] * (1 - h)
    mirrored = u[4] < 0.5
    x, w = torch.where(mirrored, x + w, x), torch.where(mirrored, -w, w)
    return torch.stack([x, y, w, h], 1).float()


def inside(outer: Tensor, inner: Tensor) -> Tensor:
    """Boxes [B, 4] given in shares of other boxes [B, 4] -> boxes in shares of the image."""
    origin, extent = outer[:, :2], outer[:, 2:]
    return torch.cat([origin + extent * inner[:, :2], extent * inner[:, 2:]], 1)


def render(images: Tensor, boxes: Tensor | None, size: int) -> Tensor:
    """Cut boxes out of stored images and resize them: float32 [B, 3, size, size] in [0, 1].

    images: uint8 [B, 3, S, S]. boxes: float [B, 4], None for the whole image. Bicubic with
    anti-aliasing, as PIL's `resize(box=...)`; separable, so two matrix products per image do it.
    """
    B, S = len(images), images.shape[-1]
    if boxes is None:
        boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(B, 4)
    boxes = boxes.to(images.device, non_blocking=True)
    across = _resize_matrix(boxes[:, 0], boxes[:, 2], size, S)
    down = _resize_matrix(boxes[:, 1], boxes[:, 3], size, S)
    with torch.autocast(images.device.type, enabled=False):
        pixels = images.float() / 255
        out = down[:, None] @ (pixels @ across[:, None].mT)
    return out.clamp(0, 1)


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


def jitter(images: Tensor, seed: int, epoch: int, index: Tensor, strength: float) -> Tensor:
    """Colour jitter with its own parameters for each image; float32 [B, 3, H, W] in [0, 1].

    With strength s: brightness and contrast 1 +- s, saturation 1 +- s/2, hue +- s/4 of a turn, and
    gray with probability s/2 (DINOv2's proportions at s = 0.4). All but the contrast's mean is
    linear in a pixel's colour, so one 3x3 matrix per image does everything.
    """
    if strength == 0:
        return images
    u = uniform(seed, JITTER, epoch, index, 5).float()
    brightness, contrast, saturation, turn = (1 + strength * (2 * u[:, :4] - 1) * torch.tensor([1, 1, 0.5, 0.25])).T
    saturation = torch.where(u[:, 4] < strength / 2, 0.0, saturation)[:, None, None]
    angle = 2 * torch.pi * turn  # around a full turn: 1 is no change
    rotation = torch.eye(3).repeat(len(u), 1, 1)
    rotation[:, 1, 1] = rotation[:, 2, 2] = angle.cos()
    rotation[:, 2, 1] = angle.sin()
    rotation[:, 1, 2] = -rotation[:, 2, 1]
    hue = torch.linalg.inv(YIQ) @ rotation @ YIQ
    luma = torch.tensor(LUMA).expand(3, 3)
    matrix = (saturation * torch.eye(3) + (1 - saturation) * luma) @ hue * brightness[:, None, None]
    matrix, contrast, brightness = (
        t.to(images.device, non_blocking=True) for t in (matrix, contrast, brightness)
    )
    mean = (images.mean((2, 3)) @ luma[0].to(images.device)) * brightness  # luma survives hue, saturation
    colours = (contrast[:, None, None] * matrix) @ images.flatten(2)
    return (colours + ((1 - contrast) * mean)[:, None, None]).clamp(0, 1).view_as(images)
