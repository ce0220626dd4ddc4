"""A third target: the patches of a layer in the middle, beside the last layer's CLS and patches.

    python examples/forks/middle.py --preset demo --run_dir runs/middle

`embed` returns one field more, and `terms` has an entry for it: head, loss, log line and cache
follow. The last norm is applied to the middle layer too, as the blocks' outputs are not normalised.
Only for ViTs.
"""

import sys
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
import model
import train
from config import Config, UserError, cli

WEIGHT = 0.5


class DeepFeatures(NamedTuple):
    cls: Tensor
    patches: Tensor
    middle: Tensor  # [B, N, D]


class Middle(model.Distiller):
    terms = model.TERMS | dict(middle=lambda features: features.middle)

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        if not (hasattr(student.net, "blocks") and hasattr(teacher.net, "blocks")):
            raise UserError("the middle layer is that of two ViTs")
        self.weights["middle"] = WEIGHT

    def embed(self, backbone, images):
        images = (images - backbone.mean) / backbone.std
        half = len(backbone.net.blocks) // 2
        last, (middle,) = backbone.net.forward_intermediates(
            images, indices=[half], norm=True, output_fmt="NLC")
        return DeepFeatures(*backbone.to_features(last), middle)


if __name__ == "__main__":
    cli(lambda cfg: train.main(cfg, objective=Middle), Config)
