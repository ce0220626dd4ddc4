"""Evaluate checkpoints: accuracy of k-NN and linear probe, beside teacher and untrained student.

    python eval.py runs/x/checkpoint_latest.pth
    python eval.py runs/x/checkpoint_epoch_{10,20,50}.pth                  # a row each
    python eval.py runs/x/checkpoint_latest.pth --eval_dataset owner/name  # on other data

Embeddings of stored images, without crops, are classified by k-NN (DINO, Caron et al. 2021) and by
a linear probe (DINOv2's logistic regression: L-BFGS, its strength chosen on part of train). Prints
a table and writes eval.json next to the first checkpoint.

Axes: I training images, Q test images, D width.
"""

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import data
import model as models
from config import Config, EvalConfig, UserError, cli, data_problems, slug, validate

TEMPERATURE = 0.07  # of k-NN votes, as in DINO
K = 20  # neighbours
STRENGTHS = tuple(10.0**e for e in range(-5, 3))  # C of the probe, smallest first
HOLDOUT = 10  # C is chosen on one training image of so many
COMPARED = 1024  # test images on which student and teacher are compared directly
COLUMNS = {  # key of a row -> heading, format
    "model": ("model", "s"), "knn20": ("k-NN", ".1%"), "linear": ("linear", ".1%"),
    "keeps_knn20": ("keeps k-NN", ".1%"), "keeps_linear": ("keeps linear", ".1%"),
    "cos_cls": ("cos cls", ".3f"), "cos_patch": ("cos patch", ".3f"),
    "similarity": ("similarity", ".3f"), "rank": ("rank", ".0f"), "params_m": ("M params", ".2f"),
    "gflops": ("GFLOPs", ".3f"), "images_per_s": ("images/s", ".0f"),
}


def knn_predict(train: Tensor, labels: Tensor, queries: Tensor, k: int = K) -> Tensor:
    """Weighted k-NN on the cosine, with votes exp(cos / 0.07): predicted labels int64 [Q].

    train [I, D], labels int64 [I] >= 0, queries [Q, D]; float32 throughout. k above I means I.
    Predicts what scikit-learn's KNeighborsClassifier does with the same metric and weights.
    """
    train, classes = F.normalize(train.float(), dim=1), int(labels.max()) + 1
    predicted = []
    for some in data.progress(F.normalize(queries.float(), dim=1).split(512), "k-NN"):
        cos, nearest = (some @ train.T).topk(min(k, len(train)))
        weights = ((cos - 1) / TEMPERATURE).exp()  # minus 1: the same order, without overflow
        votes = weights[..., None] * F.one_hot(labels[nearest], classes)
        predicted.append(votes.sum(1).argmax(1))
    return torch.cat(predicted)


def fit_probe(x: Tensor, y: Tensor, C: float, w: Tensor, tolerance: float = 1e-5) -> Tensor:
    """Multinomial logistic regression: weights and bias float64 [classes, D + 1], the bias last.

    x: float64 [I, D], standardised. Minimises mean cross-entropy + |W|^2 / (2 C I), bias free, as
    scikit-learn's LogisticRegression(C): by full-batch L-BFGS from w, until no entry of the
    gradient is above tolerance.
    """
    for z in (x.float(), x):  # float32 does most of the way, and faster
        w = w.detach().to(z, copy=True).requires_grad_()
        optimiser = torch.optim.LBFGS(
            [w], max_iter=1000, history_size=10, tolerance_grad=tolerance, tolerance_change=1e-10,
            line_search_fn="strong_wolfe")

        def closure(z=z, w=w, optimiser=optimiser):  # bound now: the loop rebinds these names
            optimiser.zero_grad()
            loss = F.cross_entropy(F.linear(z, w[:, :-1], w[:, -1]), y)
            loss = loss + w[:, :-1].square().sum() / (2 * C * len(z))
            loss.backward()
            return loss

        optimiser.step(closure)
    return w.detach()


def probe_predict(w, features):
    return F.linear(features, w[:, :-1], w[:, -1]).argmax(1)


def accuracy(predicted, labels):
    return float((predicted == labels).double().mean())


