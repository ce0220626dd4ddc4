"""What is beside the five modules: the pictures, and how the demo's teacher was made."""

import sys

import numpy as np
import PIL.Image
import pytest

import model
import train
from config import Config
from demo import make_teacher
from examples import figures
from test_smoke import latest


@pytest.mark.slow
def test_pictures_of_a_run(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "QUICK_EVAL", (60, 30))
    monkeypatch.setattr(figures, "QUICK_EVAL", (60, 30))
    cfg = tiny(eval_every=1)
    train.main(cfg)
    figures.main(str(cfg.run_path))
    assert not (cfg.run_path / "patches.png").exists(), "2 x 2 patches show nothing"
    monkeypatch.setattr(figures, "FEWEST", (2, 2))
    figures.main(latest(cfg), str(tmp_path / "pictures"))
    for name in ("views", "patches", "neighbors", "progress", "curve"):
        picture = np.asarray(PIL.Image.open(tmp_path / "pictures" / f"{name}.png").convert("RGB"))
        assert min(picture.shape[:2]) > 60 and picture.std() > 20, name
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    figures.main(latest(cfg), str(tmp_path / "without"))
    assert (tmp_path / "without" / "views.png").exists()
    assert "pip install matplotlib" in capsys.readouterr().out


@pytest.mark.slow
def test_the_demos_teacher_is_trained_and_loads(tmp_path, monkeypatch, capsys):
    file = str(tmp_path / "teacher.safetensors")
    monkeypatch.setitem(model.WEIGHTS, "demo", file)
    monkeypatch.setattr(make_teacher, "IMAGES", 1280)
    monkeypatch.setattr(make_teacher, "EPOCHS", 4)
    make_teacher.main()
    accuracies = [float(line.split()[-1][:-1]) for line in capsys.readouterr().out.splitlines()]
    assert accuracies[-1] > accuracies[0] + 2
    teacher = model.load_teacher(Config(teacher="demo", teacher_size=32))
    assert teacher.grid == (4, 4) and teacher.cls_dim == teacher.patch_dim == 96
