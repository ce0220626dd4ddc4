"""Networks: the frozen teacher, the student, the heads between them, the loss, and checkpoints.

`load_teacher` and `build_student` return a `Backbone`: images in [0, 1] -> a CLS embedding and
patch embeddings. A `Head` brings both sides to one width; only its student side ever trains.
`Distiller`, the objective, is student, heads and loss in one module (forks: examples/forks).
Axes: B batch, N patches (row-major over the grid), T tokens, D width (Dt teacher's, Ds student's).

DINOv2 (Oquab et al. 2023), registers (Darcet et al. 2023); the fixed, centred projection follows
PHI-S (Ranzinger et al. 2024), learned heads follow Proteus and UNIC (2024)."""

import ast
import hashlib
import json
import math
import os
import resource
import subprocess
import sys
import zipfile
from dataclasses import asdict
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from config import Config, UserError, from_hub, log, reason, suggestion, validate, write_atomically

TEACHERS = {  # the official names -> timm's
    f"dinov2_vit{size[0]}14{reg}": f"vit_{size}_patch14{'_reg4' if reg else ''}_dinov2.lvd142m"
    for size in ("small", "base", "large", "giant") for reg in ("", "_reg")
} | dict(demo="vit_small_patch14_dinov2")
WEIGHTS = dict(demo=str(Path(__file__).parent / "demo" / "teacher.safetensors"))
WHITEN = dict(pca=0.5, linear=1.0)  # by head: targets are divided by std ** this
TOKENS_PER_IMAGE = 8  # at most, of each term, that `Distiller.fit` uses
FORMAT = 5  # version of the checkpoints' contents

class Features(NamedTuple):
    """What a Backbone outputs: cls [B, D], patches [B, N, D], in the dtype of the forward."""
    cls: Tensor
    patches: Tensor

class Backbone(nn.Module):
    """A timm model behind one interface: images float [B, 3, S, S] in [0, 1] -> Features. cls is
    the CLS token, or for pool "mean" and models without one the mean of the patches; patches are
    in conv nets the places of the last feature map. Raises UserError for nets without a grid."""
    def __init__(self, net, image_size, pool="cls"):
        super().__init__()
        # On a CPU conv nets embed up to 1.8 times as fast in channels_last (results/speed).
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
        if N < 1 or math.prod(self.grid) != N:
            raise UserError(f"it outputs {list(x.shape[1:])}, no square grid of patch embeddings")

    def to_features(self, x):
        """What the net's forward_features outputs, [B, P + N, D] or [B, D, h, w], -> Features."""
        if self.outputs_tokens:
            x = self.token_norm(x)
            patches = x[:, self.prefix :]
            return Features(x[:, 0] if self.has_cls else patches.mean(1), patches)
        channels_last = getattr(self.net, "output_fmt", "NCHW") == "NHWC"
        patches = x.flatten(1, 2) if channels_last else x.flatten(2).mT
        return Features(patches.mean(1), patches)

    def forward(self, images):
        normalised = (images - self.mean) / self.std  # by the model's own constants
        return self.to_features(self.net.forward_features(normalised))

    def __str__(self):
        return (f"{self.parameter_count / 1e6:.2f} M parameters, {self.image_size} px, "
                f"grid {self.grid}")

