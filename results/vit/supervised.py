"""A ViT-S/14 in DINOv2's layout, trained from scratch with labels, as a teacher.

    python results/vit/supervised.py CIFAR10 TINY_IMAGENET FILE SECONDS

It classifies CIFAR-10's and Tiny ImageNet's training images, of 32 px, which it sees at 112 px. The
5,000 of CIFAR-10 that results/recipe/sweep.py holds out are left out, so that its size can be
chosen on them. [CLS] and the mean of the patches are classified together, as in DINOv2's linear
evaluation, so that both are trained. The learning rate falls with the clock.
"""

import itertools
import math
import sys
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "results" / "recipe")]

from sweep import held_out  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
from config import Config  # noqa: E402

STORED, SIZE, BATCH, LR, WEIGHT_DECAY = 32, 112, 512, 1e-3, 0.05
CLASSES = 10, 200


class Classifier(nn.Module):
    """A backbone and a linear layer on [CLS] and the mean of its patches."""

    def __init__(self, backbone):
        super().__init__()
        width = backbone.cls_dim + backbone.patch_dim
        self.backbone, self.linear = backbone, nn.Linear(width, sum(CLASSES))

    def forward(self, images):
        features = self.backbone(images)
        return self.linear(torch.cat([features.cls, features.patches.mean(1)], 1))


def labelled_images(dataset, device):
    cfg = Config(dataset=dataset, teacher_size=STORED, student_size=STORED)
    store = data.open_store(cfg, "train")
    store.images.move(device)
    _, labels = np.unique(store.labels().astype(str), return_inverse=True)
    return store.images.resident, torch.from_numpy(labels).to(device)


def batches(count):
    """Rows, boxes and flips of one batch after another, without end."""
    for epoch in itertools.count():
        for rows in data.batches(data.epoch_order(count, 0, epoch), BATCH):
            yield rows, *data.view_crops(rows, 0, epoch, 0.4)


def main(cifar10, tiny_imagenet, file, seconds):
    torch.manual_seed(0)
    device = model.pick_device("auto")
    images, labels = labelled_images(held_out(cifar10), device)
    more, other = labelled_images(tiny_imagenet, device)
    images, labels = torch.cat([images, more]), torch.cat([labels, CLASSES[0] + other])
    net = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=SIZE,
                            init_values=0.1, drop_path_rate=0.1)
    classifier = Classifier(model.Backbone(net, SIZE)).to(device).train()
    groups = timm.optim.param_groups_weight_decay(classifier, WEIGHT_DECAY)
    optimiser = torch.optim.AdamW(groups, lr=LR, fused=True)
    mix = timm.data.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, prob=0.5, num_classes=sum(CLASSES))
    forward = torch.compile(classifier)
    elapsed = 0
    for step, (rows, *crops) in enumerate(batches(len(images)), 1):
        pixels, targets = mix(data.render(images[rows], SIZE, *crops), labels[rows])
        progress = elapsed / seconds
        for group in optimiser.param_groups:
            group["lr"] = LR * min(1, 20 * progress) * (1 + math.cos(math.pi * progress)) / 2
        with torch.autocast(device.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(forward(pixels), targets)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        optimiser.step()
        if step == 1:  # compilation is not counted
            loss.item()
            begin = time.time()
        elapsed = time.time() - begin
        if step % 200 == 0:
            print(f"epoch {step * BATCH / len(images):.2f} step {step} loss {loss.item():.4f} "
                  f"images_per_s {step * BATCH / elapsed:.0f} seconds {elapsed:.1f} "
                  f"memory_gb {model.peak_memory(device):.1f}", flush=True)
        if elapsed >= seconds:
            break
    print(f"{step * BATCH / len(images):.1f} epochs, {model.environment(device)}")
    weights = {name: value.contiguous() for name, value in net.state_dict().items()}
    safetensors.torch.save_file(weights, file)


if __name__ == "__main__":
    main(*sys.argv[1:4], float(sys.argv[4]))
