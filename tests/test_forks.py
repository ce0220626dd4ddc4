"""Changes of the method that are right when written naively: each trains, continues to the bit, is
evaluated and exported.

The files of examples/forks, and here what a researcher would write in ten minutes. Three epochs
with one cached view, so that the cache is filled and read. A new fork adds a line.
"""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models import register_model
from torch import nn

import data
import eval as evaluation
import model
import train
from config import DATASETS, EvalConfig, UserError
from examples.forks import ema, gram, jitter, labels, masked, middle, queue_kl
from test_smoke import TINY, latest, metrics, same, weights

ROOT = Path(__file__).parents[1]
SMALL = "embed_dim=48 depth=2 num_heads=2 patch_size=8"


class Dropping(model.Distiller):
    """The student sees half of its patches."""

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        student.net.patch_drop.register_forward_hook(self.drop)

    def drop(self, module, inputs, tokens):
        if module.training:
            first, patches = tokens[:, : self.student.prefix], tokens[:, self.student.prefix :]
            order = torch.rand(patches.shape[:2], device=tokens.device).argsort(1)
            self.kept = order[:, : patches.shape[1] // 2, None]
            return torch.cat([first, patches.take_along_dim(self.kept, 1)], 1)

    def losses(self, features, target):
        kept = target[:, 1:].take_along_dim(self.kept, 1)
        return super().losses(features, torch.cat([target[:, :1], kept], 1))


class MultiCrop(model.Distiller):
    """Small crops of the view are to have its embedding, too."""

    def forward(self, images, target):
        loss, stats = super().forward(images, target)
        size = images.shape[-1]
        local = []
        for _ in range(2):
            x, y = torch.randint(size // 2, (2,)).tolist()
            crop = images[..., y : y + size // 2, x : x + size // 2]
            cls = self.embed(self.student, F.interpolate(crop, size=(size, size))).cls
            cls = self.cls_head.predict(cls)
            local.append(model.cosine_loss(cls, target[:, 0, : cls.shape[-1]]).mean())
        local = torch.stack(local).mean()
        return loss + local, stats | dict(local=local)


class CutMix(model.Distiller):
    """A column of each image comes from another one, by numpy's global generator."""

    def forward(self, images, target):
        order = np.random.permutation(len(images))
        rows, columns = self.student.grid
        width = np.random.randint(columns)
        mixed = images.clone()
        pixels = width * images.shape[-1] // columns
        mixed[..., :pixels] = images[order][..., :pixels]
        patches = target[:, 1:].unflatten(1, (rows, columns)).clone()
        patches[:, :, :width] = patches[order][:, :, :width]
        share = width / columns
        cls = (1 - share) * target[:, :1] + share * target[order, :1]
        return super().forward(mixed, torch.cat([cls, patches.flatten(1, 2)], 1))


class RawGram(model.Distiller):
    """The Gram matrix of the raw patches: cached as they are, as wide as the teacher's."""

    def targets(self, features):
        raw = F.normalize(self.on_student_grid(features).patches.float(), dim=-1)
        return model.concatenate_tokens(super().targets(features), raw)

    def losses(self, features, target):
        N = features.patches.shape[1]
        loss, stats = super().losses(features, target[:, : 1 + N])
        student = F.normalize(features.patches.float(), dim=-1)
        teacher = F.normalize(target[:, 1 + N :], dim=-1)
        gram_loss = (student @ student.mT - teacher @ teacher.mT).square().mean()
        return loss + gram_loss, stats | dict(gram=gram_loss)


FORKS = [model.Distiller, masked.Masked, queue_kl.QueueKL, ema.EMA, middle.Middle, jitter.Jitter,
         labels.Labels, gram.Gram, Dropping, MultiCrop, CutMix, RawGram]


def state(cfg) -> dict:
    return torch.load(latest(cfg), weights_only=True)["objective"]


def stop_after(monkeypatch, steps: int) -> None:
    """Send this process SIGTERM in the given step, counted from where the run begins."""
    inner, left = torch.amp.GradScaler.update, [steps]

    def update(self, *arguments):
        inner(self, *arguments)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(torch.amp.GradScaler, "update", update)


def continues(cfg, monkeypatch, objective=model.Distiller, program=train):
    """A run must have the weights of one that is stopped twice and continued: the other's Config.
    program: train.py, or a changed copy of it."""
    program.main(cfg, objective=objective)
    stopped = dataclasses.replace(cfg, run_dir=f"{cfg.run_path}-stopped")
    for steps in (3, 6):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop_after(patch, steps)
            program.main(stopped, objective=objective)
    program.main(stopped, objective=objective)
    assert same(state(cfg), state(stopped))
    return stopped


def check_export(cfg) -> None:
    """timm alone embeds with the exported file as the checkpoint's student does."""
    with safetensors.safe_open(cfg.run_path / "student.safetensors", "pt") as file:
        how = json.loads(file.metadata()["student"])
    plain = timm.create_model(how["model"], **how["args"], num_classes=0).eval()
    plain.load_state_dict(safetensors.torch.load_file(cfg.run_path / "student.safetensors"))
    saved, _ = model.load_checkpoint(cfg.run_path)
    student = model.build_student(cfg, saved["student"])
    images = torch.rand(2, 3, cfg.student_size, cfg.student_size)
    with torch.inference_mode():
        got = plain((images - student.mean) / student.std)
        assert torch.allclose(got, student(images).cls, atol=1e-5)


@pytest.mark.parametrize(
    "fork", [FORKS[0], *(pytest.param(fork, marks=pytest.mark.slow) for fork in FORKS[1:])])
def test_a_fork_keeps_every_promise(tiny, tmp_path, monkeypatch, fork):
    cfg = tiny(epochs=3, teacher_views=1, student_args=SMALL)
    cfg = continues(cfg, monkeypatch, fork)
    row = evaluation.main(EvalConfig((latest(cfg),), baselines=False, max_train=80, max_test=80))
    assert 0 <= row[-1]["knn20"] <= 1
    check_export(cfg)


@pytest.mark.slow
@pytest.mark.parametrize("fork", FORKS)
def test_a_fork_trains_where_the_grids_differ_and_nothing_is_cached(tiny, tmp_path, monkeypatch,
                                                                    fork):
    cfg = tiny(epochs=3, teacher_views=0, student_size=48, student_args=SMALL)
    continues(cfg, monkeypatch, fork)


@pytest.mark.slow
def test_forks_with_other_targets_have_a_cache_of_their_own(tiny, tmp_path):
    changes = dict(cache_dir=str(tmp_path / "cache"), epochs=1, teacher_views=1)
    counts = {}
    for fork in FORKS:
        train.main(tiny(run_dir=str(tmp_path / fork.__name__), **changes), objective=fork)
        counts[fork.__name__] = len(list((tmp_path / "cache" / "targets").iterdir()))
    new = [name for name, before in zip(counts, [0, *counts.values()], strict=False)
           if counts[name] > before]
    assert new == ["Distiller", "Middle", "Jitter", "Gram", "RawGram"]


def test_what_a_fork_registers_is_trained_or_carried_along(tiny, tmp_path):
    cfg = tiny(epochs=1, student_args="embed_dim=48 depth=1 num_heads=2 patch_size=8")
    train.main(cfg, objective=masked.Masked)
    assert state(cfg)["mask_token"].abs().max() > 0
    train.main(dataclasses.replace(cfg, run_dir=str(tmp_path / "q")), objective=queue_kl.QueueKL)
    queue = state(dataclasses.replace(cfg, run_dir=str(tmp_path / "q")))["queue"]
    noise = torch.randn(queue.shape, generator=torch.Generator().manual_seed(0))
    noise = torch.nn.functional.normalize(noise, dim=1)
    assert torch.equal(queue[80:], noise[: len(noise) - 80]), "five batches of sixteen came in"


def test_the_cached_gram_matrix_is_that_of_the_raw_patches(tiny):
    cfg = tiny(student_size=48, student_args=SMALL)
    teacher = model.load_teacher(cfg)
    distiller = gram.Gram(model.build_student(cfg), teacher, cfg)
    features = teacher(torch.rand(2, 3, 32, 32))
    target = data.dequantise(data.quantise(distiller.targets(features)))
    raw = model.resample_patches(features.patches, (4, 4), (6, 6))
    unit = F.normalize(raw, dim=-1)
    assert target.shape == (2, 1 + 36 + 36, 48)
    assert (target[:, -36:, :36] - unit @ unit.mT).abs().max() < 0.01


def test_labels_are_learned_beside_distillation(tiny):
    cfg = tiny(epochs=8, teacher_views=1, student_args=SMALL, crop_scale=0.8)
    train.main(cfg, objective=labels.Labels)
    assert metrics(cfg)[-1]["cross_entropy"] < 0.97 * metrics(cfg)[0]["cross_entropy"]
    with pytest.raises(UserError, match="no labels of two classes"):
        train.main(dataclasses.replace(cfg, label_column="none", run_dir=f"{cfg.run_path}2"),
                   objective=labels.Labels)


@pytest.mark.slow
def test_two_processes_learn_labels_as_one_does(tiny, tmp_path):
    cfg = tiny(epochs=3, teacher_views=1, student_args=SMALL, precision="fp32")
    one = train.main(cfg, objective=labels.Labels)
    flags = []
    for name in (*TINY, "epochs", "teacher_views", "student_args", "cache_dir"):
        flags += [f"--{name}", str(getattr(cfg, name))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "examples/forks/labels.py"), *flags]
    processes = [subprocess.Popen(
        [*command, "--run_dir", str(tmp_path / "two")], cwd=tmp_path,
        stdout=subprocess.DEVNULL, env=dict(
            os.environ, OMP_NUM_THREADS="1", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))) for rank in range(2)]
    try:
        assert [process.wait(timeout=200) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    two = metrics(dataclasses.replace(cfg, run_dir=str(tmp_path / "two")))[-1]
    for name in ("loss", "cls", "patch", "cross_entropy"):
        assert two[name] == pytest.approx(one[name], abs=1e-3), name


class Hooked(model.Distiller):
    """The patches are what a module deep in the last block outputs."""

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        self.found = {}
        for net in (student.net, teacher.net):
            net.blocks[-1].attn.proj.register_forward_hook(
                lambda module, inputs, output: self.found.update(output=output))

    def embed(self, backbone, images):
        features = backbone(images)
        return features._replace(patches=self.found["output"][:, backbone.prefix:])


@pytest.mark.slow
@pytest.mark.parametrize("fork", [Hooked, labels.Labels])
def test_forks_compile(tiny, tmp_path, fork):
    cfg = tiny(epochs=1, teacher_views=1, log_every=1)
    train.main(cfg, objective=fork)
    changes = dict(run_dir=str(tmp_path / "on"), cache_dir=str(tmp_path / "afresh"), compile="on")
    compiled = dataclasses.replace(cfg, **changes)
    train.main(compiled, objective=fork)
    if "not compiled" in (compiled.run_path / "train.log").read_text():
        pytest.skip("torch.compile needs a C++ compiler")
    for eager, line in zip(metrics(cfg), metrics(compiled), strict=True):
        assert eager["loss"] == pytest.approx(line["loss"], abs=2e-3)


def test_a_fork_scales_learning_rates_and_returns_another_loss(tiny):
    class Still(model.Distiller):
        def parameter_groups(self, weight_decay):
            return [dict(group, lr_scale=0.0) for group in super().parameter_groups(weight_decay)]

        def forward(self, images, target):
            loss, stats = super().forward(images, target)
            return loss + 1, stats | dict(mine=stats["cls"] * 2)

    cfg = tiny(epochs=1)
    line = train.main(cfg, objective=Still)
    assert line["loss"] == pytest.approx(1 + line["cls"] + cfg.patch_weight * line["patch"])
    assert line["mine"] == pytest.approx(2 * line["cls"]), "a number of one's own is logged"
    saved = torch.load(latest(cfg), weights_only=True)
    assert same(saved["student"], model.build_student(cfg).net.state_dict())


# ---------------------------------------------------------------------------- networks and data


class Both(nn.Module):
    """Two teachers side by side, in training mode as they are made."""

    pretrained_cfg = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    num_prefix_tokens = 1

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(
            timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8,
                              depth=1, drop_rate=0.5, proj_drop_rate=0.5, pos_drop_rate=0.5)
            for _ in range(2))

    def forward_features(self, images):
        return torch.cat([part.forward_features(images) for part in self.parts], -1)

    def forward_head(self, x, pre_logits=False):
        return x[:, 0]


@register_model
def two_teachers(pretrained=False, **arguments):
    torch.manual_seed(SEEDS["teacher"])  # in place of weights
    return Both()


class Pooled(nn.Module):
    """A network of torchvision."""

    pretrained_cfg = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

    def __init__(self, net):
        super().__init__()
        self.body = net.features

    def forward_features(self, images):
        return self.body(images)

    def forward_head(self, x, pre_logits=False):
        return x.mean((2, 3))

    def forward(self, images):
        return self.forward_head(self.forward_features(images))


@register_model
def mobilenet_of_torchvision(pretrained=False, **arguments):
    torchvision = pytest.importorskip("torchvision")
    return Pooled(torchvision.models.mobilenet_v3_small(weights=None))


class Hidden(nn.Module):
    """A ViT of transformers; its class token comes first."""

    pretrained_cfg = Both.pretrained_cfg
    num_prefix_tokens = 1

    def __init__(self, size):
        super().__init__()
        from transformers import ViTConfig, ViTModel
        config = ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=2,
                           intermediate_size=96, image_size=size, patch_size=8)
        self.net = ViTModel(config, add_pooling_layer=False)

    def forward_features(self, images):
        return self.net(images).last_hidden_state

    def forward_head(self, x, pre_logits=False):
        return x[:, 0]

    def forward(self, images):
        return self.forward_head(self.forward_features(images))


