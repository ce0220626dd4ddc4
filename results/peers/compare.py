"""LightlyTrain and this program side by side, on the same images from the same teacher.

    python results/peers/compare.py CIFAR10 WEIGHTS LIGHTLY_PYTHON
    python results/peers/compare.py --table                          # runs.jsonl as Markdown

CIFAR10 is a folder of the data set's parquet files, or what results/strong/teacher.py writes as
cache/strong/half: then WEIGHTS are of that teacher, and lines go into strong.jsonl. Otherwise they
are of the stand-in teacher. LIGHTLY_PYTHON is the Python of an environment that has LightlyTrain
(README.md). Both sides train at several learning rates; the best k-NN on held-out training images
chooses one of each, and only that is tested, with SEEDS seeds. Each evaluation adds a line; what is
there already is not repeated.
"""

import dataclasses
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import datasets

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1])]

import eval as evaluation  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from config import Config  # noqa: E402
from results.records import add, known, markdown, mean_and_spread  # noqa: E402

STRONG = "strong" in "".join(sys.argv)  # the teacher that was fine-tuned with labels
RUNS = HERE / ("strong.jsonl" if STRONG else "runs.jsonl")
FOLDER = "peers-strong" if STRONG else "peers"
LEARN, HELD_OUT = 5_120, 5_000  # training images; batches of 128 divide the former
SEEDS = 3
SETTINGS = dict(
    teacher="tf_efficientnet_lite0", teacher_size=64, student="resnet10t", student_size=64,
    batch_size=128, epochs=6, precision="bf16")  # LightlyTrain shows both networks one size
LIGHTLY, OURS = "LightlyTrain", "this program"
RATES = {
    LIGHTLY: (5e-4, 1.5e-3, 5e-3, 1.5e-2, 5e-2),  # default 5e-4; it multiplies by sqrt(128 / 1536)
    OURS: (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),  # default 1e-3
}
if STRONG:
    SETTINGS |= dict(teacher_size=96, student_size=96,
                     student_args="layers=(1,1,2,0) channels=(64,128,224,224) stem_width=16")
    RATES = {LIGHTLY: (5e-3, 1.5e-2, 5e-2), OURS: (3.5e-3, 7e-3, 1.4e-2)}
OWN = dict(optimiser="muon") if STRONG else {}


def write_images(cifar: str, folder: Path) -> Path:
    """CIFAR-10's own PNG files in FOLDER/SPLIT/CLASS: train, validation (held out of it), test."""
    if folder.exists():
        return folder
    load = datasets.load_from_disk if STRONG else datasets.load_dataset
    source = load(cifar).cast_column("img", datasets.Image(decode=False))
    rows = source["train"].shuffle(seed=0)
    part = folder.with_name(folder.name + ".part")
    for split, some in (("train", rows.select(range(LEARN))), ("test", source["test"]),
                        ("validation", rows.select(range(LEARN, LEARN + HELD_OUT)))):
        for number, row in enumerate(some):
            file = part / split / str(row["label"]) / f"{number:05}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(row["img"]["bytes"])
    return part.rename(folder)


def train_lightly(cfg: Config, python: str) -> Path:
    out = cfg.run_path.resolve()
    shutil.rmtree(out, ignore_errors=True)  # of a run that was interrupted
    out.mkdir(parents=True)
    settings = dict(
        images=f"{cfg.dataset}/train", weights=cfg.teacher_weights, out=str(out), lr=cfg.lr,
        teacher=cfg.teacher, student=cfg.student,
        arguments=model.parse_arguments(cfg.student_args), size=cfg.student_size, epochs=cfg.epochs,
        batch_size=cfg.batch_size, seed=cfg.seed)
    subprocess.run([python, HERE / "peer.py", json.dumps(settings)], check=True)
    return out / "run" / "exported_models" / "exported_last.pt"


def evaluate(cfg: Config, backbone: model.Backbone, split: str) -> dict:
    evaluator = evaluation.Evaluator(dataclasses.replace(cfg, test_split=split))
    row = evaluator.evaluate(*evaluator.features(backbone))
    return row | model.environment(evaluator.device)


