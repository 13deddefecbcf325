"""What a run of this study is made of: the `Study`, with texts, clients, model, local work, evaluation, diagnostics.

The round loop is in `train.py`. theta is {"A.<layer>": [r, k], "B.<layer>": [d, r]}, the LoRA factors of one model. A
run has one or more models (`thetas`): one for all clients, one for each group of clients (--cluster), or one for each
client (--algorithm local); `group[k]` says which is client k's.
"""

import math
import sys
import time

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from common import parallel
from common.adapter_files import write_adapter
from common.aggregation import NormalizedMean, ServerAdam, ServerMomentum, WeightedMean, effective_steps, finite
from common.allocator import reuse_large_memory
from common.checkpoint import saving, write_json
from common.cli import RunFailed
from common.compiling import checked_compile
from common.evaluation import amp_context, bits_per_byte, perplexity, pick_device, resolve_amp
from common.local import client_optimizer, local_steps
from common.lora import LoraModel
from common.scaffold import ControlVariates, option_two
from common.seeding import seed_everything, seed_torch, stream
from common.sharding import class_counts
from llm_noniid import clustering, detectors, diagnostics
from llm_noniid.data import IGNORE, encode, evaluation_batches, load_texts, training_batches
from llm_noniid.models import find_tokenizer, load_base, quiet
from llm_noniid.partition import partition, statistics

HELD_OUT = 10  # one of so many of a client's texts is not trained on: what its model is judged by
WATCHED = 64  # clients whose updates are compared with each other in a round, at most
EVAL_BATCH = 16  # fixed: sums over other batches would round differently
ON_DISK = 200  # clients from whose number on control variates are kept in files


