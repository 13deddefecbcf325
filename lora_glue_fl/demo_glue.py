"""Generated sentences for the nine tasks, in their own columns and label types: the dataset `demo`, no download.

Every label leaves traces in the words, so that a bag of words can learn most of it and a small model all of it; a
share `NOISE` of the labels is wrong (stsb's scores: spread), as in data that people labelled. The word level
tokenizer of these sentences has RoBERTa's special tokens and their numbers.
"""

import functools

import numpy as np

from common.seeding import stream
from lora_glue_fl.glue_tasks import HIGHEST_SCORE, TASKS, Split

TRAIN, VALIDATION = 1200, 300  # examples; wnli, small in GLUE too, has a third
NOISE = 0.04  # of the labels
_SEED = 2018  # of the data, not of a run: every run sees the same sentences

_PEOPLE = "farmer teacher doctor pilot baker nurse judge painter sailor student".split()
_DID = "found sold carried painted cleaned repaired opened watched moved bought".split()
_DO = "find sell carry paint clean repair open watch move buy".split()
_THINGS = "table window boat letter basket engine clock garden bridge piano".split()
_PLACES = "market station village harbor school museum kitchen forest castle hotel".split()
_DAYS = "monday tuesday wednesday thursday friday".split()
_GOOD = "wonderful charming brilliant moving funny clever warm elegant thrilling superb".split()
_BAD = "dull clumsy tedious bland awful lifeless shallow messy pointless weak".split()
_SHOWS = "film story plot cast script ending scene movie".split()
_FAR = "ocean rocket violin desert tiger thunder pepper glacier lantern comet".split()
_NUMBERS = "1812 1875 1903 1948 twelve thirty forty".split()
_VAGUE = "generally perhaps reportedly sometimes widely hardly mostly".split()
_GENRES = {"fiction": "once", "government": "officially", "slate": "arguably", "telephone": "yeah", "travel": "nearby"}
# mnli's own; the mismatched half of its validation has genres that are not in train
_OTHERS = {"facetoface": "well", "letters": "dear", "nineeleven": "that morning"}
_OTHERS |= {"oup": "historically", "verbatim": "etymologically"}
_FREQUENCIES = {"cola": (0.3, 0.7), "mrpc": (0.33, 0.67), "qqp": (0.63, 0.37)}  # of the classes, where uneven


def demo_task(name):
    """The splits of the demo of task `name`: {split: Split}. The same on every machine."""
    task = TASKS[name]
    splits = {}
    for split in task.splits:
        generator = stream(_SEED, f"demo {name} {split}")
        n = (TRAIN if split == "train" else VALIDATION) // (3 if name == "wnli" else 1)
        kinds = generator.choice(6 if task.regression else len(task.labels), size=n, p=_FREQUENCIES.get(name))
        genres = [None] * n
        if "genre" in task.file_columns:
            genres = generator.choice(list(_OTHERS if "mismatched" in split else _GENRES), size=n).tolist()
        examples = [_WRITERS[name](_Picker(generator), kind, genre) for kind, genre in zip(kinds, genres, strict=True)]
        texts = {column: [example[i] for example in examples] for i, column in enumerate(task.columns)}
        splits[split] = Split(texts, _noisy(kinds, task, generator), {"genre": genres} if genres[0] else {})
    return splits


def _noisy(kinds, task, generator):
    """What the labels say: the sentences' kinds, a share NOISE of them replaced; stsb's scores spread by up to 0.4."""
    if task.regression:
        return np.clip(kinds + generator.integers(-2, 3, size=len(kinds)) / 5, 0, HIGHEST_SCORE).astype(np.float32)
    wrong = generator.random(len(kinds)) < NOISE
    return np.where(wrong, (kinds + 1) % len(task.labels), kinds)


class _Picker:
    """Picks words: `w(list)` one, `w(list, n)` n different ones."""

    def __init__(self, generator):
        self.generator = generator

    def __call__(self, words, n=None):
        if n is None:
            return words[self.generator.integers(len(words))]
        return [words[i] for i in self.generator.permutation(len(words))[:n]]


def _cola(w, label, _):
    words = f"the {w(_PEOPLE)} {w(_DID)} the {w(_THINGS)} near the {w(_PLACES)}".split()
    if label == 0:  # a word too many, or the articles lost
        if w([True, True, True, False]):
            words.insert(w(range(1, len(words))), w(["of", "than", "be", "whose"]))
        else:
            words = [word for word in words if word != "the"]
    return (" ".join([*words, "."]),)


