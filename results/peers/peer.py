"""LightlyTrain's run: compare.py starts it with the Python of LightlyTrain's own environment.

    LIGHTLY_PYTHON results/peers/peer.py '{"images": ..., "weights": ..., "out": ...}'

Its defaults for method "distillationv3", but for what the call below states and two repairs, both
on the teacher's side. Writes OUT/run/exported_models/exported_last.pt: timm's names and weights.
"""

import json
import os
import sys
from importlib import metadata

os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"  # it would report the run to its makers

import lightly_train  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from lightly_train._models.timm import timm as wrapper  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD  # noqa: E402

features_fn = wrapper._get_forward_features_fn


def repaired_features_fn(model):
    """For an EfficientNet its last feature map, of images normalised by its own constants.

    The wrapper takes the map before the last convolution, with 320 channels where it expects 1280,
    and both networks see one image, normalised by ImageNet's constants, which are the student's.
    """
    if type(model).__name__ != "EfficientNet":
        return features_fn(model)
    constants = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD,
                 model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    mean, std, own_mean, own_std = (torch.tensor(x).view(3, 1, 1) for x in constants)
    return lambda net, x: net.forward_features((x * std + mean - own_mean) / own_std)


def main(images, weights, out, teacher, student, arguments, size, epochs, batch_size, lr, seed):
    torch.manual_seed(seed)
    net = timm.create_model(student, **arguments)
    wrapper._get_forward_features_fn = repaired_features_fn
    whole = timm.create_model(teacher)  # it wants a classifier, too, which it does not use
    whole.load_state_dict(load_file(weights), strict=False)
    file = f"{out}/teacher.pth"  # it reads no safetensors
    torch.save(whole.state_dict(), file)
    lightly_train.pretrain(
        out=f"{out}/run", data=images, model=net, method="distillationv3",
        method_args=dict(teacher=f"timm/{teacher}", teacher_weights=file), epochs=epochs,
        batch_size=batch_size, transform_args=dict(image_size=(size, size)),
        optim_args=dict(lr=lr), seed=seed, precision="bf16-mixed", accelerator="cpu", devices=1,
        num_workers=0)
    names = "lightly-train", "torch", "timm", "pytorch-lightning"
    with open(f"{out}/versions.json", "w") as versions:
        json.dump({name: metadata.version(name) for name in names}, versions)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
