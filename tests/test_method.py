"""What each step gets and what each number is of: mistakes here would train, and train worse."""

import dataclasses
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import png

import data
import eval as evaluation
import model
import train
from config import Config, EvalConfig, UserError
from examples.forks import ema
from test_smoke import demo_distiller, latest, metrics, same, stop_at, weights


@pytest.mark.parametrize("views", [0, 2])
def test_both_networks_see_the_same_view_of_the_same_images(tiny, views):
    steps = []

    class Watched(model.Distiller):
        def student_view(self, images, epoch, index):
            steps.append([self, epoch, index, torch.rand(1).item()])
            return images

        def forward(self, images, targets):
            steps[-1] += [images, targets]
            return super().forward(images, targets)

    cfg = tiny(student_size=48, epochs=3, teacher_views=views, max_samples=70)
    train.main(cfg, objective=Watched)
    store, teacher = data.open_store(cfg, "train", 70), model.load_teacher(cfg)
    assert len(steps) == 3 * 5, "the last batch of an epoch is filled up"
    assert len({step[3] for step in steps}) == 15, "other random numbers at each step"
    for step, (objective, epoch, index, _, images, targets) in enumerate(steps):
        assert epoch == step // 5
        order = data.epoch_order(70, cfg.seed, epoch)
        assert index.tolist() == data.batches(order, 16)[step % 5].tolist()
        view = epoch % views if views else epoch
        crops = data.view_crops(index, cfg.seed, view, cfg.crop_scale)
        stored = store.images[index.numpy()]
        assert torch.equal(images, data.render(stored, 48, *crops))
        with torch.inference_mode():
            features = teacher(data.render(stored, 32, *crops))
        expected = objective.targets(features)
        rounding = expected.abs().amax(-1, keepdim=True) / 127 if views else 1e-4
        assert ((targets - expected).abs() < 0.6 * rounding).all()


def test_heads_are_fitted_on_random_images_on_the_students_grid(tiny, monkeypatch):
    monkeypatch.setattr(train, "FIT_IMAGES", 20)
    cfg = tiny(epochs=1)
    train.main(cfg)
    fitted = torch.load(latest(cfg), weights_only=True)["objective"]
    store, teacher = data.open_store(cfg, "train", 80), model.load_teacher(cfg)
    rows = data.epoch_order(80, cfg.seed, 0)[:20]
    crops = data.view_crops(rows, cfg.seed, 0, cfg.crop_scale)
    with torch.inference_mode():
        features = teacher(data.render(store.images[rows], 32, *crops))
    patches = model.resample_patches(features.patches, (4, 4), (2, 2))
    for name, tokens in dict(cls=features.cls, patch=patches.flatten(0, 1)).items():
        assert torch.allclose(fitted[f"{name}_head.mean"], tokens.mean(0), atol=1e-4)


def test_a_grid_is_resampled_without_aliasing():
    noise = torch.randn(8, 256, 16, generator=torch.Generator().manual_seed(0))
    assert model.resample_patches(noise, (16, 16), (4, 4)).std() < 0.3, "0.5 by point samples"


@pytest.mark.slow
def test_a_quick_evaluation_does_not_change_the_training(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "QUICK_EVAL", (40, 40))
    cfg = tiny(student="resnet10t", student_args="drop_path_rate=0.1")  # with batch norm
    train.main(cfg)
    quick = dataclasses.replace(cfg, eval_every=1, run_dir=str(tmp_path / "quick"))
    train.main(quick)
    assert "test_knn20" in metrics(quick)[-1] and same(weights(cfg), weights(quick))


def test_a_quick_evaluation_is_of_what_is_exported(tiny, monkeypatch):
    seen, inner = [], evaluation.Evaluator.features
    monkeypatch.setattr(train, "QUICK_EVAL", (40, 40))
    monkeypatch.setattr(evaluation.Evaluator, "features",
                        lambda evaluator, net: seen.append(net) or inner(evaluator, net))
    cfg = tiny(epochs=1, eval_every=1)
    train.main(cfg, objective=ema.EMA)
    assert same(seen[0].net.state_dict(), weights(cfg))


def test_gradients_are_clipped_and_logged_as_they_were(tiny):
    norms = []

    class Watched(model.Distiller):
        def after_step(self, step):
            norms.append(torch.stack([p.grad.norm() for p in self.parameters()]).norm())

    cfg = tiny(grad_clip=0.01, epochs=1)
    train.main(cfg, objective=Watched)
    assert max(norms) < 0.0101 and metrics(cfg)[0]["norm"] > 0.05


