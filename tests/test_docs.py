"""README and docs do what they say: the code that runs here is the code on the page."""

import dataclasses
import json
import pickle
import re
import shlex
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_forks import continues
from torch import nn

import data
import eval as evaluation
import model
import train
from config import DATASETS, Config, EvalConfig, UserError, parse
from test_smoke import TINY, metrics

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
slow = pytest.mark.slow


def blocks(page: str, heading: str, language: str = "python") -> list:
    """The code under a heading of a page."""
    section = re.split(r"^##+ ", PAGES[page].split(f"# {heading}\n")[1], flags=re.M)[0]
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.M | re.S)


def run_block(code: str, name: str = "block", **short) -> types.ModuleType:
    """Run code of a page as the module `name`, in this process; `short` are settings of its run."""
    module = sys.modules[name] = types.ModuleType(name)
    exec(code.replace("dict(epochs=1", f"dict(**{short!r}, epochs=1"), vars(module))
    return module


EMBED, = blocks("README.md", "Use the student")


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
            pixels = rng.integers(0, 80, (40, 40 + i % 7, 3), np.uint8)
            pixels[..., i % 3] += 150
            folder = root / ".." / "my_images" / split / "abc"[i % 3]
            folder.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=95)
    images = str(root.parent / "my_images")
    train.main(Config(**TINY | dict(dataset=images, max_samples=0, cache_dir=str(root / "cache"),
                                    run_dir=str(root / "runs" / "x"))))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    picture = PIL.Image.open(root.parent / "my_images/train/b/1.jpg").rotate(90, expand=True)
    picture.save(root / "query.jpg", quality=80, exif=exif)
    return root


# ---------------------------------------------------------------------------- what the pages name


def test_every_command_of_the_pages_is_accepted(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    found = 0
    pages = {**PAGES, "dinov2": (ROOT / "results/dinov2/README.md").read_text()}
    for page in pages.values():
        code = "".join(re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)).replace("\\\n", " ")
        programs = r"(?:train|networks|examples/forks/\w+)\.py"
        for line in re.findall(rf"^(?:.* )?{programs} (.*)$", code, re.M):
            argv = shlex.split(line.split(" > ")[0], comments=True)
            for flag, name in zip(argv, argv[1:], strict=False):
                if flag == "--dataset" and name.startswith(".."):
                    Path(name).mkdir(exist_ok=True)
                if flag == "--preset" and name.startswith("runs/"):
                    Path(name).mkdir(parents=True, exist_ok=True)
                    Path(name, "config.json").write_text(json.dumps(vars(Config())))
            cfg = parse(Config, argv)
            arguments = model.parse_arguments(cfg.student_args)
            model.check_model(cfg.student, cfg.student_size, arguments)
            if cfg.teacher not in ("demo", "of_torchvision"):  # whose files say what they are
                name = model.TEACHERS.get(cfg.teacher, cfg.teacher)
                model.check_model(name, cfg.teacher_size, {})
            found += 1
        for line in re.findall(r"^python eval\.py (.*)$", code, re.M):
            parse(EvalConfig, shlex.split(line, comments=True))
            found += 1
    assert found > 20


def test_files_and_headings_that_the_pages_link_to_are_there():
    for name, page in PAGES.items():
        folder = ROOT if name == "README.md" else ROOT / "docs"
        for link, _, heading in re.findall(r"\]\(([^)#]*)(#([^)]+))?\)", page):
            assert link.startswith("https://") or (folder / link).exists(), f"{name}: {link}"
            if heading and not link.startswith("https://"):
                target = (folder / link).read_text() if link else page
                anchors = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")
                           for title in re.findall(r"^#+ (.*)$", target, re.M)]
                assert heading in anchors, f"{name}: {link}#{heading}"


def test_settings_and_log_fields_that_the_pages_name_exist(home):
    line = json.loads((home / "runs/x/metrics.jsonl").read_text().splitlines()[-1])
    section = PAGES["reference.md"].split("## Log fields")[1].split("## ")[0]
    for field in re.findall(r"^\| (`.*?) \|", section, re.M):
        for name in re.findall(r"`(\w+)`", field):
            assert name in line, name
    settings = {*Config.__dataclass_fields__, *EvalConfig.__dataclass_fields__}
    known = settings | {f"no_{name}" for name in settings} | {
        "nproc_per_node", "nnodes", "standalone", "rdzv_backend", "rdzv_endpoint", "rdzv_id",
        "help", "preset", "logdir"}
    for name, page in PAGES.items():
        for flag in re.findall(r"--([a-z]+_?\w*)\b(?![-=])", page):
            assert flag in known or "#SBATCH" in page or "sbatch" in page, f"{name}: --{flag}"


