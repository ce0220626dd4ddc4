"""Train the demo's teacher, with labels, on drawn shapes; writes teacher.safetensors here.

    python demo/make_teacher.py

The file is in the repository, so nobody has to run this (half an hour on 2 cores). The teacher sees
images of a seed of its own, never those of the demo's training or test split; the classifiers that
train it are thrown away.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision.transforms.v2 as T
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import model
from demo.shapes import OUTLINES, draw_shape

MODEL = model.TEACHERS["demo"]
ARGUMENTS = dict(
    patch_size=8, embed_dim=96, depth=6, num_heads=6, init_values=1.0, img_size=32)
IMAGES, SEED = 50_000, 100
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 12, 128, 2e-3, 0.05, 0.1
CROP_SCALE, SMOOTHING, PATCH_WEIGHT = 0.7, 0.1, 0.5
JITTER = T.Compose([T.ColorJitter(0.4, 0.4, 0.2, 0.1), T.RandomGrayscale(0.2)])  # DINOv2's
JITTERED_ALIKE = 8  # images


def main() -> None:
    torch.manual_seed(0)
    model.pick_device("cpu")
    size = ARGUMENTS["img_size"]
    images = torch.from_numpy(np.stack([draw_shape(SEED, i, size)[0] for i in range(IMAGES)]))
    images, labels = images.permute(0, 3, 1, 2), torch.arange(IMAGES) % len(OUTLINES)
    net = timm.create_model(MODEL, num_classes=0, **ARGUMENTS)
    teacher = model.Backbone(net, size).train()
    # Classifying the mean patch as well makes the patches worth distilling.
    heads = torch.nn.ModuleList(torch.nn.Linear(width, len(OUTLINES))
                                for width in (teacher.cls_dim, teacher.patch_dim))
    weights = [*teacher.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(weights, LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    steps, step = EPOCHS * (IMAGES // BATCH), 0
    for epoch in range(EPOCHS):
        correct = 0
        order = torch.from_numpy(data.epoch_order(IMAGES, SEED, epoch))
        for index in order[: steps // EPOCHS * BATCH].view(-1, BATCH):
            crops = data.view_crops(index, SEED, epoch, CROP_SCALE)
            views = data.render(images[index], size, *crops)
            views = torch.cat([JITTER(some) for some in views.split(JITTERED_ALIKE)])
            features = teacher(views)
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
            correct += (scores[0].argmax(1) == labels[index]).sum().item()
        print(f"epoch {epoch + 1}/{EPOCHS}: training accuracy {correct / IMAGES:.1%}", flush=True)
    weights = {key: value.half().contiguous() for key, value in net.state_dict().items()}
    how = json.dumps(dict(model=MODEL, args=ARGUMENTS))
    save_file(weights, model.WEIGHTS["demo"], metadata=dict(student=how))


if __name__ == "__main__":
    main()
