"""Distil a frozen DINOv2 into a small student, from unlabelled images.

    python train.py --preset demo                           # everything, offline, on a laptop CPU
    python train.py --dataset cifar10 --epochs 50           # DINOv2 ViT-B/14 -> ViT-S/16, one GPU
    python train.py --dataset ../my_images --student resnet18
    torchrun --nproc_per_node=4 train.py --dataset cifar10  # the same losses on four GPUs

Each step: cut one view out of each image of a batch, show it to the student, show it to the teacher
or look up what that said of it before, and pull the student's CLS and patch embeddings towards the
teacher's. The same command continues an interrupted run, from any step, with the weights it would
have had.

Writes into the run folder: config.json, train.log, metrics.jsonl, views.png, checkpoint_latest.pth,
checkpoint_epoch_N.pth, and at the end student.safetensors, which plain timm loads.
"""

import contextlib
import dataclasses
import datetime
import functools
import json
import logging
import math
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import data
import eval as evaluation
import model as models
from config import FREE_ON_RESUME, Config, EvalConfig, UserError, cli, reason, validate

STAT_IMAGES = 4096  # images on which the heads' means and axes are measured
SAVE_SECONDS = 10, 600  # shortest and longest time between two writes of checkpoint_latest.pth
QUICK_EVAL = 10_000, 2_000  # training and test images of --eval_every
COLLAPSED, DIVERSE = 0.95, 0.8  # warn of a student spread above, with a target spread below
BETAS = 0.9, 0.999
RANK_WAIT = datetime.timedelta(hours=1)  # for another process: it may be decoding, or judging

log = logging.getLogger("distill")


def learning_rate(step: int, steps_per_epoch: int, cfg: Config) -> float:
    """Linear warm-up, then half a cosine from cfg.lr to cfg.min_lr."""
    total = cfg.epochs * steps_per_epoch
    warmup = min(int(cfg.warmup_epochs * steps_per_epoch), total // 5)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(module: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Decay for matrices and kernels; none for biases, norms, position tables and class tokens."""
    decayed, plain = dict(params=[], weight_decay=weight_decay), dict(params=[], weight_decay=0.0)
    for name, p in module.named_parameters():
        if p.requires_grad:
            token = name.endswith(("pos_embed", "cls_token", "reg_token"))
            (plain if p.ndim <= 1 or token else decayed)["params"].append(p)
    return [decayed, plain]


def write_atomically(path: Path, write) -> None:
    """Run write(temporary path), flush it to the disk, and only then give it its name.

    Raises UserError when it cannot be written; what had the name before is intact.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:  # torch and safetensors have errors of their own for a full disk
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {reason(error)}. Make space, then the same command "
                        "goes on from the last checkpoint") from error


class LogFile(logging.FileHandler):
    def handleError(self, record):
        raise  # a full disk; logging would print a traceback and go on


def open_log(run: Path, rank: int) -> None:
    """Log lines go to the terminal and to train.log; ranks other than 0 only complain."""
    log.handlers.clear()
    log.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    log.propagate = False
    files = [LogFile(run / "train.log")] if rank == 0 else []
    for handler in (logging.StreamHandler(sys.stdout), *files):
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)


def forget_after(step: int, path: Path) -> None:
    """Drop the lines of metrics.jsonl that a continued run will write again, and a torn one."""
    kept = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_atomically(path, lambda temporary: temporary.write_text("".join(kept)))


@contextlib.contextmanager
def stop_signals(alone: bool):
    """Collect SIGINT and SIGTERM instead of dying of them; alone, a later one stops at once.

    "Later" is by a second: `timeout` sends each signal twice. Under torchrun a later one means
    nothing: it hands on what SLURM has sent to everyone, and it ends everyone as soon as the first
    of them has ended.
    """
    received, times = [], []

    def on_signal(number, frame):
        received.append(number)
        times.append(time.monotonic())
        if alone and times[-1] - times[0] > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    previous = {each: signal.signal(each, on_signal) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def check_resumable(cfg: Config, saved: Config) -> None:
    """Raise UserError listing every setting that would change what the saved run is learning."""
    changed = [f"\n  - {f.name}: saved {getattr(saved, f.name)!r}, asked {getattr(cfg, f.name)!r}"
               for f in dataclasses.fields(Config) if f.name not in FREE_ON_RESUME
               and getattr(saved, f.name) != getattr(cfg, f.name)]
    if changed:
        raise UserError(f"{cfg.run_path} holds a run with other settings:{''.join(changed)}\n"
                        "Choose another --run_dir, or --no_resume to move that run aside.")


def check_ranks(mine: dict, world: int) -> None:
    """Raise UserError in every process unless all are about to do the same."""
    every = [None] * world
    dist.all_gather_object(every, mine)
    values = {name: sorted({str(one[name]) for one in every}) for name in mine}
    differ = "".join(f"\n  - {n}: {' or '.join(v)}" for n, v in values.items() if len(v) > 1)
    if differ:
        raise UserError("the processes differ, but every machine needs the same command, the same "
                        f"images and the same run folder:{differ}")


def tensorboard(run: Path, step: int):
    """A writer for TensorBoard where that is installed; it forgets what came after `step`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return contextlib.nullcontext()
    return SummaryWriter(run, purge_step=step + 1)


@functools.cache
def commit() -> str:
    """The git commit of this program, with "-dirty" if it was changed since, or "unknown"."""
    command = "git describe --always --dirty --abbrev=40 --exclude=*".split()
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True,
                              timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, no repository, no permission
        return "unknown"


def export(student: models.Backbone, cfg: Config, path: Path) -> None:
    """The student alone, under timm's names; the metadata says how to use it."""
    args = tuple(models.student_kwargs(cfg.student_args).items())
    args = models.describe(cfg.student, cfg.student_size, args)["arguments"]
    metadata = dict(
        model=cfg.student, args=json.dumps(args, default=str), image_size=cfg.student_size,
        mean=student.mean.flatten().tolist(), std=student.std.flatten().tolist(),
        pool=cfg.pool, embedding=student.embedding, teacher=cfg.teacher, dataset=cfg.dataset,
        commit=commit())
    weights = {name: value.contiguous().cpu() for name, value in student.net.state_dict().items()}
    metadata = {name: str(value) for name, value in metadata.items()}
    write_atomically(path, lambda temporary: save_file(weights, temporary, metadata))


def main(cfg: Config) -> dict:
    """Train; returns the last metrics, with eval_at_end also the evaluation's rows.

    Raises UserError for what the user can mend, SystemExit(128 + signal) when told to stop.
    """
    validate(cfg, models.problems)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = models.pick_device(cfg.device)
    cfg.run_path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{cfg.run_path}.lock", timeout=0) if rank == 0 else contextlib.nullcontext()
    try:
        if world > 1 and not dist.is_initialized():  # first: whoever fails then ends the others
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=RANK_WAIT)
        with lock:
            return fit(cfg, device, rank, world)
    except Timeout:
        raise UserError(f"another process is training in {cfg.run_path}: choose another --run_dir, "
                        "or wait for it") from None
    except RuntimeError as error:
        if world > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise UserError(
                f"process {rank} of {world} has lost the others: one was killed, or has said why "
                f"it ended; the same command goes on ({reason(error)})") from error
        raise


