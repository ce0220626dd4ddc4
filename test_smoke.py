"""The method's specification, and it runs: python -m pytest test_smoke.py

Each test is one claim. They need no network, no GPU and nothing outside this folder; tests/ holds
the longer ones (several processes, a loopback Hub, hostile files).
"""

import dataclasses
import json
import os
import shutil
import signal

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
    teacher = model.load_teacher("demo", 32)
    return teacher, model.Distiller(model.student_of(cfg), teacher, cfg)


# ---------------------------------------------------------------------------- what to do


def test_mistakes_are_reported_together_with_the_nearest_name():
    with pytest.raises(UserError) as flags:
        parse(Config, "--epoch 5 --run_dri x --pool max".split())
    for expected in ("did you mean --epochs", "did you mean --run_dir", "not one of cls, mean"):
        assert expected in str(flags.value)
    argv = "--dataset cifar1 --student vit_smal_patch16_224"
    with pytest.raises(UserError) as values:
        train.main(parse(Config, argv.split()))
    for expected in ("cifar10", "vit_small_patch16_224"):
        assert expected in str(values.value)


def test_flags_override_the_preset_and_no_resume_is_a_switch():
    cfg = parse(Config, "--preset demo --epochs 3 --no_resume".split())
    assert (cfg.dataset, cfg.epochs, cfg.resume) == ("shapes", 3, False)


def test_the_preset_for_own_images_needs_a_data_set():
    with pytest.raises(UserError, match="no data set ''"):
        train.main(parse(Config, ["--preset", "hf"]))


def test_help_spells_flags_as_they_are(capsys):
    with pytest.raises(SystemExit):
        parse(Config, ["--help"])
    out = capsys.readouterr().out
    assert "--no_resume" in out and "--no-" not in out


@pytest.mark.parametrize("changes, words", [
    (dict(student_size=100), "multiple of"),
    (dict(teacher="dinov2_vitb14", teacher_size=96), "such as 98"),
    (dict(student_args="depth"), "name=value"),
    (dict(student_args="patch_drop_rate=0.5"), "patches are not dropped"),
    (dict(student_args="drop_path_rate=2"), "bernoulli"),
    (dict(student_args="depht=6"), "depht"),
    (dict(student="dinov2_vits14", student_size=28, student_args=""), "not a model of timm"),
    (dict(student="volo_d1_224", student_size=224, student_args=""), "no square grid"),
])
def test_models_that_do_not_fit_are_refused_before_anything_is_written(tiny, changes, words):
    cfg = tiny(**changes)
    with pytest.raises(UserError, match=words) as error:
        train.main(cfg)
    assert ("--teacher " in str(error.value)) == ("teacher" in changes)
    assert not cfg.run_path.exists()


# ---------------------------------------------------------------------------- pixels


def test_a_view_is_a_pure_function_of_seed_view_and_image():
    boxes = data.view_boxes(7, 3, 100, 0.4)
    assert torch.equal(boxes, data.view_boxes(7, 3, 1000, 0.4)[:100])
    for other in (data.view_boxes(8, 3, 100, 0.4), data.view_boxes(7, 4, 100, 0.4)):
        assert (boxes != other).any(1).all()
    x, y, w, h = boxes.T
    area = w.abs() * h
    assert 0.35 < area.min() < 0.5 and area.max() <= 1 and 30 < (w < 0).sum() < 70
    assert torch.minimum(x, x + w).min() >= 0 and torch.maximum(x, x + w).max() <= 1 + 1e-6
    assert y.min() >= 0 and (y + h).max() <= 1 + 1e-6
    assert abs((data.view_boxes(7, 3, 10_000, 0.4)[:, 2] < 0).double().mean() - 0.5) < 0.02


@pytest.mark.parametrize("stored, size", [(32, 96), (96, 48), (80, 37)])
def test_rendering_a_box_is_what_pil_does(stored, size):
    # PIL clips between its two passes; mild contrasts keep that out of the comparison.
    pixels = np.random.default_rng(0).integers(64, 192, (stored, stored, 3), np.uint8)
    x, y, w, h = 0.11, 0.25, 0.63, 0.55
    image = PIL.Image.fromarray(pixels)
    box = tuple(stored * v for v in (x, y, x + w, y + h))
    expected = np.asarray(image.resize((size, size), PIL.Image.Resampling.BICUBIC, box=box)) / 255
    images = torch.from_numpy(pixels.transpose(2, 0, 1))[None].repeat(2, 1, 1, 1)
    got = data.render(images, torch.tensor([[x, y, w, h], [x + w, y, -w, h]]), size)
    assert abs(got[0].permute(1, 2, 0).numpy() - expected).max() < 1.5 / 255
    assert torch.allclose(got[1], got[0].flip(-1), atol=1e-5), "a negative width mirrors"


