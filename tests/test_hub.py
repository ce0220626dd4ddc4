"""The command users type, against a loopback Hub that the real client libraries talk to.

Skipped where the Hub's script and data are not beside the repository.
"""

import base64
import contextlib
import importlib.util
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import timm
from conftest import put
from test_docs import blocks

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
needs_shared = pytest.mark.skipif(
    not (SHARED / "hub" / "serve.py").exists(),
    reason="needs ../shared/hub, a loopback Hub with CIFAR-10",
)
SMALL = (
    "--student vit_tiny_patch16_224 --student_args depth=1 --teacher_size 28 --student_size 32"
).split()
SIZES = "--teacher_size 32 --student_size 32".split()


def environment(tmp_path: Path, endpoint: str) -> dict:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return dict(
        clean, HF_ENDPOINT=endpoint, HF_HUB_DISABLE_XET="1", HF_HOME=str(tmp_path / "hf"), CI="1"
    )


def call(tmp_path: Path, endpoint: str, *command: str, **env) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / command[0]), *command[1:]]
    return subprocess.run(
        command,
        cwd=tmp_path,
        env=environment(tmp_path, endpoint) | env,
        capture_output=True,
        text=True,
        timeout=400,
    )


@contextlib.contextmanager
def hub(*repositories: str):
    """The endpoint of a Hub with these repositories: models/owner/name=folder, or datasets/..."""
    command = [sys.executable, str(SHARED / "hub" / "serve.py"), "--port", "0"]
    command += [f"--repo={repository}" for repository in repositories]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield re.search(r"http://\S+", server.stdout.readline())[0]
    finally:
        server.kill()


def load_serve():
    """The Hub's script as a module."""
    spec = importlib.util.spec_from_file_location("serve", SHARED / "hub" / "serve.py")
    serve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serve)
    return serve


@needs_shared
def test_the_default_path_downloads_trains_and_evaluates(tmp_path):
    weights = tmp_path / "dinov2"
    weights.mkdir()
    make = [sys.executable, str(SHARED / "fixtures" / "make_dinov2.py"), "dinov2_vits14"]
    subprocess.run([*make, str(weights / "model.safetensors")], check=True)
    with hub(f"models/timm/vit_small_patch14_dinov2.lvd142m={weights}") as endpoint:
        flags = (
            "--dataset cifar10 --teacher dinov2_vits14 --max_samples 64 --batch_size 32 "
            "--epochs 1"
        )
        trained = call(tmp_path, endpoint, "train.py", *flags.split(), *SMALL)
        assert trained.returncode == 0, trained.stderr[-3000:]
        checkpoint = (
            tmp_path
            / "runs"
            / "cifar10-dinov2_vits14-vit_tiny_patch16_224"
            / "checkpoint_latest.pth"
        )
        assert "64 images of 32 px" in trained.stdout and checkpoint.exists()
        evaluated = call(
            tmp_path,
            endpoint,
            "eval.py",
            str(checkpoint),
            "--max_train",
            "300",
            "--max_test",
            "100",
        )
        assert evaluated.returncode == 0, evaluated.stderr[-3000:]
        (written,) = checkpoint.parent.glob("eval-cifar10-*.json")
        rows = json.loads(written.read_text())
        assert rows[0]["model"] == "teacher dinov2_vits14" and "linear" in rows[-1]
        wrong = call(tmp_path, endpoint, "train.py", "--dataset", "uoft-cs/cifar11", *SMALL)
        assert wrong.returncode == 2 and "the name may be wrong or private" in wrong.stderr
    # What was downloaded serves without the Hub.
    again = call(
        tmp_path, "http://127.0.0.1:9", "train.py", *flags.split(), *SMALL, "--run_dir", "offline"
    )
    assert again.returncode == 0, again.stderr[-3000:]


def small_cifar(folder: Path, **classes: int) -> str:
    """Forty images in the files and columns of CIFAR's data set; label column -> its classes."""
    (folder / "data").mkdir(parents=True)
    for split in ("train", "test"):
        pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
        columns = dict(img=[PIL.Image.fromarray(p) for p in pixels])
        columns |= {name: [i % count for i in range(40)] for name, count in classes.items()}
        rows = datasets.Dataset.from_dict(columns)
        for name, count in classes.items():
            rows = rows.cast_column(name, datasets.ClassLabel(num_classes=count))
        rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return f"datasets/uoft-cs/{folder.name}={folder}"


