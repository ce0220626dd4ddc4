"""The notebook runs from top to bottom and shows what it promises; in git it holds no outputs."""

import json
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "train_kd.ipynb"


def test_the_notebook_holds_no_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5 and all(c["outputs"] == [] and c["execution_count"] is None for c in code)


@pytest.mark.slow
def test_the_notebook_trains_a_student_and_shows_it(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("matplotlib")
    pytest.importorskip("ipykernel")
    for file in ROOT.glob("*.py"):  # a copy: the run must not find an older one, nor leave its own
        shutil.copy(file, tmp_path)
    for folder in ("assets", "notebooks"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    notebook = nbformat.read(tmp_path / "notebooks" / NOTEBOOK.name, as_version=4)
    where = dict(metadata=dict(path=str(tmp_path / "notebooks")))
    nbclient.NotebookClient(notebook, timeout=600, resources=where, kernel_name="python3").execute()

    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    text = "".join(out.get("text", "") for out in outputs)
    assert len(pictures) == 4, "images, views, curves, patches"
    accuracy = {row: float(re.search(rf"^\| {row}.*?([\d.]+)%", text, re.M)[1])
                for row in ("teacher demo", "student, untrained", "student, epoch 14")}
    assert accuracy["teacher demo"] > 95 and accuracy["student, untrained"] < 50
    assert accuracy["student, epoch 14"] > 90
    assert float(re.search(r"largest difference (\S+)", text)[1]) < 1e-5
    assert float(re.search(r"mean cosine of patches: (\S+)", text)[1]) > 0.5
    assert re.search(r"100%\|.*step", text), "the progress bar showed"
