"""What the scripts of this study share: the `Study`, with data, clients, model, local work and evaluation.

The round loop is in each script; sparse fine-tuning differs from FedAvg only there.
"""

import hashlib
import math
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from common import parallel
from common.allocator import reuse_large_memory
from common.before.aggregation import finite
from common.before.local import gradients
from common.checkpoint import saving, write_json
from common.cli import RunFailed, UsageError
from common.compiling import checked_compile
from common.curves import draw_accuracy
from common.evaluation import amp_context, pick_device, resolve_amp
from common.seeding import seed_everything, seed_torch, stream
from common.sharding import class_counts
from vit_sparse_fl.best import BestCheckpoints
from vit_sparse_fl.calibration import check_masks
from vit_sparse_fl.data import augment, check_batch_size, client_rows, load_images, make_shards, prepare
from vit_sparse_fl.heads import fit_head
from vit_sparse_fl.masks import maskable
from vit_sparse_fl.schedules import lr_at
from vit_sparse_fl.sparse_sgdm import SparseSGDM
from vit_sparse_fl.text_log import open_log
from vit_sparse_fl.vit import freeze, init_from, make_model, new_head, save_pretrained


def fingerprint(tensors):
    """SHA-256 (hex) of {name: tensor}: names and bits, in order."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class Study:
    """Data, model and the pieces of a round. theta is {name: tensor} of all parameters, frozen ones too.

    Attributes: data (ImageSplits, on the device), shards (rows of each client's images), model, parameters (all),
    trained (those with gradients), masks (None: dense), best (BestCheckpoints).
    """

    def __init__(self, args, run, federated=True, sparse=False):
        self.args, self.run = args, run
        reuse_large_memory()
        if args.threads:
            torch.set_num_threads(args.threads)
        self.device = parallel.world().device(pick_device(args.device))
        self.amp = resolve_amp(args.amp, self.device)
        seed_everything(args.seed)
        data = load_images(args.dataset, args.seed, args.val_split, args.classes, args.data_root)
        self._check_classes(data.n_classes)
        notes = []
        if federated:
            self.shards, notes = make_shards(
                data.train_labels,
                args.sharding,
                args.num_clients,
                args.nc,
                args.alpha,
                args.seed,
                args.allow_unused_classes,
                args.min_samples or args.batch_size,
            )
        else:  # one client with everybody's images
            self.shards = [torch.arange(len(data.train_labels)).numpy()]
        self.examples = [len(rows) for rows in self.shards]
        check_batch_size(self.examples, args.batch_size)
        self.counts = class_counts(self.shards, data.train_labels.numpy(), data.n_classes)
        self.model, more = self._make_model(data.n_classes)
        freeze(self.model, backbone=args.freeze_backbone, layers=args.freeze_layers, head=args.freeze_head)
        # a head that is not frozen is under the mask like the rest
        self.maskable = maskable(self.model, "classifier" if args.freeze_head else "") if sparse else []
        if sparse:  # what no mask covers is frozen
            for name, p in self.model.named_parameters():
                p.requires_grad_(name in self.maskable)
            check_masks(args, self.model, self.maskable, len(data.validation), min(self.examples))
        self.data = data.to(self.device)
        self.rows = [torch.from_numpy(rows).to(self.device) for rows in self.shards]
        self.parameters = dict(self.model.named_parameters())
        self.trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        self.masks, self._sparse = None, None
        self.loss = checked_compile(self.batch_loss, self.trained) if args.compile else self.batch_loss
        self.best = BestCheckpoints(run.folder / "best", args.keep_best)
        self._observed, self._left_out, self._left_out_since = {}, [], []
        facts = {"clients": len(self.examples), "weights_sha256": fingerprint(self.parameters)}
        if sparse and args.mask:
            facts["mask_sha256"] = hashlib.sha256(Path(args.mask).read_bytes()).hexdigest()
        self.log = open_log(args.log_dir or f"{args.output_dir}/logs", run.folder.name)
        run.begin(data.fingerprint | facts, self._sizes(), self._resolved())
        for note in notes + more:
            self.log.info(note)
        if federated:
            self._log_shards(notes)

    def _check_classes(self, found):
        wanted = self.args.num_classes
        if wanted is not None and self.args.classes is None and wanted != found:
            raise UsageError(
                f"--num-classes {wanted}, but {self.args.dataset} has {found} (--classes A:B takes a part)"
            )

    def _make_model(self, n_classes):
        """(model on the device, lines for the log)."""
        a = self.args
        size = {"image_size": a.image_size, "n_classes": n_classes, "dropout": a.dropout, "seed": a.seed}
        model = make_model(a.model, weights=a.weights, pretrained=a.pretrained and not a.init_from, **size)
        notes = init_from(model, a.init_from) if a.init_from else []
        if a.head == "keep" and notes:
            raise UsageError(f"--head keep: {notes[0]}: use --head ridge")
        if a.head == "random":
            new_head(model, a.seed)
        return model.to(self.device), notes

    def _sizes(self):
        count = lambda tensors: sum(p.numel() for p in tensors)  # noqa: E731
        return {
            "total": count(self.parameters.values()),
            "trainable": count(self.trained.values()),
            "backbone": count(self.model.vit.parameters()),
            "head": count(self.model.classifier.parameters()),
            "maskable": {name: list(self.parameters[name].shape) for name in self.maskable},
        }

    def _resolved(self):
        return {
            "device": self.device.type,
            "amp": str(self.amp or torch.float32).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        }

    def _log_shards(self, notes):
        n, classes = sorted(self.examples), (self.counts > 0).sum(1)
        self.log.info(
            f"{len(n)} clients, images a client {n[0]} to {n[-1]} (median {n[len(n) // 2]}), "
            f"classes a client {classes.min()} to {classes.max()}"
        )
        if parallel.is_main():
            with saving(self.run.folder / "shards.json"):
                write_json(self.run.folder / "shards.json", {"counts": self.counts.tolist(), "notes": notes})

    def initial_weights(self):
        """theta before the first round: {name: tensor}, copies. Fits the head first (--head ridge or train)."""
        resumed = (self.run.folder / "checkpoint" / "state.json").exists()
        if self.args.head in ("ridge", "train") and not resumed:
            started = time.perf_counter()
            sums = fit_head(
                self.model,
                self.args.head,
                self.features(self.data.train),
                self.data.train_labels,
                (self.features(self.data.validation), self.data.validation_labels),
            )
            self.run.count(bytes_up=sums * len(self.examples))
            accuracy = self.validate("validation", "val")["val_accuracy"]
            self.log.info(
                f"head fitted ({self.args.head}) on {len(self.data.train)} images in "
                f"{time.perf_counter() - started:.1f} s: validation accuracy {accuracy:.4f}"
            )
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    @property
    def lasting(self):
        """With theta, all that outlives a round: what a checkpoint holds."""
        return {"best": self.best}

    # ---- plan

    def sample_clients(self, round):
        """The round's clients, dealt to processes."""
        self._observed, self._left_out = {}, []
        self._sampled = parallel.Lanes(self._chosen(round))
        return self._sampled

    def _chosen(self, round):
        everyone = len(self.examples)
        some = max(1, int(self.args.participation_rate * everyone + 0.5))
        if some == everyone:
            return list(range(everyone))
        return stream(self.args.seed, "participation", round).choice(everyone, some, replace=False).tolist()

    def rounds_before(self, k, round):
        """In how many earlier rounds client k took part. Counted from the draws of the rounds: not carried."""
        at, counts = getattr(self, "_progress", (0, [0] * len(self.examples)))
        if at > round:
            at, counts = 0, [0] * len(self.examples)
        for r in range(at, round):
            for client in self._chosen(r):
                counts[client] += 1
        self._progress = (round, counts)
        return counts[k]

    def evaluated(self, round):
        """Whether this round ends with an evaluation."""
        return (round + 1) % self.args.eval_every == 0 or round + 1 == self.args.num_rounds

    def saved(self, round):
        """Whether this round ends with a checkpoint."""
        return (round + 1) % self.args.save_every == 0 or round + 1 == self.args.num_rounds

    def stopped(self, round):
        """Whether early stopping ends the run before this round: no better validation accuracy for too long.

        Only ever straight after an evaluation: what was trained is then also reported.
        """
        patience = self.args.early_stopping_patience
        if not patience or self.best.round is None or not self.evaluated(round - 1):
            return False
        return round - 1 - self.best.round >= patience

    def lr(self, round):
        """The clients' learning rate in this round."""
        a = self.args
        return lr_at(round, a.num_rounds, a.lr, a.scheduler, warmup=a.warmup_rounds, min_lr=min(a.min_lr, a.lr))

    # ---- local work

    def load(self, theta):
        """Puts the weights theta into the model."""
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(theta[name])

    def batch_loss(self, pixels, labels):
        """Mean cross-entropy (nats, with label smoothing) of pixels [B, 3, S, S], labels [B]."""
        with amp_context(self.amp, self.device):
            logits = self.model(pixels)  # [B, C]
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.args.label_smoothing)

    def optimizer(self, lr):
        """A new optimiser over what is trained: SGD with momentum, or SparseSGDM under masks."""
        options = {"lr": lr, "momentum": self.args.momentum, "weight_decay": self.args.weight_decay}
        if self.masks is None:
            return torch.optim.SGD(self.trained.values(), fused=True, **options)  # one pass over memory a step
        if self._sparse is None or self._sparse[0] is not self.masks:
            self._sparse = (self.masks, SparseSGDM(list(self.trained.items()), masks=self.masks, **options))
        # finding the kept weights anew for each client would cost as much as some steps
        optimizer = self._sparse[1]
        optimizer.state.clear()
        for group in optimizer.param_groups:
            group["lr"] = lr
        return optimizer

    def train_steps(self, k, optimizer, first, steps, round):
        """Client k's `steps` steps, its batches number `first` and following. Returns the mean loss, a tensor."""
        self.model.train()
        seed_torch(self.args.seed, "dropout", round, k)
        draw = stream(self.args.seed, "augment", round, k)
        total = torch.zeros((), device=self.device)
        for batch in client_rows(self.examples[k], self.args.batch_size, first, steps, self.args.seed, k):
            rows = self.rows[k][batch.to(self.device)]
            pixels = augment(self.data.train[rows], self.args.image_size, draw, self.data.mean, self.data.std)
            total += gradients(self.loss, (pixels, self.data.train_labels[rows]), self.trained, self.amp)
            optimizer.step()
        for p in self.trained.values():
            p.grad = None
        return total / steps

    def local_update(self, theta, k, round):
        """Client k's J steps of SGD with momentum from theta. Returns (theta_k, n_k).

        theta_k are the model's own tensors: valid until the next client.
        """
        self.load(theta)
        first = self.rounds_before(k, round) * self.args.local_steps
        loss = self.train_steps(k, self.optimizer(self.lr(round)), first, self.args.local_steps, round)
        if self.evaluated(round):
            self._observed[k] = loss.item()
        theta_k = {name: p.detach() for name, p in self.parameters.items()}
        return theta_k, (self.examples[k] if self.args.client_weights == "examples" else 1)

    def left_out(self, k, theta_k):
        """True if client k's weights are not finite: it is left out of this round."""
        if finite(theta_k):
            return False
        self._left_out.append(k)
        return True

    def close_round(self, round, sent, indices=0):
        """Counts images, bytes and the clients that were left out.

        Args: sent: weights that a client sends in this round (4 bytes each); indices: bytes that say which they
            are, once per client, up and (the server's mask) down. Down goes the whole model to a client that joins,
            later the weights that rounds change.
        Raises RunFailed when more than half of the round's clients were left out.
        """
        out = sorted(self._sampled.gather({k: 1 for k in self._left_out}))
        if out:
            self.log.warning(f"round {round + 1}: update not finite, left out: client {', '.join(map(str, out))}")
        self._left_out = out
        self._left_out_since += [[round + 1, k] for k in out]
        if 2 * len(out) > len(self._sampled):
            raise RunFailed(
                f"round {round + 1}: updates of {len(out)} of {len(self._sampled)} clients are not finite "
                f"(clients {', '.join(map(str, out))}): lower --lr ({self.args.lr}) or --amp off"
            )
        new = sum(self.rounds_before(k, round) == 0 for k in self._sampled.clients)
        whole = sum(p.numel() for p in self.parameters.values())
        known = len(self._sampled) - new
        self.run.count(
            images=len(self._sampled) * self.args.local_steps * self.args.batch_size,
            bytes_up=len(self._sampled) * 4 * sent + new * indices,
            bytes_down=4 * (new * whole + known * self.changing()) + new * indices,
            left_out_updates=len(out),
        )

    def changing(self):
        """The number of weights that rounds change: those under the masks, or all that are trained."""
        if self.masks is not None:
            return sum(int(mask.sum()) for mask in self.masks.values())
        return sum(p.numel() for p in self.trained.values())

    # ---- evaluation

    @torch.no_grad()
    def features(self, images):
        """The CLS features of uint8 images [n, 3, H, W], without augmentation: float32 [n, D]."""
        self.model.eval()
        with amp_context(self.amp, self.device):
            parts = [self.model.features(self.pixels(part)).float() for part in images.split(self._batch())]
        return torch.cat(parts)  # [n, D]

    def validate(self, split, name):
        """{name_loss, name_accuracy} of the model on a split ("validation", "test"), over all processes."""
        images, labels = getattr(self.data, split), getattr(self.data, f"{split}_labels")
        batches = list(zip(images.split(self._batch()), labels.split(self._batch()), strict=True))
        lanes = parallel.Lanes(range(len(batches)))
        sums = lanes.gather({b: self._statistics(*batches[b]) for b in lanes}).values()
        return {
            f"{name}_loss": math.fsum(s[0] for s in sums) / len(labels),
            f"{name}_accuracy": sum(s[1] for s in sums) / len(labels),
        }

    @torch.no_grad()
    def _statistics(self, images, labels):
        """(summed NLL, number of right answers) of uint8 images [B, 3, H, W], as Python numbers."""
        self.model.eval()
        with amp_context(self.amp, self.device):
            logits = self.model(self.pixels(images)).float()  # [B, C]
        return F.cross_entropy(logits, labels, reduction="sum").item(), (logits.argmax(1) == labels).sum().item()

    def pixels(self, images):
        return prepare(images, self.args.image_size, self.data.mean, self.data.std)

    def _batch(self):
        # Fixed per device: sums over other batches would round differently.
        return 125 if self.device.type == "cpu" else 500

    def report(self, theta, round, lr, **fields):
        """Evaluates theta and writes its line of metrics.jsonl and of the text log; fields go into the line.

        Lists are in the order of `clients`; a client that was left out is not among them, `left_out` names
        (round, client) since the last evaluation.
        """
        losses = self._sampled.gather({k: v for k, v in self._observed.items() if k not in self._left_out})
        fields["clients"], fields["client_train_loss"] = list(losses), list(losses.values())
        if self._left_out_since:
            fields["left_out"], self._left_out_since = self._left_out_since, []
        self.report_loss(theta, round, lr, math.fsum(losses.values()) / len(losses), **fields)

    def report_loss(self, theta, round, lr, train_loss, **fields):
        """`report` for a training loss that is known already."""
        started = time.perf_counter()
        self.load(theta)
        metrics = {"train_loss": train_loss, **self.validate("validation", "val"), "lr": lr}
        self.best.offer(round, metrics["val_accuracy"], theta)
        self.run.log(round, {**metrics, **fields}, time.perf_counter() - started)
        shown = [f"{name} {v:.4f}" for name, v in {**metrics, **fields}.items() if isinstance(v, float)]
        self.log.info(f"round {round + 1}  " + "  ".join(shown), extra={"quiet": True})

    # ---- the end

    def finish(self, theta):
        """Test accuracy of the last and of the best weights, final/, the run's curves."""
        self.load(theta)
        test = self.validate("test", "test")
        results = {"test_accuracy_last": test["test_accuracy"], "test_loss_last": test["test_loss"]}
        if parallel.is_main():
            self.run.write_final(lambda folder: save_pretrained(self.model, folder))
        results |= {"best_round": self.best.round + 1, "val_accuracy_best": self.best.accuracy}
        self.load(theta | self.best.load(self.device))
        results["test_accuracy_best"] = self.validate("test", "test")["test_accuracy"]
        if parallel.is_main():
            last = self.run.metrics()[-1]
            kept = ("bytes_up", "bytes_down", "images", "seconds")
            results |= {"rounds": last["round"], **{key: last[key] for key in kept}}
            name = self.run.folder.name
            with saving(self.run.folder):
                draw_accuracy(self.run.folder, self.run.folder / f"{name}_curves.png")
            self.log.info(
                f"test accuracy {results['test_accuracy_last']:.4f} (weights of the best round, "
                f"{results['best_round']}: {results['test_accuracy_best']:.4f})"
            )
        self.run.finish(results)
