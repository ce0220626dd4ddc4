"""Each fork of examples/forks trains, continues to the bit, is evaluated and exported.

Three epochs with one cached view, so that the cache is filled and read. A new fork adds a line.
"""

import dataclasses
import json
import signal

import pytest
import safetensors.torch
import timm
import torch

import eval as evaluation
import model
import train
from config import EvalConfig
from examples.forks import ema, jitter, masked, middle, queue_kl
from test_smoke import latest, metrics, same, stop_at

FORKS = [model.Distiller, masked.Masked, queue_kl.QueueKL, ema.EMA, middle.Middle, jitter.Jitter]


def state(cfg) -> dict:
    return torch.load(latest(cfg), weights_only=True)["objective"]


@pytest.mark.parametrize("fork", FORKS)
def test_a_fork_keeps_every_promise(tiny, tmp_path, monkeypatch, fork):
    args = "embed_dim=48 depth=2 num_heads=2 patch_size=8"
    straight = tiny(epochs=3, teacher_views=1, student_args=args)
    train.main(straight, objective=fork)
    cfg = dataclasses.replace(straight, run_dir=str(tmp_path / "stopped"))
    for step in (3, 9):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop_at(patch, step, signal.SIGTERM)
            train.main(cfg, objective=fork)
    train.main(cfg, objective=fork)
    assert same(state(straight), state(cfg))

    row = evaluation.main(EvalConfig((latest(cfg),), baselines=False))[-1]
    assert 0 <= row["knn20"] <= 1
    exported = safetensors.torch.load_file(cfg.run_path / "student.safetensors")
    with safetensors.safe_open(cfg.run_path / "student.safetensors", "pt") as file:
        arguments = json.loads(file.metadata()["student"])["args"]
    plain = timm.create_model(cfg.student, num_classes=0, **arguments)
    plain.load_state_dict(exported)
    saved = torch.load(latest(cfg), weights_only=True)
    assert same(exported, saved["student"])


def test_forks_with_other_targets_have_a_cache_of_their_own(tiny, tmp_path):
    changes = dict(cache_dir=str(tmp_path / "cache"), epochs=1, teacher_views=1)
    folders = []
    for fork in FORKS:
        train.main(tiny(run_dir=str(tmp_path / fork.__name__), **changes), objective=fork)
        folders.append(len(list((tmp_path / "cache" / "targets").iterdir())))
    assert folders == [1, 1, 1, 1, 2, 3], "the middle layer's, and the jittered views'"


def test_what_a_fork_registers_is_trained_or_carried_along(tiny, tmp_path):
    cfg = tiny(epochs=1, student_args="embed_dim=48 depth=1 num_heads=2 patch_size=8")
    train.main(cfg, objective=masked.Masked)
    assert state(cfg)["mask_token"].abs().max() > 0
    train.main(dataclasses.replace(cfg, run_dir=str(tmp_path / "q")), objective=queue_kl.QueueKL)
    queue = state(dataclasses.replace(cfg, run_dir=str(tmp_path / "q")))["queue"]
    noise = torch.randn(queue.shape, generator=torch.Generator().manual_seed(0))
    noise = torch.nn.functional.normalize(noise, dim=1)
    assert torch.equal(queue[80:], noise[: len(noise) - 80]), "five batches of sixteen came in"


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
def test_hooks_are_called_in_compiled_networks_too(tiny, tmp_path):
    cfg = tiny(epochs=1, teacher_views=1, log_every=1)
    train.main(cfg, objective=Hooked)
    changes = dict(run_dir=str(tmp_path / "on"), cache_dir=str(tmp_path / "afresh"), compile="on")
    compiled = dataclasses.replace(cfg, **changes)
    train.main(compiled, objective=Hooked)
    if "not compiled" in (compiled.run_path / "train.log").read_text():
        pytest.skip("torch.compile needs a C++ compiler")
    for eager, line in zip(metrics(cfg), metrics(compiled), strict=True):
        assert eager["patch"] == pytest.approx(line["patch"], abs=1e-3)


def test_a_fork_scales_learning_rates_and_returns_another_loss(tiny):
    class Still(model.Distiller):
        def parameter_groups(self, weight_decay):
            return [dict(group, lr_scale=0.0) for group in super().parameter_groups(weight_decay)]

        def forward(self, images, targets):
            loss, stats = super().forward(images, targets)
            return loss + 1, stats

    cfg = tiny(epochs=1)
    line = train.main(cfg, objective=Still)
    assert line["loss"] == pytest.approx(1 + line["cls"] + cfg.patch_weight * line["patch"])
    saved = torch.load(latest(cfg), weights_only=True)
    assert same(saved["student"], model.student_of(cfg).net.state_dict())
