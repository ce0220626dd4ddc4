"""What to do: every setting of a run, its default and its help, in one frozen dataclass.

    python train.py --help                                  # the list below, as flags
    python train.py --dataset cifar10 --epochs 50           # override by name
    python train.py --preset demo --seed 1                  # a preset first, then overrides

`Config` drives train.py, `EvalConfig` drives eval.py. `cli` is the only place that reads argv and
the only place that turns a `UserError` into a message; `validate` reports everything wrong at once.
"""

import argparse
import dataclasses
import difflib
import os
import re
import sys
from pathlib import Path

# datasets and huggingface_hub report usage unless told otherwise; this project never phones home.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

HUB_TIMEOUT = 5  # seconds to wait for the Hub's first answer before working offline

DATASETS = {  # short name -> (name on the Hub, label column)
    "cifar10": ("uoft-cs/cifar10", "label"),
    "cifar100": ("uoft-cs/cifar100", "fine_label"),
    "shapes": ("", ""),  # drawn by data.py
}

PRESETS = {
    "": {},
    # The whole method on a laptop CPU in under two minutes, with no network: see README.
    "demo": dict(
        dataset="shapes", teacher="demo", teacher_size=48, student_size=48,
        student="vit_tiny_patch16_224", batch_size=128, epochs=10, eval_at_end=True,
        student_args="patch_size=8 embed_dim=96 depth=4 num_heads=3", log_every=50,
    ),
}

# Settings that may change when a run is continued: they do not alter what is being learned.
FREE_ON_RESUME = frozenset(
    "preset epochs teacher_weights cache_dir num_workers max_bad run_dir resume device precision "
    "compile log_every save_every eval_every eval_at_end debug max_student_params".split()
)


class UserError(Exception):
    """A foreseeable mistake: its text says what is wrong, where, and what to do. Exit status 2."""


