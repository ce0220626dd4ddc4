"""Rows of the table, other data, no labels, no test split; files that are no checkpoints."""

import json
import os

import PIL.Image
import pytest
import timm
import torch
from conftest import png

import eval as evaluation
import model
import train
from config import EvalConfig, UserError, parse
from test_smoke import latest, metrics


def test_of_the_images_embeddings_alone_are_kept(tiny, monkeypatch):
    cfg = tiny()
    bench, student, cat, held = evaluation.Bench(cfg), model.student_of(cfg), torch.cat, []

    def watched(parts, *arguments, **named):
        held.extend(part.untyped_storage().nbytes() / part.nbytes for part in parts
                    if part.shape[1:] == (student.embed_dim,))
        return cat(parts, *arguments, **named)

    monkeypatch.setattr(torch, "cat", watched)
    bench.features(student)
    assert held and set(held) == {1.0}, "a view of the class tokens holds those of all patches"


def test_several_checkpoints_give_a_row_each_and_need_nothing_but_themselves(tiny):
    cfg = tiny(save_every=1)
    train.main(cfg)
    files = tuple(str(cfg.run_path / f"checkpoint_epoch_{n}.pth") for n in (1, 2))
    rows = evaluation.main(EvalConfig(files, max_test=100))
    assert [row["model"] for row in rows] == [
        "teacher demo", "student, untrained", "run, epoch 1", "run, epoch 2"]
    assert json.loads((cfg.run_path / "eval.json").read_text()) == rows
    assert {"torch", "device", "commit", "gflops", "images_per_s"} <= rows[-1].keys()


def test_a_trained_student_is_the_network_that_the_untrained_one_is(tiny):
    cfg = tiny(epochs=1)
    train.main(cfg)
    timm.layers.set_fused_attn(True)  # as in a new process
    _, untrained, student = evaluation.main(EvalConfig((latest(cfg),)))
    assert student["gflops"] == untrained["gflops"]


def test_a_checkpoint_can_be_evaluated_on_other_data(tiny, photos):
    cfg = tiny(epochs=1)
    train.main(cfg)
    args = parse(EvalConfig, [latest(cfg), "--eval_dataset", str(photos), "--device", "cpu"])
    rows = evaluation.main(args)
    assert rows[-1]["knn20"] == round(rows[-1]["knn20"] * 8) / 8, "eight test images"
    bench = evaluation.Bench(tiny(eval_dataset=str(photos), max_samples=20))  # of training images
    assert len(bench.train_rows) == 33 and len(bench.test_rows) == 8


def test_a_mistyped_label_column_is_refused(tiny):
    with pytest.raises(UserError, match="--label_column bred: no labels"):
        evaluation.Bench(tiny(label_column="bred"))


def test_without_a_test_split_a_tenth_of_train_is_held_out(tiny, tmp_path, capsys):
    for i in range(40):
        (tmp_path / "own" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / "ab"[i % 2] / f"{i}.png").write_bytes(png(i))
    bench = evaluation.Bench(tiny(dataset=str(tmp_path / "own"), max_samples=0))
    assert "a tenth of the training images" in capsys.readouterr().out
    train_rows, test_rows = bench.train_rows, bench.test_rows
    assert len(test_rows) == 4 and len(train_rows) == 36 and not {*test_rows} & {*train_rows}
    same = tiny(dataset=str(tmp_path / "own"), max_samples=20, test_split="train")
    bench = evaluation.Bench(same)
    assert bench.test is bench.train and not {*bench.test_rows} & {*bench.train_rows}
    with pytest.raises(UserError, match="no split 'test', only train"):
        evaluation.Bench(tiny(dataset=str(tmp_path / "own"), max_samples=0, test_split="test"))


def test_without_labels_similarity_and_cosines_are_evaluated(tiny, tmp_path, capsys):
    for split in ("train", "test"):
        (tmp_path / "flat" / split).mkdir(parents=True)
        for i in range(24):
            PIL.Image.effect_noise((40, 40), 50 + i).save(tmp_path / "flat" / split / f"{i}.png")
    cfg = tiny(dataset=str(tmp_path / "flat"), max_samples=0, epochs=1, eval_every=1)
    train.main(cfg)
    assert "test_similarity" in metrics(cfg)[-1]
    rows = evaluation.main(EvalConfig((latest(cfg),)))
    assert "no labels" in capsys.readouterr().out
    assert "knn20" not in rows[-1] and {"cos_cls", "similarity"} <= rows[-1].keys()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut"])
def test_files_that_are_no_checkpoints_are_refused_by_name(tmp_path, content):
    path = tmp_path / "broken.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.pth is no checkpoint"):
        model.load_checkpoint(path)


def test_a_checkpoint_that_lacks_a_setting_takes_its_default(tiny, caplog, monkeypatch):
    train.main(tiny())
    monkeypatch.setattr(model.log, "propagate", True)
    saved = torch.load(latest(tiny()), weights_only=True)
    del saved["config"]["pool"]
    torch.save(saved, latest(tiny()))
    assert model.load_checkpoint(latest(tiny()))[1].pool == "cls" and "lacks pool" in caplog.text
    saved["config"]["pole"] = "cls"
    torch.save(saved, latest(tiny()))
    with pytest.raises(UserError, match="unexpected keyword argument 'pole'"):
        model.load_checkpoint(latest(tiny()))


def test_a_malicious_pickle_is_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    torch.save(dict(config={}, student=Bomb()), tmp_path / "bomb.pth")
    with pytest.raises(UserError, match=r"bomb\.pth is no checkpoint"):
        model.load_checkpoint(tmp_path / "bomb.pth")
    assert not (tmp_path / "exploded").exists()


def test_comparing_two_models_leaves_mixed_precision_as_it_was(tiny):
    bench = evaluation.Bench(tiny(precision="bf16", max_samples=80), max_test=80)
    teacher = model.load_teacher("demo", 32)
    student = model.student_of(tiny())
    fixed = dict(objective="Distiller", teacher_hash=teacher.fingerprint, teacher_size=32)
    saved = dict(fixed=fixed, objective=model.Distiller(student, teacher, tiny()).state_dict())
    assert -1 <= bench.compare(saved, tiny(), student, teacher)["cos_cls"] <= 1
    assert bench.compare(dict(fixed=fixed | dict(teacher_hash="")), tiny(), student, teacher) == {}
    assert not torch.is_autocast_enabled("cpu")


def test_evaluation_takes_no_preset():
    with pytest.raises(UserError, match="unknown --preset"):
        parse(EvalConfig, ["--preset", "demo"])