def timm_arguments(name, image_size, arguments):
    """timm's arguments for an image size: transformers take it as img_size, conv nets take any.
    Raises UserError for unknown names, and for sizes that leave a border outside all patches."""
    if any(key.startswith(("pretrained", "checkpoint", "patch_drop")) for key in arguments):
        raise UserError("for weights see --student_weights; patches are not dropped")
    if not timm.is_model(name):  # timm would also take "hf-hub:owner/name"
        close = suggestion(name, [*TEACHERS, *timm.list_models()])
        raise UserError(f"not a model of timm {timm.__version__}{close}")
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=0, **arguments)
    projection = getattr(getattr(net, "patch_embed", None), "proj", None)
    patch = getattr(projection, "stride", (1,))[0]
    if image_size % patch:
        larger = -(-image_size // patch) * patch
        raise UserError(f"{image_size} px is no multiple of the {patch} px patch, such as {larger}")
    return dict(arguments, img_size=image_size) if hasattr(net, "set_input_size") else arguments

def load_net(name, weights, **arguments):
    """A timm model with the weights of a file, or for "" of timm's on the Hub. Raises UserError."""
    create = partial(timm.create_model, name, **arguments)
    if not weights:
        return from_hub(f"the weights of {name}", "--teacher_weights FILE", create, pretrained=True)
    try:
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
    Its attribute `arguments` holds all that timm needs to build it again."""
    arguments = timm_arguments(name, image_size, timm_kwargs)
    load = partial(load_net, weights=weights) if weights else timm.create_model
    student = Backbone(load(name, num_classes=0, **arguments), image_size, pool)
    student.arguments = arguments
    return student

def student_of(cfg, state=None):
    """The student of a config: with a checkpoint's state dict, or as it is before training."""
    torch.manual_seed(cfg.seed)
    student = build_student(cfg.student, cfg.student_size, cfg.pool, cfg.student_weights,
                            **student_arguments(cfg.student_args))
    if state:
        student.net.load_state_dict(state)
    return student

def student_arguments(text):
    """'depth=6 weight_init=jax' -> {"depth": 6, "weight_init": "jax"}."""
    arguments = {}
    for item in text.split():
        name, _, value = item.partition("=")
        if not value:
            raise UserError("--student_args takes name=value, separated by spaces")
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[name] = value  # a word
    return arguments

def teacher_source(name, weights):
    """A teacher's name in timm, its timm arguments, the file of its weights or "", and its pool.
    What a student.safetensors states comes first, so that a student can be the next teacher."""
    weights = weights or WEIGHTS.get(name, "")
    how = dict(model=TEACHERS.get(name, name), args={}, pool="cls")
    try:
        if weights.endswith(".safetensors"):
            how |= json.loads((safe_open(weights, "pt").metadata() or {}).get("student", "{}"))
    except Exception as error:
        raise UserError(f"{weights} does not fit {name}: {reason(error)}") from error
    return how["model"], how["args"], weights, how["pool"]

def load_teacher(name: str, image_size: int, weights: str = "") -> Backbone:
    """The frozen teacher, in eval mode; attribute fingerprint names its weights. Raises UserError.
    name: an official DINOv2 name, "demo", or any timm model. weights: a file of the official
    release, of timm or of a run, "" for the Hub. DINOv2 embeds as in the official code."""
    timm_name, arguments, weights, pool = teacher_source(name, weights)
    timm_arguments(timm_name, image_size, arguments)  # raises before anything is downloaded
    net = load_net(timm_name, weights, num_classes=0, **arguments)  # at its native size
    digest = hashlib.sha256(f"{timm_name} {arguments} {pool}".encode())
    for value in net.state_dict().values():
        digest.update(value.numpy().tobytes())
    table = getattr(net, "pos_embed", None)
    if hasattr(net, "set_input_size"):
        net.set_input_size(img_size=image_size)
    if "dinov2" in timm_name and "reg4" not in timm_name:
        net.pos_embed = nn.Parameter(official_position_table(table, net.patch_embed.grid_size))
    teacher = Backbone(net.requires_grad_(False), image_size, pool)
    teacher.fingerprint = digest.hexdigest()[:12]
    return teacher

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

def problems(cfg):
    """What is wrong with losses, batches and models, before anything is downloaded or written."""
    found = []
    if cfg.batch_size % int(os.environ.get("WORLD_SIZE", 1)):
        found.append(f"--batch_size {cfg.batch_size} is not a multiple of the processes")
    for side in ("teacher", "student"):
        name, size = getattr(cfg, side), getattr(cfg, f"{side}_size")
        try:
            if side == "teacher":
                timm_name, arguments, *_ = teacher_source(name, cfg.teacher_weights)
            else:
                timm_name, arguments = name, student_arguments(cfg.student_args)
            # On "meta" only shapes are computed. Some students fail only where values are.
            with torch.device("meta" if side == "teacher" else "cpu"):
                build_student(timm_name, size, **arguments).train()(torch.zeros(2, 3, size, size))
        except Exception as error:  # timm models fail in many ways on what they do not take
            found.append(f"--{side} {name} at {size} px: {reason(error)}")
    return found

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

class Head(nn.Module):
    """Brings teacher and student to one width; nothing on the teacher's side ever trains.

    Teacher: target = (features - mean) @ basis / scale, all three set once by `fit`.
      pca      basis = the Ds principal axes. A narrower teacher (Dt < Ds) fills the first Dt
               dimensions and leaves the others zero. For ViTs.
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
        """Measure mean, axes and scale on a term's tokens, float32 [any, Dt]. Deterministic."""
        self.mean.copy_(features.mean(0))
        if self.kind == "pca":
            centred = features - self.mean
            covariance = (centred.T @ centred).cpu().double()
            axes = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, : len(self.scale)]
            self.basis.zero_()[:, : axes.shape[1]] = axes
        std = ((features - self.mean) @ self.basis).std(0, correction=0)
        self.scale.copy_(torch.where(std > 1e-6 * std.max(), std, 1.0) ** self.whiten)

    @torch.no_grad()
    def target(self, features):
        """Teacher features (..., Dt) -> float32 targets (..., Ds), for linear (..., Dt)."""
        with torch.autocast(features.device.type, enabled=False):
            return (features.float() - self.mean) @ self.basis / self.scale

