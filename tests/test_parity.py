"""DINOv2 against recorded outputs of the official code; skipped where the record is not at hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model
from config import Config

pytestmark = pytest.mark.slow

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures"


@pytest.mark.skipif(
    not FIXTURES.exists(), reason="needs ../shared/fixtures, outputs of the official code"
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("which", [0, 1])
def test_features_equal_the_recorded_ones(tmp_path, which, suffix):
    record = json.loads((FIXTURES / "dinov2_parity.json").read_text())[which]
    weights = tmp_path / f"model.{suffix}"
    make = [sys.executable, str(FIXTURES / "make_dinov2.py"), record["model"], str(weights)]
    subprocess.run(make, check=True)
    for case in record["cases"]:
        size = case["size"]
        teacher = model.load_teacher(Config(
            teacher=record["model"], teacher_size=size, teacher_weights=str(weights)))
        teacher.mean.zero_()
        teacher.std.fill_(1)  # the recorded images are already normalised
        images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(size))
        with torch.inference_mode():
            cls, patches = teacher(images)
        assert patches.shape[1] == case["num_patches"]
        for got, expected in (
            (cls[0], "cls_first8"),
            (patches[0, 0], "patch0_first8"),
            (patches[0, -1], "patch_last_first8"),
            (patches[0].mean(0), "patch_mean_first8"),
        ):
            assert (got[:8] - torch.tensor(case[expected])).abs().max() < 1e-5
        assert abs(cls.norm() - case["cls_norm"]) < 1e-4
        assert abs(patches.norm() - case["patches_norm"]) < 1e-3