def option(default, help, choices=(), low=None, high=None):
    """A dataclass field that is also a command-line flag; `low` and `high` are inclusive."""
    metadata = dict(help=help, choices=choices, low=low, high=high)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run. Fields are plain int, float, str and bool, so that a checkpoint can hold them."""

    preset: str = option("", "defaults to start from", choices=tuple(PRESETS))

    # data
    dataset: str = option(
        "cifar10", "cifar10, cifar100, shapes, owner/name on the Hub, or a folder (images, parquet, "
        "save_to_disk)")
    train_split: str = option("train", "split that the student learns from")
    test_split: str = option("", "split that is evaluated; empty = test, else validation")
    image_column: str = option("", "empty = the only image column")
    label_column: str = option("", "empty = the class label column; only eval.py reads labels")
    store_size: int = option(0, "pixels of stored images; 0 = native, at most the models' size", low=0)
    max_samples: int = option(0, "use a fixed random subset of this many images; 0 = all", low=0)
    samples_per_epoch: int = option(0, "images per epoch, drawn anew each epoch; 0 = all", low=0)
    max_bad: float = option(0.01, "stop when more than this share cannot be decoded", low=0, high=1)
    cache_dir: str = option("cache", "where decoded images are kept; wants a fast local disk")
    num_workers: int = option(-1, "processes that decode and load; -1 = one per core", low=-1)
    crop_scale: float = option(0.4, "smallest area of a view, as a share of the image", low=0.01, high=1)
    jitter: float = option(0.4, "strength of the student's colour jitter; 0 = none", low=0, high=1)

    # teacher
    teacher: str = option("dinov2_vitb14", "dinov2_vit{s,b,l,g}14[_reg], demo, or any timm model")
    teacher_weights: str = option("", "local .pth or .safetensors; empty = timm's weights on the Hub")
    teacher_size: int = option(224, "pixels the teacher sees; a multiple of its patch", low=8)

    # student
    student: str = option("vit_small_patch16_224", "any timm model, randomly initialised")
    student_args: str = option("", "its timm arguments, e.g. 'depth=6 embed_dim=192 num_heads=3'")
    student_size: int = option(96, "pixels the student sees; a multiple of its patch", low=8)
    pool: str = option("cls", "the student's global embedding", choices=("cls", "mean"))
    max_student_params: int = option(100_000_000, "refuse larger students", low=1)

    # loss
    head: str = option(
        "pca", "pca, frozen: a fixed map takes the teacher to the student's width; linear, mlp: a "
        "trained map takes the student to the teacher's", choices=("pca", "frozen", "linear", "mlp"))
    loss: str = option("cosine", "distance to the target", choices=("cosine", "mse", "smooth_l1"))
    cls_weight: float = option(1.0, "weight of the [CLS] loss", low=0)
    patch_weight: float = option(0.5, "weight of the patch loss", low=0)
    local_crops: int = option(0, "extra small student views matched to the full view's CLS", low=0)
    local_size: int = option(48, "pixels of local crops; a multiple of the student's patch", low=8)

    # optimisation
    epochs: int = option(50, "passes over the data", low=1)
    batch_size: int = option(256, "images per step, over all ranks together", low=1)
    lr: float = option(1e-3, "peak learning rate of AdamW", low=0)
    min_lr: float = option(1e-6, "floor of the cosine schedule", low=0)
    warmup_epochs: float = option(2.0, "linear warm-up; at most a fifth of the run is used", low=0)
    weight_decay: float = option(0.05, "on matrices; never on biases, norms or tokens", low=0)
    grad_clip: float = option(1.0, "largest gradient norm; 0 = no clipping", low=0)

    # run
    run_dir: str = option("", "run folder; empty = runs/DATASET-TEACHER-STUDENT")
    resume: bool = option(True, "continue the run found in run_dir; --no_resume moves it aside")
    device: str = option("auto", "where to train", choices=("auto", "cuda", "mps", "cpu"))
    precision: str = option(
        "auto", "auto = bf16 where the hardware has it, fp16 on older GPUs, else fp32",
        choices=("auto", "bf16", "fp16", "fp32"))
    compile: str = option("auto", "torch.compile the step; auto = on CUDA", choices=("auto", "on", "off"))
    seed: int = option(0, "order, views, initialisation", low=0, high=2**31 - 1)
    log_every: int = option(50, "steps between log lines", low=1)
    save_every: int = option(10, "epochs between kept checkpoints; 0 = only the latest", low=0)
    eval_every: int = option(0, "epochs between k-NN checks on a fixed subset; 0 = none", low=0)
    eval_at_end: bool = option(False, "run eval.py on the final checkpoint")
    debug: bool = option(False, "show the traceback of an error")

    @property
    def run_path(self) -> Path:
        slug = re.sub(r"[^\w.]+", "_", self.dataset.strip("./")).lower()
        return Path(self.run_dir or f"runs/{slug}-{self.teacher}-{self.student}")

    def problems(self) -> list[str]:
        """What is wrong with the data and run settings; model.py knows what fits the models."""
        found = dataset_problems(self.dataset)
        if self.teacher_weights and not Path(self.teacher_weights).is_file():
            found.append(f"--teacher_weights: no such file: {self.teacher_weights}")
        if self.cls_weight == 0 and self.patch_weight == 0:
            found.append("--cls_weight and --patch_weight are both 0: nothing would be learned")
        if self.min_lr > self.lr:
            found.append(f"--min_lr {self.min_lr} is above --lr {self.lr}")
        world = int(os.environ.get("WORLD_SIZE", 1))
        if self.batch_size % world:
            found.append(f"--batch_size {self.batch_size} cannot be shared by {world} ranks equally")
        return found


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """An evaluation. Empty or 0 means: as the checkpoint's own config says."""

    checkpoints: tuple = option((), "checkpoint files, a row of the table each")
    dataset: str = option("", "evaluate elsewhere, as in train.py")
    train_split: str = option("", "split whose features are the k-NN bank and train the probe")
    test_split: str = option("", "split that is evaluated")
    image_column: str = option("", "image column, with --dataset")
    label_column: str = option("", "label column")
    max_train: int = option(0, "evaluate on a fixed subset of training images; 0 = all", low=0)
    max_test: int = option(0, "and of test images; 0 = all", low=0)
    baselines: bool = option(True, "also evaluate the teacher, a random student and raw pixels")
    probe: bool = option(True, "fit the linear probe")
    teacher_weights: str = option("", "where the teacher's weights are now")
    cache_dir: str = option("", "where decoded images are kept")
    save_features: str = option("", "write the last student's features to this .safetensors file")
    batch_size: int = option(256, "images per forward", low=1)
    num_workers: int = option(-1, "processes that decode; -1 = one per core", low=-1)
    device: str = option("auto", "where to evaluate", choices=("auto", "cuda", "mps", "cpu"))
    precision: str = option("auto", "as in train.py", choices=("auto", "bf16", "fp16", "fp32"))
    debug: bool = option(False, "show the traceback of an error")

    def problems(self) -> list[str]:
        found = [] if self.checkpoints else ["no checkpoint given: python eval.py RUN/checkpoint_latest.pth"]
        found += [f"no such checkpoint: {c}" for c in self.checkpoints if not Path(c).is_file()]
        return found + (dataset_problems(self.dataset) if self.dataset else [])


