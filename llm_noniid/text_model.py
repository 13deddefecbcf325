"""A language model and the texts as its tokens: loss, evaluation, files.

theta [n] are the factors of a LoRA adapter, by name "A.<layer>" [r, k] and "B.<layer>" [d, r], or with --train full all
parameters; what is measured is the theta that was loaded last. Losses are in nats: a mean loss is a mean over scored
tokens, with --target label over texts, of the summed NLL of the label's words (`TokenizedTexts.units`).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from common import parallel
from common.batches import evaluation_batches
from common.cli import UsageError
from common.evaluation import amp_context, perplexity
from common.hub import quiet
from common.lora import LoraModel, write_adapter
from common.vector import Weights
from llm_noniid.models import find_tokenizer, load_base
from llm_noniid.tokens import IGNORE, TokenizedTexts, encode, encode_labelled

EVAL_BATCH, ASKED_BATCH = 16, 64  # texts, those whose label is asked; fixed: other batches would round differently


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
    """The model, with --train lora its adapter, and the tokens that a command line names.

    Raises: UsageError for a model or tokenizer that is not there or does not fit.
    """
    a = args
    tokenizer = find_tokenizer(a.model, texts, a.tokenizer, a.data_root)
    tokens = (encode_labelled if a.target == "label" else encode)(texts, tokenizer, a.max_length)
    base = load_base(a.model, tokenizer, a.max_length, a.seed, a.dropout, one_gelu=a.target == "label")
    if a.target == "label":
        check_kept(base, a)
    if a.dropout == 0 and amp == torch.bfloat16 and device.type == "cpu":
        base.set_attn_implementation("eager")  # torch's bf16 flash attention takes 5 ms a layer where this takes 1
    if a.train == "full":
        module = base.to(device)
        return TextModel(a.model, tokenizer, tokens, module, Weights(module), device, amp)
    lora = LoraModel(base, a.lora_r, a.lora_alpha, a.lora_dropout, a.target_modules, seed=a.seed)
    module = lora.model.to(device)
    return TextModel(a.model, tokenizer, tokens, module, Weights(module, lora.trainable()), device, amp, lora)


@torch.no_grad()
def check_kept(base, args):
    """Raises UsageError for a model that keeps no keys and values of a whole text, which `answer_losses` needs."""
    try:
        base(input_ids=torch.zeros(1, args.max_length, dtype=torch.int64), use_cache=True).past_key_values.crop(-1)
    except (AttributeError, RuntimeError) as error:
        why = f"keeps no keys and values of {args.max_length} tokens"
        raise UsageError(
            f"--model {args.model} {why}: for --target label take another, or a lower --max-length"
        ) from error


def negative_log_likelihood(module, batch, amp):
    """Of each token after the first [B, L - 1], 0 where no label is scored."""
    inputs, labels, places = batch["input_ids"], batch["labels"], batch.get("before_scored")
    if places is not None:
        with amp_context(amp, inputs.device):
            logits = after_places(module, places, input_ids=inputs).logits.float()  # [N, V]
        nll = F.cross_entropy(logits, labels.flatten()[places + 1], reduction="none")  # [N]
        return nll.new_zeros(labels.numel()).index_copy(0, places, nll).view(labels.shape)[:, :-1]  # [B, L - 1]
    with amp_context(amp, inputs.device):
        logits = module(input_ids=inputs, attention_mask=batch["attention_mask"]).logits
    logits, labels = logits[:, :-1].float(), labels[:, 1:]  # [B, L - 1, V], [B, L - 1]
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return nll.view(labels.shape)  # [B, L - 1]


def after_places(module, places, **inputs):
    """What the module gives, with logits [N, V] after the tokens at `places` of [B L] alone.

    The head is given these hidden states by a hook, so that what a model does to logits after its head (gemma's soft
    cap) is still its own. Padding, which comes after all that is scored, needs no mask in a causal model.
    """
    head = module.get_output_embeddings()
    with head.register_forward_pre_hook(lambda _, states: (states[0].flatten(0, 1)[places],)):
        return module(**inputs)


# ---- what the loaded theta says of texts


@torch.no_grad()
def text_losses(model, split, rows):
    """Summed NLL of each text's scored tokens, fp64 [n]."""

    def losses(rows):
        return negative_log_likelihood(model.module, model.batch(split, rows), model.amp).double().sum(1)

    return over_batches(model, split, rows, losses)


@torch.no_grad()
def answer_losses(model, split, rows):
    """Summed NLL of each label's words after each text, fp64 [n, C]. A text is read once: what attention keeps of it
    (`past_key_values`) serves all labels."""
    tokens, module = model.tokens[split], model.module
    answers = [torch.from_numpy(words).to(model.device, torch.int64) for words in tokens.answers]

    def losses(rows):
        inputs, mask = (t.to(model.device) for t in tokens.questions(rows))
        n, (b, longest), sums = mask.sum(1), mask.shape, []
        places = torch.arange(b, device=model.device) * longest + n - 1
        with amp_context(model.amp, model.device):
            out = after_places(module, places, input_ids=inputs, use_cache=True)
            first, kept = F.log_softmax(out.logits.float(), -1), out.past_key_values  # [B, V]
            for words in answers:
                sums.append(first[:, words[0]].double())
                if more := len(words) - 1:
                    where = n[:, None] + torch.arange(more, device=model.device)
                    seen = torch.cat([mask, mask.new_ones(b, more)], 1)
                    these = {"input_ids": words[:-1].expand(b, more), "position_ids": where, "attention_mask": seen}
                    logits = module(**these, past_key_values=kept).logits.float()  # [B, more, V]
                    after = F.log_softmax(logits, -1).gather(2, words[1:].expand(b, more)[..., None])
                    sums[-1] += after.double().sum((1, 2))
                    kept.crop(-more)
        return -torch.stack(sums, 1)

    return over_batches(model, split, rows, losses, ASKED_BATCH)


