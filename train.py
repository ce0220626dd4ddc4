"""Distil a frozen DINOv2 into a small student, from unlabelled images.

    python train.py --preset demo                           # everything, offline, two minutes on a CPU
    python train.py --dataset cifar10 --epochs 50           # DINOv2 ViT-B/14 -> ViT-S/16, one GPU
    python train.py --dataset ../my_images --student resnet18
    torchrun --nproc_per_node=4 train.py --dataset cifar10  # same losses, four GPUs

Each step: cut one view out of every stored image, show it to the teacher, show it (with other
colours) to the student, and pull the student's CLS and patch embeddings towards the teacher's. The
same command continues an interrupted run, from any step, with the weights it would have had.

Writes into the run folder: config.json, train.log, metrics.jsonl, views.png,
checkpoint_latest.pth, checkpoint_epoch_N.pth, and at the end student.safetensors, which plain timm loads.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import platform
import signal
import sys
import time
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torchvision
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import data
import eval as evaluation
import model as models
from config import FREE_ON_RESUME, Config, EvalConfig, UserError, cli, validate

STAT_IMAGES = 4096  # images on which the heads' means and axes are measured
SAVE_SECONDS = 600  # longest time between two writes of checkpoint_latest.pth
QUICK_EVAL = 10_000, 2_000  # training and test images of --eval_every
COLLAPSED, DIVERSE = 0.95, 0.8  # warn when the student's spread is above while the targets' is below
BETAS = 0.9, 0.999

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
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    plain = {n for n, p in named if p.ndim <= 1 or n.endswith(("pos_embed", "cls_token", "reg_token"))}
    return [
        dict(params=[p for n, p in named if n not in plain], weight_decay=weight_decay),
        dict(params=[p for n, p in named if n in plain], weight_decay=0.0),
    ]


def write_atomically(path: Path, write) -> None:
    """Run write(temporary path), flush it to the disk, and only then give it its name."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def open_log(run: Path, main_rank: bool) -> None:
    """Log lines go to the terminal and train.log; other ranks only warn."""
    for old in log.handlers[:]:
        log.removeHandler(old)
        old.close()
    log.setLevel(logging.INFO if main_rank else logging.ERROR)
    log.propagate = False
    handlers = [logging.StreamHandler(sys.stdout)]
    if main_rank:
        handlers.append(logging.FileHandler(run / "train.log"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)


def check_resumable(cfg: Config, saved: Config) -> None:
    """Raise UserError listing every setting that would change what the saved run is learning."""
    fields = [f.name for f in dataclasses.fields(Config) if f.name not in FREE_ON_RESUME]
    changed = [n for n in fields if getattr(cfg, n) != getattr(saved, n)]
    if changed:
        lines = "".join(f"\n  - {n}: saved {getattr(saved, n)!r}, asked {getattr(cfg, n)!r}" for n in changed)
        raise UserError(
            f"{cfg.run_path} holds a run with other settings:{lines}\n"
            "Choose another --run_dir, or --no_resume to move the old run aside and start afresh."
        )


def views_figure(path: Path, images, teacher_view, student_view, count: int = 8) -> None:
    """What the first batch looked like: columns of source, teacher's view, student's view."""
    size = max(128, *(t.shape[-1] for t in (teacher_view, student_view)))
    rows = [data.render(images[:count], None, size)]
    rows += [torch.nn.functional.interpolate(v[:count], size=size, mode="nearest") for v in (teacher_view, student_view)]
    torchvision.utils.save_image(torch.cat(rows).cpu(), path, nrow=len(rows[0]), padding=4, pad_value=1)


def main(cfg: Config) -> dict:
    """Train; returns the last metrics (and the evaluation's rows with eval_at_end).

    Raises UserError for whatever the user can mend; SystemExit 128 + signal when told to stop.
    """
    validate(cfg, models.problems)

    # ------------------------------------------------------------------ where
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = models.pick_device(cfg.device)
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    dtype = models.pick_dtype(cfg.precision, device)
    torch.set_float32_matmul_precision("high")  # TF32 where float32 is left, on GPUs that have it
    run, latest = cfg.run_path, cfg.run_path / "checkpoint_latest.pth"
    saved = None
    if rank == 0 and not cfg.resume and run.exists():
        run.rename(run.with_name(f"{run.name}.old-{time.strftime('%Y%m%d-%H%M%S')}"))
    if world > 1:
        dist.barrier()
    if cfg.resume and latest.exists():
        saved, saved_cfg = evaluation.read_checkpoint(latest)
        check_resumable(cfg, saved_cfg)
    run.mkdir(parents=True, exist_ok=True)
    open_log(run, rank == 0)
    versions = f"python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}"
    log.info(f"{versions}, {device.type} x {world}, {str(dtype).split('.')[1]}")
    log.info(" ".join(f"{k}={v!r}" for k, v in dataclasses.asdict(cfg).items()))

    # ------------------------------------------------------------------ what
    store = data.open_store(cfg, cfg.train_split, max(cfg.teacher_size, cfg.student_size), cfg.max_samples)
    samples = min(cfg.samples_per_epoch or len(store), len(store))
    steps_per_epoch = samples // cfg.batch_size
    if steps_per_epoch == 0:
        raise UserError(f"an epoch has {samples} images, fewer than --batch_size {cfg.batch_size}: make it smaller")
    total_steps = cfg.epochs * steps_per_epoch
    step = saved["step"] if saved else 0
    teacher = models.load_teacher(cfg.teacher, cfg.teacher_size, cfg.teacher_weights).to(device)
    torch.manual_seed(cfg.seed)
    kwargs = models.student_kwargs(cfg.student_args)
    if cfg.local_crops and hasattr(models.build_student(cfg.student, cfg.student_size, **kwargs).net, "patch_embed"):
        kwargs["dynamic_img_size"] = True  # one ViT for views of two sizes
    torch.manual_seed(cfg.seed)
    student = models.build_student(cfg.student, cfg.student_size, cfg.pool, **kwargs)
    distiller = models.Distiller(student, teacher, cfg).to(device)
    optimiser = torch.optim.AdamW(parameter_groups(distiller, cfg.weight_decay), lr=0.0, betas=BETAS, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    log.info(
        f"{cfg.dataset}: {len(store)} images of {store.size} px, {steps_per_epoch} steps an epoch\n"
        f"teacher {cfg.teacher}: {teacher.parameter_count / 1e6:.1f} M parameters, {cfg.teacher_size} px, "
        f"grid {teacher.grid[0]}x{teacher.grid[1]}\n"
        f"student {cfg.student}: {student.parameter_count / 1e6:.2f} M parameters, {cfg.student_size} px, "
        f"grid {student.grid[0]}x{student.grid[1]}"
    )

    def ask_teacher(views):
        with torch.inference_mode(), autocast:
            return teacher(views)

    workers = 0 if device.type == "cpu" else min(4, cfg.num_workers if cfg.num_workers >= 0 else os.cpu_count())

    def batches(epoch: int, first: int = 0, samples: int = samples, batch_size: int = cfg.batch_size, shared: bool = True):
        order = data.epoch_order(len(store), samples, cfg.seed, epoch)
        who = (rank, world) if shared else (0, 1)
        for images, index in data.loader(store, order, batch_size, *who, first, workers, device.type == "cuda"):
            yield images.to(device, non_blocking=True), index

    # ------------------------------------------------------------------ from where
    if saved:
        student.net.load_state_dict(saved["student"])
        distiller.load_state_dict(saved["heads"], strict=False)
        optimiser.load_state_dict(saved["optimiser"])
        scaler.load_state_dict(saved["scaler"])
        log.info(f"continuing {latest} at step {step} of {total_steps}")
    elif rank == 0:  # the other ranks get the result when DDP wraps the module
        begin, size = time.time(), min(64, len(store))
        count = min(STAT_IMAGES, len(store)) // size * size
        views = (
            data.render(images, data.view(cfg.seed, 0, index, (cfg.crop_scale, 1.0)), cfg.teacher_size)
            for images, index in batches(0, samples=count, batch_size=size, shared=False)
        )
        views = tqdm(views, total=count // size, desc="teacher statistics", leave=False, disable=None)
        distiller.fit_heads(ask_teacher(view) for view in views)
        log.info(f"{cfg.head} heads measured on {count} images in {time.time() - begin:.0f} s")
    if rank == 0:
        (run / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1) + "\n")
    if cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda"):
        distiller.compile()  # in place: state-dict keys stay plain
    step_module = distiller if world == 1 else DistributedDataParallel(
        distiller, device_ids=[device.index] if device.type == "cuda" else None, static_graph=True
    )

    metrics = dict(saved["metrics"]) if saved else {}

    def save(*paths: Path) -> None:
        if rank:
            return
        state = dict(
            student=student.net.state_dict(),
            heads={k: v for k, v in distiller.state_dict().items() if not k.startswith("student.")},
            optimiser=optimiser.state_dict(), scaler=scaler.state_dict(), step=step,
            epoch=step / steps_per_epoch, metrics=metrics, config=dataclasses.asdict(cfg),
        )
        for path in paths:
            write_atomically(path, lambda temporary: torch.save(state, temporary))

    stopped_by = []  # the signal, once there was one

    def on_signal(number, frame):
        stopped_by.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)  # a second one stops at once

    previous = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}

    # ------------------------------------------------------------------ the loop
    sums = torch.zeros(len(models.Distiller.STATS) + 2, device=device)  # + gradient norm, + stop flag
    since = last_save = time.time()
    waited, logged = 0.0, step
    bar = tqdm(total=total_steps, initial=step, unit="step", disable=None if rank == 0 else True)
    student.train()
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [signal.signal(s, p) for s, p in previous.items()])
        stack.enter_context(logging_redirect_tqdm([log]))
        stack.enter_context(bar)
        jsonl = stack.enter_context(open(run / "metrics.jsonl", "a")) if rank == 0 else None
        while step < total_steps:
            epoch = step // steps_per_epoch
            asked = time.time()
            for images, index in batches(epoch, first=step % steps_per_epoch):
                waited += time.time() - asked
                # The view that both see, cut out of the stored pixels at each one's size.
                box = data.view(cfg.seed, epoch, index, (cfg.crop_scale, 1.0))
                teacher_view = data.render(images, box, cfg.teacher_size)
                same = cfg.teacher_size == cfg.student_size
                student_view = teacher_view if same else data.render(images, box, cfg.student_size)
                student_view = data.jitter(student_view, cfg.seed, epoch, index, cfg.jitter)
                local_views = [
                    data.jitter(data.render(images, data.inside(box, part), cfg.local_size), cfg.seed, epoch, index, cfg.jitter)
                    for part in (
                        data.view(cfg.seed, epoch * cfg.local_crops + i, index, data.LOCAL_SCALE, data.LOCAL)
                        for i in range(cfg.local_crops)
                    )
                ]
                if step == 0 and rank == 0:
                    views_figure(run / "views.png", images, teacher_view, student_view)
                targets = distiller.targets(ask_teacher(teacher_view))

                lr = learning_rate(step, steps_per_epoch, cfg)
                for group in optimiser.param_groups:
                    group["lr"] = lr
                # Dropout and drop path, if any, depend on the step alone: a resume repeats them.
                torch.manual_seed(cfg.seed * 1_000_003 + step * world + rank)
                with autocast:
                    loss, stats = step_module(student_view, *targets, torch.cat(local_views) if local_views else None)
                optimiser.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.unscale_(optimiser)
                norm = torch.nn.utils.clip_grad_norm_(distiller.parameters(), cfg.grad_clip or math.inf)
                scaler.step(optimiser)
                scaler.update()
                sums[:-2] += stats
                sums[-2] += norm
                step += 1
                bar.update()

                end_of_epoch = step % steps_per_epoch == 0
                reading = step % cfg.log_every == 0 or end_of_epoch
                if reading:  # the only place where a step waits for the GPU
                    sums[-1] = float(bool(stopped_by))
                    if world > 1:
                        dist.all_reduce(sums)
                    *mean, stop = (sums / (step - logged) / world).tolist()
                    if stop and not stopped_by:
                        stopped_by.append(signal.SIGTERM)  # another rank was told
                    seconds = time.time() - since
                    metrics = dict(step=step, epoch=step / steps_per_epoch, lr=lr, norm=mean[-1])
                    metrics |= dict(zip(models.Distiller.STATS, mean, strict=False))
                    metrics |= dict(images_per_s=(step - logged) * cfg.batch_size / seconds, data=waited / seconds)
                    if not math.isfinite(metrics["loss"]):
                        raise UserError(
                            f"the loss became {metrics['loss']} between steps {logged} and {step} (learning rate {lr:.1e}). "
                            f"The last good state is {latest if latest.exists() else 'none yet'}: "
                            "try a lower --lr, a lower --grad_clip or --precision fp32"
                        )
                    eta = (total_steps - step) * seconds / (step - logged)
                    eta = f"{eta / 60:.0f}m" if eta >= 60 else f"{eta:.0f}s"
                    log.info(
                        f"epoch {epoch + 1}/{cfg.epochs} step {step} | loss {metrics['loss']:.4f} "
                        f"(cls {metrics['cls']:.3f} patch {metrics['patch']:.3f}) | cos {metrics['cos']:.3f} | "
                        f"spread {metrics['spread']:.2f} | lr {lr:.1e} | norm {metrics['norm']:.2f} | "
                        f"{metrics['images_per_s']:.0f} img/s | data {metrics['data']:.0%} | "
                        f"eta {eta}"
                    )
                    if metrics["spread"] > COLLAPSED and metrics["target_spread"] < DIVERSE:
                        log.warning(
                            f"the student gives nearly the same embedding to every image (spread {metrics['spread']:.2f}, "
                            f"teacher {metrics['target_spread']:.2f}): a collapse. Try a lower --lr, or --head pca"
                        )
                    if end_of_epoch and cfg.eval_every and (step // steps_per_epoch) % cfg.eval_every == 0 and rank == 0:
                        bench = evaluation.Bench(cfg, *QUICK_EVAL)
                        metrics["knn"] = bench.judge(*bench.features(student), probe=False).get("knn20", math.nan)
                        student.train()
                        log.info(f"epoch {epoch + 1}: k-NN {metrics['knn']:.1%} on {len(bench.test_rows)} test images")
                    if jsonl:
                        jsonl.write(json.dumps(metrics) + "\n")
                        jsonl.flush()
                    sums.zero_()
                    waited, logged, since = 0.0, step, time.time()
                stopping = bool(stopped_by) and (reading or world == 1)
                if end_of_epoch or stopping or time.time() - last_save > SAVE_SECONDS:
                    done = step // steps_per_epoch
                    keep = end_of_epoch and (step == total_steps or (cfg.save_every and done % cfg.save_every == 0))
                    save(latest, *([run / f"checkpoint_epoch_{done}.pth"] if keep else []))
                    last_save = time.time()
                if stopping:
                    log.info(f"stopped after step {step} of {total_steps}; the same command continues from {latest}")
                    raise SystemExit(128 + stopped_by[0])
                asked = time.time()

    # ------------------------------------------------------------------ take it away
    if rank == 0:
        export(student, cfg, run / "student.safetensors")
        log.info(f"done: {latest}; evaluate with: python eval.py {latest}")
        if cfg.eval_at_end:
            metrics = metrics | dict(eval=evaluation.main(EvalConfig((str(latest),), device=cfg.device)))
    if world > 1:
        dist.barrier()
    return metrics


def export(student: models.Backbone, cfg: Config, path: Path) -> None:
    """The student alone, under timm's names, with what is needed to use it in the metadata."""
    from safetensors.torch import save_file

    metadata = {
        "model": cfg.student, "args": cfg.student_args, "image_size": str(cfg.student_size), "pool": cfg.pool,
        "mean": str(student.mean.flatten().tolist()), "std": str(student.std.flatten().tolist()),
        "teacher": cfg.teacher, "dataset": cfg.dataset,
    }
    weights = {k: v.contiguous().cpu() for k, v in student.net.state_dict().items()}
    write_atomically(path, lambda temporary: save_file(weights, temporary, metadata))


if __name__ == "__main__":
    cli(main, Config, models.problems)
