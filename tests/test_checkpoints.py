"""Checkpoints and weights that are broken, foreign or hostile are refused, and harm nothing.

Each case is the command without the start of a process: `config.cli` reads argv, writes the
message and ends with a status.
"""

import dataclasses
import io
import json
import os
import pickle
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import model
import train
from config import Config, EvalConfig, UserError, cli, parse
from test_smoke import TINY


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of one epoch, in a folder of its own."""
    home = tmp_path_factory.mktemp("whole")
    changes = dict(epochs=1, teacher_views=0, max_samples=32, precision="fp16")
    folders = dict(cache_dir=str(home / "cache"), run_dir=str(home / "run"))
    cfg = Config(**{**TINY, **changes, **folders})
    train.main(cfg)
    return cfg


@pytest.fixture
def run(whole, tmp_path, monkeypatch):
    """A copy of that run, to be broken, in an empty working directory."""
    shutil.copytree(whole.run_path, tmp_path / "run")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return dataclasses.replace(whole, run_dir=str(tmp_path / "run"), epochs=2)


def latest(run: Config) -> Path:
    return run.run_path / "checkpoint_latest.pth"


def change(path: Path, edit) -> None:
    """Let edit(contents) alter a checkpoint; what it returns, if anything, is stored instead."""
    saved = torch.load(path, weights_only=True)
    torch.save(edit(saved) or saved, path)


@pytest.fixture
def refused(monkeypatch, capsys):
    """call(main, cls, argv): a command that must end with status 2 and one message; returned."""

    def call(main, cls, *argv):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli(main, cls)
        message = capsys.readouterr().err.split("\r")[-1]  # after a bar of progress
        assert stop.value.code == 2 and message.startswith("error: "), message
        assert "Traceback" not in message and len(message) < 1200, message
        return message

    return call


def flags(run: Config) -> list[str]:
    """The command line of a Config."""
    found = []
    for field in dataclasses.fields(Config):
        value = getattr(run, field.name)
        if field.type is bool:
            found.append(f"--{field.name}" if value else f"--no_{field.name}")
        elif value != "":
            found.append(f"--{field.name}={value}")
    return found


@pytest.fixture
def refused_by_both(refused):
    """By eval.py and by the training run that it belongs to, in the same words."""

    def both(run):
        evaluated = refused(evaluation.main, EvalConfig, latest(run), "--max_train", 32)
        resumed = refused(train.main, Config, *flags(run))
        assert str(latest(run)) in evaluated and evaluated == resumed, (evaluated, resumed)
        return evaluated

    return both


def same(a, b) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ---------------------------------------------------------------------------- damage


def test_a_checkpoint_cut_short_anywhere_is_refused(run, tmp_path):
    content = latest(run).read_bytes()
    ends = [0, 1, 4, 30, *range(500, len(content), len(content) // 40)]
    ends += [len(content) - n for n in (1000, 100, 23, 22, 21, 1)]
    for end in ends:
        (tmp_path / "cut.pth").write_bytes(content[:end])
        with pytest.raises(UserError, match=r"cut\.pth is no checkpoint"):
            model.load_checkpoint(tmp_path / "cut.pth")


def test_a_flipped_bit_is_noticed_wherever_it_matters(run, tmp_path):
    """torch.load compares no checksums, and would take nearly all of these for what was saved."""
    content = bytearray(latest(run).read_bytes())
    saved, cfg = model.load_checkpoint(latest(run))
    rng, noticed, flipped = np.random.default_rng(0), 0, tmp_path / "flipped.pth"
    places = (
        rng.integers(0, len(content), 100),
        rng.integers(len(content) - 20_000, len(content), 50),
    )
    for place in np.concatenate(places).tolist():
        content[place] ^= 1 << place % 8
        flipped.write_bytes(content)
        content[place] ^= 1 << place % 8
        try:
            found, found_cfg = model.load_checkpoint(shutil.move(flipped, latest(run)))
        except UserError as error:
            assert "checkpoint_latest.pth is no checkpoint" in str(error)
            noticed += 1
        else:
            assert same(found, saved) and found_cfg == cfg, f"byte {place} was changed unnoticed"
    assert noticed > 90, "only padding and dates may change"


def test_flipped_weights_are_refused_by_both_commands(run, refused_by_both):
    weight = torch.load(latest(run), weights_only=True)["student"]["blocks.0.attn.qkv.weight"]
    content = bytearray(latest(run).read_bytes())
    content[content.index(weight.numpy().tobytes()) + 1000] ^= 64
    latest(run).write_bytes(content)
    assert "a checksum is wrong" in refused_by_both(run)


# ---------------------------------------------------------------------------- others' files


def foreign() -> dict[str, bytes]:
    """Files that are something else."""
    contents = {"empty": b"", "text": b"weights", "image": b"\x89PNG\r\n\x1a\n" + bytes(99)}
    held = {"model": torch.zeros(3)}, [1, 2], torch.zeros(3), {1: 2}, None
    for name, value in zip(("other", "list", "tensor", "numbers", "none"), held, strict=True):
        torch.save(value, buffer := io.BytesIO())
        contents[name] = buffer.getvalue()
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as file:
        file.writestr("readme.txt", "no weights")
    return contents | {"zip": buffer.getvalue()}


@pytest.mark.parametrize("name", foreign())
def test_files_of_another_kind_are_refused(run, refused_by_both, name):
    latest(run).write_bytes(foreign()[name])
    assert "is no checkpoint of this version" in refused_by_both(run)


@pytest.mark.parametrize("edit, words", [
    (lambda c: c.update(teacher_layers=3), "unexpected keyword argument 'teacher_layers'"),
    (lambda c: c.update(student_size="big"), "--student_size big: must be from 8 to 4096"),
    (lambda c: c.update(pool="max"), "--pool max: not one of cls"),
    (lambda c: c.update(crop_scale=7.0), "--crop_scale 7.0: must be from 0.01 to 1"),
])
def test_a_config_of_another_version_is_refused(run, refused_by_both, edit, words):
    change(latest(run), lambda saved: edit(saved["config"]) and None)
    assert words in refused_by_both(run)


@pytest.mark.parametrize("number", [None, 5, model.FORMAT + 1])
def test_a_checkpoint_of_another_version_is_refused_with_a_clear_sentence(
        run, refused_by_both, number):
    change(latest(run), lambda saved: saved | dict(format=number))
    assert "of another version of this program" in refused_by_both(run)


@pytest.mark.parametrize("changes, words", [
    (dict(epochs=2.0), "--epochs 2.0: must be from 1 to .*, a whole number"),
    (dict(lr=True), "--lr True: must be from"), (dict(eval_at_end="no"), "--eval_at_end no: must"),
    (dict(eval_at_end=5), "--eval_at_end 5: must"), (dict(epochs=True), "--epochs True: must"),
    (dict(dataset=None), "--dataset None: must be text"),
    (dict(dataset=["x"], student_args=dict(depth=6)), "--student_args .*: must be text"),
])
def test_a_file_of_settings_with_other_types_is_refused(tmp_path, changes, words):
    (tmp_path / "config.json").write_text(json.dumps(changes))
    with pytest.raises(UserError, match=words):
        parse(Config, ["--preset", str(tmp_path)])


def test_words_for_true_and_false_are_no_text():
    found = model.parse_arguments("a=false b=True c=NONE d=jax e=(2,2)")
    assert found == dict(a=False, b=True, c=None, d="jax", e=(2, 2))


def test_a_checkpoint_is_found_in_its_run_folder_and_others_are_told_apart(run, refused, tmp_path):
    assert str(model.load_checkpoint(run.run_path)[0]) == str(model.load_checkpoint(latest(run))[0])
    for path, words in ((tmp_path / "nowhere.pth", "nowhere.pth: no such file"),
                        (tmp_path / "here", "checkpoint_latest.pth: no such file"),
                        (run.run_path / "student.safetensors", "is an exported student")):
        assert words in refused(evaluation.main, EvalConfig, path)


@pytest.mark.parametrize(
    "part", ["config", "student", "objective", "optimiser", "identity", "step"])
def test_a_checkpoint_that_lacks_a_part_is_refused(run, refused, part):
    change(latest(run), lambda saved: {k: v for k, v in saved.items() if k != part})
    message = refused(train.main, Config, *flags(run))
    assert part in message and "checkpoint_latest.pth" in message


def test_a_setting_that_a_checkpoint_lacks_takes_its_default_and_is_named(run, caplog):
    change(latest(run), lambda saved: saved["config"].pop("weight_decay") and None)
    cfg = model.load_checkpoint(latest(run))[1]
    assert cfg == dataclasses.replace(run, epochs=1, run_dir=cfg.run_dir)
    assert "lacks weight_decay: the defaults are taken" in caplog.text


def test_data_that_have_moved_do_not_make_a_checkpoint_unreadable(run, tmp_path, monkeypatch):
    change(latest(run), lambda saved: saved["config"].update(dataset="/a/place/of/old"))
    assert model.load_checkpoint(latest(run))[0]["step"] == 2
    assert train.main(run)["step"] == 4


def test_the_run_goes_on_when_its_checkpoint_is_whole_and_from_fp16_in_fp32(run):
    assert train.main(dataclasses.replace(run, precision="fp32"))["step"] == 4
    assert train.main(dataclasses.replace(run, epochs=3))["step"] == 6, "and back"


# ---------------------------------------------------------------------------- code in the data


class Bomb:
    """Unpickling it makes the folder `path`."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def bombs(path: Path, held: dict) -> dict[str, bytes]:
    torch.save(held | dict(student=Bomb(path)), buffer := io.BytesIO())
    plain = pickle.dumps(held | dict(student=Bomb(path)))
    torch.save(Bomb(path), old := io.BytesIO(), _use_new_zipfile_serialization=False)
    return dict(zip=buffer.getvalue(), pickle=plain, legacy=old.getvalue())


