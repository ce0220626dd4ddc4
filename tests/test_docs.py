"""README and docs do what they say: the code that runs here is the code on the page."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import model
import train
from config import Config, EvalConfig, parse, validate
from test_smoke import TINY

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}


def block(page: str, heading: str, number: int = 0) -> str:
    """The code under a heading of a page."""
    section = re.split(r"^##+ ", PAGES[page].split(f"# {heading}\n")[1], flags=re.M)[0]
    return re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)[number]


LOAD = block("README.md", "Use the student") + block("recipes.md", "Similar images")


def alone(code: str, folder: Path, *options: str) -> str:
    """Run code in a process of its own; returns what it printed. -I: without this project."""
    done = subprocess.run([sys.executable, *options, "-c", code], cwd=folder, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder to follow the pages in: a run in runs/x, and ../my_images, red, green and blue."""
    root, rng = tmp_path_factory.mktemp("tree") / "home", np.random.default_rng(0)
    for split, count in dict(train=60, test=30).items():
        for i in range(count):
            pixels = rng.integers(0, 80, (40, 40, 3), np.uint8)
            pixels[..., i % 3] += 150
            folder = root / ".." / "my_images" / split / "abc"[i % 3]
            folder.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=95)
    images = str(root.parent / "my_images")
    train.main(Config(**TINY | dict(dataset=images, max_samples=0, cache_dir=str(root / "cache"),
                                    run_dir=str(root / "runs" / "x"))))
    PIL.Image.open(root.parent / "my_images/train/b/1.jpg").save(root / "query.jpg", quality=80)
    return root


def test_every_command_of_the_pages_is_accepted(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    found = 0
    pages = {**PAGES, "dinov2": (ROOT / "results/dinov2/README.md").read_text()}
    for page in pages.values():
        code = "".join(re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)).replace("\\\n", " ")
        for line in re.findall(r"^(?:.* )?train\.py (.*)$", code, re.M):
            argv = shlex.split(line.split(" > ")[0], comments=True)
            for flag, name in zip(argv, argv[1:], strict=False):
                if flag == "--dataset" and name.startswith(".."):
                    Path(name).mkdir(exist_ok=True)
                if flag.endswith("_weights"):
                    Path(name).parent.mkdir(parents=True, exist_ok=True)
                    save_file({}, name)
            cfg = parse(Config, argv)
            validate(cfg, model.problems(cfg))
            found += 1
        for line in re.findall(r"^python eval\.py (.*)$", code, re.M):
            for name in shlex.split(line)[:1]:
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                Path(name).touch()
            parse(EvalConfig, shlex.split(line))
            found += 1
    assert found > 15


def test_files_that_the_pages_link_to_are_there():
    for name, page in PAGES.items():
        folder = ROOT if name == "README.md" else ROOT / "docs"
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page):
            assert link.startswith("https://") or (folder / link).exists(), f"{name}: {link}"


def test_settings_and_log_fields_that_the_pages_name_exist(home):
    line = json.loads((home / "runs/x/metrics.jsonl").read_text().splitlines()[-1])
    section = PAGES["reference.md"].split("## Log fields")[1].split("## ")[0]
    for field in re.findall(r"^\| (`.*?) \|", section, re.M):
        for name in re.findall(r"`(\w+)`", field):
            assert name in line, name
    settings = {*Config.__dataclass_fields__, *EvalConfig.__dataclass_fields__}
    known = settings | {f"no_{name}" for name in settings} | {
        "nproc_per_node", "nnodes", "standalone", "rdzv_backend", "rdzv_endpoint", "rdzv_id",
        "help"}
    for name, page in PAGES.items():
        for flag in re.findall(r"--([a-z]+_?\w*)\b(?![-=])", page):
            assert flag in known or "#SBATCH" in page or "sbatch" in page, f"{name}: --{flag}"


@pytest.mark.slow
def test_similar_images_are_found(home):
    lines = alone(LOAD + block("recipes.md", "Similar images", 1), home, "-I").splitlines()
    cosines = [float(line.split()[0]) for line in lines]
    assert lines[0].endswith("train/b/1.jpg") and cosines[0] > 0.99
    assert len(lines) == 5 and cosines == sorted(cosines, reverse=True)


@pytest.mark.slow
def test_the_student_is_fine_tuned(home):
    lines = alone(LOAD + block("recipes.md", "Fine-tuning"), home, "-I").splitlines()
    losses = [float(line.split()[-1]) for line in lines]
    assert len(losses) == 10 and losses[-1] < losses[0]


