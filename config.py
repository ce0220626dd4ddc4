"""All settings of a run: name, default, help and limits; `python train.py --help` lists them."""

import argparse
import difflib
import logging
import os
import re
import shutil
import sys
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import datasets
import huggingface_hub as hub

from demo.shapes import shapes

# Threads that wait for others sleep soon. Where another program uses the cores, spinning ones take
# ten times as long (results/speed/busy.txt). Read when torch is imported, so that comes later.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

log = logging.getLogger("distill")
# A data set on the Hub, or a function that returns one (`data.open_source`).
DATASETS = dict(cifar10="uoft-cs/cifar10", cifar100="uoft-cs/cifar100", shapes=shapes)
PRESETS = {
    # The whole method on a laptop CPU in about a minute, with no network.
    "demo": dict(
        dataset="shapes", teacher="demo", teacher_size=32, student="vit_tiny_patch16_224",
        student_args="patch_size=8 embed_dim=64 depth=4 num_heads=4 weight_init=jax",
        student_size=32, crop_scale=0.8, precision="fp32", batch_size=64, epochs=14, lr=3e-3,
        eval_at_end=True),
    # 500,000 images of your own on one GPU. No run of that size has been made.
    "large": dict(dataset="", batch_size=512, epochs=100, warmup_epochs=5.0),
}


class UserError(Exception):
    """A mistake that the user can fix: its text states what is wrong, where, and what to do."""


def fixed(default, help, low=None, high=1e9, choices=(), may_change=False):
    """A field of Config and its flag. A continued run has it as before, unless it may change."""
    rules = dict(help=help, low=low, high=high, choices=choices, may_change=may_change)
    return field(default=default, metadata=rules)


free = partial(fixed, may_change=True)