def nearest(name: str, known, prefix: str = "") -> str:
    """'; did you mean x?' or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(prefix + c for c in close)}?" if close else ""


def dataset_problems(name: str) -> list[str]:
    if name in DATASETS or Path(name).is_dir():
        return []
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists():
        return []  # owner/name: only the Hub can tell
    hint = nearest(name, DATASETS)
    return [f"--dataset {name}: not {', '.join(DATASETS)}, nor owner/name, nor an existing folder{hint}"]


def validate(cfg, *checks, found=()) -> None:
    """Raise one UserError that lists every problem: of types, choices, bounds, and of `checks(cfg)`."""
    found = list(found)
    for f in dataclasses.fields(cfg):
        value, meta = getattr(cfg, f.name), f.metadata
        if f.type is float and isinstance(value, float) and value != value:
            found.append(f"--{f.name}: not a number")
        elif meta["choices"] and value not in meta["choices"]:
            known = ", ".join(c for c in meta["choices"] if c)
            found.append(f"--{f.name} {value}: not one of {known}{nearest(value, meta['choices'])}")
        elif (meta["low"] is not None and value < meta["low"]) or (
            meta["high"] is not None and value > meta["high"]
        ):
            most = "" if meta["high"] is None else f" and at most {meta['high']}"
            found.append(f"--{f.name} {value}: must be at least {meta['low']}{most}")
    for check in (type(cfg).problems, *checks):
        found += [problem for problem in check(cfg) if problem not in found]
    if found:
        raise UserError("\n".join(found) if len(found) == 1 else "\n  - ".join(["several things:", *found]))


def parse(cls, argv: list[str], *checks):
    """Command line -> a validated `cls`; presets first, then flags.

    Raises UserError listing every unknown flag and wrong value together with the nearest valid names.
    """
    parser = argparse.ArgumentParser(
        description=cls.__doc__, allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, argument_default=argparse.SUPPRESS,
    )
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for f in fields.values():
        text = f.metadata["help"] + (f" (default: {f.default})" if f.default not in ("", ()) else "")
        if f.type is tuple:
            parser.add_argument(f.name, nargs="*", help=text)
        elif f.type is bool:
            parser.add_argument(f"--{f.name}", f"--no_{f.name}", nargs=0, action=_Switch, help=text)
        else:
            name = "|".join(c for c in f.metadata["choices"] if c) or f.type.__name__.upper()
            parser.add_argument(f"--{f.name}", metavar=name, help=text)
    parser.set_defaults(**{})
    given, unknown = parser.parse_known_args(argv)
    found = []
    for flag in (u.split("=")[0] for u in unknown if u.startswith("--")):
        hint = nearest(flag[2:], [*fields, *(f"no_{n}" for n in fields if fields[n].type is bool)], "--")
        found.append(f"unknown flag {flag}{hint or '; --help lists them all'}")
    if unknown and not found:
        found.append(f"unexpected argument {unknown[0]}")
    values = dict(PRESETS.get(getattr(given, "preset", ""), {}))
    for name, text in vars(given).items():
        try:
            kind = fields[name].type
            values[name] = text if isinstance(text, bool) else kind(text)
        except ValueError:
            found.append(f"--{name} {text}: not {'an' if kind is int else 'a'} {kind.__name__}")
    cfg = cls(**values)
    validate(cfg, *checks, found=found)
    return cfg


class _Switch(argparse.Action):
    """--name sets True, --no_name sets False."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, not option_string.startswith("--no_"))


def cli(main, cls, *checks) -> None:
    """Run `main(parse(cls))`; a UserError becomes one message on stderr and exit status 2."""
    try:
        main(parse(cls, sys.argv[1:], *checks))
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        sys.exit((print(f"error: {error}", file=sys.stderr), 2)[1])


def hub_online() -> bool:
    """Ask the Hub for one answer; without one, switch its libraries to their offline mode.

    Offline they still find what was downloaded before, and fail at once instead of retrying for
    most of a minute (measured: 46 s in timm, against 0.3 s).
    """
    import datasets
    import huggingface_hub as hub

    if not hub.constants.HF_HUB_OFFLINE:
        try:
            hub.get_session().head(hub.constants.ENDPOINT, timeout=HUB_TIMEOUT)
            return True
        except Exception:  # the HTTP library's own classes differ between versions of the Hub client
            hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    return False


def hub_error(what: str, advice: str, error: Exception) -> UserError:
    """The message for a download that failed, telling no network from a wrong name."""
    import huggingface_hub as hub

    if hub.constants.HF_HUB_OFFLINE:
        why = f"{hub.constants.ENDPOINT} does not answer (no network?) and it was not downloaded before"
    else:
        why = f"{hub.constants.ENDPOINT} answers, so the name may be wrong or private"
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return UserError(f"cannot get {what}: {why}.\n  Without a network: {advice}.\n  ({reason})")
