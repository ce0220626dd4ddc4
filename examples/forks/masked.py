"""Masked patches: half of the student's patches are hidden, and the patch loss is on those alone.

    python examples/forks/masked.py --preset demo --run_dir runs/masked

The mask token is a parameter of the objective, so that checkpoints hold it. Masks are drawn in the
step, for which torch is seeded: a continued run draws the same ones. Only for ViTs.
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
import model
import train
from config import Config, UserError, cli

SHARE = 0.5  # of the patches


class Masked(model.Distiller):
    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        if not hasattr(student.net, "cls_token") or student.grid == (1, 1):
            raise UserError("masks need a ViT with a class token and several patches")
        self.mask_token = nn.Parameter(torch.zeros(student.patch_dim))
        student.net.patch_embed.register_forward_hook(self.hide)

    def hide(self, module, inputs, tokens):
        """tokens [B, N, D] of the patch embedding -> the same with some replaced in training."""
        if module.training:  # else the hook returns None, which leaves the tokens as they are
            self.hidden = torch.rand(tokens.shape[:2], device=tokens.device) < SHARE
            return torch.where(self.hidden[..., None], self.mask_token.to(tokens.dtype), tokens)

    def losses(self, features, target):
        loss, stats = super().losses(features, target)
        patches = self.patch_head.predict(features.patches)
        losses = model.cosine_loss(patches, target[:, 1:, : patches.shape[-1]])  # [B, N]
        masked = (losses * self.hidden).sum() / self.hidden.sum().clamp_min(1)
        loss = self.cfg.cls_weight * stats["cls"] + self.cfg.patch_weight * masked
        return loss, stats | dict(patch=masked)


if __name__ == "__main__":
    cli(lambda cfg: train.main(cfg, objective=Masked), Config)