def linear_probe(train: Tensor, labels: Tensor, test: Tensor) -> tuple[Tensor, float]:
    """Standardise, choose C on a tenth of train, refit on all of it -> (predictions int64, C).

    C grows until the accuracy falls; each fit starts from the last. Test features are used once.
    """
    mean, std = train.double().mean(0), train.double().std(0).clamp_min(1e-8)
    train, test = (train - mean) / std, (test - mean) / std
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(train))).to(train.device)
    held, rest = order.tensor_split([max(1, len(order) // HOLDOUT)])
    w = train.new_zeros(int(labels.max()) + 1, train.shape[1] + 1)
    best, best_C = -1.0, STRENGTHS[0]
    for C in data.progress(STRENGTHS, "linear probe"):
        w = fit_probe(train[rest], labels[rest], C, w, tolerance=1e-4)
        score = accuracy(probe_predict(w, train[held]), labels[held])
        if score < best:
            break
        if score > best:
            best, best_C = score, C
    return probe_predict(fit_probe(train, labels, best_C, w), test), best_C


def effective_rank(features):
    """exp of the entropy of the singular values, centred (Roy and Vetterli 2007): 1 to D."""
    centred = features.double() - features.double().mean(0)
    share = torch.linalg.eigvalsh(centred.T @ centred).clamp_min(0).sqrt()
    share = share / share.sum().clamp_min(1e-300)
    return float(torch.special.entr(share).sum().exp())


class Bench:
    """The training and test images of a config, ready to evaluate any backbone on.

    They are those of cfg.eval_dataset, else the training data. Without a test split, a tenth of the
    training images is held out of k-NN and probe and tested. Images without a label are not used,
    unless a split has no labels at all.
    """

    def __init__(self, cfg, max_train=0, max_test=0):
        if cfg.eval_dataset:  # subset, split and column settings belong to the training data
            cfg = dataclasses.replace(
                cfg, dataset=cfg.eval_dataset, image_column=cfg.eval_column, train_split="train",
                max_samples=0, dataset_config="")
        self.dataset, self.device = cfg.dataset, models.pick_device(cfg.device)
        self.autocast = models.autocast(self.device, models.pick_dtype(cfg.precision, self.device))
        self.train = data.open_store(cfg, cfg.eval_split or cfg.train_split, cfg.max_samples)
        train_rows = np.arange(len(self.train))
        try:
            self.test = data.open_store(cfg, cfg.test_split)
            test_rows = np.arange(len(self.test))
            if self.test.split == self.train.split:
                raise UserError(f"split {self.test.split} is both learned from and tested: set "
                                "--eval_split or --test_split")
        except data.NoSplit:
            if cfg.test_split or len(train_rows) < 2:
                raise
            print("no test split: a random tenth of the training images is held out of k-NN and "
                  "probe and tested; the student has seen them, without labels")
            self.test, test_rows = self.train, data.subset(train_rows, -(-len(train_rows) // 10))
            train_rows = np.setdiff1d(train_rows, test_rows)
        self.train_rows = data.subset(with_labels(self.train, train_rows), max_train)
        self.test_rows = data.subset(with_labels(self.test, test_rows), max_test)
        self.y = torch.from_numpy(self.train.labels[self.train_rows])
        self.y_test = torch.from_numpy(self.test.labels[self.test_rows])
        self.labelled = bool(self.y.min() >= 0 and self.y_test.min() >= 0)

    def embed(self, backbone, store, rows):
        """Yield whole stored images uint8 [B, 3, S, S] on the device, and their Features."""
        for some in data.progress(data.chunks(rows), "features"):
            images = store.images[some].to(self.device)
            with torch.inference_mode(), self.autocast:
                features = backbone(data.render(images, None, backbone.image_size))
            yield images, features

    def features(self, backbone):
        """CLS embeddings of the training and test images: float32 [I, D], [Q, D] on the CPU."""
        backbone.eval().to(self.device)
        return [torch.cat([features.cls.float().cpu()
                           for _, features in self.embed(backbone, store, rows)])
                for store, rows in ((self.train, self.train_rows), (self.test, self.test_rows))]

    def evaluate(self, train, test, probe=True):
        """Accuracies, if there are labels; mean similarity and rank of test embeddings [Q, D]."""
        # Apple's GPUs have no float64: there the CPU does this.
        device = self.device if self.device.type == "cuda" else "cpu"
        train, y, test, y_test = (x.to(device) for x in (train, self.y, test, self.y_test))
        row = dict(similarity=float(models.mean_similarity(test)), rank=effective_rank(test))
        if self.labelled:
            row["knn20"] = accuracy(knn_predict(train, y, test), y_test)
            if probe and len(y) > 1:  # of one image none can be held out to choose C
                predicted, row["C"] = linear_probe(train, y, test)
                row["linear"] = accuracy(predicted, y_test)
        return row

    @torch.inference_mode()
    def compare(self, objective, teacher):
        """Mean cosine of a student's predictions and its targets on test images, for each term."""
        objective, found = objective.eval().to(self.device), []
        rows = data.subset(self.test_rows, COMPARED)
        for images, features in self.embed(teacher, self.test, rows):
            pixels = data.render(images, None, objective.student.image_size)
            with self.autocast:
                found.append(objective(pixels, objective.targets(features))[1])
        return {name: float(torch.stack([stats[name] for stats in found]).mean())
                for name in found[0] if name.startswith("cos_")}

    @torch.inference_mode()
    def speed(self, backbone):
        """Images per second of a forward of 64 images in memory, and GFLOPs an image."""
        images = torch.rand(64, 3, backbone.image_size, backbone.image_size, device=self.device)
        with FlopCounterMode(display=False) as flops:
            backbone(images[:1])
        seconds = []
        for _ in range(8):  # the median: the first one warms up
            begin = time.perf_counter()
            with self.autocast:
                backbone(images).cls.sum().item()  # .item() waits for the device
            seconds.append(time.perf_counter() - begin)
        return dict(images_per_s=64 / np.median(seconds), gflops=flops.get_total_flops() / 1e9)

    def row(self, name, backbone):
        row = dict(model=name, params_m=backbone.parameter_count / 1e6, size=backbone.image_size)
        return row | self.evaluate(*self.features(backbone)) | self.speed(backbone)


def with_labels(store, rows):
    """Those of `rows` that have a label; all, if none has."""
    found = rows[store.labels[rows] >= 0]
    return found if len(found) else rows


def table(rows):
    """Markdown, aligned for a terminal; columns without any value are left out."""
    keys = [key for key in COLUMNS if any(key in row for row in rows)]
    lines = [[COLUMNS[key][0] for key in keys], ["---"] * len(keys)]
    for row in rows:
        lines.append([format(row[key], COLUMNS[key][1]) if key in row else "" for key in keys])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def load(path, overrides):
    """A checkpoint, its Config with some settings replaced, and its student. Raises UserError."""
    saved, cfg = models.load_checkpoint(path)
    settings = dict(student_weights="") | overrides
    # The file may be a stranger's: its cache_dir is used only where it is a cache already.
    if not (Path(cfg.cache_dir) / "stores").is_dir():
        settings.setdefault("cache_dir", Config.cache_dir)
    cfg = dataclasses.replace(cfg, **settings)
    validate(cfg, lambda cfg: data_problems(cfg.eval_dataset or cfg.dataset))
    return saved, cfg, models.student_of(cfg, saved["student"])


def main(args):
    """Evaluate checkpoints, the first one's teacher and its untrained student; returns the rows."""
    loaded = {path: load(path, args.overrides) for path in args.checkpoints}
    _, cfg, _ = loaded[args.checkpoints[0]]
    bench, rows, teacher = Bench(cfg, args.max_train, args.max_test), [], None
    machine = models.environment(bench.device)
    print(f"{bench.dataset}: {len(bench.y)} training, {len(bench.y_test)} test images, {machine}",
          flush=True)
    if not bench.labelled:
        print("no labels in one of the splits: no k-NN, no probe (--label_column, --test_split)")
    if args.baselines:
        try:
            teacher = models.load_teacher(cfg.teacher, cfg.teacher_size, cfg.teacher_weights)
            rows.append(bench.row(f"teacher {cfg.teacher}", teacher))
        except UserError as error:  # the student can be evaluated without it
            print(f"without the teacher's row: {error}")
        rows.append(bench.row("student, untrained", models.student_of(cfg)))
    for path, (saved, own, student) in loaded.items():
        row = bench.row(f"{Path(path).parent.name}, epoch {saved['epoch']:g}", student)
        fixed = saved["fixed"]
        if teacher and (fixed["weights"], own.teacher_size) == (
                teacher.fingerprint, teacher.image_size):
            for name in ("knn20", "linear"):
                if rows[0].get(name):
                    row[f"keeps_{name}"] = row[name] / rows[0][name]
            if fixed["objective"] == "Distiller":
                objective = models.Distiller(student, teacher, own)
                objective.load_state_dict(saved["objective"])
                row |= bench.compare(objective, teacher)
        rows.append(row | machine | dict(checkpoint=path, step=saved["step"]))
    print(table(rows))
    name = f"eval-{slug(bench.dataset)}.json" if cfg.eval_dataset else "eval.json"
    file = Path(args.checkpoints[0]).with_name(name)
    file.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"written to {file}")
    return rows


if __name__ == "__main__":
    cli(main, EvalConfig)
