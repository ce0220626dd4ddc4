"""Distil a frozen DINOv2 into a small student, from unlabelled images.

    python train.py --preset demo                           # everything, offline, on a laptop CPU
    python train.py --dataset cifar10 --epochs 50           # DINOv2 ViT-B/14 -> ViT-S/16, one GPU
    torchrun --nproc_per_node=4 train.py --dataset cifar10  # on four GPUs

The teacher embeds a few views (crops) of every image once, into a cache. Each step then cuts one
view out of each image of a batch, embeds it with the student, and pulls the student's embeddings
towards the teacher's. The same command continues an interrupted run, on a CPU to the
same bits. Writes config.json, train.log, metrics.jsonl, checkpoints, and student.safetensors, which
timm loads."""

from config import Config, EvalConfig, UserError, cli, log, reason, validate, write_atomically

# isort: split
# config comes before torch: it sets how torch's threads wait.
import gc
import json
import logging
import math
import os
import random
import resource
import signal
import sys
import textwrap
from collections import defaultdict
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic, time_ns

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

import data
import eval as evaluation
import model as models

FIT_IMAGES = 4096  # on which the heads' means and axes are measured
SAVE_SECONDS = 300  # between two writes of checkpoint_latest.pth
QUICK_EVAL = 10_000, 2_000  # training and test images of --eval_every
DEVICE_SHARE = 0.5  # fill at most this share of a GPU's free memory with images and targets
BACKENDS = dict(cpu="gloo", cuda="cpu:gloo,cuda:nccl")  # of several processes; see `must_stop`
OWN = {*"epoch step lr images_per_s seconds memory_gb eval".split()}  # of a line of metrics.jsonl
NO_TERMS = OWN | {"similarity", "norm", "test_similarity"}  # those are in no line of train.log
MOMENTUM = 0.95  # of Muon
STOP_STEPS = 10  # several processes agree every so many steps whether to stop


