"""The causal language models of this study: from the hub, from a folder, or `tiny` from a config.

tokenizer = find_tokenizer("distilgpt2", texts)
base = load_base("distilgpt2", tokenizer, max_length=128, seed=42)
"""

import re

from common import hub
from common.cli import UsageError
from common.seeding import seed_torch
from common.text import load_tokenizer, vocabulary_size
from llm_noniid.data import as_corpus

MODELS = {
    "distilgpt2": "distilbert/distilgpt2",
    "gpt2": "openai-community/gpt2",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "qwen-0.5b": "Qwen/Qwen2.5-0.5B",
}
TINY_TOKENS = "bpe:2048"  # byte-level BPE, learnt from the training texts


def find_model(name):
    """The folder of a model (`common.hub.find_model`)."""
    spec = MODELS.get(name, name)
    return hub.find_model(name, spec, f"download {spec} elsewhere, make one with pretrain.py, or take --model tiny")


def find_tokenizer(name, texts, tokenizer=None, data_root=None):
    """The tokenizer: `tokenizer` where given ("bpe:N", a folder, a name), tiny: BPE of the texts, else the model's."""
    if tokenizer is None:
        tokenizer = TINY_TOKENS if name == "tiny" else str(find_model(name))
    return load_tokenizer(tokenizer, as_corpus(texts), data_root)


def tiny_config(tokenizer, max_length, d_model=64, layers=2, heads=2):
    """A small GPT-2. Args: max_length: its positions."""
    from transformers import GPT2Config

    eos = tokenizer.eos_token_id
    return GPT2Config(
        vocab_size=vocabulary_size(tokenizer),
        n_positions=max_length,
        n_embd=d_model,
        n_layer=layers,
        n_head=heads,
        bos_token_id=eos,
        eos_token_id=eos,
    )


def load_base(name, tokenizer, max_length, seed, dropout=None, one_gelu=False):
    """A transformers causal language model on the CPU, in fp32.

    name: "tiny" (random weights that follow from seed), a key of `MODELS`, a folder, or a name on the hub; dropout,
    one_gelu: as `adjusted`. Raises UsageError for a model that is not there or does not fit tokenizer or max_length.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel

    seed_torch(seed, "weights")
    if name == "tiny":
        return GPT2LMHeadModel(adjusted(tiny_config(tokenizer, max_length), dropout, one_gelu))
    folder = find_model(name)
    what = f"--model {name} cannot be read as a causal language model"
    with hub.quiet(), hub.reading(what, "give another"):
        config = adjusted(AutoConfig.from_pretrained(folder, trust_remote_code=False), dropout, one_gelu)
    model, _ = hub.load_pretrained(AutoModelForCausalLM, folder, what, "give another", config=config)
    embeddings = model.get_input_embeddings().num_embeddings
    if embeddings < vocabulary_size(tokenizer):
        raise UsageError(f"--tokenizer has more tokens than the {embeddings} that --model {name} knows: give its own")
    positions = getattr(config, "max_position_embeddings", None)
    if positions and max_length > positions:
        raise UsageError(f"--max-length {max_length} is above the model's {positions} positions: lower it")
    return model


def adjusted(config, dropout, one_gelu):
    """The config with this dropout in all layers (None: its own), and with one_gelu GPT-2's GELU, five operations in
    transformers, as torch's single one: the same formula. It is saved with the model."""
    for name, value in config.to_dict().items():
        if dropout is not None and re.search(r"dropout$|_pdrop$", name) and isinstance(value, float | int):
            setattr(config, name, dropout)
        if one_gelu and value == "gelu_new":
            setattr(config, name, "gelu_pytorch_tanh")
    return config


def memory(args):
    """Bytes that a process takes, at a guess from the flags: the model, and the logits of a batch."""
    size = {"distilgpt2": 3e8, "gpt2": 5e8, "tinyllama": 4.4e9, "qwen-0.5b": 2e9, "tiny": 0}.get(args.model, 5e8)
    size = 2 * hub.weight_bytes(args.model) or size
    vocabulary = 2048 if args.model == "tiny" else 50_000
    return int(6e8 + size + 12 * args.batch_size * args.max_length * vocabulary)
