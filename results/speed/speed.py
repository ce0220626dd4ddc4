"""Where the time goes: every speed that the README quotes, measured again on your machine.

    python results/speed/speed.py step        # a training step against its floor
    python results/speed/speed.py bank        # 50 epochs with the teacher bank and without
    python results/speed/speed.py naive       # the whole run against the course project's way
    python results/speed/speed.py store       # decoding, and fetching batches
    python results/speed/speed.py memory      # 500,000 stored images against 1,000
    python results/speed/speed.py eval        # k-NN and linear probe
    python results/speed/speed.py features    # feature extraction against bare forwards
    python results/speed/speed.py precision   # bf16 and compile, and their accuracy on the demo
    python results/speed/speed.py cpu         # huge pages, attention, layout, resizing, plain reads
    python results/speed/speed.py gpu         # eager, compiled, CUDA graphs, and a run's speed

Both sides of a ratio are timed in turn, in one process or one after the other, and medians are
printed. No download: weights are seeded random ones, which cost what trained ones cost. The outputs
beside this file were made with nothing else running.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision.transforms.v2 as T

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from config import Config, parse  # noqa: E402

REPEATS = 5


def in_turn(*jobs, repeats: int = REPEATS) -> list[float]:
    """Median seconds of each job, all of them once per round; the first round warms up."""
    seconds = [[] for _ in jobs]
    for _ in range(repeats + 1):
        for job, taken in zip(jobs, seconds, strict=True):
            begin = time.perf_counter()
            job()
            taken.append(time.perf_counter() - begin)
    return [statistics.median(taken[1:]) for taken in seconds]


def seeded_weights(name: str, folder: Path) -> str:
    """A file with random weights of a timm model, for --teacher_weights."""
    import safetensors.torch
    import timm

    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=0)
    safetensors.torch.save_file(net.state_dict(), folder / f"{name}.safetensors")
    return str(folder / f"{name}.safetensors")


def settings(folder: Path, **changes) -> Config:
    """DINOv2 ViT-S/14 at 112 px teaches timm's vit_tiny at 96 px, on drawn images."""
    given = dict(
        dataset="shapes",
        max_samples=1024,
        cache_dir=str(folder / "cache"),
        num_workers=0,
        run_dir=str(folder / "run"),
        teacher="dinov2_vits14",
        teacher_size=112,
        resume=False,
        student="vit_tiny_patch16_224",
        student_size=96,
        batch_size=64,
        log_every=4,
        epochs=2,
    )
    given |= changes
    if "teacher_weights" not in given:
        given["teacher_weights"] = seeded_weights("vit_small_patch14_dinov2", folder)
    return Config(**given)


