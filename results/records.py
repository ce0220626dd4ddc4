"""Lines of runs.jsonl files, means over them and tables, for the scripts in these folders."""

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


def markdown(*rows: list) -> str:
    """A table whose first row names its columns."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
