"""A language model and the texts as its tokens: loss, evaluation, files.

theta [n] are the factors of a LoRA adapter, by name "A.<layer>" [r, k] and "B.<layer>" [d, r], or with --train full all
parameters; what is measured is the theta that was loaded last. Losses are in nats: a mean loss is a mean over scored
tokens, with --target label over texts, of the summed NLL of the label's words (`TokenizedTexts.units`).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from common import parallel
from common.adapter_files import read_adapter, write_adapter
from common.batches import evaluation_batches
from common.checkpoint import file_sha256, read_json
from common.cli import UsageError, say
from common.evaluation import amp_context, bits_per_byte, perplexity
from common.hub import quiet
from common.lora import LoraModel
from common.seeding import stream
from common.text import tokenizer_fingerprint
from common.vector import Weights, fingerprint
from llm_noniid.data import IGNORE, LabelledTexts, TokenizedTexts, encode, encode_labelled
from llm_noniid.models import MODELS, find_model, find_tokenizer, load_base, with_one_gelu

EVAL_BATCH = 16  # fixed: sums over other batches would round differently
STATES = 4096  # tokens whose states are compared, at most
WORST_OF = 30  # held-out texts that the worst client has at least: of fewer, the worst is the noisiest


@dataclass(frozen=True)
class TextModel:
    """module: what is called; tokens: {split: `TokenizedTexts`}; weights: theta in the module; lora: None without."""

    name: str
    tokenizer: object
    tokens: dict[str, TokenizedTexts]
    module: torch.nn.Module
    weights: Weights
    device: torch.device
    amp: torch.dtype | None
    lora: LoraModel | None = None

    def batch(self, split, rows):
        """The texts `rows` of a split, padded, on the device: {input_ids, attention_mask, labels} [B, L]."""
        batch = self.tokens[split].batch(rows)
        return {name: t.to(self.device, non_blocking=True) for name, t in batch.items()}

    def loss(self, batch):
        """Negative log-likelihood of a batch, a mean over its scored tokens, of labels over its texts."""
        labels = batch["labels"]
        units = len(labels) if "before_scored" in batch else (labels[:, 1:] != IGNORE).sum()
        return negative_log_likelihood(self.module, batch, self.amp).sum() / units


def load_text_model(args, texts, device, amp):
    """The model, with --train lora its adapter (a new one or --init-from's), and the tokens that a command line names.

    Raises: UsageError for a model, tokenizer or adapter that is not there or does not fit.
    """
    a = args
    tokenizer = find_tokenizer(a.model, texts, a.tokenizer, a.data_root, a.cache_dir)
    tokens = (encode_labelled if a.target == "label" else encode)(texts, tokenizer, a.max_length, a.cache_dir)
    base = load_base(a.model, tokenizer, a.max_length, a.seed, a.dropout)
    if a.target == "label":
        with_one_gelu(base)
    if a.dropout == 0 and amp == torch.bfloat16 and device.type == "cpu":
        base.set_attn_implementation("eager")  # torch's bf16 flash attention takes 5 ms a layer where this takes 1
    if a.train == "full":
        module = base.to(device)
        return TextModel(a.model, tokenizer, tokens, module, Weights(module), device, amp)
    lora = LoraModel(base, a.lora_r, a.lora_alpha, a.lora_dropout, a.target_modules, seed=a.seed)
    module, trained = lora.model.to(device), lora.trainable()
    if a.init_from is not None:
        init_from(lora, a.init_from, a.model, base_facts(module, tokenizer))
    return TextModel(a.model, tokenizer, tokens, module, Weights(module, trained), device, amp, lora)


def base_facts(module, tokenizer):
    """For run.json, what an adapter belongs to: SHA-256 of the frozen weights and of the tokenizer."""
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    return {"frozen_sha256": fingerprint(frozen), "tokenizer_sha256": tokenizer_fingerprint(tokenizer)}


def init_from(lora, place, name, facts):
    """Puts another run's adapter, whose product s B A is kept, into the model.

    Args: place: --init-from; name: --model; facts: of `base_facts`.
    Raises: UsageError for a place without an adapter or with several, and for an adapter that does not fit.
    """
    path = Path(place).expanduser()
    path = path / "final" if (path / "final").is_dir() or (path / "run.json").exists() else path
    if groups := sorted(path.glob("group_*")):
        raise UsageError(f"--init-from {place} has {len(groups)} adapters, one a group: choose, as in {groups[0]}")
    path = path / "adapter" if (path / "adapter").is_dir() else path
    file, here = read_adapter(path, "CAUSAL_LM"), lora.factors()
    r = len(next(iter(here.values()))[0])
    if file.r != r:
        raise UsageError(f"--init-from {place} has rank {file.r}, not {r}: give --lora-r {file.r}")
    if file.head or file.base:
        raise UsageError(f"--init-from {place} has weights besides LoRA's factors: give an adapter without")
    if odd := sorted(file.factors.keys() ^ here.keys()):
        where = "it lacks" if odd[0] in here else "it has besides"
        flags = f"--target-modules {' '.join(file.target_modules)}"
        raise UsageError(f"--init-from {place} adapts other layers: {where} {odd[0]}: give its {flags} and --model")
    for layer, (A, B) in file.factors.items():
        sizes = [[*pair[0].shape, *pair[1].shape] for pair in ((A, B), here[layer])]
        if sizes[0] != sizes[1]:
            raise UsageError(f"--init-from {place}: {layer} has sizes {sizes[0]}, not {sizes[1]}: give its --model")
    check_base(file, place, name, facts)
    lora.load({layer: (A, B * (file.scale / lora.scale)) for layer, (A, B) in file.factors.items()}, {}, lora.scale)


def _weights(folder):
    return [file_sha256(path) for path in sorted(folder.glob("model*.safetensors"))]


def check_base(file, place, name, facts):
    """Raises UsageError where an `AdapterFile` belongs to another base: by its run's run.json, else by the files of the
    folder that it names, else by their names alone, of which a line says so."""
    named = Path(file.base_model or "")
    near = [*file.path.resolve().parents[:2], *([named.parent] if named.name == "base" else ())]
    records = [folder / "run.json" for folder in near if (folder / "run.json").is_file()]
    odd = []
    if records:
        theirs = read_json(records[0]).get("parameters") or {}
        odd = [key for key, value in facts.items() if theirs.get(key, value) != value]
    elif file.base_model and named.is_dir():
        odd = [str(named)] if name == "tiny" or _weights(named) != _weights(find_model(name)) else []
    elif file.base_model not in (None, name, MODELS.get(name)) and parallel.is_main():
        say(f"note: --init-from {place} names {named}, which is not here: taken for --model {name}")
    if odd:
        raise UsageError(
            f"--init-from {place} belongs to another base than --model {name} ({odd[0]} differs): give its --model, "
            "--tokenizer and --seed"
        )


def head_at(module, places):
    """A context in which a model's head is given the hidden states of these places [N] of [B L] alone: logits [N, V].

    By a hook: what a model does to logits after its head (gemma's soft cap, granite's scale) is still its own.
    """
    return module.get_output_embeddings().register_forward_pre_hook(lambda _, x: (x[0].flatten(0, 1)[places],))


def negative_log_likelihood(module, batch, amp):
    """Of each token after the first [B, L - 1], 0 where no label is scored.

    Where few are (--target label), the head computes logits of theirs alone, and padding, which comes after all that
    is scored, needs no mask in a causal model.
    """
    inputs, labels, places = batch["input_ids"], batch["labels"], batch.get("before_scored")
    if places is not None:
        with amp_context(amp, inputs.device), head_at(module, places):
            logits = module(input_ids=inputs).logits.float()  # [N, V]
        nll = F.cross_entropy(logits, labels.flatten()[places + 1], reduction="none")  # [N]
        return nll.new_zeros(labels.numel()).index_copy(0, places, nll).view(labels.shape)[:, :-1]  # [B, L - 1]
    with amp_context(amp, inputs.device):
        logits = module(input_ids=inputs, attention_mask=batch["attention_mask"]).logits
    logits, labels = logits[:, :-1].float(), labels[:, 1:]  # [B, L - 1, V], [B, L - 1]
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return nll.view(labels.shape)  # [B, L - 1]


# ---- what the loaded theta says of texts


@torch.no_grad()
def text_losses(model, split, rows):
    """Summed NLL of each text's scored tokens, fp64 [n]."""

    def losses(rows):
        return negative_log_likelihood(model.module, model.batch(split, rows), model.amp).double().sum(1)

    return over_batches(model, split, rows, losses)


@torch.no_grad()
def answer_losses(model, split, rows):
    """Summed NLL of each label's words after each text, fp64 [n, C]: the text is read once, its keys and values serve
    the words of every label.

    Raises: UsageError for a model that keeps none.
    """
    answers = [torch.from_numpy(answer.astype(np.int64)).to(model.device) for answer in model.tokens[split].answers]

    def losses(rows):
        inputs, mask = (torch.from_numpy(array).to(model.device) for array in model.tokens[split].questions(rows))
        length, n = inputs.shape[1], mask.sum(1)  # n [B]
        last = torch.arange(len(rows), device=model.device) * length + n - 1
        with amp_context(model.amp, model.device), head_at(model.module, last):
            read = model.module(input_ids=inputs, attention_mask=mask.long(), use_cache=True)
        kept = getattr(read, "past_key_values", None)
        if not hasattr(kept, "crop"):
            raise UsageError(f"--target label needs a model with keys and values of its texts, {model.name} has none")
        first = -read.logits.float().log_softmax(-1)  # [B, V]
        nll = torch.stack([first[:, answer[0]] for answer in answers], 1).double()  # [B, C]
        for c, answer in enumerate(answers):
            if len(answer) == 1:
                continue
            said = answer[:-1].expand(len(rows), -1)  # [B, m]
            with amp_context(model.amp, model.device):
                logits = model.module(
                    input_ids=said,
                    attention_mask=torch.cat([mask, torch.ones_like(said, dtype=torch.bool)], 1).long(),
                    position_ids=n[:, None] + torch.arange(said.shape[1], device=model.device),
                    past_key_values=kept,
                    use_cache=True,
                ).logits
            kept.crop(-said.shape[1])
            wanted = answer[1:].expand(len(rows), -1)
            nll[:, c] += F.cross_entropy(logits.float().transpose(1, 2), wanted, reduction="none").double().sum(1)
        return nll

    return over_batches(model, split, rows, losses)


def over_batches(model, split, rows, losses):
    """losses(rows of a batch), a tensor [B, ...], for all rows [n]: an array [n, ...]; the processes share the
    batches, and each gets all."""
    model.module.eval()
    rows = np.asarray(rows)
    cut = evaluation_batches(model.tokens[split].lengths()[rows], EVAL_BATCH)
    mine = {i: losses(rows[cut[i]]).cpu().numpy() for i in parallel.my_share(range(len(cut)))}
    parts = {i: one for part in parallel.all_gather(mine) for i, one in part.items()}
    ordered = [parts[i] for i in range(len(cut))]
    return np.concatenate(ordered)[np.argsort(np.concatenate(cut))]


def judged(model, split, rows):
    """(summed NLL of each text fp64 [n]; with --target label, else None: 1 where its label is the likeliest, [n])."""
    tokens = model.tokens[split]
    if not isinstance(tokens, LabelledTexts):
        return text_losses(model, split, rows), None
    own, nll = tokens.labels[rows], answer_losses(model, split, rows)  # [n], [n, C]
    return nll[np.arange(len(rows)), own], (nll.argmin(1) == own).astype(float)


@torch.no_grad()
def hidden_states(model, split, rows, seed):
    """Of the last layer, of the texts' tokens without padding: fp32 [m, D] on the CPU; m at most `STATES`, drawn."""
    model.module.eval()
    ends = np.cumsum(model.tokens[split].lengths()[rows])
    kept = np.ones(ends[-1], dtype=bool)
    if ends[-1] > STATES:
        kept[:] = False
        kept[stream(seed, "compared tokens").choice(ends[-1], STATES, replace=False)] = True
    states = []
    for start in range(0, len(rows), EVAL_BATCH):
        batch = model.batch(split, rows[start : start + EVAL_BATCH])
        mask = batch["attention_mask"]
        with amp_context(model.amp, model.device):
            out = model.module(input_ids=batch["input_ids"], attention_mask=mask, output_hidden_states=True)
        last = out.hidden_states[-1][mask.bool()].float().cpu()  # [tokens of the B texts, D]
        states.append(last[torch.from_numpy(kept[: len(last)])])
        kept = kept[len(last) :]
    return torch.cat(states)


# ---- evaluation of several thetas [G, n]


def quality(model, texts, thetas, weights, split, rows, name):
    """{name_loss, name_ppl, name_bits_per_byte, name_topic_loss [topics]} of texts of a split; of labels name_accuracy.

    Losses in nats a token, of labels a text; name_ppl is exp(name_loss). Each text's NLL is the weighted mean of those
    under the thetas; a theta of weight 0 is not looked at.
    """
    nll, right = np.zeros(len(rows)), None
    for theta, weight in zip(thetas, weights, strict=True):
        if weight:
            model.weights.load(theta)
            losses, hits = judged(model, split, rows)
            nll += weight / sum(weights) * losses
            right = hits if hits is None else (0 if right is None else right) + weight / sum(weights) * hits
    units, total = model.tokens[split].units(rows), math.fsum(nll)
    labels = texts.labels[split][rows]
    topics = [labels == c for c in range(len(texts.label_names))]
    return {
        f"{name}_loss": total / int(units.sum()),
        f"{name}_ppl": perplexity(total, int(units.sum())),
        f"{name}_bits_per_byte": bits_per_byte(total, int(model.tokens[split].byte_lengths[rows].sum())),
        **({} if right is None else {f"{name}_accuracy": float(right.mean())}),
        f"{name}_topic_loss": [math.fsum(nll[t]) / int(units[t].sum()) if t.any() else None for t in topics],
    }


def clients_quality(model, thetas, group, held):
    """{client_val_loss [K], worst_client_val_loss, mean_client_val_loss}; of labels mean_client_val_accuracy too.

    The worst client is one of those with `WORST_OF` held-out texts or more; None where there is none.

    Args: group [K]: which theta serves client k; held: its own held-out texts, rows of the training split.
    """
    losses, accuracies = [None] * len(held), []
    for g, theta in enumerate(thetas):
        served = np.flatnonzero(group == g)
        if not len(served):
            continue
        model.weights.load(theta)
        rows, ends = np.concatenate([held[k] for k in served]), np.cumsum([len(held[k]) for k in served])[:-1]
        (nll, right), units = judged(model, "train", rows), model.tokens["train"].units(rows)
        accuracies += [] if right is None else [part.mean() for part in np.split(right, ends)]
        for k, sums, counts in zip(served, np.split(nll, ends), np.split(units, ends), strict=True):
            losses[k] = math.fsum(sums) / int(counts.sum())
    large = [loss for loss, rows in zip(losses, held, strict=True) if len(rows) >= WORST_OF]
    return {
        "client_val_loss": losses,
        "worst_client_val_loss": float(np.max(large)) if large else None,  # nan where one is
        "mean_client_val_loss": sum(losses) / len(losses),
        **({"mean_client_val_accuracy": float(np.mean(accuracies))} if accuracies else {}),
    }


def own_loss(model, thetas, group, rows):
    """Mean NLL a token, of labels a text, of training texts, each under the theta of its client.

    Args: rows: of each client, or none.
    """
    nll, units = [], 0
    for g, theta in enumerate(thetas):
        mine = np.concatenate([np.empty(0, dtype=np.int64), *(rows[k] for k in np.flatnonzero(group == g))])
        if len(mine):
            model.weights.load(theta)
            nll += text_losses(model, "train", mine).tolist()
            units += int(model.tokens["train"].units(mine).sum())
    return math.fsum(nll) / units


# ---- files


def write(model, folder, thetas, base):
    """Each theta as an adapter in peft's format: folder/adapter, or folder/group_0, group_1, ... of several.

    With --train full each as a model of transformers with its tokenizer, folder/model of one.

    base: the folder to which the tiny model, which can be loaded from nowhere else, goes with its tokenizer.
    """
    if model.lora is None:
        for g, theta in enumerate(thetas):
            model.weights.load(theta)
            place = folder / (f"group_{g}" if len(thetas) > 1 else "model")
            with quiet():
                model.module.save_pretrained(place)
            model.tokenizer.save_pretrained(place)
        return
    tiny = model.name == "tiny"
    if tiny:
        model.lora.save_base(base)
        model.tokenizer.save_pretrained(base)
    folder.mkdir(parents=True, exist_ok=True)
    for g, theta in enumerate(thetas):
        factors = model.weights.named(theta)
        write_adapter(
            folder / (f"group_{g}" if len(thetas) > 1 else "adapter"),
            {layer: (factors[f"A.{layer}"], factors[f"B.{layer}"]) for layer in model.lora.layers},
            {},
            alpha=model.lora.alpha,
            base_model=str(base) if tiny else model.name,
            **model.lora.about(),
        )
