"""The method: heads, loss and objective; and the networks: teacher, student, checkpoints.

Part I is what is distilled. A `Head` brings teacher and student to one width; only its student side
ever trains. `Distiller`, the objective, is student, heads and loss in one module; a fork is a
subclass of it (examples/forks). Part II builds the networks: `load_teacher` and `build_student`
return a `Backbone`: images in [0, 1] -> a CLS embedding and patch embeddings.
Axes: B batch, N patches (row-major over the grid), T = 1 + N tokens, D width (Dt teacher's).

DINOv2 (Oquab et al. 2023), registers (Darcet et al. 2023); the fixed, centred projection follows
PHI-S (Ranzinger et al. 2024), learned heads follow Proteus and UNIC (2024)."""

import ast
import copy
import json
import math
import re
import resource
import subprocess
import sys
import zipfile
from contextlib import contextmanager, suppress
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from config import Config, UserError, from_hub, log, reason, suggestion, validate, write_atomically
from data import digest

WHITEN = dict(pca=0.5, linear=1.0)  # by head: targets are divided by std ** this
PLACES = 8  # patches of an image, at most, on which means and axes are measured

# ================================================================ I. the method


class Features(NamedTuple):
    """What a Backbone outputs, in the dtype of the forward. Forks add fields (middle.py)."""
    cls: Tensor  # [B, D]
    patches: Tensor  # [B, N, D]; of some models another D


def cosine_loss(student: Tensor, target: Tensor) -> Tensor:
    """Cosine distance of each token: (..., D), any float dtype -> float32 (...), in [0, 2]."""
    return 1 - F.cosine_similarity(student.float(), target.float(), dim=-1)


def resample_patches(patches, grid, new_grid):
    """Patch tokens [B, N, D] on one grid -> [B, N', D] on another, by position in the image."""
    if grid == new_grid:
        return patches
    maps = patches.float().mT.unflatten(2, grid)
    maps = F.interpolate(maps, size=new_grid, mode="bilinear", antialias=True)
    return maps.flatten(2).mT


def finite(outputs, network="teacher"):
    """The same tensor. Raises UserError if the network has output NaN or infinity."""
    if not outputs.isfinite().all():
        raise UserError(f"the {network} outputs NaN or infinity: check its weights, or --precision "
                        "fp32")
    return outputs


def some_places(features, generator):
    """Features whose patches [B, N, D], and fields like them, keep PLACES random places, the same
    for all images: float32."""
    def keep(x):
        if x.ndim == 3:
            x = x[:, torch.randperm(x.shape[1], generator=generator)[:PLACES]]
        return x.float()

    return features._make(keep(x) for x in features)


def mean_similarity(embeddings):
    """Mean cosine of different images' embeddings [B, D]; near 1 all are alike: a collapse."""
    unit = F.normalize(embeddings.float(), dim=-1)
    B = len(embeddings)
    pairs = max(B * (B - 1), 1)
    return (unit.sum(0).square().sum() - B) / pairs


class Head(nn.Module):
    """Brings teacher and student to one width; nothing on the teacher's side ever trains.

    Teacher: target = (features - mean) @ basis / scale, all three set once by `fit`.
      pca      basis = the Ds principal axes. A narrower teacher (Dt < Ds) fills the first Dt
               dimensions and leaves the others zero. For transformers.
      linear   basis = the identity.
    Student: predict(features) is the identity, and for linear a trained map Ds -> Dt: most conv
    nets end in a ReLU, so they cannot output the negative values of centred targets.

    The mean is what all images share. The scale is each dimension's standard deviation to the power
    `whiten`: without it a few principal axes dominate the cosine (results/recipe)."""

    def __init__(self, kind, student_dim, teacher_dim):
        super().__init__()
        self.kind, self.whiten = kind, WHITEN[kind]
        width, self.predict = student_dim, nn.Identity()
        if kind == "linear":
            width, self.predict = teacher_dim, nn.Linear(student_dim, teacher_dim)
        self.register_buffer("mean", torch.zeros(teacher_dim))
        self.register_buffer("basis", torch.eye(teacher_dim, width))
        self.register_buffer("scale", torch.ones(width))

    @torch.no_grad()
    def fit(self, features):
        """Measure mean, axes and scale on tokens of the teacher, float32 [any, Dt]."""
        features = features.double()
        self.mean.copy_(features.mean(0))
        centred = features - self.mean
        if self.kind == "pca":
            covariance = (centred.T @ centred).cpu()
            axes = torch.linalg.eigh(covariance).eigenvectors.flip(1)
            self.basis[:, : len(axes)] = axes[:, : len(self.scale)]  # further columns stay zero
        std = (centred @ self.basis.double()).std(0, correction=0)
        varies = std > 1e-5 * std.max()  # of fewer images than dimensions some do not
        self.basis *= varies
        self.scale.copy_(torch.where(varies, std, 1.0) ** self.whiten)

    @torch.no_grad()
    def target(self, features):
        """Teacher features (..., Dt) -> float32 targets (..., Ds), for linear (..., Dt)."""
        with torch.autocast(features.device.type, enabled=False):
            return (features.float() - self.mean) @ self.basis / self.scale


