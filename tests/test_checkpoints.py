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
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import eval as evaluation
import model
import train
from config import Config, EvalConfig, UserError, cli
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
    """Run a command that must end with status 2 and one message, which is returned."""

    def call(main, cls, flags: dict, *arguments):
        argv = [f"--{name}={value}" for name, value in flags.items() if value != ""]
        argv = [a if "=True" not in a and "=False" not in a else switch(a) for a in argv]
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments), *argv])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli(main, cls)
        message = capsys.readouterr().err
        assert stop.value.code == 2 and message.startswith("error: "), message
        assert "Traceback" not in message and len(message) < 900, message
        return message

    def switch(flag):
        name, value = flag.removeprefix("--").split("=")
        return f"--{name}" if value == "True" else f"--no_{name}"

    def both(run):
        """By eval.py and by the training run that it belongs to, in the same words."""
        few = dict(device="cpu", num_workers=0, max_train=32, max_test=32, probe=False)
        judged = call(evaluation.main, EvalConfig, few, latest(run))
        resumed = call(train.main, Config, dataclasses.asdict(run))
        assert str(latest(run)) in judged and judged == resumed, (judged, resumed)
        return judged

    both.call = call
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
        with pytest.raises(UserError, match=r"cut\.pth is not a checkpoint .* damaged"):
            evaluation.read_checkpoint(tmp_path / "cut.pth")


def test_a_flipped_bit_is_noticed_wherever_it_matters(run, tmp_path):
    """torch.load compares no checksums, and would take nearly all of these for what was saved."""
    content = bytearray(latest(run).read_bytes())
    saved, cfg = evaluation.read_checkpoint(latest(run))
    rng, noticed = np.random.default_rng(0), 0
    places = (
        rng.integers(0, len(content), 100),
        rng.integers(len(content) - 20_000, len(content), 50),
    )
    for place in np.concatenate(places).tolist():
        content[place] ^= 1 << place % 8
        (tmp_path / "flipped.pth").write_bytes(content)
        content[place] ^= 1 << place % 8
        try:
            found, found_cfg = evaluation.read_checkpoint(tmp_path / "flipped.pth")
        except UserError as error:
            assert "flipped.pth" in str(error)
            noticed += 1
        else:
            assert same(found, saved) and found_cfg == cfg, f"byte {place} was changed unnoticed"
    assert noticed > 90, "only padding and dates may change"


def test_flipped_weights_are_refused_by_both_commands(run, refused):
    weight = torch.load(latest(run), weights_only=True)["student"]["blocks.0.attn.qkv.weight"]
    content = bytearray(latest(run).read_bytes())
    content[content.index(weight.numpy().tobytes()) + 1000] ^= 64
    latest(run).write_bytes(content)
    assert "the checksum of" in refused(run)


def test_flipped_weights_of_a_teacher_are_refused(tmp_path, run, refused):
    teacher = model.load_teacher("demo", 32).net.state_dict()
    torch.save(teacher, tmp_path / "teacher.pth")
    model.load_teacher("demo", 32, str(tmp_path / "teacher.pth"))
    content = bytearray((tmp_path / "teacher.pth").read_bytes())
    content[content.index(teacher["blocks.1.mlp.fc1.weight"].numpy().tobytes()) + 1000] ^= 64
    (tmp_path / "teacher.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"teacher\.pth does not fit .* the checksum of"):
        model.load_teacher("demo", 32, str(tmp_path / "teacher.pth"))


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
def test_files_of_another_kind_are_refused(run, refused, name):
    latest(run).write_bytes(foreign()[name])
    assert "is not a checkpoint of this program" in refused(run)


def test_a_compressed_checkpoint_is_refused_before_it_is_unpacked(run, refused):
    """It could unpack to any size: this one is ten thousand times smaller than its weights."""
    with zipfile.ZipFile(latest(run), "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data/99", bytes(1_000_000))
    assert "it is compressed" in refused(run)


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda c: c.pop("pool"), "settings it lacks: pool, unknown ones: none"),
        (lambda c: c.update(teacher_layers=3), "unknown ones: teacher_layers"),
        (lambda c: c.update(student_size="big"), "--student_size 'big': not a value of type int"),
        (lambda c: c.update(loss="l7"), "--loss l7: not one of cosine"),
        (lambda c: c.update(crop_scale=7.0), "--crop_scale 7.0: must be a number, at least"),
        (lambda c: c.clear(), "settings it lacks: batch_size"),
    ],
)
def test_a_config_of_another_version_is_refused(run, refused, edit, words):
    change(latest(run), lambda saved: edit(saved["config"]) and None)
    assert words in refused(run)


@pytest.mark.parametrize("entry", evaluation.ENTRIES)
def test_a_checkpoint_without_one_of_its_entries_is_refused(run, refused, entry):
    change(latest(run), lambda saved: {k: v for k, v in saved.items() if k != entry})
    assert f"it has no usable {entry}" in refused(run)
    change(latest(run), lambda saved: saved | {entry: None})
    assert f"it has no usable {entry}" in refused(run)


@pytest.mark.parametrize("place", [dict(step=-1), dict(epoch=float("nan"))])
def test_a_checkpoint_from_nowhere_is_refused(run, refused, place):
    change(latest(run), lambda saved: saved | place)
    assert "is not a checkpoint" in refused(run)


def wider(state: dict) -> dict:
    return {k: v.repeat(2) if v.ndim == 1 else v for k, v in state.items()}


def wide_moments(optimiser: dict) -> dict:
    states = {n: wider(moments) for n, moments in optimiser["state"].items()}
    return optimiser | dict(state=states)


