"""An average of the student's weights over the last steps, which is evaluated and exported.

    python examples/forks/ema.py --preset demo --run_dir runs/ema

The average is a module of the objective, so that checkpoints hold it.
"""

import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import model
import train
from config import Config, cli

DECAY = 0.99


class EMA(model.Distiller):
    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        self.average = copy.deepcopy(student).requires_grad_(False)

    @torch.no_grad()
    def after_step(self, step):
        new = self.student.net.state_dict()
        for name, value in self.average.net.state_dict().items():
            if value.is_floating_point():
                value.lerp_(new[name], 1 - min(DECAY, (1 + step) / (10 + step)))
            else:
                value.copy_(new[name])

    @property
    def evaluated(self):
        return self.average


if __name__ == "__main__":
    cli(lambda cfg: train.main(cfg, objective=EMA), Config)
