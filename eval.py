"""Evaluate checkpoints: accuracy of k-NN and linear probe, beside teacher and untrained student.

    python eval.py runs/x/checkpoint_latest.pth
    python eval.py runs/x/checkpoint_epoch_{10,20,50}.pth                  # a row each
    python eval.py runs/x/checkpoint_latest.pth --eval_dataset owner/name  # on other data

Embeddings of whole images are classified by k-NN (DINO, Caron et al. 2021) and a linear probe
(DINOv2's logistic regression). Axes: I training images, Q test images, D width."""

import json
from dataclasses import replace
from pathlib import Path
from timeit import timeit

import numpy as np
import pandas
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import data
import model as models
from config import Config, EvalConfig, UserError, cli, slug, validate

TEMPERATURE = 0.07  # of k-NN votes, as in DINO
K = 20  # neighbours
STRENGTHS = [10.0**e for e in range(-5, 3)]  # C of the probe, smallest first
HOLDOUT = 10  # C is chosen on one training image of so many
COMPARED = 1024  # test images on which student and teacher are compared directly
COLUMNS = dict(  # of the table: key of a row -> format
    model="{}", knn20="{:.1%}", linear="{:.1%}", keeps_knn20="{:.1%}", keeps_linear="{:.1%}",
    cos_cls="{:.3f}", cos_patch="{:.3f}", similarity="{:.3f}", params_m="{:.2f}", gflops="{:.3f}",
    images_per_s="{:.0f}")

def knn_predict(train: Tensor, labels: Tensor, queries: Tensor, k: int = K) -> Tensor:
    """Weighted k-NN on the cosine, with votes exp(cos / 0.07): predicted labels int64 [Q].
    train [I, D], labels int64 [I] >= 0, queries [Q, D]; float32. Predicts as scikit-learn does:
    the k nearest are the best in float32 of the 2 k nearest in bf16, if the hardware has it."""
    train, k, classes = F.normalize(train.float(), dim=1), min(k, len(train)), int(labels.max()) + 1
    dtype, predicted = models.pick_dtype("auto", train.device), []
    rough = (train - train.mean(0)).to(dtype)  # centred: the same order, in fewer bits
    for some in F.normalize(queries.float(), dim=1).split(512):
        near = (some.to(dtype) @ rough.T).topk(min(2 * k, len(train))).indices  # [B, 2 k]
        cos, best = (train[near] @ some[..., None]).squeeze(2).topk(k)
        weights = ((cos - 1) / TEMPERATURE).exp()  # minus 1: the same order, without overflow
        votes = weights.new_zeros(len(some), classes)
        votes.scatter_add_(1, labels[near.gather(1, best)], weights)
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)