@pytest.mark.parametrize("kind", ["zip", "pickle", "legacy"])
def test_code_in_a_checkpoint_or_a_teacher_does_not_run(
        run, refused, refused_by_both, tmp_path, kind):
    exploded = tmp_path / "exploded"
    held = torch.load(latest(run), weights_only=True)
    content = bombs(exploded, held)[kind]
    latest(run).write_bytes(content)
    refused_by_both(run)
    (tmp_path / "teacher.pth").write_bytes(content)
    teacher = str(tmp_path / "teacher.pth")
    fresh = dataclasses.replace(run, resume=False, teacher="vit_tiny_patch16_224",
                                teacher_weights=teacher)
    assert f"{teacher} does not fit" in refused(train.main, Config, *flags(fresh))
    assert not exploded.exists()


# ---------------------------------------------------------------------------- safetensors


def safetensors_file(header: bytes, claimed: int | None = None, content: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if claimed is None else claimed) + header + content


def tensors(**places: tuple[int, int]) -> bytes:
    """A header of float32 vectors at these places, whatever they mean."""
    entries = {
        name: dict(dtype="F32", shape=[(end - start) // 4], data_offsets=[start, end])
        for name, (start, end) in places.items()
    }
    return json.dumps(entries).encode()


SAFETENSORS = dict(
    empty=b"",
    enormous=safetensors_file(b"{}", claimed=2**63 - 1),
    large=safetensors_file(b"{}", claimed=99_000_000),
    nested=safetensors_file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    brackets=safetensors_file(b"[" * 900_000),
    crowded=safetensors_file(tensors(**{f"t{i}": (0, 0) for i in range(60_000)})),
    overlapping=safetensors_file(tensors(a=(0, 64), b=(32, 96)), content=bytes(96)),
    beyond=safetensors_file(tensors(a=(0, 2**40)), content=bytes(64)),
    backwards=safetensors_file(tensors(a=(64, 0)), content=bytes(64)),
    astronomic=safetensors_file(
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,64]}}',
        content=bytes(64),
    ),
    truncated=safetensors_file(tensors(a=(0, 64), b=(64, 128)), content=bytes(100)),
    others=safetensors_file(tensors(a=(0, 64)), content=bytes(64)),
)


