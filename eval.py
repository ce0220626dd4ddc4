"""Evaluate checkpoints: accuracy of k-NN and linear probe, beside teacher and untrained student.

    python eval.py runs/x                                   # its latest checkpoint
    python eval.py runs/x/checkpoint_epoch_{10,20,50}.pth   # a row each
    python eval.py runs/x --dataset owner/name              # on other data
    python eval.py runs/x --save_features features          # also write embeddings and labels

Embeddings of whole images are classified by k-NN (DINO, Caron et al. 2021) and a linear probe
(DINOv2's logistic regression). Axes: I training images, Q test images, D width."""

from config import Config, EvalConfig, UserError, cli, log, printable, reason, slug, validate

# isort: split
# config comes before torch: it sets how torch's threads wait.
import json
import math
from dataclasses import replace
from pathlib import Path
from timeit import Timer

import numpy as np
import pandas
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

import data
import model as models

TEMPERATURE = 0.07  # of k-NN votes, as in DINO
K = 20  # neighbours
STRENGTHS = [1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0, 100.0]  # C of the probe, smallest first
HOLDOUT = 10  # C is chosen on one training image of so many
COMPARED = 1024  # test images on which student and teacher are compared directly
TITLES = dict(  # of the table: key of a row -> title
    model="model", knn20="k-NN", linear="linear", keeps_knn20="keeps k-NN",
    keeps_linear="keeps linear", params_m="M parameters", images_per_s="images/s")


def knn_predict(train, labels, queries, k=K):
    """Weighted k-NN on the cosine, with votes exp(cos / 0.07): predicted labels int64 [Q].
    train [I, D], labels int64 [I] >= 0, queries [Q, D]. In float64: cosines of frames of one still
    camera differ by less than float32 resolves."""
    train = F.normalize(train.double(), dim=1)
    classes = int(labels.max()) + 1
    predicted = []
    for some in F.normalize(queries.double(), dim=1).split(256):
        cos, near = (some @ train.T).topk(min(k, len(train)))
        weights = ((cos - 1) / TEMPERATURE).exp()  # minus 1: the same order, without overflow
        votes = weights.new_zeros(len(some), classes)
        votes.scatter_add_(1, labels[near], weights)
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


