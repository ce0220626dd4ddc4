"""What --stored_size is worth: views cut out of larger stored images.

    python results/few/stored.py TINY_IMAGENET WEIGHTS 0 1 2  # seeds
    python results/few/stored.py --table

10,000 photographs of 64 px of 190 classes of Tiny ImageNet (few.py), EfficientNet-Lite0 with
ImageNet's WEIGHTS at 48 px, a ResNet-10t at 32 px. By default images are stored at 48 px, so that
a crop is enlarged for the teacher. Quick k-NN on 2,000 test images. Each run adds a line to
stored.jsonl."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import few  # noqa: E402
import records  # noqa: E402

import model  # noqa: E402
import train  # noqa: E402
from config import Config  # noqa: E402

RUNS = HERE / "stored.jsonl"
SIZES = 0, 64
BASE = few.BASE | dict(dataset=str(few.FOLDER / "others"), max_samples=10_000, teacher_size=48,
                       student_size=32, teacher_views=2, epochs=6, eval_every=6,
                       eval_at_end=False)


def run(size, seed, weights):
    cfg = Config(**BASE | dict(stored_size=size, seed=seed, teacher_weights=weights,
                               run_dir=f"runs/stored/{size}-{seed}"))
    last = train.main(cfg)
    line = dict(stored_size=size, seed=seed, loss=last["loss"], seconds=last["seconds"],
                knn20=last["test_knn20"])
    records.add(RUNS, line | model.environment(model.pick_device("auto")))


def table():
    rows = [["stored at", "k-NN"]]
    for size in SIZES:
        found = [100 * line["knn20"] for line in records.known(RUNS) if line["stored_size"] == size]
        rows.append([f"{size or 48} px", records.mean_and_spread(found)])
    return records.markdown(*rows)


if __name__ == "__main__":
    if "--table" in sys.argv:
        print(table())
    else:
        images, weights, *seeds = sys.argv[1:]
        few.split(images)
        for seed in map(int, seeds):
            for size in SIZES:
                run(size, seed, weights)