@needs_shared
def test_cifar100_is_evaluated_by_its_fine_labels(tmp_path):
    with hub(small_cifar(tmp_path / "hub" / "cifar100", fine_label=8, coarse_label=2)) as endpoint:
        flags = "--dataset cifar100 --teacher demo --epochs 1 --batch_size 40"
        done = call(tmp_path, endpoint, "train.py", *flags.split(), *SIZES, *SMALL[:4])
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = map(str, tmp_path.glob("runs/*/"))
    done = call(tmp_path, "http://127.0.0.1:9", "eval.py", run, "--save_features", "features")
    assert done.returncode == 0, done.stderr[-3000:]
    with safetensors.safe_open(tmp_path / "features" / "test.safetensors", "np") as file:
        assert json.loads(file.metadata()["classes"]) == [str(number) for number in range(8)]
        assert file.get_tensor("labels").tolist() == [i % 8 for i in range(40)]


@needs_shared
def test_the_commands_of_the_missing_rows(tmp_path):
    """Two of results/dinov2, which have each teacher, student and data set, but on eight images,
    for one step, without the evaluation."""
    repositories = [small_cifar(tmp_path / "hub" / "cifar10", label=10),
                    small_cifar(tmp_path / "hub" / "cifar100", fine_label=100, coarse_label=20)]
    for size in ("small", "base"):
        net = timm.create_model(f"vit_{size}_patch14_dinov2", num_classes=0)
        (tmp_path / size).mkdir()
        safetensors.torch.save_file(net.state_dict(), tmp_path / size / "model.safetensors")
        name = f"models/timm/vit_{size}_patch14_dinov2.lvd142m"
        repositories.append(f"{name}={tmp_path / size}")
    page = (ROOT / "results" / "dinov2" / "README.md").read_text()
    commands = re.findall(r"^python (train.py .*)", page, re.M)
    assert len(commands) == 8
    assert all(command.split().count("--eval_at_end") == 1 for command in commands)
    few = "--epochs 1 --max_samples 8 --batch_size 8 --no_eval_at_end".split()
    with hub(*repositories) as endpoint:
        for command in [commands[0], commands[7]]:
            words = [*command.split(), *few]
            done = call(tmp_path, endpoint, *words)
            assert done.returncode == 0, done.stderr[-3000:]
            run = tmp_path / words[words.index("--run_dir") + 1]
            assert (run / "student.safetensors").exists()


@needs_shared
def test_one_of_several_configurations_is_trained_on_and_another_evaluated(tmp_path):
    card = ["---", "configs:"]
    for name in ("small", "large"):
        (tmp_path / "birds" / name).mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
        columns = dict(image=[PIL.Image.fromarray(p) for p in pixels], label=list(range(4)) * 5)
        datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "birds" / name / "0.parquet")
        card += [f"- config_name: {name}", f"  data_files: {name}/*.parquet"]
    (tmp_path / "birds" / "README.md").write_text("\n".join([*card, "---", ""]))
    flags = "train.py --teacher demo --epochs 1 --batch_size 20"
    command = [*flags.split(), *SIZES, *SMALL[:4], "--dataset"]
    with hub(f"datasets/me/birds={tmp_path / 'birds'}") as endpoint:
        failed = call(tmp_path, endpoint, *command, "me/birds")
        assert failed.returncode == 2 and "Traceback" not in failed.stderr
        assert "'small'" in failed.stderr and "'large'" in failed.stderr, failed.stderr
        done = call(tmp_path, endpoint, *command, "me/birds@main", "--dataset_config", "small")
        assert done.returncode == 0 and "20 of 20 are used" in done.stdout, done.stderr[-3000:]
        (run,) = map(str, tmp_path.glob("runs/*/"))
        other = ["--dataset", "me/birds", "--dataset_config", "large", "--no_baselines"]
        done = call(tmp_path, endpoint, "eval.py", run, *other)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "18 images to learn from, 2 to test on" in done.stdout


