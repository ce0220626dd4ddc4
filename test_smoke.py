"""The method's specification, and it runs: python -m pytest

Each test is one claim. They need no network, no GPU and nothing outside this folder; tests/ holds
the longer ones (several processes, a loopback Hub).
"""

import dataclasses
import io
import json
import os
import signal

import datasets
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
    dataset="shapes",
    teacher="demo",
    teacher_size=32,
    student="vit_tiny_patch16_224",
    student_size=32,
    student_args="embed_dim=48 depth=2 num_heads=2",
    batch_size=16,
    max_samples=80,
    epochs=2,
    precision="fp32",
    device="cpu",
    log_every=2,
    num_workers=0,
    lr=2e-3,
)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tiny(tmp_path, cache):
    """A training run of seconds: tiny(epochs=3) -> Config."""
    return lambda **changes: Config(
        **{**TINY, "cache_dir": cache, "run_dir": str(tmp_path / "run"), **changes}
    )


def weights(cfg: Config) -> dict:
    return torch.load(cfg.run_path / "checkpoint_latest.pth", weights_only=True)["student"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def demo_distiller(**changes):
    cfg = Config(**{**TINY, **changes})
    torch.manual_seed(0)
    student = model.build_student(
        cfg.student, cfg.student_size, cfg.pool, **model.student_kwargs(cfg.student_args)
    )
    teacher = model.load_teacher("demo", 32)
    return teacher, model.Distiller(student, teacher, cfg)


# ---------------------------------------------------------------------------- what to do


def test_every_mistake_is_reported_at_once_with_the_nearest_name():
    argv = (
        "--dataset cifar1 --epoch 5 --loss cosin --lr fast --student vit_smal_patch16_224 "
        "--cls_weight 0 --patch_weight 0"
    )
    with pytest.raises(UserError) as error:
        parse(Config, argv.split(), model.problems)
    text = str(error.value)
    for expected in (
        "cifar10",
        "--epochs",
        "cosine",
        "--lr fast",
        "vit_small_patch16_224",
        "nothing would be learned",
    ):
        assert expected in text, text


def test_flags_override_the_preset_and_no_resume_is_a_switch():
    cfg = parse(Config, "--preset demo --epochs 3 --no_resume".split(), model.problems)
    assert (cfg.dataset, cfg.epochs, cfg.resume) == ("shapes", 3, False)


def test_help_spells_flags_as_they_are_and_a_missing_value_is_a_message(capsys):
    with pytest.raises(SystemExit):
        parse(Config, ["--help"])
    out = capsys.readouterr().out
    assert "--no_resume" in out and "--no-" not in out
    with pytest.raises(UserError, match="--dataset: expected one argument"):
        parse(Config, ["--dataset"])


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(student_size=100), "multiple of"),
        (dict(teacher="dinov2_vitb14", teacher_size=96), "84 and 98 are"),
        (dict(student="vit_large_patch16_224", student_args=""), "303.1 M parameters"),
        (dict(student_args="depth"), "name=value"),
        (dict(student_args="depht=6"), "depht"),
    ],
)
def test_models_that_do_not_fit_are_refused_before_anything_is_written(tiny, changes, words):
    cfg = tiny(**changes)
    with pytest.raises(UserError, match=words):
        train.main(cfg)
    assert not cfg.run_path.exists()


# ---------------------------------------------------------------------------- pixels


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of images in all the shapes people have them."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 8)):
        for i in range(count):
            folder = root / split / ("cat" if i % 2 else "dog")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (60, 40 + i, 3), np.uint8)
            PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
    cats = root / "train" / "cat"
    PIL.Image.fromarray(np.full((50, 50), 40000, np.uint16)).save(cats / "deep.png")
    PIL.Image.new("CMYK", (50, 70)).save(cats / "print.jpg")
    PIL.Image.new("LA", (50, 50)).save(cats / "gray.png")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    half = np.zeros((60, 60, 3), np.uint8)
    half[:, :30] = 255  # white left half, which is the upper half once upright
    PIL.Image.fromarray(half).save(cats / "turned.jpg", exif=exif, quality=95)
    return root


def test_a_folder_is_decoded_once_into_upright_rgb(tiny, photos):
    cfg = tiny(dataset=str(photos))
    store = data.open_store(cfg, "train", 32)
    images = store.images[np.arange(34)]
    assert images.shape == store.images.shape == (34, 3, 32, 32) and images.dtype == np.uint8
    assert sorted(set(store.labels.tolist())) == [0, 1]
    before = (store.path / "images.u8").stat().st_mtime_ns
    assert (data.open_store(cfg, "train", 32).path / "images.u8").stat().st_mtime_ns == before
    means = images.mean((1, 2, 3))
    assert (abs(means - 40000 / 257) < 1.5).any(), "16-bit is scaled, not clipped"
    turned = [im for im in images if im[:, :14].mean() > 240 and im[:, 18:].mean() < 15]
    assert len(turned) == 1, "EXIF orientation is applied"


