"""Train the demo's teacher, with labels, on drawn shapes; writes demo_teacher.safetensors here.

    python assets/make_demo_teacher.py

The file is in the repository, so nobody has to run this (4 minutes on 2 cores). The teacher sees
images of a seed of its own, never those of the demo's training or test split; the classifiers that
teach it are thrown away. On 2 threads of one kind of CPU it comes out the same to the bit.
"""

import math
import sys
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
from model import DEMO_ARGS, DEMO_SIZE, DEMO_TEACHER, Backbone, describe

IMAGES, DATA_SEED = 50_000, 100
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 12, 128, 2e-3, 0.05, 0.1
CROP_AREA, STRENGTH, SMOOTHING, PATCH_WEIGHT = (0.7, 1.0), 0.4, 0.1, 0.5
JITTER = 3  # its stream of random numbers, beside those of data.py
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
# RGB -> YIQ (NTSC, FCC 1953): hue is a rotation of its last two axes.
YIQ = torch.tensor([LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])


def jitter(images: Tensor, seed: int, epoch: int, index: Tensor, strength: float) -> Tensor:
    """Colour jitter with its own parameters for each image; float32 [B, 3, H, W] in [0, 1].

    With strength s: brightness and contrast 1 +- s, saturation 1 +- s/2, hue +- s/4 of a turn, and
    gray with probability s/2 (DINOv2's proportions at s = 0.4). All but the contrast's mean is
    linear in a pixel's colour, so one 3x3 matrix per image does everything.
    """
    u = data.uniform(seed, JITTER, epoch, index, 5).float()
    change = 1 + strength * (2 * u[:, :4] - 1) * torch.tensor([1, 1, 0.5, 0.25])
    brightness, contrast, saturation, turn = change.T[..., None, None]  # each [B, 1, 1]
    saturation = torch.where(u[:, 4] < strength / 2, 0.0, saturation[:, 0, 0])[:, None, None]
    sin, cos = (2 * torch.pi * turn).sin(), (2 * torch.pi * turn).cos()  # turn 1 is no change
    plane = cos * torch.eye(2) + sin * torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    rotation = torch.eye(3).repeat(len(u), 1, 1)
    rotation[:, 1:, 1:] = plane
    hue = torch.linalg.inv(YIQ) @ rotation @ YIQ
    gray = torch.tensor(LUMA).expand(3, 3)  # takes a colour to its luma, three times
    matrix = brightness * (saturation * torch.eye(3) + (1 - saturation) * gray) @ hue
    # The contrast's mean: luma is untouched by hue and saturation, and scaled by brightness.
    matrix, luma = (m.to(images) for m in (contrast * matrix, (1 - contrast) * brightness * gray))
    pixels = images.flatten(2)
    offset = luma @ pixels.mean(2, keepdim=True)
    return torch.baddbmm(offset, matrix, pixels).clamp_(0, 1).view_as(images)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)  # sums in another order would give another file
    drawn = (data.draw_shape(DATA_SEED, index, DEMO_SIZE) for index in range(IMAGES))
    images, labels = map(np.stack, zip(*drawn, strict=True))
    images, labels = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
    name, classes = "vit_small_patch14_dinov2", int(labels.max()) + 1
    net = timm.create_model(name, num_classes=0, img_size=DEMO_SIZE, **DEMO_ARGS)
    teacher = Backbone(net, DEMO_SIZE, describe(name, DEMO_SIZE, tuple(DEMO_ARGS.items())))
    # Classifying the mean patch as well makes the patches worth distilling.
    heads = torch.nn.ModuleList(torch.nn.Linear(teacher.embed_dim, classes) for _ in range(2))
    weights = [*teacher.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(weights, LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    steps, step = EPOCHS * (IMAGES // BATCH), 0
    for epoch in range(EPOCHS):
        right = 0
        order = torch.from_numpy(data.epoch_order(IMAGES, 0, DATA_SEED, epoch))
        for index in order[: steps // EPOCHS * BATCH].view(-1, BATCH):
            boxes = data.view(DATA_SEED, epoch, index, CROP_AREA)
            views = data.render(images[index], boxes, DEMO_SIZE)
            features = teacher(jitter(views, DATA_SEED, epoch, index, STRENGTH))
            scores = heads[0](features.cls), heads[1](features.patches.mean(1))
            losses = [F.cross_entropy(s, labels[index], label_smoothing=SMOOTHING) for s in scores]
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimiser.param_groups:
                group["lr"] = LEARNING_RATE * min(step / (WARM_UP * steps), cosine)
            optimiser.zero_grad()
            (losses[0] + PATCH_WEIGHT * losses[1]).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            step += 1
            right += (scores[0].argmax(1) == labels[index]).sum().item()
        print(f"epoch {epoch + 1}/{EPOCHS}: training accuracy {right / IMAGES:.1%}", flush=True)
    save_file({k: v.half() for k, v in net.state_dict().items()}, DEMO_TEACHER)


if __name__ == "__main__":
    main()
