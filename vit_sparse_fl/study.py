"""What the scripts of this study share: the `Study`, its data, clients and model; a client's work, evaluation."""

import logging
import math
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from common import parallel
from common.aggregation import fp64_sum
from common.batches import pass_after_pass
from common.checkpoint import saving
from common.cli import UsageError
from common.curves import draw_accuracy
from common.evaluation import amp_context, reuse_large_memory
from common.local import client_optimizer, local_steps, lr_at
from common.participation import Turns
from common.seeding import seed_torch, stream
from common.vector import Weights, fingerprint
from vit_sparse_fl.best import BestCheckpoints
from vit_sparse_fl.data import augment, classes_of, deal, load_images, prepare
from vit_sparse_fl.interference import CrossLosses, Drift
from vit_sparse_fl.masks import SparseSGDM, check_mask, maskable
from vit_sparse_fl.vit import freeze, init_from, make_model, new_head, ridge_head, save_pretrained, sums_bytes


class Study:
    """Data, clients and model of a run, whose folder it begins; bad input ends here, with nothing written.

    Attributes: args: flags; run; data: `ImageSplits` on the device; rows: int64 rows of each client's images; examples,
    client_weights: their numbers n_k; model; weights: what is trained, as one vector (`common.vector`); log: the text
    log; best: the best rounds' weights; turns: who took part before; up, down, joining: bytes that a client sends in a
    round, that it receives, and that it receives in its first; first: theta before the first round; lasting: with
    theta, all that outlives a round.
    Args: federated: False: one client with all images; sparse: only what a mask may cover is trained.
    Raises: UsageError.
    """

    def __init__(self, args, run, federated=True, sparse=False):
        reuse_large_memory()
        self.args, self.run, self.device = args, run, run.device
        data = load_images(args.dataset, args.seed, args.val_split, classes_of(args), args.data_root)
        shards, notes = deal(args, data.train_labels)
        self.examples = self.client_weights = [len(rows) for rows in shards]
        self.model, more = _make_model(args, data.n_classes)
        freeze(self.model, backbone=args.freeze_backbone, layers=args.freeze_layers, head=args.freeze_head)
        if sparse:
            covered = maskable(self.model)
            for name, p in self.model.named_parameters():
                p.requires_grad_(name in covered)
        self.model.to(run.device)
        self.weights = Weights(self.model)
        if "mask_strategy" in args:
            check_mask(args, self.weights.size, len(data.validation))
        sizes = {"total": sum(p.numel() for p in self.model.parameters()), "trainable": self.weights.size}
        facts = {"clients": len(shards), "weights_sha256": fingerprint(dict(self.model.named_parameters()))}
        self.log = open_log(args.log_dir or f"{args.output_dir}/logs", run.folder.name)
        run.begin(data.fingerprint, sizes, clients=facts)
        self.data, self.rows = data.to(run.device), [torch.from_numpy(rows).to(run.device) for rows in shards]
        self.best = BestCheckpoints(run.folder / "best")
        self.up = self.down = self.weights.bytes
        self.joining = sum(p.numel() * p.element_size() for p in self.model.parameters())
        if run.before is None:  # a run that goes on has said it, and may yet be refused
            for note in notes + more:
                self.tell(note)
        if federated:
            self.turns = Turns(args.seed, args.num_clients, args.participation_rate)
            run.plan(args.num_rounds, args.eval_every, args.save_every, len(shards))
        else:
            run.plan(args.epochs, 1, args.save_every)
        self.first, fitted = fit_first(self)
        self.lasting = {"best": self.best, **fitted}

    def bytes_of(self, t):
        """(up, down [K]): what a client sends and receives in round t."""
        return self.up, np.where(self.turns.before(t), self.down, self.joining)

    def loss(self, pixels, labels):
        """Mean cross-entropy in nats, with label smoothing. Args: pixels [B, 3, S, S]; labels [B], or shares [B, C]."""
        with amp_context(self.run.amp, self.device):
            logits = self.model(pixels)  # [B, C]
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.args.label_smoothing)

    def evaluate(self, theta, t, row):
        """{field: value} of theta [n] after t rounds (epochs) on the validation images; keeps the best, stops early.

        row: what is logged besides; the text log gets a line of all.
        """
        best, patience = self.best, self.args.early_stopping_patience
        self.weights.load(theta)
        fields = {"lr": learning_rate(self.args, t - 1)} if t else {}
        fields |= validate(self, "validation", "val")
        shown = [f"{name} {v:.4f}" for name, v in {**row, **fields}.items() if isinstance(v, float)]
        self.log.info(f"round {t}  " + "  ".join(shown))
        if t:
            best.offer(t, fields["val_accuracy"], dict(self.model.named_parameters()))
            if patience and t - best.round >= patience and t < self.run.total:
                self.run.stop("early_stopping", f"no better validation accuracy since {best.round}")
        return fields

    def pixels(self, images):
        """uint8 [B, 3, H, W] as the model takes them: float32 [B, 3, S, S]."""
        return prepare(images, self.args.image_size)

    def tell(self, text):
        """A line in the text log, and on stderr."""
        self.log.info(text)
        self.run.note(text)


