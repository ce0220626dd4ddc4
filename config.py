"""What to do: every setting of a run, its default and its help, in one frozen dataclass.

    python train.py --help                            # the list below, as flags
    python train.py --dataset cifar10 --epochs 50     # override by name
    python train.py --preset demo --seed 1            # a preset first, then overrides

`Config` drives train.py, `EvalConfig` eval.py. `cli` is the only place that reads argv and turns a
`UserError` into a message; `validate` reports everything wrong at once.
"""

import argparse
import dataclasses
import difflib
import errno
import os
import re
import signal
import sys
from pathlib import Path

# datasets and huggingface_hub report usage unless told otherwise; this project never phones home.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Whatever a library's own default is, no file of weights that is read here may run code: older
# versions of timm would unpickle a --teacher_weights.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
# On a CPU large tensors come on huge pages, or each costs thousands of page faults. For one process
# the gain is lost in the scatter of timings (results/speed/cpu.txt); where several train side by
# side it is there, though not logged. To be set before torch makes its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG  # what a full disk answers
HUB_TIMEOUT = 5  # seconds to wait for the Hub's first answer before working offline

DATASETS = {  # short name -> (name on the Hub, label column)
    "cifar10": ("uoft-cs/cifar10", "label"),
    "cifar100": ("uoft-cs/cifar100", "fine_label"),
    "shapes": ("", "label"),  # drawn by data.py
}
PRESETS = {
    # The whole method on a laptop CPU in under two minutes, with no network. timm's default
    # initialisation is made for wider models; for ones this small float32 is faster than bf16.
    "demo": dict(dataset="shapes", teacher="demo", teacher_size=32, student_size=32,
                 student="vit_tiny_patch16_224", crop_scale=0.8, precision="fp32",
                 student_args="patch_size=8 embed_dim=64 depth=4 num_heads=4 weight_init=jax",
                 batch_size=64, epochs=14, lr=3e-3, eval_at_end=True),
    # 500,000 images of one's own, 96 px; nothing here was measured at that size. Epochs and batch:
    # Proteus' 300 x 1.28 M images, cut to what the bank makes cheap; its warm-up. The rest are the
    # defaults: DINOv2 ViT-B/14 at 224 px, asked about four views (29 GB), bf16 where there is.
    "hf": dict(batch_size=512, epochs=100, warmup_epochs=5.0),
}
# Settings that may change when a run is continued: they do not alter what is being learned.
FREE_ON_RESUME = frozenset(
    "preset epochs teacher_weights cache_dir num_workers store_device max_bad run_dir resume "
    "device precision compile log_every save_every eval_every eval_at_end debug "
    "max_student_params".split())


class UserError(Exception):
    """A foreseeable mistake: its text says what is wrong, where, and what to do. Exit status 2."""


