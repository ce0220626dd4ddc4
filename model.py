"""Networks: the frozen teacher, the student, the heads between them, and the loss.

`load_teacher` and `build_student` return a `Backbone`, which hides what differs between DINOv2,
other ViTs and conv nets: images in [0, 1] go in, a CLS embedding and a grid of patch embeddings
come out. A `Head` takes both sides to one width; only its student side ever trains. `Distiller` is
student + heads + loss in one module, so that compile and DDP wrap one thing.

Axes: B batch, N patches (row-major over the grid), D width. Dt, Ds: the teacher's, the student's D.

DINOv2 (Oquab et al. 2023), registers (Darcet et al. 2023); the fixed, centred projection is in the
line of PHI-S (Ranzinger et al. 2024), learned heads in that of Proteus and UNIC (2024).
"""

import ast
import functools
import hashlib
import os
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import UserError, hub_error, hub_online, nearest, reason

TEACHERS = {  # the official names -> timm's
    f"dinov2_vit{size[0]}14{reg}": f"vit_{size}_patch14{'_reg4' if reg else ''}_dinov2.lvd142m"
    for size in ("small", "base", "large", "giant")
    for reg in ("", "_reg")
}
DEMO_TEACHER = Path(__file__).parent / "assets" / "demo_teacher.safetensors"
DEMO_SIZE = 32  # pixels at which its position table was trained
DEMO_ARGS = dict(patch_size=8, embed_dim=64, depth=4, num_heads=4, init_values=1.0)
WHITEN = dict(pca=0.5, frozen=0.0, linear=1.0)  # power of the targets' deviation, by head
TOKENS_PER_IMAGE = 8  # patches of each image in the statistics of a Head
MAX_HEADER = 1_000_000  # bytes of a safetensors file's list of tensors; 600 of them take 60,000
# Arguments of timm that fetch or read weights: a student starts from random ones.
NO_STUDENT_ARGS = frozenset(
    "pretrained pretrained_cfg pretrained_cfg_overlay checkpoint_path cache_dir".split())


class Features(NamedTuple):
    """What a Backbone says of a batch: cls [B, D], patches [B, N, D], in the forward's dtype."""

    cls: Tensor
    patches: Tensor


class Backbone(nn.Module):
    """A timm model behind one interface.

    forward: images float [B, 3, H, W] in [0, 1], normalised here by the model's own constants ->
    Features. The CLS embedding is the CLS token, or the mean of the patches for pool "mean" and for
    models without one (then conv nets: global average and flattened map of the last stage).
    Attributes: net (the timm model), image_size, embed_dim, grid (rows, columns), tokens (whether
    it gives tokens or a map).
    """

    def __init__(self, net: nn.Module, image_size: int, shape: dict, pool: str = "cls"):
        super().__init__()
        # Up to a tenth faster for conv nets on a CPU; tensor cores want it. ViTs do not mind.
        self.net = net.to(memory_format=torch.channels_last)
        self.image_size, self.embed_dim = image_size, shape["embed_dim"]
        self.grid, self.tokens = shape["grid"], shape["tokens"]
        # A conv net's map may keep its channels last; the ViTs that end in a mean keep their last
        # norm in `fc_norm`, where forward_features does not reach it.
        self.channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC"
        self.token_norm = getattr(net, "fc_norm", None) or nn.Identity()
        self.prefix = getattr(net, "num_prefix_tokens", 0)
        self.by_cls = pool == "cls" and getattr(net, "cls_token", None) is not None
        for name in ("mean", "std"):
            value = torch.tensor(net.pretrained_cfg[name], device="cpu").view(1, 3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def forward(self, images: Tensor) -> Features:
        x = self.net.forward_features((images - self.mean) / self.std)
        if x.ndim == 4:
            patches = x.flatten(1, 2) if self.channels_last else x.flatten(2).mT
            return Features(patches.mean(1), patches)
        x = self.token_norm(x)
        patches = x[:, self.prefix :]
        return Features(x[:, 0] if self.by_cls else patches.mean(1), patches)

    @property
    def embedding(self) -> str:
        """`forward`'s CLS embedding of normalised images, as whoever has the plain timm model says
        it. `student(images)` is not always that: some conv nets have layers behind their pooling.
        """
        x = "student.forward_features(images)"
        if not self.tokens:
            return f"{x}.mean({(1, 2) if self.channels_last else (2, 3)})"
        x = x if isinstance(self.token_norm, nn.Identity) else f"student.fc_norm({x})"
        return f"{x}[:, 0]" if self.by_cls else f"{x}[:, {self.prefix}:].mean(1)"

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.net.parameters())