def _make_model(args, n_classes):
    """(model, lines for the log)."""
    size = {"image_size": args.image_size, "n_classes": n_classes, "dropout": args.dropout, "seed": args.seed}
    model = make_model(args.model, pretrained=args.pretrained and not args.init_from, **size)
    notes = init_from(model, args.init_from) if args.init_from else []
    if args.head == "keep" and notes:
        raise UsageError(f"--head keep: {notes[0]}: use --head ridge")
    if args.head == "random":
        new_head(model, args.seed)
    return model, notes


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
    """Client k's J steps of SGD with momentum in round t from theta [n], at the places `kept` (int64; None: all).

    Returns theta_k [n]: the model's own vector, valid until the next client.
    """
    done, clients = local_work(study, theta, k, t, kept, learning_rate(study.args, t)), study.run.clients
    clients.note(k, train_loss=done.loss)
    clients.work(study.args.local_steps * study.args.batch_size)
    return study.weights.theta


def local_work(study, theta, k, t, kept, lr):
    """`client_update` at a rate, which leaves theta_k in the model and notes nothing. Returns a `LocalResult`."""
    args, weights, steps = study.args, study.weights, study.args.local_steps
    weights.load(theta)
    if kept is None:
        optimizer = client_optimizer("sgdm", weights.parameters, lr, args.momentum, args.weight_decay)
    else:
        optimizer = SparseSGDM(weights, kept, lr, args.momentum, args.weight_decay)
    batches = client_batches(study, k, t, study.turns.before(t)[k] * steps, steps)
    return local_steps(study.loss, batches, weights, optimizer, amp=study.run.amp)


def probes(study):
    """What is measured of the rounds' clients."""
    frozen = [p.detach().reshape(-1) for p in study.model.parameters() if not p.requires_grad]
    drift = Drift(math.fsum(fp64_sum(w, square=True) for w in frozen))
    return [drift, CrossLosses(study)] if study.args.interference_every else [drift]


def learning_rate(args, t):
    """The clients' learning rate in round t (central training's in epoch t), both from 0."""
    total, warmup = (args.num_rounds, 0) if "num_rounds" in args else (args.epochs, args.warmup_epochs)
    warmup = min(warmup, total - 1)
    return lr_at(t, total, args.lr, args.scheduler, warmup=warmup, min_lr=min(args.min_lr, args.lr))


