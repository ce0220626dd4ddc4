"""Distil a frozen DINOv2 into a small student, from unlabelled images.

    python train.py --preset demo                           # everything, offline, on a laptop CPU
    python train.py --dataset cifar10 --epochs 50           # DINOv2 ViT-B/14 -> ViT-S/16, one GPU
    python train.py --dataset ../my_images --student resnet18
    torchrun --nproc_per_node=4 train.py --dataset cifar10  # on four GPUs

The teacher embeds a few views (crops) of every image once, into a cache. Each step then cuts one
view out of each image of a batch, embeds it with the student, and pulls the student's embeddings
towards the teacher's. The same command continues an interrupted run, to the same weights.

Writes into the run folder: config.json, train.log, metrics.jsonl, views.png, checkpoint_latest.pth,
checkpoint_epoch_N.pth, and at the end student.safetensors, which plain timm loads.
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import logging
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torchvision.utils import save_image

import data
import eval as evaluation
import model as models
from config import Config, EvalConfig, UserError, cli, reason, validate, write_atomically
from model import Distiller, environment

BETAS = 0.9, 0.999  # AdamW's
STAT_IMAGES = 4096  # images on which the heads' means and axes are measured
SAVE_SECONDS = 300  # between two writes of checkpoint_latest.pth
QUICK_EVAL = 10_000, 2_000  # training and test images of --eval_every
COLLAPSED, DIVERSE = 0.95, 0.8  # warn above this similarity of embeddings, below that of targets
CHECKED, SAME = 16, 0.99  # cached targets that are compared with live ones; their least cosine
DEVICE_SHARE = 0.5  # fill at most this share of a GPU's free memory with images and targets
STOP_STEPS = 10  # several processes agree every so many steps whether to stop

log = logging.getLogger("distill")


def learning_rate(step, steps_per_epoch, cfg: Config) -> float:
    """Linear warm-up, then half a cosine from cfg.lr to 0."""
    total = cfg.epochs * steps_per_epoch
    warmup = min(int(cfg.warmup_epochs * steps_per_epoch), total // 5)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def parameter_groups(module, weight_decay):
    """Decay for matrices and kernels; none for biases and norms (1-D), nor for tokens (3-D)."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim in (2, 4)]
    others = [p for p in parameters if p.ndim not in (2, 4)]
    return [dict(params=others, weight_decay=0.0), dict(params=decayed, weight_decay=weight_decay)]


class Run:
    """What the loop works with. Objective, optimiser and scaler are state, the rest is from cfg.

    images: uint8 [I, 3, S, S]. targets: with a cache, codes int8 [I, T, D + 2] for each view. Both
    are read from files, or are on the GPU where they fit.
    """

    def __init__(self, cfg, objective, device, rank, world):
        self.cfg, self.device, self.rank, self.world = cfg, device, rank, world
        self.dtype = models.pick_dtype(cfg.precision, device)
        self.autocast = models.autocast(device, self.dtype)
        self.store = data.open_store(cfg, cfg.train_split, cfg.max_samples)
        self.images, self.targets = self.store.images, []
        self.steps_per_epoch = -(-len(self.store) // cfg.batch_size)
        self.total_steps = cfg.epochs * self.steps_per_epoch
        teacher = models.load_teacher(cfg.teacher, cfg.teacher_size, cfg.teacher_weights)
        self.teacher = teacher.to(device)  # None once its targets are cached
        self.objective = objective(models.student_of(cfg).train(), teacher, cfg).to(device)
        groups = parameter_groups(self.objective, cfg.weight_decay)
        self.optimiser = torch.optim.AdamW(groups, lr=cfg.lr, betas=BETAS, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.bench = evaluation.Bench(cfg, *QUICK_EVAL) if cfg.eval_every and rank == 0 else None
        self.history = []  # the lines of metrics.jsonl
        # What may not change when the run is continued.
        self.fixed = dict(objective=objective.__qualname__, images=self.store.fingerprint,
                          weights=teacher.fingerprint, **cfg.settings(free=False))

    def boxes(self, view):
        return data.view_boxes(self.cfg.seed, view, len(self.store), self.cfg.crop_scale)


def start(run):
    """Restore the last checkpoint or fit the heads; cache targets. Returns the step to begin at.

    Nothing of the run is written before its settings, data and teacher are known to agree.
    """
    cfg, path, saved = run.cfg, run.cfg.run_path, None
    latest = path / "checkpoint_latest.pth"
    if run.rank == 0 and cfg.resume and latest.exists():
        saved, _ = models.load_checkpoint(latest)
        refuse_changes(f"{path} holds a run with other settings; choose another --run_dir, or "
                       "--no_resume to move it aside", saved["fixed"], run.fixed)
    if run.world > 1:
        shared = [saved, run.fixed]
        dist.broadcast_object_list(shared, 0)
        saved, of_rank_0 = shared
        refuse_changes("all processes need the same command and images", of_rank_0, run.fixed)
    if run.rank == 0:
        if path.exists() and not cfg.resume:
            path.rename(f"{path}.old-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9}")
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1) + "\n")
    open_log(run)
    if saved:
        restore(run, saved)
    else:
        rows = data.epoch_order(len(run.store), cfg.seed, 0)[:STAT_IMAGES]
        run.objective.fit(embed_stored(run, 0, data.chunks(rows), "fitting the heads"))
        for buffer in run.objective.heads.buffers() if run.world > 1 else ():
            dist.broadcast(buffer, 0)
    compile_networks(run)
    if run.rank == 0:
        save_views(run)
    step = saved["step"] if saved else 0
    if cfg.teacher_views and step < run.total_steps:
        cache_targets(run, cache_folder(run))
    run.logged_at = run.saved_at = time.monotonic()
    return step


