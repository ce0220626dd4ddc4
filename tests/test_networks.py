"""Every student the README names takes a training step, checkpoints and exports."""

import pytest
import timm
from safetensors.torch import load_file

import train
from config import Config


@pytest.mark.parametrize(
    "student, size, args",
    [
        ("vit_small_patch16_224", 96, ""),
        ("vit_small_patch16_224", 224, "depth=2"),
        pytest.param("vit_base_patch16_224", 96, "", marks=pytest.mark.slow),
        ("vit_tiny_patch16_224", 96, "reg_tokens=4"),
        ("resnet18", 96, ""),
        ("mobilenetv4_conv_small", 96, ""),
    ],
)
def test_students_train(tmp_path, student, size, args):
    cfg = Config(
        dataset="shapes", teacher="demo", teacher_size=32, student=student, student_size=size,
        student_args=args, batch_size=4, samples_per_epoch=8, max_samples=64, epochs=1,
        pool="mean" if args else "cls", cache_dir=str(tmp_path / "cache"), device="cpu",
        run_dir=str(tmp_path / "run"), num_workers=0,
    )  # fmt: skip
    assert train.main(cfg)["step"] == 2
    kwargs = {} if student in ("resnet18", "mobilenetv4_conv_small") else dict(img_size=size)
    kwargs |= {k: int(v) for k, v in (item.split("=") for item in args.split())}
    plain = timm.create_model(student, num_classes=0, **kwargs)
    plain.load_state_dict(load_file(tmp_path / "run" / "student.safetensors"))
