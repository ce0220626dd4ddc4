"""The notebook runs from top to bottom, and is committed with what it showed."""

import json
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "train_kd.ipynb"


def check(cells: list, keeps: float) -> None:
    """Pictures and figures of a run; `cells` as the notebook's JSON has them. keeps: the student's
    k-NN accuracy as a share of its teacher's, at least."""
    outputs = [out for cell in cells for out in cell.get("outputs", [])]
    assert not [out for out in outputs if out["output_type"] == "error"]
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 3, "views, the written-out epoch, the whole run"
    text = "".join("".join(out.get("text", "")) for out in outputs)
    knn = {row: float(re.search(rf"^ *{row}.*?([\d.]+)%", text, re.M)[1])
           for row in ("teacher demo", "student, untrained", "student, epoch")}
    assert knn["teacher demo"] > 95 and knn["student, untrained"] < 50
    assert knn["student, epoch"] > keeps * knn["teacher demo"]
    assert float(re.search(r"largest difference (\S+)", text)[1]) < 1e-5


def test_the_notebook_is_committed_executed():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    check(cells, 0.95)
    paths = re.findall(r"/(?:home|root|tmp|work|opt|usr)/", NOTEBOOK.read_text())
    assert not paths, "of a machine"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("matplotlib")
    pytest.importorskip("ipykernel")
    for file in ROOT.glob("*.py"):  # a copy: the run must not find an older one
        shutil.copy(file, tmp_path)
    for name in ("demo", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    settings = (tmp_path / "config.py").read_text()
    assert settings.count("epochs=10,") == 1  # the demo's; a quarter of its images show the same
    (tmp_path / "config.py").write_text(
        settings.replace("epochs=10,", "epochs=10, max_samples=2000,"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = dict(metadata=dict(path=str(tmp_path / "notebooks")))
    nbclient.NotebookClient(notebook, timeout=600, resources=where, kernel_name="python3").execute()
    check(notebook.cells, 0.6)
