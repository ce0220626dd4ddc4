"""Where the time goes: every speed that README and docs quote, measured again on your machine.

    python results/speed/speed.py step      # a training step against its floor
    python results/speed/speed.py cache     # 50 epochs with the target cache and without
    python results/speed/speed.py store     # decoding, and reading batches
    python results/speed/speed.py memory    # 500,000 stored images against 1,000
    python results/speed/speed.py eval      # k-NN and linear probe against scikit-learn
    python results/speed/speed.py malloc    # training with memory that glibc keeps
    python results/speed/speed.py busy      # training beside a process that keeps one core busy
    python results/speed/speed.py gpu         # images/s while filling and while reading, on a GPU
    python results/speed/speed.py gpu_memory  # of teachers and students

Both sides of a ratio are timed in turn, and medians are printed. No download: weights are seeded
random ones, which cost what trained ones cost. The outputs beside this file were made with nothing
else running.
"""

import contextlib
import dataclasses
import io
import json
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import safetensors.torch
import timm
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from config import Config, UserError  # noqa: E402
from results.records import known  # noqa: E402

REPEATS = 5
KEEP = dict(MALLOC_TRIM_THRESHOLD_="4000000000", MALLOC_MMAP_THRESHOLD_="4000000000")


def in_turn(*jobs) -> list[float]:
    """Median seconds of each job, all of them once per round; the first round warms up."""
    seconds = [[] for _ in jobs]
    for _ in range(REPEATS + 1):
        for job, taken in zip(jobs, seconds, strict=True):
            begin = time.perf_counter()
            job()
            taken.append(time.perf_counter() - begin)
    return [statistics.median(taken[1:]) for taken in seconds]


def seeded_weights(name: str, folder: Path) -> str:
    """A file with random weights of a timm model, for --teacher_weights."""
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=0)
    safetensors.torch.save_file(net.state_dict(), folder / f"{name}.safetensors")
    return str(folder / f"{name}.safetensors")


def settings(folder: Path, **changes) -> Config:
    """DINOv2 ViT-S/14 at 112 px teaches timm's vit_tiny at 96 px, on drawn images."""
    given = dict(
        dataset="shapes", max_samples=1024, cache_dir=str(folder / "cache"), resume=False,
        run_dir=str(folder / "run"), teacher="dinov2_vits14", teacher_size=112, batch_size=64,
        student="vit_tiny_patch16_224", student_size=96, log_every=4, epochs=2) | changes
    if "teacher_weights" not in given:
        given["teacher_weights"] = seeded_weights("vit_small_patch14_dinov2", folder)
    return Config(**given)


def run(cfg: Config) -> list[dict]:
    """`train.main` without its log on the terminal -> the lines of metrics.jsonl."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.main(cfg)
    return known(cfg.run_path / "metrics.jsonl")


def run_apart(cfg: Config, **variables: str) -> list[dict]:
    """`run` in a process of its own, with environment variables."""
    flags = [f"--{k}={v}" for k, v in dataclasses.asdict(cfg).items()
             if not isinstance(v, bool) and v != ""] + ["--no_resume"]
    subprocess.run([sys.executable, str(ROOT / "train.py"), *flags], check=True,
                   capture_output=True, env=os.environ | variables)
    return known(cfg.run_path / "metrics.jsonl")


def speeds(lines: list[dict], epoch: int) -> list[float]:
    """images/s of each log line of an epoch, without its first."""
    return [m["images_per_s"] for m in lines if epoch < m["epoch"] <= epoch + 1][1:]


def floor_step(cfg: Config, dtype):
    """Two functions: forward, loss, backward and fused AdamW on a ready random batch, nothing but
    the student; and the teacher's bare forward."""
    teacher = model.load_teacher(cfg)
    objective = model.Distiller(model.build_student(cfg).train(), teacher, cfg)
    optimiser = torch.optim.AdamW(objective.parameters(), fused=True)
    images = torch.rand(cfg.batch_size, 3, cfg.student_size, cfg.student_size)
    tokens = 1 + objective.student.grid[0] ** 2
    targets = torch.randn(cfg.batch_size, tokens, len(objective.cls_head.scale))
    pixels = torch.rand(cfg.batch_size, 3, cfg.teacher_size, cfg.teacher_size)
    autocast = torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32)

    def student_step():
        optimiser.zero_grad(set_to_none=True)
        with autocast:
            loss, _ = objective(images, targets)
        loss.backward()
        optimiser.step()

    @torch.inference_mode()
    def teacher_forward():
        with autocast:
            teacher(pixels)

    return student_step, teacher_forward


def in_a_row(job, count: int) -> float:
    """Seconds of a job: the median over three stretches of `count` calls, as a log line averages
    over so many steps. The first call warms up."""
    job()
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(count):
            job()
        seconds.append((time.perf_counter() - begin) / count)
    return statistics.median(seconds)