@pytest.mark.parametrize(
    "entry, edit, words, judged",
    [
        ("student", wider, "size mismatch", True),
        ("student", lambda state: {}, "Missing key", True),
        ("student", lambda state: state | {"more": torch.zeros(1)}, "Unexpected key", True),
        ("student", lambda state: dict.fromkeys(state, 1), "cls_token", True),
        ("heads", wider, "size mismatch", True),
        ("heads", lambda state: {}, "Missing key", False),
        ("optimiser", wide_moments, "its optimiser is of other shapes", False),
        ("optimiser", lambda state: {}, "it has no 'param_groups'", False),
        ("scaler", lambda state: dict(scale=1.0), "it has no", False),
    ],
)
def test_contents_of_other_shapes_are_refused(run, refused, entry, edit, words, judged):
    change(latest(run), lambda saved: saved | {entry: edit(saved[entry])})
    if judged:
        assert words in refused(run)
    else:  # by training, which alone needs an optimiser
        assert words in refused.call(train.main, Config, dataclasses.asdict(run))


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
def test_code_in_a_checkpoint_or_a_teacher_does_not_run(run, refused, tmp_path, kind):
    exploded = tmp_path / "exploded"
    held = torch.load(latest(run), weights_only=True)
    content = bombs(exploded, held)[kind]
    latest(run).write_bytes(content)
    refused(run)
    (tmp_path / "teacher.pth").write_bytes(content)
    fresh = dict(dataclasses.asdict(run), resume=False, teacher_weights=tmp_path / "teacher.pth")
    message = refused.call(train.main, Config, fresh)
    assert f"--teacher_weights {tmp_path}/teacher.pth does not fit" in message
    assert not exploded.exists()


def test_no_library_may_load_weights_that_run_code(tmp_path):
    """Older versions of timm ask for it; the environment overrules them."""
    torch.save(Bomb(tmp_path / "exploded"), tmp_path / "teacher.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "teacher.pth", weights_only=False)
    assert not (tmp_path / "exploded").exists()


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
def test_hostile_safetensors_are_refused_at_once(tmp_path, name):
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(SAFETENSORS[name])
    ours = "its header has" if name in ("enormous", "large", "crowded") else ""
    begin = time.time()
    with pytest.raises(UserError, match=rf"{name}\.safetensors does not fit \w+: {ours}"):
        model.load_teacher("demo", 32, str(path))
    assert time.time() - begin < 5


def test_a_teacher_file_that_is_missing_or_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")  # reading it would wait for ever
    for path in (tmp_path / "pipe.pth", tmp_path / "nowhere.pth", tmp_path):
        with pytest.raises(UserError, match=f"--teacher_weights {path}: no such file"):
            model.load_teacher("demo", 32, str(path))


# ---------------------------------------------------------------------------- strangers' wishes


def paths_in(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize(
    "wish, words",
    [
        (dict(train_split="../../../outside/x"), "not the name of a split"),
        (dict(test_split="/outside"), "not the name of a split"),
        (dict(dataset="outside.py"), "nor an existing folder"),
        (dict(dataset="https://example.org/x"), "nor an existing folder"),
        (dict(student="hf-hub:some/one"), "not among the models of timm"),
        (dict(student="local-dir:/outside"), "not among the models of timm"),
        (dict(student_args="pretrained=True"), "starts from random weights"),
        (dict(student_args="checkpoint_path=/outside"), "starts from random weights"),
        (dict(student_args="pretrained_cfg_overlay={'file':'/outside'}"), "starts from random"),
    ],
)
def test_a_strangers_checkpoint_reaches_neither_files_nor_the_hub(
    run, refused, tmp_path, monkeypatch, wish, words
):
    change(latest(run), lambda saved: saved["config"].update(wish))
    before = paths_in(tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("the network was asked"))
    assert words in refused.call(evaluation.main, EvalConfig, dict(device="cpu"), latest(run))
    assert paths_in(tmp_path) == before


def test_a_teacher_of_the_checkpoints_choice_is_one_that_timm_lists(run, capsys):
    change(latest(run), lambda saved: saved["config"].update(teacher="hf-hub:some/one"))
    rows = evaluation.main(
        EvalConfig((str(latest(run)),), max_test=32, probe=False, num_workers=0, device="cpu")
    )
    assert "hf-hub:some/one is not among the models of timm" in capsys.readouterr().out
    assert [row["model"] for row in rows][:2] == ["raw pixels", "student, untrained"]


def test_judging_writes_only_beside_the_checkpoint_and_into_the_cache(run, tmp_path):
    outside = tmp_path / "outside"
    change(latest(run), lambda saved: saved["config"].update(cache_dir=str(outside), run_dir="/x"))
    before = paths_in(tmp_path)
    evaluation.main(
        EvalConfig((str(latest(run)),), max_test=32, baselines=False, num_workers=0, device="cpu")
    )
    new = paths_in(tmp_path) - before
    assert run.run_path / "eval.json" in new and tmp_path / "here" / "cache" / "stores" in new
    cache = tmp_path / "here" / "cache"
    assert all(p == run.run_path / "eval.json" or p.is_relative_to(cache) for p in new), new


def test_a_cache_that_is_there_is_found_again(run, tmp_path):
    args = EvalConfig(
        (str(latest(run)),), max_test=32, baselines=False, num_workers=0, device="cpu"
    )
    assert evaluation.merged(run, args).cache_dir == run.cache_dir
    data.open_store(evaluation.merged(run, args), "train", 32, run.max_samples)
    assert not (tmp_path / "here" / "cache").exists()
