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
from test_smoke import latest, same, stop_at

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
