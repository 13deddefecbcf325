"""Which client has which training text; as a script, what train.py's flags give each client, as JSON.

    python llm_noniid/partition.py --dataset demo --partition topic_skew --alpha 0.1

A word is a run of letters, digits, inner apostrophes and hyphens, in lower case. Partitions know no tokens: the same
texts go to the same clients whatever the tokenizer.
"""

import itertools
import json
import re
from collections import Counter

import numpy as np

from common import sharding
from common.cli import UsageError, checked, run_main
from common.seeding import stream
from llm_noniid import flags
from llm_noniid.data import load_texts

HELD_OUT = 10  # one of so many of a client's texts is not trained on: what its model is judged by
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_PUNCTUATION = re.compile(r"[^\w\s]|_")


def partition(a, texts):
    """The training texts of `Texts` dealt to --num-clients by the flags `a`: disjoint, complete, --min-samples a client
    at least, and 2: one to train on, one to be judged by.

    iid: at random, in equal parts. topic_skew: each topic in proportions drawn from Dirichlet(--alpha)
    (`common.sharding.dirichlet`; sizes differ too), or with --sizes equal as `equal_parts`. style_skew, token_skew:
    equal slices of the texts in the order of a score (`scores`), the first client has the lowest; texts with equal
    scores stand in random order.

    Returns: (list of sorted int64 arrays, notes: lines for the log). Raises: UsageError for too few texts.
    """
    n, k, least = len(texts.splits["train"]), a.num_clients, max(2, a.min_samples)
    if n < k * least:
        raise UsageError(f"{n} texts cannot give {k} clients {least} each: lower --num-clients or --min-samples")
    labels, generator = texts.labels["train"], stream(a.seed, "partition")
    if a.partition == "iid":
        return sharding.iid(n, k, generator), []
    if a.partition == "topic_skew" and a.sizes == "equal":
        return sharding.equal_parts(labels, k, a.alpha, generator), []
    if a.partition == "topic_skew":
        return sharding.dirichlet(labels, k, a.alpha, generator, least, "texts")
    values = scores(texts.splits["train"], a.style_criterion if a.partition == "style_skew" else a.skew_type)
    # Not in the corpus' order, which may be by topic
    order = np.lexsort([generator.permutation(n), values])
    return [np.sort(order[part]) for part in sharding.contiguous(n, k)], []


def clients_of(a, texts):
    """(rows, held, notes) of the flags `a`: of each client's texts those that it trains on, and a tenth that it is
    judged by; `partition`'s notes."""
    rows, held = [], []
    parts, notes = partition(a, texts)
    for k, part in enumerate(parts):
        order = stream(a.seed, "held out", 0, k).permutation(len(part))
        n = max(1, len(part) // HELD_OUT)
        held.append(np.sort(part[order[:n]]))
        rows.append(np.sort(part[order[n:]]))
    return rows, held, notes


def words(text):
    """The words of a text in lower case."""
    return _WORD.findall(text.lower())


def scores(texts, criterion):
    """What style_skew and token_skew sort the texts by: fp64 [n].

    length: words. formality: punctuation marks and symbols per character. complexity: mean word length in characters.
    frequency: mean over the text's words of their share of all words of `texts`. truncation: length in characters.
    vocabulary: different words per word. A text without words has length, complexity, frequency and vocabulary 0.
    """
    if criterion == "formality":
        return np.array([len(_PUNCTUATION.findall(text)) / max(1, len(text)) for text in texts])
    if criterion == "truncation":
        return np.array([len(text) for text in texts], dtype=np.float64)
    of_texts = [words(text) for text in texts]
    counts = np.array([len(these) for these in of_texts], dtype=np.float64)
    if criterion == "length":
        return counts
    if criterion == "complexity":
        sums = [sum(map(len, these)) for these in of_texts]
    elif criterion == "vocabulary":
        sums = [len(set(these)) for these in of_texts]
    else:
        every = list(itertools.chain.from_iterable(of_texts))
        times = Counter(every)
        shares = np.array([times[word] for word in every]) / max(1, len(every))
        sums = np.bincount(np.repeat(np.arange(len(texts)), counts.astype(np.int64)), shares, len(texts))
    return np.array(sums) / np.maximum(counts, 1)


def statistics(texts, rows, held):
    """The clients' training texts as JSON values; rows, held: which of them each client trains on, and is judged by.

    label_histograms: [K, topics], of both. commonest_topic_accuracy: of always saying the topic that is commonest in a
    client's rows, on its held texts; mean over clients.
    """
    labels, classes = texts.labels["train"], len(texts.label_names)
    learnt, judged = (sharding.class_counts(parts, labels, classes) for parts in (rows, held))
    right = judged[np.arange(len(rows)), learnt.argmax(1)] / judged.sum(1)
    return {
        "label_names": list(texts.label_names),
        "label_histograms": (learnt + judged).tolist(),
        "commonest_topic_accuracy": float(right.mean()),
    }


def main(args):
    texts = load_texts(args.dataset, args.data_root, args.max_samples, args.seed)
    print(json.dumps(statistics(texts, *clients_of(args, texts)[:2])))


if __name__ == "__main__":
    run_main(main, checked(flags.parse, flags.build_parser(__doc__.split("\n")[0])))
