"""Networks: the frozen teacher, the student, the heads between them, the loss, and checkpoints.

`load_teacher` and `build_student` return a `Backbone`: images in [0, 1] go in, a CLS embedding and
a grid of patch embeddings come out, for DINOv2, other ViTs and conv nets alike. A `Head` brings
both sides to one width; only its student side ever trains. `Distiller`, the objective, is student,
heads and loss in one module; forks subclass it (examples/forks).

Axes: B batch, N patches (row-major over the grid), T tokens, D width (Dt teacher's, Ds student's).

DINOv2 (Oquab et al. 2023), registers (Darcet et al. 2023); the fixed, centred projection follows
PHI-S (Ranzinger et al. 2024), learned heads follow Proteus and UNIC (2024).
"""

import ast
import dataclasses
import functools
import hashlib
import logging
import math
import re
import resource
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config, UserError, from_hub, reason, suggestion, validate, write_atomically

log = logging.getLogger("distill")

TEACHERS = {  # the official names -> timm's
    f"dinov2_vit{size[0]}14{reg}": f"vit_{size}_patch14{'_reg4' if reg else ''}_dinov2.lvd142m"
    for size in ("small", "base", "large", "giant")
    for reg in ("", "_reg")
}
DEMO_TEACHER = Path(__file__).parent / "demo" / "teacher.safetensors"
DEMO_ARGS = dict(patch_size=8, embed_dim=96, depth=6, num_heads=6, init_values=1.0, img_size=32)
WHITEN = dict(pca=0.5, frozen=0.0, linear=1.0)  # by head: targets are divided by std ** this
TOKENS_PER_IMAGE = 8  # at most, of each term, that `Distiller.fit` uses
FORMAT = 3  # version of the checkpoints' contents


class Features(NamedTuple):
    """What a Backbone outputs: cls [B, D], patches [B, N, D], in the dtype of the forward."""

    cls: Tensor
    patches: Tensor


class Backbone(nn.Module):
    """A timm model behind one interface: images float [B, 3, S, S] in [0, 1] -> Features.

    The CLS embedding is the CLS token, or the mean of the patches for pool "mean" and for models
    without a CLS token. The patches of a conv net are the positions of its last feature map.
    Raises UserError for nets that output no square grid of patch embeddings.
    """

    def __init__(self, net: nn.Module, image_size: int, pool: str = "cls"):
        super().__init__()
        # In channels_last conv nets are up to a tenth faster. ViTs do not mind.
        self.net, self.image_size = net.eval().to(memory_format=torch.channels_last), image_size
        # ViTs that end in a mean apply their last norm, `fc_norm`, after forward_features.
        self.token_norm = getattr(net, "fc_norm", None) or nn.Identity()
        self.prefix = getattr(net, "num_prefix_tokens", 0)
        self.has_cls = pool == "cls" and getattr(net, "cls_token", None) is not None
        self.parameter_count = sum(p.numel() for p in net.parameters())
        for name in ("mean", "std"):
            value = torch.tensor(net.pretrained_cfg[name]).view(3, 1, 1)
            self.register_buffer(name, value, persistent=False)
        with torch.no_grad():
            x = net.forward_features(torch.zeros(1, 3, image_size, image_size))
        self.outputs_tokens = x.ndim == 3  # else a feature map
        _, N, self.embed_dim = self.to_features(x).patches.shape
        self.grid = math.isqrt(N), math.isqrt(N)  # rows, columns
        only_a_class = self.outputs_tokens and x.shape[1] == 1  # PiT
        if N == 0 or math.prod(self.grid) != N or only_a_class:
            raise UserError(f"it outputs {list(x.shape[1:])}, no square grid of patch embeddings; "
                            "take a ViT, a Swin or a conv net")

    def to_features(self, x: Tensor) -> Features:
        """What the net's forward_features outputs -> Features."""
        if self.outputs_tokens:
            x = self.token_norm(x)
            patches = x[:, self.prefix :]
            return Features(x[:, 0] if self.has_cls else patches.mean(1), patches)
        channels_last = getattr(self.net, "output_fmt", "NCHW") == "NHWC"
        patches = x.flatten(1, 2) if channels_last else x.flatten(2).mT
        return Features(patches.mean(1), patches)

    def forward(self, images: Tensor) -> Features:
        normalised = (images - self.mean) / self.std  # by the model's own constants
        return self.to_features(self.net.forward_features(normalised))

    def __str__(self):
        return (f"{self.parameter_count / 1e6:.2f} M parameters, {self.image_size} px, grid "
                f"{self.grid}, width {self.embed_dim}")


