"""A third target: the patches of a layer in the middle, beside the last layer's CLS and patches.

    python examples/forks/middle.py --preset demo --run_dir runs/middle

`embed` returns one field more, which gets a head; its targets are cached behind the others, and its
loss is logged. The last norm is applied to the middle layer too, as the blocks' outputs are not
normalised. Only for ViTs.
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
    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        if not (hasattr(student.net, "blocks") and hasattr(teacher.net, "blocks")):
            raise UserError("the middle layer is that of two ViTs")
        kind = self.patch_head.kind
        self.middle_head = model.Head(kind, student.patch_dim, teacher.patch_dim)

    def embed(self, backbone, images):
        images = (images - backbone.mean) / backbone.std
        half = len(backbone.net.blocks) // 2
        last, (middle,) = backbone.net.forward_intermediates(
            images, indices=[half], norm=True, output_fmt="NLC")
        return DeepFeatures(*backbone.to_features(last), middle)

    def fit(self, features):
        super().fit(features)
        self.middle_head.fit(features.middle.flatten(0, 1))

    def targets(self, features):
        middle = self.middle_head.target(self.on_student_grid(features).middle)
        return model.concatenate_tokens(super().targets(features), middle)

    def losses(self, features, target):
        N = features.middle.shape[1]
        loss, stats = super().losses(features, target[:, :-N])
        middle = self.middle_head.predict(features.middle)
        middle_loss = model.cosine_loss(middle, target[:, -N:, : middle.shape[-1]]).mean()
        return loss + WEIGHT * middle_loss, stats | dict(middle=middle_loss)


if __name__ == "__main__":
    cli(lambda cfg: train.main(cfg, objective=Middle), Config)