class Study:
    """Texts, model and the pieces of a round. Attributes: group (int64 [K]), variates (None but for SCAFFOLD)."""

    def __init__(self, args, run):
        self.args, self.run = args, run
        reuse_large_memory()
        if args.threads:
            torch.set_num_threads(args.threads)
        self.device = parallel.world().device(pick_device(args.device))
        self.amp = resolve_amp(args.amp, self.device)
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
        self.tokenizer = find_tokenizer(a.model, self.texts, a.tokenizer, a.data_root, a.cache_dir)
        self.tokens = encode(self.texts, self.tokenizer, a.max_length, a.cache_dir)
        base = load_base(a.model, self.tokenizer, a.max_length, a.seed)
        self.lora = LoraModel(base, a.lora_r, a.lora_alpha, a.lora_dropout, a.target_modules, seed=a.seed)
        self.model = self.lora.model.to(self.device)
        self._deal(parts)
        self.parameters = self.lora.trainable()
        self.loss = checked_compile(self.batch_loss, self.parameters) if a.compile else self.batch_loss
        n = len(self.rows)
        self.group = np.arange(n) if a.algorithm == "local" else np.zeros(n, dtype=np.int64)
        self.models = n if a.algorithm == "local" else a.num_clusters if a.cluster != "none" else 1
        if a.cluster == "labels":
            labels = self.texts.labels["train"]
            self._regroup(clustering.cluster_labels(self._histograms(labels), a.num_clusters))
        self.server = self._server_optimizer()
        self.variates = self._control_variates()
        self.seen = self._eval_rows("validation")
        self._left_out, self._left_out_since = [], []
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

    def _histograms(self, labels):
        return class_counts(self.rows, labels, len(self.texts.label_names))

    def _control_variates(self):
        a = self.args
        if a.algorithm != "scaffold":
            return None
        folder = self.run.folder / "control_variates" if len(self.rows) > ON_DISK else None
        weights = self.examples if a.client_weights == "examples" else None
        template = {name: p.detach() for name, p in self.parameters.items()}
        return ControlVariates(template, len(self.rows), folder, weights)

    def _server_optimizer(self):
        if self.args.algorithm == "fedavgm":
            return ServerMomentum(self.args.server_lr, self.args.server_momentum)
        if self.args.algorithm == "fedadam":
            return ServerAdam("adam", self.args.server_lr)
        return None

    def _begin(self, parts, notes):
        count = lambda tensors: sum(t.numel() for t in tensors)  # noqa: E731
        facts = {
            **self.texts.fingerprint,
            "clients": len(parts),
            "examples": [len(part) for part in parts],
            "tokenizer_tokens": len(self.tokenizer),
            "cut": {split: part.cut for split, part in self.tokens.items()},
        }
        sizes = {"total": count(self.model.parameters()), "trainable": count(self.parameters.values())}
        resolved = {
            "device": self.device.type,
            "amp": str(self.amp or torch.float32).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        }
        self.run.begin(facts, sizes, resolved)
        for note in [*self.texts.notes, *notes]:
            self.note(note)
        n = sorted(self.examples)
        self.note(f"{len(n)} clients, training texts a client {n[0]} to {n[-1]} (median {n[len(n) // 2]})")
        if parallel.is_main():
            path = self.run.folder / "partition.json"
            with saving(path):
                write_json(path, statistics(self.texts, self.tokens, parts, self.args.seed))

    def note(self, text):
        """A line on stderr, by the main process."""
        if parallel.is_main():
            tqdm.write(text, file=sys.stderr)

    # ---- state

    def initial_weights(self):
        """The models before the first round: a list of equal thetas."""
        return [_copied(self.parameters) for _ in range(self.models)]

    @staticmethod
    def packed(thetas):
        """The models as one {name: tensor}, for a checkpoint."""
        return {f"{g}/{name}": t for g, theta in enumerate(thetas) for name, t in theta.items()}

    def unpacked(self, state):
        """The list of models of `packed`."""
        thetas = [{} for _ in range(self.models)]
        for name, t in state.items():
            g, name = name.split("/", 1)
            thetas[int(g)][name] = t
        return thetas

    @property
    def lasting(self):
        """With the models, all that outlives a round: what a checkpoint holds."""
        found = {"groups": _Groups(self)}
        if self.server:
            found["server"] = self.server
        return found | (self.variates.lasting if self.variates else {})

    def _regroup(self, labels):
        self.group = np.asarray(labels, dtype=np.int64)

    # ---- a round

    def sample_clients(self, round):
        """The round's clients, dealt to processes."""
        a, everyone = self.args, len(self.rows)
        some = max(1, int(a.participation_rate * everyone + 0.5)) if a.algorithm != "central" else 1
        chosen = list(range(everyone))
        if some < everyone:
            chosen = stream(a.seed, "participation", round).choice(everyone, some, replace=False).tolist()
        self._left_out, self._results, self._watch, self._reference = [], {}, {}, {}
        self._sampled = parallel.Lanes(chosen, sticky=self.variates is not None)
        watched = everyone if self._groups_now(round) else WATCHED if self.evaluated(round) else 0
        self._watched = set(sorted(chosen)[:watched])
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
        """Client k's steps from theta. Returns (theta_k, n_k, result: `common.local.LocalResult`).

        theta_k are the model's own tensors: valid until the next client.
        """
        a = self.args
        self.load(theta)
        self.model.train()
        seed_torch(a.seed, "dropout", round, k)
        correction = self.variates.correction(k) if self.variates else None
        done = local_steps(
            self.loss,
            (self._batch("train", rows) for rows in self.batches(k, round)),
            self.parameters,
            client_optimizer(a.client_optimizer, self.parameters, a.learning_rate, weight_decay=a.weight_decay),
            amp=self.amp,
            correction=correction,
            mu=a.mu if a.algorithm == "fedprox" else 0.0,
            anchors=theta,
            max_norm=a.max_grad_norm,
            record=self.variates is not None,
        )
        theta_k = {name: p.detach() for name, p in self.parameters.items()}
        return theta_k, (self.examples[k] if a.client_weights == "examples" else 1), done

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
        """Keeps what the round's figures need of client k."""
        self._results[k] = (done.loss.item(), done.gradient_norms.cpu().tolist())
        if k in self._watched:
            self._watch[k] = {name: t.to("cpu", copy=True) for name, t in theta_k.items()}
            if self.args.probe_samples:
                self._reference[k] = self.probe()

    def close_round(self, round):
        """Counts tokens and bytes; names the clients that were left out.

        Raises RunFailed when all were: then there is no mean.
        """
        out = sorted(self._sampled.gather({k: 1 for k in self._left_out}))
        self._left_out = out
        self._left_out_since += [[round + 1, k] for k in out]
        if out:
            self.note(f"warning: round {round + 1}: update not finite, left out: client {', '.join(map(str, out))}")
        if len(out) == len(self._sampled):
            raise RunFailed(
                f"round {round + 1}: the updates of all {len(out)} clients are not finite: lower --learning-rate "
                f"({self.args.learning_rate:g}) or --amp off"
            )
        numbers = sum(p.numel() for p in self.parameters.values()) * (2 if self.variates else 1)
        lengths = self.tokens["train"].lengths()
        alone = self.args.algorithm in ("local", "central")
        batches = [rows for k in self._sampled.clients for rows in self.batches(k, round)]
        self.run.count(
            tokens=sum(int((lengths[rows] - 1).sum()) for rows in batches),
            bytes_up=0 if alone else 4 * numbers * len(self._sampled),
            bytes_down=0 if alone else 4 * numbers * len(self._sampled),
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

    # ---- groups

    def _groups_now(self, round):
        return self.args.cluster == "updates" and round + 1 == self.args.cluster_round

    def regroup(self, before, thetas, round):
        """--cluster updates: after its round, groups by the cosines of the updates; each begins with the mean.

        Clients that did not take part join the largest group.
        """
        if not self._groups_now(round):
            return thetas
        watch = self._sampled.gather(self._watch)
        gram = diagnostics.update_gram(self._cpu(before[0]), watch.values(), self.lora.scale)
        found = clustering.cluster_updates(diagnostics.cosine_matrix(gram), min(self.args.num_clusters, len(watch)))
        labels = np.full(len(self.rows), np.bincount(found).argmax())
        labels[list(watch)] = found
        self._regroup(labels)
        self.note(f"groups after round {round + 1}: {labels.tolist()}")
        return [_copied(thetas[0]) for _ in thetas]

    # ---- evaluation

    def evaluated(self, round):
        """Whether this round ends with an evaluation."""
        return (round + 1) % self.args.eval_every == 0 or round + 1 == self.args.num_rounds

    @torch.no_grad()
    def load(self, theta):
        """Puts a theta into the model."""
        for name, p in self.parameters.items():
            p.copy_(theta[name])

    def _batch(self, split, rows):
        return {name: t.to(self.device, non_blocking=True) for name, t in self.tokens[split].batch(rows).items()}

    def _nll(self, batch):
        """Negative log-likelihoods [B, L - 1] in nats, 0 where no label is scored."""
        with amp_context(self.amp, self.device):
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logits, labels = logits[:, :-1].float(), batch["labels"][:, 1:]  # [B, L - 1, V], [B, L - 1]
        nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
        return nll.view(labels.shape)  # [B, L - 1]

    def batch_loss(self, batch):
        """Mean negative log-likelihood of the scored tokens of a batch, in nats."""
        return self._nll(batch).sum() / (batch["labels"][:, 1:] != IGNORE).sum()

    @torch.no_grad()
    def sums(self, split, rows, share=True):
        """NLL [n] of texts of a split under the model as it is loaded, fp64; share: processes share the batches."""
        self.model.eval()
        rows = np.asarray(rows)
        cut = evaluation_batches(self.tokens[split].lengths()[rows], EVAL_BATCH)
        lanes = parallel.Lanes(range(len(cut))) if share else range(len(cut))
        found = {i: self._nll(self._batch(split, rows[cut[i]])).double().sum(1).cpu().numpy() for i in lanes}
        found = lanes.gather(found) if share else found
        nll = np.zeros(len(rows))
        for i, part in found.items():
            nll[cut[i]] = part
        return nll

    def _eval_rows(self, split):
        """The texts of a split that are evaluated: all, or --eval-samples drawn once."""
        n, wanted = len(self.tokens[split]), self.args.eval_samples
        if not wanted or wanted >= n:
            return np.arange(n)
        return np.sort(stream(self.args.seed, f"evaluated {split}").choice(n, wanted, replace=False))

    def _scored(self, split, rows):
        encoded = self.tokens[split]
        return encoded.lengths()[rows] - 1, encoded.byte_lengths[rows]

    def quality(self, thetas, split, rows, name):
        """{name_loss, name_ppl, name_bits_per_byte, name_topic_loss [C]} over texts of a split.

        With several models: sums over models, each weighted by its clients' texts, as a random client would see them.
        """
        tokens, n_bytes = self._scored(split, rows)
        labels = self.texts.labels[split][rows]
        weights = [sum(n for k, n in enumerate(self.examples) if self.group[k] == g) for g in range(len(thetas))]
        nll = np.zeros(len(rows))
        for theta, weight in zip(thetas, weights, strict=True):
            if weight:
                self.load(theta)
                nll += weight / sum(weights) * self.sums(split, rows)
        topics = [labels == c for c in range(len(self.texts.label_names))]
        return {
            f"{name}_loss": math.fsum(nll) / int(tokens.sum()),
            f"{name}_ppl": perplexity(math.fsum(nll), int(tokens.sum())),
            f"{name}_bits_per_byte": bits_per_byte(math.fsum(nll), int(n_bytes.sum())),
            f"{name}_topic_loss": [math.fsum(nll[t]) / int(tokens[t].sum()) if t.any() else None for t in topics],
        }

    def clients_quality(self, thetas):
        """{client_val_loss [K], worst_client_val_loss, mean_client_val_loss}: of each client's own held-out texts,
        under the model that serves it."""
        owners = [0] * len(self.held) if self.args.algorithm == "central" else self.group.tolist()
        losses = [None] * len(self.held)
        for g, theta in enumerate(thetas):
            clients = [k for k, owner in enumerate(owners) if owner == g]
            if not clients:
                continue
            self.load(theta)
            rows = np.concatenate([self.held[k] for k in clients])
            nll, tokens = self.sums("train", rows), self._scored("train", rows)[0]
            at = np.cumsum([0, *(len(self.held[k]) for k in clients)])
            for k, i, j in zip(clients, at, at[1:], strict=False):
                losses[k] = math.fsum(nll[i:j]) / int(tokens[i:j].sum())
        return {
            "client_val_loss": losses,
            "worst_client_val_loss": float(np.max(losses)),  # nan where one is
            "mean_client_val_loss": sum(losses) / len(losses),
        }

    @torch.no_grad()
    def probe(self):
        """Hidden states of the last layer on the probe texts, the mean over each text's tokens: [n, D]."""
        self.model.eval()
        rows, found = self.seen[: self.args.probe_samples], []
        for start in range(0, len(rows), EVAL_BATCH):
            batch = self._batch("validation", rows[start : start + EVAL_BATCH])
            mask = batch["attention_mask"]
            with amp_context(self.amp, self.device):
                out = self.model(input_ids=batch["input_ids"], attention_mask=mask, output_hidden_states=True)
            states = out.hidden_states[-1].float() * mask[..., None]  # [B, L, D]
            found.append((states.sum(1) / mask.sum(1, keepdim=True)).cpu())  # [B, D]
        return torch.cat(found)

    @staticmethod
    def _cpu(theta):
        return {name: t.cpu() for name, t in theta.items()}

    def _update_figures(self, before, thetas):
        """The round's figures of the clients' updates, in Delta W, within the first model where there are several."""
        watch = self._sampled.gather(self._watch)
        hidden = self._sampled.gather(self._reference)
        if self.models > 1 or self.args.algorithm == "central" or not watch:
            return {}
        weights = [self.examples[k] if self.args.client_weights == "examples" else 1 for k in watch]
        gram = diagnostics.update_gram(self._cpu(before[0]), watch.values(), self.lora.scale)
        figures = diagnostics.update_figures(gram, weights)
        figures["update_cosines"] = np.round(diagnostics.cosine_matrix(gram), 4).tolist()
        figures["weight_cosine_drift"] = diagnostics.weight_cosine_drift(self._cpu(thetas[0]), watch.values())
        if hidden:
            self.load(thetas[0])
            own = self.probe()
            found = [diagnostics.linear_cka(own, states) for states in hidden.values()]
            figures["client_cka"] = found
            known = [value for value in found if value is not None]
            figures["mean_cka"] = sum(known) / len(known) if known else None
        return figures

    def report(self, before, thetas, round):
        """Evaluates, looks for alarms and writes the round's line. Returns the alarm that ends the run, or None."""
        started = time.perf_counter()
        results = self._sampled.gather({k: v for k, v in self._results.items() if k not in self._left_out})
        losses, norms = [v[0] for v in results.values()], [v[1] for v in results.values()]
        train_loss = math.fsum(losses) / len(losses)
        metrics = self.quality(thetas, "validation", self.seen, "val")
        row = {
            "train_loss": train_loss,
            **metrics,
            **self.clients_quality(thetas),
            "clients": list(results),
            "client_train_loss": losses,
            "gradient_norm_variance": diagnostics.gradient_norm_variance(norms),
            "generalization_gap": diagnostics.generalization_gap(train_loss, metrics["val_loss"]),
            **self._update_figures(before, thetas),
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
        """(alarms that the curve to this round has and the one before it had not, the one that ends the run)."""
        rows = self.run.metrics() if (self.run.folder / "metrics.jsonl").exists() else []
        known = detectors.run_detectors(detectors.curves_of(rows)) if rows else []
        alarms = detectors.run_detectors(detectors.curves_of([*rows, {"round": round + 1, **row}]))
        new = [alarm for alarm in alarms if alarm not in known]
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
        quality = self.quality(thetas, "test", self._eval_rows("test"), "test")
        self.run.write_final(lambda folder: self._write_final(folder, thetas))
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

    def _write_final(self, folder, thetas):
        name = self.args.model
        if name == "tiny":
            from copy import deepcopy

            with quiet():
                deepcopy(self.lora.model).unload().save_pretrained(self.run.folder / "base")
            self.tokenizer.save_pretrained(self.run.folder / "base")
        folder.mkdir(parents=True, exist_ok=True)
        for g, theta in enumerate(thetas):
            factors = {layer: (theta[f"A.{layer}"], theta[f"B.{layer}"]) for layer in self.lora.layers}
            write_adapter(
                folder / (f"group_{g}" if len(thetas) > 1 else "adapter"),
                factors,
                {},
                alpha=self.args.lora_alpha,
                target_modules=list(self.lora.targets),
                modules_to_save=[],
                base_model=str(self.run.folder / "base") if name == "tiny" else name,
                fan_in_fan_out=self.lora.fan_in_fan_out,
                dropout=self.args.lora_dropout,
                task_type="CAUSAL_LM",
            )


def _copied(theta):
    """Tensors of its own for each model: a checkpoint takes none that share their memory."""
    return {name: t.detach().clone() for name, t in theta.items()}


class _Groups:
    """Which model serves which client, as a tensor for a checkpoint."""

    def __init__(self, study):
        self.study = study

    def state_dict(self):
        return {"group": torch.from_numpy(self.study.group)}

    def load_state_dict(self, state):
        if state:
            self.study._regroup(state["group"].cpu().numpy())
