"""Every kind of image that people have, in a parquet file and in a folder, and what becomes of it.

One table: a name, what is in the file or the cell, and the outcome. Most pictures are four coloured
quarters, so that their outcome shows orientation, colours and the frame that was taken.
"""

import io
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest

import data
from config import Config, UserError

COLOURS = dict(
    r=(255, 0, 0),
    g=(0, 255, 0),
    b=(0, 0, 255),
    y=(255, 255, 0),
    k=(0, 0, 0),
    d=(85, 85, 85),  # dark gray
    m=(128, 128, 128),
    l=(170, 170, 170),  # light gray
    w=(255, 255, 255),
)
TOLERANCE = 24  # of 255: JPEG and LAB are lossy; colours above differ by 42 and more
OURS = str(Path(__file__).parents[1] / "assets" / "progress.png")  # no stranger's business
SIDE = 64  # of most pictures; they are stored at half of it


def quarters(*values, dtype=np.uint8) -> np.ndarray:
    """Upper left, upper right, lower left, lower right: [SIDE, SIDE] or [SIDE, SIDE, channels]."""
    values = np.array(values, dtype).reshape(2, 2, -1).squeeze()
    return values.repeat(SIDE // 2, 0).repeat(SIDE // 2, 1)


def picture(colours: str = "rgby", alpha: tuple = ()) -> PIL.Image.Image:
    image = PIL.Image.fromarray(quarters(*(COLOURS[c] for c in colours)))
    if alpha:
        image.putalpha(gray(*alpha))
    return image


def gray(*values, dtype=np.uint8) -> PIL.Image.Image:
    return PIL.Image.fromarray(quarters(*values, dtype=dtype))


def palette(*fourth: int) -> PIL.Image.Image:
    image = gray(0, 1, 2, 3)
    image.putpalette([*COLOURS["r"], *COLOURS["g"], *COLOURS["b"], *fourth])
    return image


def stripe(size: tuple) -> PIL.Image.Image:
    """Red in the middle, green at the ends."""
    image = PIL.Image.new("RGB", size, COLOURS["g"])
    image.paste(COLOURS["r"], tuple(v // 3 for v in size) + tuple(-(-2 * v // 3) for v in size))
    return image


def noise() -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    return PIL.Image.fromarray(pixels)


def saved(image: PIL.Image.Image, kind: str, **how) -> bytes:
    image.save(buffer := io.BytesIO(), kind, **how)
    return buffer.getvalue()


def turned(kind: str, orientation: int, **how) -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "a camera"
    return saved(picture(), kind, exif=exif, **how)


def unwritable(photo: bytes) -> bytes:
    """The camera's name (tag 271) becomes the image's width (256), which is no text."""
    return photo.replace(b"\x01\x0f\0\x02", b"\x01\x00\0\x02")


def animated(kind: str, **how) -> bytes:
    return saved(picture(), kind, save_all=True, append_images=[picture("kkkk")], **how)


def cut(content: bytes) -> bytes:
    return content[: len(content) * 3 // 4]


def raw_png(width: int, height: int, depth: int, colour_type: int, pixels: bytes) -> bytes:
    """A PNG by its specification: what PIL cannot write, or would take long to."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def deep_png(colour_type: int, *values) -> bytes:
    pixels = quarters(*values, dtype=">u2").reshape(SIDE, -1)
    lines = (b"\0" + line.tobytes() for line in pixels * 257)  # "\0": not predicted from another
    return raw_png(SIDE, SIDE, 16, colour_type, b"".join(lines))


def bitmap_565(*colours: str) -> bytes:
    """A BMP of 5 bits of red, 6 of green and 5 of blue, from the last line to the first."""
    masks = 0xF800, 0x07E0, 0x001F
    pixels = quarters(*([COLOURS[c] for c in colours])) > 127
    pixels = (pixels * np.array(masks, "<u2")).sum(2).astype("<u2")[::-1].tobytes()
    header = struct.pack("<IiiHHII", 40, SIDE, SIDE, 1, 16, 3, len(pixels))
    header += bytes(16) + struct.pack("<III", *masks)
    sizes = struct.pack("<IHHI", 14 + len(header) + len(pixels), 0, 0, 14 + len(header))
    return b"BM" + sizes + header + pixels


def planar_tiff(*colours: str) -> bytes:
    """A TIFF of 16 bits a colour, and a plane for each, as satellites' images are."""
    planes = quarters(*([COLOURS[c] for c in colours]), dtype="<u2").transpose(2, 0, 1) * 257
    length = planes.nbytes // 3
    # Of three values their place: bits of a colour, places and lengths of the planes.
    tags = {256: SIDE, 257: SIDE, 258: 134, 259: 1, 262: 2, 273: 140, 277: 3, 278: SIDE, 279: 152,
            284: 2}
    entries = b"".join(
        struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 3 if value > 99 else 1, value)
        for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    assert len(head) == tags[258]
    places = [164 + plane * length for plane in range(3)]
    return head + struct.pack("<3H6I", *[16] * 3, *places, *[length] * 3) + planes.tobytes()


def directory(path: Path):
    path.mkdir()


def dangling_link(path: Path):
    path.symlink_to("nowhere.jpg")


def link(path: Path):
    path.with_name("origin").write_bytes(saved(picture(), "png"))  # no image by its name
    path.symlink_to("origin")


def pipe(path: Path):
    os.mkfifo(path)


QUARTERS_16 = 0, 0x5555, 0xAAAA, 0xFFFF  # k, d, l, w
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
PASSED_OVER = None

# Content: bytes, for both sources; a function of a path, for the folder; a cell, for the parquet
# file. Outcome: the four quarters; words of the reason; or PASSED_OVER, what `datasets` does not
# take for a file.
CASES = [
    ("plain.png", saved(picture(), "png"), "rgby"),
    ("plain.bmp", saved(picture(), "bmp"), "rgby"),
    ("plain.gif", saved(picture(), "gif"), "rgby"),
    ("plain.tif", saved(picture(), "tiff"), "rgby"),
    ("plain.webp", saved(picture(), "webp", lossless=True), "rgby"),
    ("baseline.jpg", saved(picture(), "jpeg", quality=95), "rgby"),
    ("progressive.jpg", saved(picture(), "jpeg", quality=95, progressive=True), "rgby"),
    ("upper case.JPG", saved(picture(), "jpeg", quality=95), "rgby"),
    ("odd näme #1 [2].png", saved(picture(), "png"), "rgby"),
    ("png by another name.jpg", saved(picture(), "png"), "rgby"),
    # a photograph held upright
    ("exif 1.jpg", turned("jpeg", 1, quality=95), "rgby"),
    ("exif 2.jpg", turned("jpeg", 2, quality=95), "gryb"),
    ("exif 3.jpg", turned("jpeg", 3, quality=95), "ybgr"),
    ("exif 4.jpg", turned("jpeg", 4, quality=95), "byrg"),
    ("exif 5.jpg", turned("jpeg", 5, quality=95), "rbgy"),
    ("exif 6.jpg", turned("jpeg", 6, quality=95), "bryg"),
    ("exif 7.jpg", turned("jpeg", 7, quality=95), "ygbr"),
    ("exif 8.jpg", turned("jpeg", 8, quality=95), "gyrb"),
    ("exif 9.jpg", turned("jpeg", 9, quality=95), "rgby"),
    ("exif junk.jpg", saved(picture(), "jpeg", quality=95, exif=b"Exif\0\0junk"), "rgby"),
    ("exif junk.png", saved(picture(), "png", exif=b"Exif\0\0junk"), "rgby"),
    ("exif unwritable.jpg", unwritable(turned("jpeg", 6, quality=95)), "bryg"),
    ("exif 6.png", turned("png", 6), "bryg"),
    ("exif 6.webp", turned("webp", 6, lossless=True), "bryg"),
    ("exif 6.tif", turned("tiff", 6), "bryg"),
    # other colours
    ("gray.png", saved(gray(0, 85, 170, 255), "png"), "kdlw"),
    ("gray.jpg", saved(gray(0, 85, 170, 255), "jpeg", quality=95), "kdlw"),
    ("one bit.png", saved(picture("kwwk").convert("1"), "png"), "kwwk"),
    ("palette.png", saved(palette(255, 255, 0), "png"), "rgby"),
    ("cmyk.jpg", saved(picture().convert("CMYK"), "jpeg", quality=95), "rgby"),
    ("cmyk.tif", saved(picture().convert("CMYK"), "tiff"), "rgby"),
    ("lab.tif", saved(picture().convert("LAB"), "tiff"), "rgby"),
    # more than 8 bits
    ("16 bit.png", saved(gray(*QUARTERS_16, dtype=np.uint16), "png"), "8 bits"),
    ("16 bit.tif", saved(gray(*QUARTERS_16, dtype=np.uint16), "tiff"), "8 bits"),
    ("16 bit dark.png", saved(gray(0, 0x5555, 0x5555, 0, dtype=np.uint16), "png"), "8 bits"),
    (
        "16 bit.pgm",
        b"P5 %d %d 65535\n" % (SIDE, SIDE) + quarters(*QUARTERS_16, dtype=">u2").tobytes(),
        "8 bits",
    ),
    ("16 bit rgb.png", deep_png(2, *(COLOURS[c] for c in "rgdl")), "8 bits"),
    ("16 bit rgb alpha.png", deep_png(6, *((*COLOURS[c], 255) for c in "rgdl")), "8 bits"),
    ("16 bit gray alpha.png", deep_png(4, (0, 255), (85, 255), (170, 255), (0, 0)), "8 bits"),
    ("16 bit rgb.ppm", b"P6 %d %d 65535\n" % (SIDE, SIDE) + bytes(6 * SIDE**2), "8 bits"),
    ("16 bit rgb.tif", planar_tiff(*"rgdl"), "8 bits"),
    ("16 bits a pixel.bmp", bitmap_565(*"rgby"), "rgby"),
    ("32 bit.tif", saved(gray(0, 2**29, 2**30, 3 * 2**29, dtype=np.int32), "tiff"), "8 bits"),
    ("32 bit holding 16.tif", saved(gray(*QUARTERS_16, dtype=np.int32), "tiff"), "8 bits"),
    ("float.tif", saved(gray(0, 1 / 3, 2 / 3, 1, dtype=np.float32), "tiff"), "8 bits"),
    ("float dark.tif", saved(gray(0, 1 / 3, 1 / 3, 0, dtype=np.float32), "tiff"), "8 bits"),
    ("float to 3000.tif", saved(gray(0, 1e3, 2e3, 3e3, dtype=np.float32), "tiff"), "8 bits"),
    ("float gaps.tif", saved(gray(np.nan, 1 / 3, -9, np.inf, dtype=np.float32), "tiff"), "8 bits"),
    # transparent: the colour below
    ("rgba.png", saved(picture(alpha=(255, 255, 255, 0)), "png"), "rgby"),
    ("rgba.webp", saved(picture(alpha=(255, 255, 255, 0)), "webp", lossless=True), "rgbk"),
    ("rgba.tif", saved(picture(alpha=(255, 255, 255, 0)), "tiff"), "rgby"),
    ("half transparent.png", saved(picture("rgbk", (255, 255, 255, 127)), "png"), "rgbk"),
    ("gray alpha.png", saved(gray(0, 85, 170, 0).convert("LA"), "png"), "kdlk"),
    ("gray transparent.png", saved(gray(0, 85, 170, 9), "png", transparency=9), "kdlk"),
    ("rgb transparent.png", saved(picture(), "png", transparency=COLOURS["y"]), "rgby"),
    ("palette transparent.png", saved(palette(255, 255, 0), "png", transparency=3), "rgby"),
    (
        "palette half transparent.png",
        saved(palette(0, 0, 0), "png", transparency=bytes([255, 255, 255, 127])),
        "rgbk",
    ),
    ("palette transparent.gif", saved(palette(255, 255, 0), "gif", transparency=3), "rgby"),
    # the first frame
    ("animated.gif", animated("gif"), "rgby"),
    ("animated.webp", animated("webp", lossless=True), "rgby"),
    ("animated.png", animated("png"), "rgby"),
    ("pages.tif", animated("tiff"), "rgby"),
    # odd sizes
    ("1x1.png", saved(PIL.Image.new("RGB", (1, 1), COLOURS["r"]), "png"), "rrrr"),
    ("1x5000.png", saved(stripe((1, 5000)), "png"), "rrrr"),
    ("5000x1.jpg", saved(stripe((5000, 1)), "jpeg", quality=95), "rrrr"),
    ("bomb.png", raw_png(30_000, 30_000, 8, 2, b"\0"), "bomb"),
    ("no size.png", raw_png(0, 0, 8, 2, b""), "cannot identify image file"),
    # not readable
    ("truncated.jpg", cut(saved(noise(), "jpeg")), "truncated"),
    ("truncated progressive.jpg", cut(saved(noise(), "jpeg", progressive=True)), "truncated"),
    ("truncated.png", cut(saved(noise(), "png")), "truncated"),
    ("truncated.gif", cut(saved(noise(), "gif")), "truncated"),
    ("truncated.bmp", cut(saved(noise(), "bmp")), "truncated"),
    ("truncated.tif", cut(saved(noise(), "tiff")), "truncated"),
    ("truncated.webp", cut(saved(noise(), "webp")), "decoder"),
    ("only the header.png", saved(noise(), "png")[:33], "cannot identify image file"),
    ("zero bytes.jpg", b"", "cannot identify image file"),
    ("text.jpg", b"<html>404 Not Found</html>" * 20, "cannot identify image file"),
    ("zeros.jpg", bytes(5000), "cannot identify image file"),
    ("program.jpg", POSTSCRIPT, "cannot identify image file"),
    ("named alike.png", dict(bytes=b"", path=__file__), "cannot identify image file"),
    ("ours", dict(bytes=None, path=OURS), "outside the data set's folder"),
    ("somebody's", dict(bytes=None, path="ours.png"), "No such file"),
    ("NULL", None, "no image"),
    ("NULL within", dict(bytes=None, path=None), "no image"),
    # files that are none
    ("link.png", link, "rgby"),
    ("directory.jpg", directory, PASSED_OVER),
    ("dangling link.jpg", dangling_link, PASSED_OVER),
    ("pipe.jpg", pipe, PASSED_OVER),
]
SOURCES = dict(
    parquet=[case for case in CASES if not callable(case[1])],
    folder=[case for case in CASES if callable(case[1]) or isinstance(case[1], bytes)],
)


def readable(outcome: str | None) -> bool:
    return set(outcome or "passed over") <= COLOURS.keys()


def config(root: Path, source: str, **changes) -> Config:
    changes = dict(cache_dir=str(root / "cache")) | changes
    return Config(dataset=str(root / source), teacher_size=SIDE // 2, student_size=SIDE // 2,
                  **changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a parquet file and a folder of images."""
    root = tmp_path_factory.mktemp("images")
    cells = [
        dict(bytes=content, path=name) if isinstance(content, bytes) else content
        for name, content, _ in SOURCES["parquet"]
    ]
    # Not by `datasets`, which would open what the paths name.
    schema = datasets.Features(image=datasets.Image()).arrow_schema
    (root / "parquet").mkdir()
    rows = pyarrow.table([pyarrow.array(cells, schema.field("image").type)], schema)
    pyarrow.parquet.write_table(rows, root / "parquet" / "train.parquet")
    (root / "folder").mkdir()
    for name, content, _ in SOURCES["folder"]:
        path = root / "folder" / name
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
    return root


@pytest.fixture(scope="module")
def outcomes(root):
    """Source -> name -> stored pixels uint8 [3, S, S], or the file and the reason."""
    found = {}
    for source, cases in SOURCES.items():
        cfg = config(root, source)
        store = data.open_store(cfg, "train")
        names = [name for name, *_ in cases]
        if source == "folder":
            names = data.open_source(cfg, "train").names
        pixels = store.images[np.arange(len(store))].numpy()
        info = json.loads(store.images.paths[0].with_name("info.json").read_text())
        bad = dict(info["unreadable"])
        read = [name for row, name in enumerate(names) if row not in bad]
        found[source] = dict(zip(read, pixels, strict=True))
        found[source] |= {names[row]: why for row, why in bad.items()}
    return found


@pytest.mark.parametrize(
    "source, name, expected",
    [
        pytest.param(source, name, expected, id=f"{source}-{name}")
        for source, cases in SOURCES.items()
        for name, _, expected in cases
    ],
)
def test_every_image_has_its_outcome(outcomes, source, name, expected):
    found = outcomes[source].get(name)
    if expected is PASSED_OVER:
        assert found is None
    elif readable(expected):
        assert isinstance(found, np.ndarray), found
        middles = found.reshape(3, 2, SIDE // 4, 2, SIDE // 4)[:, :, 4:-4, :, 4:-4]
        got = middles.mean((2, 4)).reshape(3, 4).T
        assert abs(got - [COLOURS[c] for c in expected]).max() < TOLERANCE, got.round()
    else:
        assert not isinstance(found, np.ndarray), "it was decoded"
        assert expected in found and "object at 0x" not in found
        assert source == "parquet" or name in found


def test_a_folder_is_read_behind_a_link_and_its_own_list_of_files_ignored(tmp_path):
    (tmp_path / "a.png").write_bytes(saved(picture(), "png"))
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "a.png", tmp_path / "folder")
    (tmp_path / "link").symlink_to("folder")
    assert len(data.open_store(config(tmp_path, "link"), "train")) == 1
    (tmp_path / "folder" / "metadata.csv").write_text("file_name\n../a.png\n")
    assert len(data.open_store(config(tmp_path, "folder"), "train")) == 1


def test_images_none_of_which_can_be_read_are_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(b"text")
    with pytest.raises(UserError, match="no image of train can be read .*a.png"):
        data.open_store(config(tmp_path, "folder"), "train")