def fit(cfg: Config, device: torch.device, rank: int, world: int) -> dict:
    """The run, front to back; `main` has seen that it is the only one in its folder."""
    # ---------------------------------------------------------------- where
    dtype = models.pick_dtype(cfg.precision, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32
    run, latest, saved = cfg.run_path, cfg.run_path / "checkpoint_latest.pth", None
    if cfg.resume and latest.exists():
        saved, saved_cfg = evaluation.read_checkpoint(latest)
        check_resumable(cfg, saved_cfg)

    # ---------------------------------------------------------------- what
    size_limit = max(cfg.teacher_size, cfg.student_size)
    store = data.open_store(cfg, cfg.train_split, size_limit, cfg.max_samples)
    samples = min(cfg.samples_per_epoch or len(store), len(store))
    steps_per_epoch = -(-samples // cfg.batch_size)
    total_steps = cfg.epochs * steps_per_epoch
    if samples < cfg.batch_size:
        raise UserError(f"an epoch has {samples} images, fewer than --batch_size {cfg.batch_size}")
    teacher = models.load_teacher(cfg.teacher, cfg.teacher_size, cfg.teacher_weights)
    made_of = dict(store=store.path.name, teacher=models.fingerprint(teacher))
    for what, name in made_of.items():
        if saved and saved[what] != name:
            which = cfg.dataset if what == "store" else f"the weights of {cfg.teacher}"
            raise UserError(f"{run} holds a run with another {what} (saved {saved[what]}, asked "
                            f"{name}): {which} may have changed. Choose another --run_dir, or "
                            "--no_resume to move that run aside.")
    teacher.to(device)
    if world > 1:
        here = dict(cache_dir="", num_workers=0, teacher_weights="")  # may differ
        mine = dataclasses.asdict(dataclasses.replace(cfg, **here))
        check_ranks(mine | made_of | dict(continues=saved["step"] if saved else None), world)
    # Only now, with data and teacher at hand, is anything written that belongs to the run.
    if rank == 0:
        if not cfg.resume and run.exists():
            run.rename(f"{run}.old-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}")
        run.mkdir(parents=True, exist_ok=True)
    open_log(run, rank)
    log.info(f"python {platform.python_version()}, torch {torch.__version__}, timm "
             f"{timm.__version__}, {device.type} x {world}, {str(dtype).split('.')[1]}")
    log.info(f"commit {commit()}")
    log.info(" ".join(f"{k}={v!r}" for k, v in dataclasses.asdict(cfg).items()))
    student = evaluation.student_of(cfg).train()
    distiller = models.Distiller(student, teacher, cfg).to(device)
    groups = parameter_groups(distiller, cfg.weight_decay)
    optimiser = torch.optim.AdamW(groups, lr=cfg.lr, betas=BETAS, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if store.info["unreadable"]:
        log.info(f"{len(store.info['unreadable'])} unreadable images: {store.path / 'info.json'}")
    log.info(f"{cfg.dataset}: {len(store)} images, {store.size} px, {steps_per_epoch} steps/epoch")
    for who, net in (cfg.teacher, teacher), (cfg.student, student):
        log.info(f"{who}: {net.parameter_count / 1e6:.2f} M parameters, {net.image_size} px, grid "
                 f"{net.grid[0]}x{net.grid[1]}, width {net.embed_dim}")
    log.info(f"head {distiller.cls_head.kind}: targets are {distiller.cls_head.out_dim} wide")

    def belong_on_device(share: float, *files: data.RowFile) -> bool:
        free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else 0
        fit = sum(file.nbytes for file in files) < share * free
        return cfg.store_device == "device" or (cfg.store_device == "auto" and fit)

    # The stored images, and later the bank's answers, when they are kept on the device.
    resident = store.images.on(device, "images") if belong_on_device(1 / 4, store.images) else None
    bank = answers = None
    waited = 0.0  # seconds that the loop has waited for data

    def batches(epoch, samples, batch_size, *share):
        """Yields images on the device, index [B], and what the bank holds of this epoch's view."""
        nonlocal waited
        order = data.epoch_order(len(store), samples, cfg.seed, epoch)
        # Whatever is still on disk other processes read, that a GPU need not wait for it.
        on_disk = resident is None or (bank and not answers)
        workers = min(4, cfg.workers) if device.type == "cuda" and on_disk else 0
        loader = data.loader(store if resident is None else None, order, batch_size, *share,
                             workers=workers)
        begin = time.time()
        for images, index, stored in loader:
            if resident is None:
                images = data.to_device(images, device)
            else:
                images = resident[data.to_device(index, device)]
            waited += time.time() - begin
            yield images, index, stored
            begin = time.time()

    def ask_teacher(images, box):
        with torch.inference_mode(), autocast:
            return teacher(data.render(images, box, cfg.teacher_size))

    def view_of(number, index):
        return data.view(cfg.seed, number, index, (cfg.crop_scale, 1.0))

    def targets_of(images, index, box, number, stored):
        """Targets [B, T, K] of a view: out of the bank, where it has them."""
        if bank is None:
            return distiller.targets(ask_teacher(images, box))
        if answers:
            rows = data.to_device(index, device)
            return data.dequantise(*(part[rows] for part in answers[number]))
        tokens, scale = (data.to_device(part, device) for part in stored[:2])
        missing = (stored[2] == 0).nonzero()[:, 0]
        if len(missing):
            rows = data.to_device(missing, device)
            fresh = data.quantise(distiller.targets(ask_teacher(images[rows], box[missing])))
            bank.write(number, index[missing], *fresh)
            tokens[rows], scale[rows] = fresh
        return data.dequantise(tokens, scale)  # also what is new: a rerun is the same

    # ---------------------------------------------------------------- from where
    step, metrics = 0, {}
    if saved:
        step, metrics = saved["step"], saved["metrics"]
        with evaluation.refusing(latest):
            student.net.load_state_dict(saved["student"])
            distiller.heads.load_state_dict(saved["heads"])
            optimiser.load_state_dict(saved["optimiser"])
            if saved["scaler"]:  # of a run in fp16; --precision may have changed since
                scaler.load_state_dict(saved["scaler"])
            for p, moments in optimiser.state.items():  # their shapes torch does not compare
                if any(m.shape not in ((), p.shape) for m in moments.values()):
                    raise ValueError("its optimiser is of other shapes")
        log.info(f"continuing {latest} at step {step} of {total_steps}")
    elif rank == 0:  # the others receive the result when DDP wraps the module
        size = min(64, len(store))
        total = min(STAT_IMAGES, len(store)) // size
        first = batches(0, total * size, size)
        first = data.progress(first, "measuring the teacher", total * size, size)
        distiller.fit_heads(ask_teacher(images, view_of(0, i)) for images, i, _ in first)
    if cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda"):
        # In place, so that state-dict keys stay plain; as CUDA graphs, as a small student's steps
        # are mostly the time that Python takes to launch them.
        graphs = device.type == "cuda" and world == 1
        distiller.compile(mode="reduce-overhead" if graphs else None)
    module = distiller
    if world > 1:  # static_graph: conv nets may have layers that forward_features does not use
        module = DistributedDataParallel(distiller, static_graph=True)

    if 0 < cfg.teacher_views < cfg.epochs:
        key = models.fingerprint(*made_of.values(), *distiller.heads.buffers(), dtype,
                                 student.grid, cfg.seed, cfg.teacher_size, cfg.crop_scale)
        shape = 1 + math.prod(student.grid), distiller.cls_head.out_dim
        machine = os.environ.get("GROUP_RANK", "0")  # two cannot write into one file over a network
        folder = Path(cfg.cache_dir) / "banks" / (key + f"-{machine}" * (machine != "0"))
        bank = data.Bank(folder, cfg.teacher_views, len(store), *shape)

    def save(*paths: Path) -> None:
        state = dict(
            student=student.net.state_dict(), optimiser=optimiser.state_dict(),
            heads=distiller.heads.state_dict(), scaler=scaler.state_dict(), step=step,
            epoch=step / steps_per_epoch, metrics=metrics, config=dataclasses.asdict(cfg),
            **made_of)
        for path in paths:
            write_atomically(path, lambda temporary: torch.save(state, temporary))

    if rank == 0:
        (run / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1) + "\n")
        forget_after(step, run / "metrics.jsonl")

    # ---------------------------------------------------------------- the loop
    sums = torch.zeros(len(models.Distiller.STATS) + 2, device=device)  # + norm, + asked to stop
    logged, since, last_save, waited = step, time.time(), time.time(), 0.0
    progress = tqdm(total=total_steps, initial=step, unit="step", disable=rank > 0 or None)
    writer = contextlib.nullcontext() if rank else tensorboard(run, step)
    with (progress, logging_redirect_tqdm([log]), writer as board,
          stop_signals(alone=world == 1) as signals):
        for epoch in range(step // steps_per_epoch, cfg.epochs):
            first = step - epoch * steps_per_epoch
            number = epoch % cfg.teacher_views if bank else epoch  # of the view
            if bank and teacher and bank.complete():
                teacher = None  # it has said everything
                if belong_on_device(1 / 2, *bank.tokens):
                    answers = bank.on(device)
                log.info(f"epoch {epoch + 1}: the bank is complete, the teacher is dropped")
            share = first, rank, world, None if answers else bank, number
            for images, index, stored in batches(epoch, samples, cfg.batch_size, *share):
                box = view_of(number, index)
                targets = targets_of(images, index, box, number, stored)
                student_view = data.render(images, box, cfg.student_size)
                if step == rank == 0:
                    seen = data.render(images[:8], box[:8], cfg.teacher_size)
                    rows = (("image", images[:8] / 255), ("teacher's\nview", seen),
                            ("student's\nview", student_view[:8]))
                    page = evaluation.sheet(run / "views.png", rows)
                    if board:
                        board.add_image("views", np.asarray(page), dataformats="HWC")

                lr = learning_rate(step, steps_per_epoch, cfg)
                for group in optimiser.param_groups:
                    group["lr"] = lr
                # Dropout and drop path, if any, follow from the step: a resumed run repeats them.
                torch.manual_seed(cfg.seed * 2**32 + step * world + rank)
                optimiser.zero_grad(set_to_none=True)
                with autocast:
                    loss, stats = module(student_view, targets)
                scaler.scale(loss).backward()
                scaler.unscale_(optimiser)
                limit = cfg.grad_clip or math.inf
                norm = torch.nn.utils.clip_grad_norm_(distiller.parameters(), limit)
                scaler.step(optimiser)
                scaler.update()
                sums[:-2] += stats
                sums[-2] += norm
                step += 1
                progress.update()

                end_of_epoch = step % steps_per_epoch == 0
                if not (step % cfg.log_every == 0 or end_of_epoch or (signals and world == 1)):
                    continue
                # Once per log line: the only place where a step waits for the GPU.
                sums[-1] = len(signals)
                if world > 1:
                    dist.all_reduce(sums)
                # The last is above 0 as soon as any rank was told to stop.
                *means, norm, stopping = (sums / (step - logged) / world).tolist()
                seconds, images_seen = time.time() - since, (step - logged) * cfg.batch_size
                metrics = dict(zip(models.Distiller.STATS, means, strict=True), step=step,
                               epoch=step / steps_per_epoch, lr=lr, norm=norm,
                               images_per_s=images_seen / seconds, data=waited / seconds)
                # A norm may be infinite in fp16: the scaler then leaves the step out.
                if not math.isfinite(metrics["loss"] + (0 if scaler.is_enabled() else norm)):
                    raise UserError(
                        f"the loss became {metrics['loss']}, its gradient's norm {norm}, between "
                        f"steps {logged} and {step}, at learning rate {lr:.1e}. Try a lower --lr "
                        "or --precision fp32; the last good state is "
                        f"{latest if latest.exists() else 'the beginning'}")
                sums.zero_()
                eta = (total_steps - step) * seconds / (step - logged)
                logged, since, waited = step, time.time(), 0.0
                log.info(log_line(metrics, epoch, cfg.epochs, eta))
                alike = metrics["spread"] > COLLAPSED and metrics["target_spread"] < DIVERSE
                if alike and step > total_steps / 5:  # before, it has only just begun
                    log.warning("the student says nearly the same of every image: a collapse. "
                                "Try a lower --lr, or a longer --warmup_epochs")
                if rank == 0:
                    done = step // steps_per_epoch
                    if end_of_epoch and cfg.eval_every and done % cfg.eval_every == 0:
                        try:
                            bench = evaluation.Bench(cfg, *QUICK_EVAL)
                            quick = bench.judge(*bench.features(student), probe=False)
                            metrics = quick | metrics  # `spread` stays that of the batch
                            log.info(f"epoch {done}: k-NN {metrics.get('knn20', math.nan):.1%}")
                        except UserError as error:  # training goes on without it
                            log.warning(f"epoch {done}: no k-NN check: {error}")
                        student.train()
                    known = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
                    with open(run / "metrics.jsonl", "a") as file:
                        file.write(json.dumps(known) + "\n")
                    if board:
                        for name, value in metrics.items():
                            board.add_scalar(name, value, step)
                        board.flush()
                    due = cfg.save_every and done % cfg.save_every == 0 or step == total_steps
                    kept = [run / f"checkpoint_epoch_{done}.pth"] * bool(end_of_epoch and due)
                    shortest, longest = SAVE_SECONDS
                    wait = shortest if end_of_epoch else longest
                    if kept or stopping or time.time() - last_save > wait:
                        save(*kept, latest)  # in this order: killed in between, both come again
                        last_save = time.time()
                if stopping:
                    log.info(f"stopped after step {step}/{total_steps}; the same command goes on")
                    raise SystemExit(128 + (signals or [signal.SIGTERM])[0])

    # ---------------------------------------------------------------- take it away
    if world > 1:  # nobody waits for the evaluation
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        export(student, cfg, run / "student.safetensors")
        log.info(f"done. Evaluate with: python eval.py {latest}")
        if cfg.eval_at_end:
            evaluate = EvalConfig((str(latest),), device=cfg.device, precision=cfg.precision)
            metrics = metrics | dict(eval=evaluation.main(evaluate))
    return metrics


def log_line(m: dict, epoch: int, epochs: int, eta: float) -> str:
    """The README explains each figure."""
    left = f"{eta / 60:.0f}m" if eta >= 60 else f"{eta:.0f}s"
    return (f"epoch {epoch + 1}/{epochs} step {m['step']} | loss {m['loss']:.3f} "
            f"(cls {m['cls']:.3f} patch {m['patch']:.3f}) | cos {m['cos']:.3f} | "
            f"spread {m['spread']:.2f} | lr {m['lr']:.1e} | norm {m['norm']:.2f} | "
            f"{m['images_per_s']:.0f} img/s | data {m['data']:.0%} | eta {left}")


if __name__ == "__main__":
    cli(main, Config, models.problems)