# What is distilled: name -> function of Features that returns tokens [B, T, D]. A fork that adds
# one sets `Distiller.weights`, and `heads` for another D: targets of all terms have one width.
TERMS = dict(cls=lambda features: features.cls[:, None], patch=lambda features: features.patches)

class Distiller(nn.Module):
    """The objective: student, a head for each term, and the loss, as one module.
    A fork is a subclass: `train.main(cfg, objective=Fork)`. What it registers (parameters, buffers,
    modules) is saved and restored, of several processes rank 0's. Each step seeds torch alone."""
    terms = TERMS

    def __init__(self, student, teacher, cfg):
        super().__init__()
        self.student, self.teacher_grid, self.cfg = student, teacher.grid, cfg
        kind = "pca" if student.outputs_tokens else "linear"
        kind = kind if cfg.head == "auto" else cfg.head
        heads = {name: Head(kind, student.embed_dim, teacher.embed_dim) for name in self.terms}
        self.heads = nn.ModuleDict(heads)
        self.weights = dict(cls=cfg.cls_weight, patch=cfg.patch_weight)

    def parameter_groups(self, weight_decay):
        """AdamW's: decay for matrices and kernels; none for biases and norms (1-D), nor for tokens
        (3-D). "lr_scale" in a group multiplies the learning rate, as in timm's layer decay."""
        tokens = [name for name, p in self.named_parameters() if p.ndim == 3]
        return param_groups_weight_decay(self, weight_decay, no_weight_decay_list=tokens)

    def shared_view(self, images, view, index):
        """Augmentation that both networks see: images [B, 3, S, S] in [0, 1] -> the same.
        index int64 [B]: positions in the store, on the CPU. Called at the teacher's size and at the
        student's. Targets are cached, so it may depend on (cfg.seed, view, index) alone."""
        return images

    def student_view(self, images, epoch, index):
        """Augmentation that only the student sees, after `shared_view`."""
        return images

    def embed(self, backbone, images):
        """In training, of student or teacher: images [B, 3, S, S] -> Features."""
        return backbone(images)

    def on_student_grid(self, features):
        """The teacher's Features, every field [B, N, D] resampled to the student's grid."""
        grids = self.teacher_grid, self.student.grid
        return features._make(resample_patches(x, *grids) if x.ndim == 3 else x for x in features)

    def fit(self, teacher_features):
        """Fit the heads on an iterable of the teacher's Features."""
        collected, generator = {name: [] for name in self.terms}, torch.Generator().manual_seed(0)
        for features in map(self.on_student_grid, teacher_features):
            for name, tokens_of in self.terms.items():
                tokens = tokens_of(features).float()
                some = torch.randperm(tokens.shape[1], generator=generator)[:TOKENS_PER_IMAGE]
                collected[name].append(tokens[:, some].flatten(0, 1))
        for name, head in self.heads.items():
            head.fit(torch.cat(collected[name]))

    def targets(self, features):
        """The teacher's Features -> float32 targets [B, T, D], term after term. They are cached."""
        features = self.on_student_grid(features)
        tokens = [self.heads[name].target(of(features)) for name, of in self.terms.items()]
        return torch.cat(tokens, 1)

    def term_loss(self, name, prediction, target):
        """A term's predictions and targets [B, T, D] -> a scalar. The place for masks."""
        return cosine_loss(prediction, target).mean()

    def forward(self, images, targets):
        """Student's view [B, 3, s, s] and targets [B, T, D] -> (loss, 0-d tensors for the log)."""
        features, loss, stats = self.embed(self.student, images), 0.0, {}
        predictions = [self.heads[name].predict(of(features)) for name, of in self.terms.items()]
        parts = targets.split([prediction.shape[1] for prediction in predictions], 1)
        for name, prediction, target in zip(self.terms, predictions, parts, strict=True):
            stats[name] = self.term_loss(name, prediction, target)
            loss += self.weights[name] * stats[name]
            stats[f"cos_{name}"] = 1 - cosine_loss(prediction.detach(), target).mean()
        stats["similarity"] = mean_similarity(predictions[0][:, 0].detach())  # of the first term
        return loss, stats

    def after_step(self, step):
        """Called after optimiser step `step`, counted from 0: averages, queues."""

    @property
    def evaluated(self):
        """What is evaluated and exported."""
        return self.student

