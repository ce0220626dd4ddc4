"""The notebook runs from top to bottom and shows what it promises; in git it holds no outputs."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
from test_hub import environment, hub, needs_shared

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "train_kd.ipynb"


def test_the_notebook_holds_no_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5 and all(c["outputs"] == [] and c["execution_count"] is None for c in code)


def execute(folder: Path, edit=lambda source: source) -> tuple[list, str]:
    """Run a copy of the notebook -> outputs of its cells, and their text."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("matplotlib")
    pytest.importorskip("ipykernel")
    for file in ROOT.glob("*.py"):  # a copy: the run must not find an older one, nor leave its own
        shutil.copy(file, folder)
    for name in ("assets", "notebooks"):
        shutil.copytree(ROOT / name, folder / name)
    notebook = nbformat.read(folder / "notebooks" / NOTEBOOK.name, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = edit(first.source)
    where = dict(metadata=dict(path=str(folder / "notebooks")))
    nbclient.NotebookClient(notebook, timeout=600, resources=where, kernel_name="python3").execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    return outputs, "".join(out.get("text", "") for out in outputs)


@pytest.mark.slow
def test_the_notebook_trains_a_student_and_shows_it(tmp_path):
    outputs, text = execute(tmp_path)
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 4, "images, views, curves, patches"
    accuracy = {row: float(re.search(rf"^\| {row}.*?([\d.]+)%", text, re.M)[1])
                for row in ("teacher demo", "student, untrained", "student, epoch 14")}
    assert accuracy["teacher demo"] > 95 and accuracy["student, untrained"] < 50
    assert accuracy["student, epoch 14"] > 90
    assert float(re.search(r"largest difference (\S+)", text)[1]) < 1e-5
    assert float(re.search(r"mean cosine of patches: (\S+)", text)[1]) > 0.5
    assert re.search(r"100%\|.*step", text), "the progress bar showed"


@pytest.mark.slow
@needs_shared
def test_its_two_lines_for_cifar_and_dinov2_work(tmp_path, monkeypatch):
    """From a loopback Hub; one line more makes it small enough for a CPU."""
    weights = tmp_path / "dinov2"
    weights.mkdir()
    random = timm.create_model("vit_base_patch14_dinov2", num_classes=0).state_dict()
    safetensors.torch.save_file(random, weights / "model.safetensors")

    def edit(source: str) -> str:
        source, count = re.subn(r"^# (settings .*)$", r"\1", source, flags=re.M)
        assert count == 2
        small = dict(max_samples=256, epochs=1, teacher_size=28, student_args="depth=1",
                     batch_size=64)
        return source.replace("\ncfg = ", f"\nsettings |= {small}\ncfg = ")

    (tmp_path / "run").mkdir()
    with hub("--repo", f"models/timm/vit_base_patch14_dinov2.lvd142m={weights}") as endpoint:
        for name in os.environ.keys() - environment(tmp_path, endpoint).keys():
            monkeypatch.delenv(name)
        for name, value in environment(tmp_path, endpoint).items():
            monkeypatch.setenv(name, value)
        _, text = execute(tmp_path / "run", edit)
    assert "dinov2_vitb14: 85.53 M" in text and "cifar10: 256 training" in text
