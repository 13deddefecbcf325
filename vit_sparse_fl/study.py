"""What the scripts of this study share: the `Study`, its data, clients and model, and functions of it.

The round loop is in each script; sparse fine-tuning differs from FedAvg only there and in what a client trains.
"""

import hashlib
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common import parallel
from common.aggregation import fp64_sum
from common.allocator import reuse_large_memory
from common.batches import pass_after_pass
from common.checkpoint import saving, write_json
from common.cli import UsageError, say
from common.curves import draw_accuracy
from common.evaluation import amp_context
from common.local import client_optimizer, local_steps
from common.participation import Turns
from common.schedules import lr_at
from common.seeding import seed_torch, stream
from common.sharding import class_counts
from common.vector import Weights, fingerprint
from vit_sparse_fl.best import BestCheckpoints
from vit_sparse_fl.calibration import check_mask
from vit_sparse_fl.cross_losses import CrossLosses
from vit_sparse_fl.data import ImageSplits, augment, check_batch_size, classes_of, deal, load_images, prepare
from vit_sparse_fl.heads import fit_head
from vit_sparse_fl.interference import Interference
from vit_sparse_fl.masks import maskable
from vit_sparse_fl.sparse_sgdm import SparseSGDM
from vit_sparse_fl.vit import freeze, init_from, make_model, new_head, save_pretrained