def test_matrices_decay_and_nothing_else(tiny):
    """Weights that get no gradient shrink by lr * weight_decay a step, or stay."""
    class Still(model.Distiller):
        def losses(self, features, target):
            loss, stats = super().losses(features, target)
            return 0 * loss, stats

    cfg = tiny(epochs=1, head="linear", weight_decay=0.3, warmup_epochs=0)
    before = dict(model.build_student(cfg).net.named_parameters())
    train.main(cfg, objective=Still)
    left = np.prod([1 - 0.3 * train.learning_rate(step, 5, cfg) for step in range(5)])
    decayed = set()
    for name, value in weights(cfg).items():
        kept = 1 if torch.equal(value, before[name]) else left
        assert torch.allclose(value, kept * before[name], rtol=1e-5)
        decayed |= {name} if kept < 1 else set()
    assert decayed == {name for name in before if before[name].ndim == 2 or "proj.weight" in name}
    _, conv = demo_distiller(student="resnet18", student_args="")
    assert {p.ndim for p in conv.parameter_groups(0.1)[1]["params"]} == {2, 4}, "kernels decay, too"


def test_a_lr_scale_of_ones_own_survives_a_resume(tiny, tmp_path, monkeypatch):
    class Scaled(model.Distiller):
        def parameter_groups(self, weight_decay):
            table = self.student.net.pos_embed
            rest = [p for p in self.parameters() if p is not table]
            return [dict(params=rest, lr_scale=0.5), dict(params=[table], lr_scale=0)]

    straight, stopped = tiny(), tiny(run_dir=str(tmp_path / "stopped"))
    train.main(straight, objective=Scaled)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 3, signal.SIGTERM)
        train.main(stopped, objective=Scaled)
    train.main(stopped, objective=Scaled)
    assert same(weights(straight), weights(stopped))
    assert torch.equal(weights(stopped)["pos_embed"], model.build_student(straight).net.pos_embed)
    groups = torch.load(latest(stopped), weights_only=True)["optimiser"]["param_groups"]
    assert [group["lr"] for group in groups] == [metrics(stopped)[-1]["lr"] / 2, 0]


def test_what_a_fork_returns_is_logged_under_its_name_and_no_nan_is_written(tiny):
    class Own(model.Distiller):
        def losses(self, features, target):
            loss, stats = super().losses(features, target)
            third = features.patches.square().mean()
            return loss + 3 * third, stats | dict(third=third, odd=third / (third - third))

    cfg = tiny(epochs=1)
    train.main(cfg, objective=Own)
    for line in metrics(cfg):
        expected = cfg.cls_weight * line["cls"] + cfg.patch_weight * line["patch"]
        assert line["loss"] == pytest.approx(expected + 3 * line["third"], rel=1e-5)
    text = (cfg.run_path / "metrics.jsonl").read_text()
    assert "third" in text and "NaN" not in text and "Infinity" not in text


def test_what_changes_the_method_may_not_change_on_resume():
    assert Config().fixed_settings().keys() >= {
        "batch_size", "crop_scale", "lr", "max_samples", "seed", "student_size", "teacher_views"}


def test_the_test_split_is_preferred(tiny, tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / "own" / split).mkdir(parents=True)
        (tmp_path / "own" / split / "1.png").write_bytes(png(1))
    assert data.open_source(tiny(dataset=str(tmp_path / "own")), "test").split == "test"


def test_a_subset_is_random_in_order_and_the_same_every_time():
    some = data.subset(np.arange(100), 10)
    assert len(some) == 10 and (np.diff(some) > 0).all() and some.tolist() != list(range(10))
    assert some.tolist() == data.subset(np.arange(100), 10).tolist()


def test_the_probe_learns_from_training_images_alone(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 16, generator=generator)
    y = torch.randint(0, 5, (700,), generator=generator)
    x = centres[y] + torch.randn(700, 16, generator=generator)
    x, y, q, y_test = x[:600], y[:600], x[600:], y[600:]
    fitted, scored = [], []
    fit, score = evaluation.fit_probe, evaluation.accuracy
    monkeypatch.setattr(evaluation, "fit_probe", lambda x, *rest, **options: (
        fitted.append(len(x)) or fit(x, *rest, **options)))
    monkeypatch.setattr(evaluation, "accuracy", lambda a, b: scored.append(len(b)) or score(a, b))
    predicted, _ = evaluation.linear_probe(x, y, q)
    assert set(scored) == {60} and fitted == [540] * len(scored) + [600]
    alone, _ = evaluation.linear_probe(x, y, q[y_test == 0])  # their mean is another
    assert torch.equal(alone, predicted[y_test == 0])