def step(folder: Path) -> None:
    print("| student at 96 px, batch 64 | floor | loop, cached | share | teacher + floor |"
          " loop, no cache | share |\n|---|---|---|---|---|---|---|")
    for name, args, title in (("vit_small_patch16_224", "", "ViT-S/16, 21.6 M"),
                              ("vit_tiny_patch16_224", "depth=6", "ViT of 2.8 M")):
        cfg = settings(folder, student=name, student_args=args, log_every=8)  # 16 steps an epoch
        dtype = model.pick_dtype(cfg.precision, model.pick_device(cfg.device))
        student, teacher = floor_step(cfg, dtype)
        floors, cached, both, live = [], [], [], []
        for _ in range(REPEATS):
            student_seconds, teacher_seconds = (in_a_row(job, cfg.log_every)
                                                for job in (student, teacher))
            floors.append(cfg.batch_size / student_seconds)
            both.append(cfg.batch_size / (student_seconds + teacher_seconds))
            lines = run(dataclasses.replace(cfg, teacher_views=1, epochs=4))
            cached.append(statistics.median(sum((speeds(lines, e) for e in (1, 2, 3)), [])))
            lines = run(dataclasses.replace(cfg, teacher_views=0, epochs=1))
            live.append(statistics.median(speeds(lines, 0)))
        shares = [statistics.median(a / b for a, b in zip(*sides, strict=True))
                  for sides in ((cached, floors), (live, both))]
        floor, cached, both, live = map(statistics.median, (floors, cached, both, live))
        print(f"| {title} | {floor:.0f} | {cached:.0f} | {shares[0]:.1%} | {both:.0f} | {live:.0f}"
              f" | {shares[1]:.1%} |", flush=True)


def filling(cfg: Config, folder: Path) -> float:
    """Images per second of the teacher while it fills the second view; the first one warms up."""
    shutil.rmtree(folder / "cache" / "targets", ignore_errors=True)
    make_once, seconds = data.make_once, {}

    def timed(path, make, wait=True):
        def make_timed(temporary):
            begin = time.perf_counter()
            make(temporary)
            seconds[path.name] = time.perf_counter() - begin

        make_once(path, make_timed, wait)

    with mock.patch.object(data, "make_once", timed):
        run(dataclasses.replace(cfg, teacher_views=2, epochs=2))
    return cfg.max_samples / seconds["view_1_0.i8"]


def cache(folder: Path) -> None:
    print("DINOv2 ViT-S/14 at 112 px -> vit_tiny_patch16_224 at 96 px, batch 128\n")
    short = settings(folder, epochs=2, teacher_views=1, log_every=1, batch_size=128)
    fill, warm, off = [], [], []
    for _ in range(3):  # runs, of 8 steps an epoch
        fill.append(filling(short, folder))
        warm += speeds(run(short), 1)
        off += speeds(run(dataclasses.replace(short, teacher_views=0, epochs=1)), 0)
    fill, warm, off = (1e3 / statistics.median(each) for each in (fill, warm, off))
    print(f"a step, ms per image: {fill:.2f} filling, {warm:.2f} reading, {off:.2f} without\n"
          f"50 epochs, V = 4: 50 x {off:.2f} / (4 x {fill:.2f} + 50 x {warm:.2f}) = "
          f"{50 * off / (4 * fill + 50 * warm):.2f} times")


def store(folder: Path) -> None:
    """JPEGs of 32 px (as CIFAR's) and of 320 x 240 px into stores, in threads."""
    import datasets
    import PIL.Image

    from demo.shapes import draw_shape

    print("| images | decoded alone, one thread | into a store | (images/s)\n|---|---|---|")
    for count, width, height, size in ((50_000, 32, 32, 32), (10_000, 320, 240, 96)):
        cells = []
        for index in range(2000):
            image = PIL.Image.fromarray(draw_shape(0, index, height)[0]).resize((width, height))
            image.save(file := io.BytesIO(), "JPEG", quality=90)
            cells.append(dict(bytes=file.getvalue(), path=None))
        cells *= count // 2000
        path = folder / f"{width}"
        path.mkdir()
        table = datasets.Dataset.from_dict(dict(image=cells))
        table.cast_column("image", datasets.Image()).to_parquet(path / "train.parquet")

        def build(path=path, size=size):
            shutil.rmtree(folder / "cache", ignore_errors=True)
            cfg = settings(folder, dataset=str(path), teacher_size=size, student_size=size)
            data.open_store(cfg, "train")

        seconds = in_turn(lambda some=cells, size=size: [data.decode(c, size) for c in some], build)
        print(f"| {count} of {width} x {height} px | "
              + " | ".join(f"{count / s:.0f}" for s in seconds) + " |", flush=True)
    stored = data.open_store(settings(folder, max_samples=0, teacher_weights=""), "train")
    rows = data.batches(data.epoch_order(len(stored), 0, 0), 64)
    (seconds,) = in_turn(lambda: [stored.images[some] for some in rows])
    print(f"\nbatches of 64 from a 32 px store, one thread: {len(stored) / seconds:.0f} images/s")