class Distiller(nn.Module):
    """The objective: student, heads and loss, as one module.

    A fork is a subclass: `train.main(cfg, objective=Fork)`. What it registers (parameters, buffers,
    modules) is saved and restored, of several processes rank 0's. Before each step torch, numpy and
    Python's random are seeded, so that a continued run repeats what is drawn in it."""

    def __init__(self, student, teacher, cfg):
        super().__init__()
        if type(self).__qualname__ == "Distiller" and type(self) is not Distiller:
            raise UserError("a fork of Distiller needs a name of its own, which its run states")
        self.student = student
        self.teacher_grid = teacher.grid
        self.cfg = cfg
        kind = cfg.head
        if kind == "auto":
            kind = "pca" if student.outputs_tokens else "linear"
        self.cls_head = Head(kind, student.cls_dim, teacher.cls_dim)
        self.patch_head = Head(kind, student.patch_dim, teacher.patch_dim)

    def fit(self, features):
        """Fit the heads. features: the teacher's, float32, of some thousand images at once: cls
        [I, Dt], patches [I, PLACES, Dt], random ones of the student's grid."""
        self.cls_head.fit(features.cls)
        self.patch_head.fit(features.patches.flatten(0, 1))

    def on_student_grid(self, features):
        """The teacher's Features, every field [B, N, D] resampled to the student's grid."""
        grids = self.teacher_grid, self.student.grid
        return features._make(resample_patches(x, *grids) if x.ndim == 3 else x for x in features)

    def targets(self, features):
        """The teacher's Features -> float32 targets [B, 1 + N, D], CLS first. They are cached."""
        features = self.on_student_grid(features)
        cls = self.cls_head.target(features.cls)[:, None]
        patches = self.patch_head.target(features.patches)
        return concatenate_tokens(cls, patches)

    def losses(self, features, target):
        """The student's Features and their targets [B, 1 + N, D] -> the loss, and what is logged:
        name -> scalar tensor."""
        cls = self.cls_head.predict(features.cls)
        patches = self.patch_head.predict(features.patches)
        # CLS and patches may have other widths: the narrower targets are filled up with zeros.
        cls_loss = cosine_loss(cls, target[:, 0, : cls.shape[-1]]).mean()
        patch_loss = cosine_loss(patches, target[:, 1:, : patches.shape[-1]]).mean()
        loss = self.cfg.cls_weight * cls_loss + self.cfg.patch_weight * patch_loss
        similarity = mean_similarity(cls.detach())
        return loss, dict(cls=cls_loss, patch=patch_loss, similarity=similarity)

    def forward(self, images, target):
        """A view as the student sees it, [B, 3, s, s] in [0, 1], and its targets -> `losses`."""
        return self.losses(self.embed(self.student, images), target)

    def embed(self, backbone, images):
        """In training, of student or teacher: images [B, 3, S, S] -> Features."""
        return backbone(images)

    def shared_view(self, images, view, index):
        """Augmentation that both networks see: images [B, 3, S, S] in [0, 1] -> the same.
        index int64 [B]: positions in the store, on the CPU. Called at the teacher's size and at the
        student's. Targets are cached, so it may depend on (cfg.seed, view, index) alone: draw with
        `data.uniform`."""
        return images

    def student_view(self, images, epoch, index):
        """Augmentation that only the student sees, after `shared_view`."""
        return images

    def parameter_groups(self, weight_decay):
        """AdamW's: decay for matrices and kernels; none for biases and norms (1-D), nor for tokens
        (3-D). "lr_scale" in a group multiplies the learning rate, as in timm's layer decay."""
        decayed = [p for p in self.parameters() if p.ndim in (2, 4)]
        others = [p for p in self.parameters() if p.ndim not in (2, 4)]
        return [dict(params=others, weight_decay=0.0),
                dict(params=decayed, weight_decay=weight_decay)]

    def after_step(self, step):
        """Called after optimiser step `step`, counted from 0: averages, queues. Gradients may be
        gone by then."""

    @property
    def evaluated(self):
        """What is evaluated and exported."""
        return self.student