def refuse_changes(message, before, now):
    """Raise UserError with the settings that differ, if any do."""
    changed = [f"\n  - {name}: {before.get(name)!r}, now {value!r}" for name, value in now.items()
               if before.get(name) != value]
    if changed:
        raise UserError(message + "".join(changed))


def open_log(run):
    """Log to the terminal and to train.log, from rank 0 alone; begin with what the run is."""
    log.handlers, log.propagate = [logging.StreamHandler(sys.stdout)], False
    log.setLevel(logging.INFO if run.rank == 0 else logging.ERROR)
    if run.rank == 0:
        log.addHandler(logging.FileHandler(run.cfg.run_path / "train.log"))
    log.info(f"{run.cfg}\n{environment(run.device)}, {run.dtype}, {run.world} processes\n"
             f"{run.store}, {run.steps_per_epoch} steps/epoch\n"
             f"teacher: {run.teacher}\nstudent: {run.objective.student}")


def restore(run, saved):
    """Take over what a checkpoint holds."""
    run.history = saved["history"]
    run.objective.load_state_dict(saved["objective"])
    run.optimiser.load_state_dict(saved["optimiser"])
    if saved["scaler"]:  # of a run in fp16; --precision may have changed since
        run.scaler.load_state_dict(saved["scaler"])
    log.info(f"continuing at step {saved['step']} of {run.total_steps}")
    if saved["commit"] != environment(run.device)["commit"]:
        log.warning(f"the checkpoint was written at commit {saved['commit']}")


def save_views(run):
    """views.png: eight images as they are stored, and as the student sees them at first."""
    rows = data.epoch_order(len(run.store), run.cfg.seed, 0)[:8]
    images = run.store.images[rows]
    seen = student_pixels(run, images, run.boxes(0)[rows], 0, 0, torch.from_numpy(rows))
    shown = torch.cat([data.render(images, None, run.cfg.student_size), seen])
    save_image(F.interpolate(shown, 128), run.cfg.run_path / "views.png")


def compile_networks(run):
    """torch.compile in place, so that names stay plain; eager where nothing can compile.

    On CUDA the student's step becomes CUDA graphs: launching its small kernels takes longer than
    running them (results/first_version/h100.txt).
    """
    cuda = run.device.type == "cuda"
    if run.cfg.compile == "on" or (run.cfg.compile == "auto" and cuda):
        try:
            torch.compile(torch.sin)(torch.ones(1, device=run.device))
        except Exception as error:  # no compiler, no Triton, an old GPU
            log.warning(f"not compiled: {reason(error)}")
            return
        run.objective.compile(mode="reduce-overhead" if cuda else None)
        for block in getattr(run.teacher.net, "blocks", []):
            block.compile(dynamic=False)


def cache_folder(run):
    """The folder of the cached targets: its name is a hash of what determines them."""
    cfg, objective = run.cfg, run.objective
    methods = [getattr(objective, name).__qualname__ for name in
               ("embed", "shared_view", "on_student_grid", "fit", "targets")]
    key = [run.store.fingerprint, run.teacher.fingerprint, *methods, str(objective.heads),
           objective.student.grid, run.dtype, cfg.seed, cfg.teacher_size, cfg.crop_scale]
    digest = hashlib.sha256(str(key).encode()).hexdigest()
    return Path(cfg.cache_dir) / "targets" / digest[:12]


