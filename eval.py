"""The verdict: how much of its teacher does a student know?

    python eval.py runs/x/checkpoint_latest.pth
    python eval.py runs/x/checkpoint_epoch_{10,20,50}.pth            # a row each
    python eval.py runs/x/checkpoint_latest.pth --dataset owner/name # on other data
    python eval.py runs/x/checkpoint_latest.pth --figures runs/x     # patches.png, neighbors.png

The checkpoint's own config says the rest. Features of the whole, uncropped images are judged by
k-NN (DINO, Caron et al. 2021) and a linear probe (DINOv2's logistic regression: L-BFGS, its
strength chosen on part of train), beside the teacher, a randomly initialised student and raw
pixels under the same code. Prints a table and writes eval.json next to the first checkpoint. Labels
are read here and nowhere else.
"""

import contextlib
import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

import data
from config import Config, EvalConfig, UserError, cli, data_problems, reason, slug, wrong_values
from model import (
    Backbone,
    Distiller,
    build_student,
    check_sums,
    cpu_has_bf16,
    load_teacher,
    pick_device,
    pick_dtype,
    spread,
    student_kwargs,
)

TEMPERATURE = 0.07  # of k-NN votes, DINO
NEIGHBOURS = (10, 20)  # the last one is the headline
CANDIDATES = 3  # times k, proposed in bf16
BF16_ERROR = 3 * 2**-8  # of a cosine: both vectors and the result are rounded, each by at most 2^-8
STRENGTHS = tuple(10.0**e for e in range(-5, 3))  # C of the probe, smallest first
HOLDOUT = 0.1  # share of train on which C is chosen
PIXELS = 32  # side of the raw-pixel baseline
BASELINE = frozenset(  # checkpoints that agree in these share data, teacher and untrained student
    "dataset train_split test_split image_column label_column store_size max_samples cache_dir "
    "teacher teacher_weights teacher_size student student_args student_size pool seed"
    .split())
ENTRIES = dict(  # of a checkpoint, and their types
    student=dict, heads=dict, optimiser=dict, scaler=dict, step=int, epoch=(int, float),
    metrics=dict, store=str, teacher=str, config=dict)


# ---------------------------------------------------------------------------- features