def run(side: str, lr: float, seed: int, split: str, images: Path, weights: str,
        python: str) -> None:
    """Train a student, unless it is there already, and evaluate it on a split."""
    if (side, lr, seed, split) in known_runs():
        return
    # A cache of its own: the time of every run includes decoding, and embedding by the teacher.
    folder = Path("runs", FOLDER) / f"{side.replace(' ', '_')}-{lr:g}-{seed}"
    cfg = Config(**SETTINGS, **OWN, dataset=str(images), teacher_weights=weights, lr=lr, seed=seed,
                 run_dir=str(folder), cache_dir=f"{folder}-cache", save_every=0)
    finished = folder / "finished.json"
    if not finished.exists():
        begin, cpu = time.time(), cpu_seconds()
        if side == LIGHTLY:
            file = train_lightly(cfg, python)
            # The most of any child so far: LightlyTrain's runs are alike.
            memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
        else:
            memory = train.main(cfg)["memory_gb"]
            file = folder / "student.safetensors"
        facts = dict(minutes=(time.time() - begin) / 60, cpu_minutes=(cpu_seconds() - cpu) / 60,
                     memory_gb=memory)
        if side == LIGHTLY:
            facts["peer"] = json.loads((folder / "versions.json").read_text())
        finished.write_text(json.dumps(dict(file=str(file), facts=facts)))
    done = json.loads(finished.read_text())
    student = model.build_student(dataclasses.replace(cfg, student_weights=done["file"]))
    add_run(dict(side=side, lr=lr, seed=seed, split=split) | done["facts"]
            | evaluate(cfg, student, split))


def run_bounds(images: Path, weights: str) -> None:
    """Test the teacher and an untrained student."""
    cfg = Config(**SETTINGS, dataset=str(images), teacher_weights=weights)
    for side, backbone in (("teacher", model.load_teacher(cfg)),
                           ("student, untrained", model.build_student(cfg))):
        if (side, 0, 0, "test") not in known_runs():
            add_run(dict(side=side, lr=0, seed=0, split="test", minutes=0, cpu_minutes=0)
                    | evaluate(cfg, backbone, "test"))


def add_run(line: dict) -> None:
    names = [row for row in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in row]
    line |= dict(images=LEARN, cpu=names[0].split(": ")[1], cores=len(os.sched_getaffinity(0)))
    add(RUNS, line | SETTINGS)


def cpu_seconds() -> float:
    """Of this process and those that it has waited for; other work on the core does not count."""
    return sum(os.times()[:4])


def known_runs() -> dict:
    """The lines of runs.jsonl by (side, lr, seed, split)."""
    return {(line["side"], line["lr"], line["seed"], line["split"]): line for line in known(RUNS)}


def best_rate(side: str) -> float:
    return max(RATES[side], key=lambda lr: known_runs()[side, lr, 0, "validation"]["knn20"])


def table() -> str:
    """Held-out accuracy of every rate; of the chosen ones test means and their standard errors."""
    rows = [["side", "lr", "images", "seeds", "k-NN", "linear", "CPU minutes"]]
    groups = dict.fromkeys((side, lr, split) for side, lr, _, split in known_runs())
    for side, lr, split in sorted(groups, key=lambda group: (group[2] == "test", group)):
        runs = [line for (*name, seed, where), line in known_runs().items()
                if (*name, where) == (side, lr, split)]
        cells = []
        for key in ("knn20", "linear"):
            values = [100 * line[key] for line in runs]
            cells.append(mean_and_spread(values, len(values) ** 0.5))
        cells.append(f"{statistics.mean(line['cpu_minutes'] for line in runs):.1f}")
        rows.append([side, f"{lr:g}", split, len(runs), *cells])
    return markdown(*rows)


def main(cifar: str, weights: str, python: str) -> None:
    common = write_images(cifar, Path("cache", FOLDER).resolve()), weights, python
    for rates in zip(*RATES.values(), strict=True):
        for side, lr in zip(RATES, rates, strict=True):
            run(side, lr, 0, "validation", *common)
    for seed in range(SEEDS):
        for side in RATES:
            run(side, best_rate(side), seed, "test", *common)
    run_bounds(*common[:2])


if __name__ == "__main__":
    if "--table" in sys.argv:
        print(table())
    else:
        main(*sys.argv[1:])
