"""What is measured of a run's models, and what a run leaves behind: functions of `fed_core.Study`.

A loss is the summed NLL of a text over its number of tokens (nats a token), whatever the batches.
"""

import math

import numpy as np
import torch

from common import parallel, rounds
from common.checkpoint import saving, write_json
from common.curves import draw_curve
from common.evaluation import bits_per_byte, perplexity
from mamba_fl.data import inputs_and_labels
from mamba_fl.ssm_config import save_pretrained

WATCHED = ("in_proj.weight", "A_log", "D", "dt_bias")  # the state-space parameters of a layer


def evaluate(study, theta, t, row):
    """{field: value} of theta [n] after t rounds on the validation text, and train_ppl of the row's train_loss; offers
    theta as the best."""
    study.weights.load(theta)
    metrics = {
        "steps": study.ends[t],
        **validate(study, study.data.validation[: study.args.val_sequences or None], "val"),
        "generated": generate(study),
    }
    if "train_loss" in row:
        metrics["train_ppl"] = perplexity(row["train_loss"], 1)
    if study.parts.kept(t - 1) is None:  # else some of theta is older than the rest
        study.best.offer(t, metrics["val_loss"], theta)
    return metrics


def validate(study, blocks, split):
    """{split_loss, split_ppl, split_bits_per_byte} of the model on blocks [n, T + 1], over all processes."""
    mine = [statistics(study, batch) for batch in parallel.my_share(blocks.split(study.eval_batch))]
    sums = [values for part in parallel.all_gather(mine) for values in part]
    nll, tokens, size = (math.fsum(column) for column in zip(*sums, strict=True))
    metrics = {"loss": nll / tokens, "ppl": perplexity(nll, tokens), "bits_per_byte": bits_per_byte(nll, size)}
    return {f"{split}_{name}": value for name, value in metrics.items()}


@torch.no_grad()
def statistics(study, blocks):
    """(summed NLL, tokens, bytes) of blocks [n, T + 1], as Python numbers."""
    nll, tokens, size = [], 0, 0
    for part in blocks.to(study.run.device).split(study.eval_batch):
        inputs, labels = inputs_and_labels(part)
        with study.autocast():
            nll.append(study.model.nll(inputs, labels).item())
        scored = labels[labels >= 0]
        tokens += len(scored)
        size += study.data.token_bytes[scored.cpu()].sum().item()
    return math.fsum(nll), tokens, size


def generate(study):
    """The greedy continuation of --prompt by 100 tokens, on the main process; None elsewhere or when off."""
    if not study.args.prompt or not parallel.is_main():
        return None
    ids = study.data.tokenizer.encode(study.args.prompt, add_special_tokens=False)
    out = study.model.generate(torch.tensor([ids], device=study.run.device), 100)
    return study.data.tokenizer.decode(out[0].tolist())


def state_space(study, vector):
    """{layers.i.NAME: view of `vector` [n]} of the state-space parameters."""
    return {
        name.removeprefix("backbone.").replace(".mixer.", ".").removesuffix(".weight"): tensor
        for name, tensor in study.weights.named(vector).items()
        if ".mixer." in name and name.endswith(WATCHED)
    }


def save_deltas(study, who, before, after, t):
    """Stores what `state_space` gives after round t, and its change from before."""
    for kind, tensors in (("params", after), ("deltas", {name: after[name] - old for name, old in before.items()})):
        path = study.run.folder / who / kind / f"step_{t + 1:06d}.npz"
        with saving(path, path):
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, **{name: tensor.cpu().numpy() for name, tensor in tensors.items()})


class ClientDeltas(rounds.ToMain):
    """--save-deltas: what clients change in the rounds after which there is an evaluation; of a group that is averaged
    less often, since its last average."""

    def __init__(self, study):
        super().__init__(lambda k, after: save_deltas(study, f"client_{k}", self._before, after, self._t))
        self._study = study

    def open_round(self, clients, theta):
        self._before, self._t = state_space(self._study, theta), clients.number

    def accept(self, clients, theta_k):
        if self._study.run.due(self._t + 1):
            self.leave(state_space(self._study, theta_k))


def finish(study, theta):
    """Test and validation perplexity on all text, of the last and the best weights; final/, the history, curve.png."""
    run, best = study.run, study.best
    run.note("evaluating on all test and validation text")
    study.weights.load(theta)
    test_ppl = validate(study, study.data.test, "test")["test_ppl"]
    results = {"best_round": best.round, "best_val_ppl": perplexity(best.loss, 1)}
    results |= {"test_ppl_best": test_ppl, "test_ppl_last": test_ppl}
    results["final_val_ppl"] = validate(study, study.data.validation, "val")["val_ppl"]
    if best.round < run.total:
        study.weights.load(best.theta)
        results["test_ppl_best"] = validate(study, study.data.test, "test")["test_ppl"]
        if study.args.final == "last":
            study.weights.load(theta)
    if parallel.is_main():
        lines = run.metrics()
        results.update(tokens=lines[-1]["tokens"], seconds=lines[-1]["seconds"])
        results["final_round"] = best.round if study.args.final == "best" else lines[-1]["round"]
        run.write_final(lambda folder: save_pretrained(study.model, study.data.tokenizer, folder))
        with saving(run.folder):
            write_json(run.folder / "training_history.json", training_history(run.command, lines))
            draw_curve(run.folder)
        print(
            f"test perplexity {test_ppl:.2f} (weights of round {best.round}, the best: {results['test_ppl_best']:.2f})"
        )
    run.finish(results)


def training_history(command, lines):
    """The lines of metrics.jsonl as lists in the source's fields, an entry per evaluation, for tools that read them."""

    def column(field, default=None):
        return [line.get(field, default) for line in lines]

    if command == "central":
        fields = ("val_loss", "val_ppl", "train_loss", "generated", "grad_cosine", "delta_norms")
        return {"step": column("round"), **{field: column(field) for field in fields}}
    entropies = [[h for h in clients if h is not None] for clients in column("client_entropy", [])]  # None: left out
    return {
        "global_step": column("steps"),
        "train_ppl": column("train_ppl"),
        "server_val_ppl": column("val_ppl"),
        "client_val_ppls": column("client_val_ppl", []),
        "avg_client_entropy": [sum(h) / len(h) if h else None for h in entropies],
        "generated": column("generated"),
    }