def _chunks(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


@torch.inference_mode()
def extract(backbone: Backbone, store: data.Store, rows, batch_size: int, dtype) -> Tensor:
    """CLS embeddings of whole images: float32 [len(rows), D] on the CPU."""
    device, out = backbone.mean.device, []
    backbone.eval()
    chunks = _chunks(rows, batch_size)
    for some in data.progress(chunks, "features", len(rows), batch_size):
        images = torch.from_numpy(store.images[some]).to(device)
        images = data.render(images, None, backbone.image_size)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out.append(backbone(images).cls.float().cpu())
    return torch.cat(out)


@torch.inference_mode()
def throughput(backbones: list[Backbone], batch_size: int, dtype) -> list[float]:
    """Forward images per second of each on a ready batch; taken in turn, the medians of 5."""
    device, seconds = backbones[0].mean.device, []
    ready = [torch.rand(batch_size, 3, b.image_size, b.image_size).to(device) for b in backbones]
    for backbone, images in [*zip(backbones, ready, strict=True)] * 6:
        begin = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            backbone(images).cls.float().sum().item()  # .item() waits for the device
        seconds.append(time.perf_counter() - begin)
    rounds = np.reshape(seconds, (6, -1))[1:]  # the first one warms up
    return (batch_size / np.median(rounds, 0)).tolist()


# ---------------------------------------------------------------------------- judges


def nearest(queries: Tensor, train: Tensor, half: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The k rows of train most like each query: cosines float32 [Q, k] and their rows [Q, k].

    queries [Q, D], train [N, D]: float32, of unit length. half: train in bf16, where the hardware
    multiplies that faster: then bf16 proposes, float32 decides, and a query of which rounding could
    have hidden a neighbour is compared with everything, so that the answer is the same.
    """
    if half is None or len(train) <= CANDIDATES * k:
        return (queries @ train.T).topk(k)
    rough, found = (queries.bfloat16() @ half.T).topk(CANDIDATES * k, sorted=False)
    proposed = train.index_select(0, found.flatten()).view(*found.shape, -1)
    cos, order = (proposed @ queries[..., None])[..., 0].topk(k)
    rows, unsure = found.gather(1, order), cos[:, -1] < rough.amin(1) + BF16_ERROR
    cos[unsure], rows[unsure] = (queries[unsure] @ train.T).topk(k)
    return cos, rows


def knn_predict(train: Tensor, labels: Tensor, queries: Tensor, ks=NEIGHBOURS) -> list[Tensor]:
    """Weighted k-NN on the cosine, votes exp(cos / 0.07): predicted labels int64 [Q] for each k.

    train [N, D], labels int64 [N] >= 0, queries [Q, D]; float32 throughout. k above N means N.
    Predicts what scikit-learn's KNeighborsClassifier does with the same metric and weights.
    """
    train, classes = F.normalize(train.float(), dim=1), int(labels.max()) + 1
    half = train.bfloat16() if train.device.type == "cpu" and cpu_has_bf16() else None
    predictions = []
    queries = F.normalize(queries.float(), dim=1)
    for some in data.progress(queries.split(512), "k-NN", len(queries), 512):
        cos, rows = nearest(some, train, half, min(max(ks), len(train)))
        votes = ((cos - 1) / TEMPERATURE).exp()
        counts = [torch.zeros(len(some), classes, device=train.device).scatter_add_(
            1, labels[rows[:, :k]], votes[:, :k]) for k in ks]
        predictions.append([count.argmax(1) for count in counts])
    return [torch.cat(parts) for parts in zip(*predictions, strict=True)]


def fit_probe(x: Tensor, y: Tensor, classes: int, C: float, start: Tensor | None = None,
              tolerance: float = 1e-5) -> Tensor:
    """Multinomial logistic regression: weights and bias float64 [classes, D + 1], the bias last.

    x: float64 [N, D], standardised. Minimises mean cross-entropy + |W|^2 / (2 C N), bias free:
    scikit-learn's LogisticRegression(C), by full-batch L-BFGS, until no entry of the gradient is
    above tolerance. start: weights to begin from.
    """
    w = torch.zeros(classes, x.shape[1] + 1) if start is None else start
    for z in (x.float(), x):  # float32 does most of the way, and faster
        w = w.to(z, copy=True).requires_grad_()
        optimiser = torch.optim.LBFGS(
            [w], max_iter=1000, history_size=10, tolerance_grad=tolerance, tolerance_change=1e-10,
            line_search_fn="strong_wolfe")

        def closure(z=z, w=w, optimiser=optimiser):
            optimiser.zero_grad()
            loss = F.cross_entropy(F.linear(z, w[:, :-1], w[:, -1]), y)
            loss = loss + w[:, :-1].square().sum() / (2 * C * len(z))
            loss.backward()
            return loss

        optimiser.step(closure)
        w = w.detach()
    return w


def linear_probe(train: Tensor, labels: Tensor, test: Tensor) -> tuple[Tensor, float]:
    """Standardise, choose C on a tenth of train, refit on all of it -> (predictions int64, C).

    C grows until it stops helping; each fit starts from the last. Test features are used once.
    """
    train, test = train.double(), test.double()
    mean, std = train.mean(0), train.std(0).clamp_min(1e-8)
    train, test = (train - mean) / std, (test - mean) / std
    classes = int(labels.max()) + 1
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).to(train.device)
    held, rest = order.tensor_split([max(1, int(HOLDOUT * len(order)))])
    w, best, best_C, worse = None, -1.0, STRENGTHS[0], 0
    for C in data.progress((*STRENGTHS, None), "linear probe", len(STRENGTHS) + 1):
        if C is None:
            w = fit_probe(train, labels, classes, best_C, w)
        elif worse < 2:
            w = fit_probe(train[rest], labels[rest], classes, C, w, tolerance=1e-4)
            hits = F.linear(train[held], w[:, :-1], w[:, -1]).argmax(1) == labels[held]
            worse += 1
            if (accuracy := float(hits.double().mean())) > best:
                best, best_C, worse = accuracy, C, 0
    return F.linear(test, w[:, :-1], w[:, -1]).argmax(1), best_C


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the singular values, centred (Roy and Vetterli 2007): 1 to D."""
    centred = features.double() - features.double().mean(0)
    share = torch.linalg.eigvalsh(centred.T @ centred).clamp_min(0).sqrt()
    share = share / share.sum().clamp_min(1e-300)
    return float(torch.special.entr(share).sum().exp())


# ---------------------------------------------------------------------------- checkpoints


@contextlib.contextmanager
def refusing(path: Path):
    """Whatever goes wrong inside becomes a UserError that blames the checkpoint `path`."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{path} is not a checkpoint of this program, or it is damaged: "
                        f"{reason(error)}. Take another one; in training --no_resume moves its "
                        "run aside and starts afresh.") from error


def read_checkpoint(path: Path) -> tuple[dict, Config]:
    """A checkpoint of train.py -> (its contents, its Config). Runs no code from the file.

    Everything in it is there and of its type, and no bit has changed since it was written; whether
    the weights fit the models is seen when they are loaded. Raises UserError when it is damaged,
    another program's, or of a version with other settings.
    """
    with refusing(path):
        check_sums(path)
        saved = torch.load(path, map_location="cpu", weights_only=True)
        held = saved if isinstance(saved, dict) else {}
        if odd := [n for n, kind in ENTRIES.items() if not isinstance(held.get(n), kind)]:
            raise ValueError(f"it has no usable {', '.join(odd)}")
        if not (saved["step"] >= 0 and 0 <= saved["epoch"] < float("inf")):
            raise ValueError(f"step {saved['step']} of epoch {saved['epoch']}")
        known, given = {f.name for f in dataclasses.fields(Config)}, set(saved["config"])
        if known != given:
            lacks, extra = (", ".join(sorted(map(str, names))) or "none" for names in
                            (known - given, given - known))
            raise ValueError("its config is another version's; settings it lacks: "
                             f"{lacks}, unknown ones: {extra}")
        cfg = Config(**saved["config"])
        if wrong := wrong_values(cfg):
            raise ValueError(f"its config has {wrong[0]}")
    return saved, cfg


def student_of(cfg: Config, weights: dict | None = None) -> Backbone:
    """The student of a config: with a checkpoint's weights, or as it was before training."""
    torch.manual_seed(cfg.seed)
    args = student_kwargs(cfg.student_args)
    student = build_student(cfg.student, cfg.student_size, cfg.pool, **args)
    if weights is not None:
        student.net.load_state_dict(weights)
    return student.eval()


def merged(cfg: Config, args: EvalConfig) -> Config:
    """The checkpoint's config with what eval.py was told instead. Raises UserError.

    A stranger's checkpoint does not choose where to write: its cache_dir counts only where this
    program already has one.
    """
    names = "train_split test_split image_column label_column cache_dir teacher_weights"
    told = {n: getattr(args, n) for n in names.split() if getattr(args, n)}
    if not (Path(cfg.cache_dir) / "stores").is_dir():
        told = dict(cache_dir=Config.cache_dir) | told
    if args.dataset:  # splits, columns and subsets were those of the training data
        told = dict(dataset=args.dataset, train_split="train", test_split="", image_column="",
                    label_column="", max_samples=0) | told
    here = dict(device=args.device, precision=args.precision, num_workers=args.num_workers)
    cfg = dataclasses.replace(cfg, **here, **told)
    if found := data_problems(cfg):
        raise UserError(found[0])
    return cfg


class Bench:
    """The training and test images of a config, ready to judge any backbone on."""

    def __init__(self, cfg: Config, max_train: int = 0, max_test: int = 0, batch_size: int = 256):
        if cfg.test_split == cfg.train_split:
            raise UserError(f"--test_split {cfg.test_split} is what the k-NN bank is made of")
        limit = max(cfg.teacher_size, cfg.student_size)
        self.train = data.open_store(cfg, cfg.train_split, limit, cfg.max_samples)
        train, test = np.arange(len(self.train)), None
        try:
            self.test = data.open_store(cfg, cfg.test_split, limit)
        except data.NoSplit:
            if cfg.test_split:
                raise
            print("no test split: a random tenth of the training images is kept out of the k-NN "
                  "bank and the probe to be judged; the student has seen them, without labels")
            self.test, test = self.train, data.subset(train, max(1, len(train) // 10))
            train = np.setdiff1d(train, test)
        test = np.arange(len(self.test)) if test is None else test
        self.device, self.batch_size = pick_device(cfg.device), batch_size
        self.dtype = pick_dtype(cfg.precision, self.device)
        if not len(train):
            raise UserError(f"{cfg.dataset} has one image and no test split: nothing is left to "
                            "compare it with")
        known = [rows[store.labels[rows] >= 0]
                 for store, rows in ((self.train, train), (self.test, test))]
        self.labelled = all(map(len, known))
        if self.labelled:
            train, test = known
        self.train_rows = data.subset(train, max_train)
        self.test_rows = data.subset(test, max_test)
        y, y_test = self.train.labels[self.train_rows], self.test.labels[self.test_rows]
        # Classes are numbered by the training labels; what only test knows can only be wrong.
        classes = np.unique(y)
        self.y = torch.from_numpy(np.searchsorted(classes, y))
        unknown = ~np.isin(y_test, classes)
        self.y_test = torch.from_numpy(np.where(unknown, -1, np.searchsorted(classes, y_test)))

    def features(self, backbone: Backbone) -> tuple[Tensor, Tensor]:
        pairs = ((self.train, self.train_rows), (self.test, self.test_rows))
        return tuple(extract(backbone, s, r, self.batch_size, self.dtype) for s, r in pairs)

    def pixels(self) -> tuple[Tensor, Tensor]:
        """Raw pixels as features: float32 [N, 3 * PIXELS * PIXELS]."""

        def flat(store, rows):
            chunks = data.progress(_chunks(rows, 1024), "raw pixels", len(rows), 1024)
            images = (torch.from_numpy(store.images[some]) for some in chunks)
            return torch.cat([data.render(batch, None, PIXELS).flatten(1) for batch in images])

        return flat(self.train, self.train_rows), flat(self.test, self.test_rows)

    def judge(self, train: Tensor, test: Tensor, probe: bool = True) -> dict:
        """Accuracies, if there are labels, and diagnostics of one model's features."""
        if not (train.isfinite().all() and test.isfinite().all()):
            raise UserError("features are not finite: the model has diverged, or overflows in "
                            "--precision fp16")
        # Apple's GPUs have no float64: there the judges work on the CPU.
        device = self.device if self.device.type == "cuda" else "cpu"
        train, y, test, y_test = (t.to(device) for t in (train, self.y, test, self.y_test))
        row = dict(spread=float(spread(test)), rank=effective_rank(test))
        if self.labelled:
            for k, predicted in zip(NEIGHBOURS, knn_predict(train, y, test), strict=True):
                row[f"knn{k}"] = float((predicted == y_test).float().mean())
            if probe and len(y) > 1:  # of one image none can be held out to choose C
                predicted, row["C"] = linear_probe(train, y, test)
                row["linear"] = float((predicted == y_test).float().mean())
        return row

    def row(self, name: str, backbone: Backbone, features, probe: bool) -> dict:
        row = dict(model=name, parameters=backbone.parameter_count, size=backbone.image_size)
        return row | self.judge(*features, probe=probe)


# ---------------------------------------------------------------------------- figures

SHOWN = 8  # test images
TILE, GAP, MARGIN, FRAME = 96, 8, 76, 3  # pixels
RIGHT, WRONG = "#009e73", "#d55e00"  # tell apart for colour-blind readers too (Okabe and Ito)
RANKS = "nearest second third fourth fifth".split()


def sheet(path: Path, rows: list[tuple]) -> PIL.Image.Image:
    """Write and return a picture of rows: (label, images float [n, 3, H, W] in [0, 1]).

    A third entry, if there is one, is n colours, of a frame around each image.
    """
    side, across = TILE + GAP, len(rows[0][1])
    page = PIL.Image.new("RGB", (MARGIN + across * side, GAP + len(rows) * side), "white")
    draw = PIL.ImageDraw.Draw(page)
    for y, (label, images, *frames) in zip(range(GAP, page.height, side), rows, strict=True):
        draw.text((GAP, y + TILE // 2), label, "black", anchor="lm", font_size=14)
        tiles = F.interpolate(images.float().cpu(), TILE, mode="bicubic", antialias=True)
        places = range(MARGIN, page.width, side), frames[0] if frames else ["white"] * across
        for x, frame, tile in zip(*places, tiles.clamp(0, 1), strict=True):
            low, high = -FRAME, TILE + FRAME - 1
            draw.rectangle((x + low, y + low, x + high, y + high), frame)
            page.paste(to_pil_image(tile), (x, y))
    page.save(path)
    return page


@torch.inference_mode()
def draw_figures(folder: Path, bench: Bench, features, sides: dict) -> None:
    """Write patches.png and neighbors.png of some test images into a folder.

    patches.png: what each side says of each place, three principal components as a colour. sides:
    name -> (backbone, the map of its patches to the space where the loss compares directions). One
    basis and one scale, those of the first side's, serve both, so that colours compare.
    neighbors.png: the training images most like each to the student, framed in RIGHT and WRONG
    where there are labels. features: the student's of train and of test, float32 [N, D].
    """
    some = data.subset(np.arange(len(bench.test_rows)), SHOWN)
    stored = torch.from_numpy(bench.test.images[bench.test_rows[some]]).to(bench.device)
    rows, axes = [("image", stored / 255)], None
    for name, (net, project) in sides.items():
        patches = net.eval()(data.render(stored, None, net.image_size)).patches.float().cpu()
        tokens = F.normalize(project(patches), dim=-1)
        if axes is None:
            basis = tokens.flatten(0, 1)
            axes = torch.linalg.eigh(torch.cov(basis.T, correction=0)).eigenvectors[:, -3:].flip(1)
            low, high = (basis @ axes).quantile(torch.tensor([0.02, 0.98]), 0)
        colours = (tokens @ axes - low) / (high - low).clamp_min(1e-6)
        label = f"{name}\n{net.grid[0]} x {net.grid[1]}"
        rows.append((label, colours.mT.unflatten(2, net.grid)))
    sheet(folder / "patches.png", rows)

    train, queries = (F.normalize(f, dim=1) for f in (features[0], features[1][some]))
    found = nearest(queries, train, None, min(len(RANKS), len(train)))[1]
    rows = [("query", stored / 255)]
    for label, column in zip(RANKS, found.T, strict=False):
        images = torch.from_numpy(bench.train.images[bench.train_rows[column]]) / 255
        right = (bench.y[column] == bench.y_test[some]).tolist()
        rows.append((label, images, *[[RIGHT if r else WRONG for r in right]] * bench.labelled))
    sheet(folder / "neighbors.png", rows)
    if "teacher" not in sides:
        print("patches.png is without the teacher: its weights are not at hand, or not wanted")
    print(f"patches.png and neighbors.png written to {folder}")


# ---------------------------------------------------------------------------- table

COLUMNS = (  # heading, key, format
    ("model", "model", "s"), ("k-NN", "knn20", ".1%"), ("k-NN 10", "knn10", ".1%"),
    ("linear", "linear", ".1%"), ("keeps k-NN", "retention_knn", ".1%"),
    ("keeps linear", "retention_linear", ".1%"), ("cos", "cos", ".3f"),
    ("spread", "spread", ".3f"), ("rank", "rank", ".0f"), ("params", "parameters", "M"),
    ("images/s", "images_per_s", ".0f"),
)


def table(rows: list[dict]) -> str:
    """Markdown, aligned for a terminal; columns that nobody fills are left out."""

    def cell(row: dict, key: str, how: str) -> str:
        if key not in row:
            return "-"
        return f"{row[key] / 1e6:.2f} M" if how == "M" else format(row[key], how)

    columns = [c for c in COLUMNS if any(c[1] in row for row in rows)]
    lines = [[c[0] for c in columns], *([cell(row, *c[1:]) for c in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * w for w in widths])
    pad = (" | ".join(map(str.ljust, line, widths)) for line in lines)
    return "\n".join(f"| {line} |" for line in pad)


def main(args: EvalConfig) -> list[dict]:
    """Judge args.checkpoints and, once per teacher and data, the baselines; returns the rows."""
    rows, known = [], None
    pick_device(args.device)  # before the first model is made
    paths = [Path(c) for c in args.checkpoints]
    if args.figures:
        Path(args.figures).mkdir(parents=True, exist_ok=True)
    several = len({path.parent for path in paths}) > 1
    for path in paths:
        saved, cfg = read_checkpoint(path)
        cfg = merged(cfg, args)
        with refusing(path):  # before data is opened or a teacher downloaded
            student = student_of(cfg, saved["student"])
        setting = [getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name in BASELINE]
        if setting != known:
            known = setting
            bench = Bench(cfg, args.max_train, args.max_test, args.batch_size)
            print(f"{cfg.dataset}: {len(bench.train_rows)} training, {len(bench.test_rows)} test "
                  f"images, {bench.device.type}, {str(bench.dtype).split('.')[1]}", flush=True)
            if not bench.labelled:
                print("k-NN and linear probe are skipped: no labels in one of the splits "
                      "(--label_column and --test_split choose others)")
            teacher, reference = None, {}
            if args.baselines:
                try:
                    teacher = load_teacher(cfg.teacher, cfg.teacher_size, cfg.teacher_weights)
                    teacher.to(bench.device)
                    asked = bench.features(teacher)
                    reference = bench.row(f"teacher {cfg.teacher}", teacher, asked, args.probe)
                    rows.append(reference)
                except UserError as error:  # the student can be judged without it
                    print(f"without the teacher's row: {error}")
                rows.append(dict(model="raw pixels", **bench.judge(*bench.pixels(), probe=False)))
                untrained = student_of(cfg).to(bench.device)
                pair = bench.features(untrained)
                rows.append(bench.row("student, untrained", untrained, pair, args.probe))
            rivals = [net.to(bench.device) for net in (student, teacher) if net]
            speeds = throughput(rivals, min(64, args.batch_size), bench.dtype)
            if reference:
                reference["images_per_s"] = speeds[1]
        features = bench.features(student.to(bench.device))
        name = f"{path.parent.name if several else 'student'}, epoch {saved['epoch']:g}"
        row = bench.row(name, student, features, args.probe) | dict(images_per_s=speeds[0])
        for kept, key in (("knn", "knn20"), ("linear", "linear")):
            if key in row and reference.get(key):  # there is no share of nothing
                row[f"retention_{kept}"] = row[key] / reference[key]
        sides = dict(student=(student, torch.nn.Identity()))
        if teacher:
            heads = Distiller(student, teacher, cfg).heads.requires_grad_(False).cpu()
            with refusing(path):
                heads.load_state_dict(saved["heads"])
            head, patch = heads["cls_head"], heads["patch_head"]
            sides = dict(teacher=(teacher, patch.target), student=(student, patch.predict))
            target = head.target(asked[1])
            row["cos"] = float(F.cosine_similarity(head.predict(features[1]), target).mean())
        rows.append(row | dict(checkpoint=str(path), epoch=saved["epoch"], step=saved["step"]))
    print(table(rows))
    if reference:
        faster, share = (row[key] / reference[key] for key in ("images_per_s", "parameters"))
        print(f"student: {faster:.1f} x the teacher's images/s, {share:.0%} of its parameters")
    elsewhere = f"-{slug(args.dataset)}" if args.dataset else ""
    out = paths[0].parent / f"eval{elsewhere}.json"
    out.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"written to {out}")
    if args.save_features:
        save_features(args.save_features, bench, features)
    if args.figures:
        draw_figures(Path(args.figures), bench, features, sides)
    return rows


def save_features(path: str, bench: Bench, features: tuple[Tensor, Tensor]) -> None:
    """safetensors: train_ and test_ features float32 [N, D], labels int64 [N], rows int64 [N]."""
    stores = dict(train=(bench.train, bench.train_rows), test=(bench.test, bench.test_rows))
    out = {}
    for (name, (store, rows)), values in zip(stores.items(), features, strict=True):
        out[f"{name}_features"] = values
        out[f"{name}_labels"] = torch.from_numpy(store.labels[rows])
        out[f"{name}_rows"] = torch.from_numpy(store.rows[rows])
    save_file(out, path)
    print(f"features written to {path}")


if __name__ == "__main__":
    cli(main, EvalConfig)
