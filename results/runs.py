"""Lines of a runs.jsonl, and their means, for the scripts in the folders beside this file."""

import json
import statistics
from pathlib import Path


def known(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def add(file: Path, line: dict) -> None:
    with open(file, "a") as lines:
        lines.write(json.dumps(line) + "\n")


def mean_and_spread(values: list[float], root: float = 1) -> str:
    """Mean ± standard deviation / root, as text; one value alone, or none, as it is."""
    if len(values) < 2:
        return "".join(f"{value:.1f}" for value in values)
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) / root:.1f}"