def concatenate_tokens(*parts):
    """Tokens [B, T, D] of one or several widths -> [B, sum of T, largest D], filled with zeros."""
    width = max(part.shape[-1] for part in parts)
    padded = [F.pad(part, (0, width - part.shape[-1])) for part in parts]
    return torch.cat(padded, 1)


# ================================================================ II. networks and checkpoints

TEACHERS = dict(  # the official names -> timm's
    dinov2_vits14="vit_small_patch14_dinov2.lvd142m",
    dinov2_vitb14="vit_base_patch14_dinov2.lvd142m",
    dinov2_vitl14="vit_large_patch14_dinov2.lvd142m",
    dinov2_vitg14="vit_giant_patch14_dinov2.lvd142m",
    dinov2_vits14_reg="vit_small_patch14_reg4_dinov2.lvd142m",
    dinov2_vitb14_reg="vit_base_patch14_reg4_dinov2.lvd142m",
    dinov2_vitl14_reg="vit_large_patch14_reg4_dinov2.lvd142m",
    dinov2_vitg14_reg="vit_giant_patch14_reg4_dinov2.lvd142m",
    demo="vit_small_patch14_dinov2")  # whose file states its smaller size
WEIGHTS = dict(demo=str(Path(__file__).parent / "demo" / "teacher.safetensors"))
FORMAT = 6  # version of the checkpoints' contents
PARTS = "config step epoch history student objective optimiser scaler identity commit".split()


class Backbone(nn.Module):
    """A timm model behind one interface: images float [B, 3, S, S] in [0, 1] -> Features.

    cls is what timm returns for the image, `forward_head(x, pre_logits=True)`: the class token of a
    ViT, the pooling of a conv net with whatever layers follow it. patches are the other tokens, or
    the places of the last feature map. Raises UserError for nets without a square grid."""

    def __init__(self, net, image_size):
        super().__init__()
        self.net, self.image_size = net.eval(), image_size
        # On a CPU conv nets embed up to 1.8 times as fast in channels_last (results/speed). Not
        # RepVGG, FastViT, MobileOne: there oneDNN's AVX2 gradients overwrite memory (torch 2.14).
        kinds = [(m.kernel_size, m.stride) for m in net.modules()
                 if isinstance(m, nn.Conv2d) and m.in_channels < 8]
        if ((1, 1), (2, 2)) not in kinds:
            net.to(memory_format=torch.channels_last)
        has_token = getattr(net, "cls_token", None) is not None
        self.prefix = getattr(net, "num_prefix_tokens", int(has_token))  # class token, registers
        self.fingerprint = ""  # a teacher's names its weights
        self.names = [*net.state_dict()]
        self.parameter_count = sum(p.numel() for p in net.parameters())
        for name in ("mean", "std"):
            value = torch.tensor(net.pretrained_cfg[name]).view(3, 1, 1)
            self.register_buffer(name, value, persistent=False)
        with torch.no_grad():
            x = net.forward_features(torch.zeros(1, 3, image_size, image_size))
            self.outputs_tokens = x.ndim == 3  # else a feature map
            features = self.to_features(x)
        if features.cls.ndim != 2:
            raise UserError(f"it outputs no one embedding of an image: {[*features.cls.shape]}")
        self.cls_dim = features.cls.shape[-1]
        _, N, self.patch_dim = features.patches.shape
        side = math.isqrt(N)
        self.grid = side, side  # rows, columns
        if side**2 != N or N == 0:
            raise UserError(f"it outputs {list(x.shape[1:])}, no square grid of patch embeddings "
                            f"behind {self.prefix} other tokens (num_prefix_tokens)")

    def to_features(self, x):
        """What the net's forward_features outputs, [B, P + N, D] or a map, -> Features."""
        cls = self.net.forward_head(x, pre_logits=True)
        if self.outputs_tokens:
            patches = x[:, self.prefix :]
        elif getattr(self.net, "output_fmt", "NCHW") == "NHWC":
            patches = x.flatten(1, 2)
        else:
            patches = x.flatten(2).mT
        return Features(cls, patches)

    def forward(self, images):
        normalised = (images - self.mean) / self.std  # by the model's own constants
        return self.to_features(self.net.forward_features(normalised))

    def __str__(self):
        return (f"{self.parameter_count / 1e6:.2f} M parameters, {self.image_size} px, "
                f"grid {self.grid}")