@pytest.mark.slow
def test_the_student_is_exported_to_onnx(home):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    printed = alone(LOAD + block("recipes.md", "ONNX"), home, "-I")
    assert float(printed.splitlines()[-1]) < 1e-4


@pytest.mark.slow
def test_scikit_learn_classifies_its_features(home):
    pytest.importorskip("sklearn")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    assert float(alone(code + block("recipes.md", "A classifier on its features"), home)) > 0.9


@pytest.mark.slow
def test_a_teacher_is_evaluated_at_several_sizes(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + block("recipes.md", "Teachers")
    assert "'model': '40 px'" in alone(code, tmp_path)


@pytest.mark.slow
def test_weights_of_timm_are_saved_for_a_student(tmp_path):
    code = block("recipes.md", "Students").replace("pretrained=True", "pretrained=False")
    alone(code, tmp_path, "-I")
    weights = str(tmp_path / "vit_small.safetensors")
    assert model.build_student("vit_small_patch16_224", 32, weights=weights).grid == (2, 2)


def test_a_folder_of_files_becomes_a_data_set(home, tmp_path):
    alone(block("recipes.md", "Your own data"), home, "-I")
    store = data.open_store(Config(dataset=str(home.parent / "my_data"), teacher_size=32,
                                   student_size=32, cache_dir=str(tmp_path)), "train")
    assert len(store) == 90 and np.bincount(store.labels).tolist() == [30, 30, 30]


@pytest.mark.slow
@pytest.mark.parametrize("heading", ["Your own loss", "A second teacher", "Your own network"])
def test_changes_of_the_method_train(home, tmp_path, heading):
    code = f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
    short = dict(max_samples=128, cache_dir=str(home / "cache"))
    code += block("recipes.md", heading).replace("dict(epochs=1", f"dict(**{short!r}, epochs=1")
    assert "done. Evaluate with" in alone(code, tmp_path)


STUDENTS = {
    "vit_tiny_patch16_224": dict(student_args="embed_dim=48 depth=2 num_heads=2"),
    "vit_tiny_patch16_224 mean": dict(student_args="depth=1 reg_tokens=4", pool="mean"),
    "vit_base_patch16_siglip_224": dict(student_args="depth=1 embed_dim=48 num_heads=2"),
    "swin_tiny_patch4_window7_224": dict(
        student_args="embed_dim=24 depths=(1,1,1,1)", student_size=64),
    "resnet18": dict(student_args=""),
    "mobilenetv4_conv_small": dict(student_args=""),  # two layers behind its pooling
    "convnext_atto": dict(student_args=""),  # a norm behind its pooling
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_the_exported_student_embeds_as_it_did(home, tmp_path, name):
    """By plain timm in a process of its own, as the README states for each kind of model."""
    cfg = Config(**TINY | dict(epochs=1, max_samples=32, student=name.split()[0],
                               cache_dir=str(home / "cache"), run_dir=str(tmp_path / "runs/x"))
                 | STUDENTS[name])
    train.main(cfg)
    saved, _ = model.load_checkpoint(cfg.run_path / "checkpoint_latest.pth")
    student = model.student_of(cfg, saved["student"])
    images = torch.rand(2, 3, cfg.student_size, cfg.student_size)
    with torch.inference_mode():
        expected = student(images).cls.clone()
    save_file(dict(images=(images - student.mean) / student.std, cls=expected), tmp_path / "e")
    how = "x[:, 0]" if student.has_cls else "student.fc_norm(x)[:, n:].mean(1)"
    if not student.outputs_tokens:  # Swin's feature maps have their channels last
        how = "x.mean((1, 2))" if "swin" in name else "x.mean((2, 3))"
    code = LOAD + ("from safetensors.torch import load_file, save_file\nimport torch\n"
                   "with torch.inference_mode():\n"
                   "    x = student.forward_features(load_file('e')['images'])\n"
                   "    n = getattr(student, 'num_prefix_tokens', 0)\n"
                   f"    save_file(dict(cls=({how}).contiguous()), 'got')\n")
    alone(code, tmp_path, "-I")
    cosine = torch.cosine_similarity(load_file(tmp_path / "got")["cls"], expected)
    assert cosine.min() > 1 - 1e-5


def test_the_student_loads_without_this_project(home):
    assert "False" in alone(LOAD + "import sys\nprint('model' in sys.modules)", home, "-I")
