"""Gram: the student's patches are to be as similar to each other as the teacher's raw ones are.

    python examples/forks/gram.py --preset demo --run_dir runs/gram

After the Gram loss of DINOv3 (2025). The teacher's N x N cosines, of patches that are neither
centred nor whitened, are computed in `targets`, and so cached: N more tokens of each image. The
student's side has a trained map of its own, as the patch loss wants its patches centred.
"""

import sys
from pathlib import Path

import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
import model
import train
from config import Config, cli

WEIGHT = 1.0


def cosines(patches):
    """Patches [B, N, D] -> the cosine of each with each, [B, N, N]."""
    unit = F.normalize(patches.float(), dim=-1)
    return unit @ unit.mT


class Gram(model.Distiller):
    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        self.gram_map = nn.Linear(student.patch_dim, student.patch_dim)

    def targets(self, features):
        gram = cosines(self.on_student_grid(features).patches)
        return model.concatenate_tokens(super().targets(features), gram)

    def losses(self, features, target):
        N = features.patches.shape[1]
        loss, stats = super().losses(features, target[:, :-N])
        gram = cosines(self.gram_map(features.patches))
        gram_loss = (gram - target[:, -N:, :N]).square().mean()
        return loss + WEIGHT * gram_loss, stats | dict(gram=gram_loss)


if __name__ == "__main__":
    cli(lambda cfg: train.main(cfg, objective=Gram), Config)