class Stops(model.Distiller):
    """Ends a run after 60 steps, and prints what memory it took."""

    def after_step(self, step):
        if step == 60:
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print("RESIDENT", resident, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)


def train_on_many(count: int, settings: str) -> None:
    """Train on a store whose `count` images of 96 px are a sparse file, which takes no disk."""
    cfg = Config(**json.loads(settings))
    store = data.open_store(cfg, "train", 1)
    file = Path(cfg.cache_dir, f"{count}.u8")
    with open(file, "wb") as sparse:
        sparse.truncate(count * 3 * 96 * 96)
    store.rows = np.arange(count)
    store.images = data.Rows([file], torch.uint8, (count, 3, 96, 96))
    data.open_store = lambda *arguments: store
    train.main(cfg, objective=Stops)


def memory(folder: Path) -> None:
    """The same 60 steps on 1,000 stored images and on 500,000."""
    code = ("import sys; sys.path[0] = sys.argv[1]; import speed;"
            "speed.train_on_many(int(sys.argv[2]), sys.argv[3])")
    results = {1_000: [], 500_000: []}
    for _ in range(REPEATS):
        for count, measured in results.items():
            cfg = settings(folder, student_args="depth=2", epochs=10, teacher="demo",
                           teacher_size=32, teacher_weights="", teacher_views=0,
                           run_dir=str(folder / f"run{count}"), batch_size=64)
            arguments = str(Path(__file__).parent), str(count), json.dumps(dataclasses.asdict(cfg))
            out = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True,
                                 text=True)
            measured.append(float(out.stdout.split("RESIDENT")[1].split()[0]))
    for count, measured in results.items():
        print(f"{count} stored images of 96 px: {statistics.median(measured):.0f} MB resident")