@functools.cache
def describe(name: str, image_size: int, timm_kwargs: tuple = ()) -> dict:
    """embed_dim, grid, parameters, whether it gives tokens and has batch norm, of a timm model.

    And timm's `arguments` for this size: transformers are told it, conv nets take any. Found on the
    meta device, without memory or weights. Raises what timm raises for arguments the model does not
    take, and UserError for an unknown name and for a size that is not a multiple of its patch, of
    which timm would drop the border without a word.
    """
    if not timm.is_model(name):  # timm would take "hf-hub:owner/name" or "local-dir:path" too
        raise UserError(f"{name} is not among the models of timm {timm.__version__}")
    arguments = dict(timm_kwargs)
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=0, **arguments)
        if hasattr(net, "set_input_size"):
            arguments["img_size"] = image_size
            net = timm.create_model(name, num_classes=0, **arguments)
        patch = getattr(getattr(net, "patch_embed", None), "patch_size", None)
        if patch and image_size % patch[0]:
            low = image_size // patch[0] * patch[0]
            raise UserError(f"{image_size} px is not a multiple of {name}'s {patch[0]} px patch; "
                            f"{low or patch[0]} and {low + patch[0]} are")
        x = net.eval().forward_features(torch.zeros(1, 3, image_size, image_size))
        if x.ndim == 4 and getattr(net, "output_fmt", "") != "NHWC":
            x = x.movedim(1, -1)
        grid, width = x.shape[1:3] if x.ndim == 4 else net.patch_embed.grid_size, x.shape[-1]
    count = sum(p.numel() for p in net.parameters())
    batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())
    return dict(embed_dim=width, grid=tuple(grid), parameters=count, tokens=x.ndim == 3,
                batch_norm=batch_norm, arguments=arguments)


def _teacher_spec(name: str) -> tuple[str, dict]:
    """Teacher name -> timm name and arguments, without the image size."""
    if name == "demo":
        return "vit_small_patch14_dinov2", DEMO_ARGS
    return TEACHERS.get(name, name), {}