@dataclass
class Study:
    """Data, clients and model of a run.

    Attributes: args: flags; run; data: `ImageSplits` on the device; rows: int64 rows of each client's images; examples:
    their numbers n_k; model; weights: what is trained, as one vector (`common.vector`); loss: function
    (pixels [B, 3, S, S], labels [B]) -> mean cross-entropy in nats with label smoothing; log: the text log; best: the
    best rounds' weights; turns: who took part before; first: theta before the first round; lasting: with theta, all
    that outlives a round; traffic: bytes that a client sends, that it receives, and that one receives who joins.
    """

    args: object
    run: object
    data: ImageSplits
    rows: list
    examples: list
    model: nn.Module
    weights: Weights
    loss: object
    log: logging.Logger
    best: BestCheckpoints
    turns: Turns | None
    first: torch.Tensor = None
    lasting: dict = None
    traffic: tuple = (0, 0, 0)

    @property
    def device(self):
        return self.run.device

    @property
    def amp(self):
        return self.run.amp

    @property
    def client_weights(self):
        """What each client counts in a mean: n_k, its images."""
        return self.examples

    def sends(self, up, down=None, joining=None):
        """Says how many bytes a client sends and receives in a round (down: as many), and receives in its first."""
        self.traffic = up, up if down is None else down, self.model_bytes if joining is None else joining

    def bytes_of(self, t):
        """(up, down [K]): what a client sends and receives in round t."""
        up, down, joining = self.traffic
        return up, np.where(self.turns.before(t), down, joining)

    def evaluate(self, theta, t, row):
        """What is logged of theta [n] after t rounds, see `evaluate`."""
        return evaluate(self, theta, t, row)

    @property
    def model_bytes(self):
        """Of all parameters: what a client that joins is sent."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def frozen_squares(self):
        """Sum of squares of the weights that are not trained, in fp64."""
        frozen = [p for p in self.model.parameters() if not p.requires_grad]
        return math.fsum(fp64_sum(p.detach().reshape(-1), square=True) for p in frozen)

    def pixels(self, images):
        """uint8 [B, 3, H, W] as the model takes them: float32 [B, 3, S, S]."""
        return prepare(images, self.args.image_size)


def load_study(args, run, federated=True, sparse=False):
    """The `Study` of a run, whose folder it begins; bad input ends here, with nothing written.

    federated: False: one client with everybody's images; sparse: only what a mask may cover is trained.
    Raises: UsageError.
    """
    reuse_large_memory()
    data = load_images(args.dataset, args.seed, args.val_split, classes_of(args), args.data_root)
    if args.num_classes is not None and args.classes is None and args.num_classes != data.n_classes:
        raise UsageError(
            f"--num-classes {args.num_classes}, but {args.dataset} has {data.n_classes} (--classes A:B takes a part)"
        )
    shards, notes = [torch.arange(len(data.train_labels)).numpy()], []
    if federated:
        shards, notes = deal(args, data.train_labels)
    examples = [len(rows) for rows in shards]
    check_batch_size(examples, args.batch_size)
    model, more = _make_model(args, data.n_classes)
    freeze(model, backbone=args.freeze_backbone, layers=args.freeze_layers, head=args.freeze_head)
    covered = []
    if sparse:  # a head that is not frozen is under the mask like the rest; what no mask covers is frozen
        omit = getattr(args, "mask_omit", "none")
        covered = maskable(model, "classifier" if args.freeze_head else "", omit)
        shapes = {name: p.shape for name, p in model.named_parameters() if name in covered}
        if "mask" in args:
            check_mask(args, shapes, len(data.validation), min(examples))
        for name, p in model.named_parameters():
            p.requires_grad_(name in covered)
    model.to(run.device)
    parameters = dict(model.named_parameters())
    weights = Weights(model)
    sizes = {
        "total": _count(model),
        "trainable": weights.size,
        "backbone": _count(model.vit),
        "head": _count(model.classifier),
        "maskable": {name: list(parameters[name].shape) for name in covered},
    }
    facts = {"clients": len(examples), "weights_sha256": fingerprint(parameters)}
    if getattr(args, "mask", None):
        facts["mask_sha256"] = hashlib.sha256(Path(args.mask).read_bytes()).hexdigest()
    log = open_log(args.log_dir or f"{args.output_dir}/logs", run.folder.name)
    run.begin(data.fingerprint, sizes, clients=facts)
    for note in notes + more if run.before is None else ():  # a run that goes on may yet be refused
        log.info(note)
    if federated:
        _log_shards(run, log, class_counts(shards, data.train_labels.numpy(), data.n_classes), examples, notes)
    study = Study(
        args=args,
        run=run,
        data=data.to(run.device),
        rows=[torch.from_numpy(rows).to(run.device) for rows in shards],
        examples=examples,
        model=model,
        weights=weights,
        loss=batch_loss(model, run.amp, run.device, args.label_smoothing),
        log=log,
        best=BestCheckpoints(run.folder / "best"),
        turns=Turns(args.seed, args.num_clients, args.participation_rate) if federated else None,
    )
    study.sends(weights.bytes)
    if federated:
        run.plan(args.num_rounds, args.eval_every, args.save_every, len(examples))
    else:
        run.plan(args.epochs, 1, args.save_every)
    study.first, fitted = fit_first(study)
    study.lasting = {"best": study.best, **fitted}
    return study


def _make_model(args, n_classes):
    """(model, lines for the log)."""
    size = {"image_size": args.image_size, "n_classes": n_classes, "dropout": args.dropout, "seed": args.seed}
    model = make_model(args.model, weights=args.weights, pretrained=args.pretrained and not args.init_from, **size)
    notes = init_from(model, args.init_from) if args.init_from else []
    if args.head == "keep" and notes:
        raise UsageError(f"--head keep: {notes[0]}: use --head ridge")
    if args.head == "random":
        new_head(model, args.seed)
    return model, notes


def _count(module):
    return sum(p.numel() for p in module.parameters())


def _log_shards(run, log, counts, examples, notes):
    n, classes = sorted(examples), (counts > 0).sum(1)
    if run.before is None:  # a run that goes on may still be refused
        log.info(
            f"{len(n)} clients, images a client {n[0]} to {n[-1]} (median {n[len(n) // 2]}), "
            f"classes a client {classes.min()} to {classes.max()}"
        )
    path = run.folder / "shards.json"
    if parallel.is_main() and not path.exists():
        with saving(path):
            write_json(path, {"counts": counts.tolist(), "notes": notes})


def batch_loss(model, amp, device, label_smoothing=0.0):
    """The function (pixels [B, 3, S, S], labels [B]) -> mean cross-entropy, in nats."""

    def loss(pixels, labels):
        with amp_context(amp, device):
            logits = model(pixels)  # [B, C]
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)

    return loss


# ------------------------------------------------------------------------------------------------ local work


def client_batches(study, k, t, first, steps):
    """Client k's next `steps` batches in round t, (pixels, labels) each, after `first` batches in earlier rounds.

    Puts the model into training mode and seeds dropout: both are the client's, as its order and its augmentation are.
    """
    args, data = study.args, study.data
    study.model.train()
    seed_torch(args.seed, "dropout", t, k)
    draws = stream(args.seed, "augment", t, k)
    rows = pass_after_pass(study.examples[k], args.batch_size, first, steps, args.seed, k)
    for batch in study.rows[k][torch.from_numpy(rows).to(study.device)]:  # [B] of [steps, B]
        yield augment(data.train[batch], args.image_size, draws), data.train_labels[batch]


def client_update(study, theta, k, t, kept=None):
    """Client k's J steps of SGD with momentum in round t from theta [n]. Returns theta_k [n]: the model's own vector,
    valid until the next client.

    Args: kept: int64 [kept]: the places that are trained, None: all.
    """
    args, weights, clients = study.args, study.weights, study.run.clients
    weights.load(theta)
    lr, steps = learning_rate(args, t), args.local_steps
    if kept is None:
        optimizer = client_optimizer("sgdm", weights.parameters, lr, args.momentum, args.weight_decay)
    else:
        optimizer = SparseSGDM(weights, kept, lr, args.momentum, args.weight_decay)
    batches = client_batches(study, k, t, study.turns.before(t)[k] * steps, steps)
    done = local_steps(study.loss, batches, weights, optimizer, amp=study.amp)
    clients.note(k, train_loss=done.loss)
    clients.work(steps * args.batch_size)
    return weights.theta


def probes(study, kept=None):
    """What is measured of the rounds' clients. Args: kept: as of `client_update`."""
    pull = [Interference(kept, study.frozen_squares())]
    return pull + ([CrossLosses(study)] if study.args.interference_every else [])