@register_model
def vit_of_transformers(pretrained=False, size=32, **arguments):
    return Hidden(size)


SEEDS = dict(teacher=0)


@pytest.mark.slow
def test_two_teachers_are_one_that_is_registered(tiny, tmp_path, monkeypatch):
    cfg = tiny(epochs=3, teacher_views=1, teacher="two_teachers", student_args=SMALL)
    cfg = continues(cfg, monkeypatch)
    assert model.load_teacher(cfg).cls_dim == 2 * 192
    args = EvalConfig((latest(cfg),), max_train=80, max_test=80)
    rows = evaluation.main(args)
    assert [row["model"] for row in rows[:1]] == ["teacher two_teachers"]
    monkeypatch.setitem(SEEDS, "teacher", 1)  # another process has other weights
    with pytest.raises(UserError, match="other weights"):
        evaluation.main(args)
    with pytest.raises(UserError, match="teacher"):
        train.main(dataclasses.replace(cfg, epochs=4))
    evaluation.main(dataclasses.replace(args, baselines=False))


def test_a_registered_teacher_is_in_eval_mode(tiny):
    cfg = tiny(teacher="two_teachers")
    teacher, images = model.load_teacher(cfg), torch.rand(4, 3, 32, 32)
    assert not any(module.training for module in teacher.net.modules())
    with torch.inference_mode():
        assert torch.equal(teacher(images).cls, teacher(images).cls)


