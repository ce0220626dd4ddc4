"""Distil a frozen DINOv2 into a small student, from unlabelled images.

    python train.py --preset demo                           # everything, offline, on a laptop CPU
    python train.py --dataset cifar10 --epochs 50           # DINOv2 ViT-B/14 -> ViT-S/16, one GPU
    torchrun --nproc_per_node=4 train.py --dataset cifar10  # on four GPUs

The teacher embeds a few views (crops) of every image once, into a cache. Each step then cuts one
view out of each image of a batch, embeds it with the student, and pulls the student's embeddings
towards the teacher's. The same command continues an interrupted run, to the same weights. Writes
config.json, train.log, metrics.jsonl, checkpoints, and student.safetensors, which timm loads."""

import hashlib
import json
import logging
import math
import os
import signal
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import monotonic, time_ns

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from safetensors.torch import save
from torch.nn.utils import clip_grad_norm_

import data
import eval as evaluation
import model as models
from config import Config, EvalConfig, UserError, cli, log, reason, validate, write_atomically

STAT_IMAGES = 4096  # images on which the heads' means and axes are measured
SAVE_SECONDS = 300  # between two writes of checkpoint_latest.pth
QUICK_EVAL = 10_000, 2_000  # training and test images of --eval_every
DEVICE_SHARE = 0.5  # fill at most this share of a GPU's free memory with images and targets
BACKENDS = dict(cpu="gloo", cuda="cpu:gloo,cuda:nccl")  # of several processes; see `must_stop`
STOP_STEPS = 10  # several processes agree every so many steps whether to stop

