"""Rows of the table, classes by name, other data, several checkpoints; files that are none."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import timm
import torch
from conftest import drawn, png, put, tables

import data
import eval as evaluation
import model
import train
from config import Config, EvalConfig, UserError, parse
from test_smoke import latest, metrics

ROOT = Path(__file__).parents[1]


@pytest.fixture
def own(tiny, tmp_path):
    """The settings of a run of one epoch on the folder "own"."""
    return lambda **changes: tiny(**dict(
        dataset=str(tmp_path / "own"), max_samples=0, epochs=1) | changes)


def trained(cfg) -> str:
    train.main(cfg)
    return latest(cfg)


def test_of_the_images_embeddings_alone_are_kept(own, tmp_path, monkeypatch):
    tables(tmp_path, [0, 1] * 8)
    cfg = own()
    evaluator, student = evaluation.Evaluator(cfg), model.build_student(cfg)
    cat, held = torch.cat, []

    def watched(parts, *arguments, **named):
        held.extend(part.untyped_storage().nbytes() / part.nbytes for part in parts
                    if part.shape[1:] == (student.cls_dim,))
        return cat(parts, *arguments, **named)

    monkeypatch.setattr(torch, "cat", watched)
    evaluator.features(student)
    assert held and set(held) == {1.0}, "a view of the class tokens holds those of all patches"


@pytest.mark.parametrize("noise", [2, 0.1])
def test_knn_among_frames_that_hardly_differ_predicts_what_scikit_learn_predicts(noise):
    neighbors = pytest.importorskip("sklearn.neighbors")
    rng = np.random.default_rng(0)
    cameras, y = rng.integers(0, 5, 1500), rng.integers(0, 3, 1500)
    x = rng.uniform(0, 255, (5, 256))[cameras] + rng.normal(0, noise, (1500, 256))
    x[np.arange(1500), y] += noise
    x = torch.from_numpy(x).float()
    unit = torch.nn.functional.normalize(x.double(), dim=1).numpy()
    reference = neighbors.KNeighborsClassifier(
        20, metric="cosine", algorithm="brute",
        weights=lambda distance: np.exp(-distance / evaluation.TEMPERATURE))
    expected = reference.fit(unit[:1000], y[:1000]).predict(unit[1000:])
    found = evaluation.knn_predict(x[:1000], torch.from_numpy(y[:1000]), x[1000:])
    assert (found.numpy() == expected).all()


def test_a_class_of_test_images_alone_does_not_change_the_probe():
    torch.manual_seed(0)
    x, noise = torch.randn(400, 8), torch.randn(400)
    y = (x[:, 0] + noise > 0).long()
    expected, C = evaluation.linear_probe(x[:200], y[:200], x[200:])
    predicted, same_C = evaluation.linear_probe(x[:200], y[:200] + 1, x[200:])  # 0: unknown
    assert C == same_C and torch.equal(predicted, expected + 1)


def test_several_checkpoints_give_a_row_each_and_need_nothing_but_themselves(own, tmp_path):
    tables(tmp_path, [0, 1] * 8)
    cfg = own(save_every=1, epochs=2)
    train.main(cfg)
    files = tuple(str(cfg.run_path / f"checkpoint_epoch_{n}.pth") for n in (1, 2))
    rows = evaluation.main(EvalConfig(files, max_test=100))
    assert [row["model"] for row in rows] == [
        "teacher demo", "run, untrained", "run, epoch 1", "run, epoch 2"]
    (written,) = cfg.run_path.glob("eval*.json")
    assert written.name != "eval.json" and json.loads(written.read_text()) == rows
    assert {"torch", "device", "commit", "gflops", "images_per_s"} <= rows[-1].keys()


def test_a_trained_student_is_the_network_that_the_untrained_one_is(own, tmp_path):
    tables(tmp_path, [0, 1] * 8)
    path = trained(own())
    timm.layers.set_fused_attn(True)  # as in a new process
    _, untrained, student = evaluation.main(EvalConfig((path,)))
    assert student["gflops"] == untrained["gflops"]


@pytest.mark.slow
def test_checkpoints_of_different_sizes_and_teachers_are_evaluated_each_as_if_alone(
        own, tmp_path, cache):
    put(tmp_path / "own", *[f"{s}/{c}/{i}.png" for s in ("train", "test") for c in "ab"
                            for i in range(16)])
    small = own(run_dir=str(tmp_path / "small"))
    large = own(run_dir=str(tmp_path / "large"), student_size=64, teacher_size=64,
                teacher="test_vit", teacher_weights=str(tmp_path / "teacher.safetensors"))
    net = timm.create_model("test_vit", num_classes=0)
    safetensors.torch.save_file(net.state_dict(), tmp_path / "teacher.safetensors")
    paths = trained(small), trained(large)
    alone = {path: evaluation.main(EvalConfig((path,))) for path in paths}
    for order in (paths, paths[::-1]):
        rows = evaluation.main(EvalConfig(order))
        by_name = {row.get("checkpoint", row["model"]): row for row in rows}
        assert len(rows) == len(by_name) == 6, "two teachers, two untrained, two trained"
        large_row = by_name[latest(large)]
        for key in ("knn20", "linear", "keeps_knn20", "cos_cls", "cos_patch", "similarity"):
            assert large_row[key] == alone[latest(large)][-1][key], "stored at the largest size"
        for path, teacher in zip(paths, ("teacher demo", "teacher test_vit"), strict=True):
            keeps = by_name[path]["knn20"] / by_name[teacher]["knn20"]
            assert by_name[path]["keeps_knn20"] == keeps, "of its own teacher's accuracy"
            assert {row["size"] for row in (by_name[path], by_name[teacher])} == {
                32 if path == latest(small) else 64}


def test_a_checkpoint_can_be_evaluated_on_other_data(tiny, photos):
    path = trained(tiny(epochs=1))
    args = parse(EvalConfig, [path, "--dataset", str(photos), "--device", "cpu"])
    rows = evaluation.main(args)
    assert rows[-1]["knn20"] == round(rows[-1]["knn20"] * 8) / 8, "eight test images"
    evaluator = evaluation.Evaluator(tiny(eval_dataset=str(photos), max_samples=20))
    assert len(evaluator.train_rows) == 33 and len(evaluator.test_rows) == 8


@pytest.mark.slow
def test_no_evaluation_overwrites_another_and_each_states_what_it_is_of(own, tmp_path):
    for place in (".", "a", "b"):
        tables(tmp_path / place, [0, 1] * 8, [0, 1] * 4)
    path, folder = trained(own()), str(own().run_path)
    first = path.replace("latest", "epoch_1")
    calls = [((folder,), {}), ((path,), {}), ((path,), dict(max_test=4)), ((first,), {}),
             ((path, first), {}), ((path,), dict(baselines=False)),
             ((path,), dict(dataset=str(tmp_path / "a" / "own"))),
             ((path,), dict(dataset=str(tmp_path / "b" / "own")))]
    names = set()
    for number, (files, changes) in enumerate(calls):
        rows = evaluation.main(EvalConfig(files, **changes))
        found = {file.name for file in own().run_path.glob("eval*.json")}
        assert "eval.json" in found and len(found) == max(1, number)
        (new,) = found - names or {"eval.json"}
        assert json.loads((own().run_path / new).read_text()) == rows
        names = found
    expected = dict(dataset=str(tmp_path / "b" / "own"), train_split="train", test_split="test",
                    train_images=16, test_images=8)
    assert all(row.items() >= expected.items() for row in rows)
    assert rows[-1]["checkpoint"] == path and rows[-1]["step"] == 1


def test_the_file_is_written_before_the_table_is_printed(own, tmp_path, monkeypatch):
    tables(tmp_path, [0, 1] * 8)
    path = trained(own())

    def broken(*arguments, **named):
        raise BrokenPipeError

    monkeypatch.setattr(evaluation.pandas.DataFrame, "to_string", broken)
    with pytest.raises(BrokenPipeError):
        evaluation.main(EvalConfig((path,)))
    assert (own().run_path / "eval.json").exists()


def test_a_run_that_ended_is_evaluated_on_other_data_in_another_file(own, tmp_path, capsys):
    tables(tmp_path, [0, 1] * 8, [0, 1])
    (tmp_path / "own").rename(tmp_path / "other")
    tables(tmp_path, [0, 1] * 8, [0, 1] * 2)
    cfg = own(eval_at_end=True)
    train.main(cfg)
    before = (cfg.run_path / "eval.json").read_text()
    train.main(dataclasses.replace(cfg, eval_dataset=str(tmp_path / "other")))
    assert (cfg.run_path / "eval.json").read_text() == before
    (other,) = cfg.run_path.glob("eval-other-*.json")
    assert json.loads(other.read_text())[0]["test_images"] == 2
    text = (cfg.run_path / "train.log").read_text()
    assert "16 images to learn from, 4 to test on" in text and "test: 2 of 2 are used" in text

    (cfg.run_path / "eval.json").unlink()
    (cfg.run_path / "eval.json").mkdir()  # in the place of a run that is not one's own
    capsys.readouterr()
    evaluation.main(EvalConfig((str(cfg.run_path),)))
    printed = capsys.readouterr().out
    assert "k-NN" in printed and "not written, IsADirectoryError" in printed


@pytest.mark.slow
def test_folders_whose_names_are_no_utf8_are_trained_on_evaluated_and_logged(own, tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    put(folder / "own", *[f"{c}/{i}.png" for c in "ab" for i in range(8)])
    cfg = own(dataset=str(folder / "own"), run_dir=str(folder / os.fsdecode(b"\xe9")),
              cache_dir=str(folder / "cache"))
    words = [f"--{name}={value}" for name, value in vars(cfg).items()
             if value != getattr(Config, name) and not isinstance(value, bool)]
    done = subprocess.run([sys.executable, ROOT / "train.py", *words, "--eval_at_end"],
                          capture_output=True, text=True, errors="replace", timeout=200)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "keeps k-NN" in done.stdout
    assert "16 of 16 are used" in (cfg.run_path / "train.log").read_text()


@pytest.mark.parametrize("name, words", [
    ("", "no such file"), ("nothing.pth", "no such file"), ("nothing", "no such file"),
    ("student.safetensors", "exported student")])
def test_what_is_no_checkpoint_is_told_apart(tmp_path, name, words):
    safetensors.torch.save_file(dict(x=torch.zeros(1)), tmp_path / "student.safetensors")
    with pytest.raises(UserError, match=words):
        model.load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut"])
def test_files_that_are_no_checkpoints_are_refused_by_name(tmp_path, content):
    path = tmp_path / "broken.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.pth is no checkpoint"):
        model.load_checkpoint(path)


def test_a_checkpoint_that_lacks_a_setting_takes_its_default(tiny, caplog, monkeypatch):
    path = trained(tiny(epochs=1))
    monkeypatch.setattr(model.log, "propagate", True)
    saved = torch.load(path, weights_only=True)
    del saved["config"]["pool"]
    torch.save(saved, path)
    assert model.load_checkpoint(path)[1].pool == "cls" and "lacks pool" in caplog.text
    saved["config"]["pole"] = "cls"
    torch.save(saved, path)
    with pytest.raises(UserError, match="unexpected keyword argument 'pole'"):
        model.load_checkpoint(path)


def test_a_malicious_pickle_is_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    torch.save(dict(config={}, student=Bomb()), tmp_path / "bomb.pth")
    with pytest.raises(UserError, match=r"bomb\.pth is no checkpoint"):
        model.load_checkpoint(tmp_path / "bomb.pth")
    assert not (tmp_path / "exploded").exists()


def test_a_teacher_that_has_other_weights_now_is_refused(own, tmp_path):
    tables(tmp_path, [0, 1] * 8)
    path = trained(own())
    other = {name: value.contiguous() + 1e-3
             for name, value in model.load_teacher(own()).net.state_dict().items()}
    with safetensors.safe_open(model.WEIGHTS["demo"], "pt") as file:
        how = file.metadata()
    safetensors.torch.save_file(other, tmp_path / "other.safetensors", how)
    with pytest.raises(UserError, match="other weights now than in the run"):
        evaluation.main(EvalConfig((path,), teacher_weights=str(tmp_path / "other.safetensors")))


def test_comparing_two_models_leaves_mixed_precision_as_it_was(tiny, monkeypatch):
    cfg = tiny(precision="bf16", max_samples=80)
    evaluator, teacher = evaluation.Evaluator(cfg, max_test=65), model.load_teacher(cfg)
    student = model.build_student(cfg)
    distiller = model.Distiller(student, teacher, cfg)
    saved = dict(identity=dict(objective="Distiller"), objective=distiller.state_dict())
    found = evaluator.compare(saved, cfg, student, teacher)["cos_cls"]
    monkeypatch.setattr(data, "chunks", lambda rows: [rows])  # in place of 64 and one
    expected = evaluator.compare(saved, cfg, student, teacher)["cos_cls"]
    assert found == pytest.approx(expected, abs=1e-5)
    fork = saved | dict(identity=dict(objective="Fork"))
    assert evaluator.compare(fork, cfg, student, teacher) == {}
    assert not torch.is_autocast_enabled("cpu")


def test_images_that_the_test_split_lacks_are_said(own, tmp_path, capsys):
    put(tmp_path / "own", *[f"{s}/{c}/{i}.png" for s in ("train", "test") for c in "ab"
                            for i in range(8)])
    (tmp_path / "own" / "test" / "a" / "bad.png").write_bytes(b"no image")
    path = trained(own())
    for _ in range(2):
        capsys.readouterr()
        evaluation.main(EvalConfig((path,), baselines=False))
        said = capsys.readouterr().out
        assert "16 of 17 are used, 1 images cannot be read, such as test/a/bad.png" in said


@pytest.mark.parametrize("flag", ["--preset", "--eval_dataset", "--lr", "--run_dir"])
def test_evaluation_takes_no_flags_of_training(flag):
    with pytest.raises(UserError, match=f"unknown {flag}"):
        parse(EvalConfig, ["run", flag, "demo"])


def test_saved_features_are_those_that_were_evaluated_with_labels_and_names(tiny, photos, tmp_path):
    path, folder = trained(tiny(epochs=1)), tmp_path / "features"
    evaluation.main(EvalConfig((path,), dataset=str(photos), save_features=str(folder)))
    saved, cfg = model.load_checkpoint(path)
    student = model.build_student(cfg, saved["student"])
    evaluator = evaluation.Evaluator(dataclasses.replace(cfg, dataset=str(photos), max_samples=0))
    for split, features, count in zip(
            ("train", "test"), evaluator.features(student), (33, 8), strict=True):
        with safetensors.safe_open(folder / f"{split}.safetensors", "pt") as file:
            embeddings, labels = file.get_tensor("embeddings"), file.get_tensor("labels")
            classes, images = (json.loads(file.metadata()[key]) for key in ("classes", "images"))
        assert torch.equal(embeddings, features) and len(images) == count == len(set(images))
        assert [classes[y] for y in labels] == [name.split("/")[-2] for name in images]


# ---------------------------------------------------------------------------- splits and labels


def test_without_a_test_split_a_tenth_of_train_is_held_out(own, tmp_path):
    put(tmp_path / "own", *[f"{'ab'[i % 2]}/{i}.png" for i in range(40)])
    evaluator = evaluation.Evaluator(own())
    assert "a tenth of the training images" in str(evaluator)
    train_rows, test_rows = evaluator.train_rows, evaluator.test_rows
    assert len(test_rows) == 4 and len(train_rows) == 36 and not {*test_rows} & {*train_rows}
    evaluator = evaluation.Evaluator(own(max_samples=20, test_split="train"))
    assert evaluator.test is evaluator.train
    assert not {*evaluator.test_rows} & {*evaluator.train_rows}
    with pytest.raises(UserError, match="no split 'test', only train"):
        evaluation.Evaluator(own(test_split="test"))


def test_copies_of_training_images_among_the_test_images_are_said(own, tmp_path):
    put(tmp_path / "own", *[f"{'ab'[i % 2]}/{i}.png" for i in range(40)])
    assert "have a copy" not in str(evaluation.Evaluator(own()))
    shutil.copytree(tmp_path / "own", tmp_path / "own" / "again")  # as some archives hold them
    assert "of the test images have a copy" in str(evaluation.Evaluator(own()))
    shutil.rmtree(tmp_path / "own" / "again")
    shutil.copytree(tmp_path / "own", tmp_path / "two" / "train")
    (tmp_path / "two" / "test" / "a").mkdir(parents=True)
    (tmp_path / "two" / "test" / "a" / "new.png").write_bytes(png(40))
    shutil.copy(tmp_path / "own" / "a" / "0.png", tmp_path / "two" / "test" / "a")
    evaluator = evaluation.Evaluator(own(dataset=str(tmp_path / "two")))
    assert "1 of the test images have a copy" in str(evaluator)


def test_without_labels_similarity_and_cosines_are_evaluated(own, tmp_path, capsys):
    for split in ("train", "test"):
        (tmp_path / "own" / split).mkdir(parents=True)
        for i in range(24):
            PIL.Image.effect_noise((40, 40), 50 + i).save(tmp_path / "own" / split / f"{i}.png")
    cfg = own(eval_every=1)
    path = trained(cfg)
    assert "test_similarity" in metrics(cfg)[-1]
    rows = evaluation.main(EvalConfig((path,)))
    assert "no k-NN, no probe" in capsys.readouterr().out
    assert "knn20" not in rows[-1] and {"cos_cls", "similarity"} <= rows[-1].keys()


NONE = [None] * 4


@pytest.mark.parametrize("labels, test_labels, classified", [
    ([0], None, False),  # one image, which is held out
    ([0, 1], None, False),  # one of two is held out
    ([0], [0], False),
    ([3] * 4, [3] * 4, False),  # one class is none
    ([0, 1] * 2, [2] * 4, False),  # no class in common
    (NONE, NONE, False),
    ([-1] * 4, [-1] * 4, False),
    ([0, 1] * 2, [-1] * 4, False),
    ([0, 1, None, -5], [None, 1, -5, 0], True),
    ([float("inf"), 1.0, float("nan"), 0.5], [1.0, 0.0] * 2, True),
    (["cat", "dog"] * 2, ["dog", "cat"] * 2, True),
    ([True, False] * 2, [False] * 4, True),
    ([10**12, 7] * 2, [7] * 4, True),
    ([*range(60)], [*range(60)], False),  # a label for each image
])
def test_odd_labels_are_learned_from_and_evaluated(
        own, tmp_path, labels, test_labels, classified):
    tables(tmp_path, labels, test_labels)
    path = trained(own(batch_size=min(4, len(labels))))
    student = evaluation.main(EvalConfig((path,)))[-1]
    assert ("knn20" in student, "linear" in student) == (classified, classified)


def numbered(names: list, words: list):
    """A split of some words, as a ClassLabel of these names; each word has one picture."""
    kinds = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    cells = [dict(bytes=png(len(word)), path=None) for word in words]
    return datasets.Dataset.from_dict(dict(image=cells, label=words), kinds)


def test_classes_are_compared_by_name_however_the_splits_number_them(own, tmp_path):
    train_split = numbered(["a", "bb", "ccc"], ["a", "bb", "ccc"] * 30)
    test_split = numbered(["ccc", "bb"], ["bb", "ccc"] * 4)
    datasets.DatasetDict(train=train_split, test=test_split).save_to_disk(tmp_path / "own")
    evaluator = evaluation.Evaluator(own())
    assert evaluator.classes == ["a", "bb", "ccc"] and evaluator.y_test.tolist() == [1, 2] * 4
    row = evaluator.evaluate(*evaluator.features(model.build_student(own())))
    assert (row["knn20"], row["linear"]) == (1, 1), "each test image is also a training image"


@pytest.mark.parametrize("labels, test_labels", [
    ([9, 10] * 2, ["10", "9"] * 2), ([9, 10] * 2, [10.0, 9.0] * 2),
    (["café", "tea"] * 2, ["tea", "cafe\u0301"] * 2), ([9, 10, None, 10], [10, 9] * 2)])
def test_numbers_and_accents_are_the_same_class_in_any_form(own, tmp_path, labels, test_labels):
    tables(tmp_path, labels, test_labels)
    evaluator = evaluation.Evaluator(own())
    assert len(evaluator.classes) == 2 and evaluator.labelled
    assert {*evaluator.y_test.tolist()} == {0, 1} and evaluator.y_test[0] == evaluator.y[1]


def test_what_cannot_be_matched_is_said_with_the_names(own, tmp_path):
    tables(tmp_path, ["cat", "dog"] * 2, ["cat", "eel", "fox\x1b[31m", "fox\x1b[31m"])
    evaluator = evaluation.Evaluator(own())
    said = str(evaluator)
    assert evaluator.labelled
    assert "'eel'" in said and "fox" in said and "\x1b" not in said and "'dog'" not in said
    tables(tmp_path / "other", ["cat", "dog"] * 2, ["eel", "fox"] * 2)
    evaluator = evaluation.Evaluator(own(dataset=str(tmp_path / "other" / "own")))
    said = str(evaluator)
    assert not evaluator.labelled and "['cat', 'dog']" in said and "['eel', 'fox']" in said


@pytest.mark.parametrize("words", [False, True])
def test_a_label_for_each_image_is_refused_with_a_hint(own, tmp_path, words):
    labels = [f"a photo of {i}" if words else i for i in range(60)]
    tables(tmp_path, labels, labels[:30])
    evaluator = evaluation.Evaluator(own())
    said = str(evaluator)
    assert not evaluator.labelled
    assert "60 labels of 60 images" in said and "see --label_column" in said


def test_a_few_images_of_many_classes_are_classified(own, tmp_path):
    tables(tmp_path, [*range(60)] * 3, [*range(60)])
    assert evaluation.Evaluator(own(), max_train=60).labelled


def test_a_subset_of_images_of_many_classes_is_classified(own, tmp_path):
    tables(tmp_path, [i % 60 for i in range(240)], [0, 1])
    evaluator = evaluation.Evaluator(own(max_samples=64))
    assert evaluator.labelled and len(evaluator.y) == 64


def test_a_student_that_outputs_nan_is_not_evaluated(tiny):
    cfg = tiny()
    student = model.build_student(cfg)
    student.net.norm.weight.data.fill_(3e38)
    with pytest.raises(UserError, match="the student outputs NaN or infinity"):
        evaluation.Evaluator(cfg, 20, 10).row("student", student)


def test_an_evaluation_that_will_fail_is_refused_before_training(tiny):
    for changes in (dict(label_column="bred"), dict(test_split="tset")):
        cfg = tiny(eval_at_end=True, **changes)
        with pytest.raises(UserError, match="bred|tset"):
            train.main(cfg)
        assert not cfg.run_path.exists()


def test_both_splits_are_evaluated_by_one_column(own, tmp_path):
    kind = datasets.ClassLabel(names=["no", "yes"])
    rows = drawn([0, 1] * 6).rename_column("label", "smiling").cast_column("smiling", kind)
    rows = rows.add_column("male", [0, 0, 1, 1] * 3).cast_column("male", kind)
    rows = rows.add_column("label", [None] * 12)  # of a test split without labels
    (tmp_path / "own").mkdir()
    rows.to_parquet(tmp_path / "own" / "train.parquet")
    rows.select_columns(["image", "male", "smiling"]).to_parquet(tmp_path / "own" / "test.parquet")
    evaluator = evaluation.Evaluator(own())
    assert evaluator.y.tolist() == evaluator.y_test.tolist() == [0, 1] * 6
    assert "labels: smiling (no, yes)" in str(evaluator)


def test_a_mistyped_label_column_is_refused(tiny):
    with pytest.raises(UserError, match="--label_column bred: neither split has labels"):
        evaluation.Evaluator(tiny(label_column="bred"))


def test_training_and_test_images_share_none_of_those_that_the_heads_are_measured_on(tiny):
    """The held-out part, the subset and the first epoch are different permutations."""
    rows = np.arange(1000)
    orders = [evaluation.data.subset(rows, 100), evaluation.data.epoch_order(1000, 0, 0)[:100],
              evaluation.data.subset(rows, 100, evaluation.data.HELD_OUT)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert len({*orders[a]} & {*orders[b]}) < 30


def test_the_teachers_features_are_kept_and_compared_with_what_it_outputs_now(
        own, tmp_path, monkeypatch):
    put(tmp_path, *[f"own/{split}/{name}/{i}.png" for split in ("train", "test")
                    for name in ("cat", "dog") for i in range(12)])
    cfg = own(cache_dir=str(tmp_path / "cache"))
    path = trained(cfg)
    embedded, embed = [], evaluation.Evaluator.embed

    def counted(self, backbone, store, rows):
        embedded.append(bool(backbone.fingerprint))
        return embed(self, backbone, store, rows)

    monkeypatch.setattr(evaluation.Evaluator, "embed", counted)
    first = evaluation.main(EvalConfig((path,)))
    times = sum(embedded)
    second = evaluation.main(EvalConfig((path,)))
    assert sum(embedded) - times == times - 2, "train and test once"
    assert first[0]["knn20"] == second[0]["knn20"] and first[0]["linear"] == second[0]["linear"]
    file, _ = (tmp_path / "cache").glob("features/*.f32")
    kept = np.fromfile(file, np.float32)
    for changed in (-kept, kept[:-1]):
        changed.tofile(file)
        with pytest.raises(UserError, match="holds features of other code"):
            evaluation.main(EvalConfig((path,)))


def test_a_smaller_stored_size_is_evaluated_as_it_was_trained(tiny, tmp_path):
    cfg = tiny(stored_size=24, epochs=1, cache_dir=str(tmp_path / "cache"))
    train.main(cfg)
    evaluation.main(EvalConfig((latest(cfg),), baselines=False))
    sizes = {json.loads(file.read_text())["size"]
             for file in Path(cfg.cache_dir).glob("stores/*/info.json")}
    assert sizes == {24}


def test_the_probe_is_no_worse_for_few_images_and_weak_features():
    """Forty images choose C: one of them decides nothing."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 10, 1400)
    features = rng.normal(size=(1400, 64)) + 0.2 * rng.normal(size=(10, 64))[labels]
    x, y = torch.from_numpy(features).float(), torch.from_numpy(labels)
    accuracies, ones = [], torch.nn.functional.pad(x, (0, 1), value=1.0)
    for C in evaluation.STRENGTHS:
        w = evaluation.fit_probe(ones[:400], y[:400], C, torch.zeros(10, 65))
        predicted = (ones[400:] @ w.T).argmax(1)
        accuracies.append(evaluation.accuracy(predicted, y[400:]))
    for seed in range(10):  # other orders hold out other images
        order = np.random.default_rng(seed).permutation(400)
        predicted, _ = evaluation.linear_probe(x[:400][order], y[:400][order], x[400:])
        assert evaluation.accuracy(predicted, y[400:]) > 0.75 * max(accuracies)


@pytest.mark.parametrize("error", [UserError("cannot write"), PermissionError("cache/features")])
def test_a_cache_that_cannot_be_written_keeps_no_features(tiny, monkeypatch, error):
    def fails(path, make):
        raise error

    cfg = tiny()
    evaluator, teacher = evaluation.Evaluator(cfg, 40, 20), model.load_teacher(cfg)
    expected = evaluator.features(teacher)
    monkeypatch.setattr(evaluation.data, "make_once", fails)
    for found, before in zip(evaluator.features(teacher), expected, strict=True):
        assert torch.allclose(found, before, atol=1e-5)


@pytest.mark.parametrize("classes", [10, 30])
def test_the_probe_learns_from_one_image_a_class(classes):
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(classes, 48, generator=generator)
    labels = torch.arange(classes)
    train, test = (means[some] + 0.3 * torch.randn(len(some), 48, generator=generator)
                   for some in (labels, labels.repeat(10)))
    predicted, _ = evaluation.linear_probe(train, labels, test)
    assert evaluation.accuracy(predicted, labels.repeat(10)) > 0.98