def build_student(cfg, state=None) -> Backbone:
    """The student of a config: as it is before training, random or from --student_weights, or with
    a checkpoint's state dict. Attribute `arguments`: all that timm needs to build it again.
    Raises UserError."""
    torch.manual_seed(cfg.seed)
    with naming(f"--student {cfg.student} at {cfg.student_size} px"):
        arguments = parse_arguments(cfg.student_args)
        blank = check_model(cfg.student, cfg.student_size, arguments)
        if hasattr(blank, "set_input_size"):  # transformers; conv nets take any size
            arguments["img_size"] = cfg.student_size
        if cfg.pool == "mean" and isinstance(blank, timm.models.VisionTransformer):
            arguments |= dict(global_pool="avg", fc_norm=False)
        elif cfg.pool == "mean" and hasattr(blank, "cls_token"):
            raise UserError("--pool mean is for timm's VisionTransformer, and for conv nets")
        weights = "" if state else cfg.student_weights
        net = create(cfg.student, arguments, weights)
        if state:  # before its first forward, as TinyViT and LeViT keep what they compute
            net.load_state_dict(state)
        student = Backbone(net, cfg.student_size)
        if not state:  # some models fail only in training; on a copy, as batch norm learns
            images = torch.zeros(min(cfg.batch_size, 2), 3, cfg.student_size, cfg.student_size)
            copy.deepcopy(student).train()(images)
    student.arguments = arguments
    return student


def load_teacher(cfg) -> Backbone:
    """The frozen teacher of a config, in eval mode. Attribute `fingerprint` names its weights.
    Its name is an official one of DINOv2, "demo", or that of any model which timm knows or a file
    has registered (timm's `register_model`). Its weights are a file of the official release, of
    timm or of a run, or "" for the Hub. DINOv2 embeds as in the official code.
    Raises UserError: for names and sizes before anything is downloaded."""
    weights = cfg.teacher_weights or WEIGHTS.get(cfg.teacher, "")
    with naming(f"--teacher {cfg.teacher} at {cfg.teacher_size} px"):
        how = dict(model=TEACHERS.get(cfg.teacher, cfg.teacher), args={})
        if weights.endswith(".safetensors"):  # a student of a run states what it is
            with naming(f"{weights} does not fit {cfg.teacher}"):
                metadata = safe_open(weights, "pt").metadata() or {}
                how |= json.loads(metadata.get("student", "{}"))
        name, arguments = how["model"], how["args"]
        check_model(name, cfg.teacher_size, arguments)
        if weights:  # the net has its native size
            net = create(name, arguments, weights)
        else:
            net = from_hub(f"the weights of {name}", "--teacher NAME --teacher_weights FILE",
                           create, name, arguments, pretrained=True)
        fingerprint = digest(f"{name} {arguments}", net.state_dict().values())
        if hasattr(net, "set_input_size"):
            table = getattr(net, "pos_embed", None)  # of the native size
            net.set_input_size(img_size=cfg.teacher_size)
            if "dinov2" in name and "reg4" not in name:
                table = official_position_table(table, net.patch_embed.grid_size)
                net.pos_embed = nn.Parameter(table)
        teacher = Backbone(net.requires_grad_(False), cfg.teacher_size)
    teacher.fingerprint = fingerprint
    return teacher


