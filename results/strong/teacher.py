"""A strong teacher for students that it shares no image with: teacher (a).

    python results/strong/teacher.py IMAGES WEIGHTS          # the two data sets, then the teacher
    python results/strong/teacher.py IMAGES WEIGHTS --sizes  # its size, on held-out images

EfficientNet-Lite0, trained on ImageNet with labels, is fine-tuned with the labels of one half of
CIFAR-10's 50,000 training images. Students learn from the other half without any. IMAGES is
CIFAR-10 as train.py's --dataset takes it, WEIGHTS are Lite0's. Writes

    cache/strong/half      train: the other 25,000 images, test: the 10,000 test images,
                           held: 5,000 of the teacher's half, on which students are chosen
    cache/strong/held-out  train: 22,500 of the other half, test: the 2,500 held out, to choose on
    runs/strong/teacher.safetensors, which --teacher tf_efficientnet_lite0 --teacher_weights takes

and beside this file a line for each epoch (teacher.jsonl) and size (teacher_sizes.jsonl)."""

import json
import math
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1])]

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import model  # noqa: E402
from config import Config  # noqa: E402

NAME = "tf_efficientnet_lite0"
FOLDER, WEIGHTS = Path("cache/strong"), Path("runs/strong/teacher.safetensors")
HALF, HELD_OUT, CHOICE = 25_000, 2_500, 5_000
EPOCHS = [96] * 5 + [128] * 2  # pixels
FROZEN = 2  # stages that keep ImageNet's weights: twice as fast
BATCH, LR, DECAY, WARMUP, CROP = 128, 1e-3, 0.05, 100, 0.4
SIZES = 96, 128, 160


def split(images):
    """Write the data sets of the students; the teacher's is cache/strong/teacher-half."""
    rows = datasets.load_dataset("uoft-cs/cifar10" if images == "cifar10" else images)
    order = np.random.default_rng(36).permutation(2 * HALF)
    own, other = np.sort(order[:HALF]), np.sort(order[HALF:])
    held = np.sort(order[HALF : HALF + HELD_OUT])
    train, parts = rows["train"], {}
    parts["teacher-half"] = dict(train=train.select(own))
    parts["half"] = dict(train=train.select(other), test=rows["test"],
                         held=train.select(own[:: len(own) // CHOICE]))
    parts["held-out"] = dict(train=train.select(np.setdiff1d(other, held)),
                             test=train.select(held))
    for name, part in parts.items():
        if not (FOLDER / name).exists():
            datasets.DatasetDict(part).save_to_disk(str(FOLDER / name))


def prefix(net, x):
    """The frozen stages, in bf16 where the hardware has it."""
    dtype = model.pick_dtype("auto", torch.device("cpu"))
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        x = net.bn1(net.conv_stem(x))
        return net.blocks[:FROZEN](x).float()


def train(weights):
    torch.manual_seed(0)
    store = data.open_store(Config(dataset=str(FOLDER / "teacher-half")), "train")
    names = store.labels()
    labels, count = torch.from_numpy(np.unique(names, return_inverse=True)[1]), len(store)
    net = timm.create_model(NAME, pretrained=True, num_classes=10,
                            pretrained_cfg_overlay=dict(file=weights))
    net = net.to(memory_format=torch.channels_last)
    mean, std = (torch.tensor(net.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    fixed = [net.conv_stem, net.bn1, *net.blocks[:FROZEN]]
    for module in fixed:
        module.requires_grad_(False)
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in trained if p.ndim > 1], weight_decay=DECAY),
              dict(params=[p for p in trained if p.ndim < 2], weight_decay=0.0)]
    optimiser = torch.optim.AdamW(groups, lr=LR, fused=True)
    steps, step = len(EPOCHS) * (count // BATCH), 0
    begin, log = time.time(), open(HERE / "teacher.jsonl", "w")
    for epoch, size in enumerate(EPOCHS):
        net.train()
        for module in fixed:
            module.eval()
        order = data.epoch_order(count, 0, epoch)[: count // BATCH * BATCH]
        losses, right = 0.0, 0
        for rows in order.reshape(-1, BATCH):
            crops = data.view_crops(rows, 0, epoch, CROP)
            pixels = data.render(store.images[rows], size, *crops)
            x = ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)
            rate = LR * min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * step / steps)))
            for group in optimiser.param_groups:
                group["lr"] = rate
            x = net.bn2(net.conv_head(net.blocks[FROZEN:](prefix(net, x))))
            output = net.forward_head(x)
            loss = F.cross_entropy(output, labels[rows])
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            step, losses = step + 1, losses + loss.item()
            right += int((output.argmax(1) == labels[rows]).sum())
            if step % 20 == 0:
                print(step, steps, f"{loss.item():.3f} {time.time() - begin:.0f} s", flush=True)
        line = dict(epoch=epoch + 1, size=size, loss=losses * BATCH / len(order),
                    train_accuracy=right / len(order), seconds=time.time() - begin)
        print(json.dumps(line), file=log, flush=True)
        WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
        state = {k: v.contiguous() for k, v in net.state_dict().items()
                 if not k.startswith("classifier")}
        save_file(state, str(WEIGHTS))


def sizes(dataset="held-out", choices=SIZES, name="teacher_sizes.jsonl", weights=WEIGHTS):
    """k-NN and linear probe at each size; those of held-out learn from 10,000 images."""
    some = 10_000 if dataset == "held-out" else 0
    with open(HERE / name, "a") as log:
        for size in choices:
            begin = time.time()
            cfg = Config(dataset=str(FOLDER / dataset), teacher=NAME, teacher_size=size,
                         teacher_weights=str(weights))
            evaluator = evaluation.Evaluator(cfg, some)
            row = evaluator.row(f"{weights.stem}, {size} px, {dataset}", model.load_teacher(cfg))
            print(json.dumps(row | dict(seconds=time.time() - begin)), file=log, flush=True)


if __name__ == "__main__":
    split(sys.argv[1])
    if "--sizes" in sys.argv:
        sizes()
    elif "--test" in sys.argv:  # python teacher.py IMAGES WEIGHTS --test SIZE
        sizes("half", [int(sys.argv[-1])], "teacher_test.jsonl")
    else:
        train(sys.argv[2])