def test_unreadable_images_are_skipped_and_counted_until_there_are_too_many(
    tiny, photos, tmp_path, caplog
):
    import shutil

    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "train" / "cat" / "empty.jpg").write_bytes(b"")
    (folder / "train" / "cat" / "text.png").write_text("no image")
    whole = (folder / "train" / "dog" / "0.png").read_bytes()
    (folder / "train" / "dog" / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="3 of 37 images"):
        data.open_store(tiny(dataset=str(folder)), "train", 32)
    store = data.open_store(tiny(dataset=str(folder), max_bad=0.1), "train", 32)
    assert "skipped 3" in caplog.text
    assert len(store) == 34 and len(store.info["unreadable"]) == 3


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(buffer := io.BytesIO(), "png")
    return buffer.getvalue()


def test_parquet_files_and_save_to_disk_are_read_and_string_labels_numbered(tiny, tmp_path):
    columns = dict(photo=[png(i) for i in range(6)], label=["cat", "dog"] * 3, note=["x"] * 6)
    columns |= dict(score=[0.0, float("nan")] * 3, labels=[[1, 2]] * 6)
    foreign = datasets.Dataset.from_dict(columns)  # bytes, but no image type
    (tmp_path / "parquet").mkdir()
    foreign.to_parquet(tmp_path / "parquet" / "train.parquet")
    foreign.cast_column("photo", datasets.Image()).save_to_disk(tmp_path / "disk")
    stores = [
        data.open_store(tiny(dataset=str(tmp_path / name)), "train", 32)
        for name in ("parquet", "disk")
    ]
    odd = [
        data.open_store(tiny(dataset=str(tmp_path / "disk"), label_column=c), "train", 32)
        for c in ("score", "labels")
    ]
    assert [store.labels.tolist() for store in odd] == [[0, -1] * 3, [-1] * 6]
    for store in stores:
        assert store.labels.tolist() == [0, 1] * 3 and store.images.shape == (6, 3, 32, 32)
    a, b = (store.images[np.arange(6)] for store in stores)
    assert (a == b).all()


@pytest.mark.parametrize(
    "columns, words",
    [
        (dict(note=["x"]), "no image column among note: set --image_column"),
        (dict(left=[png(0)], right=[png(1)]), "2 image columns .left, right."),
    ],
)
def test_data_without_one_image_column_is_refused_by_name(tiny, tmp_path, columns, words):
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "disk")
    with pytest.raises(UserError, match=words):
        data.open_store(tiny(dataset=str(tmp_path / "disk")), "train", 32)


def test_a_view_is_the_same_whatever_the_batch_and_the_rank():
    index = torch.arange(100)
    whole = data.view(7, 3, index, (0.4, 1.0))
    parts = torch.cat([data.view(7, 3, some, (0.4, 1.0)) for some in index.split(33)])
    assert torch.equal(whole, parts)
    assert torch.equal(whole[[90, 4]], data.view(7, 3, torch.tensor([90, 4]), (0.4, 1.0)))
    for other in (data.view(8, 3, index, (0.4, 1.0)), data.view(7, 4, index, (0.4, 1.0))):
        assert (whole != other).any(1).all()
    area = whole[:, 2].abs() * whole[:, 3]
    assert 0.35 < area.min() < 0.5 and area.max() <= 1 and 30 < (whole[:, 2] < 0).sum() < 70
    left, right = whole[:, 0], whole[:, 0] + whole[:, 2]
    assert torch.minimum(left, right).min() >= 0 and torch.maximum(left, right).max() <= 1 + 1e-6


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


def test_an_epoch_is_a_permutation_and_ranks_share_its_batches(tiny):
    store = data.open_store(tiny(), "train", 48, 80)
    order = data.epoch_order(80, 0, 1, 0)
    assert sorted(order) == list(range(80)) and (order != data.epoch_order(80, 0, 1, 1)).any()
    assert len(set(data.epoch_order(80, 20, 1, 0))) == 20

    def seen(rank, world, first=0):
        return [batch[1] for batch in data.loader(store, order, 16, first, rank, world)]

    whole, left, right = seen(0, 1), seen(0, 2), seen(1, 2)
    assert len(whole) == 5
    for batch, *parts in zip(whole, left, right, strict=True):
        assert torch.equal(batch.sort()[0], torch.cat(parts).sort()[0])
    assert torch.equal(seen(0, 1, first=3)[0], whole[3])


# ---------------------------------------------------------------------------- networks


