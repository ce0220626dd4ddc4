"""All settings of a run: name, default, help and limits; `python train.py --help` lists them."""

import argparse
import difflib
import logging
import os
import re
import sys
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import datasets
import huggingface_hub as hub

log = logging.getLogger("distill")
DATASETS = dict(cifar10="uoft-cs/cifar10", cifar100="uoft-cs/cifar100", shapes="")  # "": drawn
PRESETS = {
    # The whole method on a laptop CPU in about a minute, with no network.
    "demo": dict(
        dataset="shapes", teacher="demo", teacher_size=32, student="vit_tiny_patch16_224",
        student_args="patch_size=8 embed_dim=64 depth=4 num_heads=4 weight_init=jax",
        student_size=32, crop_scale=0.8, precision="fp32", batch_size=64, epochs=14, lr=3e-3,
        eval_at_end=True),
    # 500,000 images of your own on one GPU. No run of that size has been made.
    "hf": dict(dataset="", batch_size=512, epochs=100, warmup_epochs=5.0)}

class UserError(Exception):
    """A mistake that the user can fix: its text states what is wrong, where, and what to do."""

def setting(default, help, low=None, high=1e9, choices=(), free=False):
    """A field of Config and its flag. On resume it must be as before, unless it is free."""
    rules = dict(help=help, low=low, high=high, choices=choices, free=free)
    return field(default=default, metadata=rules)

fixed, free = setting, partial(setting, free=True)

@dataclass(frozen=True)
class Config:
    """Distil a frozen teacher into a small student, from unlabelled images."""
    preset: str = fixed("", "defaults to start from", choices=("", *PRESETS))
    # data
    dataset: str = free("cifar10", "cifar10, cifar100, shapes, owner/name on the Hub, or a folder")
    dataset_config: str = free("", "configuration of dataset, if it has several on the Hub")
    image_column: str = free("", "image column of dataset; empty = the only one")
    train_split: str = fixed("train", "split that the student learns from")
    max_samples: int = fixed(0, "learn from a fixed random subset; 0 = all images", 0)
    crop_scale: float = fixed(0.4, "smallest area of a view, as a share of the image's", 0.01, 1)
    cache_dir: str = free("cache", "for decoded images and cached targets; a fast disk")
    # evaluation; training never uses labels
    eval_dataset: str = free("", "data to evaluate on; empty = the training data")
    eval_config: str = free("", "configuration of eval_dataset, if it has several on the Hub")
    eval_column: str = free("", "image column of eval_dataset; empty = the only one")
    eval_split: str = free("", "split k-NN and probe learn from; empty = train_split, or train")
    test_split: str = free("", "split that is tested; empty = test, else validation")
    label_column: str = free("", "empty = label, fine_label, cls or the first class column")
    eval_every: int = free(0, "epochs between quick k-NN checks; 0 = none", 0)
    eval_at_end: bool = free(False, "run eval.py on the last checkpoint")
    # teacher
    teacher: str = fixed("dinov2_vitb14", "dinov2_vit{s,b,l,g}14[_reg], demo, or any timm model")
    teacher_weights: str = free("", "a file of the teacher's weights; empty = from the Hub")
    teacher_size: int = fixed(224, "pixels the teacher sees; a multiple of its patch", 8, 4096)
    teacher_views: int = fixed(4, "cached views of each image; 0 = a new view each epoch", 0, 1000)
    # student
    student: str = fixed("vit_small_patch16_224", "any timm model")
    student_args: str = fixed("", "timm's arguments for it: 'depth=6 embed_dim=192 num_heads=3'")
    student_weights: str = free("", "a student.safetensors or timm's to start from; empty = random")
    student_size: int = fixed(96, "pixels the student sees; a multiple of its patch", 8, 4096)
    pool: str = fixed("cls", "embed by class token, or mean of patches", choices=("cls", "mean"))
    # loss
    head: str = fixed("auto", "pca: fixed map to principal axes; linear: trained; auto: pca for "
                      "ViTs, else linear", choices=("auto", "pca", "linear"))
    cls_weight: float = fixed(1.0, "weight of the [CLS] loss", 0)
    patch_weight: float = fixed(0.5, "weight of the patch loss", 0)
    # optimisation
    epochs: int = free(50, "passes over the data", 1)
    batch_size: int = fixed(256, "images per step, over all processes together", 1)
    lr: float = fixed(1e-3, "peak learning rate of AdamW", 0)
    warmup_epochs: float = fixed(2.0, "epochs of linear warm-up, at most a fifth of the run", 0)
    weight_decay: float = fixed(0.05, "weight decay, of matrices; not of biases, norms, tokens", 0)
    grad_clip: float = fixed(1.0, "largest gradient norm; 0 = no clipping", 0)
    seed: int = fixed(0, "random seed of order, views and initialisation", 0, 2**31 - 1)
    # run
    run_dir: str = free("", "run folder; empty = runs/DATASET-TEACHER-STUDENT")
    resume: bool = free(True, "continue the run in run_dir; --no_resume moves it aside first")
    device: str = free("auto", "where to run", choices=("auto", "cuda", "cpu"))
    precision: str = free("auto", "auto = bf16 where the hardware has it, else fp16 on CUDA or "
                          "fp32", choices=("auto", "bf16", "fp16", "fp32"))
    compile: str = free("auto", "torch.compile; auto = on CUDA", choices=("auto", "on", "off"))
    log_every: int = free(50, "steps between log lines", 1)
    save_every: int = free(10, "keep a checkpoint every N epochs, and always the first and last", 0)

    @property
    def run_path(self):
        return Path(self.run_dir or f"runs/{slug(self.dataset)}-{self.teacher}-{self.student}")

    def settings(self, free):
        """The free settings, or the fixed ones: name -> value."""
        return {option.name: getattr(self, option.name) for option in fields(self)
                if option.metadata["free"] == free}