def test_names_of_the_five_modules_that_the_pages_name_exist():
    code = "".join(path.read_text() for path in ROOT.glob("*.py"))
    code += (ROOT / "demo/shapes.py").read_text()
    for name in re.findall(r"`((?:data|train|model)\.\w+|[A-Za-z]+_\w+|[A-Z]\w+)`",
                           PAGES["README.md"] + PAGES["recipes.md"]):
        short = name.split(".")[-1]
        assert re.search(rf"\b{short}\b", code) or short in ("param_groups_layer_decay", "Drawn",
                                                             "num_prefix_tokens"), name


def test_the_readme_and_the_docs_are_short():
    assert len(PAGES["README.md"].split()) <= 1800
    assert sum(len(page.split()) for name, page in PAGES.items() if name != "README.md") <= 6000
    pages = [path.read_text() for path in ROOT.glob("results/**/*.md")]
    assert sum(len(page.split()) for page in pages) <= 4000


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/**/config*/*.json")) + [
    ROOT / "results/demo/config.json"], ids=lambda path: path.stem)
def test_configs_in_results_are_presets_of_this_version(path):
    assert parse(Config, ["--preset", str(path)])


# ---------------------------------------------------------------------------- with a student

STUDENTS = {
    "vit_tiny_patch16_224": dict(student_args="embed_dim=48 depth=2 num_heads=2"),
    "vit_tiny_patch16_224 mean": dict(student_args="depth=1 reg_tokens=4", pool="mean"),
    "swin_tiny_patch4_window7_224": dict(
        student_args="embed_dim=24 depths=(1,1,1,1)", student_size=64),
    "resnet10t": dict(student_args=""),
    "mobilenetv4_conv_small_050": dict(student_args=""),  # two layers behind its pooling
    "convnext_atto": dict(student_args="", student_size=64),  # a norm behind its pooling
}
RECIPES = "Similar images", "A classifier", "Fine-tuning", "ONNX"  # test_hub.py has the Hub's
OPTIONAL = {"ONNX": ("onnx", "onnxscript", "onnxruntime"), "A classifier": ("sklearn",)}


def is_installed(package: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {package}"], capture_output=True,
                          timeout=100).returncode == 0


@slow
@pytest.mark.parametrize("name", STUDENTS)
def test_recipes_run_with_the_embedding_that_was_trained(home, tmp_path, name):
    """All in one process without this project, each recipe after the README's lines."""
    cfg = Config(**TINY | dict(epochs=1, dataset=str(home.parent / "my_images"), max_samples=0,
                               student=name.split()[0], cache_dir=str(home / "cache"),
                               run_dir=str(home / "runs" / name)) | STUDENTS[name])
    train.main(cfg)
    saved, _ = model.load_checkpoint(cfg.run_path)
    student = model.build_student(cfg, saved["student"])
    size = cfg.student_size
    pixels = data.decode(dict(bytes=(home / "query.jpg").read_bytes()), size)
    images = data.render(torch.from_numpy(pixels)[None], size)
    noise = torch.rand(3, 3, size, size)
    with torch.inference_mode():
        expected = torch.cat([student(images).cls, student(noise).cls])

    save_file(dict(noise=(noise - student.mean) / student.std), tmp_path / "noise")
    recipes = [heading for heading in RECIPES
               if all(map(is_installed, OPTIONAL.get(heading, ())))]
    code = f"embed, recipes = {EMBED.replace('runs/x', f'runs/{name}')!r}, {{}}\n"
    for heading in recipes:
        code += f"recipes[{heading!r}] = {blocks('recipes.md', heading)!r}\n"
    code += f"""
import os, sys, torch
from safetensors.torch import load_file, save_file
noise, found = load_file({str(tmp_path / 'noise')!r})["noise"], {{}}
for name, parts in recipes.items():
    space = {{}}
    exec(embed, space)
    if name != "ONNX":
        found[name] = torch.cat([space["embed"](["query.jpg"]), space["student"](noise)]).detach()
    print("####", name)
    for part in parts:
        exec(part, space)
    if name == "ONNX":
        found[name] = torch.cat([space["embed"](["query.jpg"]), space["student"](noise)]).detach()
save_file(found, {str(tmp_path / 'found')!r})
print("####", "modules", "model" in sys.modules)
"""
    printed = dict(part.split("\n", 1) for part in alone(code, home, "-I").split("#### ")[1:])
    for heading, embeddings in load_file(tmp_path / "found").items():
        difference = (embeddings - expected).abs().max() / expected.abs().max().clamp_min(1)
        assert difference < 1e-5, heading
    assert "modules False" in printed
    lines = printed["Similar images"].splitlines()
    assert lines[0].endswith("train/b/1.jpg") and float(lines[0].split()[0]) > 0.99
    lines = re.findall(r": accuracy (.*)%$", printed["Fine-tuning"], re.M)
    assert len(lines) == 21 and float(lines[-1]) >= float(lines[0]) > 90
    if "A classifier" in recipes:
        assert float(printed["A classifier"]) > 0.9
    if "ONNX" in recipes:
        assert float(re.search(r"^[\d.e-]+$", printed["ONNX"], re.M)[0]) < 1e-4


@slow
def test_saved_features_are_those_of_the_checkpoint(home, monkeypatch):
    monkeypatch.chdir(home)
    saved, cfg = model.load_checkpoint("runs/x")
    evaluation.main(parse(EvalConfig, ["runs/x", "--save_features", "features"]))
    for split, count in dict(train=60, test=30).items():
        with safe_open(f"features/{split}.safetensors", "pt") as file:
            embeddings, labels = file.get_tensor("embeddings"), file.get_tensor("labels")
            names, classes = (json.loads(file.metadata()[key]) for key in ("images", "classes"))
        assert embeddings.dtype == torch.float32 and len(embeddings) == len(names) == count
        assert all(classes[label] in name for label, name in zip(labels, names, strict=True))
        with torch.inference_mode():
            student = model.build_student(cfg, saved["student"])
            pixels = data.decode(dict(bytes=Path(cfg.dataset, names[7]).read_bytes()), 32)
            expected = student(data.render(torch.from_numpy(pixels)[None], 32)).cls[0]
        assert torch.allclose(embeddings[7], expected, atol=1e-5)


# ---------------------------------------------------------------------------- data, teachers, forks


@slow
def test_a_teacher_is_evaluated_at_several_sizes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_block(blocks("recipes.md", "Teachers")[0])
    assert "'model': '40 px'" in capsys.readouterr().out


@slow
def test_weights_of_timm_are_saved_for_a_student(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_block(blocks("recipes.md", "Students")[0].replace("pretrained=True", "pretrained=False"))
    cfg = Config(student_weights="vit_small.safetensors", student_size=32)
    assert model.build_student(cfg).grid == (2, 2)


def found(folder: Path, tmp_path: Path, split: str = "train") -> dict:
    """The classes of a split, as train.py finds them, and how many images each has."""
    cfg = Config(dataset=str(folder), teacher_size=32, student_size=32, cache_dir=str(tmp_path))
    names, counts = np.unique(data.open_store(cfg, split).labels().astype(str), return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


def test_files_with_labels_become_a_data_set(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    run_block(blocks("recipes.md", "Other formats")[0])
    assert found(home.parent / "my_data", tmp_path) == dict(a=30, b=30, c=30)


def test_archives_become_a_folder_of_images(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    images = sorted(home.parent.glob("my_images/train/*/*.jpg"))
    (home.parent / "downloads").mkdir()
    for name, image in zip(("cat", "dog"), images, strict=False):
        with zipfile.ZipFile(home.parent / "downloads" / f"{name}.zip", "w") as archive:
            archive.write(image, "1.jpg")
    command, = blocks("recipes.md", "Other formats", "bash")
    python = f"{sys.executable} -m"  # the one on the path may be another
    subprocess.run(["bash", "-ec", command.replace("python -m", python)], check=True, timeout=100)
    assert found(home.parent / "unpacked", tmp_path) == dict(cat=1, dog=1)


