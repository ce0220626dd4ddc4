"""What each step gets and what each number is of: mistakes here would train, and train worse."""

import dataclasses

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
from test_smoke import demo_distiller, latest, metrics, same, weights


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
    store, teacher = data.open_store(cfg, "train", 70), model.load_teacher("demo", 32)
    assert len(steps) == 3 * 5, "the last batch of an epoch is filled up"
    assert len({step[3] for step in steps}) == 15, "other random numbers at each step"
    for step, (objective, epoch, index, _, images, targets) in enumerate(steps):
        assert epoch == step // 5
        order = data.epoch_order(70, cfg.seed, epoch)
        assert index.tolist() == data.batch_rows(order, 16)[step % 5].tolist()
        view = epoch % views if views else epoch
        boxes = data.view_boxes(cfg.seed, view, 70, cfg.crop_scale)[index]
        assert torch.equal(images, data.render(store.images[index], boxes, 48))
        with torch.inference_mode():
            features = teacher(data.render(store.images[index], boxes, 32))
        expected = objective.targets(features)
        rounding = expected.abs().amax(-1, keepdim=True) / 127 if views else 1e-4
        assert ((targets - expected).abs() < 0.6 * rounding).all()


def test_heads_are_fitted_on_random_images_on_the_students_grid(tiny, monkeypatch):
    monkeypatch.setattr(train, "STAT_IMAGES", 20)
    cfg = tiny(epochs=1)
    train.main(cfg)
    fitted = torch.load(latest(cfg), weights_only=True)["objective"]
    store, teacher = data.open_store(cfg, "train", 80), model.load_teacher("demo", 32)
    rows = data.epoch_order(80, cfg.seed, 0)[:20]
    boxes = data.view_boxes(cfg.seed, 0, 80, cfg.crop_scale)[rows]
    with torch.inference_mode():
        features = teacher(data.render(store.images[rows], boxes, 32))
    patches = model.resample_patches(features.patches, (4, 4), (2, 2))
    for name, tokens in dict(cls=features.cls, patch=patches.flatten(0, 1)).items():
        assert torch.allclose(fitted[f"heads.{name}.mean"], tokens.mean(0), atol=1e-4)


def test_a_grid_is_resampled_without_aliasing():
    noise = torch.randn(8, 256, 16, generator=torch.Generator().manual_seed(0))
    assert model.resample_patches(noise, (16, 16), (4, 4)).std() < 0.3, "0.5 by point samples"


def test_a_quick_evaluation_does_not_change_the_training(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "QUICK_EVAL", (40, 40))
    cfg = tiny(student="resnet10t", student_args="drop_path_rate=0.1")  # with batch norm
    train.main(cfg)
    quick = dataclasses.replace(cfg, eval_every=1, run_dir=str(tmp_path / "quick"))
    train.main(quick)
    assert "test_knn20" in metrics(quick)[-1] and same(weights(cfg), weights(quick))


def test_a_quick_evaluation_is_of_what_is_exported(tiny, monkeypatch):
    seen, inner = [], evaluation.Bench.features
    monkeypatch.setattr(train, "QUICK_EVAL", (40, 40))
    monkeypatch.setattr(evaluation.Bench, "features",
                        lambda bench, net: seen.append(net) or inner(bench, net))
    cfg = tiny(epochs=1, eval_every=1)
    train.main(cfg, objective=ema.EMA)
    assert same(seen[0].net.state_dict(), weights(cfg))


def test_gradients_are_clipped_and_matrices_decay(tiny, tmp_path):
    norms = []

    class Watched(model.Distiller):
        def after_step(self, step):
            norms.append(torch.stack([p.grad.norm() for p in self.parameters()]).norm())

    cfg = tiny(grad_clip=0.01, weight_decay=0.3, epochs=1)
    train.main(cfg, objective=Watched)
    assert max(norms) < 0.0101 and metrics(cfg)[0]["norm"] > 0.05, "logged as it was before"
    with train.processes(dataclasses.replace(cfg, run_dir=str(tmp_path / "b"))) as place:
        optimiser = train.Run(cfg, model.Distiller, *place).optimiser
    assert type(optimiser) is torch.optim.AdamW
    assert [group["weight_decay"] for group in optimiser.param_groups] == [0, 0.3]
    _, conv = demo_distiller(student="resnet18", student_args="")
    _, decayed = conv.parameter_groups(0.1)
    assert {p.ndim for p in decayed["params"]} == {2, 4}, "kernels decay, too"