def test_an_evaluation_takes_the_splits_and_numbers_that_were_asked_for(tiny, photos):
    evaluator = evaluation.Evaluator(tiny(), max_train=50, max_test=60)
    assert (len(evaluator.y), len(evaluator.y_test)) == (50, 60)
    evaluator = evaluation.Evaluator(tiny())
    assert (len(evaluator.y), len(evaluator.y_test)) == (80, 2000), "max_samples: to train on"
    own = tiny(dataset=str(photos), train_split="test", test_split="train", max_samples=0)
    evaluator = evaluation.Evaluator(own)
    assert (evaluator.train.split, evaluator.test.split) == ("test", "train")


def test_each_checkpoint_is_evaluated_as_the_network_that_it_is(tiny, tmp_path):
    wide = tiny(epochs=1, run_dir=str(tmp_path / "wide"), student_args="embed_dim=64 depth=1 "
                "num_heads=2 patch_size=8")
    for cfg in (tiny(epochs=1), wide):
        train.main(cfg)
    args = EvalConfig((latest(tiny()), latest(wide)), max_train=50, max_test=50, baselines=False)
    sizes = [row["params_m"] for row in evaluation.main(args)]
    assert sizes == [sum(p.numel() for p in model.build_student(cfg).net.parameters()) / 1e6
                     for cfg in (tiny(), wide)]


def test_flops_are_of_one_image(tiny):
    evaluator = evaluation.Evaluator(tiny(), max_train=10, max_test=10)
    net = model.build_student(tiny(student="resnet18", student_args="", student_size=64))
    at_224 = evaluator.speed(net.eval())["gflops"] * (224 / 64) ** 2
    assert at_224 == pytest.approx(2 * 1.82, rel=0.02)  # 1.82 G multiply-adds


def test_a_change_of_code_does_not_meet_old_targets(tiny, tmp_path, monkeypatch):
    cfg = tiny(teacher_views=1, cache_dir=str(tmp_path / "cache"), resume=False)
    train.main(cfg)
    fit, target = model.Head.fit, model.Head.target

    def other(head, features):
        return -target(head, features)

    other.__qualname__ = target.__qualname__
    monkeypatch.setattr(model.Head, "target", other)
    with pytest.raises(UserError, match="holds targets of other code"):
        train.main(dataclasses.replace(cfg, teacher_views=2))
    assert not list((tmp_path / "cache").rglob("view_1_0.i8")), "filled beside other targets"
    monkeypatch.undo()

    def fit_otherwise(head, features):
        fit(head, features)
        head.basis.copy_(head.basis.flip(1))

    monkeypatch.setattr(model.Head, "fit", fit_otherwise)
    train.main(cfg)
    assert len(list((tmp_path / "cache" / "targets").iterdir())) == 2, "other heads, another cache"


def test_a_change_of_rendering_does_not_meet_old_targets(tiny, tmp_path, monkeypatch):
    cfg = tiny(epochs=1, teacher_views=1, cache_dir=str(tmp_path / "cache"))
    train.main(cfg)
    render = data.render
    monkeypatch.setattr(data, "render", lambda *arguments: render(*arguments).flip(-2))
    with pytest.raises(UserError, match="holds targets of other code"):
        train.main(dataclasses.replace(cfg, epochs=2))  # continues, with the heads as they were
    train.main(dataclasses.replace(cfg, resume=False))
    assert len(list((tmp_path / "cache" / "targets").iterdir())) == 2, "other heads, another cache"


def test_targets_of_another_shape_have_a_cache_of_their_own(tiny, tmp_path):
    cfg = tiny(epochs=1, teacher_views=1, cache_dir=str(tmp_path / "cache"))

    def doubled(self, features):
        target = model.Distiller.targets(self, features)
        return torch.cat([target, target], 1)

    found = []
    for targets in (model.Distiller.targets, doubled):
        losses = lambda self, features, target: model.Distiller.losses(  # noqa: E731
            self, features, target[:, :5])
        doubled.__qualname__ = "Distiller.targets"  # of one name, as after an edit
        fork = type("Fork", (model.Distiller,), dict(targets=targets, losses=losses))
        train.main(dataclasses.replace(cfg, resume=False), objective=fork)
        found.append(len(list((tmp_path / "cache" / "targets").iterdir())))
    assert found == [1, 2]