def mean_similarity(embeddings):
    """Mean cosine of different images' embeddings [B, D]; near 1 all are alike: a collapse."""
    unit, B = F.normalize(embeddings.float(), dim=-1), len(embeddings)
    return (unit.sum(0).square().sum() - B) / max(B * (B - 1), 1)

def save_checkpoint(path, run, step):
    """Write all that continues, evaluates or exports a run: tensors, numbers, text, no code."""
    state = dict(
        format=FORMAT, step=step, epoch=step / run.steps_per_epoch, history=run.history,
        student=run.objective.evaluated.net.state_dict(), objective=run.objective.state_dict(),
        optimiser=run.optimiser.state_dict(), scaler=run.scaler.state_dict(), fixed=run.fixed,
        config=asdict(run.cfg), commit=environment(run.device)["commit"])
    torch.save(state, buffer := BytesIO())
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))

def load_checkpoint(path):
    """What `save_checkpoint` wrote -> (its contents, its Config). Runs no code from the file.
    A setting that it lacks takes its default. Raises UserError for damaged and other files."""
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load does not compare checksums
            raise ValueError("a checksum is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved.get("format") != FORMAT:
            raise ValueError("it is of another version of this program")
        cfg = validate(Config(**saved["config"]))
        if missing := vars(cfg).keys() - saved["config"].keys():
            log.warning(f"{path} lacks {', '.join(sorted(missing))}: the defaults are taken")
    except Exception as error:
        raise UserError(f"{path} is no checkpoint of this version: {reason(error)}") from error
    return saved, cfg

def pick_device(name):
    """auto: a CUDA GPU, else the CPU. It sets the kind of attention that models are built with."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no such device here")
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in evaluation above all
    # On a CPU, attention written out is 1.4 to 1.7 times as fast (results/first_version/cpu.txt).
    timm.layers.set_fused_attn(name != "cpu")
    return torch.device(name)

def pick_dtype(precision, device):
    """auto: bf16 where the hardware multiplies it, fp16 on older GPUs, else float32."""
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    elif precision == "auto":
        precision = "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "fp32"
    return dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[precision]

def peak_memory(device):
    """Most memory in use so far, in GB: of the GPU, or on a CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

@cache
def environment(device):
    """What results depend on: versions, device, and the git commit, "-dirty" if changed since."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    git = subprocess.run("git describe --always --dirty --abbrev=40 --exclude='*'", shell=True,
                         cwd=Path(__file__).parent, capture_output=True, text=True)
    return dict(torch=torch.__version__, timm=timm.__version__, device=name,
                commit=git.stdout.strip() or "unknown")
