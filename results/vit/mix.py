"""The training images of two data sets at 32 px, as one data set without labels.

    python results/vit/mix.py CIFAR10 TINY_IMAGENET FOLDER
"""

import io
import sys

import datasets
import PIL.Image


def shrink(row: dict) -> dict:
    image = row["img"].convert("RGB").resize((32, 32), PIL.Image.Resampling.BICUBIC)
    image.save(out := io.BytesIO(), "PNG")
    return dict(img=dict(bytes=out.getvalue(), path=None))


def images(name: str) -> datasets.Dataset:
    source = datasets.load_dataset(name, split="train")
    column = next(k for k, kind in source.features.items() if isinstance(kind, datasets.Image))
    source = source.select_columns(column).rename_columns({column: "img"})
    return source.map(shrink, features=datasets.Features(img=datasets.Image()), num_proc=8)


if __name__ == "__main__":
    mixed = datasets.concatenate_datasets([images(name) for name in sys.argv[1:3]])
    mixed.to_parquet(f"{sys.argv[3]}/train.parquet")
