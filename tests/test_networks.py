"""Teachers and students: their weights, their constants, the statistics of the heads."""

import dataclasses
import json

import pytest
import safetensors.torch
import timm
import torch

import model
import train
from config import UserError
from test_smoke import demo_distiller, latest, metrics, same


def test_weights_of_another_model_are_refused(tmp_path):
    other = timm.create_model("resnet18", num_classes=0).state_dict()
    safetensors.torch.save_file(other, tmp_path / "resnet18.safetensors")
    with pytest.raises(UserError, match="does not fit tf_efficientnet_lite0"):
        model.load_teacher("tf_efficientnet_lite0", 64, str(tmp_path / "resnet18.safetensors"))


@pytest.mark.parametrize("name, mean, std", [
    ("resnet18", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ("vit_tiny_patch16_224", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])
def test_every_model_normalises_by_its_own_constants(monkeypatch, name, mean, std):
    images, student, seen = torch.rand(1, 3, 32, 32), model.build_student(name, 32), []
    inner = student.net.forward_features
    monkeypatch.setattr(student.net, "forward_features", lambda x: (seen.append(x), inner(x))[1])
    student(images)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    assert torch.allclose(seen[0], (images - mean) / std, atol=1e-5)


def test_a_student_can_start_from_weights(tiny, tmp_path):
    train.main(tiny(epochs=1))
    exported = str(tiny().run_path / "student.safetensors")
    student = model.student_of(tiny(student_weights=exported, seed=5))
    assert same(student.net.state_dict(), safetensors.torch.load_file(exported))


def test_resnets_get_a_trained_head_because_their_features_have_no_negative_side():
    _, vit = demo_distiller()
    _, conv = demo_distiller(student="resnet18", student_args="")
    assert [d.heads["cls"].kind for d in (vit, conv)] == ["pca", "linear"]
    assert conv.student(torch.rand(2, 3, 32, 32)).cls.min() >= 0


def test_statistics_of_the_heads_use_places_all_over_the_grid():
    class Places(model.Head):
        def fit(self, features):
            places.append({int(place) for place in features[:, 0]})

    for side in (4, 6, 7, 8, 14, 16):
        places = []
        _, distiller = demo_distiller()
        distiller.heads["cls"] = distiller.heads["patch"] = Places("pca", 48, 96)
        distiller.teacher_grid = distiller.student.grid = (side, side)
        tokens = torch.arange(side * side).float()[None, :, None].expand(2, -1, 96)
        distiller.fit([model.Features(tokens[:, 0], tokens)] * 64)  # as many batches as in a run
        assert len(places[-1]) > 0.8 * side * side


@pytest.mark.parametrize("changes", [dict(precision="bf16"), dict(precision="fp16"),
                                     dict(head="linear")])
def test_precisions_and_heads_train(tiny, changes):
    cfg = tiny(**changes)
    assert train.main(cfg)["step"] == 10
    saved = torch.load(latest(cfg), weights_only=True)
    assert bool(saved["scaler"]) == (cfg.precision == "fp16"), "fp16 saves its loss scale"
    assert metrics(cfg)[-1]["norm"] < 10, "without the loss scale"


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
    with pytest.raises(UserError, match="other settings.*\n  - teacher_hash: "):
        train.main(dataclasses.replace(cfg, epochs=3, teacher_weights=other))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_student_can_be_the_next_teacher(tiny, tmp_path, pool):
    cfg = tiny(epochs=1, pool=pool)
    train.main(cfg)
    saved, _ = model.load_checkpoint(latest(cfg))
    student = model.student_of(cfg, saved["student"])
    path = str(cfg.run_path / "student.safetensors")
    teacher, images = model.load_teacher(cfg.student, 32, path), torch.rand(2, 3, 32, 32)
    for found, expected in zip(teacher(images), student(images), strict=True):
        assert torch.equal(found, expected)
    train.main(tiny(epochs=1, teacher=cfg.student, teacher_weights=path,
                    run_dir=str(tmp_path / "next")))


def test_a_teachers_file_chooses_no_other_file(tmp_path):
    how = json.dumps(dict(args=dict(checkpoint_path="other.pth")))
    path = tmp_path / "hostile.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, dict(student=how))
    with pytest.raises(UserError, match="for weights see"):
        model.load_teacher("vit_tiny_patch16_224", 32, str(path))


def test_a_teacher_without_a_position_table_is_resized(tmp_path):
    name = "swin_tiny_patch4_window7_224"
    net = timm.create_model(name, num_classes=0)
    safetensors.torch.save_file(net.state_dict(), tmp_path / "swin.safetensors")
    teacher = model.load_teacher(name, 64, str(tmp_path / "swin.safetensors"))
    assert teacher(torch.rand(1, 3, 64, 64)).patches.shape == (1, 4, 768)
