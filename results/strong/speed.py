"""Candidates for the student: images/s of a training step on one thread, GFLOPs, parameters.

    OMP_NUM_THREADS=1 python results/strong/speed.py               # all, to speed.jsonl
    OMP_NUM_THREADS=1 python results/strong/speed.py resnet10t@64  # some

A step is forward, loss against targets of the teacher's width and backward, in batches of 64 and
the precision that train.py chooses; without rendering and optimiser."""

import json
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import model  # noqa: E402
from config import reason  # noqa: E402

try:
    import students  # noqa: E402, F401
except ImportError:
    pass

CANDIDATES = [f"{name}@{size}" for name, sizes in {
    "resnet10t": (48, 64, 80),
    "resnet10t layers=(1,1,1,0) channels=(64,128,256,256)": (64, 80, 96),
    "resnet10t layers=(1,1,1,0) channels=(48,96,192,192)": (96,),
    "resnet14t": (64,),
    "vit_tiny_patch16_224 depth=4 patch_size=8": (32,),
    "vit_tiny_patch16_224 depth=4 patch_size=4": (32,),
    "vit_tiny_patch16_224 depth=6 patch_size=8": (64,),
    "mobilenetv4_conv_small": (64, 96, 128),
    "mobilenetv4_conv_small_050": (96, 128),
    "convnext_atto": (64, 96),
    "convnext_atto patch_size=2": (32, 48),
    "repvit_m0_9": (64, 96),
    "efficientvit_b0": (64, 96, 128),
    "efficientvit_m0": (64, 128),
    "tiny_vit_5m_224": (64,),
    "fastvit_t8": (64, 96),
    "mobileone_s0": (64, 96),
    "edgenext_xx_small": (64, 96),
    "test_resnet": (96, 128),
    "test_efficientnet": (128,),
    "test_convnext": (64, 96),
    "test_vit": (64,),
    "regnetx_002": (64, 96),
    "ghostnet_100": (96, 128),
    "tf_efficientnet_lite0": (64, 96),
    "mobilenetv3_small_100": (96, 128),
    "lcnet_100": (96, 128),
}.items() for size in sizes]


def measure(text, batch=64):
    arguments, _, size = text.rpartition("@")
    name, _, arguments = arguments.partition(" ")
    size = int(size)
    student = model.build_student(name, size, **model.student_arguments(arguments))
    images = torch.rand(batch, 3, size, size)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        student(images)
    row = dict(student=name, arguments=arguments, size=size, grid=student.grid[0],
               width=student.embed_dim, params_m=round(student.parameter_count / 1e6, 3),
               gflops=round(flops.get_total_flops() / batch / 1e9, 4))
    student.train()
    predict = torch.nn.Linear(student.embed_dim, 1280)
    target = torch.randn(batch, 1, 1280)
    dtype = model.pick_dtype("auto", torch.device("cpu"))
    seconds = []
    for _ in range(5):
        begin = time.time()
        student.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            features = student(images)
            loss = sum(model.cosine_loss(predict(x), target).mean()
                       for x in (features.cls[:, None], features.patches))
        loss.backward()
        seconds.append(time.time() - begin)
    return row | dict(images_per_s=round(batch / min(seconds[1:]), 1))


if __name__ == "__main__":
    model.pick_device("cpu")
    for text in sys.argv[1:] or CANDIDATES:
        try:
            row = measure(text)
        except Exception as error:
            row = dict(student=text, error=reason(error))
        print(json.dumps(row), flush=True)
        with open(HERE / "speed.jsonl", "a") as log:
            log.write(json.dumps(row) + "\n")