def learning_rate(args, t):
    """The clients' learning rate in round t (central training's in epoch t), both from 0."""
    if "num_rounds" in args:
        total, warmup = args.num_rounds, args.warmup_rounds
    else:
        total, warmup = args.epochs, min(args.warmup_epochs, args.epochs - 1)
    return lr_at(t, total, args.lr, args.scheduler, warmup=warmup, min_lr=min(args.min_lr, args.lr))


# ------------------------------------------------------------------------------------------------ evaluation


def fit_first(study):
    """theta before the first round. Fits the head first (--head ridge), but not in a run that is gone on with.

    Returns (theta [n], what else a checkpoint must hold of the model: {"head": the fitted head} where it is frozen).
    """
    args, run, data = study.args, study.run, study.data
    fitted = args.head == "ridge"
    if fitted and not any(run.folder.glob("checkpoint*/state.json")):
        started = time.perf_counter()
        held = (features(study, data.validation), data.validation_labels)
        sums = fit_head(study.model, features(study, data.train), data.train_labels, held)
        run.count(bytes_up=sums * len(study.examples))
        accuracy = validate(study, "validation", "val")["val_accuracy"]
        study.log.info(
            f"head fitted on {len(data.train)} images in "
            f"{time.perf_counter() - started:.1f} s: validation accuracy {accuracy:.4f}"
        )
    frozen = fitted and "classifier.weight" not in study.weights.shapes
    return study.weights.snapshot(), {"head": study.model.classifier} if frozen else {}


@torch.no_grad()
def features(study, images):
    """The CLS features of uint8 images [n, 3, H, W], without augmentation: float32 [n, D]."""
    study.model.eval()
    with amp_context(study.amp, study.device):
        parts = [study.model.features(study.pixels(part)).float() for part in images.split(_batch(study))]
    return torch.cat(parts)  # [n, D]