def test_pickles_and_arrays_become_folders_of_images(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    rng, folder = np.random.default_rng(0), home.parent / "pickles" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [name for name, _ in torchvision.datasets.CIFAR10.train_list]
    for name in [*names, "test_batch"]:
        part = dict(data=rng.integers(0, 256, (4, 3072), np.uint8), labels=[0, 1, 2, 2])
        (folder / name).write_bytes(pickle.dumps(part))
    (folder / "batches.meta").write_bytes(pickle.dumps(dict(label_names=[*"abc"])))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *file: True)
    np.save(home.parent / "pixels.npy", rng.integers(0, 256, (5, 40, 50, 3), np.uint8))
    np.save(home.parent / "labels.npy", np.array([7, 7, 8, 8, 8]))
    run_block(blocks("recipes.md", "Other formats")[1])
    assert found(home.parent / "my_pickles", tmp_path) == {"0": 5, "1": 5, "2": 10}
    assert found(home.parent / "my_pickles", tmp_path, "test") == {"0": 1, "1": 1, "2": 2}
    assert found(home.parent / "my_arrays", tmp_path) == {"7": 2, "8": 3}


@pytest.mark.parametrize("heading", ["Images of a program", "A second teacher"])
def test_programs_of_the_recipes_train(tmp_path, cache, monkeypatch, heading):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(DATASETS, "noise", None)
    run_block(blocks("recipes.md", heading)[0], max_samples=128, cache_dir=cache)
    assert len(list(Path("runs").glob("*/student.safetensors"))) == 1