def cache_targets(run, folder):
    """Fill `run.targets`, unless an earlier run has filled the cache, and drop the teacher.

    The cache belongs to one version of the heads, which is stored with it and taken over here. Its
    name does not depend on the code that computes targets: some are compared with the teacher's of
    now. Raises UserError where they differ.
    """
    rows = np.arange(CHECKED) % len(run.store)
    # By this run's own heads, before those of the cache replace them: the check covers both.
    expected = run.objective.targets(next(embed_stored(run, 0, [rows])))
    heads = folder / "heads.safetensors"
    data.make_once(heads, functools.partial(write_heads, run))
    run.objective.heads.load_state_dict(load_file(heads), strict=False)

    shape = len(run.store), expected.shape[1], expected.shape[2] + 2
    files = [folder / f"view_{v}.i8" for v in range(min(run.cfg.teacher_views, run.cfg.epochs))]
    need = math.prod(shape) * sum(not file.exists() for file in files)
    need -= sum(part.stat().st_size for part in folder.glob("*.part"))
    log.info(f"target cache {folder}: {len(files)} views, {need / 1e9:.2f} GB to be filled")
    data.check_space(folder, need, "--teacher_views, of which 0 makes no cache")
    first = len(files) * run.rank // run.world  # processes begin with different views
    for view in [*range(first, len(files)), *range(first)]:
        fill = functools.partial(fill_view, run, view, math.prod(shape[1:]))
        data.make_once(files[view], fill)
    run.targets = [data.RowFile(file, torch.int8, shape) for file in files]

    cached, expected = data.dequantise(run.targets[0][rows]), expected.cpu()
    cos = F.cosine_similarity(cached.mT.flatten(0, 1), expected.mT.flatten(0, 1), dim=0)
    if (cos < SAME).logical_and(expected.any(2).any(0)).any():  # of each place, but for zeros
        raise UserError(f"the target cache {folder} holds other targets (cosine {cos.min():.3f} to "
                        "those of now): the program has changed since; delete that folder")
    run.teacher = None
    log.info("all targets are cached: the teacher is dropped")
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        files = [run.images, *run.targets]
        if sum(file.nbytes for file in files) < DEVICE_SHARE * torch.cuda.mem_get_info()[0]:
            run.images, *run.targets = [file.to(run.device) for file in files]


def write_heads(run, path):
    buffers = {name: value.cpu() for name, value in run.objective.heads.named_buffers()}
    write_atomically(path, functools.partial(save_file, buffers))


def fill_view(run, view, row_bytes, path):
    """Write the codes of all images of a view, after those that an interrupted run has written."""
    with open(path, "ab") as file:
        # Whole chunks: a continued view is embedded in the same batches, and so to the same bits.
        done = file.tell() // (row_bytes * data.CHUNK) * data.CHUNK
        file.truncate(done * row_bytes)
        parts = data.chunks(np.arange(done, len(run.store)))
        for features in embed_stored(run, view, parts, f"targets of view {view}"):
            file.write(data.quantise(run.objective.targets(features)).cpu().numpy().tobytes())
        os.fsync(file.fileno())


def embed_stored(run, view, parts, title=None):
    """Yield the teacher's Features of a view of stored images, for each of some parts of rows."""
    boxes = run.boxes(view)
    for images, _, index in data.progress(batches(run, parts), title, len(parts)):
        yield embed_view(run, images, boxes[index], view, index)


@torch.inference_mode()
def embed_view(run, images: Tensor, boxes: Tensor, view, index: Tensor):
    """The teacher's Features of a view of stored images [B, 3, S, S] on the device."""
    pixels = data.render(images, boxes, run.cfg.teacher_size)
    pixels = run.objective.shared_view(pixels, view, index)
    with run.autocast:
        return run.objective.embed(run.teacher, pixels)


def student_pixels(run, images: Tensor, boxes: Tensor, view, epoch, index: Tensor) -> Tensor:
    """The same view at the student's size: float32 [B, 3, S, S]."""
    pixels = data.render(images, boxes, run.cfg.student_size)
    pixels = run.objective.shared_view(pixels, view, index)
    return run.objective.student_view(pixels, epoch, index)


