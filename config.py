"""All settings of a run: name, default, help and limits; `python train.py --help` lists them."""

import argparse
import difflib
import inspect
import json
import logging
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
from huggingface_hub import constants as hub
from huggingface_hub.utils import get_session

from demo.shapes import shapes

# Threads that wait for others sleep soon: beside another program, spinning ones take several times
# as long (results/speed/busy.txt). torch reads this when it is imported: train.py and eval.py do so
# after this file.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

log = logging.getLogger("distill")
# A data set on the Hub, or a function that returns one (`data.open_source`).
DATASETS = dict(cifar10="uoft-cs/cifar10", cifar100="uoft-cs/cifar100", shapes=shapes)
PRESETS = {
    # The whole method on a laptop CPU in about a minute, with no network.
    "demo": dict(
        dataset="shapes", teacher="demo", teacher_size=32, student="vit_tiny_patch16_224",
        student_args="patch_size=8 embed_dim=64 depth=4 num_heads=4 weight_init=jax",
        student_size=32, crop_scale=0.8, precision="fp32", batch_size=64, epochs=10,
        optimiser="muon", lr=5e-3, eval_at_end=True),
    # 500,000 images of your own on one GPU. No run of that size has been made.
    "large": dict(dataset="", batch_size=512, epochs=100, warmup_epochs=5.0),
}


class UserError(Exception):
    """A mistake that the user can fix: its text states what is wrong, where, and what to do."""