def test_what_changes_the_method_is_fixed_on_resume():
    assert not Config().settings(free=True).keys() & {
        "batch_size", "crop_scale", "lr", "max_samples", "seed", "student_size", "teacher_views"}


def test_stores_of_other_pixels_have_other_names(tiny, monkeypatch):
    monkeypatch.setattr(data, "make_once", lambda path, build: None)
    monkeypatch.setattr(data, "Store", lambda path: path)
    paths = [data.open_store(tiny(**changes), split, count) for changes, split, count in (
        ({}, "train", 0), ({}, "test", 0), ({}, "train", 9), (dict(student_size=64), "train", 0),
        (dict(image_column="a"), "train", 0), (dict(dataset_config="a"), "train", 0))]
    assert len({path.name[-12:] for path in paths}) == len(paths)


def test_the_test_split_is_preferred_and_a_subset_is_random(tiny, tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / "own" / split).mkdir(parents=True)
        (tmp_path / "own" / split / "1.png").write_bytes(png(1))
    assert data.open_source(tiny(dataset=str(tmp_path / "own")), "test")[0] == "test"
    some = data.subset(np.arange(100), 10)
    assert len(some) == 10 and (np.diff(some) > 0).all() and some.tolist() != list(range(10))


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


def test_a_bench_takes_the_splits_and_numbers_that_were_asked_for(tiny):
    bench = evaluation.Bench(tiny(max_samples=80), max_train=50, max_test=60)
    assert (len(bench.y), len(bench.y_test)) == (50, 60)
    bench = evaluation.Bench(tiny(max_samples=80))
    assert (len(bench.y), len(bench.y_test)) == (80, 2000), "max_samples is of training images"
    bench = evaluation.Bench(tiny(eval_split="test", test_split="train"))
    assert (bench.train.split, bench.test.split) == ("test", "train")


def test_each_checkpoint_is_evaluated_as_the_network_that_it_is(tiny, tmp_path):
    wide = tiny(epochs=1, run_dir=str(tmp_path / "wide"), student_args="embed_dim=64 depth=1 "
                "num_heads=2 patch_size=8")
    for cfg in (tiny(epochs=1), wide):
        train.main(cfg)
    args = EvalConfig((latest(tiny()), latest(wide)), max_train=50, max_test=50, baselines=False)
    sizes = [row["params_m"] for row in evaluation.main(args)]
    assert sizes == [sum(p.numel() for p in model.student_of(cfg).net.parameters()) / 1e6
                     for cfg in (tiny(), wide)]


def test_flops_are_of_one_image(tiny):
    bench = evaluation.Bench(tiny(), max_train=10, max_test=10)
    row = bench.speed(model.build_student("resnet18", 64).eval())
    at_224 = row["gflops"] * (224 / 64) ** 2
    assert at_224 == pytest.approx(2 * 1.82, rel=0.02)  # 1.82 G multiply-adds


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
    shapes = []
    for terms in (model.TERMS, dict(cls=model.TERMS["cls"])):
        fork = type("Fork", (model.Distiller,), dict(terms=terms))  # of one name, as after an edit
        train.main(dataclasses.replace(cfg, resume=False), objective=fork)
        shapes.append(len(list((tmp_path / "cache" / "targets").iterdir())))
    assert shapes == [1, 2]


def test_another_commit_is_named_in_one_line(tiny, monkeypatch):
    environment = model.environment
    for commit, epochs in (("one", 1), ("two", 2), ("three", 2)):  # begins, goes on, is finished
        monkeypatch.setattr(model, "environment",
                            lambda device, commit=commit: environment(device) | dict(commit=commit))
        train.main(tiny(epochs=epochs))
    log = (tiny().run_path / "train.log").read_text().splitlines()
    assert [line[-3:] for line in log if "the checkpoint was written at commit" in line] == [
        "one", "two"]