def option(default, help, low=None, high=None, choices=()):
    """A dataclass field that is also a command-line flag; `low` and `high` are inclusive."""
    metadata = dict(help=help, low=low, high=high, choices=choices)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """Distil a frozen teacher into a small student, from unlabelled images."""
    # Plain int, float, str and bool, so that a checkpoint can hold it. Where the numbers are from:
    # AM-RADIO and DINOv2 (lr), Proteus (weight_decay), near DINOv2's 0.32 (crop_scale). These were
    # compared on CIFAR-10, with head, loss and its weights, pool, warm-up, teacher_views (recipe,
    # vit-50, views in results/): crops from 0.7 and lr 2e-3 learn faster, not more in 50 epochs.
    # Only reasoned about: batch (a short run prefers 128), epochs, clipping, teacher, sizes.

    preset: str = option("", "defaults to start from", choices=("", *PRESETS))

    # data
    dataset: str = option("cifar10", "cifar10, cifar100, shapes (drawn), owner/name on the Hub, or "
                          "a folder (of images, of parquet files, by save_to_disk)")
    train_split: str = option("train", "split that the student learns from")
    test_split: str = option("", "split that is evaluated; empty = test, else validation")
    image_column: str = option("", "empty = the only image column")
    label_column: str = option("", "empty = the class label; training never looks at it")
    store_size: int = option(0, "pixels of stored images; 0 = native, at most the models'", low=0)
    max_samples: int = option(0, "learn from a fixed random subset; 0 = all images", low=0)
    samples_per_epoch: int = option(0, "images per epoch, drawn anew each time; 0 = all", low=0)
    max_bad: float = option(0.01, "largest share of unreadable images to skip", low=0, high=1)
    cache_dir: str = option("cache", "where decoded images and the teacher's answers are kept; "
                            "wants a fast local disk")
    num_workers: int = option(-1, "processes that decode, on a GPU also load; -1 = one per core",
                              low=-1)
    store_device: str = option("auto", "where images and the teacher's stored answers are kept "
                               "while training: on disk, or on the device; auto = on a GPU, if "
                               "the images take at most a quarter of its free memory, and later "
                               "the answers half", choices=("auto", "disk", "device"))
    crop_scale: float = option(0.4, "smallest area of a view, of the image's", low=0.01, high=1)

    # teacher
    teacher: str = option("dinov2_vitb14", "dinov2_vit{s,b,l,g}14[_reg], demo, or any timm model")
    teacher_weights: str = option("", "local .pth or .safetensors; empty = from the Hub")
    teacher_size: int = option(224, "pixels the teacher sees; a multiple of its patch", low=8)
    teacher_views: int = option(4, "views of each image to ask the teacher about; later epochs "
                                "read its stored answers; 0 = ask at every step", low=0)

    # student
    student: str = option("vit_small_patch16_224", "any timm model; starts from random weights")
    student_args: str = option("", "its timm arguments, e.g. 'depth=6 embed_dim=192 num_heads=3'")
    student_size: int = option(96, "pixels the student sees; a multiple of its patch", low=8)
    pool: str = option("cls", "the student's global embedding: its class token, or the mean of its "
                       "patches", choices=("cls", "mean"))
    max_student_params: int = option(100_000_000, "refuse larger students", low=1)

    # loss
    head: str = option("auto", "pca, frozen: a fixed map takes the teacher to the student's width, "
                       "along principal axes or random ones; linear: a trained map takes the "
                       "student to the teacher's; auto = pca for students that give tokens (ViTs), "
                       "linear for those that give a map (conv nets, Swin)",
                       choices=("auto", "pca", "frozen", "linear"))
    loss: str = option("cosine", "distance to the target", choices=("cosine", "mse"))
    cls_weight: float = option(1.0, "weight of the [CLS] loss", low=0)
    patch_weight: float = option(0.5, "weight of the patch loss", low=0)

    # optimisation
    epochs: int = option(50, "passes over the data", low=1)
    batch_size: int = option(256, "images per step, over all ranks together", low=1)
    lr: float = option(1e-3, "peak learning rate of AdamW", low=0)
    min_lr: float = option(1e-6, "floor of the cosine schedule", low=0)
    warmup_epochs: float = option(2.0, "linear warm-up, but at most a fifth of the run", low=0)
    weight_decay: float = option(0.05, "of matrices; never of biases, norms or tokens", low=0)
    grad_clip: float = option(1.0, "largest gradient norm; 0 = no clipping", low=0)

    # run
    run_dir: str = option("", "run folder; empty = runs/DATASET-TEACHER-STUDENT")
    resume: bool = option(True, "continue the run in run_dir; --no_resume moves it aside first")
    device: str = option("auto", "where to train", choices=("auto", "cuda", "mps", "cpu"))
    precision: str = option("auto", "auto = bf16 where the hardware has it, fp16 on older GPUs, "
                            "else fp32", choices=("auto", "bf16", "fp16", "fp32"))
    compile: str = option("auto", "torch.compile; auto = on CUDA", choices=("auto", "on", "off"))
    seed: int = option(0, "of order, views and initialisation", low=0, high=2**31 - 1)
    log_every: int = option(50, "steps between log lines", low=1)
    save_every: int = option(10, "epochs between kept checkpoints; 0 = only the latest", low=0)
    eval_every: int = option(0, "epochs between quick k-NN checks; 0 = none", low=0)
    eval_at_end: bool = option(False, "run eval.py on the last checkpoint")
    debug: bool = option(False, "show the traceback of an error")

    @property
    def run_path(self) -> Path:
        return Path(self.run_dir or f"runs/{slug(self.dataset)}-{self.teacher}-{self.student}")

    @property
    def workers(self) -> int:
        if self.num_workers >= 0:
            return self.num_workers
        mine = getattr(os, "sched_getaffinity", None)  # a container or SLURM may give us fewer
        return len(mine(0)) if mine else os.cpu_count() or 1

    def problems(self) -> list[str]:
        """What is wrong with data and run settings; model.py knows what does not fit the models."""
        found = data_problems(self)
        if self.teacher_weights and not Path(self.teacher_weights).is_file():
            found.append(f"--teacher_weights {self.teacher_weights}: no such file")
        if self.cls_weight == self.patch_weight == 0:
            found.append("--cls_weight and --patch_weight are both 0: nothing would be learned")
        if self.min_lr > self.lr:
            found.append(f"--min_lr {self.min_lr} is above --lr {self.lr}")
        if self.batch_size % (world := int(os.environ.get("WORLD_SIZE", 1))):
            found.append(f"--batch_size {self.batch_size} is not a multiple of the {world} ranks")
        return found


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """An evaluation. Of data and teacher, what is left empty is as in the checkpoint's config."""

    checkpoints: tuple = option((), "checkpoint files; a row of the table each")
    dataset: str = option("", "evaluate elsewhere, as in train.py")
    train_split: str = option("", "split whose features are the k-NN bank and train the probe")
    test_split: str = option("", "split that is judged")
    image_column: str = option("", "image column")
    label_column: str = option("", "label column")
    max_train: int = option(0, "a fixed random subset of the training images; 0 = all", low=0)
    max_test: int = option(0, "and of the test images; 0 = all", low=0)
    baselines: bool = option(True, "also judge the teacher, a random student and raw pixels")
    probe: bool = option(True, "fit the linear probe")
    teacher_weights: str = option("", "where the teacher's weights are now")
    save_features: str = option("", "write the last student's features to this .safetensors")
    figures: str = option("", "write the last student's patches.png and neighbors.png here")
    batch_size: int = option(256, "images per forward", low=1)
    cache_dir: str = option("", "where decoded images are kept")
    num_workers: int = option(-1, "processes that decode; -1 = one per core", low=-1)
    device: str = option("auto", "where to evaluate", choices=("auto", "cuda", "mps", "cpu"))
    precision: str = option("auto", "as in train.py", choices=("auto", "bf16", "fp16", "fp32"))
    debug: bool = option(False, "show the traceback of an error")

    def problems(self) -> list[str]:
        found = [f"no such checkpoint: {c}" for c in self.checkpoints if not Path(c).is_file()]
        if not Path(self.save_features).absolute().parent.is_dir():
            found.append(f"--save_features {self.save_features}: no such folder")
        if not self.checkpoints:
            found.append("no checkpoint given: python eval.py runs/NAME/checkpoint_latest.pth")
        return found + data_problems(self)