def fit_probe(x, y, C, w, tolerance=1e-5):
    """Multinomial logistic regression: weights and bias [classes, D + 1], the bias last.
    x: float [I, D], standardised. Minimises mean cross-entropy + |W|^2 / (2 C I), without a penalty
    on the bias, as scikit-learn's LogisticRegression(C): by full-batch L-BFGS from w, until no
    entry of the gradient is above tolerance."""
    w = w.to(x, copy=True).requires_grad_()
    optimiser = torch.optim.LBFGS([w], max_iter=1000, tolerance_grad=tolerance,
                                  tolerance_change=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = F.cross_entropy(F.linear(x, w[:, :-1], w[:, -1]), y)
        loss = loss + w[:, :-1].square().sum() / (2 * C * len(x))
        loss.backward()
        return loss

    optimiser.step(closure)
    return w.detach()

def probe_predict(w, features):
    return F.linear(features, w[:, :-1], w[:, -1]).argmax(1)

def accuracy(predicted, labels):
    return float((predicted == labels).double().mean())

def linear_probe(train, labels, test):
    """Standardise, choose C on a tenth of train, refit on all of it -> (predictions int64, C).
    C grows until the accuracy falls; each fit starts from the last. Test features are used once."""
    mean, std = train.double().mean(0), train.double().std(0, correction=0).clamp_min(1e-8)
    train, test = (train - mean) / std, (test - mean) / std
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(train))).to(train.device)
    held, rest = order.tensor_split([len(order) // HOLDOUT])  # none of nine: the smallest C
    w = train.new_zeros(int(labels.max()) + 1, train.shape[1] + 1)
    scores = {}
    for C in STRENGTHS:
        w = fit_probe(train[rest].float(), labels[rest], C, w, tolerance=1e-4)
        scores[C] = accuracy(probe_predict(w, train[held].float()), labels[held])
        if scores[C] < max(scores.values()):
            break
    C = max(scores, key=scores.get)
    return probe_predict(fit_probe(train, labels, C, w), test), C

class Bench:
    """Training and test images of cfg.eval_dataset, else of the training data, to evaluate on.
    Without a test split a tenth of the training images is held out of k-NN and probe. Images
    without a label are left out, unless a split has no labels at all: then none is classified."""
    def __init__(self, cfg, max_train=0, max_test=0):
        if cfg.eval_dataset:  # the settings replaced here are those of the training data
            cfg = replace(cfg, dataset=cfg.eval_dataset, dataset_config=cfg.eval_config,
                          image_column=cfg.eval_column, train_split="train", max_samples=0)
        self.dataset, self.device = cfg.dataset, models.pick_device(cfg.device)
        dtype = models.pick_dtype(cfg.precision, self.device)
        self.autocast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        self.train = data.open_store(cfg, cfg.eval_split or cfg.train_split, cfg.max_samples)
        train_rows = np.arange(len(self.train))
        try:
            self.test = data.open_store(cfg, cfg.test_split or "test")
        except data.NoSplit:
            if cfg.test_split:
                raise
            self.test = self.train
        test_rows = np.arange(len(self.test))
        if self.test.split == self.train.split:
            self.test = self.train
            print("no other split: a tenth of the training images is held out of k-NN and probe")
            test_rows = data.subset(train_rows, -(-len(train_rows) // 10))
            train_rows = np.setdiff1d(train_rows, test_rows)
        self.train_rows, self.y = with_labels(self.train, train_rows, max_train)
        self.test_rows, self.y_test = with_labels(self.test, test_rows, max_test)
        self.labelled = bool(self.y.min() >= 0 and self.y_test.min() >= 0)
        if cfg.label_column and not self.labelled:
            raise UserError(f"--label_column {cfg.label_column}: no labels there in both splits")

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
        return [torch.cat([features.cls.float().cpu().clone()  # a view would keep all tokens
                           for _, features in self.embed(backbone, store, rows)])
                for store, rows in ((self.train, self.train_rows), (self.test, self.test_rows))]

    def evaluate(self, train, test, probe=True):
        """Accuracies, if there are labels; mean similarity of test embeddings [Q, D]."""
        train, y, test, y_test = (x.to(self.device) for x in (train, self.y, test, self.y_test))
        row = dict(similarity=float(models.mean_similarity(test)))
        if self.labelled:
            row["knn20"] = accuracy(knn_predict(train, y, test), y_test)
            if probe:
                predicted, row["C"] = linear_probe(train, y, test)
                row["linear"] = accuracy(predicted, y_test)
        return row

    @torch.inference_mode()
    def compare(self, saved, cfg, student, teacher):
        """Mean cosine of predictions and targets on test images; {} for forks, other teachers."""
        same = dict(objective="Distiller", teacher_hash=teacher.fingerprint,
                    teacher_size=teacher.image_size)
        if not same.items() <= saved["fixed"].items():
            return {}
        objective, found = models.Distiller(student, teacher, cfg).eval().to(self.device), []
        objective.load_state_dict(saved["objective"])
        rows = data.subset(self.test_rows, COMPARED)
        for images, features in self.embed(teacher, self.test, rows):
            pixels = data.render(images, None, student.image_size)
            with self.autocast:
                found.append(objective(pixels, objective.targets(features))[1])
        return {name: float(torch.stack([stats[name] for stats in found]).mean())
                for name in found[0] if name.startswith("cos_")}

    @torch.inference_mode()
    def speed(self, backbone):
        """Images per second of a forward of 64 images in memory, and GFLOPs an image."""
        images = torch.rand(64, 3, backbone.image_size, backbone.image_size, device=self.device)
        with FlopCounterMode(display=False) as flops:
            backbone(images)  # also warms up
        with self.autocast:  # .item() waits for the device
            seconds = timeit(lambda: backbone(images).cls.sum().item(), number=8)
        return dict(images_per_s=8 * 64 / seconds, gflops=flops.get_total_flops() / 64e9)

    def row(self, name, backbone):
        row = dict(model=name, params_m=backbone.parameter_count / 1e6, size=backbone.image_size)
        return row | self.evaluate(*self.features(backbone)) | self.speed(backbone)

def with_labels(store, rows, count):
    """Those of `rows` that have a label, or all if none has; `count` of them, and their labels."""
    found = rows[store.labels[rows] >= 0]
    rows = data.subset(found if len(found) else rows, count)
    return rows, torch.from_numpy(store.labels[rows])

def load(path, overrides):
    """A checkpoint, and its Config with some settings replaced. Raises UserError."""
    saved, cfg = models.load_checkpoint(path)
    if not Path(cfg.cache_dir, "stores").is_dir():  # a stranger's file does not choose new places
        cfg = replace(cfg, cache_dir=Config.cache_dir)
    cfg = replace(cfg, **overrides | dict(student_weights=""))
    return saved, validate(cfg, data=[cfg.eval_dataset or cfg.dataset])

def main(args):
    """Rows of checkpoints, the first one's teacher and untrained student; also in eval.json."""
    loaded = [load(path, args.overrides) for path in args.checkpoints]
    cfg = loaded[0][1]
    bench, rows, teacher = Bench(cfg, args.max_train, args.max_test), [], None
    students = [models.student_of(own, saved["student"]) for saved, own in loaded]  # fails early
    print(f"{bench.dataset}: {len(bench.y)} training, {len(bench.y_test)} test images", flush=True)
    if not bench.labelled:
        print("no labels in one of the splits: no k-NN, no probe (--label_column, --test_split)")
    if args.baselines:
        teacher = models.load_teacher(cfg.teacher, cfg.teacher_size, cfg.teacher_weights)
        rows.append(bench.row(f"teacher {cfg.teacher}", teacher))
        rows.append(bench.row("student, untrained", models.student_of(cfg)))
    for path, (saved, own), student in zip(args.checkpoints, loaded, students, strict=True):
        row = bench.row(f"{Path(path).parent.name}, epoch {saved['epoch']:g}", student)
        if teacher:
            row |= {f"keeps_{name}": row[name] / rows[0][name] for name in ("knn20", "linear")
                    if rows[0].get(name)}
            row |= bench.compare(saved, own, student, teacher)
        row |= dict(checkpoint=path, step=saved["step"])
        rows.append(row | models.environment(bench.device))
    formats = {key: text.format for key, text in COLUMNS.items()}
    table = pandas.DataFrame(rows).filter(COLUMNS)
    print(table.to_string(index=False, na_rep="", formatters=formats))
    name = f"eval-{slug(bench.dataset)}.json" if cfg.eval_dataset else "eval.json"
    Path(args.checkpoints[0]).with_name(name).write_text(json.dumps(rows, indent=1) + "\n")
    return rows

if __name__ == "__main__":
    cli(main, EvalConfig)