def batches(run, parts, codes=None):
    """Yield images and codes (or None) on the device, and their index int64 [B], part by part."""
    if torch.is_tensor(run.images):
        for index in map(torch.from_numpy, parts):
            there = data.to_device(index, run.device)
            yield run.images[there], codes[there], index
    else:
        reads = ((run.images, codes, rows) for rows in parts)
        for images, some, index in data.read_ahead(read_rows, reads):
            yield data.to_device(images, run.device), data.to_device(some, run.device), index


def read_rows(images, codes, rows):
    return images[rows], None if codes is None else codes[rows], torch.from_numpy(rows)


def train_step(run, images, codes, boxes, index, epoch, view, step) -> dict[str, Tensor]:
    """One step on stored images [B, 3, S, S] and their boxes [B, 4]; returns its statistics."""
    cfg, objective, optimiser, scaler = run.cfg, run.objective, run.optimiser, run.scaler
    # Dropout, masks and the like follow from the step: a continued run repeats them.
    torch.manual_seed(cfg.seed * 2**32 + step * run.world + run.rank)
    if codes is None:
        targets = objective.targets(embed_view(run, images, boxes, view, index))
    else:
        targets = data.dequantise(codes)
    pixels = student_pixels(run, images, boxes, view, epoch, index)

    for group in optimiser.param_groups:
        group["lr"] = learning_rate(step, run.steps_per_epoch, cfg)
    optimiser.zero_grad()
    with run.autocast:
        loss, stats = objective(pixels, targets)
    scaler.scale(loss).backward()
    if run.world > 1:
        average_gradients(objective, run.world)
    scaler.unscale_(optimiser)
    norm = clip_grad_norm_(objective.parameters(), cfg.grad_clip or math.inf)
    scaler.step(optimiser)
    scaler.update()
    objective.after_step(step)
    # Copies: the next replay of a CUDA graph overwrites what this one returned.
    return {name: value.detach().clone() for name, value in (stats | dict(norm=norm)).items()}


def average_gradients(module, world):
    """Mean gradients over all processes, by one all-reduce.

    In place of DistributedDataParallel, which rules out CUDA graphs.
    """
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / world
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def report(run, step, recent):
    """Average the statistics of recent steps, check and log them; at an epoch's end evaluate.

    Here, and nowhere else in a step, the host waits for the GPU.
    """
    cfg, seconds = run.cfg, time.monotonic() - run.logged_at
    run.logged_at += seconds
    means = torch.stack([torch.stack(list(stats.values())) for stats in recent]).mean(0) / run.world
    if run.world > 1:
        dist.all_reduce(means)
    line = dict(epoch=step / run.steps_per_epoch, step=step)
    line |= zip(recent[0], means.tolist(), strict=True)
    line |= dict(lr=run.optimiser.param_groups[0]["lr"], memory_gb=models.peak_memory(run.device),
                 images_per_s=len(recent) * cfg.batch_size / max(seconds, 1e-9),
                 seconds=seconds + sum(last["seconds"] for last in run.history[-1:]))
    if not math.isfinite(line["loss"]):
        raise UserError(f"loss {line['loss']} between steps {step - len(recent)} and {step}: try a "
                        "lower --lr or --precision fp32; the last checkpoint is good")
    run.history.append(line)
    if run.rank > 0:
        return
    log.info(" ".join(f"{name} {value:.4g}" for name, value in line.items()))
    alike = line.get("similarity", 0) > COLLAPSED and line.get("target_similarity", 1) < DIVERSE
    if alike and step > run.total_steps / 5:  # before, it has only just begun
        log.warning("the student embeds nearly all images alike: a collapse. Try a lower --lr, or "
                    "a longer --warmup_epochs")
    if cfg.eval_every and line["epoch"] % cfg.eval_every == 0:
        quick = run.bench.evaluate(*run.bench.features(run.objective.evaluated), probe=False)
        line |= {f"test_{name}": value for name, value in quick.items()}
        log.info("test: " + " ".join(f"{name} {value:.4g}" for name, value in quick.items()))
        run.objective.student.train()
        run.logged_at = time.monotonic()
    lines = "".join(json.dumps(line) + "\n" for line in run.history)
    write_atomically(cfg.run_path / "metrics.jsonl", lambda path: path.write_text(lines))