@torch.no_grad()
def validate(study, split, name):
    """{name_loss, name_accuracy} of the model on a split ("validation", "test"), over all processes."""
    study.model.eval()
    size, sums = _batch(study), []
    images, labels = getattr(study.data, split).split(size), getattr(study.data, f"{split}_labels").split(size)
    for part, truth in parallel.my_share(list(zip(images, labels, strict=True))):
        with amp_context(study.amp, study.device):
            logits = study.model(study.pixels(part)).float()  # [B, C]
        loss = F.cross_entropy(logits, truth, reduction="sum").item()
        sums.append((loss, (logits.argmax(1) == truth).sum().item(), len(truth)))
    losses, right, n = zip(*(one for part in parallel.all_gather(sums) for one in part), strict=True)
    return {f"{name}_loss": math.fsum(losses) / sum(n), f"{name}_accuracy": sum(right) / sum(n)}


def _batch(study):
    # Fixed per device: sums over other batches would round differently.
    return 125 if study.device.type == "cpu" else 500


def evaluate(study, theta, t, row):
    """{field: value} of theta [n] after t rounds (epochs) on the validation images; keeps the best, stops early.

    row: what is logged besides; the text log gets a line of all.
    """
    args, run, best = study.args, study.run, study.best
    study.weights.load(theta)
    fields = {"lr": learning_rate(args, t - 1)} if t else {}
    fields |= validate(study, "validation", "val")
    for round, k in row.get("left_out", ()):  # the run has told the terminal
        study.log.warning(f"round {round}: update not finite, left out: client {k}", extra={"quiet": True})
    shown = [f"{name} {v:.4f}" for name, v in {**row, **fields}.items() if isinstance(v, float)]
    study.log.info(f"round {t}  " + "  ".join(shown), extra={"quiet": True})
    if t:
        best.offer(t, fields["val_accuracy"], dict(study.model.named_parameters()))
        if args.early_stopping_patience and t - best.round >= args.early_stopping_patience and t < run.total:
            run.stop("early_stopping", f"no better validation accuracy since {best.round}")
    return fields


def finish(study, theta, **facts):
    """Test accuracy of the last and of the best weights, final/ (--final says whose), the run's curves.

    facts: more results.
    """
    run, best = study.run, study.best
    run.note("evaluating the last and the best weights on the test images")
    args, kept, test = study.args, best.load(study.device), {}
    kept = study.weights.vector({name: kept[name] for name in study.weights.shapes})
    for which, vector in (("last", theta), ("best", kept)):
        study.weights.load(vector)
        test[which] = validate(study, "test", "test")
        if which == args.final:
            run.write_final(lambda folder: save_pretrained(study.model, folder))
    results = {
        **facts,
        "test_accuracy_last": test["last"]["test_accuracy"],
        "test_loss_last": test["last"]["test_loss"],
    }
    results |= {"best_round": best.round, "val_accuracy_best": best.accuracy}
    results["test_accuracy_best"] = test["best"]["test_accuracy"]
    if parallel.is_main():
        last = run.metrics()[-1]
        results |= {"rounds": last["round"], "final_round": best.round if args.final == "best" else last["round"]}
        results |= {key: last[key] for key in ("bytes_up", "bytes_down", "images", "seconds")}
        with saving(run.folder):
            draw_accuracy(run.folder, run.folder / f"{run.folder.name}_curves.png")
        study.log.info(
            f"test accuracy {results['test_accuracy_last']:.4f} (weights of the best round, "
            f"{results['best_round']}: {results['test_accuracy_best']:.4f})"
        )
    run.finish(results)


# ------------------------------------------------------------------------------------------------ the text log


class _BesideTheBar(logging.Handler):
    """Messages on stderr, above a progress bar; those with extra={"quiet": True} are for the file alone."""

    def emit(self, record):
        if not getattr(record, "quiet", False):
            say(record.getMessage())


def open_log(folder, name):
    """The study's logger: LOG_DIR/NAME.log, a line `timestamp | level | message` each, and stderr; the main process's.

    Raises UsageError when the folder cannot be made.
    """
    log = logging.getLogger("vit_sparse_fl")
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in list(log.handlers):  # of the run before this one
        log.removeHandler(handler)
        handler.close()
    if not parallel.is_main():
        log.addHandler(logging.NullHandler())
        return log
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror}; choose --log-dir") from None
    file = logging.FileHandler(Path(folder) / f"{name}.log", encoding="utf-8", delay=True)
    file.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.addHandler(file)
    log.addHandler(_BesideTheBar())
    return log