def test_another_commit_is_named(tiny, monkeypatch):
    environment = model.environment
    for commit, epochs in (("one", 1), ("two", 2), ("three", 2)):  # begins, goes on, is finished
        monkeypatch.setattr(model, "environment",
                            lambda device, commit=commit: environment(device) | dict(commit=commit))
        train.main(tiny(epochs=epochs))
    log = (tiny().run_path / "train.log").read_text().splitlines()
    assert [line[-3:] for line in log if "written at commit" in line] == ["one", "two"]


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
    during = {step for step, _ in reads if 0 < step < len(steps)}
    assert len(steps) == 20 and during == {3, 5, 6, 9, 10, 12, 15, 18}, reads


def test_shards_change_no_target_and_are_left_to_the_process_that_is_at_them(
        tiny, tmp_path, monkeypatch):
    cfg = tiny(teacher_views=2, epochs=2)
    whole = tiny(teacher_views=2, epochs=2, cache_dir=str(tmp_path / "whole"))
    train.main(cfg)
    monkeypatch.setattr(data, "SHARD", 32)
    parts = dataclasses.replace(whole, cache_dir=str(tmp_path / "parts"),
                                run_dir=str(tmp_path / "parts-run"))
    made, held = [], []
    write_atomically = data.write_atomically

    def record(file, write):
        write_atomically(file, write)
        made.append(file.name)
        if file.name == "view_0_2.i8":  # the other process has done its part meanwhile
            for lock in held:
                lock.release()

    monkeypatch.setattr(data, "write_atomically", record)
    train.main(parts)
    names = [name for name in made if name.endswith(".i8")]
    assert names == [f"view_{view}_{shard}.i8" for view in range(2) for shard in range(3)]
    assert same(weights(cfg), weights(parts))

    made.clear()
    (folder,) = (tmp_path / "parts").glob("targets/*")
    for name in names[:3]:
        (folder / name).unlink()
    held.append(data.FileLock(folder / f"{names[0]}.lock"))
    held[0].acquire()
    train.main(dataclasses.replace(parts, run_dir=str(tmp_path / "again")))
    assert made[:3] == [names[1], names[2], names[0]]


def test_there_may_be_more_shards_than_files_that_are_open_by_default(
        tiny, tmp_path, monkeypatch):
    cfg = tiny(teacher_views=3, epochs=3, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(data, "SHARD", 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 50, hard))
    try:
        train.main(cfg)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(list(Path(cfg.cache_dir).rglob("*.i8"))) > 50


# ---------------------------------------------------------------------------- Muon


def test_muon_updates_matrices_orthogonally_and_all_else_as_adamw():
    torch.manual_seed(0)
    start = [torch.randn(24, 8, 3, 3), torch.randn(40, 10), torch.randn(24), torch.randn(1, 5, 8)]
    ours, theirs = ([value.clone().requires_grad_() for value in start] for _ in range(2))
    muon = train.Muon([dict(params=ours, weight_decay=0.1)], 0.01, torch.float32)
    adamw = torch.optim.AdamW(theirs, 0.01, weight_decay=0.1)
    for _ in range(3):
        before = [p.detach().clone() for p in ours]
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        muon.step()
        adamw.step()
        for p, old in zip(ours[:2], before, strict=False):
            update = (p.detach() - old * (1 - 0.01 * 0.1)).flatten(1)
            singular = torch.linalg.svdvals(update) / (0.01 * 0.2 * max(update.shape) ** 0.5)
            assert 0.6 < singular.min() and singular.max() < 1.3
    for p, q in zip(ours[2:], theirs[2:], strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_a_run_with_muon_is_continued_to_the_same_weights(tiny, tmp_path, monkeypatch):
    cfg = tiny(optimiser="muon", lr=5e-3, epochs=3, run_dir=str(tmp_path / "whole"))
    train.main(cfg)
    part = dataclasses.replace(cfg, run_dir=str(tmp_path / "part"))
    stop_at(monkeypatch, 7, signal.SIGTERM)
    with pytest.raises(SystemExit):
        train.main(part)
    monkeypatch.undo()
    train.main(part)
    assert same(weights(cfg), weights(part))