def judge(folder: Path) -> None:
    """Embeddings of CIFAR's size: 50,000 and 10,000 of 384 dimensions, ten classes."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 384, generator=generator)
    y, y_test = (torch.randint(0, 10, (n,), generator=generator) for n in (50_000, 10_000))
    x, q = (centres[c] + 6 * torch.randn(len(c), 384, generator=generator) for c in (y, y_test))
    knn = KNeighborsClassifier(20, metric="cosine", algorithm="brute", n_jobs=-1,
                               weights=lambda d: np.exp((1 - d) / 0.07)).fit(x, y)
    ours, theirs = in_turn(lambda: evaluation.knn_predict(x, y, q), lambda: knn.predict(q))
    print(f"k-NN: {ours:.1f} s, scikit-learn {theirs:.1f} s: {theirs / ours:.1f} times; "
          f"{(evaluation.knn_predict(x, y, q).numpy() == knn.predict(q)).mean():.2%} of the "
          "predictions are equal")
    ours, theirs = in_turn(lambda: [(some @ x.T).shape for some in q.split(512)],
                           lambda: [(some.numpy() @ x.numpy().T).shape for some in q.split(512)])
    print(f"its matrix product alone: torch {ours:.1f} s, numpy {theirs:.1f} s")
    x = torch.nn.functional.pad((x - x.mean(0)) / x.std(0), (0, 1), value=1.0)
    ours, theirs = in_turn(
        lambda: evaluation.fit_probe(x.double(), y, 1e-2, torch.zeros(10, 385)),
        lambda: LogisticRegression(C=1e-2, max_iter=1000, tol=1e-5).fit(x.double(), y))
    print(f"one logistic regression: {ours:.1f} s, scikit-learn {theirs:.1f} s")


def busy(folder: Path) -> None:
    """A conv teacher and student at 96 px, batch 64, alone and beside one busy process."""
    cfg = settings(folder, teacher="tf_efficientnet_lite0", teacher_size=96, student="resnet10t",
                   teacher_views=0, max_samples=768, epochs=1, log_every=1,
                   teacher_weights=seeded_weights("tf_efficientnet_lite0", folder))
    alone, beside = [], []
    for _ in range(3):
        for speeds_of in (alone, beside):
            other = None
            if speeds_of is beside:
                other = subprocess.Popen(["nice", "-n", "19", sys.executable, "-c",
                                          "while True: pass"])
            speeds_of.append(statistics.median(speeds(run_apart(cfg), 0)))
            if other:
                other.kill()
    a, b = map(statistics.median, (alone, beside))
    print(f"{a:.0f} images/s alone, {b:.0f} beside a busy process: {b / a:.0%}")


def malloc(folder: Path) -> None:
    """Training where glibc gives freed memory back to the system, and where it keeps it."""
    print("| student at 96 px, batch 64 | images/s, GB | with KEEP |\n|---|---|---|")
    for name, args in (("vit_small_patch16_224", ""), ("vit_tiny_patch16_224", "depth=6"),
                       ("resnet10t", "")):
        cfg = settings(folder, student=name, student_args=args, teacher_views=1, epochs=3,
                       log_every=8)
        sides = [], []
        for _ in range(3):
            for side, variables in zip(sides, ({}, KEEP), strict=True):
                lines = run_apart(cfg, **variables)
                side.append((statistics.median(speeds(lines, 1) + speeds(lines, 2)),
                             lines[-1]["memory_gb"]))
        cells = ["{:.0f}, {:.2f}".format(*map(statistics.median, zip(*side, strict=True)))
                 for side in sides]
        print(f"| {name} {args} | {' | '.join(cells)} |", flush=True)


def gpu(folder: Path) -> None:
    """DINOv2 ViT-B/14 at 224 px -> ViT-S/16 at 96 px, batch 256, on drawn images."""
    cfg = settings(folder, teacher="dinov2_vitb14", teacher_size=224, batch_size=256, epochs=12,
                   teacher_weights=seeded_weights("vit_base_patch14_dinov2", folder),
                   student="vit_small_patch16_224", max_samples=8000, teacher_views=2, log_every=8)
    print(f"filling: {filling(cfg, folder):.0f} images/s", flush=True)
    lines = run(cfg)
    found = sum((speeds(lines, epoch) for epoch in range(2, 12)), [])
    print(f"training on cached targets: {statistics.median(found):.0f} images/s "
          f"({min(found):.0f} to {max(found):.0f})", flush=True)
    lines = run(dataclasses.replace(cfg, teacher_views=0, epochs=3))
    found = speeds(lines, 1) + speeds(lines, 2)
    print(f"teacher at every step: {statistics.median(found):.0f} images/s")


def gpu_memory(folder: Path) -> None:
    """Peak GPU memory in GB, bf16, eager: a teacher that embeds 256 images at 224 px, as it fills
    the cache, and a step of a student. Stored images and cached targets come on top of it."""
    device, steps = torch.device("cuda"), 3
    print("| teacher at 224 px | GB |\n|---|---|")
    for name in ("dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14", "dinov2_vitg14"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with device:
            net = timm.create_model(model.TEACHERS[name], num_classes=0, img_size=224)
            teacher = model.Backbone(net, 224)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            teacher(torch.rand(4 * data.CHUNK, 3, 224, 224, device=device))
        print(f"| {name} | {model.peak_memory(device):.1f} |", flush=True)
        del net, teacher
    print("\n| student | batch 256 | batch 1024 | GB\n|---|---|---|")
    teacher = SimpleNamespace(grid=(16, 16), cls_dim=768, patch_dim=768)
    for name, size in (("vit_tiny_patch16_224", 96), ("vit_small_patch16_224", 96),
                       ("vit_base_patch16_224", 96), ("vit_small_patch16_224", 224),
                       ("resnet18", 96), ("resnet50", 224)):
        cells = []
        for batch in (256, 1024):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            cfg = Config(student=name, student_size=size)
            objective = model.Distiller(model.build_student(cfg).train(), teacher, cfg).to(device)
            optimiser = torch.optim.AdamW(objective.parameters(), fused=True)
            tokens = 1 + objective.student.grid[0] ** 2
            images = torch.rand(batch, 3, size, size, device=device)
            targets = torch.randn(batch, tokens, len(objective.cls_head.scale), device=device)
            for _ in range(steps):
                optimiser.zero_grad()
                with torch.autocast(device.type, torch.bfloat16):
                    loss, _ = objective(images, targets)
                loss.backward()
                optimiser.step()
            cells.append(f"{model.peak_memory(device):.1f}")
            del objective, optimiser, images, targets, loss
        print(f"| {name} at {size} px | {' | '.join(cells)} |", flush=True)


def main(name: str) -> None:
    parts = dict(step=step, cache=cache, store=store, memory=memory, eval=judge, malloc=malloc,
                 busy=busy, gpu=gpu, gpu_memory=gpu_memory)
    if name not in parts:
        raise UserError(f"one of {', '.join(parts)}")
    device = model.pick_device("auto")
    cores = len(os.sched_getaffinity(0))
    print(f"{model.environment(device)}, {cores} cores, {platform.processor() or 'x86_64'}, "
          f"{model.pick_dtype('auto', device)}\n")
    with tempfile.TemporaryDirectory() as folder:
        parts[name](Path(folder))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