def test_an_epoch_is_a_permutation_and_processes_share_its_batches():
    order = data.epoch_order(80, 1, 0)
    assert sorted(order) == list(range(80)) and (order != data.epoch_order(80, 1, 1)).any()
    whole, *parts = (data.batch_rows(order, 16, *of) for of in ((0, 1), (0, 2), (1, 2)))
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
        teacher = model.load_teacher(name, size, str(tmp_path / "official.pth"))
        images = torch.rand(1, 3, size, size, generator=generator)
        with torch.inference_mode():
            got = teacher(images)
            cls, patches = official_dinov2(given, (images - teacher.mean) / teacher.std)
        assert got.patches.shape == (1, (size // 14) ** 2, 384)
        assert (got.cls - cls).abs().max() < 1e-5 and (got.patches - patches).abs().max() < 1e-5


@pytest.mark.parametrize("name, size, args, params, grid", [
    ("vit_small_patch16_224", 96, "", 21.60e6, (6, 6)),
    ("vit_tiny_patch16_224", 96, "reg_tokens=4", 5.49e6, (6, 6)),
    ("resnet18", 96, "", 11.18e6, (3, 3)),
    ("mobilenetv4_conv_small", 96, "", 2.49e6, (3, 3)),
    ("swin_tiny_patch4_window7_224", 64, "depths=(1,1,1,1)", 10.98e6, (2, 2)),
    ("vit_medium_patch16_gap_240", 96, "depth=2", 6.72e6, (6, 6)),
    ("xcit_nano_12_p16_224", 96, "", 2.92e6, (6, 6)),
    ("pvt_v2_b0", 96, "", 3.41e6, (3, 3)),
])
def test_every_kind_of_student_has_a_cls_and_a_grid(name, size, args, params, grid):
    student = model.build_student(name, size, **model.student_arguments(args))
    images = torch.rand(2, 3, size, size)
    with torch.inference_mode():
        features = student(images)
        raw = student.net.forward_features((images - student.mean) / student.std)
        raw = student.net.fc_norm(raw) if "gap" in name else raw
    if raw.ndim == 4:  # place (1, 0) of a feature map
        place = raw[:, 1, 0] if "swin" in name else raw[:, :, 1, 0]
        assert torch.allclose(features.patches[:, grid[1]], place, atol=1e-5)
    elif "gap" in name:
        assert torch.allclose(features.patches, raw, atol=1e-5)
    assert student.grid == grid and abs(student.parameter_count - params) < 0.01 * params
    assert features.cls.shape == (2, student.embed_dim)
    assert features.patches.shape == (2, grid[0] * grid[1], student.embed_dim)


def test_pool_mean_is_the_mean_of_the_patches():
    student = model.build_student("vit_tiny_patch16_224", 32, pool="mean", depth=1)
    features = student(torch.rand(2, 3, 32, 32))
    assert torch.allclose(features.cls, features.patches.mean(1))


# ---------------------------------------------------------------------------- the method


@pytest.mark.parametrize("head", ["pca", "linear"])
def test_nothing_on_the_teachers_side_gets_a_gradient_or_moves(head):
    teacher, distiller = demo_distiller(head=head)
    frozen = [*teacher.state_dict().items(), *distiller.heads.named_buffers()]
    before = {k: v.clone() for k, v in frozen}
    optimiser = torch.optim.AdamW(distiller.parameter_groups(0.1), lr=1e-2)
    for _ in range(3):
        images = torch.rand(4, 3, 32, 32)
        targets = distiller.targets(teacher(images))
        assert not targets.requires_grad
        distiller(images, targets)[0].backward()
        optimiser.step()
    assert same(before, dict([*teacher.state_dict().items(), *distiller.heads.named_buffers()]))
    assert bool(list(distiller.heads.parameters())) == (head == "linear")


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


@pytest.mark.parametrize("dims", [(24, 64), (96, 64)])
def test_fixed_heads_centre_the_targets_and_keep_what_they_can(dims):
    student_dim, teacher_dim = dims
    features = torch.randn(2000, teacher_dim) * torch.linspace(3, 0.1, teacher_dim) + 5
    head = model.Head("pca", *dims)
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


def test_weights_enter_the_loss_as_stated():
    teacher, distiller = demo_distiller(cls_weight=2.0, patch_weight=0.25)
    view = torch.rand(3, 3, 32, 32)
    targets = distiller.targets(teacher(view))
    loss, stats = distiller(view, targets)
    assert torch.allclose(loss, 2 * stats["cls"] + 0.25 * stats["patch"])
    cls = model.cosine_loss(distiller.student(view).cls, targets[:, 0]).mean()
    assert torch.allclose(stats["cls"], cls, atol=1e-6)
    assert torch.allclose(stats["cos_cls"], 1 - cls, atol=1e-6)


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


def test_no_weight_decay_on_biases_norms_tokens_and_positions():
    _, distiller = demo_distiller(head="linear")
    plain, decayed = distiller.parameter_groups(0.1)
    names = {id(p): n.removeprefix("student.net.") for n, p in distiller.named_parameters()}
    assert {names[id(p)] for p in plain["params"]} >= {"pos_embed", "cls_token", "norm.bias"}
    assert all(p.ndim > 1 for p in decayed["params"]) and plain["weight_decay"] == 0


def test_training_raises_the_cosine_and_the_knn_accuracy(tiny):
    args = "patch_size=8 embed_dim=64 depth=2 num_heads=4 weight_init=jax"
    cfg = tiny(max_samples=1024, epochs=6, batch_size=32, student_args=args, lr=3e-3,
               crop_scale=0.8, eval_every=3)
    train.main(cfg)
    lines = metrics(cfg)
    assert lines[0]["cos_cls"] < 0.05
    assert np.mean([line["cos_cls"] for line in lines[-10:]]) > 0.2
    assert [line["epoch"] for line in lines if "test_knn20" in line] == [3, 6]
    teacher, untrained, student = evaluation.main(EvalConfig((latest(cfg),)))
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


@pytest.mark.parametrize("step, number", [
    (3, signal.SIGTERM), (5, signal.SIGINT), (8, signal.SIGTERM)])
def test_continued_run_equals_uninterrupted_run(tiny, tmp_path, monkeypatch, step, number):
    changes = dict(student_args="embed_dim=48 depth=2 num_heads=2 drop_path_rate=0.2")
    straight = tiny(run_dir=str(tmp_path / "straight"), **changes)
    train.main(straight)
    cfg = tiny(**changes)
    with monkeypatch.context() as patch:
        stop_at(patch, step, number)
        with pytest.raises(SystemExit) as stopped:
            train.main(cfg)
    assert stopped.value.code == 128 + number
    assert torch.load(latest(cfg), weights_only=True)["step"] == step
    train.main(cfg)
    assert same(weights(straight), weights(cfg))


def test_a_run_that_is_extended_past_its_views_equals_one_of_that_length(tiny, tmp_path):
    changes = dict(teacher_views=2, warmup_epochs=0, lr=0.0)
    straight = tiny(run_dir=str(tmp_path / "straight"), epochs=4, **changes)
    train.main(straight)
    for epochs in (1, 2, 4):
        train.main(tiny(epochs=epochs, **changes))
    kept = "step", "loss", "cls", "patch"
    assert [[line[k] for k in kept] for line in metrics(straight)] == [
        [line[k] for k in kept] for line in metrics(tiny())]


def test_going_back_to_an_earlier_checkpoint_repeats_the_run(tiny):
    cfg = tiny(save_every=1, epochs=3)
    train.main(cfg)
    expected, lines = weights(cfg), metrics(cfg)
    shutil.copy(cfg.run_path / "checkpoint_epoch_1.pth", latest(cfg))
    train.main(cfg)
    assert same(expected, weights(cfg))
    assert [line["loss"] for line in metrics(cfg)] == [line["loss"] for line in lines]


def test_the_run_folder_holds_what_it_should(tiny):
    changes = dict(student="resnet18", student_args="", student_size=64, pool="mean")
    cfg = tiny(epochs=3, save_every=3, **changes)
    train.main(cfg)
    assert {path.name for path in cfg.run_path.iterdir()} == {
        "config.json", "train.log", "metrics.jsonl", "student.safetensors", "checkpoint_latest.pth",
         "checkpoint_epoch_1.pth", "checkpoint_epoch_3.pth"}
    assert Config(**json.loads((cfg.run_path / "config.json").read_text())) == cfg
    lines = metrics(cfg)
    assert [line["step"] for line in lines] == [2, 4, 5, 6, 8, 10, 12, 14, 15]
    assert {"loss", "cos_cls", "similarity", "lr", "seconds", "memory_gb"} <= lines[0].keys()
    # The exported student is a plain timm model.
    with safetensors.safe_open(cfg.run_path / "student.safetensors", "pt") as file:
        how = json.loads(file.metadata()["student"])
    assert (how["model"], how["args"], how["image_size"]) == ("resnet18", {}, 64)
    assert np.allclose([how["mean"], how["std"]], [(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)])
    plain = timm.create_model("resnet18", num_classes=0)
    plain.load_state_dict(safetensors.torch.load_file(cfg.run_path / "student.safetensors"))


def test_resume_with_other_settings_is_refused_and_no_resume_keeps_the_old_run(tiny):
    cfg = tiny(epochs=1)
    train.main(cfg)
    with pytest.raises(UserError, match="lr: 0.002, now 1.0\n  - pool: 'cls', now 'mean'|"
                                        "pool: 'cls', now 'mean'\n  - lr: 0.002, now 1.0"):
        train.main(dataclasses.replace(cfg, lr=1.0, pool="mean"))
    train.main(dataclasses.replace(cfg, epochs=2))  # more of the same is fine
    train.main(dataclasses.replace(cfg, lr=1.0, resume=False))
    (old,) = cfg.run_path.parent.glob("run.old-*")
    assert (old / "checkpoint_latest.pth").exists()


def test_the_loop_reads_values_only_when_it_logs(tiny, monkeypatch):
    """Anything else would make every step wait for the GPU; host-side indices are integers."""
    names = "item tolist numpy cpu nonzero __bool__ __float__ __int__".split()
    watched = {getattr(torch.Tensor, name): name for name in names}
    steps, reads = [], []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in watched and args[0].dtype == torch.float32:
                reads.append((len(steps), watched[func]))
            return func(*args, **(kwargs or {}))

    inner = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *a: steps.append(a[-1]) or inner(*a))
    with Watch():
        train.main(tiny(epochs=4, log_every=3, teacher_views=2))
    during = {step for step, _ in reads if 0 < step < len(steps)}
    assert len(steps) == 20 and during == {3, 5, 6, 9, 10, 12, 15, 18}, reads


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(tiny, monkeypatch):
    cfg, calls, inner = tiny(epochs=3), [], model.Distiller.term_loss

    def breaks(*arguments):
        calls.append(1)  # two a step: the eighth is in epoch 2
        return inner(*arguments) * (float("nan") if len(calls) > 14 else 1)

    monkeypatch.setattr(model.Distiller, "term_loss", breaks)
    with pytest.raises(UserError, match="before step 8"):
        train.main(cfg)
    kept = torch.load(latest(cfg), weights_only=True)
    assert kept["step"] == 5 and all(v.isfinite().all() for v in kept["student"].values())


# ---------------------------------------------------------------------------- the target cache


@pytest.mark.parametrize("head", ["pca", "linear"])
def test_cached_targets_are_the_teachers_up_to_quantisation(tiny, tmp_path, head):
    cfg = tiny(head=head, teacher_views=2, cache_dir=str(tmp_path / "cache"), epochs=3)
    train.main(cfg)
    with train.processes(dataclasses.replace(cfg, run_dir=str(tmp_path / "b"))) as place:
        run = train.Run(cfg, model.Distiller, *place)
    train.restore(run, torch.load(latest(cfg), weights_only=True))
    tokens, width = 1 + run.objective.student.grid[0] ** 2, len(run.objective.heads["cls"].scale)
    rows, shape = np.arange(80), (80, tokens, width + 2)
    for view in range(2):
        (features,) = train.embed_stored(run, view, [rows], None)
        file = train.cache_folder(run, shape) / f"view_{view}.i8"
        cached = data.dequantise(data.RowFile(file, torch.int8, shape)[rows])
        cos = F.cosine_similarity(cached, run.objective.targets(features), dim=-1)
        assert cos.min() > 0.9995, float(cos.min())


def test_the_teacher_embeds_each_view_once_and_is_then_dropped(tiny, tmp_path, monkeypatch):
    inner, calls = model.load_teacher, []

    def load(*args):
        teacher = inner(*args)
        teacher.register_forward_pre_hook(lambda module, images: calls.append(len(images[0])))
        return teacher

    monkeypatch.setattr(model, "load_teacher", load)
    changes = dict(epochs=5, max_samples=80, cache_dir=str(tmp_path / "cache"))
    start = 80 + data.CHUNK  # for the heads' statistics, and for the check of the cache
    view = 2 * data.CHUNK  # in full batches
    for views, new in ((2, 2), (2, 0), (3, 1)):
        cfg = tiny(teacher_views=views, run_dir=str(tmp_path / f"{views}-{new}"), **changes)
        train.main(cfg)
        assert sum(calls) == start + new * view, "only views that no run has cached"
        assert "the teacher is dropped" in (cfg.run_path / "train.log").read_text()
        calls.clear()
    train.main(cfg)
    assert not calls, "a finished run needs no targets"


def test_a_change_of_code_does_not_meet_old_targets(tiny, tmp_path, monkeypatch):
    cfg = tiny(teacher_views=1, cache_dir=str(tmp_path / "cache"), resume=False)
    train.main(cfg)
    fit, target = model.Head.fit, model.Head.target
    monkeypatch.setattr(model.Head, "target", lambda head, features: -target(head, features))
    with pytest.raises(UserError, match="holds targets of other code"):
        train.main(dataclasses.replace(cfg, teacher_views=2))
    assert not list((tmp_path / "cache").rglob("view_1.i8")), "filled beside other targets"
    monkeypatch.undo()

    def fit_otherwise(head, features):
        fit(head, features)
        head.basis.copy_(head.basis.flip(1))

    monkeypatch.setattr(model.Head, "fit", fit_otherwise)
    train.main(cfg)
    assert len(list((tmp_path / "cache" / "targets").iterdir())) == 2, "other heads, another cache"


def test_a_file_of_a_wrong_size_is_refused_as_such(tiny, tmp_path):
    cfg = tiny(cache_dir=str(tmp_path / "cache"))
    train.main(cfg)
    for path in ("targets/*/view_0.i8", "stores/shapes-train*/images.u8"):
        (file,) = (tmp_path / "cache").glob(path)
        os.truncate(file, file.stat().st_size - 1)
        with pytest.raises(UserError, match="bytes, not .*: delete"):
            train.main(dataclasses.replace(cfg, resume=False))


def test_a_cache_that_does_not_fit_is_refused(tiny, tmp_path, monkeypatch):
    data.open_store(tiny(), "train", 80)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: type("Usage", (), dict(free=5000)))
    with pytest.raises(UserError, match="do not fit into .*--teacher_views"):
        train.main(tiny(teacher_views=9, epochs=10, seed=9))


