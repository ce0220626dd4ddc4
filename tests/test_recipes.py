"""The README's recipes do what it says: the code that runs here is the code on the page."""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import data
import eval as evaluation
import model
import train
from config import Config, EvalConfig, parse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TINY = dict(
    teacher="demo", teacher_size=32, student="vit_tiny_patch16_224", student_size=32,
    student_args="embed_dim=48 depth=2 num_heads=2", batch_size=16, epochs=2, lr=2e-3,
    precision="fp32", device="cpu", num_workers=0,
)  # fmt: skip


def block(heading: str, language: str = "python", number: int = 0) -> str:
    """The code under a heading of the README."""
    section = re.split(r"^##+ ", README.split(f"# {heading}\n")[1], flags=re.M)[0]
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.M | re.S)[number]


LOAD = block("Take the student away")
TRANSFORM = block("Take the student away", number=1)


def alone(code: str, folder: Path) -> str:
    """Run code in a process that cannot import this project; returns what it printed."""
    command = [sys.executable, "-I", "-c", f"{code}\nimport sys; assert 'model' not in sys.modules"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder to follow the README in: a run in runs/x, and ../my_images, red, green and blue."""
    root = tmp_path_factory.mktemp("tree") / "home"
    for split, count in dict(train=60, test=30).items():
        for i in range(count):
            label, pixels = i % 3, data.draw_shape(len(split), i, 40)[0] // 3
            pixels[..., label] += 150
            folder = root / ".." / "my_images" / split / "abc"[label]
            folder.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=95)
    cfg = Config(**TINY, dataset=str(root.parent / "my_images"), run_dir=str(root / "runs" / "x"),
                 cache_dir=str(root / "cache"))
    train.main(cfg)
    return root


STUDENTS = {
    "vit_tiny_patch16_224": dict(student_args="embed_dim=48 depth=2 num_heads=2"),
    "vit_tiny_patch16_224 mean": dict(student_args="depth=1 reg_tokens=4", pool="mean"),
    "vit_tiny_patch16_224 fc_norm": dict(student_args="depth=1 global_pool=avg"),
    "vit_base_patch16_siglip_224": dict(student_args="depth=1 embed_dim=48 num_heads=2"),
    "swin_tiny_patch4_window7_224": dict(
        student_args="embed_dim=24, depths=(1, 1, 1, 1)", student_size=64),
    "resnet18": {},
    "mobilenetv4_conv_small": {},  # two layers behind its pooling
    "convnext_atto": {},  # a norm behind its pooling
}


@pytest.mark.slow
def test_the_exported_student_gives_the_same_embeddings_in_plain_timm(tmp_path):
    expected = {}
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for number, (name, changes) in enumerate(STUDENTS.items()):
        cfg = Config(**{**TINY, "student_args": "", "student": name.split()[0], **changes})
        student = evaluation.student_of(cfg)
        for p in student.parameters():  # norms and biases that are not 1 and 0
            p.data += 0.1 * torch.randn_like(p) if p.ndim == 1 else 0
        train.export(student, cfg, tmp_path / f"{number}.safetensors")
        size = cfg.student_size
        with torch.inference_mode():
            expected[str(number)] = student(images[..., :size, :size]).cls.clone()
    save_file(expected | dict(images=images), tmp_path / "expected")
    code = (
        "import torch; from safetensors.torch import load_file; expected = load_file('expected')\n"
        f"for number in range({len(STUDENTS)}):\n"
        f"    exec({LOAD!r}.replace('runs/x/student', str(number)))\n"
        "    size = int(how['image_size'])\n"
        "    constants = [json.loads(how[name]) for name in ('mean', 'std')]\n"
        "    mean, std = (torch.tensor(c).view(3, 1, 1) for c in constants)\n"
        "    images = (expected['images'][..., :size, :size] - mean) / std\n"
        "    with torch.inference_mode():\n"
        "        got = eval(how['embedding'])\n"
        "    got, want = (x / x.norm(dim=1, keepdim=True) for x in (got, expected[str(number)]))\n"
        "    print(float((got - want).abs().max()), how['embedding'])\n"
    )
    for name, line in zip(STUDENTS, alone(code, tmp_path).splitlines(), strict=True):
        assert float(line.split()[0]) < 1e-6, f"{name}: {line}"


@pytest.fixture(scope="module")
def printed(home):
    """What the recipes print that need nothing but the run folder; one process, to save time."""
    image = PIL.Image.open(home.parent / "my_images" / "train" / "b" / "1.jpg")
    image.save(home / "query.jpg", quality=80)
    argv = shlex.split(block("Train a classifier on its features", "bash"))[2:]
    args = parse(EvalConfig, [str(home / a) if "." in a else a for a in argv])
    evaluation.main(dataclasses.replace(args, baselines=False, probe=False, num_workers=0))
    names = ("Your own data", "Find similar images", "Fine-tune it",
             "Train a classifier on its features")
    code = LOAD + TRANSFORM + "print('----')\n".join(block(name) for name in names)
    return dict(zip(names, alone(code, home).split("----\n"), strict=True))


def test_similar_images_are_found(printed):
    lines = printed["Find similar images"].splitlines()
    cosines = [float(line.split()[0]) for line in lines]
    assert lines[0].endswith("train/b/1.jpg") and cosines[0] > 0.99
    assert len(lines) == 5 and cosines == sorted(cosines, reverse=True)


def test_the_student_is_fine_tuned(printed):
    losses = [float(line.split()[-1]) for line in printed["Fine-tune it"].splitlines()]
    assert len(losses) == 10 and losses[-1] < losses[0]


def test_the_student_is_exported_to_onnx(home):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    code = LOAD + block("Export it to ONNX") + "print('----')\n"
    code += "import numpy, onnxruntime; s = onnxruntime.InferenceSession('student.onnx')\n"
    code += "print(s.run(None, {'images': numpy.zeros((5, 3, 32, 32), 'float32')})[0].shape)"
    *_, difference, _, shape = alone(code, home).splitlines()
    assert float(difference) < 1e-4
    assert shape == "(5, 48)", "another batch size than the example's"


def test_scikit_learn_classifies_saved_features(home, printed):
    saved = load_file(home / "features.safetensors")
    assert {name: tuple(value.shape) for name, value in saved.items()} == dict(
        train_features=(60, 48), train_labels=(60,), train_rows=(60,),
        test_features=(30, 48), test_labels=(30,), test_rows=(30,))  # fmt: skip
    accuracy = float(printed["Train a classifier on its features"])
    assert accuracy > 0.9


def test_every_training_command_of_the_page_is_accepted(home, monkeypatch):
    monkeypatch.chdir(home)
    commands = re.findall(r"^(?:python|torchrun [^`\n]*) train\.py (.*)$", README, re.M)
    assert len(commands) > 8
    for command in commands:
        for folder in re.findall(r"--dataset (\.\.\S+)", command):
            Path(folder).mkdir(exist_ok=True)
        parse(Config, shlex.split(command, comments=True), model.problems)


def test_a_folder_of_files_becomes_a_data_set(home, printed, tmp_path):
    cfg = Config(**TINY, dataset=str(home.parent / "my_data"), cache_dir=str(tmp_path))
    store = data.open_store(cfg, "train", 32)
    assert len(store) == 90 and np.bincount(store.labels).tolist() == [30, 30, 30]


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "resnet50"])
def test_a_teacher_of_the_page_is_asked(name, tmp_path):
    assert f"--teacher {name}." in block("Another teacher", "bash")
    torch.manual_seed(0)
    save_file(timm.create_model(name, num_classes=0).state_dict(), tmp_path / "t.safetensors")
    teacher = model.load_teacher(name, 64, str(tmp_path / "t.safetensors"))
    with torch.inference_mode():
        features = teacher(torch.rand(2, 3, 64, 64))
    grid = (4, 4) if name.startswith("vit") else (2, 2)
    assert teacher.grid == grid and features.patches.shape == (2, grid[0] ** 2, teacher.embed_dim)


@pytest.mark.slow
def test_the_patches_for_a_loss_and_a_second_teacher_train_resume_and_are_judged(home, tmp_path):
    for name in ("config", "data", "eval", "model", "train"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    shutil.copytree(ROOT / "assets", tmp_path / "assets")
    second = block("A second teacher", "diff")
    for patch in (block("Your own loss", "diff"), second):
        subprocess.run(["git", "apply"], input=patch, text=True, cwd=tmp_path, check=True)
    (name,) = re.findall(r'^\+SECOND = "(.*)"$', second, re.M)
    code = (tmp_path / "model.py").read_text()
    (tmp_path / "model.py").write_text(code.replace(name, "demo"))  # its weights are at hand
    torch.manual_seed(0)
    save_file(timm.create_model("resnet18", num_classes=0).state_dict(), tmp_path / "r.safetensors")
    settings = dict(TINY, dataset=str(home.parent / "my_images"), teacher="resnet18", loss="chord",
                    teacher_weights=str(tmp_path / "r.safetensors"), teacher_views=1)
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "import config, eval, train\n"
        f"settings = {settings!r}\n"
        "settings['run_dir'] = 'run'\n"
        "for settings['epochs'] in (2, 3):\n"
        "    train.main(config.Config(**settings))\n"
        "eval.main(config.EvalConfig(('run/checkpoint_latest.pth',)))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "run" / "train.log").read_text()
    assert "width 576" in log and "continuing" in log and "the teacher is dropped" in log
    rows = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert rows[0]["model"] == "teacher resnet18" and -1 <= rows[-1]["cos"] <= 1
    saved = torch.load(tmp_path / "run" / "checkpoint_latest.pth", weights_only=True)
    assert saved["heads"]["cls_head.mean"].shape == (512 + 64,)
