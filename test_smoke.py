"""The method's specification, and it runs: python -m pytest test_smoke.py

Each test is one claim. They need no network, no GPU and nothing outside this folder; tests/ holds
the longer ones (several processes, a loopback Hub, hostile files).
"""

import dataclasses
import gc
import itertools
import json
import os
import random
import shutil
import signal
import weakref

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

import data
import eval as evaluation
import model
import train
from config import Config, EvalConfig, UserError, parse

TINY = dict(
    dataset="shapes", teacher="demo", teacher_size=32, student="vit_tiny_patch16_224",
    student_size=32, student_args="embed_dim=48 depth=2 num_heads=2", batch_size=16,
    max_samples=80, epochs=2, precision="fp32", device="cpu", log_every=2, lr=2e-3)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tiny(tmp_path, cache):
    """A training run of seconds: tiny(epochs=3) -> Config."""
    folders = dict(cache_dir=cache, run_dir=str(tmp_path / "run"))
    return lambda **changes: Config(**TINY | folders | changes)


def latest(cfg: Config) -> str:
    return str(cfg.run_path / "checkpoint_latest.pth")


def weights(cfg: Config) -> dict:
    return torch.load(latest(cfg), weights_only=True)["student"]


def metrics(cfg: Config) -> list[dict]:
    return [json.loads(line) for line in (cfg.run_path / "metrics.jsonl").read_text().splitlines()]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def demo_distiller(**changes):
    cfg = Config(**TINY | changes)
    teacher = model.load_teacher(cfg)
    return teacher, model.Distiller(model.build_student(cfg), teacher, cfg)


# ---------------------------------------------------------------------------- what to do


def test_mistakes_are_reported_together_with_the_nearest_name():
    with pytest.raises(UserError) as flags:
        parse(Config, "--epoch 5 --run_dri x --pool max".split())
    for expected in ("did you mean --epochs", "did you mean --run_dir", "not one of cls|mean"):
        assert expected in str(flags.value)


def test_flags_override_the_preset_and_no_resume_is_a_switch():
    cfg = parse(Config, "--preset demo --epochs 3 --no_resume".split())
    assert (cfg.dataset, cfg.epochs, cfg.resume) == ("shapes", 3, False)


@pytest.mark.parametrize("argv, words", [
    ("--preset large", "--dataset ''"), ("--eval_dataset x", "--eval_dataset 'x': no folder"),
    ("--cls_weight 0 --patch_weight 0", "--cls_weight and --patch_weight are both 0"),
    ("--dataset cifar1", "no folder.*cifar10"), ("--lr nan", "--lr nan: must be from 0 to 1e[+]09"),
])
def test_settings_that_cannot_train_are_refused(argv, words):
    with pytest.raises(UserError, match=words):
        train.main(parse(Config, argv.split()))


@pytest.mark.parametrize("changes, words", [
    (dict(student_size=100), "multiple of"),
    (dict(teacher="dinov2_vitb14", teacher_size=96), "such as 98"),
    (dict(student_args="depth"), "name=value"),
    (dict(student_args="patch_drop_rate=0.5"), "drop no patches"),
    (dict(student_args="drop_path_rate=2"), "bernoulli"),
    (dict(student_args="depht=6"), "depht"),
    (dict(student="vit_smal_patch16_224"), "not a model .*did you mean .*vit_small_patch16_224"),
    (dict(teacher="dinov2_small"), "not a model .*did you mean dinov2_vits14"),
    (dict(student="pit_ti_224", student_size=224, student_args=""), "no square grid"),
])
def test_models_that_do_not_fit_are_refused_before_anything_is_written(
        tiny, tmp_path, changes, words):
    cfg = tiny(cache_dir=str(tmp_path / "cache"), **changes)
    with pytest.raises(UserError, match=words) as error:
        train.main(cfg)
    assert ("--teacher " in str(error.value)) == ("teacher" in changes)
    assert not cfg.run_path.exists() and not (tmp_path / "cache").exists()


# ---------------------------------------------------------------------------- pixels


