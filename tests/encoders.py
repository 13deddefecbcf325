"""Small encoders with random weights and the demo's words, saved as transformers saves pretrained ones."""

import string

import torch
import transformers
from tokenizers import pre_tokenizers

from lora_glue_fl.glue_tasks import demo_task

KINDS = ("bert", "roberta", "deberta-v2", "modernbert")
_BERT, _ROBERTA = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def words(task="wnli"):
    columns = [column for split in demo_task(task).values() for column in split.texts.values()]
    return sorted({word for column in columns for text in column for word in text.split()})


def make_tokenizer(kind):
    """A tokenizer of the class, special tokens and types of this kind of encoder."""
    if kind == "roberta":  # bytes
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        return transformers.RobertaTokenizer(
            vocab={piece: i for i, piece in enumerate([*_ROBERTA, *letters])}, merges=[]
        )
    if kind == "deberta-v2":  # pieces with scores
        pieces = [*_BERT, *(f"▁{word}" for word in words()), "▁", *string.ascii_lowercase]
        return transformers.DebertaV2Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)])
    vocabulary = {piece: i for i, piece in enumerate([*_BERT, *words()])}
    names = {"model_input_names": ["input_ids", "attention_mask"]} if kind == "modernbert" else {}  # no types
    return transformers.BertTokenizer(vocab=vocabulary, **names)


def make_config(kind, tokenizer, **more):
    """d 16, two layers of two heads, feed-forward 24."""
    about = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **more}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    sizes |= {"max_position_embeddings": 64}
    if kind == "deberta-v2":
        sizes |= {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
        sizes |= {"share_att_key": True, "norm_rel_ebd": "layer_norm"}
    if kind == "modernbert":
        about |= {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3, "embedding_dropout": 0.1}
    return transformers.AutoConfig.for_model(kind, **{**sizes, **about})


def save_encoder(folder, kind, model="AutoModelForMaskedLM", seed=0, tokenizer=None, **more):
    """Saves an encoder and its tokenizer in `folder`, which is returned. more: of its config."""
    tokenizer = tokenizer or make_tokenizer(kind)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = getattr(transformers, model).from_config(make_config(kind, tokenizer, **more))
        for name, p in made.named_parameters():
            if "norm" not in name.lower():
                torch.nn.init.normal_(p, std=0.2)  # with 0.02 a random attention hardly mixes its tokens
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
