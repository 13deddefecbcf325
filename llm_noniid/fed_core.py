"""What a run of this study is made of: the `Study`, with texts, clients, local work, groups, what is reported.

The round loop is in `train.py`, the model and its evaluation are in `text_model.py`. theta is {"A.<layer>": [r, k],
"B.<layer>": [d, r]}, the LoRA factors of one model. A run has one or more models (`thetas`): one for all clients, one
for each group of clients (--cluster), or one for each client (--algorithm local); `group[k]` says which is client k's.
"""

import math
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from common import parallel
from common.allocator import reuse_large_memory
from common.before.aggregation import NormalizedMean, ServerAdam, ServerMomentum, WeightedMean, effective_steps, finite
from common.before.local import client_optimizer, local_steps
from common.before.scaffold import ControlVariates, option_two
from common.checkpoint import saving, write_json
from common.cli import RunFailed
from common.evaluation import pick_device, resolve_amp
from common.seeding import seed_everything, seed_torch, stream
from common.sharding import class_counts
from llm_noniid import clustering, detectors, diagnostics
from llm_noniid.data import load_texts, training_batches
from llm_noniid.partition import partition, statistics
from llm_noniid.text_model import TextModel

HELD_OUT = 10  # one of so many of a client's texts is not trained on: what its model is judged by
WATCHED = 64  # clients whose updates are compared with each other in a round, at most
ON_DISK = 200  # clients from whose number on control variates are kept in files