def slug(name: str) -> str:
    """A data set's name, or its folder's, as part of a file's name."""
    return re.sub(r"[^\w.]+", "_", name.strip("./")).lower()[-40:]


def nearest(name: str, known, prefix: str = "") -> str:
    """'; did you mean x or y?', or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(prefix + c for c in close)}?" if close else ""


def data_problems(cfg) -> list[str]:
    """What is wrong with the data set and splits of a Config or EvalConfig: where pixels are from.

    A split's name becomes part of a folder's, and it may come out of a stranger's checkpoint.
    """
    splits = dict(train_split=cfg.train_split, test_split=cfg.test_split)
    found = [f"--{flag} {split!r}: not the name of a split" for flag, split in splits.items()
             if not re.fullmatch(r"[\w.-]*", split)]
    name = cfg.dataset
    owner_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists()
    known = name in DATASETS or owner_name or Path(name).is_dir()  # "" is the folder we are in
    if not known:
        found.append(f"--dataset {name}: not {', '.join(DATASETS)}, nor owner/name on the Hub, "
                     f"nor an existing folder{nearest(name, DATASETS)}")
    return found


def wrong_values(cfg) -> list[str]:
    """The settings of a Config or EvalConfig that are of another type, choice or size."""
    found = []
    for f in dataclasses.fields(cfg):
        value, low, high = getattr(cfg, f.name), f.metadata["low"], f.metadata["high"]
        choices, most = f.metadata["choices"], "" if high is None else f" and at most {high}"
        if not isinstance(value, (int, float) if f.type is float else f.type):
            found.append(f"--{f.name} {value!r}: not a value of type {f.type.__name__}")
        elif choices and value not in choices:
            known = ", ".join(filter(None, choices))
            found.append(f"--{f.name} {value}: not one of {known}{nearest(value, choices)}")
        elif low is not None and not low <= value <= (sys.float_info.max if high is None else high):
            found.append(f"--{f.name} {value}: must be a number, at least {low}{most}")
    return found


def validate(cfg, *checks, found=()) -> None:
    """Raise one UserError with every problem: `found`, wrong values, and those of `checks`."""
    found = [*found, *wrong_values(cfg)]
    for check in (type(cfg).problems, *checks):
        found += [problem for problem in check(cfg) if problem not in found]
    if found:
        several = "\n  - ".join([f"{len(found)} problems:", *found])
        raise UserError(found[0] if len(found) == 1 else several)


def refuse(message: str) -> None:
    raise UserError(message)


def parse(cls, argv: list[str], *checks):
    """Command line -> a validated `cls`: the preset first, then the flags.

    Raises UserError that lists every unknown flag and wrong value, with the nearest valid names.
    """
    parser = argparse.ArgumentParser(description=cls.__doc__, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    parser.error = refuse  # argparse would print its usage and exit
    types = {f.name: f.type for f in dataclasses.fields(cls)}
    for f in dataclasses.fields(cls):
        default = f" (default: {f.default})" if f.default not in ("", ()) else ""
        text = (f.metadata["help"] + default).replace("%", "%%")
        if f.type is tuple:
            parser.add_argument(f.name, nargs="*", help=text)
        elif f.type is bool:
            parser.add_argument(f"--{f.name}", action="store_true", help=text)
            parser.add_argument(f"--no_{f.name}", dest=f.name, action="store_false")
        else:
            names = "|".join(filter(None, f.metadata["choices"]))
            parser.add_argument(f"--{f.name}", metavar=names or f.type.__name__.upper(), help=text)
    given, unknown = parser.parse_known_args(argv)
    flags = [u.split("=")[0] for u in unknown if u.startswith("-")]
    switches = [f"no_{name}" for name, kind in types.items() if kind is bool]
    found = [f"unknown flag {flag}{nearest(flag.lstrip('-'), [*types, *switches], '--')}"
             for flag in flags]
    if unknown and not flags:
        found.append(f"unexpected argument {unknown[0]!r}: settings are written --name value, "
                     "switches --name or --no_name")
    values = dict(PRESETS.get(getattr(given, "preset", ""), {}))
    for name, text in vars(given).items():
        try:
            values[name] = types[name](text)
        except ValueError:
            kind = "a whole number" if types[name] is int else "a number"
            found.append(f"--{name} {text}: not {kind}")
    if values.get("dataset", "").strip("/"):  # a folder is the same with a slash at its end
        values["dataset"] = values["dataset"].rstrip("/")
    cfg = cls(**values)
    validate(cfg, *checks, found=found)
    return cfg


def cli(main, cls, *checks) -> None:
    """Run main(parse(cls, argv)); what the user can mend becomes a message and exit status 2.

    Being told to stop ends with 128 + the signal; train.py's loop has its own, gentler way.
    """
    def stop(number, frame):
        raise KeyboardInterrupt(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        main(parse(cls, sys.argv[1:], *checks))
    except (UserError, OSError, KeyboardInterrupt) as error:
        if "--debug" in sys.argv:
            raise
        if isinstance(error, KeyboardInterrupt):
            print("stopped; the same command goes on", file=sys.stderr)
            sys.exit(128 + (error.args or [signal.SIGINT])[0])
        full = ": make space, then the same command goes on" * (getattr(error, "errno", 0) in FULL)
        print(f"error: {error}{full}", file=sys.stderr)
        sys.exit(2)


def hub_online() -> None:
    """Ask the Hub for one answer; without one, switch its libraries to their offline mode.

    Offline they find what was downloaded before, and otherwise fail at once instead of retrying for
    most of a minute (46 s in timm against 0.3 s).
    """
    import datasets
    import huggingface_hub as hub

    hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # timm may have imported it before us
    if not hub.constants.HF_HUB_OFFLINE:
        try:
            hub.utils.get_session().head(hub.constants.ENDPOINT, timeout=HUB_TIMEOUT)
        except Exception:  # the class depends on the HTTP library of the installed version
            hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def hub_error(what: str, instead: str, error: Exception) -> UserError:
    """The message for a download that failed, telling no network from a wrong name."""
    import datasets
    import huggingface_hub as hub

    chain = [error]  # the libraries wrap what happened several times over
    while (inner := chain[-1].__cause__ or chain[-1].__context__) and inner not in chain:
        chain.append(inner)
    answers = [e.response for e in chain if getattr(e, "response", None) is not None]
    status = answers[0].status_code if answers else None
    if hub.constants.HF_HUB_OFFLINE:
        answer = "does not answer, and it was not downloaded before"
    elif status in (401, 403, 404) or isinstance(error, datasets.exceptions.DatasetNotFoundError):
        answer = "answers, so the name may be wrong or private"
    elif status:
        answer = f"answers with HTTP {status}: it is in trouble, so try again later"
    else:
        answer = "answers, but this cannot be had from it; if the network is to blame, try again"
    return UserError(f"cannot get {what}: {hub.constants.ENDPOINT} {answer}.\n  Without a network: "
                     f"{instead}, or --preset demo.\n  ({reason(error)})")


def reason(error: Exception) -> str:
    """An error's text on one line, without torch's advice to load untrusted pickles."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    text = " ".join(str(error).split())[:200] or type(error).__name__
    text = text if text.isprintable() else ascii(text)  # it may quote a file from anywhere
    return "not a file of plain weights" if "weights_only" in str(error) else text