@dataclass(frozen=True)
class Config:
    """Distil a frozen teacher into a small student, from unlabelled images."""
    # data
    dataset: str = "cifar10"  # cifar10, cifar100, shapes, a folder, owner/name[@revision]
    dataset_config: str = ""  # configuration of dataset, if it has several
    image_column: str = ""  # image column of dataset; empty = the only one
    train_split: str = "train"  # split that the student learns from
    max_samples: int = 0  # learn from a fixed random subset; 0 = all images
    stored_size: int = 0  # pixels of decoded images; 0 = what the larger network sees
    crop_scale: float = 0.4  # smallest share of the image that a view shows; 0.7 for short runs
    cache_dir: str = "cache"  # for decoded images and cached targets; a fast disk
    # evaluation; training never uses labels
    eval_dataset: str = ""  # data to evaluate on; empty = the training data
    test_split: str = ""  # split that is tested; empty = test, else validation
    label_column: str = ""  # empty = label, fine_label, cls or the first class column
    eval_every: int = 0  # epochs between quick k-NN checks; 0 = none
    eval_at_end: bool = False  # run eval.py on the last checkpoint
    # teacher
    teacher: str = "dinov2_vitb14"  # dinov2_vit{s,b,l,g}14[_reg], demo, or any timm model
    teacher_weights: str = ""  # a file of the teacher's weights; empty = from the Hub
    teacher_size: int = 224  # pixels it sees; where it is best on your images
    teacher_views: int = 4  # cached views of each image; 0 = new ones each epoch
    # student
    student: str = "vit_small_patch16_224"  # any timm model
    student_args: str = ""  # timm's arguments for it: 'depth=6 embed_dim=192 num_heads=3'
    student_weights: str = ""  # a student.safetensors or timm's to start from; empty = random
    student_size: int = 96  # pixels the student sees; a multiple of its patch
    pool: str = "cls"  # the model's own pooling; or a ViT's mean
    # loss
    head: str = "auto"  # pca: principal axes; linear: a trained map; auto: pca for transformers
    cls_weight: float = 1.0  # weight of the [CLS] loss
    patch_weight: float = 0.5  # weight of the patch loss
    # optimisation
    epochs: int = 50  # passes over the data
    batch_size: int = 256  # images per step, over all processes together
    optimiser: str = "adamw"  # muon: better when epochs are few, slower steps; wants --lr 5e-3
    lr: float = 1e-3  # peak rate; adamw: ViT-S 1e-3, small ViTs 2e-3, conv nets 1e-2; muon: 5e-3
    warmup_epochs: float = 2.0  # epochs of linear warm-up, at most a fifth of the run
    weight_decay: float = 0.05  # weight decay, of matrices; not of biases, norms, tokens
    grad_clip: float = 1.0  # largest gradient norm; 0 = no clipping
    seed: int = 0  # random seed of order, views and initialisation
    # run
    run_dir: str = ""  # run folder; empty = runs/DATASET-TEACHER-STUDENT
    resume: bool = True  # continue the run in run_dir; --no_resume moves it aside first
    device: str = "auto"  # where to run
    precision: str = "auto"  # bf16 where the hardware has it, else fp16 on CUDA, else fp32
    compile: str = "auto"  # torch.compile; auto = on CUDA
    log_every: int = 50  # steps between lines of metrics.jsonl
    save_every: int = 10  # keep a checkpoint every N epochs, and always the first and last

    @property
    def run_path(self):
        usual = f"runs/{slug(self.dataset)}-{self.teacher}-{self.student}"
        return Path(self.run_dir or usual)

    def fixed_settings(self):
        """The settings that may not change when a run is continued."""
        return {name: value for name, value in vars(self).items() if name not in MAY_CHANGE}


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate checkpoints. What is left empty is as in the first checkpoint, but for how another
    data set is read."""
    checkpoints: list = ()
    # data
    dataset: str = ""  # evaluate on other images, with or without labels, in train.py's forms
    dataset_config: str = ""  # configuration of dataset, if it has several
    image_column: str = ""  # image column of dataset
    label_column: str = ""  # label column of dataset
    train_split: str = ""  # split that k-NN and probe learn from
    test_split: str = ""  # split that is tested; if there is none, a tenth of train_split
    cache_dir: str = ""  # for decoded images
    max_train: int = 0  # use a fixed random subset of the training images; 0 = all
    max_test: int = 0  # use a fixed random subset of the test images; 0 = all
    # networks
    teacher_weights: str = ""  # a file of the teacher's weights, if the file has moved
    baselines: bool = True  # also evaluate the teacher and an untrained student
    save_features: str = ""  # also write the student's embeddings, labels, names into FOLDER
    device: str = ""  # where to run
    precision: str = ""  # of the networks


MAY_CHANGE = """
    dataset dataset_config image_column cache_dir eval_dataset test_split label_column eval_every
    eval_at_end teacher_weights student_weights epochs run_dir resume device precision compile
    log_every save_every""".split()  # when a run is continued
CHOICES = dict(pool="cls|mean", head="auto|pca|linear", device="auto|cuda|cpu",
               precision="auto|bf16|fp16|fp32", compile="auto|on|off", optimiser="adamw|muon")
LOWEST = dict(epochs=1, batch_size=1, log_every=1, crop_scale=0.01, teacher_size=8,
              student_size=8)  # others: 0
HIGHEST = dict(crop_scale=1, stored_size=4096, teacher_size=4096, student_size=4096,
               teacher_views=1000, seed=2_147_483_647)  # others: 1e9


def slug(name):
    """The last part of a path, or of owner/name, as part of a file name."""
    if not name:
        return ""
    last = Path(name).resolve().name
    return re.sub(r"[^\w.]+", "_", last).lower()[-60:]


def suggestion(name, known):
    """'; did you mean x?', or nothing."""
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def wrong_dataset(flag, name):
    """Why no data set of this name can be looked for, or ""."""
    if flag == "eval_dataset" and not name:  # the training data
        return ""
    is_folder = os.path.isdir(name)
    if name in DATASETS and is_folder:
        return (f"{name} is a named data set, and a folder here: write ./{name} for the folder, or "
                "start where there is none")
    if name not in DATASETS and os.path.isfile(name):
        return f"--{flag} {name!r} is a file: give its folder; for archives see docs/recipes.md"
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", name)
    if name in DATASETS or is_folder or on_hub:
        return ""
    return (f"--{flag} {name!r}: no folder here, nor owner/name or owner/name@revision on the "
            f"Hub, nor {', '.join(DATASETS)}")


def validate(cfg, *flags, found=()):
    """Return cfg. Raises UserError: what is `found` to be wrong already, data sets of these flags
    that cannot be looked for, bad values."""
    wrong = [wrong_dataset(flag, getattr(cfg, flag)) for flag in flags]
    found = [*found, *filter(None, wrong)]
    for name, value in vars(cfg).items():
        default = getattr(type(cfg), name)
        if name in CHOICES and value not in [default, *CHOICES[name].split("|")]:
            found.append(f"--{name} {value}: not one of {CHOICES[name]}")
        low = LOWEST.get(name, 0)
        high = HIGHEST.get(name, 1e9)
        kinds = int if isinstance(default, int) else (int, float)
        is_right = isinstance(value, kinds) and low <= value <= high
        is_right &= isinstance(value, bool) == isinstance(default, bool)
        if isinstance(default, int | float) and not is_right:
            whole = ", a whole number" if isinstance(default, int) else ""
            found.append(f"--{name} {value}: must be from {low} to {high:g}{whole}")
        if isinstance(default, str) and not isinstance(value, str):
            found.append(f"--{name} {value}: must be text")
    if isinstance(cfg, Config) and cfg.cls_weight == cfg.patch_weight == 0:
        found.append("--cls_weight and --patch_weight are both 0: nothing would be learned")
    if found:
        raise UserError("\n".join(found))
    return cfg


def make_parser(cls):
    """The command line of Config or EvalConfig. What the source says beside a field is its help.
    Flags that are not given have no value."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--setting value ...]", description=cls.__doc__, allow_abbrev=False,
        exit_on_error=False, argument_default=argparse.SUPPRESS)
    if cls is Config:
        parser.add_argument("--preset", metavar="demo|large|FILE.json",
                            help="settings to start from; a run's folder or config.json: its "
                            "settings, for another --run_dir")
    else:
        parser.usage = "%(prog)s checkpoint ... [--setting value ...]"
        parser.add_argument("checkpoints", nargs="+",
                            help="checkpoint files or run folders; a row of the table each")
    # A line "    # loss" begins a section, "    epochs: int = 50  # passes over the data" a flag.
    for name, text in re.findall(r"^    (?:(\w+): .*  )?# (.*)$", inspect.getsource(cls), re.M):
        if not name:
            group = parser.add_argument_group(text)
            continue
        kind = cls.__annotations__[name]
        default = getattr(cls, name)
        if default != "":
            text += f" (default: {default})"
        if kind is bool:
            group.add_argument(f"--{name}", action="store_true", help=text)
            group.add_argument(f"--no_{name}", dest=name, action="store_false")
        else:
            # A shell leaves the tilde of --dataset=~/images alone.
            read = os.path.expanduser if kind is str else kind
            form = CHOICES.get(name, kind.__name__)
            group.add_argument(f"--{name}", type=read, metavar=form, help=text)
    return parser


