"""Relational distillation: match similarities to a queue of earlier targets, as LightlyTrain does.

    python examples/forks/queue_kl.py --preset demo --run_dir runs/queue_kl

The CLS loss becomes KL(softmax(t Q / 0.07), softmax(s Q / 0.07)) for unit vectors t of the teacher,
s of the student, and a queue Q of the teacher's last embeddings. The queue is a buffer of the
objective, so that checkpoints hold it, and moves on in `after_step`. Several processes have a
queue each, of their own images; a continued run starts all of them from rank 0's.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
import model
import train
from config import Config, cli


class QueueKL(model.Distiller):
    size, temperature = 1024, 0.07

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        width = len(self.cls_head.scale)
        noise = torch.randn(self.size, width, generator=torch.Generator().manual_seed(0))
        self.register_buffer("queue", F.normalize(noise, dim=1))

    def losses(self, features, target):
        loss, stats = super().losses(features, target)
        student = self.cls_head.predict(features.cls)
        teacher = target[:, 0, : student.shape[-1]]
        student, teacher = (F.normalize(x.float(), dim=1) for x in (student, teacher))
        self.newest = teacher
        student = (student @ self.queue.T / self.temperature).log_softmax(1)
        teacher = (teacher @ self.queue.T / self.temperature).log_softmax(1)
        kl = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
        loss = self.cfg.cls_weight * kl + self.cfg.patch_weight * stats["patch"]
        return loss, stats | dict(cls=kl)

    @torch.no_grad()
    def after_step(self, step):
        self.queue.copy_(torch.cat([self.newest, self.queue])[: self.size])


if __name__ == "__main__":
    cli(lambda cfg: train.main(cfg, objective=QueueKL), Config)
