"""Teachers and students: their weights, widths, constants, and what heads are fitted on."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

import data
import model
import train
from config import Config, UserError
from test_smoke import demo_distiller, latest, metrics, same, weights


def of(teacher, size=32, file="", **changes):
    return Config(teacher=teacher, teacher_size=size, teacher_weights=str(file), **changes)


def test_weights_of_another_model_are_refused(tmp_path):
    other = timm.create_model("resnet18", num_classes=0).state_dict()
    safetensors.torch.save_file(other, tmp_path / "resnet18.safetensors")
    with pytest.raises(UserError, match="does not fit tf_efficientnet_lite0"):
        model.load_teacher(of("tf_efficientnet_lite0", 64, tmp_path / "resnet18.safetensors"))


@pytest.mark.parametrize("name, mean, std", [
    ("resnet18", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ("vit_tiny_patch16_224", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])
def test_every_model_normalises_by_its_own_constants(monkeypatch, name, mean, std):
    student = model.build_student(Config(student=name, student_size=32))
    images, seen = torch.rand(1, 3, 32, 32), []
    inner = student.net.forward_features
    monkeypatch.setattr(student.net, "forward_features", lambda x: (seen.append(x), inner(x))[1])
    student(images)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    assert torch.allclose(seen[0], (images - mean) / std, atol=1e-5)


def test_a_student_can_start_from_weights_which_the_run_does_not_need_again(tiny, tmp_path):
    train.main(tiny(epochs=1))
    exported = tmp_path / "start.safetensors"
    shutil.copy(tiny().run_path / "student.safetensors", exported)
    cfg = tiny(student_weights=str(exported), seed=5, run_dir=str(tmp_path / "next"), epochs=1)
    student = model.build_student(cfg)
    assert same(student.net.state_dict(), safetensors.torch.load_file(exported))
    train.main(cfg)
    exported.unlink()
    finished = weights(cfg)
    train.main(cfg)
    assert same(finished, weights(cfg)), "a finished run"
    assert train.main(dataclasses.replace(cfg, epochs=2))["step"] == 10
    assert train.main(dataclasses.replace(cfg, epochs=3, student_weights=""))["step"] == 15
    assert json.loads((cfg.run_path / "config.json").read_text())["student_weights"]
    with pytest.raises(UserError, match="student_weights: '.+', now 'others.safetensors'"):
        train.main(dataclasses.replace(cfg, epochs=3, student_weights="others.safetensors"))
    with pytest.raises(UserError, match="start.safetensors does not fit"):
        train.main(dataclasses.replace(cfg, resume=False))


def test_resnets_get_a_trained_head_because_their_features_have_no_negative_side():
    _, vit = demo_distiller()
    _, conv = demo_distiller(student="resnet18", student_args="")
    assert [d.cls_head.kind for d in (vit, conv)] == ["pca", "linear"]
    assert conv.student(torch.rand(2, 3, 32, 32)).cls.min() >= 0


@pytest.mark.parametrize("side", [4, 6, 7, 8, 14, 16])
def test_the_heads_are_fitted_on_places_all_over_the_grid(side):
    generator, places = torch.Generator().manual_seed(0), set()
    tokens = torch.arange(side * side).float()[None, :, None].expand(2, -1, 96)
    for _ in range(64):  # as many batches as in a run
        features = model.some_places(model.Features(tokens[:, 0], tokens), generator)
        assert features.patches.shape == (2, model.PLACES, 96) and features.cls.shape == (2, 96)
        places |= {int(place) for place in features.patches[0, :, 0]}
    assert len(places) > 0.8 * side * side


def save_network(path, name, **arguments):
    """Random weights of a timm model as a file."""
    torch.manual_seed(1)
    net = timm.create_model(name, num_classes=0, **arguments)
    safetensors.torch.save_file(net.state_dict(), path)
    return str(path)


@pytest.mark.parametrize("images", [40, 60, 90, 95])
def test_axes_that_fewer_images_than_dimensions_do_not_have_are_left_out(images):
    # In float32 their rounding passed for a standard deviation, which was then divided by.
    torch.manual_seed(0)
    mixed = torch.randn(96, 96) + 1
    head = model.Head("pca", 96, 96)
    head.fit(torch.randn(images, 96) @ mixed)
    other = head.target(torch.randn(50, 96) @ mixed)
    assert other[:, images - 1 :].abs().max() == 0 and other[:, : images - 1].std(0).min() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("changes, widths, most", [
    (dict(teacher="mobilenetv4_conv_small", teacher_size=64), (48, 48), 0.97),
    (dict(teacher="mobilenetv4_conv_small", teacher_size=64, head="linear"), (1280, 960), 0.97),
    (dict(student="mobilenetv4_conv_small", student_size=64, student_args=""), (96, 96), 0.97),
    (dict(student="mobilenetv4_conv_small", student_size=64, student_args="", head="pca"),
     (1280, 960), 1.01),  # a ReLU learns centred targets slowly
])
def test_both_sides_may_have_other_widths_for_cls_and_patches(
        tiny, tmp_path, changes, widths, most):
    file = ""
    if "teacher" in changes:
        file = save_network(tmp_path / "teacher.safetensors", changes["teacher"])
    cfg = tiny(**changes, teacher_weights=file, epochs=4, lr=5e-3)
    train.main(cfg)
    lines = metrics(cfg)
    assert lines[-1]["loss"] < most * lines[0]["loss"]
    # The two losses of one batch, without the tensor that holds both targets.
    teacher = model.load_teacher(cfg)
    student = model.build_student(cfg, weights(cfg))
    assert (student if "student" in changes else teacher).cls_dim == 1280
    distiller = model.Distiller(student, teacher, cfg)
    distiller.load_state_dict(torch.load(latest(cfg), weights_only=True)["objective"])
    images = data.open_store(cfg, "train", 80).images[np.arange(16)]
    seen = data.render(images, cfg.student_size)
    with torch.inference_mode():
        features = teacher(data.render(images, cfg.teacher_size))
        targets = distiller.targets(features)
        loss, stats = distiller(seen, targets)
        cls, patches = distiller.on_student_grid(features)
        own = student(seen)
        expected = [model.cosine_loss(head.predict(own), head.target(teachers)).mean()
                    for head, own, teachers in ((distiller.cls_head, own.cls, cls),
                                                (distiller.patch_head, own.patches, patches))]
    assert targets.shape == (16, 1 + student.grid[0] ** 2, max(widths))
    assert not targets[:, 0, widths[0] :].any() and not targets[:, 1:, widths[1] :].any()
    assert torch.allclose(torch.stack(expected), torch.stack([stats["cls"], stats["patch"]]))


@pytest.mark.parametrize("changes", [dict(precision="bf16"), dict(precision="fp16"),
                                     dict(head="linear")])
def test_precisions_and_heads_train(tiny, changes):
    cfg = tiny(**changes)
    assert train.main(cfg)["step"] == 10
    saved = torch.load(latest(cfg), weights_only=True)
    assert bool(saved["scaler"]) == (cfg.precision == "fp16"), "fp16 saves its loss scale"
    assert metrics(cfg)[-1]["norm"] < 10, "without the loss scale"


@pytest.mark.parametrize("log_every", [1, 5])
def test_an_overflow_in_fp16_skips_a_step_and_does_not_end_the_run(tiny, log_every):
    class Overflows(model.Distiller):
        def losses(self, features, target):
            loss, stats = super().losses(features, target)
            if len(steps) == 3:
                loss.register_hook(lambda gradient: gradient * float("inf"))
            return loss, stats

        def after_step(self, step):
            steps.append({k: v.clone() for k, v in self.student.net.state_dict().items()})

    steps, cfg = [], tiny(precision="fp16", log_every=log_every)
    train.main(cfg, objective=Overflows)
    assert [same(a, b) for a, b in zip(steps, steps[1:], strict=False)].index(True) == 2
    assert len(steps) == 10 and not same(steps[-1], steps[-2])
    assert all(value.isfinite().all() for value in weights(cfg).values())
    skipped = [line["step"] for line in metrics(cfg) if line["norm"] is None]
    assert skipped == ([4] if log_every == 1 else []), "others are means of what is finite"
    text = (cfg.run_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text


def test_a_fork_does_not_continue_the_run_of_another_objective(tiny):
    class Fork(model.Distiller):
        pass

    train.main(tiny(epochs=1))
    with pytest.raises(UserError, match="objective: 'Distiller', now '.*Fork'"):
        train.main(tiny(epochs=2), objective=Fork)


def test_a_run_is_not_continued_with_other_weights_of_its_teacher(tiny, tmp_path):
    cfg = tiny(epochs=1)
    train.main(cfg)
    teacher = safetensors.torch.load_file(model.WEIGHTS["demo"])
    how = safetensors.safe_open(model.WEIGHTS["demo"], "pt").metadata()
    same_file, other = str(tmp_path / "moved.safetensors"), str(tmp_path / "other.safetensors")
    safetensors.torch.save_file(teacher, same_file, how)
    safetensors.torch.save_file(teacher | {"norm.bias": teacher["norm.bias"] + 0.01}, other, how)
    train.main(dataclasses.replace(cfg, epochs=2, teacher_weights=same_file))
    with pytest.raises(UserError, match="another teacher.*\n  - teacher\\w*: "):
        train.main(dataclasses.replace(cfg, epochs=3, teacher_weights=other))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_student_can_be_the_next_teacher(tiny, tmp_path, pool):
    cfg = tiny(epochs=1, pool=pool)
    train.main(cfg)
    saved, _ = model.load_checkpoint(latest(cfg))
    student = model.build_student(cfg, saved["student"])
    path = str(cfg.run_path / "student.safetensors")
    teacher, images = model.load_teacher(of(cfg.student, 32, path)), torch.rand(2, 3, 32, 32)
    for found, expected in zip(teacher(images), student(images), strict=True):
        assert torch.equal(found, expected)
    train.main(tiny(epochs=1, teacher=cfg.student, teacher_weights=path,
                    run_dir=str(tmp_path / "next")))


def test_a_teachers_file_chooses_no_other_file(tmp_path):
    how = json.dumps(dict(args=dict(checkpoint_path="other.pth")))
    path = tmp_path / "hostile.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, dict(student=how))
    with pytest.raises(UserError, match="name no weights"):
        model.load_teacher(of("vit_tiny_patch16_224", 32, path))


def test_a_teacher_without_a_position_table_is_resized(tmp_path):
    name = "swin_tiny_patch4_window7_224"
    file = save_network(tmp_path / "swin.safetensors", name)
    teacher = model.load_teacher(of(name, 64, file))
    assert teacher(torch.rand(1, 3, 64, 64)).patches.shape == (1, 4, 768)


def test_a_teacher_that_outputs_nan_is_found_before_the_cache_is_filled(tiny, tmp_path):
    path, demo = tmp_path / "nan.safetensors", model.WEIGHTS["demo"]
    state = safetensors.torch.load_file(demo)
    state["blocks.1.mlp.fc2.bias"][3] = float("nan")
    safetensors.torch.save_file(state, path, safetensors.safe_open(demo, "pt").metadata())
    with pytest.raises(UserError, match="the teacher outputs NaN"):
        train.main(tiny(teacher_weights=str(path), cache_dir=str(tmp_path / "cache")))
    assert not (tmp_path / "cache" / "targets").exists()


def test_an_image_of_which_the_teacher_outputs_nan_is_not_cached(tiny, tmp_path, monkeypatch):
    class Once(model.Distiller):
        def shared_view(self, images, view, index):
            return torch.where((index == 30)[:, None, None, None], math.nan, images)

    cfg = tiny(cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(train, "FIT_IMAGES", 4)
    assert 30 not in data.epoch_order(cfg.max_samples or 64, cfg.seed, 0)[:4]
    with pytest.raises(UserError, match="the teacher outputs NaN"):
        train.main(cfg, objective=Once)
    assert not list((tmp_path / "cache" / "targets").rglob("*.i8"))


@pytest.mark.parametrize("changes, words", [
    (dict(teacher="facebook/dinov2-with-registers-large"), "did you mean dinov2_vitl14_reg"),
    (dict(teacher="Facebook/DINOv2-base"), "did you mean dinov2_vitb14[^_]*$"),
    (dict(teacher="dino_v2_giant"), "did you mean dinov2_vitg14[^_]*$"),
    (dict(student="dinov2_vits14"), "did you mean vit_small_patch14_dinov2"),
])
def test_other_names_of_dinov2_are_known(tiny, changes, words):
    with pytest.raises(UserError, match=words):
        train.main(tiny(**changes))


def test_weights_that_have_no_place_are_said(tmp_path, monkeypatch):
    file, said = tmp_path / "dinov2.safetensors", []
    net = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=2, init_values=0.5)
    safetensors.torch.save_file(net.state_dict(), file)
    monkeypatch.setattr(model.log, "warning", said.append)
    cfg = Config(student="vit_tiny_patch16_224", student_size=224, student_args="depth=2",
                 student_weights=str(file))
    model.build_student(cfg)
    assert len(said) == 1 and "blocks.0.ls1.gamma" in said[0], said
    model.build_student(dataclasses.replace(cfg, student_args="depth=2 init_values=0.5"))
    assert len(said) == 1, "the classifier alone has no place"
    larger = timm.create_model("resnet10t", num_classes=10)
    safetensors.torch.save_file(larger.state_dict(), file)
    model.build_student(dataclasses.replace(cfg, student="resnet10t", student_size=64,
                                            student_args="layers=(1,1,1,0)"))
    assert len(said) == 2 and "layer4.0." in said[1], said


def test_gradients_of_narrow_convolutions_do_not_end_the_process():
    # oneDNN limited to AVX2, as on most laptops, overwrote memory in channels_last.
    code = ("import model, config; student = model.build_student(config.Config("
            "student='repvgg_a0', student_size=64)).train(); import torch\n"
            "for _ in range(3): student(torch.rand(4, 3, 64, 64)).cls.sum().backward()")
    settings = dict(ONEDNN_MAX_CPU_ISA="AVX2", PYTHONPATH=str(Path(model.__file__).parent))
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | settings)


def test_a_student_without_one_embedding_of_an_image_is_refused():
    cfg = Config(student_args="global_pool='' depth=1", student_size=32)
    with pytest.raises(UserError, match="no one embedding of an image"):
        model.build_student(cfg)


@pytest.mark.parametrize("name", ["tiny_vit_5m_224", "levit_128s"])
def test_a_student_that_keeps_what_it_computes_embeds_with_its_checkpoints_weights(tiny, name):
    # Both keep attention biases of their first forward in eval mode.
    size = 96 if name == "tiny_vit_5m_224" else 224
    cfg = tiny(student=name, student_size=size, student_args="")
    trained = model.build_student(cfg).train()
    for key, weight in trained.net.named_parameters():
        if key.endswith("attention_biases"):
            torch.nn.init.normal_(weight.data)
    state = trained.net.state_dict()
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(model.build_student(cfg, state)(images).cls, trained.eval()(images).cls)