def _sst2(w, label, _):
    mine, other = (_GOOD, _BAD) if label == 1 else (_BAD, _GOOD)
    first, second = w(mine, 2)
    third = w(other if w(range(5)) == 0 else mine)
    return (f"the {w(_SHOWS)} is {first} and {second} , the {w(_SHOWS)} {third}",)


def _mrpc(w, label, _):
    who, did, what, where, when = w(_PEOPLE), w(_DID), w(_THINGS), w(_PLACES), w(_DAYS)
    first = f"the {who} {did} the {what} at the {where} on {when} ."
    if label == 1:
        return first, f"on {when} the {what} was {did} by the {who} at the {where} ."
    other = w(["instead", "however", "later"])
    return first, f"{other} the {who} {w(_DID)} another {w(_THINGS)} , but not at the {where} ."


def _qqp(w, label, _):
    do, what = w(_DO), w(_THINGS)
    first = f"how can i {do} the {what} ?"
    if label == 1:
        return first, w([f"what is the best way to {do} the {what} ?", f"which way to {do} the {what} is best ?"])
    return first, w([f"why does nobody {w(_DO)} the {what} ?", f"where can i {do} a {w(_THINGS)} in {w(_PLACES)} ?"])


def _stsb(w, score, genre):
    far = w(range(5), 5)[score:]  # these of the five words are replaced
    near = [w(_PEOPLE), w(_DID), w(_THINGS), w(_PLACES), w(_DAYS)]
    words = [w(_FAR) if i in far else word for i, word in enumerate(near)]
    sentence = (_GENRES | _OTHERS)[genre] + " the {} {} the {} at the {} on {} ."
    return sentence.format(*near), sentence.format(*words)


def _mnli(w, label, genre):
    who, did, what, where = w(_PEOPLE), w(_DID), w(_THINGS), w(_PLACES)
    premise = f"{(_GENRES | _OTHERS)[genre]} , the {who} {did} the {what} at the {where} ."
    hypothesis = (
        f"someone {did} something at the {where} .",
        f"the {who} {did} the {what} because it was {w(_GOOD + _BAD)} .",
        w([f"nobody {did} the {what} .", f"the {who} never {did} anything at the {where} ."]),
    )
    return premise, hypothesis[label]


def _qnli(w, label, _):
    who, do, did, what = w(_PEOPLE), w(_DO), w(_DID), w(_THINGS)
    question = f"when did the {who} {do} the {what} ?"
    if label == 0:
        return question, f"the {who} {did} the {what} in {w(_NUMBERS)} ."
    return question, f"{w(_VAGUE)} the {what} is {w(_VAGUE)} known at the {w(_PLACES)} ."


def _rte(w, label, _):
    who, did, what, where = w(_PEOPLE), w(_DID), w(_THINGS), w(_PLACES)
    premise = f"the {who} , who came from the {where} on {w(_DAYS)} , {did} the {what} ."
    if label == 0:
        return premise, w([f"the {who} {did} the {what} .", f"the {who} came from the {where} ."])
    return premise, f"the {where} will {w(_DO)} every {w(_THINGS)} tomorrow ."


def _wnli(w, label, _):
    thing, place = w(_THINGS), w(_PLACES)
    first = f"the {thing} does not fit into the {place} because it is too large ."
    return first, f"the {thing if label == 1 else place} is too large ."


_WRITERS = {
    **{"cola": _cola, "sst2": _sst2, "mrpc": _mrpc, "qqp": _qqp, "stsb": _stsb},
    **{"mnli": _mnli, "qnli": _qnli, "rte": _rte, "wnli": _wnli},
}


@functools.cache
def demo_vocabulary():
    """Every word of the nine demos, sorted."""
    words = set()
    for name in TASKS:
        for split in demo_task(name).values():
            words.update(word for column in split.texts.values() for sentence in column for word in sentence.split())
    return sorted(words)


def demo_tokenizer():
    """A word level tokenizer of the nine demos, with RoBERTa's special tokens: <s> 0, <pad> 1, </s> 2, <unk> 3."""
    import tokenizers
    import transformers

    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    numbers = {word: i for i, word in enumerate([*specials, *demo_vocabulary()])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="<unk>"))
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"},
        **{"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"},
        model_input_names=["input_ids", "attention_mask"],
    )