def test_a_view_is_a_pure_function_of_seed_view_and_image():
    index = np.arange(10_000)
    boxes, flips = data.view_crops(index, 7, 3, 0.4)
    some = [9000, 3, 41]
    alone = data.view_crops(np.array(some), 7, 3, 0.4)
    assert torch.equal(alone[0], boxes[some]) and torch.equal(alone[1], flips[some])
    for seed, view in ((8, 3), (7, 4)):
        others, flipped = data.view_crops(index, seed, view, 0.4)
        assert (boxes != others).any(1).all() and 0.45 < (flips != flipped).float().mean() < 0.55
    x, y, w, h = boxes.T
    assert 0.39 < (w * h).min() < 0.41 and (w * h).max() <= 1 and abs((w * h).mean() - 0.69) < 0.02
    assert min(x.min(), y.min()) >= 0 and max((x + w).max(), (y + h).max()) <= 1 + 1e-6
    assert 0.74 < (w / h).min() and (w / h).max() < 1.34
    assert abs(flips.double().mean() - 0.5) < 0.02


def test_the_uses_of_random_numbers_are_independent_at_the_default_seed():
    rows = np.arange(10_000)
    few = data.subset(rows, 1000), data.subset(rows, 1000, data.HELD_OUT)
    few += data.epoch_order(10_000, 0, 0)[:1000], data.epoch_order(10_000, 0, 1)[:1000]
    for a, b in itertools.combinations(map(set, few), 2):
        assert len(a) == len(b) == 1000 and 60 < len(a & b) < 140, "a tenth, by chance"


def test_each_step_draws_by_all_bits_of_the_seed():
    seeds = [0, *(1 << bit for bit in range(31))]
    places = [(seed, 0, 0) for seed in seeds] + [(0, 1, 0), (0, 0, 1), (0, 1, 1), (0, 2**31, 0)]
    draws = []
    for place in places:
        train.seed_everything(*place)
        draws.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert [len(set(kind)) for kind in zip(*draws, strict=True)] == [len(places)] * 3


@pytest.mark.parametrize("stored, size", [(32, 96), (96, 48), (80, 37)])
def test_rendering_a_box_is_what_pil_does(stored, size):
    # PIL clips between its two passes; mild contrasts keep that out of the comparison.
    pixels = np.random.default_rng(0).integers(64, 192, (stored, stored, 3), np.uint8)
    x, y, w, h = 0.11, 0.25, 0.63, 0.55
    image = PIL.Image.fromarray(pixels)
    box = tuple(stored * v for v in (x, y, x + w, y + h))
    expected = np.asarray(image.resize((size, size), PIL.Image.Resampling.BICUBIC, box=box)) / 255
    images = torch.from_numpy(pixels.transpose(2, 0, 1))[None].repeat(2, 1, 1, 1)
    boxes = torch.tensor([[x, y, w, h]]).repeat(2, 1)
    got = data.render(images, size, boxes, torch.tensor([False, True]))
    assert abs(got[0].permute(1, 2, 0).numpy() - expected).max() < 1.5 / 255
    assert torch.allclose(got[1], got[0].flip(-1), atol=1e-5)


def test_an_epoch_is_a_permutation_and_processes_share_its_batches():
    order = data.epoch_order(80, 1, 0)
    assert sorted(order) == list(range(80)) and (order != data.epoch_order(80, 1, 1)).any()
    whole, *parts = (data.batches(order, 16, *of) for of in ((0, 1), (0, 2), (1, 2)))
    assert whole.shape == (5, 16) and (np.concatenate(parts, 1) == whole).all()


# ---------------------------------------------------------------------------- networks