# ---------------------------------------------------------------------------- evaluation


@pytest.fixture(scope="module")
def features():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(7, 32, generator=generator)
    y = torch.randint(0, 7, (900,), generator=generator)
    x = centres[y] + 1.5 * torch.randn(900, 32, generator=generator)
    return x[:600], y[:600], x[600:], y[600:]


@pytest.mark.parametrize("k", [1, 20, 1000])
def test_knn_predicts_what_scikit_learn_predicts(features, k):
    neighbors = pytest.importorskip("sklearn.neighbors")
    x, y, q, _ = features
    reference = neighbors.KNeighborsClassifier(
        min(k, len(x)), metric="cosine", algorithm="brute",
        weights=lambda d: np.exp((1 - d) / 0.07)).fit(x.double(), y)
    predicted = evaluation.knn_predict(x, y, q, k)
    assert (predicted.numpy() == reference.predict(q.double())).all()
    assert k != 20 or torch.equal(predicted, evaluation.knn_predict(x, y, q)), "the default"


@pytest.mark.parametrize("C", [1e-3, 1.0, 100.0])
def test_the_linear_probe_predicts_what_scikit_learn_predicts(features, C):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y, q, _ = (t.double() if t.is_floating_point() else t for t in features)
    w = evaluation.fit_probe(x, y, C, x.new_zeros(7, 33), tolerance=1e-8)
    reference = linear_model.LogisticRegression(C=C, max_iter=5000, tol=1e-8).fit(x, y)
    assert (F.linear(q, w[:, :-1], w[:, -1]).argmax(1).numpy() == reference.predict(q)).all()


def test_the_probe_chooses_its_strength_without_the_test_split(features):
    x, y, q, y_test = features
    predicted, C = evaluation.linear_probe(x, y, q)
    shuffled, same_C = evaluation.linear_probe(x, y, q.flip(0))
    assert C == same_C and C in evaluation.STRENGTHS and torch.equal(predicted, shuffled.flip(0))
    assert (predicted == y_test).float().mean() > 0.9