def save(run, step, stopping):
    """Write checkpoint_epoch_N.pth if it is to be kept, then checkpoint_latest.pth if it is due."""
    cfg, epoch = run.cfg, step / run.steps_per_epoch
    kept = step == run.total_steps
    if cfg.save_every:
        kept = kept or epoch == 1 or epoch % cfg.save_every == 0
    if kept:
        models.save_checkpoint(cfg.run_path / f"checkpoint_epoch_{epoch:g}.pth", run, step)
    if kept or stopping or time.monotonic() - run.saved_at > SAVE_SECONDS:
        models.save_checkpoint(cfg.run_path / "checkpoint_latest.pth", run, step)
        run.saved_at = time.monotonic()


def export(run):
    """student.safetensors: weights under timm's names; the metadata states how to use them."""
    cfg, student = run.cfg, run.objective.evaluated
    arguments = json.dumps(run.objective.student.arguments, default=str)
    about = dict(model=cfg.student, args=arguments, image_size=str(cfg.student_size),
                 mean=str(student.mean.flatten().tolist()), std=str(student.std.flatten().tolist()),
                 pool=cfg.pool, teacher=cfg.teacher, commit=environment(run.device)["commit"])
    weights = {name: value.contiguous().cpu() for name, value in student.net.state_dict().items()}
    write_atomically(cfg.run_path / "student.safetensors",
                     lambda path: save_file(weights, path, about))


@contextlib.contextmanager
def processes(cfg):
    """Lock the run folder, join torchrun's process group if there is one -> device, rank, world."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, backend = models.pick_device(cfg.device), "gloo"
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % gpus)
        torch.cuda.set_device(device)
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= gpus:  # NCCL: a GPU for each process
            backend = "cpu:gloo,cuda:nccl"
    if world > 1:  # a day: another process may be decoding, or filling the cache
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    path = cfg.run_path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = contextlib.nullcontext()
    try:
        if rank == 0:
            lock = FileLock(f"{path}.lock").acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is training in {path}: choose another --run_dir, or wait "
                        "for it") from None
    with lock:
        yield device, rank, world
        if world > 1:
            dist.destroy_process_group()


@contextlib.contextmanager
def received_signals():
    """Yield a list that collects SIGINT and SIGTERM, in place of ending the process."""
    received, numbers = [], (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(n, lambda number, frame: received.append(number)) for n in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def must_stop(run, step, received):
    """Whether to stop after this step; all processes return the same."""
    if run.world == 1:
        return len(received) > 0
    if step % STOP_STEPS and step % run.steps_per_epoch:
        return False
    flag = torch.tensor([len(received)])  # on the CPU: no GPU has to wait
    dist.all_reduce(flag)
    return bool(flag)


def main(cfg: Config, objective=Distiller) -> dict:
    """Train; returns the last metrics, with eval_at_end also the evaluation's rows.

    Raises UserError for what the user can fix, SystemExit(128 + signal) when stopped.
    """
    validate(cfg, Config.problems, models.problems)
    with processes(cfg) as (device, rank, world):
        run = Run(cfg, objective, device, rank, world)
        step, recent = start(run), []
        with received_signals() as received:
            for epoch in range(step // run.steps_per_epoch, cfg.epochs):
                view = epoch % cfg.teacher_views if run.targets else epoch
                boxes, codes = run.boxes(view), run.targets[view] if run.targets else None
                order = data.epoch_order(len(run.store), cfg.seed, epoch)
                parts = data.batch_rows(order, cfg.batch_size, rank, world)
                rest = parts[step % run.steps_per_epoch :]  # of an epoch that was interrupted
                for images, cached, index in batches(run, rest, codes):
                    recent.append(train_step(
                        run, images, cached, boxes[index], index, epoch, view, step))
                    step += 1
                    stopping = must_stop(run, step, received)
                    if step % cfg.log_every == 0 or step % run.steps_per_epoch == 0 or stopping:
                        report(run, step, recent)
                        recent.clear()
                        if rank == 0:
                            save(run, step, stopping)
                    if stopping:
                        log.info(f"stopped after step {step}; run the same command to continue")
                        if world > 1:
                            dist.barrier()  # torchrun ends the others when the first one leaves
                        raise SystemExit(128 + (received or [signal.SIGTERM])[0])
        if rank == 0:
            export(run)
    latest = cfg.run_path / "checkpoint_latest.pth"
    log.info(f"done. Evaluate with: python eval.py {latest}")
    if cfg.eval_at_end and rank == 0:
        rows = evaluation.main(EvalConfig((str(latest),), overrides=cfg.settings(free=True)))
        return run.history[-1] | dict(eval=rows)
    return run.history[-1]


if __name__ == "__main__":
    cli(main, Config, models.problems)
