"""How the tests run llm_noniid/train.py: in this process, at a size of seconds."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.cli import checked, run_main
from llm_noniid import algorithms, flags, models, train
from llm_noniid.tokens import IGNORE

TINY = "--model tiny --dataset demo --tokenizer bpe:800 --max-length 96 --lora-r 4 --threads 1".split()
TINY += "--max-samples 160 --num-clients 4 --min-samples 6 --batch-size 4 --eval-samples 24 --probe-samples 8".split()
TINY += "--local-steps 3 --learning-rate 5e-3 --num-rounds 3 --eval-every 1 --alpha 0.5".split()
ADAPTER = "final/adapter/adapter_model.safetensors"


def parsed(*line):
    """The flags of a command line."""
    return flags.parse(train.build_parser(), [str(word) for word in line])


def call(*line):
    """train.py in this process. Returns its exit code."""
    with pytest.raises(SystemExit) as stop:
        run_main(train.main, checked(parsed, *line))
    return stop.value.code


def words(where, name, more=""):
    return [*TINY, "--output-dir", str(where), "--name", name, *more.split()]


def done(where, name, more=""):
    """The folder of a run that has finished."""
    assert call(*words(where, name, more)) == 0
    return where / name


def token_rows(tokenizer, texts, length=96):
    """Each text's ids, its end included."""
    return [(tokenizer(text)["input_ids"] + [tokenizer.eos_token_id])[:length] for text in texts]


def padded(rows, eos):
    """Their batch, made without this project."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [eos] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORE)}


def losses(model, rows):
    """(summed NLL, scored tokens) of each text alone by transformers' own loss: fp64 [n], int64 [n]."""
    model.eval()
    with torch.no_grad():
        means = [model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss.item() for row in rows]
    n = np.array([len(row) - 1 for row in rows])
    return np.array(means) * n, n


def no_dropout(monkeypatch):
    """The tiny model without its own dropout, which would draw from another generator in another loop."""
    real = models.tiny_config

    def config(*args, **kwargs):
        made = real(*args, **kwargs)
        made.resid_pdrop = made.embd_pdrop = made.attn_pdrop = 0.0
        return made

    monkeypatch.setattr(models, "tiny_config", config)


def failing(monkeypatch, when):
    """Makes the weights of the clients in `when`, a set of (round from 0, client), infinite after their steps."""
    real = algorithms.client_update

    def update(study, theta, k, t, **method):
        done = real(study, theta, k, t, **method)
        if (t, k) in when:
            study.model.weights.theta[-1] = torch.inf
        return done

    monkeypatch.setattr(algorithms, "client_update", update)


def served(folder):
    """The adapter that a run leaves."""
    return load_file(folder / ADAPTER)