@needs_shared
def test_image_files_are_read_where_the_relative_cache_of_the_hub_is_a_link(tmp_path):
    put(tmp_path / "pets", *[f"{split}/{'ab'[i % 2]}/{i}.png" for split in ("train", "test")
                             for i in range(8)])
    (tmp_path / "disk").mkdir()
    (tmp_path / "hf").symlink_to("disk")
    flags = ["--teacher", "demo", "--epochs", "1", "--batch_size", "8"]
    with hub(f"datasets/me/pets={tmp_path / 'pets'}") as endpoint:
        done = call(tmp_path, endpoint, "train.py", "--dataset", "me/pets", *flags, *SIZES,
                    *SMALL[:4], HF_HOME="hf")
    assert done.returncode == 0 and "8 of 8 are used" in done.stdout, done.stderr[-3000:]


@contextlib.contextmanager
def hub_that_takes_uploads(folder: Path):
    """(endpoint, what was asked of it): a Hub whose new repository's files lie in `folder`."""
    serve, asked = load_serve(), []

    class Hub(serve.Hub):
        def route(self):
            page = f"http://127.0.0.1:{self.server.server_port}/me/student"
            request = f"{self.command} {self.path.split('?')[0]}"
            if self.command == "POST":
                asked.append((request, self.body))
            if request == "POST /api/repos/create":
                self.reply(200, {"url": page})
            elif request == "POST /api/validate-yaml":
                self.reply(200, {"errors": [], "warnings": []})
            elif request.endswith("/preupload/main"):
                files = json.loads(self.body)["files"]
                files = [dict(path=file["path"], uploadMode="regular", shouldIgnore=False)
                         for file in files]
                self.reply(200, {"files": files})
            elif request.endswith("/commit/main"):
                for line in map(json.loads, self.body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        (folder / line["value"]["path"]).write_bytes(content)
                serve.add("models/me/student", folder)
                commit = f"{page}/commit/{serve.COMMIT}"
                self.reply(200, {"commitUrl": commit, "commitOid": serve.COMMIT})
            else:
                super().route()

    server = serve.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.verbose = False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()


@needs_shared
def test_a_part_of_a_large_data_set_is_read_as_a_stream(tmp_path):
    """The recipe, in another folder than its images; 40 images in place of two million."""
    code = blocks("recipes.md", "More than fits")[0]
    code = code.replace("owner/name", "uoft-cs/cifar10").replace('"image"', '"img"')
    code = code.replace("2_000_000", "40")
    (tmp_path / "here").mkdir()
    with hub() as endpoint:
        done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path / "here",
                              env=environment(tmp_path, endpoint), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    downloaded = sum(file.stat().st_size for file in (tmp_path / "hf").rglob("*") if file.is_file())
    assert downloaded < 1e6, "the data set has 140 MB"
    part = datasets.load_dataset("parquet", data_dir=str(tmp_path / "part"), split="train")
    first = datasets.load_dataset(str(SHARED / "cifar10"), split="train[:40]")
    assert part["label"][:] == first["label"][:]
    flags = "--teacher demo --epochs 1 --batch_size 20 --dataset part".split()
    done = call(tmp_path, "http://127.0.0.1:9", "train.py", *flags, *SIZES, *SMALL[:4])
    assert done.returncode == 0 and "40 of 40 are used" in done.stdout, done.stderr[-3000:]


@needs_shared
def test_a_student_is_pushed_with_a_model_card_and_loaded_from_the_hub(tmp_path):
    """With the recipe's code; the Hub that takes it is a stand-in, the client is the real one."""
    flags = "--preset demo --epochs 1 --max_samples 128 --teacher_views 1 --run_dir runs/x"
    done = call(tmp_path, "http://127.0.0.1:9", "train.py", *flags.split())
    assert done.returncode == 0, done.stderr[-3000:]
    code = blocks("README.md", "Use the student")[0] + blocks("recipes.md", "To the Hub")[0]
    code += """
loaded = timm.create_model("hf-hub:me/student", pretrained=True).eval()
how_loaded = timm.data.resolve_model_data_config(loaded)
images = torch.rand(2, *how_loaded["input_size"])
assert torch.equal(loaded(images), student(images))
assert list(how_loaded["mean"]) == how["mean"] and list(how_loaded["std"]) == how["std"]
"""
    (tmp_path / "repository").mkdir()
    with hub_that_takes_uploads(tmp_path / "repository") as (endpoint, asked):
        done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, timeout=300,
                              env=environment(tmp_path, endpoint), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    created = json.loads(dict(asked)["POST /api/repos/create"])
    assert created["name"] == "student", created
    assert created.get("private") or created.get("visibility") == "private", created
    files = sorted(path.name for path in (tmp_path / "repository").iterdir())
    assert files == ["README.md", "config.json", "model.safetensors"]
    card = (tmp_path / "repository" / "README.md").read_text()
    accuracy = json.loads((tmp_path / "runs/x/eval.json").read_text())[-1]["linear"]
    for words in ("license: apache-2.0", "- **teacher:** demo", f"- **linear:** {accuracy}",
                  "hf-hub:me/student"):
        assert words in card, card


@pytest.mark.parametrize("missing", ["dataset", "teacher"])
def test_without_a_hub_the_message_comes_within_seconds_and_says_what_to_do(tmp_path, missing):
    begin = time.time()
    dataset = "cifar10" if missing == "dataset" else "shapes"
    teacher = ["--max_samples", "64", "--batch_size", "64"]
    teacher += ["--teacher", "demo", "--teacher_size", "32"] if missing == "dataset" else []
    failed = call(tmp_path, "http://127.0.0.1:9", "train.py", "--dataset", dataset, *teacher)
    assert time.time() - begin < 60 and failed.returncode == 2
    asked = "uoft-cs/cifar10" if missing == "dataset" else "vit_base_patch14_dinov2"
    for words in (
        asked,
        "does not respond",
        "--preset demo",
        "--dataset FOLDER" if missing == "dataset" else "--teacher_weights FILE",
    ):
        assert words in failed.stderr, failed.stderr
    assert "Traceback" not in failed.stderr


# ---------------------------------------------------------------------------- a Hub in trouble

# The command line, imported once and then forked: one command a line of stdin. The libraries try as
# often as ever; only their pauses (up to 23 s a file) and the wait for a first answer are shorter.
COMMANDS = f"""
import json, os, sys, time, traceback
sys.path.insert(0, {str(ROOT)!r})
import datasets, config, model, train
pause = time.sleep
time.sleep = lambda seconds: pause(seconds / 500)
for line in sys.stdin:
    if not (child := os.fork()):
        folder, *arguments = json.loads(line)
        os.chdir(folder)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        sys.argv, status = ["train.py", *arguments], 0
        try:
            config.cli(train.main, config.Config)
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
QUICK = (
    "--dataset cifar10 --teacher test_vit.r160_in1k --teacher_size 32 --student test_vit "
    "--student_size 32 --epochs 1 --batch_size 16 --teacher_views 0 "
    "--precision fp32 --device cpu"
).split()
DATASET, TEACHER = "datasets/uoft-cs", "/timm/test_vit"


def healthy(handler):
    super(type(handler), handler).route()


def status(code: int):
    return lambda handler: handler.reply(code, {"error": "trouble"})


def breaking_off(answer):
    """Answers of `answer(handler, file)` where a file's content is asked for."""

    def route(handler):
        files = [f for repo in handler.repos.values() for p, f in repo.items() if p in handler.path]
        if handler.command == "GET" and "/resolve/" in handler.path and files:
            answer(handler, Path(files[0]).read_bytes())
        else:
            healthy(handler)

    return route


def send_half(handler, content: bytes, claimed: int) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(claimed))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])