def run(cfg: Config) -> dict:
    """`train.main` without its log on the terminal."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return train.main(cfg)


def logged_speeds(cfg: Config, epoch: int) -> list[float]:
    """images/s of each log line of an epoch, without its first, as train.py wrote them."""
    lines = map(json.loads, (cfg.run_path / "metrics.jsonl").read_text().splitlines())
    return [m["images_per_s"] for m in lines if epoch < m["epoch"] <= epoch + 1][1:]


# ---------------------------------------------------------------------------- a step


def floor_step(cfg: Config, dtype, mode: str = "eager"):
    """Forward, loss, backward and fused AdamW on a ready random batch: nothing but the student.

    mode: "eager", or one of torch.compile's.
    """
    device = model.pick_device(cfg.device)
    teacher = model.load_teacher(cfg.teacher, cfg.teacher_size, cfg.teacher_weights)
    distiller = model.Distiller(evaluation.student_of(cfg).train(), teacher, cfg).to(device)
    if mode != "eager":
        distiller.compile(mode=mode)
    optimiser = torch.optim.AdamW(distiller.parameters(), fused=True)
    images = torch.rand(cfg.batch_size, 3, cfg.student_size, cfg.student_size, device=device)
    tokens = 1 + distiller.grid[0] * distiller.grid[1]
    targets = torch.randn(cfg.batch_size, tokens, distiller.cls_head.out_dim, device=device)

    def step():
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss, _ = distiller(images, targets)
        loss.backward()
        optimiser.step()

    pixels = torch.rand(cfg.batch_size, 3, cfg.teacher_size, cfg.teacher_size, device=device)
    teacher.to(device)

    @torch.inference_mode()
    def ask():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            teacher(pixels)

    return step, ask


def step(folder: Path) -> None:
    print(
        "| student at 96 px, batch 64 | floor | loop, bank warm | share | teacher + floor |"
        " loop, no bank | share |\n|---|---|---|---|---|---|---|"
    )
    for name, args, title in (
        ("vit_small_patch16_224", "", "ViT-S/16, 21.6 M"),
        ("vit_tiny_patch16_224", "depth=6", "ViT of 2.8 M"),
    ):
        cfg = settings(folder, student=name, student_args=args, max_samples=512)
        dtype = model.pick_dtype(cfg.precision, model.pick_device(cfg.device))
        student, teacher = floor_step(cfg, dtype)
        floors, warm, asked, off = [], [], [], []
        for _ in range(REPEATS):
            seconds = in_turn(student) + in_turn(teacher)  # apart: each with warm caches
            floors.append(cfg.batch_size / seconds[0])
            asked.append(cfg.batch_size / sum(seconds))
            run(dataclasses.replace(cfg, teacher_views=1, epochs=4))
            warm.append(statistics.median(sum((logged_speeds(cfg, e) for e in (1, 2, 3)), [])))
            run(dataclasses.replace(cfg, teacher_views=0, epochs=1))
            off.append(statistics.median(logged_speeds(cfg, 0)))
        shares = [statistics.median(a / b for a, b in zip(*sides, strict=True))
                  for sides in ((warm, floors), (off, asked))]
        floor, warm, asked, off = map(statistics.median, (floors, warm, asked, off))
        print(
            f"| {title} | {floor:.0f} | {warm:.0f} | {shares[0]:.1%} | {asked:.0f} | {off:.0f}"
            f" | {shares[1]:.1%} |",
            flush=True,
        )


# ---------------------------------------------------------------------------- whole runs


def timed_run(cfg: Config) -> float:
    """Seconds of `train.main`, from the store to the exported student."""
    shutil.rmtree(cfg.cache_dir, ignore_errors=True)
    begin = time.perf_counter()
    run(cfg)
    return time.perf_counter() - begin


def bank(folder: Path) -> None:
    print("DINOv2 ViT-S/14 at 112 px -> vit_tiny_patch16_224 at 96 px, batch 128\n")
    bank_steps(folder)
    # One view in 12 epochs: nearly the share that four have in 50.
    short = settings(folder, max_samples=256, epochs=12, teacher_views=1, batch_size=128)
    live = dataclasses.replace(short, teacher_views=0)
    runs = [(timed_run(short), timed_run(live)) for _ in range(REPEATS)]
    with_bank, without = map(statistics.median, zip(*runs, strict=True))
    print(
        f"12 epochs of 256 images, start-up and all: {with_bank:.1f} s with one stored view, "
        f"{without:.1f} s without: {without / with_bank:.2f} times"
    )


def bank_steps(folder: Path) -> None:
    short = settings(
        folder, max_samples=1024, epochs=3, teacher_views=1, log_every=1, batch_size=128
    )
    fill, warm, off = [], [], []
    for _ in range(3):  # runs, of 7 steps each
        timed_run(short)
        fill += logged_speeds(short, 0)
        warm += logged_speeds(short, 1)
        run(dataclasses.replace(short, teacher_views=0, epochs=1))
        off += logged_speeds(short, 0)
    fill, warm, off = (1e3 / statistics.median(speeds) for speeds in (fill, warm, off))
    print(
        f"a step, ms per image: {fill:.2f} filling, {warm:.2f} reading, {off:.2f} without\n"
        f"50 epochs, V = 4: 50 x {off:.2f} / (4 x {fill:.2f} + 46 x {warm:.2f}) = "
        f"{50 * off / (4 * fill + 46 * warm):.2f} times"
    )


def naive_run(cfg: Config, images: list) -> list[float]:
    """The course project's loop: PIL per image, the student's tensor blown up for the teacher.

    Also the teacher at every step, float32, nothing compiled. Returns the seconds of each epoch.
    """
    size = cfg.student_size
    transform = T.Compose(
        [
            T.RandomResizedCrop(size, (cfg.crop_scale, 1.0), antialias=True),
            T.RandomHorizontalFlip(),
            T.PILToTensor(),
            T.ToDtype(torch.float32, scale=True),
        ]
    )

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(images)

        def __getitem__(self, row):
            return transform(images[row])

    teacher = model.load_teacher(cfg.teacher, cfg.teacher_size, cfg.teacher_weights)
    student = evaluation.student_of(cfg).train()
    project = torch.nn.Linear(student.embed_dim, teacher.embed_dim)
    parameters = [*student.parameters(), *project.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=cfg.lr)
    # On two cores loader processes would take from the training: measured, 0 is their best.
    batches = torch.utils.data.DataLoader(Images(), cfg.batch_size, shuffle=True)
    seconds = []
    for _ in range(cfg.epochs):
        begin = time.perf_counter()
        for views in batches:
            with torch.no_grad():
                asked = teacher(F.interpolate(views, size=cfg.teacher_size, mode="bilinear"))
            said, count = student(views), student.grid[0] * student.grid[1]
            loss = 0.0
            for ours, theirs in ((said.cls, asked.cls), (said.patches, asked.patches[:, :count])):
                loss += F.mse_loss(F.normalize(project(ours), dim=-1), F.normalize(theirs, dim=-1))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        seconds.append(time.perf_counter() - begin)
    return seconds


def naive(folder: Path) -> None:
    import PIL.Image

    cfg = settings(folder, max_samples=128, epochs=50, teacher_views=4)
    store = data.open_store(cfg, "train", cfg.teacher_size, cfg.max_samples)
    images = [PIL.Image.fromarray(x.transpose(1, 2, 0)) for x in store.images[np.arange(128)]]
    theirs = naive_run(cfg, images)
    ours = timed_run(cfg)
    print(
        "50 epochs over 128 images, DINOv2 ViT-S/14 at 112 px -> vit_tiny_patch16_224 at 96 px, "
        f"batch 64\n\nthe course project's way: {sum(theirs):.0f} s, an epoch "
        f"{statistics.median(theirs):.2f} s (median of {len(theirs)}; model loading not counted)"
        f"\ntrain.py, V = 4: {ours:.0f} s, with store, models, statistics and checkpoints"
        f"\n{sum(theirs) / ours:.1f} times faster"
    )


# ---------------------------------------------------------------------------- pixels


def store(folder: Path) -> None:
    """Decode JPEGs of 32 px (as CIFAR's) and of 320 x 240 px into stores."""
    import datasets
    import PIL.Image

    def encoded(count: int, width: int, height: int) -> list[bytes]:
        out = []
        for index in range(count):
            pixels, _ = data.draw_shape(0, index, height)
            file = io.BytesIO()
            PIL.Image.fromarray(pixels).resize((width, height)).save(file, "JPEG", quality=90)
            out.append(file.getvalue())
        return out

    def plain(path: Path, size: int):
        for row in datasets.load_dataset(str(path))["train"]:
            image = row["image"].convert("RGB")
            np.asarray(image if image.size == (size, size) else image.resize((size, size)))

    print(
        "images/s; a store's are counted from when its source is open\n\n| images | decode alone | "
        "datasets + PIL loop | store, in process | 1 worker | 2 workers | opening |\n"
        "|---|---|---|---|---|---|---|"
    )
    for count, width, height, size in ((50_000, 32, 32, 32), (10_000, 320, 240, 96)):
        some = encoded(min(count, 2000), width, height) * (count // 2000)
        path = folder / f"{width}"
        path.mkdir()
        table = datasets.Dataset.from_dict(dict(image=[dict(bytes=b, path=None) for b in some]))
        table.cast_column("image", datasets.Image()).to_parquet(path / "train.parquet")
        plain(path, size)  # datasets converts the file once, whoever reads it
        cells = [dict(bytes=b) for b in some]

        def build(workers: int, images: int = 0, path=path, size=size):
            shutil.rmtree(folder / "cache", ignore_errors=True)
            cfg = settings(folder, dataset=str(path), num_workers=workers)
            data.open_store(cfg, "train", size, images)

        jobs = (
            lambda cells=cells, size=size: [data.decode(cell, size) for cell in cells],
            lambda path=path, size=size: plain(path, size),
            *(lambda w=w, build=build: build(w) for w in (0, 1, 2)),
            lambda build=build: build(0, 1),
        )
        *seconds, opening = in_turn(*jobs)
        seconds = seconds[:2] + [second - opening for second in seconds[2:]]
        speeds = " | ".join(f"{count / second:.0f}" for second in seconds)
        print(f"| {count} of {width} x {height} px | {speeds} | {opening:.2f} s |", flush=True)

    stored = data.open_store(settings(folder, max_samples=0), "train", 32)
    torch.set_num_threads(1)

    def fetch():
        for _ in data.loader(stored, data.epoch_order(len(stored), 0, 0, 0), 64):
            pass

    seconds = in_turn(fetch)[0]
    print(
        f"\nfetching batches of 64 from a 32 px store, one core: {len(stored) / seconds:.0f} "
        "images/s"
    )


MEMORY_RUN = """
import json, resource, sys, time
sys.path.insert(0, {root!r})
import data, train
from pathlib import Path
from config import Config
opened = data.open_store
data.open_store = lambda *given: data.Store(Path({store!r}))
begin = time.perf_counter()
fit = train.models.Distiller.fit_heads
def fit_heads(*given):
    global ready
    fit(*given)
    ready = time.perf_counter() - begin
train.models.Distiller.fit_heads = fit_heads
train.main(Config(**json.loads({config!r})))
print("RESULT", ready, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def memory(folder: Path) -> None:
    """The same 60 steps on 1,000 stored images and on 500,000, a sparse file that takes no disk."""
    results = {1_000: [], 500_000: []}
    for count in results:
        path = folder / str(count)
        path.mkdir()
        with open(path / "images.u8", "wb") as file:
            file.truncate(count * 3 * 96 * 96)
        np.save(path / "labels.npy", np.full(count, -1))
        np.save(path / "rows.npy", np.arange(count))
        (path / "info.json").write_text(json.dumps(dict(images=count, size=96, unreadable=[])))
    for _ in range(REPEATS):
        for count, measured in results.items():
            cfg = settings(
                folder,
                student_args="depth=2",
                samples_per_epoch=960,
                epochs=4,
                batch_size=64,
                teacher="demo",
                teacher_size=32,
                teacher_weights="",
                teacher_views=1,
                run_dir=str(folder / f"run{count}"),
            )
            code = MEMORY_RUN.format(
                root=str(ROOT),
                store=str(folder / str(count)),
                config=json.dumps(dataclasses.asdict(cfg)),
            )
            out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            assert out.returncode == 0, out.stderr
            measured.append([float(x) for x in out.stdout.split("RESULT")[1].split()])
    print(
        "| stored images, 96 px | resident at most | from the store to the first step |\n"
        "|---|---|---|"
    )
    for count, measured in results.items():
        ready, resident = map(statistics.median, zip(*measured, strict=True))
        print(f"| {count} | {resident:.0f} MB | {ready:.1f} s |")


# ---------------------------------------------------------------------------- the verdict


def verdict(folder: Path) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 384, generator=generator)
    y, y_test = (torch.randint(0, 10, (n,), generator=generator) for n in (50_000, 10_000))
    x, x_test = (
        centres[t] + 3 * torch.randn(len(t), 384, generator=generator) for t in (y, y_test)
    )
    found = {}

    def sklearn_knn():
        judge = KNeighborsClassifier(
            20, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.07)
        )
        found["theirs"] = judge.fit(x.numpy(), y.numpy()).predict(x_test.numpy())

    def our_knn():
        found["ours"] = evaluation.knn_predict(x, y, x_test)[-1].numpy()

    theirs, ours = in_turn(sklearn_knn, our_knn)
    same = (found["ours"] == found["theirs"]).mean()
    print(
        f"k-NN of 10,000 queries against 50,000 x 384: scikit-learn {theirs:.2f} s, here "
        f"{ours:.2f} s, {theirs / ours:.1f} times faster; {same:.2%} of the predictions are equal"
    )

    # As real features are: classes overlap, and a few directions hold most of the variance.
    mix = torch.linalg.qr(torch.randn(384, 384, generator=generator)).Q
    z = (x + 5 * torch.randn(x.shape, generator=generator)) @ (
        torch.arange(1, 385)[:, None] ** -0.7 * mix
    )
    z = z.double()
    z = (z - z.mean(0)) / z.std(0)
    for tolerance in (1e-4, 1e-5):
        theirs, ours = in_turn(
            lambda t=tolerance: LogisticRegression(C=0.01, tol=t, max_iter=1000).fit(z, y),
            lambda t=tolerance: evaluation.fit_probe(z, y, 10, 0.01, tolerance=t),
        )
        print(
            f"logistic regression, C = 0.01, tolerance {tolerance:g}: scikit-learn {theirs:.2f} "
            f"s, here {ours:.2f} s"
        )


def features(folder: Path) -> None:
    """Feature extraction against bare forwards of as many ready-made images."""
    cfg = settings(folder, student="vit_small_patch16_224", max_samples=1024)
    stored = data.open_store(cfg, "train", 112, 1024)
    rows, dtype = np.arange(1024), model.pick_dtype("auto", torch.device("cpu"))
    ready = torch.rand(256, 3, 96, 96)

    @torch.inference_mode()
    def bare(backbone):
        for _ in range(4):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                backbone(ready).cls.float()

    for student, args in (("vit_small_patch16_224", ""), ("vit_tiny_patch16_224", "depth=6")):
        cfg = dataclasses.replace(cfg, student=student, student_args=args)
        net = evaluation.student_of(cfg)
        forward, whole = in_turn(
            lambda net=net: bare(net),
            lambda net=net: evaluation.extract(net, stored, rows, 256, dtype),
        )
        print(
            f"features of {student} {args}: {1024 / whole:.0f} images/s, "
            f"{forward / whole:.1%} of the bare forward"
        )


def precision(folder: Path) -> None:
    """bf16 and compile: speed of the bare step, and what the demo's student then knows."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")  # nothing from earlier runs
    print("| student, batch 64 | precision | compile | images/s | first step |")
    print("|---|---|---|---|---|")
    for student, args in (("vit_small_patch16_224", ""), ("vit_tiny_patch16_224", "depth=6")):
        cfg = settings(folder, student=student, student_args=args)
        for dtype in (torch.float32, torch.bfloat16):
            for compiled in (False, True):
                step, _ = floor_step(cfg, dtype, "default" if compiled else "eager")
                begin = time.perf_counter()
                step()
                first = time.perf_counter() - begin
                speed = cfg.batch_size / in_turn(step)[0]
                print(
                    f"| {student} {args} | {str(dtype)[6:]} | {'yes' if compiled else 'no'} | "
                    f"{speed:.0f} | {first:.1f} s |",
                    flush=True,
                )
    print("\n| the demo | training | k-NN | linear |\n|---|---|---|---|")
    for kind, compile in (("fp32", "off"), ("bf16", "off"), ("fp32", "on"), ("bf16", "on")):
        cfg = parse(Config, ["--preset", "demo", "--precision", kind, "--compile", compile])
        here = dict(run_dir=str(folder / "demo"), cache_dir=str(folder / "cache"), resume=False)
        cfg = dataclasses.replace(cfg, **here)
        evaluation.Bench(cfg)  # the images are drawn before the first is timed
        begin = time.perf_counter()
        row = run(cfg)["eval"][-1]
        seconds = time.perf_counter() - begin
        print(
            f"| {kind}, compile {compile} | {seconds:.0f} s with evaluation | "
            f"{row['knn20']:.1%} | {row['linear']:.1%} |",
            flush=True,
        )


FORWARDS = """
import time, timm, torch
net = timm.create_model({name!r}).eval().to(memory_format=torch.channels_last)
images = torch.rand(64, 3, 96, 96).to(memory_format=torch.channels_last)
for _ in range(12):
    begin = time.perf_counter()
    with torch.inference_mode(), torch.autocast("cpu", enabled={bf16}):
        net.forward_features(images)
    print(time.perf_counter() - begin)
"""


def cpu(folder: Path) -> None:
    """What five choices for CPUs are worth: each against what it replaced."""

    def forwards(name: str, huge: int) -> float:
        env = os.environ | dict(THP_MEM_ALLOC_ENABLE=str(huge))
        code = FORWARDS.format(name=name, bf16=bf16)
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        return statistics.median(map(float, out.stdout.split()[2:]))

    for name in ("resnet18", "tf_efficientnet_lite0"):
        pairs = [(forwards(name, 0), forwards(name, 1)) for _ in range(REPEATS)]
        small, huge = map(statistics.median, zip(*pairs, strict=True))
        print(f"forward of {name}, 64 images of 96 px: {small * 1e3:.0f} ms, on huge pages "
              f"{huge * 1e3:.0f} ms: {small / huge:.2f} times", flush=True)

    def training(name: str, fused: bool = False, layout=torch.channels_last):
        timm.layers.set_fused_attn(fused)
        net = model.build_student(name, 96).to(memory_format=layout)
        pixels = torch.rand(64, 3, 96, 96)

        def step():
            with torch.autocast("cpu", enabled=bf16):
                cls = net(pixels).cls
            cls.float().square().mean().backward()

        return step

    for name in ("vit_tiny_patch16_224", "vit_small_patch16_224"):
        ours, theirs = in_turn(training(name), training(name, fused=True))
        print(f"forward and backward of {name}, attention written out {ours * 1e3:.0f} ms, torch's "
              f"fused {theirs * 1e3:.0f} ms: {theirs / ours:.2f} times", flush=True)
    for name in ("resnet18", "convnext_atto", "mobilenetv3_small_100"):
        ours, theirs = in_turn(training(name), training(name, layout=torch.contiguous_format))
        print(f"forward and backward of {name}, channels last {ours * 1e3:.0f} ms, first "
              f"{theirs * 1e3:.0f} ms: {theirs / ours:.2f} times", flush=True)

    images = torch.randint(0, 256, (256, 3, 112, 112), dtype=torch.uint8)
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(256, 1)
    products, pixels = in_turn(lambda: data.render(images, box, 96),
                               lambda: data.render(images, None, 96))
    print(f"256 whole images of 112 px to 96 px: {products * 1e3:.0f} ms by matrix products, "
          f"{pixels * 1e3:.0f} ms as uint8: {products / pixels:.1f} times")

    count, shape = 100_000, (3, 96, 96)
    rows = np.random.default_rng(0).integers(0, count, (20, 64))
    with open(folder / "images.u8", "wb") as file:
        for _ in range(count // 1000):
            file.write(os.urandom(1000 * math.prod(shape)))
        file.flush()
        os.fsync(file.fileno())

    def read(opened) -> float:
        with open(folder / "images.u8", "rb") as file:  # out of memory, onto the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin = time.perf_counter()
        for some in rows:
            opened()[np.sort(some)].sum()
        return (time.perf_counter() - begin) / len(rows)

    whole = (count, *shape)
    pairs = [(read(lambda: np.memmap(folder / "images.u8", np.uint8, "r", shape=whole)),
              read(lambda: data.RowFile(folder / "images.u8", np.uint8, whole)))
             for _ in range(REPEATS)]
    mapped, plain = map(statistics.median, zip(*pairs, strict=True))
    print(f"a batch of 64 out of {count} images of 96 px, not in memory: {mapped * 1e3:.1f} ms "
          f"through a memory map, {plain * 1e3:.1f} ms by plain reads")


def gpu(folder: Path) -> None:
    """DINOv2 ViT-B/14 at 224 px -> ViT-S/16 at 96 px, batch 256: a ready batch, then whole runs."""
    cfg = settings(
        folder,
        teacher="dinov2_vitb14",
        teacher_size=224,
        teacher_weights=seeded_weights("vit_base_patch14_dinov2", folder),
        student="vit_small_patch16_224",
        batch_size=256,
        max_samples=7_680,
        epochs=4,
        teacher_views=1,
        log_every=5,
    )
    device = model.pick_device(cfg.device)
    dtype = model.pick_dtype(cfg.precision, device)
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'no GPU'}, "
          f"{str(dtype)[6:]}\n")

    def timed(job, times: int = 20) -> float:
        """Images per second of a job that only fills the GPU's queue."""
        def several():
            for _ in range(times):
                job()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return times * cfg.batch_size / in_turn(several)[0]

    for mode in ("eager", "default", "reduce-overhead"):
        step, ask = floor_step(cfg, dtype, mode)
        print(f"a ready batch, {mode}: {timed(step):.0f} images/s", flush=True)
    print(f"the teacher alone: {timed(ask):.0f} images/s", flush=True)
    run(cfg)
    fill, warm = (statistics.median(sum((logged_speeds(cfg, e) for e in epochs), []))
                  for epochs in ([0], [1, 2, 3]))
    run(dataclasses.replace(cfg, teacher_views=0, epochs=2))
    off = statistics.median(logged_speeds(cfg, 1))
    print(f"train.py: {fill:.0f} images/s filling the bank, {warm:.0f} reading it, {off:.0f} "
          f"without\n100 epochs, V = 4: {100 / off / (4 / fill + 96 / warm):.1f} times faster")


if __name__ == "__main__":
    jobs = dict(
        gpu=gpu,
        step=step,
        bank=bank,
        naive=naive,
        store=store,
        memory=memory,
        eval=verdict,
        features=features,
        precision=precision,
        cpu=cpu,
    )
    if len(sys.argv) != 2 or sys.argv[1] not in jobs:
        sys.exit(__doc__)
    bf16 = model.pick_dtype("auto", torch.device("cpu")) == torch.bfloat16
    print(
        f"# {os.cpu_count()} cores, bf16 {'in hardware' if bf16 else 'not in hardware'}, Python "
        f"{platform.python_version()}, torch {torch.__version__}\n",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as scratch:
        jobs[sys.argv[1]](Path(scratch))