def student_kwargs(text: str) -> dict:
    """'depths=(2,2) weight_init=jax' -> {"depths": (2, 2), "weight_init": "jax"}, or UserError."""
    kwargs = {}
    items = filter(None, re.split(r"[\s,]+(?![^(]*\))", text))  # not inside parentheses
    for name, equals, value in (item.partition("=") for item in items):
        if not (name.isidentifier() and equals and value):
            raise UserError(f"--student_args {text!r}: write name=value, separated by spaces")
        if name in NO_STUDENT_ARGS:
            raise UserError(f"--student_args {name}: a student starts from random weights")
        try:
            kwargs[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            kwargs[name] = value  # a word
    return kwargs


def problems(cfg) -> list[str]:
    """What does not fit the models of a Config, found before anything is downloaded or written."""
    known, found = timm.list_models(), []
    sides = [("teacher", *_teacher_spec(cfg.teacher), [*TEACHERS, "demo", *known])]
    try:
        sides.append(("student", cfg.student, student_kwargs(cfg.student_args), known))
    except UserError as error:
        found.append(str(error))
    for role, name, kwargs, names in sides:
        size = getattr(cfg, f"{role}_size")
        if name.split(".")[0] not in known:
            found.append(f"--{role} {name}: not among the models of timm {timm.__version__}"
                         f"{nearest(name, names)}")
            continue
        try:
            info = describe(name, size, tuple(kwargs.items()))
        except UserError as error:
            found.append(f"--{role}_size: {error}")
        except Exception as error:  # timm models fail in many ways on what they do not take
            found.append(f"--{role} {name} cannot be used at {size} px with {kwargs}: {error}")
        else:
            found += _student_problems(cfg, info) if role == "student" else []
    return found


def _student_problems(cfg, info: dict) -> list[str]:
    found, name = [], cfg.student
    if info["parameters"] > cfg.max_student_params:
        found.append(f"--student {name}: {info['parameters'] / 1e6:.1f} M parameters, more than "
                     f"--max_student_params {cfg.max_student_params / 1e6:.0f} M")
    if cfg.batch_size == int(os.environ.get("WORLD_SIZE", 1)) and info["batch_norm"]:
        found.append(f"--batch_size {cfg.batch_size}: {name} has batch norm, which needs two "
                     "images in every process")
    return found


def check_sums(path) -> None:
    """Raise BadZipFile if bits have changed in what torch.save wrote; torch.load does not look.

    torch.save leaves its checksums in the file, and compresses nothing: what is compressed is not
    its own and might unpack to any size.
    """
    with zipfile.ZipFile(path) as file:
        if any(record.compress_type for record in file.infolist()):
            raise zipfile.BadZipFile("it is compressed")
        if bad := file.testzip():
            raise zipfile.BadZipFile(f"the checksum of {bad} is wrong")


def check_header(path) -> None:
    """Raise ValueError if a safetensors file lists more than any model has.

    A file of 87 MB that is nothing but a list of empty tensors keeps the library busy for two
    minutes, in 2 GB of memory.
    """
    with open(path, "rb") as file:
        if (size := int.from_bytes(file.read(8), "little")) > MAX_HEADER:
            raise ValueError(f"its header has {size:,} bytes, more than {MAX_HEADER:,}")


def build_student(name: str, image_size: int, pool: str = "cls", **timm_kwargs) -> Backbone:
    """A randomly initialised student for image_size; seed torch first to repeat it."""
    shape = describe(name, image_size, tuple(timm_kwargs.items()))
    net = timm.create_model(name, num_classes=0, **shape["arguments"])
    return Backbone(net, image_size, shape, pool)


def load_teacher(name: str, image_size: int, weights: str = "") -> Backbone:
    """The frozen teacher, in eval mode, for image_size.

    name: an official DINOv2 name, "demo", or any timm model. weights: a local file, .pth of the
    official DINOv2 release or .pth / .safetensors of timm; "" takes timm's from the Hub.
    DINOv2 features equal the official code's at every size: see `official_position_table`.
    Raises UserError: no network, unknown weights, a file that is not this model's.
    """
    timm_name, kwargs = _teacher_spec(name)
    shape = describe(timm_name, image_size, tuple(kwargs.items()))
    if name == "demo":
        weights, kwargs = weights or str(DEMO_TEACHER), dict(kwargs, img_size=DEMO_SIZE)
    overlay = dict(file=weights) if weights else None
    advice = "--teacher_weights FILE with the downloaded weights"
    if weights and not Path(weights).is_file():
        raise UserError(f"--teacher_weights {weights}: no such file")
    if not weights:
        hub_online()
    try:
        if weights.endswith(".safetensors"):
            check_header(weights)
        elif weights and zipfile.is_zipfile(weights):
            check_sums(weights)
        # At its native size first: the full position table is needed below.
        net = timm.create_model(
            timm_name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, **kwargs
        )
    except Exception as error:
        if weights:
            raise UserError(f"--teacher_weights {weights} does not fit {timm_name}: "
                            f"{reason(error)}") from error
        raise hub_error(f"the weights of {timm_name}", advice, error) from error
    if hasattr(net, "set_input_size"):
        table = net.pos_embed
        net.set_input_size(img_size=image_size)
        if "dinov2" in timm_name and "reg4" not in timm_name:
            net.pos_embed = nn.Parameter(official_position_table(table, net.patch_embed.grid_size))
    return Backbone(net.requires_grad_(False).eval(), image_size, shape)


def official_position_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """DINOv2's position table for another grid, as the official code resamples it.

    table: [1, 1 + G * G, D] with the CLS position first; grid: (rows, columns). Returns
    [1, 1 + rows * columns, D]. The official models without registers were made with bicubic
    interpolation, no anti-aliasing, and a scale factor of (g + 0.1) / G in place of the size; timm
    passes the size and anti-aliases, which moves patch tokens by up to 10% at 98 px. The models
    with registers do as timm does.
    """
    G = int((table.shape[1] - 1) ** 0.5)
    if grid == (G, G):
        return table
    patches = table[:, 1:].reshape(1, G, G, -1).permute(0, 3, 1, 2)
    factor = tuple((g + 0.1) / G for g in grid)
    patches = F.interpolate(patches, scale_factor=factor, mode="bicubic", antialias=False)
    return torch.cat([table[:, :1], patches.flatten(2).mT], 1)


def resample_patches(patches: Tensor, grid: tuple, new_grid: tuple) -> Tensor:
    """Patch tokens [B, N, D] on one grid -> [B, N', D] on another, by position in the image."""
    if tuple(grid) == tuple(new_grid):
        return patches
    maps = patches.float().mT.unflatten(2, grid)
    maps = F.interpolate(maps, size=new_grid, mode="bilinear", antialias=True, align_corners=False)
    return maps.flatten(2).mT


# ---------------------------------------------------------------------------- loss


def cosine_loss(student: Tensor, target: Tensor) -> Tensor:
    """Mean cosine distance, 1 - cos: (..., D) of any float dtype, reduced in float32, in [0, 2]."""
    return 1 - F.cosine_similarity(student.float(), target.float(), dim=-1).mean()


def mse_loss(student: Tensor, target: Tensor) -> Tensor:
    """Mean over D of the squared difference of unit vectors.

    Equals (2 - 2 cos) / D: the cosine loss's direction, D / 2 times smaller. AdamW divides by the
    gradient's size and so hardly notices (results/recipe); SGD and gradient clipping do.
    """
    return F.mse_loss(F.normalize(student.float(), dim=-1), F.normalize(target.float(), dim=-1))


LOSSES = dict(cosine=cosine_loss, mse=mse_loss)


class Head(nn.Module):
    """Brings teacher and student to one width; nothing on the teacher's side ever trains.

    Teacher: target = ((features - mean) @ basis) / scale, all three set once by `fit`.
      pca      basis = the principal axes, Ds of them. A narrower teacher (Dt < Ds) fills the
               first Dt dimensions and leaves the others zero.
      frozen   basis = random orthonormal axes.
      linear   no basis.
    Student: predict(features) is the identity for pca and frozen, so that what was trained is what
    is used, and a trained map Ds -> Dt, thrown away afterwards, for linear. That is for conv nets:
    most end behind a ReLU and cannot say targets that are centred. pca costs ResNet-10t 5 points of
    k-NN, and ConvNeXt-Atto, without a ReLU, 2; linear costs a ViT 3 (results/recipe).

    The mean goes because a teacher's features share a common part, on which a cosine is spent for
    nothing; accuracy hardly shows it, the student's spread does. The scale is each dimension's
    standard deviation to the power `whiten`: a few principal axes hold most of the variance, and a
    cosine hardly looks at the others. By the root of it (half whitened, WHITEN) all of them count,
    and those that are mostly noise not too much: 1 to 3 points of k-NN on CIFAR-10
    (results/recipe). Random axes hold much the same variance and are left as they are; a trained
    map meets whole whitened targets. A trained map on this side instead of these constants would
    let both sides agree on a constant.
    """

    def __init__(self, kind: str, student_dim: int, teacher_dim: int):
        super().__init__()
        self.kind, self.whiten = kind, WHITEN[kind]
        fixed = kind in ("pca", "frozen")
        self.out_dim = student_dim if fixed else teacher_dim
        self.register_buffer("mean", torch.zeros(teacher_dim))
        self.register_buffer("basis", torch.eye(teacher_dim, student_dim) if fixed else None)
        self.register_buffer("scale", torch.ones(self.out_dim))
        self.predict = nn.Identity() if fixed else nn.Linear(student_dim, teacher_dim)

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Measure mean, axes and scale on teacher features float32 [n, Dt]. Deterministic."""
        self.mean.copy_(features.mean(0))
        centred = features - self.mean
        if self.kind == "pca":
            covariance = (centred.T @ centred).double().cpu() / len(centred)
            axes = torch.linalg.eigh(covariance).eigenvectors.flip(1)
            axes = axes[:, : self.out_dim].to(self.basis)
            self.basis.zero_()[:, : axes.shape[1]] = axes
        elif self.kind == "frozen":
            random = torch.randn(self.basis.shape, generator=torch.Generator().manual_seed(0))
            tall = random if random.shape[0] >= random.shape[1] else random.T
            axes = torch.linalg.qr(tall).Q
            self.basis.copy_(axes if axes.shape == random.shape else axes.T)
        std = (centred @ self.basis if self.basis is not None else centred).std(0, correction=0)
        self.scale.copy_(torch.where(std > 1e-6 * std.max(), std, 1.0) ** self.whiten)

    @torch.no_grad()
    def target(self, features: Tensor) -> Tensor:
        """Teacher features (..., Dt) -> float32 targets (..., out_dim)."""
        with torch.autocast(features.device.type, enabled=False):
            centred = features.float() - self.mean
            return (centred @ self.basis if self.basis is not None else centred) / self.scale


class Distiller(nn.Module):
    """Student, heads (for "auto" those that suit the student) and loss as one module.

    forward: student_images [B, 3, S, S] and what `targets` returned [B, 1 + N, K] -> (loss, stats
    [6]): the scalar to minimise, and loss, cls loss, patch loss, teacher-student cosine, and the
    spread (mean pairwise cosine over the batch) of student and of targets.
    """

    STATS = ("loss", "cls", "patch", "cos", "spread", "target_spread")

    def __init__(self, student: Backbone, teacher: Backbone, cfg):
        super().__init__()
        self.student, self.grid, self.teacher_grid = student, student.grid, teacher.grid
        dims = student.embed_dim, teacher.embed_dim
        kind = ("pca" if student.tokens else "linear") if cfg.head == "auto" else cfg.head
        self.cls_head, self.patch_head = (Head(kind, *dims) for _ in range(2))
        self.distance = LOSSES[cfg.loss]
        self.cls_weight, self.patch_weight = cfg.cls_weight, cfg.patch_weight

    @property
    def heads(self) -> nn.ModuleDict:
        """Both heads: their state is saved, and loaded as strictly as the student's."""
        return nn.ModuleDict(dict(cls_head=self.cls_head, patch_head=self.patch_head))

    def fit_heads(self, teacher_features) -> None:
        """Fit both heads on an iterable of the teacher's Features."""
        generator = torch.Generator().manual_seed(0)
        cls, tokens = [], []
        for features in teacher_features:
            patches = resample_patches(features.patches, self.teacher_grid, self.grid).flatten(0, 1)
            some = torch.randperm(len(patches), generator=generator)
            some = some[: TOKENS_PER_IMAGE * len(features.cls)].to(patches.device)
            cls.append(features.cls.float())
            tokens.append(patches[some].float())
        self.cls_head.fit(torch.cat(cls))
        self.patch_head.fit(torch.cat(tokens))

    def targets(self, features: Features) -> Tensor:
        """The teacher's Features -> float32 targets [B, 1 + N, K] on our grid, the CLS first."""
        patches = resample_patches(features.patches, self.teacher_grid, self.grid)
        targets = self.cls_head.target(features.cls)[:, None], self.patch_head.target(patches)
        return torch.cat(targets, 1)

    def forward(self, student_images, targets):
        cls_target, patch_target = targets[:, 0], targets[:, 1:]
        features = self.student(student_images)
        cls = self.cls_head.predict(features.cls)
        cls_loss = self.distance(cls, cls_target)
        patch_loss = self.distance(self.patch_head.predict(features.patches), patch_target)
        loss = self.cls_weight * cls_loss + self.patch_weight * patch_loss
        with torch.no_grad():
            cos = F.cosine_similarity(cls.float(), cls_target.float(), dim=-1).mean()
            stats = torch.stack([loss, cls_loss, patch_loss, cos, spread(cls), spread(cls_target)])
        return loss, stats


def fingerprint(*parts) -> str:
    """A name for what determines a teacher's targets: modules, tensors, values with a repr."""
    digest = hashlib.sha256()
    for part in parts:
        tensors = part.state_dict().values() if isinstance(part, nn.Module) else [part]
        for value in tensors:
            tensor = isinstance(value, Tensor)
            digest.update(value.cpu().numpy().tobytes() if tensor else repr(value).encode())
    return digest.hexdigest()[:16]


def spread(embeddings: Tensor) -> Tensor:
    """Mean pairwise cosine of [B, D]: near 1 means that all images look alike to the model.

    The sum of all B^2 cosines is the squared length of the sum of the unit vectors.
    """
    unit = F.normalize(embeddings.float(), dim=-1)
    B = len(unit)
    return (unit.sum(0).square().sum() - B) / max(B * (B - 1), 1)


# ---------------------------------------------------------------------------- hardware


def pick_device(name: str) -> torch.device:
    """auto: a CUDA GPU, else an Apple one, else the CPU. To be called before models are made."""
    here = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        name = next(device for device, is_here in here.items() if is_here)
    if not here[name]:
        raise UserError(f"--device {name}: torch finds no such device here")
    # On a CPU attention written out trains ViTs 1.4 to 1.7 times as fast as torch's fused one.
    timm.layers.set_fused_attn(name != "cpu")
    return torch.device(name)


def cpu_has_bf16() -> bool:
    return getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """auto: bf16 where the hardware multiplies it, fp16 on older GPUs, else float32."""
    if precision == "auto" and device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if native else "fp16"
    elif precision == "auto":
        native = device.type == "cpu" and cpu_has_bf16()
        precision = "bf16" if native else "fp32"
    return dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[precision]