@pytest.mark.slow
@pytest.mark.parametrize("student, package", [
    ("mobilenet_of_torchvision", "torchvision"), ("vit_of_transformers", "transformers")])
def test_a_student_of_another_library_trains(tiny, tmp_path, monkeypatch, student, package):
    pytest.importorskip(package)
    cfg = tiny(epochs=3, teacher_views=1, student=student, student_args="")
    cfg = continues(cfg, monkeypatch)
    check_export(cfg)
    if package == "transformers":
        built = model.build_student(cfg)
        assert built.prefix == 1 and built.grid == (4, 4)
        x = built.net.forward_features(torch.rand(2, 3, 32, 32))
        assert torch.equal(built.to_features(x).cls, x[:, 0])
        assert torch.equal(built.to_features(x).patches, x[:, 1:])


def colours(shift: int):
    """A data set of one's own: pictures of a colour, which is the class."""
    def splits():
        rng = np.random.default_rng(0)
        found = {}
        for split, count in dict(train=80, test=40).items():
            pixels = rng.integers(0, 100, (count, 32, 32, 3)).astype(np.uint8)
            for i in range(count):
                pixels[i, ..., i % 3] += 100 + shift
            columns = dict(picture=[Image.fromarray(image) for image in pixels],
                           label=["red green blue".split()[i % 3] for i in range(count)])
            features = datasets.Features(picture=datasets.Image(), label=datasets.Value("string"))
            found[split] = datasets.Dataset.from_dict(columns, features)
        return found
    return splits