@pytest.mark.parametrize("name", SAFETENSORS)
def test_hostile_safetensors_are_refused(tmp_path, name):
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(SAFETENSORS[name])
    with pytest.raises(UserError, match=rf"{name}\.safetensors does not fit \w+: "):
        model.load_teacher(Config(teacher="vit_tiny_patch16_224", teacher_size=32,
                                  teacher_weights=str(path)))


def test_a_teacher_file_that_is_missing_or_no_file_is_named(tmp_path, refused):
    for path in (tmp_path / "nowhere.pth", tmp_path):
        message = refused(train.main, Config, "--preset", "demo", "--teacher", "test_vit",
                          "--teacher_weights", path, "--run_dir", tmp_path / "run")
        assert f"{path} does not fit" in message


# ---------------------------------------------------------------------------- strangers' wishes


def paths_in(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("wish, words", [
    (dict(dataset="outside.py"), "--dataset 'outside.py'"),
    (dict(dataset="https://example.org/x"), "--dataset 'https://example.org/x'"),
    (dict(student="hf-hub:some/one"), "not a model of timm"),
    (dict(student="local-dir:/outside"), "not a model of timm"),
    (dict(student_args="pretrained=True"), "name no weights"),
    (dict(student_args="pretrained_cfg_overlay={'file':'/outside'}"), "name no weights"),
])
def test_a_strangers_checkpoint_reaches_neither_files_nor_the_hub(
        run, refused, tmp_path, monkeypatch, wish, words):
    change(latest(run), lambda saved: saved["config"].update(wish))
    before = paths_in(tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("the network was used"))
    assert words in refused(evaluation.main, EvalConfig, latest(run), "--no_baselines")
    assert {p.name for p in paths_in(tmp_path) - before} <= {"cache", "stores"}


def test_a_split_of_a_strangers_choice_is_no_path(run, tmp_path):
    change(latest(run), lambda saved: saved["config"].update(train_split="../../../outside/x"))
    with pytest.raises(UserError, match="no split"):
        evaluation.main(EvalConfig((str(latest(run)),)))
    assert not (tmp_path / "outside").exists()


def test_evaluation_writes_only_beside_the_checkpoint_and_into_the_cache(run, tmp_path):
    change(latest(run), lambda saved: saved["config"].update(
        cache_dir=str(tmp_path / "outside"), run_dir="/x"))
    before = paths_in(tmp_path)
    evaluation.main(EvalConfig((str(latest(run)),), baselines=False))
    new = paths_in(tmp_path) - before
    cache = tmp_path / "here" / "cache"
    beside = [p for p in new if p.parent == run.run_path]
    assert len(beside) == 1 and beside[0].match("eval-shapes-*.json"), "eval.json has baselines"
    assert all(p == cache or p.is_relative_to(cache) for p in new - {*beside}), new
