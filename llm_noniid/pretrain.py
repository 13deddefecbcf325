"""Trains a small GPT-2 on a corpus, centrally: a base worth adapting where no hub can be reached.

    python llm_noniid/pretrain.py --dataset wikitext --d-model 256 --layers 4 --epochs 3 --out models/small
    python llm_noniid/pretrain.py --dataset demo --epochs 2 --out models/demo                    # offline, a minute
    python llm_noniid/train.py --model models/small                                              # what adapts it

theta <- AdamW on the mean loss of a batch's tokens; linear warm-up, then a cosine to a tenth of the rate.

The folder holds the model and its tokenizer (byte-level BPE of the corpus), as transformers loads them.
"""

import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.checkpoint import saving, swap, write_json
from common.cli import (
    Parser,
    UsageError,
    add_machine_flags,
    non_negative_int,
    parse,
    positive_float,
    positive_int,
    run_main,
)
from common.evaluation import perplexity, pick_device, resolve_amp, reuse_large_memory
from common.hub import quiet
from common.local import local_steps, lr_at
from common.manifest import git_commit, versions
from common.runlog import prepare_machine
from common.seeding import seed_torch
from common.text import load_tokenizer
from common.vector import Weights
from llm_noniid.data import as_corpus, load_texts
from llm_noniid.flags import DATASETS, choice, number
from llm_noniid.models import tiny_config
from llm_noniid.text_model import TextModel, text_losses
from llm_noniid.tokens import encode, training_batches


def build_parser():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, metavar="DIR", help="where the model goes")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder")
    data, model, train = map(parser.add_argument_group, ("the data", "the model", "training"))
    choice(data, "--dataset", DATASETS, "wikitext", "the corpus")
    number(data, "--max-samples", non_negative_int, 0, "training texts; 0: all", "N")
    number(data, "--max-length", positive_int, 128, "tokens of a text; positions", "N")
    data.add_argument("--tokenizer", default="bpe:4096", metavar="NAME", help="bpe:N, gpt2, a folder")
    data.add_argument("--data-root", metavar="DIR", help="where the data are (default: $FEDQUARTET_DATA, else data)")
    number(model, "--d-model", positive_int, 128, "width", "N")
    number(model, "--layers", positive_int, 4, "blocks", "N")
    number(model, "--heads", positive_int, 4, "attention heads", "N")
    number(train, "--epochs", positive_int, 3, "passes over the texts", "N")
    number(train, "--batch-size", positive_int, 16, "texts a step", "B")
    number(train, "--learning-rate", positive_float, 2e-3, "AdamW's highest")
    add_machine_flags(parser)
    return parser


WARMUP = 0.05  # of the steps


def main(args):
    folder = Path(args.out)
    if folder.exists() and any(folder.iterdir()) and not args.overwrite:
        raise UsageError(f"--out {folder} exists: --overwrite replaces it, another --out leaves it")
    if args.d_model % args.heads:
        raise UsageError(f"--d-model {args.d_model} is not a multiple of --heads {args.heads}: change one")
    reuse_large_memory()
    prepare_machine(args)
    device = pick_device(args.device)
    amp = resolve_amp(args.amp, device)
    texts = load_texts(args.dataset, args.data_root, args.max_samples, args.seed)
    tokenizer = load_tokenizer(args.tokenizer, as_corpus(texts), args.data_root)
    tokens = encode(texts, tokenizer, args.max_length)
    seed_torch(args.seed, "weights")
    from transformers import GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(tiny_config(tokenizer, args.max_length, args.d_model, args.layers, args.heads)).to(device)
    model = TextModel("pretrained", tokenizer, tokens, gpt2, Weights(gpt2), device, amp)
    write(args, folder, model, texts, train(args, model))
    print(folder)


def train(args, model):
    """The epochs. Returns a list of {"epoch", "train_loss", "val_loss", "val_ppl", "seconds"}."""
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=args.learning_rate, weight_decay=0.1, fused=True)
    texts, validation = len(model.tokens["train"]), np.arange(len(model.tokens["validation"]))
    scored = int(model.tokens["validation"].scored(validation).sum())
    per_epoch = math.ceil(texts / args.batch_size)
    total, history, started = per_epoch * args.epochs, [], time.perf_counter()
    warmup = math.ceil(WARMUP * total)
    with tqdm(total=total, unit="step", disable=None) as bar:
        for epoch in range(args.epochs):
            model.module.train()
            seed_torch(args.seed, "dropout", epoch)
            batches = training_batches(texts, args.batch_size, 1, args.seed, epoch)
            steps = ((model.batch("train", rows),) for rows in batches)
            places = range(epoch * per_epoch, (epoch + 1) * per_epoch)
            lrs = [lr_at(i, total, args.learning_rate, warmup=warmup, min_lr=args.learning_rate / 10) for i in places]
            options = {"amp": model.amp, "max_norm": 1.0, "lrs": lrs, "after_step": bar.update}
            loss = local_steps(model.loss, steps, model.weights, optimizer, **options).loss.item()
            nll = math.fsum(text_losses(model, "validation", validation))
            row = {"epoch": epoch + 1, "train_loss": loss, "val_loss": nll / scored, "val_ppl": perplexity(nll, scored)}
            history.append(row | {"seconds": time.perf_counter() - started})
            tqdm.write(f"epoch {epoch + 1}/{args.epochs}  train_loss {loss:.4f}  val_ppl {row['val_ppl']:.2f}")
    return history


def write(args, folder, model, texts, history):
    """The model's folder, whole or not at all, with pretraining.json."""
    fresh = folder.with_name(folder.name + ".new")
    with saving(folder, fresh):
        fresh.mkdir(parents=True, exist_ok=True)
        with quiet():
            model.module.save_pretrained(fresh)
        model.tokenizer.save_pretrained(fresh)
        about = {"args": vars(args), "git_commit": git_commit(), "versions": versions(), "data": texts.fingerprint}
        write_json(fresh / "pretraining.json", about | {"history": history})
        swap(fresh, folder)


if __name__ == "__main__":
    args = parse(build_parser())
    run_main(main, args)