def fit_first(study):
    """(theta [n] before the first round, what else a checkpoint must hold of the model: a fitted head that is frozen).

    Fits the head first (--head ridge), but not in a run that is gone on with.
    """
    args, run, data = study.args, study.run, study.data
    fitted = args.head == "ridge"
    if fitted and not parallel.from_main(lambda: any(run.folder.glob("checkpoint*/state.json"))):
        held = (features(study, data.validation), data.validation_labels)
        ridge_head(study.model, features(study, data.train), data.train_labels, held)
        head = dict(study.model.classifier.named_parameters())
        for name, of_main in parallel.broadcast_tensors(head, study.device).items():
            head[name].data.copy_(of_main)  # another kind of processor fits other last digits
        run.count(bytes_up=sums_bytes(study.model.classifier) * len(study.examples))
        accuracy = validate(study, "validation", "val")["val_accuracy"]
        study.tell(f"head fitted on {len(data.train)} images: validation accuracy {accuracy:.4f}")
    frozen = fitted and "classifier.weight" not in study.weights.shapes
    return study.weights.snapshot(), {"head": study.model.classifier} if frozen else {}


@torch.no_grad()
def features(study, images):
    """The CLS features of uint8 images [n, 3, H, W], without augmentation: float32 [n, D]."""
    study.model.eval()
    with amp_context(study.run.amp, study.device):
        parts = [study.model.features(study.pixels(part)).float() for part in images.split(_batch(study))]
    return torch.cat(parts)  # [n, D]


@torch.no_grad()
def validate(study, split, name):
    """{name_loss, name_accuracy} of the model on a split ("validation", "test"), over all processes."""
    study.model.eval()
    size, sums = _batch(study), []
    images, labels = getattr(study.data, split).split(size), getattr(study.data, f"{split}_labels").split(size)
    for part, truth in parallel.my_share(list(zip(images, labels, strict=True))):
        with amp_context(study.run.amp, study.device):
            logits = study.model(study.pixels(part)).float()  # [B, C]
        loss = F.cross_entropy(logits, truth, reduction="sum").item()
        sums.append((loss, (logits.argmax(1) == truth).sum().item(), len(truth)))
    losses, right, n = zip(*(one for part in parallel.all_gather(sums) for one in part), strict=True)
    return {f"{name}_loss": math.fsum(losses) / sum(n), f"{name}_accuracy": sum(right) / sum(n)}


def _batch(study):
    # Fixed per device: sums over other batches would round differently.
    return 125 if study.device.type == "cpu" else 500


def finish(study, theta, **facts):
    """Test accuracy of the last and of the best weights, final/ (--final says whose), curves. facts: more results."""
    run, best, args = study.run, study.best, study.args
    run.note("evaluating the last and the best weights on the test images")
    kept = best.load(study.device)
    kept = study.weights.vector({name: kept[name] for name in study.weights.shapes})
    test = {}
    for which, vector in (("last", theta), ("best", kept)):
        study.weights.load(vector)
        test[which] = validate(study, "test", "test")
        if which == args.final:
            run.write_final(lambda folder: save_pretrained(study.model, folder))
    results = {
        **facts,
        "test_accuracy_last": test["last"]["test_accuracy"],
        "test_loss_last": test["last"]["test_loss"],
        "best_round": best.round,
        "val_accuracy_best": best.kept[0][0],
        "test_accuracy_best": test["best"]["test_accuracy"],
    }
    if parallel.is_main():
        last = run.metrics()[-1]
        results |= {"rounds": last["round"], "final_round": best.round if args.final == "best" else last["round"]}
        results |= {key: last[key] for key in ("bytes_up", "bytes_down", "images", "seconds")}
        with saving(run.folder):
            draw_accuracy(run.folder, run.folder / f"{run.folder.name}_curves.png")
    last, of_best = (test[which]["test_accuracy"] for which in ("last", "best"))
    study.tell(f"test accuracy {last:.4f} (weights of the best round, {best.round}: {of_best:.4f})")
    run.finish(results)


def open_log(folder, name):
    """The text log of a run: LOG_DIR/NAME.log, a line `timestamp | level | message` each; the main process's.

    Raises UsageError when the folder cannot be made.
    """
    log = logging.Logger("vit_sparse_fl")
    if not parallel.is_main():
        return log
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror}; choose --log-dir") from None
    file = logging.FileHandler(Path(folder) / f"{name}.log", encoding="utf-8", delay=True)
    file.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.addHandler(file)
    return log