def fit_probe(x, y, C, w, tolerance=1e-6):
    """Multinomial logistic regression: weights [classes, D + 1], the bias last.
    x: float [I, D + 1], standardised, the last column ones. Minimises mean cross-entropy +
    |W|^2 / (2 C I), without a penalty on the bias, as scikit-learn's LogisticRegression(C): by
    full-batch L-BFGS from w, until no entry of the gradient is above tolerance."""
    if len(w) == 2:
        C /= 2  # of two classes scikit-learn has one vector, the difference of these
    w = w.to(x, copy=True).requires_grad_()
    optimiser = torch.optim.LBFGS([w], max_iter=1000, tolerance_grad=tolerance,
                                  tolerance_change=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        total = w[:, :-1].square().sum() / (2 * C * len(x))
        total.backward()
        for some, labels in zip(x.split(8192), y.split(8192), strict=True):  # bounds the memory
            loss = F.cross_entropy(some @ w.T, labels, reduction="sum") / len(x)
            loss.backward()
            total += loss
        return total.detach()

    optimiser.step(closure)
    return w.detach()


def accuracy(predicted, labels):
    return float((predicted == labels).double().mean())


def linear_probe(train, labels, test):
    """Standardise, choose C on a tenth of train, refit on all of it -> (predictions int64, C).
    C grows until the accuracy falls by more than chance; each fit starts from the last one, but
    that of all images from zeros: of a class that was held out whole the bias would be far off."""
    mean = train.double().mean(0)
    std = train.double().std(0, correction=0).clamp_min(1e-8)
    train, test = (F.pad((x - mean) / std, (0, 1), value=1.0) for x in (train, test))
    known, labels = labels.unique(return_inverse=True)  # not the classes of test images alone
    order = np.random.default_rng(0).permutation(len(train))
    held, rest = np.split(order, [len(order) // HOLDOUT])
    x, x_held = train[rest].float(), train[held].float()
    w = x.new_zeros(len(known), x.shape[1])
    scores = {}
    for C in data.progress(STRENGTHS, "linear probe"):
        w = fit_probe(x, labels[rest], C, w, tolerance=1e-4)
        scores[C] = accuracy((x_held @ w.T).argmax(1), labels[held])
        best = max(scores.values())
        error = (best * (1 - best) / max(len(held), 1)) ** 0.5  # its standard error
        if scores[C] < best - 2 * error:
            break
    # Below ten images none is held out: every score is NaN, and max returns the first C.
    C = max(scores, key=scores.get)
    w = fit_probe(train, labels, C, torch.zeros_like(w))
    return known[(test @ w.T).argmax(1)], C


class Evaluator:
    """Training and test images of cfg.eval_dataset, else of the training data, to evaluate on.

    Without a test split a tenth of the training images is held out of k-NN and probe. Images
    without a label are left out, unless a split has no labels at all: then none is classified.
    Classes are compared by name, as splits may number them differently."""

    def __init__(self, cfg, max_train=0, max_test=0, new=True):
        """new: train.py has not stated what its images are."""
        new |= bool(cfg.eval_dataset)
        cfg = on_dataset(cfg, cfg.eval_dataset)
        self.cfg = cfg
        self.device = models.pick_device(cfg.device)
        self.dtype = models.pick_dtype(cfg.precision, self.device)
        self.autocast = torch.autocast(self.device.type, self.dtype,
                                       enabled=self.dtype != torch.float32)
        self.train, self.test, train_rows, test_rows = open_both(cfg)
        self.about = self.train.summary if new else self.train.note
        self.remarks = []
        if self.test is self.train:
            self.remarks.append("no test split: a tenth of the training images is tested")
        column = self.train.label_column(cfg.label_column)  # for both splits
        source_labels = self.train.source_labels(column)
        labels = source_labels[self.train.rows]
        labels_test = self.test.labels(column)
        all_labels = np.concatenate([labels[train_rows], labels_test[test_rows]])
        self.unlabelled = pandas.isna(all_labels).sum()
        self.train_rows = with_labels(labels, train_rows, max_train)
        self.test_rows = with_labels(labels_test, test_rows, max_test)
        names = labels[self.train_rows]
        names_test = labels_test[self.test_rows]
        numbers, classes = pandas.factorize(np.concatenate([names, names_test]), sort=True)
        self.classes = classes.tolist()
        self.y, self.y_test = torch.from_numpy(numbers).tensor_split([len(names)])  # -1: no label
        self.labelled, remark = can_classify(source_labels, names, names_test)
        if not self.labelled:
            if cfg.label_column:
                raise UserError(f"--label_column {cfg.label_column}: {remark}")
            self.remarks.append(f"no k-NN, no probe: {remark}")
        elif remark:
            self.remarks.append(remark)
        learned = self.train.digests[self.train_rows]
        if copies := np.isin(self.test.digests[self.test_rows], learned).sum():
            self.remarks.append(f"{copies} of the test images have a copy, pixel by pixel, among "
                                "the training images: their classes are known")
        if 0 < self.unlabelled < len(all_labels):
            self.remarks.append(f"{self.unlabelled} images have no label, or it is -1 or empty")

    def __str__(self):
        lines = [f"evaluate  {self.cfg.dataset}: {len(self.y)} images to learn from, "
                 f"{len(self.y_test)} to test on"]
        lines.append(f"{self.train.split}: {self.about}")
        if self.test is not self.train:
            lines.append(f"{self.test.split}: {self.test.note}")
        lines += self.remarks
        return "\n          ".join(lines)

    def stated(self):
        """What was evaluated on, for eval.json."""
        return dict(dataset=self.cfg.dataset, dataset_config=self.cfg.dataset_config,
                    image_column=self.cfg.image_column, label_column=self.cfg.label_column,
                    train_split=self.train.split, test_split=self.test.split,
                    train_images=len(self.y), test_images=len(self.y_test),
                    images=[self.train.fingerprint, self.test.fingerprint],
                    precision=str(self.dtype))

    def embed(self, backbone, store, rows):
        """Yield whole stored images uint8 [B, 3, S, S] on the device, and their Features.
        Raises UserError where these are not finite."""
        name = "teacher" if backbone.fingerprint else "student"
        parts = data.progress(data.chunks(rows), f"features of the {name}")
        for _, images in data.read(parts, self.device, store.images):
            with torch.inference_mode(), self.autocast:
                features = backbone(data.render(images, backbone.image_size))
            for outputs in features:
                models.finite(outputs, name)
            yield images, features

    def features(self, backbone):
        """CLS embeddings of the training and test images: float32 [I, D], [Q, D] on the CPU."""
        backbone.eval().to(self.device)
        find = self.kept_cls if backbone.fingerprint else self.cls
        return (find(backbone, self.train, self.train_rows),
                find(backbone, self.test, self.test_rows))

    def cls(self, backbone, store, rows):
        """CLS embeddings of some images: float32 [rows, D] on the CPU."""
        return torch.cat([features.cls.float().cpu().clone()  # a view would keep all tokens
                          for _, features in self.embed(backbone, store, rows)])

    def kept_cls(self, teacher, store, rows):
        """`cls` of a teacher, cached when it is first evaluated on these images."""
        how = f"{teacher.image_size} {self.dtype} {store.fingerprint}"
        what = data.digest(how, [torch.from_numpy(rows)])
        path = Path(self.cfg.cache_dir, "features", f"{teacher.fingerprint}-{what}.f32")
        try:
            data.make_once(path, lambda part: self.cls(teacher, store, rows).numpy().tofile(part))
        except (OSError, UserError):  # a cache that others own, or a full disk
            return self.cls(teacher, store, rows)
        kept = torch.from_numpy(np.fromfile(path, np.float32))
        if len(kept) == len(rows) * teacher.cls_dim:
            kept = kept.view(len(rows), teacher.cls_dim)
            some = self.cls(teacher, store, rows[:16])
            if (F.cosine_similarity(some, kept[:16]) > 0.99).all():
                return kept
        raise UserError(f"{path} is cut short, or holds features of other code: delete it")

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
        """Mean cosine of predictions and targets on test images; {} for forks."""
        if saved["identity"]["objective"] != "Distiller":
            return {}
        distiller = models.Distiller(student, teacher, cfg).eval().to(self.device)
        distiller.load_state_dict(saved["objective"])
        total = 0
        rows = data.subset(self.test_rows, COMPARED)
        for images, features in self.embed(teacher, self.test, rows):
            with self.autocast:
                target = distiller.targets(features)
                _, stats = distiller(data.render(images, student.image_size), target)
                total += len(images) * torch.stack([stats["cls"], stats["patch"]])
        cls, patch = (1 - total / len(rows)).tolist()
        return dict(cos_cls=cls, cos_patch=patch)

    @torch.inference_mode()
    def speed(self, backbone):
        """Images per second of a forward of 64 images in memory, and GFLOPs an image."""
        images = torch.rand(64, 3, backbone.image_size, backbone.image_size, device=self.device)
        with FlopCounterMode(display=False) as flops:
            backbone(images[:1])
        with self.autocast:  # .item() waits for the device; as many times as take 0.2 seconds
            number, seconds = Timer(lambda: backbone(images).cls.sum().item()).autorange()
        return dict(images_per_s=64 * number / seconds, gflops=flops.get_total_flops() / 1e9)

    def row(self, name, backbone, folder=""):
        """A row of the table. With a folder the embeddings are saved there, too."""
        train, test = self.features(backbone)
        if folder:
            self.save(folder, train, test)
        row = dict(model=name, params_m=backbone.parameter_count / 1e6, size=backbone.image_size)
        return row | self.evaluate(train, test) | self.speed(backbone)

    def save(self, folder, train, test):
        """Write train.safetensors and test.safetensors: embeddings float32 [I, D], labels
        int64 [I], -1 for none; the metadata has the names of classes and images, as JSON."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for split, embeddings, y, store, rows in (
                ("train", train, self.y, self.train, self.train_rows),
                ("test", test, self.y_test, self.test, self.test_rows)):
            images = json.dumps(store.names(rows))
            classes = json.dumps(self.classes)
            file = Path(folder, f"{split}.safetensors")
            save_file(dict(embeddings=embeddings, labels=y), file,
                      dict(images=images, classes=classes))
        print(f"features: {folder}")


def open_both(cfg):
    """The stores of the training and test images of a config, and the rows of each to evaluate on.
    Without a test split a tenth of the training images is held out."""
    train = data.open_store(cfg, cfg.train_split, cfg.max_samples)
    try:
        test = data.open_store(cfg, cfg.test_split or "test")
    except data.NoSplit:
        if cfg.test_split:
            raise
        test = train
    rows = np.arange(len(train))
    if test.split != train.split:
        return train, test, rows, np.arange(len(test))
    held_out = data.subset(rows, math.ceil(len(rows) / 10), data.HELD_OUT)
    return train, train, np.setdiff1d(rows, held_out), held_out


def with_labels(labels, rows, count):
    """`count` of those `rows` that have a label; of all if none has."""
    found = rows[pandas.notna(labels[rows])]
    return data.subset(found if len(found) else rows, count)


def can_classify(labels, learned, asked):
    """Whether test images can be classified, and a remark: why not, or which of their classes are
    unknown. labels: of the whole training split; learned, asked: of what is used."""
    count = sum(label is not None for label in labels)
    names, learned, asked = ({*some} - {None} for some in (labels, learned, asked))
    if len(names) > max(50, count / 2):
        return False, f"{len(names)} labels of {count} images are no classes; see --label_column"
    if not names and not asked:
        return False, ("neither split has labels, or they are in another column (--label_column), "
                       "or in a file beside the images (docs/recipes.md)")
    if len(learned | asked) < 2 or not learned & asked:
        return False, (f"the training split has the classes {sorted(learned)[:5]}, the test split "
                       f"{sorted(asked)[:5]}; see --label_column, --test_split")
    if unknown := sorted(asked - learned)[:5]:
        return True, f"test images of {unknown} count as mistakes: no training image is called so"
    return True, ""


def on_dataset(cfg, dataset, **changes):
    """The Config to evaluate on another data set, if there is one. What says how to read the
    training data is reset, all of the networks stays, and `changes` are made."""
    if not dataset:
        return cfg
    return replace(cfg, dataset=dataset, eval_dataset="", dataset_config="", image_column="",
                   train_split="train", max_samples=0, **changes)


def with_settings(args, cfg):
    """The Config of a checkpoint with what eval.py was given in its place. Raises UserError."""
    if not Path(cfg.cache_dir, "stores").is_dir():  # a stranger's checkpoint makes no folders
        cfg = replace(cfg, cache_dir=Config.cache_dir)
    cfg = on_dataset(cfg, cfg.eval_dataset)
    cfg = on_dataset(cfg, args.dataset, label_column="", test_split="")
    given = {name: value for name, value in vars(args).items() if value and hasattr(cfg, name)}
    cfg = replace(cfg, **given)
    return validate(cfg, "dataset")


def main(args, cfg=None):
    """Rows of teachers, untrained students and checkpoints; also in eval.json. cfg: in place of a
    checkpoint's own, of a run whose data have moved since. Raises UserError."""
    if args.save_features and len(args.checkpoints) > 1:
        raise UserError("--save_features takes one checkpoint")
    loaded = [(saved, with_settings(args, cfg or own))
              for saved, own in map(models.load_checkpoint, args.checkpoints)]
    sizes = [own.stored_size or max(own.teacher_size, own.student_size) for _, own in loaded]
    at_largest = replace(loaded[0][1], stored_size=max(sizes))
    evaluator = Evaluator(at_largest, args.max_train, args.max_test, new=not cfg)
    log.info(evaluator) if cfg else print(evaluator, flush=True)  # into train.log, too
    folders = {saved["path"].resolve().parent for saved, _ in loaded}
    alike = len({folder.name for folder in folders}) < len(folders)
    rows = {}  # checkpoints may share a teacher or an untrained student, and so its row

    def add(key, name, backbone, folder=""):
        if key not in rows:
            rows[key] = evaluator.row(name, backbone, folder)
        return rows[key]

    for saved, own in loaded:
        student = models.build_student(own, saved["student"])
        folder = saved["path"].resolve().parent
        run = printable(folder if alike else folder.name) if len(loaded) > 1 else "student"
        if args.baselines:
            teacher = models.load_teacher(own)
            if teacher.fingerprint != saved["identity"]["teacher"]:
                raise UserError(f"{own.teacher} has other weights now than in the run: "
                                "--teacher_weights, import the fork that registers it, or "
                                "--no_baselines")
            best = add((teacher.fingerprint, own.teacher_size), f"teacher {own.teacher}", teacher)
            untrained = models.build_student(replace(own, student_weights=""))
            add((own.student, own.student_args, own.student_size, own.pool, own.seed),
                f"{run}, untrained", untrained)
        name = f"{run}, epoch {saved['epoch']:g}"
        row = add(saved["path"].resolve(), name, student, args.save_features)
        row |= dict(checkpoint=str(saved["path"]), step=saved["step"])
        if args.baselines:
            row |= {f"keeps_{key}": row[key] / best[key] for key in ("knn20", "linear")
                    if best.get(key)}
            row |= evaluator.compare(saved, own, student, teacher)
    about = evaluator.stated() | models.environment(evaluator.device)
    rows = [row | about for row in rows.values()]
    write(args, cfg, loaded[0][0], rows)
    return rows


def write(args, cfg, saved, rows):
    """Write the rows beside the checkpoint, and print the table. Only the plain evaluation of a
    run's last checkpoint is eval.json: no other one overwrites it."""
    path = saved["path"].with_name("eval.json")
    is_latest = saved["path"].name == "checkpoint_latest.pth"
    other = []
    if cfg:  # of a run that has ended, on other data than it states
        for name in ("eval_dataset", "test_split", "label_column"):
            value = getattr(cfg, name)
            if value != saved["config"].get(name):
                other.append(value)
    if other or not is_latest or args != EvalConfig(args.checkpoints[:1]):
        what = data.digest(f"{args}{other}")
        name = f"eval-{slug(rows[0]['dataset'])}-{what}.json"
        path = path.with_name(name)
    try:
        path.write_text(json.dumps(rows, indent=1) + "\n")
    except OSError as error:  # such as a run of somebody else
        path = f"not written, {reason(error)}"
    table = pandas.DataFrame(rows, columns=list(TITLES)).dropna(axis=1, how="all")
    table = table.rename(columns=TITLES)
    formats = dict.fromkeys(table, "{:.1%}".format)
    formats |= {"model": "{:.40}".format, "M parameters": "{:.2f}".format}
    formats |= {"images/s": "{:.0f}".format}
    print(table.to_string(index=False, na_rep="", formatters=formats))
    print(f"all numbers: {path}\npictures: python examples/figures.py {saved['path'].parent}")


if __name__ == "__main__":
    cli(main, EvalConfig)