def timm_arguments(name, image_size, arguments):
    """timm's arguments for an image size: transformers take it as img_size, conv nets take any.

    Raises UserError for unknown names, and for sizes that the patch does not divide: timm would
    silently drop the border.
    """
    if not timm.is_model(name):  # timm would also take "hf-hub:owner/name"
        close = suggestion(name, [*TEACHERS, *timm.list_models()])
        raise UserError(f"not a model of timm {timm.__version__}{close}")
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=0, **arguments)
    projection = getattr(getattr(net, "patch_embed", None), "proj", None)
    patch = getattr(projection, "stride", (1,))[0]
    if image_size % patch:
        raise UserError(f"{image_size} px is not a multiple of the {patch} px patch, such as "
                        f"{-(-image_size // patch) * patch}")
    return dict(arguments, img_size=image_size) if hasattr(net, "set_input_size") else arguments


def load_net(name, weights, **arguments):
    """A timm model with the weights of a local file, or for "" with timm's from the Hub.

    Raises UserError: no network, a file that is damaged or not this model's.
    """
    create = functools.partial(timm.create_model, name, **arguments)
    if not weights:
        return from_hub(f"the weights of {name}", "--teacher_weights FILE", create, pretrained=True)
    try:
        if zipfile.is_zipfile(weights):
            check_sums(weights)
        net = create()
        # Converts the names of other releases, and resizes position tables.
        converter = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
        keys = timm.models.load_checkpoint(
            net, weights, strict=False, filter_fn=converter, weights_only=True)
        if keys.missing_keys:
            raise ValueError(f"it has no {keys.missing_keys[0]}")
    except Exception as error:
        raise UserError(f"{weights} does not fit {name}: {reason(error)}") from error
    return net


def build_student(name: str, image_size: int, pool: str = "cls", weights: str = "",
                  **timm_kwargs) -> Backbone:
    """A student for image_size, with random weights (seed torch first) or those of a file.

    Its attribute `arguments` holds all that timm needs to build it again.
    """
    arguments = timm_arguments(name, image_size, timm_kwargs)
    load = functools.partial(load_net, weights=weights) if weights else timm.create_model
    student = Backbone(load(name, num_classes=0, **arguments), image_size, pool)
    student.arguments = arguments
    return student


def student_of(cfg, weights=None):
    """The student of a config: with a checkpoint's weights, or as it is before training."""
    torch.manual_seed(cfg.seed)
    start = "" if weights else cfg.student_weights
    arguments = student_arguments(cfg.student_args)
    student = build_student(cfg.student, cfg.student_size, cfg.pool, start, **arguments)
    if weights:
        student.net.load_state_dict(weights)
    return student


def student_arguments(text):
    """'depths=(2,2) weight_init=jax' -> {"depths": (2, 2), "weight_init": "jax"}, or UserError."""
    arguments = {}
    for item in re.split(r"[\s,]+(?![^(]*\))", text) if text else ():  # not inside parentheses
        name, _, value = item.partition("=")
        if not (name and value) or name.startswith(("pretrained", "checkpoint")):
            raise UserError(f"--student_args {text!r}: write name=value, separated by spaces; "
                            "weights are given by --student_weights")
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[name] = value  # a word
    return arguments


def teacher_spec(name):
    """Teacher name -> timm name and arguments."""
    if name == "demo":
        return "vit_small_patch14_dinov2", DEMO_ARGS
    return TEACHERS.get(name, name), {}


def load_teacher(name: str, image_size: int, weights: str = "") -> Backbone:
    """The frozen teacher, in eval mode, for image_size; attribute fingerprint names its weights.

    name: an official DINOv2 name, "demo", or any timm model. weights: a local file, .pth of the
    official DINOv2 release or .pth / .safetensors of timm; "" takes timm's from the Hub.
    DINOv2 features equal the official code's at every size: see `official_position_table`.
    Raises UserError as `load_net`.
    """
    timm_name, arguments = teacher_spec(name)
    timm_arguments(timm_name, image_size, arguments)  # raises before anything is downloaded
    if name == "demo":
        weights = weights or str(DEMO_TEACHER)
    # At its native size, with its whole position table.
    net = load_net(timm_name, weights, num_classes=0, **arguments)
    digest = hashlib.sha256()
    for value in net.state_dict().values():
        digest.update(value.numpy().tobytes())
    table = getattr(net, "pos_embed", None)
    if hasattr(net, "set_input_size"):
        net.set_input_size(img_size=image_size)
    if "dinov2" in timm_name and "reg4" not in timm_name:
        net.pos_embed = nn.Parameter(official_position_table(table, net.patch_embed.grid_size))
    teacher = Backbone(net.requires_grad_(False), image_size)
    teacher.fingerprint = digest.hexdigest()[:12]
    return teacher