def official_dinov2(weights: dict, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the official DINOv2 forward computes for ViT-S/14, written out: (cls, patch tokens)."""
    grid = x.shape[-1] // 14
    projection = weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"]
    tokens = F.conv2d(x, *projection, stride=14).flatten(2).transpose(1, 2)
    registers = weights.get("register_tokens")
    cls_position, table = weights["pos_embed"][:, :1], weights["pos_embed"][:, 1:]
    if grid != 37:
        how = dict(scale_factor=(grid + 0.1) / 37)
        if registers is not None:
            how = dict(size=(grid, grid), antialias=True)
        table = table.reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
        table = F.interpolate(table, mode="bicubic", **how).permute(0, 2, 3, 1).reshape(1, -1, 384)
    tokens = tokens + table
    prefix = [weights["cls_token"] + cls_position] + ([] if registers is None else [registers])
    x = torch.cat([p.expand(len(x), -1, -1) for p in prefix] + [tokens], 1)
    for i in range(12):
        w = {k.removeprefix(f"blocks.{i}."): v for k, v in weights.items()
             if k.startswith(f"blocks.{i}.")}
        y = F.layer_norm(x, (384,), w["norm1.weight"], w["norm1.bias"], 1e-6)
        y = F.linear(y, w["attn.qkv.weight"], w["attn.qkv.bias"])
        q, k, v = y.unflatten(2, (3, 6, 64)).permute(2, 0, 3, 1, 4)
        y = ((q @ k.mT * 64**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + w["ls1.gamma"] * F.linear(y, w["attn.proj.weight"], w["attn.proj.bias"])
        y = F.layer_norm(x, (384,), w["norm2.weight"], w["norm2.bias"], 1e-6)
        y = F.gelu(F.linear(y, w["mlp.fc1.weight"], w["mlp.fc1.bias"]))
        x = x + w["ls2.gamma"] * F.linear(y, w["mlp.fc2.weight"], w["mlp.fc2.bias"])
    x = F.layer_norm(x, (384,), weights["norm.weight"], weights["norm.bias"], 1e-6)
    return x[:, 0], x[:, sum(p.shape[1] for p in prefix) :]


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg"])
def test_dinov2_equals_the_official_code_at_every_size(tmp_path, name):
    """From a .pth with the official names. Plain timm is off by a tenth and more at these sizes."""
    generator = torch.Generator().manual_seed(0)
    state = timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict()
    shapes = {k: v.shape for k, v in state.items()} | dict(mask_token=(1, 384))
    if "reg" in name:
        shapes["register_tokens"] = (1, 4, 384)
    given = {k: torch.randn(s, generator=generator) * 0.05 + ("norm" in k and "weight" in k)
             for k, s in shapes.items()}
    given["pos_embed"] *= 10
    torch.save(given, tmp_path / "official.pth")
    for size in (28, 98, 224):
        teacher = model.load_teacher(Config(
            teacher=name, teacher_size=size, teacher_weights=str(tmp_path / "official.pth")))
        images = torch.rand(1, 3, size, size, generator=generator)
        with torch.inference_mode():
            got = teacher(images)
            cls, patches = official_dinov2(given, (images - teacher.mean) / teacher.std)
        assert got.patches.shape == (1, (size // 14) ** 2, 384)
        assert (got.cls - cls).abs().max() < 1e-5 and (got.patches - patches).abs().max() < 1e-5


@pytest.mark.parametrize("name, size, args, pool, params, widths, side", [
    ("vit_small_patch16_224", 96, "", "cls", 21.60e6, (384, 384), 6),
    ("vit_tiny_patch16_224", 96, "reg_tokens=4", "mean", 5.49e6, (192, 192), 6),
    ("vit_medium_patch16_gap_240", 96, "depth=2", "cls", 6.72e6, (512, 512), 6),
    ("vit_base_patch16_siglip_224", 32, "depth=1", "cls", 14.77e6, (768, 768), 2),
    ("resnet18", 96, "", "cls", 11.18e6, (512, 512), 3),
    ("convnext_atto", 96, "", "cls", 3.37e6, (320, 320), 3),
    ("mobilenetv4_conv_small", 96, "", "cls", 2.49e6, (1280, 960), 3),
    ("swin_tiny_patch4_window7_224", 64, "depths=(1,1,1,1)", "cls", 10.98e6, (768, 768), 2),
    ("xcit_nano_12_p16_224", 96, "", "cls", 2.92e6, (128, 128), 6),
    ("pvt_v2_b0", 96, "", "cls", 3.41e6, (256, 256), 3),
])
def test_the_embedding_of_every_kind_of_student_is_what_timm_returns_for_the_exported_model(
        tiny, name, size, args, pool, params, widths, side):
    cfg = tiny(student=name, student_size=size, student_args=args, pool=pool)
    student, images = model.build_student(cfg), torch.rand(3, 3, size, size)
    cfg.run_path.mkdir()
    train.export(cfg, student)
    exported = cfg.run_path / "student.safetensors"
    with safetensors.safe_open(exported, "pt") as file:
        how = json.loads(file.metadata()["student"])
    assert set(how) == {"model", "args", "image_size", "mean", "std"} and how["image_size"] == size
    plain = timm.create_model(
        how["model"], **how["args"], num_classes=0, checkpoint_path=exported).eval()
    mean, std = (torch.tensor(how[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        cls, patches = student(images)
        embedding = plain((images - mean) / std)
        raw = plain.forward_features((images - mean) / std)
    assert (cls - embedding).abs().max() < 1e-5 * cls.abs().max().clamp(1)
    assert (cls[0] - cls[1]).abs().max() > 1e-3
    if raw.ndim == 4:  # place (1, 0) of a feature map
        place = raw[:, 1, 0] if "swin" in name else raw[:, :, 1, 0]
        assert (patches[:, side] - place).abs().max() < 1e-5 * place.abs().max().clamp(1)
    else:
        assert torch.allclose(patches, raw[:, -(side**2) :], atol=1e-5)
    if pool == "mean":
        assert torch.allclose(cls, patches.mean(1), atol=1e-5)
    assert student.grid == (side, side) and abs(student.parameter_count - params) < 0.01 * params
    assert (cls.shape, patches.shape) == ((3, widths[0]), (3, side**2, widths[1]))


# ---------------------------------------------------------------------------- the method


@pytest.mark.parametrize("head", ["pca", "linear"])
def test_nothing_on_the_teachers_side_gets_a_gradient_or_moves(head):
    teacher, distiller = demo_distiller(head=head)
    heads = torch.nn.ModuleList([distiller.cls_head, distiller.patch_head])

    def frozen():
        return {k: v.clone() for k, v in [*teacher.state_dict().items(), *heads.named_buffers()]}

    before = frozen()
    optimiser = torch.optim.AdamW(distiller.parameter_groups(0.1), lr=1e-2)
    for _ in range(3):
        images = torch.rand(4, 3, 32, 32)
        targets = distiller.targets(teacher(images))
        assert not targets.requires_grad
        distiller(images, targets)[0].backward()
        optimiser.step()
    assert len(before) > 6 and same(before, frozen())
    assert bool(list(heads.parameters())) == (head == "linear")


def test_patch_targets_are_resampled_in_space_not_truncated():
    """A teacher map that is 1 in its lower right quarter stays so on any grid."""
    for old, new in (((16, 16), (6, 6)), ((3, 3), (6, 6)), ((6, 6), (4, 4))):
        ramp = torch.linspace(0, 1, old[0])
        patches = torch.stack(torch.meshgrid(ramp, ramp, indexing="ij")).flatten(1).T[None]
        out = model.resample_patches(patches, old, new).view(*new, 2)
        assert out[0, 0].max() < 0.25 and out[-1, -1].min() > 0.75  # truncation keeps row 0 .. only
        assert out[-1, 0, 0] > 0.75 and out[-1, 0, 1] < 0.25
        assert torch.allclose(out[..., 0], out[..., 1].T, atol=1e-6)
    constant = torch.full((1, 256, 5), 3.0)
    assert torch.allclose(model.resample_patches(constant, (16, 16), (6, 6)), torch.tensor(3.0))


def test_the_loss_is_the_cosine_distance_of_each_token():
    student, target = torch.randn(7, 5, 64), torch.randn(7, 5, 64)
    unit = [F.normalize(x, dim=-1) for x in (student, target)]
    assert torch.allclose(model.cosine_loss(student, target), 1 - (unit[0] * unit[1]).sum(-1))
    assert torch.allclose(model.cosine_loss(-3 * target, target), torch.tensor(2.0))


@pytest.mark.parametrize("student_dim, teacher_dim", [(24, 64), (96, 64)])
def test_fixed_heads_centre_the_targets_and_keep_what_they_can(student_dim, teacher_dim):
    features = torch.randn(2000, teacher_dim) * torch.linspace(3, 0.1, teacher_dim) + 5
    head = model.Head("pca", student_dim, teacher_dim)
    head.whiten = 0.0
    head.fit(features)
    target, centred = head.target(features), features - features.mean(0)
    assert target.shape == (2000, student_dim) and target.mean(0).abs().max() < 1e-4
    kept = target.square().sum() / centred.square().sum()
    if student_dim >= teacher_dim:
        assert torch.allclose(target @ target.T, centred @ centred.T, atol=2e-2)
    else:
        best = torch.linalg.eigvalsh(torch.cov(features.T)).flip(0)
        assert abs(kept - best[:student_dim].sum() / best.sum()) < 1e-4
        correlation = torch.corrcoef(target.T) - torch.eye(student_dim)
        assert correlation.abs().max() < 1e-3


def test_pca_targets_are_half_whitened_and_those_of_the_linear_head_standardised():
    features = torch.randn(3000, 64) * torch.linspace(0.1, 9, 64) - 4
    plain, half, linear = (model.Head(kind, 24, 64) for kind in ("pca", "pca", "linear"))
    plain.whiten = 0.0
    for head in (plain, half, linear):
        head.fit(features)
    before, after = plain.target(features).std(0), half.target(features).std(0)
    assert torch.allclose(after, before.sqrt(), rtol=1e-2) and before.max() > 1.4 * before.min()
    target = linear.target(features)
    assert target.mean(0).abs().max() < 1e-3 and (target.std(0) - 1).abs().max() < 1e-2
    assert linear.predict(torch.rand(2, 24)).shape == (2, 64)


@pytest.mark.parametrize("head", ["pca", "linear"])
def test_the_loss_is_the_weighted_sum_of_two_cosine_distances(head):
    teacher, distiller = demo_distiller(cls_weight=2.0, patch_weight=0.25, head=head)
    view = torch.rand(3, 3, 32, 32)
    cls, patches = teacher(view)
    targets = distiller.targets(model.Features(cls, patches))
    assert targets.shape == (3, 1 + 2 * 2, 48 if head == "pca" else 96)
    assert torch.equal(targets[:, 0], distiller.cls_head.target(cls))
    resampled = model.resample_patches(patches, distiller.teacher_grid, (2, 2))
    assert torch.equal(targets[:, 1:], distiller.patch_head.target(resampled))
    loss, stats = distiller(view, targets)
    features = distiller.student(view)
    cls = model.cosine_loss(distiller.cls_head.predict(features.cls), targets[:, 0])
    patch = model.cosine_loss(distiller.patch_head.predict(features.patches), targets[:, 1:])
    assert torch.allclose(stats["cls"], cls.mean()) and torch.allclose(stats["patch"], patch.mean())
    assert torch.allclose(loss, 2 * stats["cls"] + 0.25 * stats["patch"])
    assert torch.allclose(stats["similarity"], model.mean_similarity(
        distiller.cls_head.predict(features.cls)), atol=1e-6)


def test_similarity_is_the_mean_pairwise_cosine():
    x = torch.randn(9, 5)
    pairs = F.cosine_similarity(x[:, None], x[None], dim=-1)[~torch.eye(9, dtype=bool)]
    assert torch.allclose(model.mean_similarity(x), pairs.mean(), atol=1e-6)
    assert model.mean_similarity(torch.ones(4, 3)) > 0.999


# ---------------------------------------------------------------------------- the loop


def test_learning_rate_warms_up_and_falls_to_nothing():
    cfg = Config(epochs=10, warmup_epochs=1, lr=1.0)
    rates = [train.learning_rate(s, 100, cfg) for s in range(1000)]
    assert rates[0] == 0.01 and max(rates) == rates[99] == 1.0 and rates[-1] < 1e-5
    assert all(a >= b for a, b in zip(rates[99:], rates[100:], strict=False))
    cfg = dataclasses.replace(cfg, warmup_epochs=100)
    assert train.learning_rate(199, 100, cfg) == 1, "a fifth of the run at most"


def test_training_raises_the_cosine_and_the_knn_accuracy(tiny, monkeypatch):
    monkeypatch.setattr(train, "QUICK_EVAL", (300, 300))
    args = "patch_size=8 embed_dim=64 depth=2 num_heads=4 weight_init=jax"
    cfg = tiny(max_samples=512, epochs=10, batch_size=32, teacher_views=2, crop_scale=0.8,
               student_args=args, lr=3e-3, eval_every=5)
    train.main(cfg)
    lines = metrics(cfg)
    assert lines[0]["cls"] > 0.95 and np.mean([line["cls"] for line in lines[-10:]]) < 0.7
    assert [line["epoch"] for line in lines if "test_knn20" in line] == [5, 10]
    teacher, untrained, student = evaluation.main(EvalConfig((latest(cfg),), max_test=500))
    assert teacher["knn20"] > 0.95 and student["knn20"] > untrained["knn20"] + 0.1
    assert student["keeps_knn20"] == student["knn20"] / teacher["knn20"]
    assert student["cos_cls"] > 0.2 and student["cos_patch"] > 0.1


def stop_at(monkeypatch, step: int, number: int) -> None:
    """Send this process a signal in the middle of the given step."""
    inner = train.learning_rate

    def learning_rate(done: int, *rest):
        if done + 1 == step:
            os.kill(os.getpid(), number)
        return inner(done, *rest)

    monkeypatch.setattr(train, "learning_rate", learning_rate)


class Noisy(model.Distiller):
    """A fork that draws from each generator in a step."""

    def student_view(self, images, epoch, index):
        noise = torch.from_numpy(np.random.rand(*images.shape)).float()
        return images + 0.2 * torch.randn_like(images) + 0.2 * noise + random.random()


@pytest.mark.parametrize("step, number", [
    (3, signal.SIGTERM), (5, signal.SIGINT), (8, signal.SIGTERM)])
def test_continued_run_equals_uninterrupted_run(tiny, tmp_path, monkeypatch, step, number):
    changes = dict(student_args="embed_dim=48 depth=2 num_heads=2 drop_path_rate=0.2")
    straight = tiny(run_dir=str(tmp_path / "straight"), **changes)
    train.main(straight, objective=Noisy)
    cfg = tiny(**changes)
    with monkeypatch.context() as patch:
        stop_at(patch, step, number)
        with pytest.raises(SystemExit) as stopped:
            train.main(cfg, objective=Noisy)
    assert stopped.value.code == 128 + number
    assert torch.load(latest(cfg), weights_only=True)["step"] == step
    train.main(cfg, objective=Noisy)
    assert same(weights(straight), weights(cfg))


def test_the_run_folder_holds_what_it_should(tiny):
    cfg = tiny(epochs=3, save_every=3)
    train.main(cfg)
    assert {path.name for path in cfg.run_path.iterdir()} == {
        "config.json", "train.log", "metrics.jsonl", "student.safetensors", "checkpoint_latest.pth",
         "checkpoint_epoch_1.pth", "checkpoint_epoch_3.pth"}
    assert Config(**json.loads((cfg.run_path / "config.json").read_text())) == cfg
    lines = metrics(cfg)
    assert [line["step"] for line in lines] == [2, 4, 5, 6, 8, 10, 12, 14, 15]
    assert {"loss", "cls", "patch", "norm", "similarity", "lr", "seconds"} <= lines[0].keys()
    assert same(safetensors.torch.load_file(cfg.run_path / "student.safetensors"), weights(cfg))


def test_resume_with_other_settings_is_refused_and_no_resume_keeps_the_old_run(tiny):
    cfg = tiny(epochs=1)
    train.main(cfg)
    with pytest.raises(UserError, match="pool: 'cls', now 'mean'\n  - lr: 0.002, now 1.0"):
        train.main(dataclasses.replace(cfg, lr=1.0, pool="mean"))
    train.main(dataclasses.replace(cfg, epochs=2))  # more of the same is fine
    (cfg.run_path / "student.safetensors").unlink()
    with pytest.raises(UserError, match="--epochs 1: .* already had 2"):
        train.main(cfg)
    assert not (cfg.run_path / "student.safetensors").exists(), "exported as if it were of 1"
    train.main(dataclasses.replace(cfg, lr=1.0, resume=False))
    (old,) = cfg.run_path.parent.glob("run.old-*")
    assert (old / "checkpoint_latest.pth").exists()


@pytest.mark.parametrize("what", ["loss", "norm"])
def test_what_is_not_finite_stops_the_run_and_keeps_the_last_good_state(tiny, monkeypatch, what):
    cfg, calls, losses = tiny(epochs=3), [], model.Distiller.losses

    def breaks(*arguments):
        calls.append(1)
        loss, stats = losses(*arguments)
        if len(calls) == 8:  # in epoch 2
            loss.register_hook(lambda gradient: gradient * float("nan"))
            loss = loss * (float("nan") if what == "loss" else 1)
        return loss, stats

    monkeypatch.setattr(model.Distiller, "losses", breaks)
    with pytest.raises(UserError, match=f"{what} nan.* before step 8"):
        train.main(cfg)
    kept = torch.load(latest(cfg), weights_only=True)
    assert kept["step"] == 5 and all(v.isfinite().all() for v in kept["student"].values())
    assert "NaN" not in (cfg.run_path / "metrics.jsonl").read_text()


# ---------------------------------------------------------------------------- the target cache


@pytest.mark.parametrize("head", ["pca", "linear"])
def test_cached_targets_are_the_teachers_up_to_quantisation(tiny, tmp_path, head):
    cfg = tiny(head=head, teacher_views=2, cache_dir=str(tmp_path / "cache"), epochs=3)
    train.main(cfg)
    teacher, distiller = demo_distiller(head=head)
    distiller.load_state_dict(torch.load(latest(cfg), weights_only=True)["objective"])
    rows, shape = np.arange(80), (80, 1 + 2 * 2, len(distiller.cls_head.scale) + 2)
    stored = data.open_store(cfg, "train", 80).images[rows]
    for view in range(2):
        (file,) = (tmp_path / "cache").glob(f"targets/*/view_{view}_0.i8")
        cached = data.dequantise(data.Rows([file], torch.int8, shape)[rows])
        crops = data.view_crops(rows, cfg.seed, view, cfg.crop_scale)
        with torch.inference_mode():
            targets = distiller.targets(teacher(data.render(stored, 32, *crops)))
        assert F.cosine_similarity(cached, targets, dim=-1).min() > 0.9995


def test_the_teacher_embeds_each_view_once_and_is_then_dropped(tiny, tmp_path, monkeypatch):
    inner, calls, teachers, alive = model.load_teacher, [], [], []

    def load(cfg):
        teacher = inner(cfg)
        teacher.register_forward_pre_hook(lambda module, images: calls.append(len(images[0])))
        teachers.append(weakref.ref(teacher))
        return teacher

    class Watched(model.Distiller):
        def after_step(self, step):
            alive.append(step == 0 and gc.collect() and teachers[-1]() is not None)

    monkeypatch.setattr(model, "load_teacher", load)
    changes = dict(epochs=5, cache_dir=str(tmp_path / "cache"))
    start = 80 + 16  # for the heads' statistics, and for the width of targets, of view 0
    for views, new, compared in ((2, 2, 0), (2, 0, 1), (3, 1, 1)):
        cfg = tiny(teacher_views=views, run_dir=str(tmp_path / f"{views}-{new}"), **changes)
        train.main(cfg, objective=Watched)
        assert sum(calls) == start + new * 80 + compared * 16, "only views that are not cached"
        calls.clear()
    train.main(cfg, objective=Watched)
    assert not calls, "a finished run needs no targets"
    assert len(alive) == 3 * 25 and not any(alive)


@pytest.mark.parametrize("view, views", [(0, 3), (2, 3), (2, 5)])
def test_the_first_and_the_last_cached_view_are_compared(tiny, tmp_path, view, views):
    cfg = tiny(teacher_views=3, epochs=3, cache_dir=str(tmp_path / "cache"), resume=False)
    train.main(cfg)
    (file,) = (tmp_path / "cache").glob(f"targets/*/view_{view}_0.i8")
    shutil.copy(file.with_name("view_1_0.i8"), file)  # true targets, but of other crops
    with pytest.raises(UserError, match="holds targets of other code"):
        train.main(dataclasses.replace(cfg, teacher_views=views, epochs=views))


# ---------------------------------------------------------------------------- evaluation


@pytest.fixture(scope="module", params=[2, 7], ids="{}_classes".format)
def features(request):
    generator, classes = torch.Generator().manual_seed(0), request.param
    centres = torch.randn(classes, 32, generator=generator)
    y = torch.randint(0, classes, (900,), generator=generator)
    x = centres[y] + 1.5 * torch.randn(900, 32, generator=generator)
    return x[:600], y[:600], x[600:], y[600:]


def scikit_learns_knn(x, y, q, k):
    neighbors = pytest.importorskip("sklearn.neighbors")
    knn = neighbors.KNeighborsClassifier(min(k, len(x)), metric="cosine", algorithm="brute",
                                         weights=lambda d: np.exp((1 - d) / 0.07))
    return knn.fit(x.double(), y).predict(q.double())


@pytest.mark.parametrize("k", [1, 20, 1000])
def test_knn_predicts_what_scikit_learn_predicts(features, k):
    x, y, q, _ = features
    predicted = evaluation.knn_predict(x, y, q, k)
    assert (predicted.numpy() == scikit_learns_knn(x, y, q, k)).all()
    assert k != 20 or torch.equal(predicted, evaluation.knn_predict(x, y, q)), "the default"


def test_knn_among_near_duplicates_predicts_what_scikit_learn_predicts():
    """Frames of five still cameras; the class is the place of a small square."""
    rng = np.random.default_rng(0)
    cameras, y = rng.integers(0, 5, 4000), rng.integers(0, 3, 4000)
    frames = rng.uniform(0, 255, (5, 16, 16))[cameras] + rng.normal(0, 8, (4000, 16, 16))
    for frame, place in zip(frames, y, strict=True):
        frame[4 * place : 4 * place + 3, 2:5] += 8
    x = torch.from_numpy(frames.reshape(4000, -1)).float()
    x, q, y, y_test = x[:3000], x[3000:], torch.from_numpy(y[:3000]), y[3000:]
    expected = scikit_learns_knn(x, y, q, 20)
    assert (evaluation.knn_predict(x, y, q).numpy() == expected).all()
    assert 0.8 < (expected == y_test).mean() < 0.9, "0.77 by products in bf16"


@pytest.mark.parametrize("C", [1e-3, 1.0, 100.0])
def test_the_linear_probe_predicts_what_scikit_learn_predicts(features, C):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y, q, _ = (F.pad(t.double(), (0, 1), value=1.0) if t.ndim > 1 else t for t in features)
    w = evaluation.fit_probe(x, y, C, x.new_zeros(int(y.max()) + 1, 33), tolerance=1e-8)
    reference = linear_model.LogisticRegression(C=C, max_iter=5000, tol=1e-8).fit(x, y)
    p = (q @ w.T).softmax(1).numpy()
    assert abs(p - reference.predict_proba(q)).max() < 2e-3
    assert (p.argmax(1) == reference.predict(q)).all()


def test_the_probe_chooses_its_strength_without_the_test_split(features):
    x, y, q, y_test = features
    predicted, C = evaluation.linear_probe(x, y, q)
    shuffled, same_C = evaluation.linear_probe(x, y, q.flip(0))
    assert C == same_C and C in evaluation.STRENGTHS and torch.equal(predicted, shuffled.flip(0))
    assert (predicted == y_test).float().mean() > 0.9