class Net(nn.Module):
    """Anybody's network: 16 patches of images of 32 px, as the official DINOv2 returns them."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 24, 8, 8)
        self.norm, self.drop = nn.BatchNorm1d(24), nn.Dropout(0.5)  # wrong in training mode

    def forward_features(self, images):
        x = self.drop(self.norm(self.patch(images).flatten(2))).mT
        return dict(x_norm_clstoken=x.mean(1), x_norm_patchtokens=x)


@slow
@pytest.mark.parametrize("name", ["official", "of_torchvision", "of_transformers"])
def test_networks_of_ones_own_are_teachers_and_students(tmp_path, cache, monkeypatch, name):
    networks, seed = run_block(blocks("recipes.md", "Networks of your own")[0], "networks"), 0

    def weights(make):  # in place of a download
        torch.manual_seed(seed)
        return make()

    monkeypatch.setattr(torch.hub, "load", lambda *names, pretrained: weights(Net))
    resnet = networks.torchvision.models.resnet18
    monkeypatch.setattr(networks.torchvision.models, "resnet18", lambda **options: weights(resnet))
    if name == "of_transformers":
        hugging = pytest.importorskip("transformers")
        config = hugging.ViTConfig(hidden_size=24, num_hidden_layers=1, image_size=32,
                                   num_attention_heads=2, intermediate_size=48, patch_size=8)
        monkeypatch.setattr(hugging.AutoConfig, "from_pretrained", lambda name: config)
        monkeypatch.setattr(hugging.AutoModel, "from_pretrained",
                            lambda name: weights(lambda: hugging.AutoModel.from_config(config)))
    shared = dict(epochs=1, teacher_views=1, cache_dir=cache, run_dir=str(tmp_path / "run"))
    cfg = Config(**TINY | shared | dict(teacher=name))
    train.main(cfg)
    args = EvalConfig((str(cfg.run_path),), max_train=40, max_test=40)
    assert len(evaluation.main(args)) == 3
    seed = 1
    with pytest.raises(UserError, match="other weights now than in the run"):
        evaluation.main(args)

    cfg = Config(**TINY | shared | dict(student=name, student_args="", resume=False))
    train.main(cfg)
    with safe_open(cfg.run_path / "student.safetensors", "pt") as file:
        how = json.loads(file.metadata()["student"])
    plain = timm.create_model(how["model"], **how["args"], num_classes=0).eval()
    plain.load_state_dict(load_file(cfg.run_path / "student.safetensors"))
    saved, _ = model.load_checkpoint(cfg.run_path)
    student, images = model.build_student(cfg, saved["student"]), torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        got = plain((images - student.mean) / student.std)
        assert torch.allclose(got, student(images).cls, atol=1e-5)


# ---------------------------------------------------------------------------- patches of train.main


def apply(diff: str, text: str) -> str:
    """Replace each hunk's lines, which must stand exactly once in `text`; @@ separates hunks."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines()
        old = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
        new = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
        assert f"\n{text}".count(f"\n{old}") == 1, old
        text = f"\n{text}".replace(f"\n{old}", f"\n{new}")[1:]
    return text