def official_position_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """DINOv2's position table for another grid, as the official code resamples it.

    table: [1, 1 + G * G, D] with the CLS position first. Returns [1, 1 + rows * columns, D]. The
    official code for models without registers interpolates without anti-aliasing, by a scale factor
    of (g + 0.1) / G in place of the size. timm passes the size and anti-aliases, which moves patch
    tokens by up to 10% at 98 px. For models with registers the official code does as timm does.
    """
    G = math.isqrt(table.shape[1] - 1)
    if grid == (G, G):
        return table
    patches = table[:, 1:].mT.unflatten(2, (G, G))
    factor = [(g + 0.1) / G for g in grid]
    patches = F.interpolate(patches, scale_factor=factor, mode="bicubic")
    return torch.cat([table[:, :1], patches.flatten(2).mT], 1)


@functools.cache  # `parse` calls it, and `train.main` again
def problems(cfg):
    """What does not fit the models of a Config, found before anything is downloaded or written."""
    found = []
    for side in ("teacher", "student"):
        name, size = getattr(cfg, side), getattr(cfg, f"{side}_size")
        try:
            timm_name, arguments = teacher_spec(name)
            if side == "student":
                timm_name, arguments = name, student_arguments(cfg.student_args)
            with torch.device("meta"):
                build_student(timm_name, size, **arguments)
        except Exception as error:  # timm models fail in many ways on what they do not take
            found.append(f"--{side} {name} at {size} px: {reason(error)}")
    return found


def cosine_loss(student: Tensor, target: Tensor) -> Tensor:
    """Cosine distance of each token: (..., D), any float dtype -> float32 (...), in [0, 2]."""
    return 1 - F.cosine_similarity(student.float(), target.float(), dim=-1)


