"""A language model with a LoRA adapter and the texts as its tokens: loss, evaluation, files.

theta is {"A.<layer>": [r, k], "B.<layer>": [d, r]}, the adapter's factors; what is measured is the theta that was
loaded last. Losses are in nats.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F

from common import parallel
from common.adapter_files import write_adapter
from common.batches import evaluation_batches
from common.compiling import checked_compile
from common.evaluation import amp_context, bits_per_byte, perplexity
from common.lora import LoraModel
from common.seeding import stream
from llm_noniid.data import IGNORE, encode
from llm_noniid.models import find_tokenizer, load_base

EVAL_BATCH = 16  # fixed: sums over other batches would round differently


class TextModel:
    """Model and tokens of a command line.

    Attributes: tokenizer; tokens {split: `TokenizedTexts`}; lengths {split: tokens of each text, int64 [n]}; lora
    (`LoraModel`); model (what is called); parameters {name: parameter}, theta's names, what is trained; loss (of a
    batch; compiled where --compile asks for it); device, amp.

    Args: args: the flags of train.py; texts: `Texts`; device: torch.device; amp: as `resolve_amp` gives it.
    Raises: UsageError for a model or tokenizer that is not there or does not fit.
    """

    def __init__(self, args, texts, device, amp):
        self.args, self.texts, self.device, self.amp = args, texts, device, amp
        a = args
        self.tokenizer = find_tokenizer(a.model, texts, a.tokenizer, a.data_root, a.cache_dir)
        self.tokens = encode(texts, self.tokenizer, a.max_length, a.cache_dir)
        self.lengths = {split: part.lengths() for split, part in self.tokens.items()}
        base = load_base(a.model, self.tokenizer, a.max_length, a.seed)
        self.lora = LoraModel(base, a.lora_r, a.lora_alpha, a.lora_dropout, a.target_modules, seed=a.seed)
        self.model = self.lora.model.to(device)
        self.parameters = self.lora.trainable()
        self.loss = checked_compile(self.batch_loss, self.parameters) if a.compile else self.batch_loss

    def sizes(self):
        """Numbers of parameters for run.json."""
        return {
            "total": sum(p.numel() for p in self.model.parameters()),
            "trainable": sum(p.numel() for p in self.parameters.values()),
        }

    def resolved(self):
        """What flags came to on this machine, for run.json."""
        return {
            "device": self.device.type,
            "amp": str(self.amp or torch.float32).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        }

    @torch.no_grad()
    def load(self, theta):
        """Puts a theta into the model."""
        for name, p in self.parameters.items():
            p.copy_(theta[name])

    # ---- a batch

    def batch(self, split, rows):
        """The texts `rows` of a split, padded, on the device: {input_ids, attention_mask, labels} [B, L]."""
        return {name: t.to(self.device, non_blocking=True) for name, t in self.tokens[split].batch(rows).items()}

    def batch_loss(self, batch):
        """Mean negative log-likelihood of the scored tokens of a batch."""
        return self._nll(batch).sum() / (batch["labels"][:, 1:] != IGNORE).sum()

    def _nll(self, batch):
        """Negative log-likelihoods [B, L - 1], 0 where no label is scored."""
        with amp_context(self.amp, self.device):
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logits, labels = logits[:, :-1].float(), batch["labels"][:, 1:]  # [B, L - 1, V], [B, L - 1]
        nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
        return nll.view(labels.shape)  # [B, L - 1]

    # ---- texts

    def scored(self, split, rows):
        """How many tokens of each text are scored, all but its first: int64 [n]."""
        return self.lengths[split][rows] - 1

    @torch.no_grad()
    def sums(self, split, rows):
        """Summed NLL of each text, fp64 [n]; the processes share the batches, and each gets all."""
        self.model.eval()
        rows = np.asarray(rows)
        cut = evaluation_batches(self.lengths[split][rows], EVAL_BATCH)
        lanes = parallel.Lanes(range(len(cut)))
        found = {i: self._nll(self.batch(split, rows[cut[i]])).double().sum(1).cpu().numpy() for i in lanes}
        nll = np.zeros(len(rows))
        for i, part in lanes.gather(found).items():
            nll[cut[i]] = part
        return nll

    @torch.no_grad()
    def probe(self, split, rows):
        """Hidden states of the last layer, the mean over each text's tokens: fp32 [n, D] on the CPU."""
        self.model.eval()
        found = []
        for start in range(0, len(rows), EVAL_BATCH):
            batch = self.batch(split, rows[start : start + EVAL_BATCH])
            mask = batch["attention_mask"]
            with amp_context(self.amp, self.device):
                out = self.model(input_ids=batch["input_ids"], attention_mask=mask, output_hidden_states=True)
            states = out.hidden_states[-1].float() * mask[..., None]  # [B, L, D]
            found.append((states.sum(1) / mask.sum(1, keepdim=True)).cpu())  # [B, D]
        return torch.cat(found)

    # ---- evaluation of several thetas

    def evaluated_rows(self, split):
        """The texts of a split that are evaluated: all, or --eval-samples drawn once."""
        n, wanted = len(self.tokens[split]), self.args.eval_samples
        if not wanted or wanted >= n:
            return np.arange(n)
        return np.sort(stream(self.args.seed, f"evaluated {split}").choice(n, wanted, replace=False))

    def quality(self, thetas, weights, split, rows, name):
        """{name_loss, name_ppl, name_bits_per_byte, name_topic_loss [topics]} of texts of a split.

        Each text's NLL is the weighted mean of those under the thetas; a theta of weight 0 is not looked at.
        """
        nll = np.zeros(len(rows))
        for theta, weight in zip(thetas, weights, strict=True):
            if weight:
                self.load(theta)
                nll += weight / sum(weights) * self.sums(split, rows)
        tokens, total = self.scored(split, rows), math.fsum(nll)
        labels = self.texts.labels[split][rows]
        topics = [labels == c for c in range(len(self.texts.label_names))]
        return {
            f"{name}_loss": total / int(tokens.sum()),
            f"{name}_ppl": perplexity(total, int(tokens.sum())),
            f"{name}_bits_per_byte": bits_per_byte(total, int(self.tokens[split].byte_lengths[rows].sum())),
            f"{name}_topic_loss": [math.fsum(nll[t]) / int(tokens[t].sum()) if t.any() else None for t in topics],
        }

    def clients_quality(self, thetas, owners, held):
        """{client_val_loss [K], worst_client_val_loss, mean_client_val_loss}.

        Args: owners: which theta serves client k; held: its own held-out texts, rows of the training split.
        """
        losses = [None] * len(held)
        for g, theta in enumerate(thetas):
            mine = [k for k, owner in enumerate(owners) if owner == g]
            if not mine:
                continue
            self.load(theta)
            rows, ends = np.concatenate([held[k] for k in mine]), np.cumsum([len(held[k]) for k in mine])[:-1]
            nll, tokens = self.sums("train", rows), self.scored("train", rows)
            for k, sums, counts in zip(mine, np.split(nll, ends), np.split(tokens, ends), strict=True):
                losses[k] = math.fsum(sums) / int(counts.sum())
        return {
            "client_val_loss": losses,
            "worst_client_val_loss": float(np.max(losses)),  # nan where one is
            "mean_client_val_loss": sum(losses) / len(losses),
        }

    # ---- files

    def write(self, folder, thetas, base):
        """Each theta as an adapter in peft's format: folder/adapter, or folder/group_0, group_1, ... of several.

        base: the folder to which the tiny model, which can be loaded from nowhere else, goes with its tokenizer.
        """
        tiny = self.args.model == "tiny"
        if tiny:
            self.lora.save_base(base)
            self.tokenizer.save_pretrained(base)
        folder.mkdir(parents=True, exist_ok=True)
        for g, theta in enumerate(thetas):
            write_adapter(
                folder / (f"group_{g}" if len(thetas) > 1 else "adapter"),
                {layer: (theta[f"A.{layer}"], theta[f"B.{layer}"]) for layer in self.lora.layers},
                {},
                alpha=self.lora.alpha,
                base_model=str(base) if tiny else self.args.model,
                **self.lora.about(),
            )