class Study:
    """Texts, model and the pieces of a round.

    Attributes: text_model (`TextModel`); rows, held: each client's training texts and those that it is judged by;
    examples: numbers of the former; models: how many thetas; group (int64 [K]); server (None: the plain mean);
    variates (None but for SCAFFOLD).
    """

    def __init__(self, args, run):
        self.args, self.run = args, run
        reuse_large_memory()
        if args.threads:
            torch.set_num_threads(args.threads)
        device = parallel.world().device(pick_device(args.device))
        amp = resolve_amp(args.amp, device)
        seed_everything(args.seed)
        a = args
        self.texts = load_texts(a.dataset, a.data_root, a.cache_dir, a.max_samples, a.seed)
        parts, notes = partition(
            self.texts,
            a.partition,
            a.num_clients,
            a.seed,
            alpha=a.alpha,
            style_criterion=a.style_criterion,
            skew_type=a.skew_type,
            min_samples=max(2, a.min_samples),
        )
        self.text_model = TextModel(a, self.texts, device, amp)
        self._deal(parts)
        n = len(self.rows)
        self.group = np.arange(n) if a.algorithm == "local" else np.zeros(n, dtype=np.int64)
        self.models = n if a.algorithm == "local" else a.num_clusters if a.cluster != "none" else 1
        if a.cluster == "labels":
            counts = class_counts(self.rows, self.texts.labels["train"], len(self.texts.label_names))
            self.group = clustering.cluster_labels(counts, a.num_clusters)
        self.server = self._server_optimizer()
        self.variates = self._control_variates()
        self.seen = self.text_model.evaluated_rows("validation")
        self._left_out_since = []
        self._begin(parts, notes)

    def _deal(self, parts):
        """rows, held: each client's training texts and those that it is judged by; central: one client with all."""
        rows, held = [], []
        for k, part in enumerate(parts):
            order = stream(self.args.seed, "held out", 0, k).permutation(len(part))
            n = max(1, len(part) // HELD_OUT)
            held.append(np.sort(part[order[:n]]))
            rows.append(np.sort(part[order[n:]]))
        self.held = held
        self.rows = [np.sort(np.concatenate(rows))] if self.args.algorithm == "central" else rows
        self.examples = [len(r) for r in self.rows]

    def _server_optimizer(self):
        if self.args.algorithm == "fedavgm":
            return ServerMomentum(self.args.server_lr, self.args.server_momentum)
        if self.args.algorithm == "fedadam":
            return ServerAdam("adam", self.args.server_lr)
        return None

    def _control_variates(self):
        a = self.args
        if a.algorithm != "scaffold":
            return None
        folder = self.run.folder / "control_variates" if len(self.rows) > ON_DISK else None
        weights = self.examples if a.client_weights == "examples" else None
        template = {name: p.detach() for name, p in self.text_model.parameters.items()}
        return ControlVariates(template, len(self.rows), folder, weights)

    def _begin(self, parts, notes):
        model = self.text_model
        facts = {
            **self.texts.fingerprint,
            "clients": len(parts),
            "examples": [len(part) for part in parts],
            "tokenizer_tokens": len(model.tokenizer),
            "cut": {split: part.cut for split, part in model.tokens.items()},
        }
        self.run.begin(facts, model.sizes(), model.resolved())
        for note in [*self.texts.notes, *notes]:
            self.note(note)
        n = sorted(self.examples)
        self.note(f"{len(n)} clients, training texts a client {n[0]} to {n[-1]} (median {n[len(n) // 2]})")
        if parallel.is_main():
            path = self.run.folder / "partition.json"
            with saving(path):
                write_json(path, statistics(self.texts, model.tokens, parts, self.args.seed))

    def note(self, text):
        """A line on stderr, by the main process."""
        if parallel.is_main():
            tqdm.write(text, file=sys.stderr)

    # ---- state

    def initial_weights(self):
        """The models before the first round: a list of equal thetas."""
        return [_copied(self.text_model.parameters) for _ in range(self.models)]

    @staticmethod
    def packed(thetas):
        """The models as one {name: tensor}, for a checkpoint."""
        return {f"{g}/{name}": t for g, theta in enumerate(thetas) for name, t in theta.items()}

    def unpacked(self, state):
        """The list of models of `packed`."""
        return [{name: state[f"{g}/{name}"] for name in self.text_model.parameters} for g in range(self.models)]

    @property
    def lasting(self):
        """With the models, all that outlives a round: what a checkpoint holds."""
        found = {"groups": SimpleNamespace(state_dict=self._groups, load_state_dict=self._load_groups)}
        if self.server:
            found["server"] = self.server
        return found | (self.variates.lasting if self.variates else {})

    def _groups(self):
        return {"group": torch.from_numpy(self.group)}

    def _load_groups(self, state):
        self.group = state["group"].cpu().numpy()

    # ---- a round

    def evaluated(self, round):
        """Whether this round ends with an evaluation."""
        return (round + 1) % self.args.eval_every == 0 or round + 1 == self.args.num_rounds

    def _groups_now(self, round):
        return self.args.cluster == "updates" and round + 1 == self.args.cluster_round

    def sample_clients(self, round):
        """The round's clients, dealt to processes."""
        a, everyone = self.args, len(self.rows)
        some = max(1, int(a.participation_rate * everyone + 0.5)) if a.algorithm != "central" else 1
        chosen = list(range(everyone))
        if some < everyone:
            chosen = stream(a.seed, "participation", round).choice(everyone, some, replace=False).tolist()
        self._sampled = parallel.Lanes(chosen, sticky=self.variates is not None)
        self._tokens, self._left_out, self._done, self._watch, self._hidden = {}, [], {}, {}, {}
        # Several models pull apart by intention, and one client has nobody to pull apart from.
        self._compared = self.evaluated(round) and self.models == 1 and a.algorithm != "central"
        self._watched = set(chosen if self._groups_now(round) or self._compared else ())
        if len(self._watched) > WATCHED and not self._groups_now(round):  # drawn: by number, clients are sorted by skew
            self._watched = set(stream(a.seed, "watched", round).choice(chosen, WATCHED, replace=False).tolist())
        return self._sampled

    def means(self, thetas):
        """An accumulator for each model: the weighted mean, or FedNova's."""
        kind = NormalizedMean if self.args.algorithm == "fednova" else WeightedMean
        return [kind(theta, self._sampled) for theta in thetas]

    def batches(self, k, round):
        """Client k's batches of the round: rows of the training texts. Central: as many steps as all clients have."""
        a = self.args
        steps = a.local_steps or None
        if steps and a.algorithm == "central":
            steps *= max(1, int(a.participation_rate * a.num_clients + 0.5))
        found = training_batches(self.examples[k], a.batch_size, a.local_epochs, a.seed, round, k, steps)
        return [self.rows[k][rows] for rows in found]

    def local_update(self, theta, k, round):
        """Client k's steps from theta. Returns (theta_k, n_k, result: `common.before.local.LocalResult`).

        theta_k are the model's own tensors: valid until the next client.
        """
        a, model = self.args, self.text_model
        batches = self.batches(k, round)
        self._tokens[k] = int(model.scored("train", np.concatenate(batches)).sum())
        model.load(theta)
        model.model.train()
        seed_torch(a.seed, "dropout", round, k)
        done = local_steps(
            model.loss,
            (model.batch("train", rows) for rows in batches),
            model.parameters,
            client_optimizer(a.client_optimizer, model.parameters, a.learning_rate, weight_decay=a.weight_decay),
            amp=model.amp,
            correction=self.variates.correction(k) if self.variates else None,
            mu=a.mu if a.algorithm == "fedprox" else 0.0,
            anchors=theta,
            max_norm=a.max_grad_norm,
            record=self.variates is not None,
        )
        theta_k = {name: p.detach() for name, p in model.parameters.items()}
        return theta_k, self._weight(k), done

    def _weight(self, k):
        return self.examples[k] if self.args.client_weights == "examples" else 1

    def control_variate(self, theta, theta_k, k, done):
        """Client k's new control variate: the mean of its raw gradients, or the paper's option II."""
        a = self.args
        if a.scaffold_option == "mean_gradient":
            return done.mean_gradient
        correction = self.variates.correction(k)
        return option_two(correction, theta, theta_k, done.steps, a.client_optimizer, a.learning_rate)

    def effective_steps(self, done):
        """FedNova's a of a client's local work."""
        a = self.args
        momentum = 0.9 if a.client_optimizer == "sgdm" else 0.0
        return effective_steps(done.steps, a.client_optimizer, momentum, a.learning_rate)

    def left_out(self, k, theta_k, done):
        """True if client k's weights or its mean gradient are not finite: it is left out of this round."""
        if finite(theta_k) and finite(done.mean_gradient or {}):
            return False
        self._left_out.append(k)
        return True

    def observe(self, k, theta_k, done):
        """Keeps what the round's figures need of client k; its losses stay on the device until `report` asks."""
        self._done[k] = (done.loss, done.gradient_norms)
        if k in self._watched:
            self._watch[k] = {name: t.to("cpu", copy=True) for name, t in theta_k.items()}
            if self._compared and self.args.probe_samples:
                self._hidden[k] = self._probe()

    def close_round(self, round):
        """Counts tokens and bytes; names the clients that were left out.

        Raises RunFailed when all were: then there is no mean.
        """
        told = self._sampled.gather({k: (tokens, k in self._left_out) for k, tokens in self._tokens.items()})
        self._left_out = out = [k for k, (_, left_out) in told.items() if left_out]
        self._left_out_since += [[round + 1, k] for k in out]
        if out:
            self.note(f"warning: round {round + 1}: update not finite, left out: client {', '.join(map(str, out))}")
        if len(out) == len(self._sampled):
            raise RunFailed(
                f"round {round + 1}: the updates of all {len(out)} clients are not finite: lower --learning-rate "
                f"({self.args.learning_rate:g}) or --amp off"
            )
        sent = self.text_model.sizes()["trainable"] * (2 if self.variates else 1)  # numbers each way, of a client
        alone = self.args.algorithm in ("local", "central")
        self.run.count(
            tokens=sum(tokens for tokens, _ in told.values()),
            bytes_up=0 if alone else 4 * sent * len(self._sampled),
            bytes_down=0 if alone else 4 * sent * len(self._sampled),
            left_out_updates=len(out),
        )

    def server_update(self, thetas, means):
        """The models after the round: each group's mean, by the server's optimiser if there is one."""
        took_part = {self.group[k] for k in self._sampled.clients if k not in self._left_out}
        step = self.server.step if self.server else None
        return [
            theta if g not in took_part else step(theta, mean.delta()) if step else mean.result()
            for g, (theta, mean) in enumerate(zip(thetas, means, strict=True))
        ]

    def regroup(self, before, thetas, round):
        """--cluster updates: after its round, groups by the cosines of the updates; each begins with the mean.

        Clients that did not take part join the largest group.
        """
        if not self._groups_now(round):
            return thetas
        watch = self._sampled.gather(self._watch)
        gram = diagnostics.update_gram(before[0], watch.values(), self.text_model.lora.scale)
        found = clustering.cluster_updates(diagnostics.cosine_matrix(gram), min(self.args.num_clusters, len(watch)))
        self.group = np.full(len(self.rows), np.bincount(found).argmax())
        self.group[list(watch)] = found
        self.note(f"groups after round {round + 1}: {self.group.tolist()}")
        if len(watch) < len(self.rows):
            absent = len(self.rows) - len(watch)
            self.note(
                f"warning: {absent} of {len(self.rows)} clients had no update to go by: they are in the largest group"
            )
        return [_copied(thetas[0]) for _ in thetas]

    # ---- what is reported

    def quality(self, thetas, split, rows, name):
        """`TextModel.quality` with each model weighted by its clients' texts, as a random client would see them."""
        weights = np.bincount(self.group, self.examples, len(thetas))
        return self.text_model.quality(thetas, weights, split, rows, name)

    def _probe(self):
        return self.text_model.probe("validation", self.seen[: self.args.probe_samples])

    def _update_figures(self, before, theta):
        """How far the clients' updates of the round pull apart, where updates are compared."""
        if not self._compared:
            return {}
        watch, hidden = self._sampled.gather(self._watch), self._sampled.gather(self._hidden)
        if len(watch) < 2:
            return {}
        figures = {"compared": list(watch)} | diagnostics.round_figures(
            before, theta, watch.values(), [self._weight(k) for k in watch], self.text_model.lora.scale
        )
        if hidden:
            self.text_model.load(theta)
            figures |= diagnostics.cka_figures(self._probe(), hidden.values())
        return figures

    def report(self, before, thetas, round):
        """Evaluates, looks for alarms and writes the round's line. Returns the alarm that ends the run, or None."""
        started = time.perf_counter()
        done = self._sampled.gather({k: (loss.item(), norms.tolist()) for k, (loss, norms) in self._done.items()})
        losses, norms = [v[0] for v in done.values()], [v[1] for v in done.values()]
        train_loss = math.fsum(losses) / len(losses)
        metrics = self.quality(thetas, "validation", self.seen, "val")
        owners = [0] * len(self.held) if self.args.algorithm == "central" else self.group
        row = {
            "train_loss": train_loss,
            **metrics,
            **self.text_model.clients_quality(thetas, owners, self.held),
            "clients": list(done),
            "client_train_loss": losses,
            "gradient_norm_variance": diagnostics.gradient_norm_variance(norms),
            "generalization_gap": diagnostics.generalization_gap(train_loss, metrics["val_loss"]),
            **self._update_figures(before[0], thetas[0]),
        }
        if self._left_out_since:
            row["left_out"], self._left_out_since = self._left_out_since, []
        if self.models > 1:
            row["group"] = self.group.tolist()
        alarms, ending = parallel.broadcast(self._alarms(row, round) if parallel.is_main() else None)
        if alarms:
            row["alarms"] = [alarm.row() for alarm in alarms]
        for alarm in alarms:
            self.note(f"alarm: {alarm.message}")
        self.run.log(round, row, time.perf_counter() - started)
        return ending

    def _alarms(self, row, round):
        """(alarms since the last evaluation, the one of them that ends the run). Detectors look only back."""
        rows = self.run.metrics() if (self.run.folder / "metrics.jsonl").exists() else []
        alarms = detectors.run_detectors(detectors.curves_of([*rows, {"round": round + 1, **row}]))
        new = [alarm for alarm in alarms if not rows or alarm.round > rows[-1]["round"]]
        return new, detectors.stops(new, self.args.stop_on)

    # ---- the end

    def ended(self):
        """The alarm that ended the run whose checkpoint was restored, where the end itself was not reached; or None."""
        if not self.run.start_round:
            return None
        alarms = detectors.run_detectors(detectors.curves_of(self.run.metrics())) if parallel.is_main() else []
        return parallel.broadcast(detectors.stops(alarms, self.args.stop_on))

    def finish(self, thetas, ending):
        """final/ (peft adapters), test metrics, results."""
        quality = self.quality(thetas, "test", self.text_model.evaluated_rows("test"), "test")
        self.run.write_final(lambda folder: self.text_model.write(folder, thetas, self.run.folder / "base"))
        if self.variates:
            self.variates.delete_files()
        if not parallel.is_main():
            return
        lines = self.run.metrics()
        last = lines[-1]
        names = ("val_loss", "val_ppl", "val_bits_per_byte", "mean_client_val_loss", "worst_client_val_loss")
        results = {name: last[name] for name in names} | quality
        results |= {key: last[key] for key in ("bytes_up", "bytes_down", "tokens", "seconds")}
        results["rounds"] = last["round"]
        reached = [float(line["val_loss"]) for line in lines]  # "nan" and "inf" are text there
        results["best_val_loss"] = min((loss for loss in reached if math.isfinite(loss)), default=math.nan)
        results["alarms"] = [alarm for line in lines for alarm in line.get("alarms", [])]
        results["stopped"] = ending.row() if ending else None
        print(f"val_ppl {float(results['val_ppl']):.2f}  test_ppl {results['test_ppl']:.2f}")
        self.run.finish(results)


def _copied(theta):
    """Tensors of its own for each model: a checkpoint takes none that share their memory."""
    return {name: t.detach().clone() for name, t in theta.items()}
