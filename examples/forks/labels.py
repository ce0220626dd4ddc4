"""Labels beside distillation: a linear classifier on the student's CLS, and its cross-entropy.

    python examples/forks/labels.py --preset demo --run_dir runs/labels

Labels are read from the data set by class name; an image without one counts for the distillation
alone. The classifier is a module of the objective: it trains, checkpoints hold it, and it is not
exported. `student_view` is where a batch's images are known by their places in the store.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import model
import train
from config import Config, UserError, cli

WEIGHT = 0.5


class Labels(model.Distiller):
    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        names = data.open_store(cfg, cfg.train_split, cfg.max_samples).labels(cfg.label_column)
        classes = sorted({*names} - {None})
        if len(classes) < 2:
            raise UserError("no labels of two classes: see --label_column")
        numbers = {name: number for number, name in enumerate(classes)}
        self.labels = torch.tensor([numbers.get(name, -1) for name in names])  # -1: none
        self.classifier = nn.Linear(student.cls_dim, len(classes))
        self.batch = None  # the labels of a batch

    def student_view(self, images, epoch, index):
        labels = data.to_device(self.labels[index], images.device)
        if self.batch is None:
            self.batch = labels
        self.batch.copy_(labels)  # in place: CUDA graphs read it where it was
        return images

    def losses(self, features, target):
        loss, stats = super().losses(features, target)
        losses = F.cross_entropy(self.classifier(features.cls).float(), self.batch,
                                 ignore_index=-1, reduction="none")
        cross_entropy = losses.mean()  # over all images, so that a batch without labels has 0
        return loss + WEIGHT * cross_entropy, stats | dict(cross_entropy=cross_entropy)


if __name__ == "__main__":
    cli(lambda cfg: train.main(cfg, objective=Labels), Config)