def test_a_data_set_of_ones_own_is_known_by_its_content(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "mine", colours(0))
    cfg = tiny(epochs=3, teacher_views=1, dataset="mine", student_args=SMALL,
               cache_dir=str(tmp_path / "cache"))
    cfg = continues(cfg, monkeypatch)
    row = evaluation.main(EvalConfig((latest(cfg),), baselines=False))[-1]
    assert row["knn20"] > 0.9 and (row["train_images"], row["test_images"]) == (80, 40)
    first = data.open_store(cfg, "train")
    monkeypatch.setitem(DATASETS, "mine", colours(20))  # a setting of the fork
    second = data.open_store(cfg, "train")
    assert first.fingerprint != second.fingerprint
    index = np.arange(8)
    difference = second.images[index].int() - first.images[index].int()
    assert difference.amax((1, 2, 3)).eq(20).all() and second.labels()[1] == "green"
    with pytest.raises(UserError, match="images"):
        train.main(dataclasses.replace(cfg, epochs=4))


def test_groups_that_would_go_wrong_are_said(tiny, monkeypatch):
    class Rate(model.Distiller):
        def parameter_groups(self, weight_decay):
            return [dict(params=self.parameters(), lr=1e-6)]

    class Forgotten(model.Distiller):
        def parameter_groups(self, weight_decay):
            return [dict(params=self.student.parameters())]

    said = []
    monkeypatch.setattr(train.log, "warning", said.append)
    with pytest.raises(UserError, match="lr_scale, which multiplies --lr, in place of lr"):
        train.main(tiny(epochs=1), objective=Rate)
    cfg = tiny(epochs=1, head="linear")
    train.main(cfg, objective=Forgotten)
    assert not same(weights(cfg), model.build_student(cfg).net.state_dict()), "it has learned"
    assert [text for text in said if "leaves out 4 " in text and "cls_head.predict" in text], said


