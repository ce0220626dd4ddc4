"""The lowest loss is the worst model: a map on the teacher's side that trains, against a fixed one.

    python results/collapse/collapse.py        # two runs of the demo, about three minutes

Writes beside this file runs.jsonl, one line for each run, and collapse.png; runs that are there
already are not repeated. In the collapsed run both sides train to one constant: the loss falls far
below that of the healthy run, the embeddings of all images become alike, and k-NN accuracy stays at
41%, where the healthy run reaches 97%.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "recipe")]

import sweep  # noqa: E402

import model  # noqa: E402
import train  # noqa: E402
from config import PRESETS, Config  # noqa: E402
from results.records import add, known  # noqa: E402

FILE = HERE / "runs.jsonl"
RUNS = {  # name -> objective, colour (Okabe and Ito)
    "fixed map": (model.Distiller, "#0072b2"),
    "trained map": (sweep.TrainedMap, "#d55e00"),
}
PANELS = {  # key of metrics.jsonl -> title, factor
    "loss": ("loss", 1), "similarity": ("similarity of different images", 1),
    "test_knn20": ("k-NN accuracy, %", 100)}


def run(name: str) -> dict:
    """Train, and return what the log has of every epoch."""
    cfg = Config(**PRESETS["demo"] | dict(
        optimiser="adamw", lr=3e-3, epochs=14, eval_every=1, eval_at_end=False, log_every=1000,
        run_dir=f"runs/collapse-{name.replace(' ', '_')}"))
    last = train.main(cfg, objective=RUNS[name][0])
    curve = [{key: line[key] for key in ("epoch", *PANELS)}
             for line in known(cfg.run_path / "metrics.jsonl") if "test_knn20" in line]
    return (dict(name=name, settings="--preset demo --eval_every 1", seconds=last["seconds"],
                 memory_gb=last["memory_gb"]) | model.environment(torch.device("cpu"))
            | dict(curve=curve))


def main() -> None:
    for name in RUNS:
        if name not in {line["name"] for line in known(FILE)}:
            add(FILE, run(name))
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.6), layout="constrained")
    for line in known(FILE):
        for axis, (key, (title, factor)) in zip(axes, PANELS.items(), strict=True):
            epochs, values = zip(*((at["epoch"], factor * at[key]) for at in line["curve"]),
                                 strict=True)
            axis.plot(epochs, values, "o-", markersize=3, color=RUNS[line["name"]][1],
                      label=line["name"])
            axis.set(title=title, xlabel="epoch", xticks=range(2, 15, 4))
    axes[0].set_yscale("log")
    untrained = json.loads((HERE.parent / "demo" / "eval.json").read_text())[1]
    axes[2].axhline(100 * untrained["knn20"], color="#999999", linestyle=":", label="untrained")
    axes[2].set_ylim(0, 103)
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(HERE / "collapse.png", dpi=100)


if __name__ == "__main__":
    main()