@dataclass(frozen=True)
class Config:
    """Distil a frozen teacher into a small student, from unlabelled images."""
    preset: str = fixed("", "defaults to start from", choices=("", *PRESETS))
    # data
    dataset: str = free("cifar10", "cifar10, cifar100, shapes, a folder, owner/name[@revision]")
    dataset_config: str = free("", "configuration of dataset, if it has several")
    image_column: str = free("", "image column of dataset; empty = the only one")
    train_split: str = fixed("train", "split that the student learns from")
    max_samples: int = fixed(0, "learn from a fixed random subset; 0 = all images", 0)
    crop_scale: float = fixed(0.4, "smallest area of a view; 0.7 for short runs", 0.01, 1)
    cache_dir: str = free("cache", "for decoded images and cached targets; a fast disk")
    # evaluation; training never uses labels
    eval_dataset: str = free("", "data to evaluate on; empty = the training data")
    test_split: str = free("", "split that is tested; empty = test, else validation")
    label_column: str = free("", "empty = label, fine_label, cls or the first class column")
    eval_every: int = free(0, "epochs between quick k-NN checks; 0 = none", 0)
    eval_at_end: bool = free(False, "run eval.py on the last checkpoint")
    # teacher
    teacher: str = fixed("dinov2_vitb14", "dinov2_vit{s,b,l,g}14[_reg], demo, or any timm model")
    teacher_weights: str = free("", "a file of the teacher's weights; empty = from the Hub")
    teacher_size: int = fixed(224, "pixels it sees; where it is best on your images", 8, 4096)
    teacher_views: int = fixed(4, "cached views of each image; 0 = new ones each epoch", 0, 1000)
    # student
    student: str = fixed("vit_small_patch16_224", "any timm model")
    student_args: str = fixed("", "timm's arguments for it: 'depth=6 embed_dim=192 num_heads=3'")
    student_weights: str = free("", "a student.safetensors or timm's to start from; empty = random")
    student_size: int = fixed(96, "pixels the student sees; a multiple of its patch", 8, 4096)
    pool: str = fixed("cls", "the model's own pooling; or a ViT's mean", choices=("cls", "mean"))
    # loss
    head: str = fixed("auto", "pca: fixed map to principal axes; linear: trained; auto: pca for "
                      "transformers, else linear", choices=("auto", "pca", "linear"))
    cls_weight: float = fixed(1.0, "weight of the [CLS] loss", 0)
    patch_weight: float = fixed(0.5, "weight of the patch loss", 0)
    # optimisation
    epochs: int = free(50, "passes over the data", 1)
    batch_size: int = fixed(256, "images per step, over all processes together", 1)
    lr: float = fixed(1e-3, "peak learning rate: ViT-S 1e-3, small ViTs 2e-3, conv nets 1e-2", 0)
    warmup_epochs: float = fixed(2.0, "epochs of linear warm-up, at most a fifth of the run", 0)
    weight_decay: float = fixed(0.05, "weight decay, of matrices; not of biases, norms, tokens", 0)
    grad_clip: float = fixed(1.0, "largest gradient norm; 0 = no clipping", 0)
    seed: int = fixed(0, "random seed of order, views and initialisation", 0, 2**31 - 1)
    # run
    run_dir: str = free("", "run folder; empty = runs/DATASET-TEACHER-STUDENT")
    resume: bool = free(True, "continue the run in run_dir; --no_resume moves it aside first")
    device: str = free("auto", "where to run", choices=("auto", "cuda", "cpu"))
    precision: str = free("auto", "auto = bf16 where the hardware has it, else fp16 on CUDA, else "
                          "fp32", choices=("auto", "bf16", "fp16", "fp32"))
    compile: str = free("auto", "torch.compile; auto = on CUDA", choices=("auto", "on", "off"))
    log_every: int = free(50, "steps between log lines", 1)
    save_every: int = free(10, "keep a checkpoint every N epochs, and always the first and last", 0)

    @property
    def run_path(self):
        return Path(self.run_dir or f"runs/{slug(self.dataset)}-{self.teacher}-{self.student}")

    def fixed_settings(self):
        """The settings that may not change when a run is continued."""
        return {option.name: getattr(self, option.name) for option in fields(self)
                if not option.metadata["may_change"]}


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate checkpoints. What is left empty is as in the first checkpoint."""
    checkpoints: list = free((), "checkpoint files or run folders; a row of the table each")
    dataset: str = free("", "evaluate on other images, with or without labels, in train.py's forms")
    dataset_config: str = free("", "configuration of dataset, if it has several")
    image_column: str = free("", "image column of dataset")
    label_column: str = free("", "label column of dataset")
    train_split: str = free("", "split that k-NN and probe learn from")
    test_split: str = free("", "split that is tested; if there is none, a tenth of train_split")
    teacher_weights: str = free("", "a file of the teacher's weights, if it has moved")
    cache_dir: str = free("", "for decoded images")
    max_train: int = free(0, "use a fixed random subset of the training images; 0 = all", 0)
    max_test: int = free(0, "use a fixed random subset of the test images; 0 = all", 0)
    baselines: bool = free(True, "also evaluate the teacher and an untrained student")
    save_features: str = free("", "also write the student's embeddings, labels, names into FOLDER")
    device: str = free("", "where to run", choices=("", "auto", "cuda", "cpu"))
    precision: str = free("", "of the networks", choices=("", "auto", "bf16", "fp16", "fp32"))


SECTIONS = {  # the setting that a section of --help begins with -> its title
    "dataset": "data", "eval_dataset": "evaluation; training never uses labels",
    "teacher": "teacher", "student": "student", "head": "loss", "epochs": "optimisation",
    "run_dir": "run", "max_train": "what is evaluated, and where",
}


def slug(name):
    """A path's last part, or any name, as part of a file name."""
    return re.sub(r"[^\w.]+", "_", Path(name).resolve().name).lower()[-60:] if name else ""


def suggestion(name, known, dashes=""):
    """'; did you mean x or y?', or nothing."""
    close = [dashes + match for match in difflib.get_close_matches(name, list(known))]
    return f"; did you mean {' or '.join(close)}?" if close else ""


def wrong_dataset(name):
    """Why no data set of this name can be looked for, or ""."""
    is_folder = name and Path(name).is_dir()
    if name in DATASETS and is_folder:
        return (f"{name} is a named data set, and a folder here: write ./{name} for the folder, or "
                "start where there is none")
    if name in DATASETS or is_folder or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", name):
        return ""
    return (f"no data set {name!r}: --dataset takes a folder, owner/name or owner/name@revision on "
            f"the Hub, {', '.join(DATASETS)}")