@dataclass(frozen=True)
class EvalConfig:
    """Evaluate checkpoints on the data of the first, with its settings or those given here."""
    checkpoints: list = free((), "checkpoint files; a row of the table each")
    max_train: int = free(0, "use a fixed random subset of the training images; 0 = all", 0)
    max_test: int = free(0, "use a fixed random subset of the test images; 0 = all", 0)
    baselines: bool = free(True, "also evaluate the teacher and an untrained student")
    overrides: dict = field(default_factory=dict)  # free settings of Config -> value

def slug(name):
    """A path's last part, or any name, as part of a file name."""
    return re.sub(r"[^\w.]+", "_", Path(name).resolve().name).lower()[-60:] if name else ""

def suggestion(name, known, dashes=""):
    """'; did you mean x or y?', or nothing."""
    close = [dashes + match for match in difflib.get_close_matches(name, list(known))]
    return f"; did you mean {' or '.join(close)}?" if close else ""

def validate(cfg, found=(), data=()):
    """Return cfg. Raises UserError: problems in `found`, unknown `data` sets, bad values."""
    found = list(found)
    for name in dict.fromkeys(data):
        on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
        if not (name in DATASETS or on_hub or (name and Path(name).is_dir())):
            found.append(f"no data set {name!r}: --dataset and --eval_dataset take a folder, "
                         f"owner/name on the Hub, {', '.join(DATASETS)}")
    for name, value in vars(cfg).items():
        rule = cfg.__dataclass_fields__[name].metadata
        low, high = rule.get("low"), rule.get("high")
        if rule.get("choices") and value not in rule["choices"]:
            found.append(f"--{name} {value}: not one of {', '.join(filter(None, rule['choices']))}")
        elif low is not None and not low <= value <= high:
            found.append(f"--{name} {value}: must be from {low} to {high:g}")
    if found:
        raise UserError("\n".join(found))
    return cfg

def parse(cls, argv):
    """Command line -> a validated Config or EvalConfig: the preset first, then the flags."""
    own = {option.name: option for option in fields(cls) if option.metadata}
    flags = own | {option.name: option for option in fields(Config) if option.metadata["free"]}
    parser = argparse.ArgumentParser(description=cls.__doc__, allow_abbrev=False,
                                     exit_on_error=False, argument_default=argparse.SUPPRESS)
    for name, option in flags.items():
        text = f"{option.metadata['help']} (default: {option.default!r})"
        if option.type is list:
            parser.add_argument(name, nargs="+", help=text)
        elif option.type is bool:
            parser.add_argument(f"--{name}", action="store_true", help=text)
            parser.add_argument(f"--no_{name}", dest=name, action="store_false")
        else:
            kind = "|".join(filter(None, option.metadata["choices"])) or option.type.__name__
            parser.add_argument(f"--{name}", type=option.type, metavar=kind, help=text)
    known, unknown = parser.parse_known_args(argv)
    given, found = vars(known), []
    for word in [word for word in unknown if word.startswith("-")] or unknown:
        name = word.split("=")[0].lstrip("-").replace("-", "_")
        found.append(f"unknown {word}{suggestion(name, flags, '--')}")
    values = PRESETS.get(given.get("preset"), {}) | {n: given[n] for n in given if n in own}
    if cls is EvalConfig:
        values["overrides"] = {n: given[n] for n in given if n not in own}
    return validate(cls(**values), found)

def cli(main, cls):
    """Run main(parse(cls, argv)); a UserError becomes a message and exit status 2."""
    log.setLevel(logging.INFO)
    log.handlers = [logging.StreamHandler(sys.stdout)]
    try:
        main(parse(cls, sys.argv[1:]))
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        sys.exit(130)
    except (UserError, argparse.ArgumentError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

def write_atomically(path, write):
    """Run write(temporary path) to make a file or folder, and rename it. Raises UserError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        descriptor = os.open(temporary, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        os.replace(temporary, path)
    except OSError as error:  # such as a full disk
        if temporary.is_file():
            temporary.unlink()
        raise UserError(f"cannot write {path}: {reason(error)}") from error

def reason(error):
    """The root cause of an error, on one line; libraries wrap what happened."""
    while error.__cause__:
        error = error.__cause__
    text = "".join(filter(str.isprintable, " ".join(str(error)[:500].split())))
    if "weights_only" in text:  # torch advises to load untrusted pickles
        return "not a file of plain weights"
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"

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