def test_a_teacher_of_ones_own_needs_a_fingerprint(tiny, monkeypatch):
    load = model.load_teacher
    monkeypatch.setattr(model, "load_teacher", lambda cfg: model.Backbone(
        load(cfg).net, cfg.teacher_size))
    with pytest.raises(UserError, match="has to set fingerprint"):
        train.main(tiny(teacher_views=0))


def test_a_run_does_not_continue_with_another_optimiser(tiny, monkeypatch):
    cfg = tiny(epochs=1)
    train.main(cfg)
    saved = torch.load(latest(cfg), weights_only=True)
    del saved["identity"]["optimiser"]  # an older run continues
    torch.save(saved, latest(cfg))
    cfg = dataclasses.replace(cfg, epochs=2)
    train.main(cfg)
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, lr, fused: torch.optim.RAdam(
        groups, lr, decoupled_weight_decay=True))  # a setting of the fork, and states of the names
    with pytest.raises(UserError, match="optimiser: 'AdamW', now 'RAdam'"):
        train.main(dataclasses.replace(cfg, epochs=cfg.epochs + 1))


def test_muon_brings_its_own_rate_by_lr_scale(tiny, tmp_path, monkeypatch):
    """Naively, as a subclass of AdamW: matrices of blocks take Muon's steps, others AdamW's. The
    patch of docs/recipes.md, which has an optimiser of its own for them, runs in test_docs.py."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch 2.9 has Muon")

    class Scaled(model.Distiller):
        def parameter_groups(self, weight_decay):
            hidden = [p for p in self.student.net.blocks.parameters() if p.ndim == 2]
            return [dict(params=hidden, lr_scale=20.0, weight_decay=weight_decay)]

    rates = []

    class Muon(torch.optim.Muon):
        def __init__(self, groups, lr, fused):
            super().__init__(groups, lr=lr)

        def step(self, *arguments):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*arguments)

    monkeypatch.setattr(torch.optim, "AdamW", Muon)
    cfg = tiny(epochs=3, teacher_views=1, student_args=SMALL, log_every=1)
    continues(cfg, monkeypatch, Scaled)
    expected = [20 * line["lr"] for line in metrics(cfg)]
    assert rates[:15] == pytest.approx(expected) and rates[15:] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["step", "epoch", "lr", "seconds", "loss", "norm"])
def test_a_number_with_the_name_of_a_field_is_refused(tiny, name):
    class Named(model.Distiller):
        def losses(self, features, target):
            loss, stats = super().losses(features, target)
            return loss, stats | {name: loss.detach()}

    with pytest.raises(UserError, match=f"needs another name: {name}"):
        train.main(tiny(), objective=Named)


def test_a_fork_with_the_name_of_what_it_extends_is_refused(tiny):
    fork = type("Distiller", (model.Distiller,), {})
    with pytest.raises(UserError, match="a name of its own"):
        train.main(tiny(), objective=fork)


def test_weights_that_a_fork_adds_to_the_student_are_refused_before_training(tiny):
    class Adapter(model.Distiller):
        def __init__(self, student, teacher, cfg):
            super().__init__(student, teacher, cfg)
            student.net.adapter = nn.Linear(4, 4)

    with pytest.raises(UserError, match="other weights than timm builds it with"):
        train.main(tiny(), objective=Adapter)


def test_patches_that_are_not_square_are_refused(tiny):
    with pytest.raises(UserError, match="its patches are not square"):
        train.main(tiny(student_args="patch_size=(8,2) depth=1"))


class Frozen(model.Distiller):
    """Some layers are frozen in the first epoch; others stay frozen, batch norm included."""

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        student.net.layer1.requires_grad_(False).eval()
        student.net.layer2.requires_grad_(False)

    def student_view(self, images, epoch, index):
        self.student.net.layer2.requires_grad_(epoch >= 1)
        return images


def test_frozen_layers_stay_so_until_they_are_to_learn(tiny, tmp_path):
    found = []
    for every in (0, 1):
        cfg = tiny(student="resnet10t", student_args="", epochs=2, teacher_views=1,
                   eval_every=every, run_dir=str(tmp_path / f"{every}"))
        train.main(cfg, objective=Frozen)
        found.append(weights(cfg))
    assert same(*found), "an evaluation changes nothing"
    before = model.build_student(cfg).net.state_dict()
    for name, value in found[0].items():
        if name.startswith(("layer1", "layer2")) and name.endswith("weight"):
            assert torch.equal(value, before[name]) == name.startswith("layer1")


@register_model
def tied(pretrained=False, img_size=32, **arguments):
    """A ViT whose blocks are one."""
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0, patch_size=8, embed_dim=48,
                            num_heads=2, depth=2, img_size=img_size)
    net.blocks[1] = net.blocks[0]
    return net


def test_weights_that_a_student_shares_are_exported(tiny, tmp_path):
    cfg = tiny(student="tied", student_args="", epochs=1)
    train.main(cfg)
    exported = safetensors.torch.load_file(cfg.run_path / "student.safetensors")
    assert same(exported, weights(cfg))


class Clipped(model.Head):
    def target(self, features):
        return super().target(features).clamp(-3.5, 3.5)


class WithClipped(model.Distiller):
    """Another target, by a head of one's own; a statistic that is a number."""

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        self.cls_head = Clipped("pca", student.cls_dim, teacher.cls_dim)

    def losses(self, features, target):
        loss, stats = super().losses(features, target)
        return loss, stats | dict(half=0.5)


