"""The demo's images: ten shapes, drawn at any place, size, turn and colour.

`shapes` returns them as a named data set. Nothing else of the project needs this file.
"""

import hashlib
import io

import numpy as np
import PIL.Image
import PIL.ImageDraw

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


SIZES = dict(train=8000, test=2000)


class Drawn:
    """A split that draws its images when asked for them; its methods are those of data.Table."""

    def __init__(self, seed, count):
        self.seed, self.count = seed, count
        digest = hashlib.sha256()
        for index in range(20):
            digest.update(draw_shape(seed, index)[0].tobytes())
        self.key = [count, digest.hexdigest()]  # changes when the code above draws something else

    def __len__(self):
        return self.count

    def cells(self, rows):
        return [dict(bytes=bitmap(draw_shape(self.seed, row)[0])) for row in rows]

    def labels(self, column):
        if column not in ("", "label"):
            return None
        return [list(OUTLINES)[index % len(OUTLINES)] for index in range(self.count)]


def bitmap(pixels: np.ndarray) -> bytes:
    PIL.Image.fromarray(pixels).save(buffer := io.BytesIO(), "bmp")
    return buffer.getvalue()


def shapes() -> dict:
    """Split -> its images; each split is drawn from a seed of its own."""
    return {split: Drawn(seed, count) for seed, (split, count) in enumerate(SIZES.items())}
