"""The lowest loss is the worst model: a map on the teacher's side that trains, against a fixed one.

    python results/collapse/collapse.py        # two runs of the demo, about three minutes

Writes beside this file the metrics of both runs and collapse.png. In the collapsed run both sides
train to one constant: the loss falls far below that of the healthy run, the embeddings of all
images become alike, and k-NN accuracy stays at 41%, where the healthy run reaches 97%.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "recipe")]

import sweep  # noqa: E402

import model  # noqa: E402
import train  # noqa: E402
from config import PRESETS, Config  # noqa: E402

RUNS = {  # name -> objective, colour (Okabe and Ito)
    "fixed map": (model.Distiller, "#0072b2"),
    "trained map": (sweep.TrainedMap, "#d55e00"),
}
PANELS = {  # key of metrics.jsonl -> title, factor
    "loss": ("loss", 1), "similarity": ("similarity of different images", 1),
    "test_knn20": ("k-NN accuracy, %", 100)}


def main() -> None:
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.6), layout="constrained")
    for name, (objective, colour) in RUNS.items():
        file = HERE / f"{name.replace(' ', '_')}.jsonl"
        if not file.exists():
            cfg = Config(**PRESETS["demo"] | dict(eval_every=1, eval_at_end=False, log_every=1000,
                                                  run_dir=f"runs/collapse-{file.stem}"))
            train.main(cfg, objective=objective)
            file.write_text((cfg.run_path / "metrics.jsonl").read_text())
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        lines = [line for line in lines if "test_knn20" in line]
        for axis, (key, (title, factor)) in zip(axes, PANELS.items(), strict=True):
            axis.plot([line["epoch"] for line in lines], [factor * line[key] for line in lines],
                      "o-", markersize=3, color=colour, label=name)
            axis.set(title=title, xlabel="epoch", xticks=range(2, 15, 4))
    axes[0].set_yscale("log")
    untrained = json.loads((HERE.parent / "demo" / "eval.json").read_text())[1]
    axes[2].axhline(100 * untrained["knn20"], color="#999999", linestyle=":", label="untrained")
    axes[2].set_ylim(0, 103)
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(HERE / "collapse.png", dpi=100)


if __name__ == "__main__":
    main()