def parse(cls, argv):
    """Command line -> a validated Config or EvalConfig: the preset first, then the flags."""
    known, unknown = make_parser(cls).parse_known_args(argv)
    given = vars(known)
    settings = read_preset(given.pop("preset", "")) | given
    words = [word for word in unknown if word.startswith("-")] or unknown
    flags = [f"--{name}" for name in cls.__annotations__]
    found = [f"unknown {word}{suggestion(word, flags)}" for word in words]
    return validate(cls(**settings), found=found)


def read_preset(name):
    """The settings of a preset, or of a file that a run has written. Raises UserError."""
    if not name:
        return {}
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if path.is_dir():
        path /= "config.json"
    try:
        settings = vars(Config(**json.loads(path.read_text())))
        return settings | dict(resume=True)  # --no_resume is for one command
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--preset {name}: neither demo nor large nor a config.json of this "
                        f"version ({error})") from error


def cli(main, cls):
    """Run main(parse(cls, argv)); a UserError becomes a message and exit status 2."""
    log.setLevel(logging.INFO)
    log.handlers = [logging.StreamHandler(sys.stdout)]
    logging.raiseExceptions = False  # a terminal that has closed does not end a run
    sys.stdout.reconfigure(errors="replace")  # nor does a name that it cannot show
    try:
        main(parse(cls, sys.argv[1:]))
    except KeyboardInterrupt:
        print("stopped; the same command, without --no_resume, continues", file=sys.stderr)
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
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)


def reason(error):
    """The root cause of an error, on one line; libraries wrap what happened."""
    while error.__cause__ and not isinstance(error, UserError):
        error = error.__cause__
    text = printable(" ".join(str(error)[:500].split()))
    if "weights_only" in text:  # torch advises to load untrusted pickles
        return "not a file of plain weights"
    if isinstance(error, UserError):
        return text
    return f"{type(error).__name__}: {text}"


def printable(text):
    """Without control characters, which a terminal would obey, and broken names."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))


def from_hub(what, instead, load, *arguments, **options):
    """load(*arguments, **options), which may download. Raises UserError.
    If the Hub does not respond in five seconds, its libraries go offline and do not retry."""
    try:
        get_session().head(hub.ENDPOINT, timeout=5)  # fails at once where HF_HUB_OFFLINE is set
    except Exception:  # the class depends on the HTTP library of the installed version
        hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        return load(*arguments, **options)
    except Exception as error:
        why = "responds, so the name may be wrong or private; if it is right, try again later"
        if hub.HF_HUB_OFFLINE:
            why = "does not respond, and it was not downloaded before"
        raise UserError(f"cannot get {what}: {hub.ENDPOINT} {why} ({reason(error)}).\n"
                        f"Without a network: {instead}, or --preset demo") from error
