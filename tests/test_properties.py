"""Any settings train or are refused: values by one message that names all, models one at a time."""

import math
import shutil

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import train
from config import Config, UserError

pytestmark = pytest.mark.slow

GOOD = dict(
    student=["vit_tiny_patch16_224", "test_convnext", "test_resnet", "mobilenetv4_conv_small"],
    student_size=[32, 48],
    pool=["cls", "mean"],
    head=["auto", "pca", "linear"],
    cls_weight=[0.0, 1.0],
    patch_weight=[0.0, 0.5],
    crop_scale=[0.01, 0.4, 1.0],
    teacher_views=[0, 1],
    max_samples=[2, 7, 16],
    batch_size=[2, 7, 8],
    epochs=[1, 2],
    lr=[0.0, 1e-3, 1e4],
    warmup_epochs=[0.0, 0.5, 100.0],
    weight_decay=[0.0, 100.0],
    grad_clip=[0.0, 1.0],
    precision=["fp32", "bf16", "fp16"],
    eval_every=[0, 1],
    log_every=[1, 50],
    seed=[0, 2**31 - 1],
)
BAD = dict(
    dataset=["nowhere", "./nowhere"],
    pool=["max", ""],
    head=["PCA"],
    cls_weight=[-1.0, math.nan],
    crop_scale=[0.0, 2.0],
    teacher_views=[-1],
    max_samples=[-1],
    batch_size=[0, -8],
    epochs=[0],
    lr=[-1e-3, math.inf, math.nan],
    grad_clip=[-1.0],
    precision=["int8"],
    seed=[-1, 2**31],
    device=["tpu"],
)
BAD_MODELS = dict(
    teacher=["dinov2_vits15", ""],
    student=["vit_tinny", ""],
    student_args=["depth", "depth=one two"],
)


def choose(table: dict, chosen: st.SearchStrategy) -> st.SearchStrategy:
    return chosen.flatmap(
        lambda names: st.fixed_dictionaries({n: st.sampled_from(table[n]) for n in sorted(names)})
    )


some_good = choose(GOOD, st.sets(st.sampled_from(sorted(GOOD)), min_size=1))
some_bad = choose(BAD, st.sets(st.sampled_from(sorted(BAD)), min_size=1, max_size=6))
bad_model = choose(BAD_MODELS, st.sampled_from(sorted(BAD_MODELS)).map(lambda name: {name}))
relaxed = dict(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("properties")
    return dict(
        dataset="shapes", teacher="demo", teacher_size=32, student="vit_tiny_patch16_224",
        student_size=32, max_samples=16, batch_size=8, epochs=1, device="cpu",
        cache_dir=str(folder / "cache"), run_dir=str(folder / "run"),
    )  # fmt: skip


def arguments(cfg: dict) -> str:
    """Small networks: the settings are tested here, not they."""
    vit = cfg["student"].startswith("vit")
    return "depth=1 embed_dim=24 num_heads=2" if vit else ""


@given(given_fields=some_good)
@settings(max_examples=25, **relaxed)
def test_any_valid_settings_train_or_are_refused_with_a_reason(base, given_fields):
    cfg = base | given_fields
    cfg["student_args"] = arguments(cfg)
    shutil.rmtree(cfg["run_dir"], ignore_errors=True)
    try:
        metrics = train.main(Config(**cfg))
    except UserError as error:
        assert any(f"--{name}" in str(error) or name in str(error) for name in cfg), error
    else:
        assert metrics["step"] >= 1 and math.isfinite(metrics["loss"])


@given(wrong=some_bad, fine=some_good)
@settings(max_examples=60, **relaxed)
def test_every_wrong_value_is_named_in_one_message(base, wrong, fine):
    with pytest.raises(UserError) as caught:
        train.main(Config(**(base | fine | wrong)))
    missing = [name for name in wrong if f"--{name}" not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


@given(wrong=bad_model, fine=some_good)
@settings(max_examples=20, **relaxed)
def test_a_model_that_cannot_be_built_is_named(base, wrong, fine):
    assume(fine.get("cls_weight", 1) or fine.get("patch_weight", 1))
    shutil.rmtree(base["run_dir"], ignore_errors=True)
    with pytest.raises(UserError, match="--student_args" if "student_args" in wrong
                       else f"--{[*wrong][0]} "):
        train.main(Config(**(base | fine | wrong)))
