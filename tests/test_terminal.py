"""What a user types and sees: presets from files, the header, a line an epoch, the table."""

import dataclasses
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

import config
import train
from config import Config, UserError, parse
from test_smoke import TINY

ROOT = Path(__file__).parents[1]


def command(*flags: str) -> list:
    settings = TINY | dict(run_dir="runs/x", cache_dir="cache", epochs=2, eval_at_end=True)
    given = [f"--{name}" if value is True else f"--{name}={value}"
             for name, value in settings.items() if value is not False]
    return [sys.executable, str(ROOT / "train.py"), *given, *flags]


def test_a_config_json_repeats_its_run_with_flags_on_top(tiny):
    cfg = tiny(lr=0.002, resume=False)
    train.main(cfg)
    file = str(cfg.run_path / "config.json")
    for preset in (file, str(cfg.run_path)):
        assert parse(Config, ["--preset", preset]) == dataclasses.replace(cfg, resume=True)
    assert parse(Config, ["--preset", file, "--lr", "0.5"]).lr == 0.5


@pytest.mark.parametrize("text, words", [
    ("{", "nor a config.json of this version"), ('{"learning_rate": 1}', "learning_rate"),
    ('{"lr": "high"}', "--lr high: must be from 0"), ("[1]", "nor a config.json")])
def test_a_file_of_other_settings_is_refused_with_its_reason(tmp_path, text, words):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=words):
        parse(Config, ["--preset", str(tmp_path / "x.json")])
    with pytest.raises(UserError, match="neither demo nor large nor a config.json"):
        parse(Config, ["--preset", "demos"])


def test_every_setting_has_one_line_of_help_and_a_section():
    for cls in (Config, config.EvalConfig):
        text = " ".join(config.make_parser(cls).format_help().split())
        for name in cls.__dataclass_fields__:
            assert name in text.split("options:")[1] or name == "checkpoints", name
    assert " optimisation: --epochs" in " ".join(
        config.make_parser(Config).format_help().split())


@pytest.mark.slow
def test_without_a_terminal_there_are_no_bars_and_lines_have_100_columns(tmp_path):
    done = subprocess.run(command(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100, max(lines, key=len)
    assert [line[:15] for line in lines if line.startswith("epoch")] == [
        "epoch    1 of 2", "epoch    2 of 2"]
    table = lines[-6:-2]
    titles = "model k-NN linear keeps k-NN keeps linear M parameters images/s"
    assert " ".join(table[0].split()) == titles
    for line, name in zip(table[1:], ("teacher demo", "student, untrained", "student, epoch 2"),
                          strict=True):
        assert line.strip().startswith(name) and line.count("%") >= 2, line
    assert lines[-2] == "all numbers: runs/x/eval.json"
    assert lines[-1] == "pictures: python examples/figures.py runs/x"
    assert done.stdout.count("images: ") == 1, "what the data are is said once"
    log = (tmp_path / "runs/x/train.log").read_text().splitlines()
    assert log == lines[: len(log)], "train.log has the same lines"


@pytest.mark.slow
def test_on_a_terminal_bars_name_the_phase_and_leave_nothing_behind(tmp_path):
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    delays = "import data, functools; data.progress.keywords['delay'] = 0; "
    run = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = {command()[1:]!r}; "
    code = run + delays + "import train; from config import cli, Config; cli(train.main, Config)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=child,
                               stderr=child)
    os.close(child)
    shown = b""
    while True:
        try:
            shown += os.read(parent, 65536)
        except OSError:  # the program has ended
            break
    assert process.wait() == 0, shown.decode()
    text = shown.decode()
    for phase in ("decoding images", "the teacher's mean and axes", "targets of view 1 of 2",
                  "epochs", "features of the teacher"):
        assert phase in text, phase
    lines = text.replace("\x1b[A", "").split("\n")
    left = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in lines]
    assert not [line for line in left if "%|" in line], "bars are cleared"
    assert len([line for line in left if line.startswith("epoch ")]) == 2