def validate(cfg, found=(), data=()):
    """Return cfg. Raises UserError: problems in `found`, unknown `data` sets, bad values."""
    found = [*found, *filter(None, map(wrong_dataset, dict.fromkeys(data)))]
    for name, value in vars(cfg).items():
        rule = cfg.__dataclass_fields__[name].metadata
        low, high, choices = rule["low"], rule["high"], rule["choices"]
        if choices and value not in choices:
            found.append(f"--{name} {value}: not one of {', '.join(filter(None, choices))}")
        elif low is not None and not low <= value <= high:
            found.append(f"--{name} {value}: must be from {low} to {high:g}")
    if isinstance(cfg, Config) and cfg.cls_weight == cfg.patch_weight == 0:
        found.append("--cls_weight and --patch_weight are both 0: nothing would be learned")
    if found:
        raise UserError("\n".join(found))
    return cfg


def make_parser(cls):
    """The command line of Config or EvalConfig. Flags that are not given have no value."""
    parser = argparse.ArgumentParser(description=cls.__doc__, allow_abbrev=False,
                                     exit_on_error=False, argument_default=argparse.SUPPRESS)
    group = parser
    for option in fields(cls):
        if option.name in SECTIONS:
            group = parser.add_argument_group(SECTIONS[option.name])
        name = option.name
        text = option.metadata["help"]
        if option.type is list:
            parser.add_argument(name, nargs="+", help=text)
        elif option.type is bool:
            group.add_argument(f"--{name}", action="store_true", help=text)
            group.add_argument(f"--no_{name}", dest=name, action="store_false")
        else:
            text += f" (default: {option.default!r})" if option.default != "" else ""
            kind = "|".join(filter(None, option.metadata["choices"])) or option.type.__name__
            # A shell leaves the tilde of --dataset=~/images alone.
            read = os.path.expanduser if option.type is str else option.type
            group.add_argument(f"--{name}", type=read, metavar=kind, help=text)
    return parser


def parse(cls, argv):
    """Command line -> a validated Config or EvalConfig: the preset first, then the flags."""
    known, unknown = make_parser(cls).parse_known_args(argv)
    given = vars(known)
    found = []
    for word in [word for word in unknown if word.startswith("-")] or unknown:
        name = word.split("=")[0].lstrip("-").replace("-", "_")
        found.append(f"unknown {word}{suggestion(name, cls.__dataclass_fields__, '--')}")
    preset = PRESETS.get(given.get("preset"), {})
    return validate(cls(**preset | given), found)


def cli(main, cls):
    """Run main(parse(cls, argv)); a UserError becomes a message and exit status 2."""
    log.setLevel(logging.INFO)
    log.handlers = [logging.StreamHandler(sys.stdout)]
    logging.raiseExceptions = False  # a terminal that has closed does not end a run
    sys.stdout.reconfigure(errors="replace")  # nor does a name that it cannot show
    try:
        main(parse(cls, sys.argv[1:]))
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        sys.exit(130)
    except (UserError, argparse.ArgumentError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------- for all files: errors, the Hub


def write_atomically(path, write):
    """Run write(temporary path) to make a file or folder, and rename it. Raises UserError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        if temporary.is_file():  # some disks cannot synchronise folders
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # such as a full disk
        raise UserError(f"cannot write {path}: {reason(error)}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def reason(error):
    """The root cause of an error, on one line; libraries wrap what happened."""
    while error.__cause__ and not isinstance(error, UserError):
        error = error.__cause__
    text = printable(" ".join(str(error)[:500].split()))
    if "weights_only" in text:  # torch advises to load untrusted pickles
        return "not a file of plain weights"
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def printable(text):
    """Without control characters, which a terminal would obey, and broken names."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))


def from_hub(what, instead, load, *arguments, **options):
    """load(*arguments, **options), which may download. Raises UserError.
    If the Hub does not respond in five seconds, its libraries go offline and do not retry."""
    try:
        if not hub.constants.HF_HUB_OFFLINE:
            hub.utils.get_session().head(hub.constants.ENDPOINT, timeout=5)
    except Exception:  # the class depends on the HTTP library of the installed version
        hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        return load(*arguments, **options)
    except Exception as error:
        why = "responds, so the name may be wrong or private; if it is right, try again later"
        if hub.constants.HF_HUB_OFFLINE:
            why = "does not respond, and it was not downloaded before"
        raise UserError(f"cannot get {what}: {hub.constants.ENDPOINT} {why} ({reason(error)}).\n"
                        f"Without a network: {instead}, or --preset demo") from error