def mse_loss(student: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference of unit vectors, (2 - 2 cos) / D: (..., D) -> float32 (...).

    The direction of the cosine loss, with gradients D / 2 times smaller.
    """
    difference = F.normalize(student.float(), dim=-1) - F.normalize(target.float(), dim=-1)
    return difference.square().mean(-1)


LOSSES = dict(cosine=cosine_loss, mse=mse_loss)


def resample_patches(patches: Tensor, grid: tuple, new_grid: tuple) -> Tensor:
    """Patch tokens [B, N, D] on one grid -> [B, N', D] on another, by position in the image."""
    if grid == new_grid:
        return patches
    maps = patches.float().mT.unflatten(2, grid)
    maps = F.interpolate(maps, size=new_grid, mode="bilinear", antialias=True)
    return maps.flatten(2).mT


class Head(nn.Module):
    """Brings teacher and student to one width; nothing on the teacher's side ever trains.

    Teacher: target = (features - mean) @ basis / scale, all three set once by `fit`.
      pca      basis = the Ds principal axes. A narrower teacher (Dt < Ds) fills the first Dt
               dimensions and leaves the others zero. For ViTs.
      frozen   basis = random orthonormal axes.
      linear   basis = the identity.
    Student: predict(features) is the identity for pca and frozen, and a trained map Ds -> Dt for
    linear, thrown away afterwards. That is for conv nets: most end in a ReLU, so they cannot output
    the negative values that centred targets need.

    The mean is removed because the features of all images share a large common part. The scale is
    each dimension's standard deviation to the power `whiten`: a few principal axes hold most of the
    variance and dominate the cosine; half whitening lets the others count (results/recipe).
    """

    def __init__(self, kind: str, student_dim: int, teacher_dim: int):
        super().__init__()
        self.kind, self.whiten = kind, WHITEN[kind]
        width, self.predict = student_dim, nn.Identity()
        if kind == "linear":
            width, self.predict = teacher_dim, nn.Linear(student_dim, teacher_dim)
        self.register_buffer("mean", torch.zeros(teacher_dim))
        self.register_buffer("basis", torch.eye(teacher_dim, width))
        self.register_buffer("scale", torch.ones(width))

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Measure mean, axes and scale on teacher features float32 [n, Dt]. Deterministic."""
        self.mean.copy_(features.mean(0))
        if self.kind == "pca":
            centred = features - self.mean
            covariance = (centred.T @ centred).cpu().double()
            axes = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, : len(self.scale)]
            self.basis.zero_()[:, : axes.shape[1]] = axes
        elif self.kind == "frozen":
            generator = torch.Generator().manual_seed(0)
            axes = nn.init.orthogonal_(torch.empty(self.basis.shape), generator=generator)
            self.basis.copy_(axes)
        std = ((features - self.mean) @ self.basis).std(0, correction=0)
        self.scale.copy_(torch.where(std > 1e-6 * std.max(), std, 1.0) ** self.whiten)

    @torch.no_grad()
    def target(self, features: Tensor) -> Tensor:
        """Teacher features (..., Dt) -> float32 targets (..., Ds), for linear (..., Dt)."""
        with torch.autocast(features.device.type, enabled=False):
            return (features.float() - self.mean) @ self.basis / self.scale

    def extra_repr(self) -> str:
        return f"{self.kind}, {len(self.mean)} -> {len(self.scale)}, whiten={self.whiten}"


# What is distilled: name -> function of Features that returns tokens [B, T, D]. Each term has a
# Head, a weight in `Distiller.weights`, and a loss and a cosine in the log.
TERMS = dict(cls=lambda features: features.cls[:, None], patch=lambda features: features.patches)


class Distiller(nn.Module):
    """The objective: student, a head for each term, and the loss, as one module.

    A fork overrides what it changes and is passed to `train.main(cfg, objective=Fork)`. Whatever it
    registers (parameters, buffers, modules) is saved in checkpoints and restored. torch is seeded
    anew at every step, so random numbers drawn in a step are those of an undisturbed run.
    """

    terms = TERMS

    def __init__(self, student: Backbone, teacher: Backbone, cfg: Config):
        super().__init__()
        self.student, self.teacher_grid, self.cfg = student, teacher.grid, cfg
        kind = cfg.head
        if kind == "auto":
            kind = "pca" if student.outputs_tokens else "linear"
        heads = {name: Head(kind, student.embed_dim, teacher.embed_dim) for name in self.terms}
        self.heads = nn.ModuleDict(heads)
        self.distance = LOSSES[cfg.loss]
        self.weights = dict(cls=cfg.cls_weight, patch=cfg.patch_weight)

    def shared_view(self, images: Tensor, view: int, index: Tensor) -> Tensor:
        """Augmentation that both networks see: images [B, 3, S, S] in [0, 1] -> the same.

        view: number of the crop. index int64 [B]: positions of the images in the store, on the
        CPU. Called at the teacher's size and at the student's. Targets are cached, so it may depend
        on (cfg.seed, view, index) alone.
        """
        return images

    def student_view(self, images: Tensor, epoch: int, index: Tensor) -> Tensor:
        """Augmentation that only the student sees, after `shared_view`."""
        return images

    def embed(self, backbone: Backbone, images: Tensor) -> Features:
        """In training, student or teacher: images [B, 3, S, S] -> Features.

        Evaluation calls the Backbone itself.
        """
        return backbone(images)

    def on_student_grid(self, features: Features) -> Features:
        """The teacher's Features, every field [B, N, D] resampled to the student's grid."""
        return features._make(
            resample_patches(x, self.teacher_grid, self.student.grid) if x.ndim == 3 else x
            for x in features)

    def fit(self, teacher_features) -> None:
        """Fit the heads on an iterable of the teacher's Features."""
        collected = {name: [] for name in self.terms}
        for features in map(self.on_student_grid, teacher_features):
            for name, tokens_of in self.terms.items():
                tokens = tokens_of(features).float()
                last = tokens.shape[1] - 1
                some = torch.linspace(0, last, min(last + 1, TOKENS_PER_IMAGE)).round().long()
                collected[name].append(tokens[:, some].flatten(0, 1))
        for name, head in self.heads.items():
            head.fit(torch.cat(collected[name]))

    def targets(self, features: Features) -> Tensor:
        """The teacher's Features -> float32 targets [B, T, D], the terms one after the other."""
        features = self.on_student_grid(features)
        tokens = [self.heads[name].target(of(features)) for name, of in self.terms.items()]
        return torch.cat(tokens, 1)

    def term_loss(self, name: str, prediction: Tensor, target: Tensor) -> Tensor:
        """A term's predictions and targets [B, T, D] -> a scalar. The place for masks."""
        return self.distance(prediction, target).mean()

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's view [B, 3, S, S] and targets [B, T, D] -> (loss, scalars for the log)."""
        features = self.embed(self.student, images)
        stats = dict(loss=0.0, target_similarity=mean_similarity(targets[:, 0]))
        for name, tokens_of in self.terms.items():
            prediction = self.heads[name].predict(tokens_of(features))
            target, targets = targets.tensor_split([prediction.shape[1]], 1)
            stats[name] = self.term_loss(name, prediction, target)
            stats["loss"] = stats["loss"] + self.weights[name] * stats[name]
            prediction = prediction.detach()
            stats[f"cos_{name}"] = 1 - cosine_loss(prediction, target).mean()
            stats.setdefault("similarity", mean_similarity(prediction[:, 0]))  # of the first term
        if targets.shape[1] > 0:  # with timm's patch_drop_rate, for one
            raise UserError(f"the student outputs {targets.shape[1]} tokens fewer than the targets "
                            "have")
        return stats["loss"], stats

    def after_step(self, step: int) -> None:
        """Called after every optimiser step: averages, queues."""

    @property
    def evaluated(self) -> Backbone:
        """What is evaluated and exported."""
        return self.student


def mean_similarity(embeddings: Tensor) -> Tensor:
    """Mean cosine of different images' embeddings [B, D]; near 1 all images are embedded alike.

    The sum of all B^2 cosines is the squared length of the sum of the unit vectors.
    """
    unit, B = F.normalize(embeddings.float(), dim=-1), len(embeddings)
    return (unit.sum(0).square().sum() - B) / max(B * (B - 1), 1)


def save_checkpoint(path, run, step):
    """Write all that continues, evaluates or exports a run: tensors, numbers, text, no code."""
    state = dict(
        format=FORMAT, step=step, epoch=step / run.steps_per_epoch, history=run.history,
        student=run.objective.evaluated.net.state_dict(), objective=run.objective.state_dict(),
        optimiser=run.optimiser.state_dict(), scaler=run.scaler.state_dict(), fixed=run.fixed,
        config=dataclasses.asdict(run.cfg), commit=environment(run.device)["commit"])
    write_atomically(path, functools.partial(torch.save, state))


def load_checkpoint(path):
    """What `save_checkpoint` wrote -> (its contents, its Config). Runs no code from the file.

    A setting that the file lacks takes its default. Raises UserError when a bit has changed, and
    for files of another program or version.
    """
    try:
        check_sums(path)
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved.get("format") != FORMAT:
            raise ValueError("it is of an earlier version of this program")
        cfg = Config(**saved["config"])
        validate(cfg)
        if missing := vars(cfg).keys() - saved["config"].keys():
            log.warning(f"{path} lacks {', '.join(sorted(missing))}: the defaults are taken")
    except Exception as error:
        raise UserError(f"{path} is not a checkpoint that can be used here, or it is damaged "
                        f"({reason(error)}). Take another one; in training --no_resume moves its "
                        "run aside and starts afresh") from error
    return saved, cfg


def check_sums(path):
    """Raise BadZipFile if bits have changed in what torch.save wrote; torch.load does not look."""
    with zipfile.ZipFile(path) as file:
        if bad := file.testzip():
            raise zipfile.BadZipFile(f"the checksum of {bad} is wrong")


def pick_device(name):
    """auto: a CUDA GPU, else an Apple one, else the CPU. To be called before models are made."""
    here = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        name = [device for device, is_here in here.items() if is_here][0]
    if not here[name]:
        raise UserError(f"--device {name}: torch finds no such device here")
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in evaluation above all
    # On a CPU, attention written out trains ViTs 1.4 to 1.7 times as fast as torch's fused one.
    timm.layers.set_fused_attn(name != "cpu")
    return torch.device(name)


def pick_dtype(precision, device):
    """auto: bf16 where the hardware multiplies it, fp16 on older GPUs, else float32."""
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    elif precision == "auto":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)  # of torch 2.6 and later
        fast = device.type == "cpu" and capabilities().get("avx512_bf16")
        precision = "bf16" if fast else "fp32"
    return dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[precision]


def autocast(device, dtype):
    """Mixed precision in `dtype`, nothing for float32. It can be entered again, but not nested."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def peak_memory(device):
    """Most memory in use so far, in GB: of the GPU, or on a CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@functools.cache
def environment(device):
    """What results depend on: versions, device, and the git commit, "-dirty" if changed since."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    folder = shlex.quote(str(Path(__file__).parent))
    failed, commit = subprocess.getstatusoutput(
        f"git -C {folder} describe --always --dirty --abbrev=40 --exclude='*'")
    return dict(torch=torch.__version__, timm=timm.__version__, device=name,
                commit="unknown" if failed else commit)