def main(cfg: Config, objective=models.Distiller) -> dict:
    """Train; returns the last metrics, with eval_at_end also the evaluation's rows.
    Raises UserError for what the user can fix, SystemExit(128 + signal) when stopped."""
    validate(cfg, "dataset", "eval_dataset")
    with processes(cfg) as (rank, world, device), ExitStack() as stack:
        # ------------------------------------------------------------ networks and images
        saved, cfg = find_checkpoint(cfg, rank)  # None: a new run
        student = models.build_student(cfg, saved and saved["student"])  # before a download
        teacher = models.load_teacher(cfg).to(device)
        store = data.open_store(cfg, cfg.train_split, cfg.max_samples)
        distiller = objective(student.train(), teacher, cfg).to(device)  # student, heads and loss
        steps_per_epoch = math.ceil(len(store) / cfg.batch_size)

        # ------------------------------------------------------------ optimiser and precision
        dtype = models.pick_dtype(cfg.precision, device)
        groups = distiller.parameter_groups(cfg.weight_decay)
        for group in groups:  # a fork's may lack it
            group.setdefault("weight_decay", cfg.weight_decay)
        if cfg.optimiser == "muon":
            optimiser = Muon(groups, cfg.lr, dtype)
        else:
            optimiser = torch.optim.AdamW(groups, cfg.lr, fused=True)
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

        # ------------------------------------------------------------ what the two networks see
        def cut(stored, view, index, size):
            """Stored images uint8 [B, 3, S, S] -> their view `view`: [B, 3, size, size]."""
            boxes, flips = data.view_crops(index, cfg.seed, view, cfg.crop_scale)
            images = data.render(stored, size, boxes, flips)
            return distiller.shared_view(images, view, index)

        @torch.inference_mode()
        def teach(stored, view, index):
            """The teacher's Features of the same view."""
            images = cut(stored, view, index, cfg.teacher_size)
            with autocast:
                return distiller.embed(teacher, images)

        # ------------------------------------------------------------ continue a run, or begin one
        identity = dict(objective=objective.__qualname__, optimiser=type(optimiser).__name__,
                        images=store.fingerprint, teacher=teacher.fingerprint)
        check_agreement(cfg, saved, identity, dtype)
        journal = Journal(cfg, saved, rank, device)
        journal.header(store, teacher, student, dtype, steps_per_epoch, world, saved)
        parts = dict(objective=distiller, optimiser=optimiser, scaler=scaler)  # of a checkpoint
        check_groups(cfg, distiller, parts)
        if saved:
            restore(saved, parts)
        else:  # measure the mean and the principal axes of what the teacher outputs
            distiller.fit(sample_features(distiller, teach, store, device))
            broadcast(distiller)  # the same bits everywhere, as they name the cache
        step = saved["step"] if saved else 0
        compile_networks(cfg, distiller, teacher, device)

        # ------------------------------------------------------------ the teacher embeds each view
        targets = []
        if cfg.teacher_views and step < cfg.epochs * steps_per_epoch:
            targets = cache_targets(cfg, distiller, teach, identity, dtype, store, device)
            teacher = None  # it leaves: its targets are read from now on
            use_gpu_memory(device, store.images, *targets)

        # ------------------------------------------------------------ training
        received = stop_signals(stack)  # before this, Ctrl-C ends it at once
        stack.enter_context(journal.start(step, cfg.epochs * steps_per_epoch))
        for epoch in range(step // steps_per_epoch, cfg.epochs):
            view = epoch % len(targets) if targets else epoch
            arrays = [store.images, targets[view]] if targets else [store.images]
            order = data.epoch_order(len(store), cfg.seed, epoch)
            share = data.batches(order, cfg.batch_size, rank, world)
            share = share[step % steps_per_epoch :]  # of an epoch that was interrupted
            for index, stored, *cached in data.read(share, device, *arrays):
                seed_everything(cfg.seed, step, rank)  # a continued run repeats dropout and masks
                if cached:
                    target = data.dequantise(cached[0])  # float32 [B, 1 + N, D]
                else:
                    target = distiller.targets(teach(stored, view, index))
                images = cut(stored, view, index, cfg.student_size)
                images = distiller.student_view(images, epoch, index)
                rate = learning_rate(step, steps_per_epoch, cfg)
                for group in optimiser.param_groups:
                    group["lr"] = rate * group.get("lr_scale", 1)
                distiller.zero_grad()
                with autocast:
                    loss, stats = distiller(images, target)
                scaler.scale(loss).backward()
                average_gradients(distiller)
                scaler.unscale_(optimiser)
                norm = clip_grad_norm_(distiller.parameters(), cfg.grad_clip or math.inf)
                scaler.step(optimiser)
                scaler.update()
                distiller.after_step(step)
                journal.add(stats, loss=loss, norm=norm)  # stays on the device
                step += 1
                stopping = must_stop(received, step)
                if stopping or step % cfg.log_every == 0 or step % steps_per_epoch == 0:
                    line = journal.average(step, steps_per_epoch, rate, scaler)  # the host waits
                    if rank == 0:
                        journal.write(line, distiller.evaluated)
                        journal.save(line, stopping, identity, distiller, parts)
                if stopping:
                    leave(cfg, step, received)
        if rank == 0:
            export(cfg, distiller.evaluated)
        barrier()  # all leave together, after rank 0 has written
    if not cfg.eval_at_end:
        log.info(f"done. Evaluate with: python eval.py {cfg.run_path}")
    elif rank == 0:
        journal.history[-1]["eval"] = evaluation.main(EvalConfig((str(cfg.run_path),)), cfg)
    return journal.history[-1]


# ================================================================ before the loop


def find_checkpoint(cfg, rank):
    """The checkpoint that the run continues from, as rank 0 has it, or None for a new run; and cfg
    with its student_weights, which may be left out. Raises UserError where settings have changed
    that may not."""
    latest, saved = cfg.run_path / "checkpoint_latest.pth", None
    if rank == 0 and cfg.resume and latest.exists():
        saved, before = models.load_checkpoint(latest)
        settings = cfg.fixed_settings()
        if cfg.student_weights:
            settings["student_weights"] = cfg.student_weights
        refuse_changes(f"{cfg.run_path} holds a run with other settings; see --run_dir and "
                       "--no_resume", vars(before), settings)
        if saved["epoch"] > cfg.epochs:
            raise UserError(f"--epochs {cfg.epochs}: the run in {cfg.run_path} has already had "
                            f"{saved['epoch']:g}")
    saved = from_rank_0(saved)
    if saved:
        cfg = replace(cfg, student_weights=saved["config"].get("student_weights", ""))
    return saved, cfg


def check_agreement(cfg, saved, identity, dtype):
    """Raise UserError if the run to be continued is of other images, or of another teacher,
    objective or optimiser, or if the processes differ in these, in settings or in precision."""
    if saved:  # an older checkpoint may lack a part of the identity
        refuse_changes(f"{cfg.run_path} holds a run of other images (decoded, in order), "
                       "another teacher, objective or optimiser; see --run_dir and --no_resume",
                       identity | saved["identity"], identity)
    if not identity["teacher"]:
        raise UserError("load_teacher has to set fingerprint, which names the teacher's weights")
    own = cfg.fixed_settings() | identity  # of the teacher the digest, not the name
    own |= dict(dtype=str(dtype), epochs=cfg.epochs, log_every=cfg.log_every)
    refuse_changes("all processes need the same command, images and hardware; of the first",
                   from_rank_0(own), own)


def refuse_changes(message, before, now):
    """Raise UserError with the settings that differ, if any do."""
    changed = [f"\n  - {name}: {before.get(name)!r}, now {value!r}"
               for name, value in now.items() if before.get(name) != value]
    if changed:
        raise UserError(message + "".join(changed))


def from_rank_0(value):
    """What rank 0 has, on all processes."""
    shared = [value]
    if dist.is_initialized():  # several processes
        dist.broadcast_object_list(shared, 0)
    return shared[0]


def check_groups(cfg, distiller, parts):
    """Say which parameters no optimiser of `parts` has. Raises UserError for a group's own rate,
    and for a student that could not be built again."""
    if [*distiller.student.net.state_dict()] != distiller.student.names:
        raise UserError("student.net has other weights than timm builds it with: register them in "
                        "the fork, or a model of your own with timm")
    if any(group["lr"] != cfg.lr for group in parts["optimiser"].param_groups):
        raise UserError("parameter_groups: lr_scale, which multiplies --lr, in place of lr")
    learning = set()
    for part in parts.values():
        for group in getattr(part, "param_groups", []):
            learning |= {*group["params"]}
    left_out = [name for name, p in distiller.named_parameters()
                if p.requires_grad and p not in learning]
    if left_out:
        log.warning(f"parameter_groups leaves out {len(left_out)} parameters, which will not "
                    f"learn, such as {left_out[0]}")


def restore(saved, parts):
    """Load what a checkpoint holds of each part."""
    for name, part in parts.items():
        with models.naming(f"{saved['path']} is of other code: its {name} does not fit"):
            if saved[name]:  # the scaler's is empty but in fp16
                part.load_state_dict(saved[name])


def sample_features(distiller, teach, store, device):
    """The teacher's Features of some images, with a few places of each: float32, all at once."""
    rows = data.epoch_order(len(store), distiller.cfg.seed, 0)[:FIT_IMAGES]
    generator = torch.Generator().manual_seed(0)
    sampled = []
    parts = data.progress(data.chunks(rows), "the teacher's mean and axes")
    for index, stored in data.read(parts, device, store.images):
        features = distiller.on_student_grid(teach(stored, 0, index))
        sampled.append(models.some_places(features, generator))
    return features._make(models.finite(torch.cat(parts)) for parts in zip(*sampled, strict=True))


def broadcast(module):
    """Give all processes rank 0's parameters and buffers."""
    if dist.is_initialized():
        for value in module.state_dict().values():
            dist.broadcast(value, 0)


def compile_networks(cfg, distiller, teacher, device):
    """torch.compile in place, so that names stay plain; eager where nothing can compile. On CUDA
    the student's step becomes CUDA graphs (results/speed/first_version.txt)."""
    cuda = device.type == "cuda"
    if cfg.compile == "off" or cfg.compile == "auto" and not cuda:
        return
    try:
        torch._dynamo.config.skip_nnmodule_hook_guards = False  # or a fork's hooks get lost
        torch.compile(torch.sin)(torch.ones(1, device=device))
    except Exception as error:  # no compiler, no Triton, an old GPU
        log.warning(f"not compiled: {reason(error)}")
        return
    distiller.compile(mode="reduce-overhead" if cuda else None)
    if hasattr(teacher.net, "cls_token"):  # a ViT, whose blocks are alike and compile once
        for block in getattr(teacher.net, "blocks", []):
            block.compile(dynamic=False)


class Muon(torch.optim.AdamW):
    """AdamW, but for matrices and kernels [out, in * h * w]: the update is their momentum, made
    orthogonal (Jordan et al. 2024) in `dtype` and as large as one of AdamW (Liu et al. 2025)."""

    def __init__(self, groups, lr, dtype):
        super().__init__(groups, lr)
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr = group["lr"]
            for p in group["params"]:
                if p.grad is None or p.ndim not in (2, 4):
                    continue
                state = self.state[p]
                if not state:  # AdamW wants a step in each when it loads them
                    state.update(step=torch.zeros(()), momentum=torch.zeros_like(p))
                momentum = state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
                ahead = p.grad.lerp(momentum, MOMENTUM)  # Nesterov's
                update = orthogonal(ahead.flatten(1), self.dtype)
                p.mul_(1 - lr * group["weight_decay"])
                p.sub_(0.2 * lr * max(update.shape) ** 0.5 * update.view_as(p))
                p.grad = None  # which AdamW passes over
        super().step()


def orthogonal(matrix, dtype):
    """About the nearest orthogonal matrix, by five Newton-Schulz steps."""
    if len(matrix) > matrix.shape[1]:  # the squares below are then the smaller ones
        return orthogonal(matrix.mT, dtype).mT
    x = (matrix / (matrix.norm() + 1e-7)).to(dtype)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.to(matrix)


# ================================================================ the cache of targets


def cache_targets(cfg, distiller, teach, identity, dtype, store, device):
    """The targets of each view, filled unless an earlier run has done it: a list of `data.Rows`,
    int8 [I, T, D + 2]. Shards are filled by whichever process is free. Raises UserError if the
    first targets of the first or the last cached view are not what is computed now, by token."""
    size = min(data.CHUNK * (4 if device.type == "cuda" else 1), cfg.batch_size)
    count = min(cfg.teacher_views, cfg.epochs)
    shards = data.chunks(np.arange(len(store)), data.SHARD)

    def compute(view, rows):
        parts = data.batches(rows, size)  # of one size, for torch.compile
        bar = data.progress(parts, f"targets of view {view + 1} of {count}")
        for index, stored in data.read(bar, device, store.images):
            yield distiller.targets(teach(stored, view, index))

    first = np.resize(shards[0], size)
    sample = next(compute(0, first)).cpu()
    T, D = sample.shape[1:]
    length = T * (D + 2)

    def fill(view, rows, path):
        with open(path, "wb") as file:
            for targets in compute(view, rows):
                quantised = data.quantise(models.finite(targets))
                file.write(quantised.cpu().numpy())
            file.truncate(len(rows) * length)  # the first images filled up the last part

    key = [identity["images"], identity["teacher"], dtype, len(store), T, D]
    folder = cache_folder(cfg, distiller, key)
    jobs = [(folder / f"view_{view}_{number}.i8", view, rows)
            for view in range(count) for number, rows in enumerate(shards)]
    missing = sum(len(rows) for file, _, rows in jobs if not file.exists())
    log.info(f"targets   {missing} of {count * len(store)} crops are to be embedded\n"
             f"          {length * count * len(store) / 1e9:.2f} GB in {folder}")
    data.check_space(cfg.cache_dir, length * missing, "--teacher_views")
    known = [(file, view) for file, view, rows in jobs if file.exists() and rows[0] == 0]
    for file, view in {*known[:1], *known[-1:]}:  # before others are filled beside them
        target = next(compute(view, first)).cpu() if view else sample
        shape = len(shards[0]), T, D + 2
        cached = data.Rows([file], torch.int8, shape)
        check_cached(folder, cached[first], target)
    for wait in (False, True):  # first what no other process is at
        for file, view, rows in jobs:
            data.make_once(file, partial(fill, view, rows), wait)
    return [data.Rows([file for file, own, _ in jobs if own == view], torch.int8,
                      (len(store), T, D + 2)) for view in range(count)]


def check_cached(folder, cached, target):
    """Raise UserError if cached targets, int8, are not what is computed now, by token."""
    difference = data.dequantise(cached) - target
    error = difference.square().sum((0, 2))
    size = target.square().sum((0, 2))
    if (error > 0.02 * size).any():  # a cosine below 0.99
        raise UserError(f"{folder} holds targets of other code: delete it")


def cache_folder(cfg, distiller, key):
    """The folder of cached targets: its name is a hash of what determines them."""
    methods = "embed", "shared_view", "on_student_grid", "targets"
    key += [getattr(distiller, name).__qualname__ for name in methods]
    heads = [module for module in distiller.modules() if isinstance(module, models.Head)]
    key += [cfg.seed, cfg.teacher_size, cfg.crop_scale]
    key += [(head.kind, head.whiten, type(head).target.__qualname__) for head in heads]
    name = data.digest(str(key))
    fitted = data.digest("", [value for head in heads for value in head.buffers()])
    folder = Path(cfg.cache_dir, "targets", f"{name}-{fitted[:6]}")
    if not folder.exists() and list(folder.parent.glob(f"{name}-*")):
        log.info("targets   of the same images and teacher are there for other heads: another "
                 "machine or number of threads measures other last digits")
    return folder


def use_gpu_memory(device, *arrays):
    """On a GPU, move the arrays to its memory if they fit beside what a step takes."""
    if device.type == "cuda":
        gc.collect()  # compiled blocks keep the teacher alive until then
        torch.cuda.empty_cache()
        if sum(array.nbytes for array in arrays) < DEVICE_SHARE * torch.cuda.mem_get_info()[0]:
            for array in arrays:
                array.move(device)


# ================================================================ in the loop


def seed_everything(seed, step, rank):
    """Seed what a step may draw from: torch, numpy and Python."""
    sequence = np.random.SeedSequence([data.STEP, seed, step, rank])
    number = int(sequence.generate_state(1)[0])
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def learning_rate(step, steps_per_epoch, cfg):
    """Linear warm-up, then half a cosine from cfg.lr to 0."""
    total = cfg.epochs * steps_per_epoch
    warmup = min(int(cfg.warmup_epochs * steps_per_epoch), total // 5)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    done = (step - warmup) / (total - warmup)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * done))


def average_gradients(module):
    """Over all processes, by one all-reduce: DistributedDataParallel rules out CUDA graphs."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    sizes = [gradient.numel() for gradient in gradients]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / dist.get_world_size()
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, flat.split(sizes), strict=True):
        gradient.copy_(mean.view_as(gradient))


class Journal:
    """What the run folder and the terminal get: log, metrics, settings, checkpoints, evaluations.
    All processes `average`; rank 0 alone writes, and moves the folder of an older run aside."""

    def __init__(self, cfg, saved, rank, device):
        self.cfg, self.device = cfg, device
        self.history = saved["history"] if saved else []  # the lines of metrics.jsonl
        self.recent = defaultdict(list)  # statistics since the last line, on the device
        terminal = logging.StreamHandler(DummyTqdmFile(sys.stdout))  # its lines stand above bars
        log.handlers, log.propagate = [terminal], False
        log.setLevel(logging.INFO if rank == 0 else logging.ERROR)
        if rank == 0:
            if cfg.eval_every or cfg.eval_at_end:  # first, as it may fail
                self.evaluator = evaluation.Evaluator(cfg, *QUICK_EVAL, new=False)
            folder = cfg.run_path
            if folder.exists() and not cfg.resume:
                folder.rename(f"{folder}.old-{time_ns()}")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(json.dumps(vars(cfg), indent=1) + "\n")
            log.addHandler(logging.FileHandler(folder / "train.log", errors="replace"))
            if cfg.eval_every:
                log.info(self.evaluator)

    def header(self, store, teacher, student, dtype, steps_per_epoch, world, saved):
        """State what the run is."""
        cfg, total = self.cfg, self.cfg.epochs * steps_per_epoch
        settings = {name: value for name, value in vars(cfg).items()
                    if value != getattr(Config, name)}
        settings = textwrap.fill(f"settings  {listed(settings) or 'all as by default'}", 80,
                                 subsequent_indent="          ", break_on_hyphens=False)
        log.info(f"data      {cfg.dataset}: {len(store)} images of {store.size} px\n"
                 f"          {store.summary}\n"
                 f"teacher   {cfg.teacher}: {teacher}\n"
                 f"student   {cfg.student}: {student}\n"
                 f"training  {cfg.epochs} epochs of {steps_per_epoch} steps, {dtype}, processes: "
                 f"{world}\n"
                 f"machine   {listed(models.environment(self.device))}\n"
                 f"{settings}\n"
                 f"run       {cfg.run_path}")
        if saved:
            log.info(f"continuing at step {saved['step']}, written at commit {saved['commit']}")
        elif total < 1000:
            log.warning(f"          {total} steps teach little, a few thousand more: "
                        "raise --epochs or lower --batch_size")
        elif len(store) < 1000:
            log.warning(f"          {len(store)} images teach little: see docs/faq.md")

    def start(self, step, total):
        """Training begins: speeds, the time left and that of the next checkpoint count from now."""
        self.logged_at = self.saved_at = monotonic()
        self.bar = data.progress(total=total, initial=step, desc=f"{self.cfg.epochs} epochs")
        return self.bar

    def add(self, stats, **others):
        """Statistics of a step. Copies: the next replay of a CUDA graph overwrites them.
        Raises UserError for a name that a line has already."""
        self.bar.update()
        if taken := stats.keys() & (others.keys() | OWN):
            raise UserError(f"what losses returns needs another name: {', '.join(taken)}")
        for name, value in (others | stats).items():
            self.recent[name].append(torch.as_tensor(value).detach().clone())

    def average(self, step, steps_per_epoch, rate, scaler):
        """A line: the statistics since the last one, averaged; the host waits for the device here.
        Raises UserError where they are not finite; fp16 skips steps whose gradients are not."""
        seconds = monotonic() - self.logged_at
        self.logged_at += seconds
        speed = len(self.recent["loss"]) * self.cfg.batch_size / seconds
        if self.history:
            seconds += self.history[-1]["seconds"]
        line = dict(epoch=step / steps_per_epoch, step=step, lr=rate, images_per_s=speed,
                    seconds=seconds, memory_gb=models.peak_memory(self.device))
        for name, values in self.recent.items():
            values = torch.stack(values)
            if scaler.is_enabled():
                values = values[values.isfinite()]
            mean = values.float().mean()
            if dist.is_initialized():
                mean /= dist.get_world_size()
                dist.all_reduce(mean)
            line[name] = mean.item()
        self.recent.clear()
        loss, norm = line["loss"], line["norm"]
        if not math.isfinite(loss + norm) and scaler.get_scale() <= 1:  # 1 if disabled
            raise UserError(f"loss {loss}, norm {norm} before step {step}: lower --lr, or "
                            "--precision fp32")
        line = {name: value if math.isfinite(value) else None for name, value in line.items()}
        self.history.append(line)
        return line

    def write(self, line, student):
        """Write a line of metrics.jsonl; at the end of an epoch also one for people, after some
        epochs with the accuracy of the student. `line` is the last of the history, too."""
        cfg, epoch = self.cfg, line["epoch"]
        if cfg.eval_every and epoch % cfg.eval_every == 0:
            modes = {module: module.training for module in student.modules()}
            try:
                features = self.evaluator.features(student)
                quick = self.evaluator.evaluate(*features, probe=False)
                line |= {f"test_{name}": value for name, value in quick.items()}
            except UserError as error:  # an overflow in fp16 need not end the run
                log.warning(f"not evaluated: {error}")
            for module, mode in modes.items():
                module.training = mode  # a fork may keep some in evaluation mode
            self.logged_at = monotonic()
        if epoch.is_integer():
            terms = [f"{name} {value:.4f}" for name, value in line.items()
                     if name not in NO_TERMS and value is not None]
            clock = tqdm.format_interval(line["seconds"])
            log.info(f"epoch {epoch:4.0f} of {cfg.epochs}  {'  '.join(terms)}  "
                     f"{line['images_per_s']:6.0f} images/s  {clock}")
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        write_atomically(cfg.run_path / "metrics.jsonl", lambda path: path.write_text(lines))

    def save(self, line, stopping, identity, distiller, parts):
        """Write checkpoint_epoch_N.pth if it is kept, then checkpoint_latest.pth if it is due. The
        student is saved twice: a fork may evaluate another network than the one it trains. A run
        that stops also exports it, after the checkpoints."""
        cfg, epoch = self.cfg, line["epoch"]
        kept = epoch in (1, cfg.epochs) or (cfg.save_every and epoch % cfg.save_every == 0)
        names = [f"checkpoint_epoch_{epoch:g}.pth"] if kept else []
        if kept or stopping or monotonic() - self.saved_at > SAVE_SECONDS:
            names.append("checkpoint_latest.pth")
            self.saved_at = monotonic()
            weights = distiller.evaluated.net.state_dict().values()
            if any(value.isnan().any() for value in weights):  # fp16 leaves some in batch norms
                raise UserError("weights of the student are NaN: --precision fp32")
        for name in names:
            models.save_checkpoint(
                cfg.run_path / name, step=line["step"], epoch=epoch, history=self.history,
                student=distiller.evaluated.net.state_dict(), identity=identity,
                config=vars(cfg), commit=models.environment(self.device)["commit"],
                **{name: part.state_dict() for name, part in parts.items()})
        if stopping:
            export(cfg, distiller.evaluated)


def listed(pairs):
    """'epochs 5, lr 0.1'"""
    return ", ".join(f"{name} {value}" for name, value in pairs.items())


# ================================================================ the end, and several processes


def export(cfg, student):
    """student.safetensors: weights under timm's names; the metadata states how to use them."""
    how = dict(model=cfg.student, args=student.arguments, image_size=cfg.student_size,
               mean=student.mean.flatten().tolist(), std=student.std.flatten().tolist())
    weights = {name: value.clone(memory_format=torch.contiguous_format).cpu()  # some are shared
               for name, value in student.net.state_dict().items()}
    content = save(weights, metadata=dict(student=json.dumps(how)))
    write_atomically(cfg.run_path / "student.safetensors", lambda path: path.write_bytes(content))


@contextmanager
def processes(cfg):
    """Lock the run folder, join torchrun's process group if there is one -> rank, world, device."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.batch_size % world:
        raise UserError(f"--batch_size {cfg.batch_size} is not a multiple of {world} processes")
    device = models.pick_device(cfg.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group(BACKENDS[device.type])
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(OSError, ValueError):  # each shard of targets stays open
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    path = cfg.run_path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with data.locked(f"{path}.lock", wait=False) if rank == 0 else nullcontext():
        try:
            yield rank, world, device
        except RuntimeError as error:
            if "gloo" not in str(error):
                raise
            raise UserError("another process has ended or is out of reach: see what it printed; "
                            "the same command, without --no_resume, continues "
                            f"({reason(error)[-80:]})") from error
    if world > 1:
        dist.destroy_process_group()


def barrier():
    """Wait for all processes: torchrun ends the others when the first one fails."""
    if dist.is_initialized():
        dist.barrier()


def stop_signals(stack):
    """A list that collects SIGINT and SIGTERM until `stack` closes. A second Ctrl-C ends the
    process; torchrun and SLURM send each signal twice as a matter of course."""
    received = []

    def receive(number, frame):
        received.append(number)
        if number == signal.SIGINT and "RANK" not in os.environ:
            signal.signal(number, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        stack.callback(signal.signal, number, signal.signal(number, receive))
    return received


def must_stop(received, step):
    """Whether to stop after this step; all processes return the same."""
    if not dist.is_initialized():
        return bool(received)
    if step % STOP_STEPS:
        return False
    flag = torch.tensor([len(received)])  # on the CPU: no GPU has to wait
    dist.all_reduce(flag)
    return bool(flag)


def leave(cfg, step, received):
    """End the process after a signal to any of the processes."""
    advice = "" if cfg.resume else ", without --no_resume"
    log.info(f"stopped after step {step}; run the same command to continue{advice}")
    barrier()
    raise SystemExit(128 + max(received, default=signal.SIGTERM))


if __name__ == "__main__":
    cli(main, Config)