@contextmanager
def naming(what):
    """Whatever fails within is a UserError that begins with `what`. timm fails in many ways."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what}: {reason(error)}") from error


def check_model(name, size, arguments):
    """A timm model on "meta": its shapes alone. Raises UserError for unknown names, for arguments
    that name files or drop patches, and for sizes that leave a border outside all patches."""
    if any(key.startswith(("pretrained", "checkpoint", "patch_drop")) for key in arguments):
        raise UserError("arguments of a model name no weights and drop no patches")
    if not timm.is_model(name):  # timm would also take "hf-hub:owner/name"
        # Also what the Hub calls them: facebook/dinov2-base -> dinov2_vitb14.
        official = re.search(r"dino_?v2.*([sblg])(mall|ase|arge|iant)", name.lower())
        if official:
            suffix = "_reg" if "reg" in name.lower() else ""
            name = f"dinov2_vit{official[1]}14{suffix}"
        else:  # a student by a teacher's name
            name = TEACHERS.get(name, name)
        raise UserError(f"not a model of timm {timm.__version__} or of an imported file"
                        f"{suggestion(name, [*TEACHERS, *timm.list_models()])}")
    with torch.device("meta"):
        net = create(name, arguments)
    projection = getattr(getattr(net, "patch_embed", None), "proj", None)
    patch, *others = {*getattr(projection, "stride", (1,))}
    if others:
        raise UserError("its patches are not square")
    if size % patch:
        larger = math.ceil(size / patch) * patch
        raise UserError(f"{size} px is no multiple of the {patch} px patch, such as {larger}")
    return net


def create(name, arguments, weights="", pretrained=False):
    """A timm model without its classifier: with the weights of a file, if pretrained of timm's on
    the Hub, else random. Raises UserError."""
    net = timm.create_model(name, pretrained, num_classes=0, **arguments)
    if weights:
        with naming(f"{weights} does not fit {name}"):
            state = timm.models.load_state_dict(weights, weights_only=True)
            try:
                net.load_state_dict(state)
            except RuntimeError:  # timm knows the names of other releases, tables of other sizes
                code = sys.modules[type(net).__module__]
                if hasattr(code, "checkpoint_filter_fn"):
                    state = code.checkpoint_filter_fn(state, net)
                missing, unused = net.load_state_dict(state, strict=False)
                if missing:
                    raise UserError(f"it has no {missing[0]}") from None
                head = net.pretrained_cfg.get("classifier") or ()  # a name, or several
                unused = [key for key in unused if not key.startswith(head)]
                if unused:  # such as the scales in DINOv2's blocks
                    log.warning(f"{weights} is of another model: {unused[:2]} are not used")
    return net


def official_position_table(table, grid):
    """DINOv2's position table [1, 1 + G * G, D] on another grid, as the official code resamples it:
    without anti-aliasing, by a factor of (g + 0.1) / G in place of the size. timm's way moves patch
    tokens by 3 to 20% at 98 px. For models with registers the official code does as timm does."""
    G = math.isqrt(table.shape[1] - 1)
    if grid == (G, G):
        return table
    patches = table[:, 1:].mT.unflatten(2, (G, G))
    patches = F.interpolate(patches, scale_factor=(grid[0] + 0.1) / G, mode="bicubic")
    return torch.cat([table[:, :1], patches.flatten(2).mT], 1)


def parse_arguments(text):
    """'depth=6 weight_init=jax' -> {"depth": 6, "weight_init": "jax"}."""
    arguments = {}
    for item in text.split():
        name, _, value = item.partition("=")
        if not value or item.endswith(","):
            raise UserError("--student_args takes name=value, separated by spaces")
        if value.lower() in ("true", "false", "none"):
            value = value.title()
        with suppress(ValueError, SyntaxError):  # else a word
            value = ast.literal_eval(value)
        arguments[name] = value
    return arguments


def save_checkpoint(path, **contents):
    """Write all that continues, evaluates or exports a run: tensors, numbers, text, no code."""
    torch.save(dict(format=FORMAT, **contents), buffer := BytesIO())
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def load_checkpoint(path):
    """What `save_checkpoint` wrote -> (its contents, its Config). Runs no code from the file.
    A setting that it lacks takes its default. Raises UserError for damaged and other files."""
    path = Path(path)
    path = path / "checkpoint_latest.pth" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix == ".safetensors":
        raise UserError(f"{path} is an exported student: evaluate the checkpoint beside it")
    with naming(f"{path} is no checkpoint of this version"):
        if zipfile.ZipFile(path).testzip():  # torch.load does not compare checksums
            raise UserError("a checksum is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved.get("format") != FORMAT:
            raise UserError("it is of another version of this program")
        missing = {*PARTS} - saved.keys()  # a fork of main may add parts of its own
        if missing:
            raise UserError(f"it lacks {', '.join(sorted(missing))}")
        cfg = validate(Config(**saved["config"]))
    if missing := vars(cfg).keys() - saved["config"].keys():
        log.warning(f"{path} lacks {', '.join(sorted(missing))}: the defaults are taken")
    return saved | dict(path=path), cfg


def pick_device(name):
    """auto: a CUDA GPU, else the CPU. It sets the kind of attention that models are built with."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no such device here")
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in evaluation above all
    # On a CPU, attention written out is 1.4 to 1.7 times as fast (results/speed/first_version.txt).
    timm.layers.set_fused_attn(name != "cpu")
    return torch.device(name)


def pick_dtype(precision, device):
    """auto: bf16 where the hardware multiplies it, fp16 on older GPUs, else float32."""
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    elif precision == "auto":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.11
        precision = "bf16" if capabilities.get("avx512_bf16") else "fp32"
    return dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[precision]


def peak_memory(device):
    """Most memory in use so far, in GB: of the GPU, or on a CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB


@cache
def environment(device):
    """What results depend on: versions, device, and the git commit, "-dirty" if changed since."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    # Through a shell: where there is no git it writes to stderr, and nothing is raised.
    git = subprocess.run("git describe --always --dirty --abbrev=12 --exclude='*'", shell=True,
                         cwd=Path(__file__).parent, capture_output=True, text=True)
    return dict(device=name, torch=torch.__version__, timm=timm.__version__,
                commit=git.stdout.strip() or "unknown")
