"""Colour jitter of the view that teacher and student share.

    python examples/forks/jitter.py --preset demo --run_dir runs/jitter

The colours of an image follow from (seed, view, image): both networks see the same ones, at their
own sizes, and a view that is cached looks the same in every epoch. After a change of STRENGTH set
another --cache_dir: only a change that moves targets visibly is refused.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import model
import train
from config import Config, cli

STRENGTH = 0.4
JITTER = 100  # keeps its random numbers apart from those of data.py


class Jitter(model.Distiller):
    def shared_view(self, images, view, index):
        factors = 1 + STRENGTH * (2 * data.uniform(index, 3, JITTER, self.cfg.seed, view) - 1)
        brightness, contrast, saturation = factors.to(images.device).T[..., None, None, None]
        gray = images.mean(1, keepdim=True)
        images = gray + saturation * (images - gray)
        mean = images.mean((1, 2, 3), keepdim=True)
        return (brightness * (mean + contrast * (images - mean))).clamp(0, 1)


if __name__ == "__main__":
    cli(lambda cfg: train.main(cfg, objective=Jitter), Config)