PATCHES = dict(zip(("accumulation", "schedule", "muon", "crops", "wandb", "tensorboard"),
                   blocks("recipes.md", "Your own loop", "diff"), strict=True))


def patched(name: str, folder: Path) -> types.ModuleType:
    """A copy of train.py with a patch of the page; the other modules are this project's."""
    path = folder / "train.py"
    path.write_text(apply(PATCHES[name], (ROOT / "train.py").read_text()))
    module = types.ModuleType(f"train_{name}")
    exec(compile(path.read_text(), str(path), "exec"), vars(module))
    return module


def test_patches_of_main_apply():
    source = (ROOT / "train.py").read_text()
    for name, diff in PATCHES.items():
        compile(apply(diff, source), name, "exec")


@slow
def test_accumulated_gradients_are_those_of_the_whole_batch(tiny, tmp_path, monkeypatch):
    cfg = tiny(epochs=3, run_dir=str(tmp_path / "whole"))
    whole = train.main(cfg)
    cfg = dataclasses.replace(cfg, run_dir=str(tmp_path / "parts"))
    continues(cfg, monkeypatch, program=patched("accumulation", tmp_path))
    parts = metrics(cfg)[-1]
    for name in ("loss", "cls", "patch", "norm", "lr"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-3), name


@slow
def test_the_patch_of_the_schedule_sets_its_rates(tiny, tmp_path, monkeypatch):
    cfg = tiny(epochs=3, log_every=1)
    continues(cfg, monkeypatch, program=patched("schedule", tmp_path))
    for line in metrics(cfg):
        left = 3 - (line["step"] - 1) / 5
        assert line["lr"] == pytest.approx(cfg.lr * min(1, line["step"] / 500, left / 10))


@slow
def test_muon_keeps_its_own_rate_when_it_is_continued(tiny, tmp_path, monkeypatch):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch 2.9 has Muon")
    rates, step = [], torch.optim.Muon.step

    def spy(self, *arguments):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.Muon, "step", spy)
    cfg = tiny(epochs=3, log_every=1)
    continues(cfg, monkeypatch, program=patched("muon", tmp_path))
    expected = [20 * line["lr"] for line in metrics(cfg)]
    assert rates[:15] == pytest.approx(expected) and rates[15:] == pytest.approx(expected)


@slow
def test_crops_change_over_epochs_and_views_are_not_used_twice(tiny, tmp_path, monkeypatch):
    module, scales = patched("crops", tmp_path), []
    inner = data.view_crops

    def spy(index, seed, view, scale):
        scales.append(scale)
        return inner(index, seed, view, scale)

    monkeypatch.setattr(data, "view_crops", spy)
    continues(tiny(epochs=3, teacher_views=0), monkeypatch, program=module)
    assert {round(scale, 3) for scale in scales} == {1.0, 0.8, 0.6}
    with pytest.raises(UserError, match="as many as"):
        module.main(tiny(epochs=3, teacher_views=2, run_dir=str(tmp_path / "two")))


@slow
def test_lines_of_the_log_go_to_a_service(tiny, tmp_path, monkeypatch):
    sent, begun = [], []
    service = types.SimpleNamespace(init=lambda **options: begun.append(options["id"]),
                                    log=lambda line, step: sent.append(line | dict(step=step)))
    monkeypatch.setitem(sys.modules, "wandb", service)
    cfg = tiny(epochs=3)
    continues(cfg, monkeypatch, program=patched("wandb", tmp_path))
    assert sent[:len(metrics(cfg))] == metrics(cfg)
    assert begun == [cfg.run_path.name, *3 * [f"{cfg.run_path.name}-stopped"]]


@slow
def test_lines_of_the_log_are_written_for_tensorboard(tiny, tmp_path, monkeypatch):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    cfg = tiny(epochs=3)
    stopped = continues(cfg, monkeypatch, program=patched("tensorboard", tmp_path))
    for run in (cfg, stopped):
        events = accumulator.EventAccumulator(str(run.run_path)).Reload()
        for name in ("cls", "patch", "lr"):
            values = {event.step: event.value for event in events.Scalars(name)}
            assert values == pytest.approx({line["step"]: line[name] for line in metrics(run)})