@breaking_off
def reset(handler, content):
    send_half(handler, content, len(content))
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())  # with data unsent: the other side is told of a reset
    handler.close_connection = True


@breaking_off
def cut_short(handler, content):
    send_half(handler, content, len(content) // 2)


@breaking_off
def hang_up(handler, content):
    send_half(handler, content, len(content))
    handler.close_connection = True


def silent(handler):
    handler.server.closing.wait(60)
    handler.close_connection = True


def late(handler):
    time.sleep(0.7)
    healthy(handler)


@pytest.fixture(scope="module")
def troubled(tmp_path_factory):
    """call(folder, trouble, paths) -> a finished train.py, while a Hub has trouble with paths.

    With once=True only the first time that each of them is asked for.
    """
    home = tmp_path_factory.mktemp("troubled")
    serve = load_serve()

    class Hub(serve.Hub):
        repos = serve.REPOS

        def route(self):
            trouble, paths, known = self.server.trouble
            request = f"{self.command} {self.path}"
            if re.search(paths, request) and request not in known:
                if known is not self.server.always:
                    known.add(request)
                trouble(self)
            else:
                healthy(self)

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), np.uint8)
    columns = dict(img=[PIL.Image.fromarray(p) for p in pixels], label=list(range(32)))
    (home / "cifar10").mkdir()
    datasets.Dataset.from_dict(columns).to_parquet(home / "cifar10" / "train.parquet")
    (home / "weights").mkdir()
    weights = timm.create_model("test_vit").state_dict()
    safetensors.torch.save_file(weights, home / "weights" / "model.safetensors")
    serve.add("datasets/uoft-cs/cifar10", home / "cifar10")
    serve.add("models/timm/test_vit.r160_in1k", home / "weights")
    server = serve.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.verbose, server.always, server.closing = False, frozenset(), threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environ = environment(home, f"http://127.0.0.1:{server.server_port}")
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    commands = subprocess.Popen([sys.executable, "-c", COMMANDS], env=environ, **pipes)

    def call(folder, trouble=healthy, paths=".", once=False):
        server.trouble = trouble, paths, set() if once else server.always
        commands.stdin.write(json.dumps([str(folder), *QUICK]) + "\n")
        code = int(commands.stdout.readline())
        texts = ((folder / name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(QUICK, code, *texts)

    def forget():
        shutil.rmtree(home / "hf", ignore_errors=True)

    call.forget, call.server = forget, server
    yield call
    server.closing.set()
    server.shutdown()
    commands.kill()


TROUBLES = {
    "404": (lambda handler: handler.missing(), "so the name may be wrong or private"),
    "401": (status(401), "so the name may be wrong or private"),
    "429": (status(429), "if it is right, try again later"),
    "500": (status(500), "if it is right, try again later"),
    "reset": (reset, "if it is right, try again later"),
    "cut short": (cut_short, "if it is right, try again later"),
    "silence": (silent, "does not respond, and it was not downloaded before"),
}


@needs_shared
@pytest.mark.parametrize("name", TROUBLES)
def test_a_hub_in_trouble_is_named_and_the_same_command_succeeds_later(troubled, tmp_path, name):
    trouble, words = TROUBLES[name]
    troubled.forget()
    everything = name == "silence"  # also when asked whether it is there
    for paths, asked, advice in (
        (TEACHER, "the weights of test_vit.r160_in1k", "--teacher_weights FILE"),
        (DATASET, "the dataset uoft-cs/cifar10", "--dataset FOLDER"),
    ):
        failed = troubled(tmp_path, trouble, "." if everything else paths)
        message = failed.stderr[failed.stderr.find("error: ") :]
        assert failed.returncode == 2 and "Traceback" not in failed.stderr, failed.stderr[-3000:]
        assert f"cannot get {asked}: http://127.0.0.1:" in message, failed.stderr
        assert words in message and advice in message and "--preset demo" in message, message
        assert len(message.splitlines()) <= 2 and not list(tmp_path.glob("runs/*/*"))
        if everything and paths == TEACHER:  # the teacher first, or the data is never asked for
            troubled(tmp_path, status(404), DATASET)
    done = troubled(tmp_path)
    assert done.returncode == 0 and "done. Evaluate with" in done.stdout, done.stderr[-3000:]
    (rows,) = (tmp_path / "cache" / "stores").glob("cifar10-train-*/rows.i64")
    assert np.fromfile(rows, np.int64).tolist() == list(range(32))


@needs_shared
@pytest.mark.parametrize(
    "trouble, requests, least",
    [
        (status(429), "/resolve/", 6),
        (status(500), "HEAD .*/resolve/", 4),  # a file's own answer of 500 is not asked for again
        (hang_up, "GET .*/resolve/.*(parquet|safetensors)", 2),
        (late, "HEAD .*/resolve/", 4),
    ],
)
def test_a_trouble_that_passes_goes_unnoticed(troubled, tmp_path, trouble, requests, least):
    troubled.forget()
    done = troubled(tmp_path, trouble, requests, once=True)
    assert len(troubled.server.trouble[2]) >= least, "of both, each request failed once"
    assert done.returncode == 0 and "done. Evaluate with" in done.stdout, done.stderr[-3000:]
