"""Few images: what helps a student that learns from 2,500 photographs of ten classes.

    python results/few/few.py TINY_IMAGENET WEIGHTS "40 epochs" "16 views@1"  # rows, of a seed
    python results/few/few.py --table                                         # runs.jsonl

The photographs are ten classes of Tiny ImageNet, every twentieth, 250 images of each to learn from
and 50 to test on, 64 px wide. The other 190 classes are the larger set of images that one may have
beside them. The teacher is EfficientNet-Lite0 with ImageNet's weights, WEIGHTS, at 96 px. Each run
adds a line to runs.jsonl."""

import sys
from pathlib import Path

import datasets
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import records  # noqa: E402

import model  # noqa: E402
import train  # noqa: E402
from config import Config  # noqa: E402

FOLDER = Path("cache/few")
BASE = dict(dataset=str(FOLDER / "own"), test_split="valid", teacher="tf_efficientnet_lite0",
            teacher_size=96, student="resnet10t", student_size=48, optimiser="muon", lr=5e-3,
            student_args="layers=(1,1,1,0) channels=(64,128,256,256) stem_width=16",
            batch_size=64, epochs=40, save_every=0, eval_at_end=True)
OTHERS = "190 other classes"
ROWS = {  # settings that differ from BASE
    "40 epochs": {},
    "10 epochs": dict(epochs=10),
    "40 epochs, batches of 256": dict(batch_size=256),
    "16 views": dict(teacher_views=16),
    OTHERS: dict(dataset=str(FOLDER / "others"), batch_size=256, teacher_views=1, epochs=2,
                 eval_dataset=str(FOLDER / "own")),
    "from 190 other classes": dict(student_weights=f"runs/few/{OTHERS}-0/student.safetensors"),
    "from 190 other classes, 10 epochs": dict(
        student_weights=f"runs/few/{OTHERS}-0/student.safetensors", epochs=10),
}


def split(images):
    """Write both data sets."""
    if FOLDER.exists():
        return
    rows = datasets.load_dataset(images)
    for name in ("own", "others"):
        parts = {}
        for part in ("train", "valid"):
            own = np.array(rows[part]["label"]) % 20 == 0
            parts[part] = rows[part].select(np.flatnonzero(own == (name == "own")))
        datasets.DatasetDict(parts).save_to_disk(str(FOLDER / name))


def run(row, weights):
    name, _, seed = row.partition("@")
    cfg = Config(**BASE | ROWS[name] | dict(
        seed=int(seed or 0), teacher_weights=weights, run_dir=f"runs/few/{name}-{seed or 0}"))
    last = train.main(cfg)
    line = dict(row=name, seed=cfg.seed, settings=ROWS[name], loss=last["loss"],
                seconds=last["seconds"], rows=last["eval"])
    records.add(HERE / "runs.jsonl", line | model.environment(model.pick_device("auto")))


def table():
    found = {}
    for line in records.known(HERE / "runs.jsonl"):
        found.setdefault(line["row"], []).append(line)
    rows = [["run", "seeds", "k-NN", "linear", "keeps", "minutes"]]
    for name, lines in found.items():
        figures = [[100 * line["rows"][-1][key] for line in lines]
                   for key in ("knn20", "linear", "keeps_knn20", "keeps_linear")]
        knn, linear, *keeps = map(records.mean_and_spread, figures)
        minutes = records.mean_and_spread([line["seconds"] / 60 for line in lines])
        rows.append([name, len(lines), knn, linear, " / ".join(keeps), minutes])
    return records.markdown(*rows)


if __name__ == "__main__":
    if "--table" in sys.argv:
        print(table())
    else:
        images, weights, *names = sys.argv[1:]
        split(images)
        for row in names:
            run(row, weights)