def over_batches(model, split, rows, losses, size=EVAL_BATCH):
    """losses(rows of a batch), a tensor [B, ...], for all rows [n]: an array [n, ...]; the processes share the
    batches, and each gets all."""
    model.module.eval()
    rows = np.asarray(rows)
    cut = evaluation_batches(model.tokens[split].lengths()[rows], size)
    mine = {i: losses(rows[cut[i]]).cpu().numpy() for i in parallel.my_share(range(len(cut)))}
    parts = {i: one for part in parallel.all_gather(mine) for i, one in part.items()}
    ordered = [parts[i] for i in range(len(cut))]
    return np.concatenate(ordered)[np.argsort(np.concatenate(cut))]


def judged(model, split, rows):
    """Of each text its summed NLL and, of labels (else nan), whether its own is the likeliest: fp64 [n, 2]."""
    tokens = model.tokens[split]
    if tokens.answers is None:
        nll = text_losses(model, split, rows)
        return np.stack([nll, np.full(len(nll), np.nan)], 1)
    own, nll = tokens.labels[rows], answer_losses(model, split, rows)  # [n], [n, C]
    return np.stack([nll[np.arange(len(rows)), own], nll.argmin(1) == own], 1)


@torch.no_grad()
def hidden_states(model, split, rows):
    """Of the last layer, of the texts' tokens without padding: fp32 [tokens, D] on the CPU."""
    model.module.eval()
    states = []
    for start in range(0, len(rows), EVAL_BATCH):
        batch = model.batch(split, rows[start : start + EVAL_BATCH])
        mask = batch["attention_mask"]
        with amp_context(model.amp, model.device):
            out = model.module(input_ids=batch["input_ids"], attention_mask=mask, output_hidden_states=True)
        states.append(out.hidden_states[-1][mask.bool()].float().cpu())
    return torch.cat(states)


# ---- evaluation of several thetas [G, n]


def quality(model, thetas, weights, split, rows, name):
    """{name_loss, name_ppl} of texts of a split; of labels name_accuracy too.

    Losses in nats a token, of labels a text; name_ppl is exp(name_loss). Each text's NLL is the weighted mean of those
    under the thetas; a theta of weight 0 is not looked at.
    """
    scores = 0
    for theta, weight in zip(thetas, weights, strict=True):
        if weight:
            model.weights.load(theta)
            scores = scores + weight / sum(weights) * judged(model, split, rows)
    tokens, total = model.tokens[split], math.fsum(scores[:, 0])
    units = int(tokens.units(rows).sum())
    figures = {f"{name}_loss": total / units, f"{name}_ppl": perplexity(total, units)}
    return figures | ({f"{name}_accuracy": float(scores[:, 1].mean())} if tokens.answers else {})


def clients_quality(model, thetas, group, held):
    """{client_val_loss [K], mean_client_val_loss}; of labels mean_client_val_accuracy too.

    Args: group [K]: which theta serves client k; held: its own held-out texts, rows of the training split.
    """
    losses, accuracies, tokens = [None] * len(held), [None] * len(held), model.tokens["train"]
    for g in np.unique(group):
        served = np.flatnonzero(group == g)
        model.weights.load(thetas[g])
        scores = judged(model, "train", np.concatenate([held[k] for k in served]))
        ends = np.cumsum([len(held[k]) for k in served])[:-1]
        for k, mine in zip(served, np.split(scores, ends), strict=True):
            losses[k] = math.fsum(mine[:, 0]) / int(tokens.units(held[k]).sum())
            accuracies[k] = mine[:, 1].mean()
    figures = {"client_val_loss": losses, "mean_client_val_loss": sum(losses) / len(losses)}
    return figures | ({"mean_client_val_accuracy": float(np.mean(accuracies))} if tokens.answers else {})


# ---- files


def write(model, folder, thetas, base):
    """Each theta as an adapter in peft's format, with --train full as a model of transformers with its tokenizer:
    folder/adapter or folder/model, or folder/group_0, group_1, ... of several.

    base: the folder to which the tiny model, which can be loaded from nowhere else, goes with its tokenizer.
    """
    one = "model" if model.lora is None else "adapter"
    places = [folder / (f"group_{g}" if len(thetas) > 1 else one) for g in range(len(thetas))]
    if model.lora is None:
        for place, theta in zip(places, thetas, strict=True):
            model.weights.load(theta)
            with quiet():
                model.module.save_pretrained(place)
            model.tokenizer.save_pretrained(place)
        return
    tiny = model.name == "tiny"
    if tiny:
        model.lora.save_base(base)
        model.tokenizer.save_pretrained(base)
    folder.mkdir(parents=True, exist_ok=True)
    for place, theta in zip(places, thetas, strict=True):
        factors = model.weights.named(theta)
        pairs = {layer: (factors[f"A.{layer}"], factors[f"B.{layer}"]) for layer in model.lora.layers}
        name = str(base) if tiny else model.name
        write_adapter(place, pairs, {}, alpha=model.lora.alpha, base_model=name, **model.lora.about())