def learning_rate(step, steps_per_epoch, cfg):
    """Linear warm-up, then half a cosine from cfg.lr to 0."""
    total = cfg.epochs * steps_per_epoch
    warmup = min(int(cfg.warmup_epochs * steps_per_epoch), total // 5)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))

class Run:
    """What the loop works with. images: uint8 [I, 3, S, S]. codes: the targets of each cached view,
    int8 [I, T, D + 2]. Both are read from files; on a GPU both move there if they fit."""
    def __init__(self, cfg, objective, device, rank, world):
        self.cfg, self.device, self.rank, self.world = cfg, device, rank, world
        self.dtype = models.pick_dtype(cfg.precision, device)
        self.autocast = torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)
        teacher = models.load_teacher(cfg.teacher, cfg.teacher_size, cfg.teacher_weights)
        self.teacher = teacher.to(device)  # None once its targets are cached
        self.store = data.open_store(cfg, cfg.train_split, cfg.max_samples)
        self.images, self.codes = self.store.images, []
        self.steps_per_epoch = -(-len(self.store) // cfg.batch_size)
        self.objective = objective(models.student_of(cfg).train(), teacher, cfg).to(device)
        groups = self.objective.parameter_groups(cfg.weight_decay)
        self.optimiser = torch.optim.AdamW(groups, lr=cfg.lr, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.bench = evaluation.Bench(cfg, *QUICK_EVAL) if cfg.eval_every else None
        self.history = []  # the lines of metrics.jsonl
        self.fixed = dict(objective=objective.__qualname__, images_hash=self.store.fingerprint,
                          teacher_hash=teacher.fingerprint, **cfg.settings(free=False))

    def view(self, images, view, index, size):
        """A view of stored images [B, 3, S, S], as both networks see it: [B, 3, size, size]."""
        boxes = data.view_boxes(self.cfg.seed, view, len(self.store), self.cfg.crop_scale)[index]
        return self.objective.shared_view(data.render(images, boxes, size), view, index)

def start(run):
    """Restore the last checkpoint or fit the heads; cache targets. Returns the step to begin at."""
    cfg, path, saved = run.cfg, run.cfg.run_path, None
    latest = path / "checkpoint_latest.pth"
    if run.rank == 0 and cfg.resume and latest.exists():
        saved, before = models.load_checkpoint(latest)
        refuse_changes(f"{path} holds a run with other settings; see --run_dir and --no_resume",
                       before.settings(free=False) | saved["fixed"], run.fixed)
    if run.world > 1:
        own = run.fixed | dict(count=len(run.store), epochs=cfg.epochs, log_every=cfg.log_every)
        shared = [saved, own]
        dist.broadcast_object_list(shared, 0)
        saved, of_rank_0 = shared
        refuse_changes("all processes need the same command and images", of_rank_0, own)
    if run.rank == 0:
        if path.exists() and not cfg.resume:
            path.rename(f"{path}.old-{time_ns()}")
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(asdict(cfg), indent=1) + "\n")
    open_log(run)
    if saved:
        restore(run, saved)
    else:
        rows = data.epoch_order(len(run.store), cfg.seed, 0)[:STAT_IMAGES]
        run.objective.fit(embed_stored(run, 0, data.chunks(rows), "fitting the heads"))
        if run.world > 1:
            for value in run.objective.state_dict().values():  # the same bits everywhere
                dist.broadcast(value, 0)
    step = saved["step"] if saved else 0
    compile_networks(run)  # after `fit`, whose smaller last part would be compiled separately
    if cfg.teacher_views and step < cfg.epochs * run.steps_per_epoch:
        cache_targets(run)
    run.logged_at = run.saved_at = monotonic()
    return step

def refuse_changes(message, before, now):
    """Raise UserError with the settings that differ, if any do."""
    if changed := [f"\n  - {name}: {before.get(name)!r}, now {value!r}"
                   for name, value in now.items() if before.get(name) != value]:
        raise UserError(message + "".join(changed))

def open_log(run):
    """Log to the terminal and to train.log, from rank 0 alone; begin with what the run is."""
    log.handlers, log.propagate = [logging.StreamHandler(sys.stdout)], False
    log.setLevel(logging.INFO if run.rank == 0 else logging.ERROR)
    if run.rank == 0:
        log.addHandler(logging.FileHandler(run.cfg.run_path / "train.log"))
    log.info(f"{run.cfg}\n{models.environment(run.device)}, {run.dtype}, {run.world} processes\n"
             f"{len(run.store)} images of {run.store.size} px\n"
             f"teacher: {run.teacher}\nstudent: {run.objective.student}")

def restore(run, saved):
    """Take over what a checkpoint holds."""
    run.history = saved["history"]
    run.objective.load_state_dict(saved["objective"])
    run.optimiser.load_state_dict(saved["optimiser"])
    if saved["scaler"]:  # of a run in fp16; --precision may have changed since
        run.scaler.load_state_dict(saved["scaler"])
    log.info(f"continuing at step {saved['step']}")
    if saved["commit"] != models.environment(run.device)["commit"]:
        log.warning(f"the checkpoint was written at commit {saved['commit']}")

def compile_networks(run):
    """torch.compile in place, so that names stay plain; eager where nothing can compile. On CUDA
    the student's step becomes CUDA graphs (results/first_version/h100.txt)."""
    cuda = run.device.type == "cuda"
    if dict(on=True, off=False, auto=cuda)[run.cfg.compile]:
        try:
            torch._dynamo.config.skip_nnmodule_hook_guards = False  # or a fork's hooks get lost
            torch.compile(torch.sin)(torch.ones(1, device=run.device))
        except Exception as error:  # no compiler, no Triton, an old GPU
            log.warning(f"not compiled: {reason(error)}")
            return
        run.objective.compile(mode="reduce-overhead" if cuda else None)
        if hasattr(run.teacher.net, "cls_token"):  # a ViT, whose blocks are alike and compile once
            for block in getattr(run.teacher.net, "blocks", []):
                block.compile(dynamic=False)

def cache_folder(run, shape):
    """The folder of the cached targets: its name is a hash of what determines them."""
    cfg, objective = run.cfg, run.objective
    methods = [getattr(objective, name).__qualname__ for name in
               ("embed", "shared_view", "on_student_grid", "targets")]
    key = [run.store.fingerprint, run.teacher.fingerprint, *methods, shape, run.dtype,
           cfg.seed, cfg.teacher_size, cfg.crop_scale]
    digest = hashlib.sha256(str(key).encode())
    for name, buffer in objective.heads.named_buffers():
        if ".predict." not in name:  # which trains
            digest.update(buffer.cpu().numpy().tobytes())
    return Path(cfg.cache_dir) / "targets" / digest.hexdigest()[:12]

def cache_targets(run):
    """Fill `run.codes`, unless an earlier run has filled the cache, and drop the teacher. Raises
    UserError if the first images' cached targets are not those of the code now, token by token."""
    size = data.CHUNK * (4 if run.device.type == "cuda" else 1)
    parts = data.batch_rows(np.arange(len(run.store)), size)  # of one size, for torch.compile
    expected = run.objective.targets(next(embed_stored(run, 0, parts[:1]))).cpu()
    shape = len(run.store), expected.shape[1], expected.shape[2] + 2
    folder = cache_folder(run, shape)
    files = [folder / f"view_{v}.i8" for v in range(min(run.cfg.teacher_views, run.cfg.epochs))]
    need = math.prod(shape) * sum(not file.exists() for file in files)
    log.info(f"target cache {folder}: {need / 1e9:.2f} GB to be filled")
    data.check_space(run.cfg.cache_dir, need, "--teacher_views")
    if files[0].exists():  # compared before others are filled beside it
        cached = data.dequantise(data.RowFile(files[0], torch.int8, shape)[parts[0]])
        error = (cached - expected).square().sum((0, 2))
        if (error > 0.02 * expected.square().sum((0, 2))).any():  # a cosine below 0.99
            raise UserError(f"{folder} holds targets of other code: set --cache_dir, or delete it")
    first = len(files) * run.rank // run.world  # processes begin with different views
    for view in np.roll(range(len(files)), -first):
        data.make_once(files[view], partial(fill_view, run, view, parts, shape))
    run.codes = [data.RowFile(file, torch.int8, shape) for file in files]
    run.teacher = None
    log.info("all targets are cached: the teacher is dropped")
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        arrays = [run.images, *run.codes]
        if sum(array.nbytes for array in arrays) < DEVICE_SHARE * torch.cuda.mem_get_info()[0]:
            run.images, *run.codes = [array.to(run.device) for array in arrays]

def fill_view(run, view, parts, shape, path):
    """Write the codes of all images of a view: int8 of a shape [I, T, D + 2]."""
    with open(path, "wb") as file:
        for features in embed_stored(run, view, parts, f"targets of view {view}"):
            file.write(data.quantise(run.objective.targets(features)).cpu().numpy())
        file.truncate(math.prod(shape))  # the first images filled up the last part

def embed_stored(run, view, parts, title=None):
    """Yield the teacher's Features of a view of stored images, for each of some parts of rows."""
    for images, _, index in data.progress(batches(run, parts), title, len(parts)):
        yield embed_view(run, images, view, index)

@torch.inference_mode()
def embed_view(run, images, view, index):
    """The teacher's Features of a view of stored images [B, 3, S, S] on the device."""
    pixels = run.view(images, view, index, run.cfg.teacher_size)
    with run.autocast:
        return run.objective.embed(run.teacher, pixels)

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

def train_step(run, images, codes, index, epoch, view, step):
    """One step on stored images [B, 3, S, S] and cached targets, or None; returns statistics."""
    cfg, objective, optimiser, scaler = run.cfg, run.objective, run.optimiser, run.scaler
    # Dropout, masks and the like follow from the step: a continued run repeats them.
    torch.manual_seed(cfg.seed * 2**32 + step * run.world + run.rank)
    if codes is None:
        targets = objective.targets(embed_view(run, images, view, index))
    else:
        targets = data.dequantise(codes)
    pixels = run.view(images, view, index, cfg.student_size)
    pixels = objective.student_view(pixels, epoch, index)

    for group in optimiser.param_groups:
        group["lr"] = group.get("lr_scale", 1) * learning_rate(step, run.steps_per_epoch, cfg)
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
    return {name: x.detach().clone() for name, x in dict(loss=loss, **stats, norm=norm).items()}

def average_gradients(module, world):
    """Over all processes, by one all-reduce: DistributedDataParallel rules out CUDA graphs."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / world
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))

def report(run, step, recent, stopping):
    """Average, check and log the statistics of recent steps; evaluate at an epoch's end.
    Here alone the host waits for the GPU."""
    cfg, seconds = run.cfg, monotonic() - run.logged_at
    run.logged_at += seconds
    means = torch.stack([torch.stack(list(stats.values())) for stats in recent]).mean(0) / run.world
    if run.world > 1:
        dist.all_reduce(means)
    line = dict(epoch=step / run.steps_per_epoch, step=step)
    line |= zip(recent[0], means.tolist(), strict=True)
    line |= dict(lr=run.optimiser.param_groups[0]["lr"], memory_gb=models.peak_memory(run.device),
                 images_per_s=len(recent) * cfg.batch_size / seconds,
                 seconds=seconds + sum(last["seconds"] for last in run.history[-1:]))
    if not math.isfinite(line["loss"]):
        raise UserError(f"loss {line['loss']} before step {step}: lower --lr, or --precision fp32")
    run.history.append(line)
    if run.rank > 0:
        return
    if cfg.eval_every and line["epoch"] % cfg.eval_every == 0 and not stopping:
        quick = run.bench.evaluate(*run.bench.features(run.objective.evaluated), probe=False)
        line |= {f"test_{name}": value for name, value in quick.items()}
        run.objective.student.train()
        run.logged_at = monotonic()
    log.info(" ".join(f"{name} {value:.4g}" for name, value in line.items()))
    lines = "".join(json.dumps(line) + "\n" for line in run.history)
    write_atomically(cfg.run_path / "metrics.jsonl", lambda path: path.write_text(lines))

def save_due(run, step, stopping):
    """Write checkpoint_epoch_N.pth if it is to be kept, then checkpoint_latest.pth if it is due."""
    cfg, epoch = run.cfg, step / run.steps_per_epoch
    kept = epoch in (1, cfg.epochs) or (cfg.save_every and epoch % cfg.save_every == 0)
    if kept:
        models.save_checkpoint(cfg.run_path / f"checkpoint_epoch_{epoch:g}.pth", run, step)
    if kept or stopping or monotonic() - run.saved_at > SAVE_SECONDS:
        models.save_checkpoint(cfg.run_path / "checkpoint_latest.pth", run, step)
        run.saved_at = monotonic()

def export(run):
    """student.safetensors: weights under timm's names; the metadata states how to use them."""
    cfg, student = run.cfg, run.objective.evaluated
    how = dict(model=cfg.student, args=student.arguments, pool=cfg.pool,
               image_size=cfg.student_size, mean=student.mean.flatten().tolist(),
               std=student.std.flatten().tolist())
    weights = {name: value.contiguous().cpu() for name, value in student.net.state_dict().items()}
    content = save(weights, metadata=dict(student=json.dumps(how)))
    write_atomically(cfg.run_path / "student.safetensors", lambda path: path.write_bytes(content))

@contextmanager
def processes(cfg):
    """Lock the run folder, join torchrun's process group if there is one -> device, rank, world."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = models.pick_device(cfg.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group(BACKENDS[device.type])
    path = cfg.run_path.resolve()
    try:
        with FileLock(f"{path}.lock", timeout=0) if rank == 0 else nullcontext():
            yield device, rank, world
    except Timeout:
        raise UserError(f"another process is training in {path}") from None
    if world > 1:
        dist.destroy_process_group()

@contextmanager
def received_signals():
    """Yield a list that collects SIGINT and SIGTERM, in place of ending the process."""
    received = []
    before = {number: signal.signal(number, lambda number, frame: received.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

def must_stop(run, step, received):
    """Whether to stop after this step; all processes return the same."""
    if run.world == 1:
        return bool(received)
    if step % STOP_STEPS and step % run.steps_per_epoch:
        return False
    flag = torch.tensor([len(received)])  # on the CPU: no GPU has to wait
    dist.all_reduce(flag)
    return bool(flag)

def main(cfg: Config, objective=models.Distiller) -> dict:
    """Train; returns the last metrics, with eval_at_end also the evaluation's rows.
    Raises UserError for what the user can fix, SystemExit(128 + signal) when stopped."""
    validate(cfg, models.problems(cfg), [cfg.dataset, cfg.eval_dataset or cfg.dataset])
    with processes(cfg) as (device, rank, world):
        run = Run(cfg, objective, device, rank, world)
        step, recent = start(run), []
        with received_signals() as received:
            for epoch in range(step // run.steps_per_epoch, cfg.epochs):
                view = epoch % cfg.teacher_views if run.codes else epoch
                view_codes = run.codes[view] if run.codes else None
                order = data.epoch_order(len(run.store), cfg.seed, epoch)
                parts = data.batch_rows(order, cfg.batch_size, rank, world)
                rest = parts[step % run.steps_per_epoch :]  # of an epoch that was interrupted
                for images, codes, index in batches(run, rest, view_codes):
                    recent.append(train_step(run, images, codes, index, epoch, view, step))
                    step += 1
                    stopping = must_stop(run, step, received)
                    if step % cfg.log_every == 0 or step % run.steps_per_epoch == 0 or stopping:
                        report(run, step, recent, stopping)
                        recent.clear()
                        if rank == 0:
                            save_due(run, step, stopping)
                    if stopping:
                        log.info(f"stopped after step {step}; run the same command to continue")
                        if world > 1:
                            dist.barrier()  # torchrun ends the others when the first one leaves
                        raise SystemExit(128 + (received or [signal.SIGTERM])[0])
        if rank == 0:
            export(run)
    latest, last = f"{cfg.run_path}/checkpoint_latest.pth", run.history[-1]
    log.info(f"done. Evaluate with: python eval.py {latest}")
    if cfg.eval_at_end and rank == 0:
        last |= dict(eval=evaluation.main(EvalConfig((latest,), overrides=cfg.settings(True))))
    return last

if __name__ == "__main__":
    cli(main, Config)