def official_dinov2(weights: dict, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the official DINOv2 forward computes for ViT-S/14, written out: (cls, patch tokens)."""
    grid = x.shape[-1] // 14
    tokens = F.conv2d(
        x, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=14
    )
    tokens = tokens.flatten(2).transpose(1, 2)
    registers = weights.get("register_tokens")
    cls_position, table = weights["pos_embed"][:, :1], weights["pos_embed"][:, 1:]
    if grid != 37:
        how = (
            dict(scale_factor=(grid + 0.1) / 37)
            if registers is None
            else dict(size=(grid, grid), antialias=True)
        )
        table = F.interpolate(
            table.reshape(1, 37, 37, 384).permute(0, 3, 1, 2), mode="bicubic", **how
        )
        table = table.permute(0, 2, 3, 1).reshape(1, -1, 384)
    tokens = tokens + table
    prefix = [weights["cls_token"] + cls_position] + ([] if registers is None else [registers])
    x = torch.cat([p.expand(len(x), -1, -1) for p in prefix] + [tokens], 1)
    for i in range(12):
        w = {
            k.removeprefix(f"blocks.{i}."): v
            for k, v in weights.items()
            if k.startswith(f"blocks.{i}.")
        }
        y = F.layer_norm(x, (384,), w["norm1.weight"], w["norm1.bias"], 1e-6)
        q, k, v = (
            F.linear(y, w["attn.qkv.weight"], w["attn.qkv.bias"])
            .unflatten(2, (3, 6, 64))
            .permute(2, 0, 3, 1, 4)
        )
        y = ((q @ k.mT * 64**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + w["ls1.gamma"] * F.linear(y, w["attn.proj.weight"], w["attn.proj.bias"])
        y = F.layer_norm(x, (384,), w["norm2.weight"], w["norm2.bias"], 1e-6)
        y = F.gelu(F.linear(y, w["mlp.fc1.weight"], w["mlp.fc1.bias"]))
        x = x + w["ls2.gamma"] * F.linear(y, w["mlp.fc2.weight"], w["mlp.fc2.bias"])
    x = F.layer_norm(x, (384,), weights["norm.weight"], weights["norm.bias"], 1e-6)
    return x[:, 0], x[:, sum(p.shape[1] for p in prefix) :]


@pytest.mark.parametrize("registers", [False, True])
def test_dinov2_equals_the_official_code_at_every_size(tmp_path, registers):
    """From a .pth with the official names. Plain timm is off by several percent at these sizes."""
    name = "dinov2_vits14" + "_reg" * registers
    generator = torch.Generator().manual_seed(0)
    shapes = {
        k: v.shape
        for k, v in timm.create_model("vit_small_patch14_dinov2", num_classes=0)
        .state_dict()
        .items()
    }
    shapes["mask_token"] = (1, 384)
    if registers:
        shapes["register_tokens"] = (1, 4, 384)
    given = {
        k: torch.randn(s, generator=generator) * 0.05 + ("norm" in k and "weight" in k)
        for k, s in shapes.items()
    }
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


@pytest.mark.parametrize(
    "name, size, args, params, grid",
    [
        ("vit_small_patch16_224", 96, "", 21.60e6, (6, 6)),
        ("vit_small_patch16_224", 224, "", 21.67e6, (14, 14)),
        ("vit_tiny_patch16_224", 96, "reg_tokens=4", 5.49e6, (6, 6)),
        ("resnet18", 96, "", 11.18e6, (3, 3)),
        ("mobilenetv4_conv_small", 96, "", 2.49e6, (3, 3)),
        ("vit_medium_patch16_gap_240", 96, "depth=2", 6.72e6, (6, 6)),
    ],
)
def test_every_kind_of_student_has_a_cls_and_a_grid(name, size, args, params, grid):
    student = model.build_student(name, size, **model.student_kwargs(args)).eval()
    with torch.inference_mode():
        features = student(torch.rand(2, 3, size, size))
    assert student.grid == grid and abs(student.parameter_count - params) < 0.01 * params
    assert features.cls.shape == (2, student.embed_dim)
    assert features.patches.shape == (2, grid[0] * grid[1], student.embed_dim)


def test_every_model_normalises_by_its_own_constants(monkeypatch):
    images = torch.rand(1, 3, 32, 32)
    constants = dict(
        resnet18=([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        vit_tiny_patch16_224=([0.5] * 3, [0.5] * 3),
    )
    for name, (mean, std) in constants.items():
        student, seen = model.build_student(name, 32).eval(), []
        inner = student.net.forward_features
        monkeypatch.setattr(
            student.net,
            "forward_features",
            lambda x, inner=inner, seen=seen: (seen.append(x), inner(x))[1],
        )
        student(images)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
        assert torch.allclose(seen[0], (images - mean) / std, atol=1e-5)


def test_pool_mean_is_the_mean_of_the_patches():
    student = model.build_student("vit_tiny_patch16_224", 32, pool="mean", depth=1).eval()
    features = student(torch.rand(2, 3, 32, 32))
    assert torch.allclose(features.cls, features.patches.mean(1))


# ---------------------------------------------------------------------------- the method


def test_nothing_on_the_teachers_side_gets_a_gradient_or_moves(tiny):
    for head in ("pca", "frozen", "linear"):
        teacher, distiller = demo_distiller(head=head)
        frozen = {
            k: v.clone() for k, v in [*teacher.state_dict().items(), *distiller.named_buffers()]
        }
        optimiser = torch.optim.AdamW(train.parameter_groups(distiller, 0.1), lr=1e-2)
        for _ in range(3):
            images = torch.rand(4, 3, 32, 32)
            targets = distiller.targets(teacher(images))
            assert not targets.requires_grad
            loss, _ = distiller(images, targets)
            loss.backward()
            optimiser.step()
        assert all(p.grad is None for p in teacher.parameters())
        after = dict([*teacher.state_dict().items(), *distiller.named_buffers()])
        assert same(frozen, after)
        trained_heads = {k for k, p in distiller.named_parameters() if not k.startswith("student.")}
        assert bool(trained_heads) == (head == "linear"), (
            "fixed heads have no parameters at all"
        )


def test_patch_targets_are_resampled_in_space_not_truncated():
    """A teacher map that is 1 in its lower right quarter stays so on any grid."""
    for old, new in (((16, 16), (6, 6)), ((3, 3), (6, 6)), ((6, 6), (4, 4))):
        ramp = torch.linspace(0, 1, old[0])
        patches = torch.stack(torch.meshgrid(ramp, ramp, indexing="ij")).flatten(1).T[None]
        out = model.resample_patches(patches, old, new).view(*new, 2)
        assert out.shape == (*new, 2)
        assert out[0, 0].max() < 0.25 and out[-1, -1].min() > 0.75  # truncation keeps row 0 .. only
        assert out[-1, 0, 0] > 0.75 and out[-1, 0, 1] < 0.25
        assert torch.allclose(out[..., 0], out[..., 1].T, atol=1e-6)
    constant = torch.full((1, 256, 5), 3.0)
    assert torch.allclose(model.resample_patches(constant, (16, 16), (6, 6)), torch.tensor(3.0))


def test_mse_on_unit_vectors_is_the_cosine_loss_shrunk_by_half_the_width():
    student, target = torch.randn(7, 5, 64, requires_grad=True), torch.randn(7, 5, 64)
    cosine, mse = model.cosine_loss(student, target), model.mse_loss(student, target)
    assert torch.allclose(mse, 2 * cosine / 64, rtol=1e-4)
    (g,), (h,) = torch.autograd.grad(cosine, student), torch.autograd.grad(mse, student)
    assert torch.allclose(h, g * 2 / 64, rtol=1e-3, atol=1e-8)
    assert (
        model.cosine_loss(target, target) < 1e-6
        and abs(model.cosine_loss(-target, target) - 2) < 1e-6
    )


@pytest.mark.parametrize(
    "kind, dims", [("pca", (24, 64)), ("pca", (96, 64)), ("frozen", (24, 64)), ("frozen", (96, 64))]
)
def test_fixed_heads_centre_the_targets_and_keep_what_they_can(kind, dims):
    student_dim, teacher_dim = dims
    generator = torch.Generator().manual_seed(0)
    features = (
        torch.randn(2000, teacher_dim, generator=generator) * torch.linspace(3, 0.1, teacher_dim)
        + 5
    )
    head = model.Head(kind, *dims)
    head.whiten = 0.0
    head.fit(features)
    target = head.target(features)
    assert target.shape == (2000, student_dim) and target.mean(0).abs().max() < 1e-4
    centred = features - features.mean(0)
    kept = target.square().sum() / centred.square().sum()
    if student_dim >= teacher_dim:
        assert torch.allclose(target @ target.T, centred @ centred.T, atol=1e-2), (
            "cosines are those of the teacher"
        )
    elif kind == "pca":
        best = torch.linalg.eigvalsh(torch.cov(features.T)).flip(0)
        assert abs(kept - best[:student_dim].sum() / best.sum()) < 1e-4
        correlation = torch.corrcoef(target.T) - torch.eye(student_dim)
        assert correlation.abs().max() < 1e-3
    else:
        assert abs(kept - student_dim / teacher_dim) < 0.15
        assert torch.allclose(head.basis.T @ head.basis, torch.eye(student_dim), atol=1e-5)


def test_pca_targets_are_half_whitened():
    features = torch.randn(3000, 64) * torch.linspace(0.1, 9, 64) - 4
    plain, half = model.Head("pca", 24, 64), model.Head("pca", 24, 64)
    plain.whiten = 0.0
    plain.fit(features)
    half.fit(features)
    before, after = plain.target(features).std(0), half.target(features).std(0)
    assert torch.allclose(after, before.sqrt(), rtol=1e-2) and before.max() > 1.4 * before.min()


def test_resnets_get_a_trained_head_because_their_features_have_no_negative_side():
    _, vit = demo_distiller()
    _, conv = demo_distiller(student="resnet18", student_args="")
    assert vit.cls_head.kind == "pca" and conv.cls_head.kind == conv.patch_head.kind == "linear"
    assert conv.student.eval()(torch.rand(2, 3, 32, 32)).cls.min() >= 0


def test_the_learned_head_sees_standardised_targets():
    features = torch.randn(3000, 64) * torch.linspace(0.1, 9, 64) - 4
    head = model.Head("linear", 24, 64)
    head.fit(features)
    target = head.target(features)
    assert target.mean(0).abs().max() < 1e-3 and (target.std(0) - 1).abs().max() < 1e-2
    assert head.predict(torch.rand(2, 24)).shape == (2, 64)


def test_weights_enter_the_loss_as_stated():
    teacher, distiller = demo_distiller(cls_weight=2.0, patch_weight=0.25)
    distiller.eval()
    view = torch.rand(3, 3, 32, 32)
    targets = distiller.targets(teacher(view))
    loss, stats = distiller(view, targets)
    assert torch.allclose(loss, 2 * stats[1] + 0.25 * stats[2])
    features = distiller.student(view)
    assert torch.allclose(stats[1], model.cosine_loss(features.cls, targets[:, 0]), atol=1e-6)


def test_spread_is_the_mean_pairwise_cosine():
    x = torch.randn(9, 5)
    pairs = F.cosine_similarity(x[:, None], x[None], dim=-1)[~torch.eye(9, dtype=bool)]
    assert torch.allclose(model.spread(x), pairs.mean(), atol=1e-6)
    assert model.spread(torch.ones(4, 3)) > 0.999


# ---------------------------------------------------------------------------- the loop


def test_learning_rate_warms_up_and_ends_at_the_floor():
    cfg = Config(epochs=10, warmup_epochs=1, lr=1.0, min_lr=0.1)
    rates = [train.learning_rate(s, 100, cfg) for s in range(1000)]
    assert rates[0] == 0.01 and max(rates) == rates[99] == 1.0 and rates[-1] < 0.1001
    assert all(a >= b for a, b in zip(rates[99:], rates[100:], strict=False))


def test_no_weight_decay_on_biases_norms_tokens_and_positions():
    _, distiller = demo_distiller(head="linear")
    decayed, plain = train.parameter_groups(distiller, 0.1)
    names = {id(p): n for n, p in distiller.named_parameters()}
    assert {names[id(p)] for p in plain["params"]} >= {
        "student.net.pos_embed",
        "student.net.cls_token",
        "student.net.norm.bias",
    }
    assert all(p.ndim > 1 for p in decayed["params"]) and plain["weight_decay"] == 0


def test_training_teaches(tiny):
    """The cosine to the teacher rises, and k-NN on the student beats k-NN on an untrained one."""
    args = "patch_size=8 embed_dim=64 depth=2 num_heads=4 weight_init=jax"
    cfg = tiny(
        max_samples=1024, epochs=6, batch_size=32, student_args=args, lr=3e-3, crop_scale=0.8
    )
    train.main(cfg)
    lines = [json.loads(line) for line in (cfg.run_path / "metrics.jsonl").read_text().splitlines()]
    last = np.mean([line["cos"] for line in lines[-10:]])
    assert lines[0]["cos"] < 0.05 and last > 0.2
    rows = evaluation.main(EvalConfig((str(cfg.run_path / "checkpoint_latest.pth"),), device="cpu"))
    teacher, _, untrained, student = rows
    assert teacher["knn20"] > 0.95 and student["knn20"] > untrained["knn20"] + 0.1
    assert student["retention_knn"] == student["knn20"] / teacher["knn20"]


def stop_at(monkeypatch, step: int, number: int) -> None:
    """Send this process a signal in the middle of the given step."""
    inner = train.learning_rate

    def learning_rate(done: int, *rest):
        if done + 1 == step:
            os.kill(os.getpid(), number)
        return inner(done, *rest)

    monkeypatch.setattr(train, "learning_rate", learning_rate)


@pytest.mark.parametrize(
    "step, number", [(3, signal.SIGTERM), (5, signal.SIGINT), (8, signal.SIGTERM)]
)
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
    assert torch.load(cfg.run_path / "checkpoint_latest.pth", weights_only=True)["step"] == step
    train.main(cfg)
    assert same(weights(straight), weights(cfg))


def test_the_run_folder_holds_what_it_should(tiny):
    cfg = tiny(
        save_every=1,
        samples_per_epoch=40,
        student="resnet18",
        student_args="",
        pool="mean",
    )
    train.main(cfg)
    names = {p.name for p in cfg.run_path.iterdir() if "tfevents" not in p.name}  # TensorBoard's
    assert names == {
        "config.json",
        "train.log",
        "metrics.jsonl",
        "views.png",
        "student.safetensors",
        "checkpoint_latest.pth",
        "checkpoint_epoch_1.pth",
        "checkpoint_epoch_2.pth",
    }
    assert Config(**json.loads((cfg.run_path / "config.json").read_text())) == cfg
    lines = [json.loads(line) for line in (cfg.run_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    assert {"loss", "cos", "spread", "lr"} <= lines[0].keys()
    # The exported student is a plain timm model.
    with safetensors.safe_open(cfg.run_path / "student.safetensors", "pt") as file:
        assert file.metadata()["model"] == "resnet18"
    plain = timm.create_model("resnet18", num_classes=0)
    plain.load_state_dict(safetensors.torch.load_file(cfg.run_path / "student.safetensors"))


def test_resume_with_other_settings_is_refused_and_no_resume_keeps_the_old_run(tiny):
    cfg = tiny(epochs=1)
    train.main(cfg)
    with pytest.raises(UserError) as error:
        train.main(dataclasses.replace(cfg, lr=1.0, loss="mse"))
    assert "lr: saved 0.002, asked 1.0" in str(error.value) and "loss: saved 'cosine'" in str(
        error.value
    )
    train.main(dataclasses.replace(cfg, epochs=2))  # more of the same is fine
    train.main(dataclasses.replace(cfg, lr=1.0, resume=False))
    old = [p for p in cfg.run_path.parent.iterdir() if ".old-" in p.name]
    assert len(old) == 1 and (old[0] / "checkpoint_latest.pth").exists()


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

    rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda *a: steps.append(a[0]) or rate(*a))
    with Watch():
        train.main(tiny(epochs=4, log_every=3, teacher_views=2))
    during = {step for step, name in reads if 0 < step < len(steps)}
    assert len(steps) == 20 and during == {3, 5, 6, 9, 10, 12, 15, 18}, reads


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(tiny, monkeypatch):
    cfg = tiny(save_every=1, epochs=3)
    inner = model.LOSSES["cosine"]
    calls = []

    def breaks(student, target):
        calls.append(1)
        return inner(student, target) * (
            float("nan") if len(calls) > 14 else 1
        )  # two a step: in epoch 2

    monkeypatch.setitem(model.LOSSES, "cosine", breaks)
    with pytest.raises(UserError, match="between steps 6 and 8"):
        train.main(cfg)
    kept = torch.load(cfg.run_path / "checkpoint_latest.pth", weights_only=True)
    assert kept["step"] == 5 and all(v.isfinite().all() for v in kept["student"].values())


@pytest.mark.parametrize(
    "changes",
    [
        dict(precision="bf16"),
        dict(precision="fp16"),
        dict(head="linear"),
        dict(loss="mse", head="frozen"),
    ],
)
def test_precisions_losses_and_heads_train(tiny, changes):
    cfg = tiny(**changes)
    assert train.main(cfg)["step"] == 10
    saved = torch.load(cfg.run_path / "checkpoint_latest.pth", weights_only=True)
    assert bool(saved["scaler"]) == (cfg.precision == "fp16"), "fp16 saves its loss scale"


def test_a_store_that_was_cut_short_is_named(tiny, tmp_path):
    cfg = tiny(cache_dir=str(tmp_path / "cache"))
    (images,) = data.open_store(cfg, "train", 32, 80).path.glob("images.u8")
    os.truncate(images, 79 * 3 * 32 * 32 + 5)
    with pytest.raises(OSError, match="cut short"):
        train.main(cfg)


def test_a_run_is_not_continued_with_other_weights_of_its_teacher(tiny, tmp_path):
    cfg = tiny(epochs=1)
    train.main(cfg)
    weights = safetensors.torch.load_file(model.DEMO_TEACHER)
    same_file, other = str(tmp_path / "moved.safetensors"), str(tmp_path / "other.safetensors")
    safetensors.torch.save_file(weights, same_file)
    safetensors.torch.save_file(weights | {"norm.bias": weights["norm.bias"] + 0.01}, other)
    train.main(dataclasses.replace(cfg, epochs=2, teacher_weights=same_file))
    with pytest.raises(UserError, match="another teacher .*the weights of demo may have changed"):
        train.main(dataclasses.replace(cfg, epochs=3, teacher_weights=other))


def test_a_run_is_not_continued_on_data_that_changed(tiny, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    for i in range(16):
        (folder / f"{i}.png").write_bytes(png(i))
    cfg = tiny(dataset=str(folder), max_samples=0, epochs=1, eval_every=1)
    train.main(cfg)  # there is no test split to check on, and that is no reason to stop
    (folder / "one_more.png").write_bytes(png(99))
    with pytest.raises(UserError, match="own may have changed"):
        train.main(dataclasses.replace(cfg, epochs=2))


def test_a_data_set_smaller_than_a_batch_is_refused(tiny):
    with pytest.raises(UserError, match="80 images, fewer than --batch_size 128"):
        train.main(tiny(batch_size=128))


# ---------------------------------------------------------------------------- the teacher bank


def counted_teacher(monkeypatch) -> list[int]:
    """How many images each call of the teacher had, statistics included."""
    inner, calls = model.load_teacher, []

    def load(*args):
        teacher = inner(*args)
        teacher.register_forward_pre_hook(lambda module, images: calls.append(len(images[0])))
        return teacher

    monkeypatch.setattr(model, "load_teacher", load)
    return calls


def losses(cfg: Config) -> list[float]:
    lines = (cfg.run_path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("head", ["pca", "linear"])
def test_stored_targets_are_the_live_ones_up_to_quantisation(tiny, tmp_path, head):
    teacher, distiller = demo_distiller(head=head)
    store = data.open_store(tiny(), "train", 32, 80)
    images, index = torch.from_numpy(store.images[np.arange(80)]), torch.arange(80)
    features = teacher(data.render(images, None, 32))
    distiller.fit_heads([features])
    live = distiller.targets(features)
    bank = data.Bank(tmp_path / "bank", 2, 80, *live.shape[1:])
    bank.write(1, index[:50], *data.quantise(live[:50]))
    assert (bank.read(1, index)[2] == (index < 50)).all() and not bank.read(0, index)[2].any()
    tokens, scale, _ = data.Bank(tmp_path / "bank", 3, 80, *live.shape[1:]).read(1, index[:50])
    cos = F.cosine_similarity(data.dequantise(tokens, scale), live[:50], dim=-1)
    assert cos.min() > 0.9995, float(cos.min())


def test_the_teacher_is_asked_once_about_each_view_and_then_dropped(tiny, tmp_path, monkeypatch):
    changes = dict(teacher_views=2, max_samples=72, cache_dir=str(tmp_path / "cache"))
    calls = counted_teacher(monkeypatch)
    cfg = tiny(epochs=5, **changes)
    train.main(cfg)
    assert sum(calls) == 64 + 2 * 72, "statistics on a batch of 64, then every image in two views"
    assert "the teacher is dropped" in (cfg.run_path / "train.log").read_text()
    other = tiny(epochs=5, lr=1e-3, run_dir=str(tmp_path / "other"), **changes)
    calls.clear()
    train.main(other)
    assert sum(calls) == 64, "another run with the same teacher finds everything in the bank"
    calls.clear()
    changes["teacher_views"] = 3
    train.main(tiny(epochs=5, run_dir=str(tmp_path / "more"), **changes))
    assert sum(calls) == 64 + 72, "one with more views asks about the new ones only"


def test_a_run_whose_epochs_are_samples_fills_the_bank_as_it_goes(tiny, tmp_path, monkeypatch):
    cfg = tiny(teacher_views=1, epochs=6, samples_per_epoch=32, cache_dir=str(tmp_path / "cache"))
    calls = counted_teacher(monkeypatch)
    train.main(cfg)
    (done,) = (tmp_path / "cache" / "banks").glob("*/view_0/done")
    done = np.fromfile(done, np.uint8)
    assert 40 < done.sum() <= 80 and sum(calls) == 64 + done.sum(), "no image is asked about twice"


def test_images_and_answers_kept_on_the_device_train_the_same(tiny, tmp_path, monkeypatch):
    disk, device = (
        tiny(store_device=kind, teacher_views=1, epochs=3, run_dir=str(tmp_path / kind))
        for kind in ("disk", "device")
    )
    train.main(disk)
    monkeypatch.setattr(data.Bank, "read", None)  # the same bank, and it is complete
    train.main(device)
    assert same(weights(disk), weights(device))


def test_the_bank_changes_the_losses_by_its_rounding_only(tiny, tmp_path):
    # A tiny rate: training amplifies any rounding, and that is not what is measured here.
    live = tiny(teacher_views=0, epochs=3, lr=1e-5, run_dir=str(tmp_path / "live"))
    banked = tiny(teacher_views=2, epochs=3, lr=1e-5, run_dir=str(tmp_path / "banked"))
    train.main(live)
    train.main(banked)
    pairs = list(zip(losses(live), losses(banked), strict=True))
    same_views = pairs[: len(pairs) * 2 // 3]  # in the third epoch one sees view 2, one view 0
    assert all(abs(a - b) < 2e-3 for a, b in same_views) and losses(live) != losses(banked)


def test_a_bank_that_was_lost_is_filled_again_with_the_same_answers(tiny, tmp_path):
    cfg = tiny(teacher_views=1, epochs=3, cache_dir=str(tmp_path / "cache"))
    train.main(cfg)
    expected = weights(cfg)
    for done in (tmp_path / "cache" / "banks").glob("*/*/done"):
        np.memmap(done, np.uint8, "r+")[::3] = 0  # torn rows: written, but not marked so
    train.main(dataclasses.replace(cfg, resume=False))
    assert same(expected, weights(cfg))


def test_a_bank_that_does_not_fit_is_refused_with_the_views_that_do(tmp_path, monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: type("Usage", (), dict(free=5000)))
    with pytest.raises(UserError, match="--teacher_views 1 fits"):
        data.Bank(tmp_path / "bank", 10, 100, 5, 3)
    assert not (tmp_path / "bank").exists()


# ---------------------------------------------------------------------------- the verdict


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
        min(k, len(x)), metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(x.double(), y)
    predicted, _ = evaluation.knn_predict(x, y, q, (k, 10))
    assert (predicted.numpy() == reference.predict(q.double())).all()


@pytest.mark.parametrize("alike", [0.0, 3.0])
def test_neighbours_proposed_in_bf16_are_the_exact_ones(alike):
    """Also when all vectors are nearly the same, and bf16 cannot tell them apart."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2000, 24, generator=generator) + alike * 10
    x = F.normalize(x, dim=1)
    queries, train_rows = x[:50], x[50:]
    cos, rows = evaluation.nearest(queries, train_rows, train_rows.bfloat16(), 20)
    exact_cos, exact_rows = evaluation.nearest(queries, train_rows, None, 20)
    assert torch.allclose(cos, exact_cos, atol=1e-6) and (rows == exact_rows).float().mean() > 0.99
    guess = (queries.bfloat16() @ train_rows.bfloat16().T).topk(20).indices
    assert (guess == exact_rows).float().mean() < 0.9, "bf16 alone would be wrong"


@pytest.mark.parametrize("C", [1e-3, 1.0, 100.0])
def test_the_linear_probe_predicts_what_scikit_learn_predicts(features, C):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y, q, _ = (t.double() if t.is_floating_point() else t for t in features)
    w = evaluation.fit_probe(x, y, 7, C, tolerance=1e-8)
    reference = linear_model.LogisticRegression(C=C, max_iter=5000, tol=1e-8).fit(x, y)
    assert (F.linear(q, w[:, :-1], w[:, -1]).argmax(1).numpy() == reference.predict(q)).all()


def test_the_probe_chooses_its_strength_without_the_test_split(features):
    x, y, q, y_test = features
    predicted, C = evaluation.linear_probe(x, y, q)
    shuffled, same_C = evaluation.linear_probe(x, y, q.flip(0))
    assert C == same_C and C in evaluation.STRENGTHS and torch.equal(predicted, shuffled.flip(0))
    assert (predicted == y_test).float().mean() > 0.9


def test_effective_rank_counts_directions():
    generator = torch.Generator().manual_seed(0)
    low = (
        torch.randn(5000, 4, generator=generator)
        @ torch.linalg.qr(torch.randn(32, 4, generator=generator)).Q.T
    )
    assert abs(evaluation.effective_rank(low) - 4) < 0.05
    assert abs(evaluation.effective_rank(torch.randn(50_000, 32, generator=generator)) - 32) < 0.1


def test_several_checkpoints_give_a_row_each_and_need_nothing_but_themselves(tiny, tmp_path):
    cfg = tiny(save_every=1)
    train.main(cfg)
    files = tuple(str(cfg.run_path / f"checkpoint_epoch_{n}.pth") for n in (1, 2))
    out = tmp_path / "features.safetensors"
    rows = evaluation.main(EvalConfig(files, max_test=100, save_features=str(out), device="cpu"))
    assert [r["model"].split()[0] for r in rows] == [
        "teacher",
        "raw",
        "student,",
        "student,",
        "student,",
    ]
    assert json.loads((cfg.run_path / "eval.json").read_text()) == rows
    assert all(0 <= r["linear"] <= 1 and -1 <= r["cos"] <= 1 for r in rows[3:])
    saved = safetensors.torch.load_file(out)
    assert saved["train_features"].shape == (80, 48) and len(saved["test_labels"]) == 100


def test_a_checkpoint_can_be_judged_on_other_data(tiny, photos):
    cfg = tiny(epochs=1)
    train.main(cfg)
    latest = str(cfg.run_path / "checkpoint_latest.pth")
    rows = evaluation.main(EvalConfig((latest,), dataset=str(photos), device="cpu"))
    assert rows[-1]["knn20"] == round(rows[-1]["knn20"] * 8) / 8, "eight test images"


def test_without_a_test_split_a_tenth_of_train_is_held_out(tiny, tmp_path, capsys):
    for i in range(40):
        (tmp_path / "own" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / "ab"[i % 2] / f"{i}.png").write_bytes(png(i))
    cfg = tiny(dataset=str(tmp_path / "own"), max_samples=0)
    bench = evaluation.Bench(cfg)
    assert "a random tenth" in capsys.readouterr().out
    assert len(bench.test_rows) == 4 and len(bench.train_rows) == 36
    assert not set(bench.test_rows) & set(bench.train_rows)
    assert sorted(set(bench.y.tolist())) == [0, 1]
    with pytest.raises(UserError, match="no split 'test', only train"):
        evaluation.Bench(dataclasses.replace(cfg, test_split="test"))


def test_without_labels_the_rest_of_the_evaluation_runs(tiny, tmp_path, capsys):
    for split, count in (("train", 24), ("test", 24)):
        for i in range(count):
            (tmp_path / "flat" / split).mkdir(parents=True, exist_ok=True)
            PIL.Image.effect_noise((40, 40), 50 + i).save(tmp_path / "flat" / split / f"{i}.png")
    cfg = tiny(dataset=str(tmp_path / "flat"), max_samples=0, epochs=1)
    train.main(cfg)
    rows = evaluation.main(EvalConfig((str(cfg.run_path / "checkpoint_latest.pth"),), device="cpu"))
    assert "no labels" in capsys.readouterr().out
    assert "knn20" not in rows[-1] and {"cos", "spread", "rank", "images_per_s"} <= rows[-1].keys()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut"])
def test_files_that_are_no_checkpoints_are_refused_by_name(tmp_path, content):
    path = tmp_path / "broken.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.pth is not a checkpoint"):
        evaluation.read_checkpoint(path)


def test_a_malicious_pickle_is_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    torch.save(dict(config={}, student=Bomb()), tmp_path / "bomb.pth")
    with pytest.raises(UserError, match=r"bomb\.pth is not a checkpoint"):
        evaluation.read_checkpoint(tmp_path / "bomb.pth")
    assert not (tmp_path / "exploded").exists()