def test_a_head_of_ones_own_has_a_cache_of_its_own(tiny, tmp_path):
    for number, objective in enumerate((model.Distiller, WithClipped)):
        cfg = tiny(epochs=1, teacher_views=1, cache_dir=str(tmp_path / "cache"),
                   run_dir=str(tmp_path / str(number)))
        train.main(cfg, objective=objective)
    assert len([*(tmp_path / "cache" / "targets").iterdir()]) == 2
    assert metrics(cfg)[-1]["half"] == 0.5


def test_a_fork_that_has_changed_since_does_not_continue_its_run(tiny):
    def fork(count):
        class Changed(model.Distiller):
            def __init__(self, student, teacher, cfg):
                super().__init__(student, teacher, cfg)
                self.register_buffer("queue", torch.zeros(count))

        return Changed

    train.main(tiny(epochs=1), objective=fork(3))
    with pytest.raises(UserError, match="of other code: its objective does not fit"):
        train.main(tiny(epochs=2), objective=fork(4))


def test_groups_without_weight_decay_take_the_settings(tiny, monkeypatch):
    decays = []

    class Grouped(model.Distiller):
        def parameter_groups(self, weight_decay):
            return [dict(params=[*self.parameters()])]

    inner = train.check_groups
    monkeypatch.setattr(train, "check_groups", lambda cfg, distiller, parts: (
        decays.append(parts["optimiser"].param_groups[0]["weight_decay"]),
        inner(cfg, distiller, parts)))
    for name in ("adamw", "muon"):
        train.main(tiny(epochs=1, optimiser=name, weight_decay=0.3, resume=False), Grouped)
    assert decays == [0.3, 0.3]


def test_a_student_of_nan_is_not_saved(tiny):
    class Broken(model.Distiller):
        def after_step(self, step):
            if step == 9:
                self.student.net.norm.bias.data.fill_(torch.nan)

    cfg = tiny(epochs=2)
    with pytest.raises(UserError, match="weights of the student are NaN"):
        train.main(cfg, objective=Broken)
    assert all(value.isfinite().all() for value in weights(cfg).values())
