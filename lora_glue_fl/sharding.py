"""Deals a task's training examples to clients, as a module or as a command; one manifest a client.

python lora_glue_fl/sharding.py --task_name sst2 --k 5 --mode iid --out_dir out/sst2_base/shards_iid_k5
python lora_glue_fl/sharding.py --task_name sst2 --k 5 --mode iid --out_dir shards --dataset demo      # offline

from sharding import make_client_splits, save_shard_manifests          # inside this folder
info = make_client_splits(task_name="sst2", k=5, mode="iid", seed=123)
save_shard_manifests("out/sst2_base/shards_iid_k5", info)

Clients count from 1 in files, as everywhere in this study's folders; indices are those of the task's train split.
"""

import re
from pathlib import Path

import numpy as np

from common import sharding
from common.checkpoint import read_json, write_json
from common.cli import SIZES, Parser, UsageError, parse, positive_float, positive_int, run_main, seed_number
from common.seeding import stream
from lora_glue_fl.data_prep import load_task
from lora_glue_fl.flags import add_data_flags, refuse

MODES = ("iid", "overlap", "category", "dirichlet")  # how examples are dealt to clients
BIN = 0.2  # of stsb's scores
RUN = 4  # words: as many in a row are hardly the same by chance
HELD_OUT = "held_out.json"
_CLIENT_FILE = re.compile(r"client_([1-9]\d*)\.json")


def make_client_splits(
    task_name,
    k,
    mode="iid",
    overlap_ratio=0.0,
    category_key=None,
    seed=42,
    bin_stsb=True,
    *,
    dirichlet_alpha=0.5,
    min_samples=1,
    sizes="dirichlet",
    max_examples=None,
    held_out_examples=0,
    dataset="glue",
    data_root=None,
):
    """The training examples of each of k clients.

    mode: "iid" (stratified by label; mnli by label and genre, where the data have it; stsb by bins of 0.2), "overlap"
    (iid, then a fraction `overlap_ratio` of each client's examples is drawn from all), "category" (whole categories
    round-robin), "dirichlet" (each label in proportions of `dirichlet_alpha`, at least `min_samples` a client; with
    sizes "equal" as `equal_parts`). category_key: "label" (the default), or another column such as "genre".
    bin_stsb: without it every score is a label. max_examples: deals a stratified subset. held_out_examples: sets some
    of the others apart, as `rest_of`. dataset, data_root: as `load_task`.

    Returns: {"client_indices": k sorted lists of int, "size_per_client", "total_train": size of the train split,
        "task", "mode", "meta": {seed, overlap_ratio, category_key, bin_stsb, ...}, "dataset", "fingerprint" (SHA-256
        of the train split), "notes": lines for the log, "held_out": list of int, only where asked for}.
    Raises: UsageError for an unknown task, mode or category_key, fewer examples than clients, a ratio out of range.
    """
    refuse(mode not in MODES, f"unknown --mode {mode!r}: choose one of {', '.join(MODES)}")
    data = load_task(task_name, dataset, data_root, splits=("train",))
    task, train = data.task, data.splits["train"]
    key = category_key or ("label" if mode == "category" else None)
    labels = whole_labels(task, train, bin_stsb)
    strata = _strata(task, train, labels)
    rows = subset(strata, max_examples, seed)
    held_out = {}
    if held_out_examples:
        held_out["held_out"] = rest_of(train, strata, rows, held_out_examples, seed).tolist()

    generator, what, notes, how = stream(seed, "sharding"), "examples", [], {}
    if mode == "iid":
        parts = sharding.stratified(strata[rows], k, generator, what)
    elif mode == "overlap":
        parts, notes = sharding.overlap(strata[rows], k, overlap_ratio, generator, what)
    elif mode == "category":
        there = ", ".join(["label", *train.categories])
        refuse(key not in there.split(", "), f"no column --category-key {key}: {task.name} has {there}")
        categories = labels if key == "label" else np.array(train.categories[key])
        parts, notes = sharding.category(categories[rows], k, generator, what)
    else:
        how = {"dirichlet_alpha": dirichlet_alpha, "min_samples": min_samples, "sizes": sizes}
        if sizes == "equal":
            sharding.check_counts(len(rows), k, what)
            parts = sharding.equal_parts(labels[rows], k, dirichlet_alpha, generator, "--dirichlet-alpha")
        else:
            called = {"what": what, "flag": "--dirichlet-alpha", "first": 1}
            parts, notes = sharding.dirichlet(labels[rows], k, dirichlet_alpha, generator, min_samples, **called)
    parts, meta = [rows[part].tolist() for part in parts], {"seed": int(seed), "overlap_ratio": overlap_ratio}
    return {
        "client_indices": parts,
        "size_per_client": [len(part) for part in parts],
        "total_train": len(train),
        "task": task.name,
        "mode": mode,
        "meta": {**meta, "category_key": key, "bin_stsb": bool(bin_stsb), "max_examples": max_examples, **how},
        "dataset": data.fingerprint["dataset"],
        "fingerprint": data.fingerprint["sha256"]["train"],
        "notes": [f"{len(rows)} of {len(train)} training examples are dealt", *notes],
        **held_out,
    }


def subset_of(data, n, seed):
    """`subset` of a `TaskData`'s training examples."""
    train = data.splits["train"]
    return subset(_strata(data.task, train, whole_labels(data.task, train)), n, seed)


def subset(strata, n, seed):
    """A stratified subset of n training examples (None: all), the same for the same seed: sorted int64 array."""
    if n is None or n >= len(strata):
        return np.arange(len(strata))
    return sharding.stratified(strata, [n, len(strata) - n], stream(seed, "subset"), "examples")[0]


def rest_of(train, strata, dealt, n, seed):
    """A stratified subset of n of the training examples that are not `dealt`, int64: sorted int64 array.

    Of each stratum those with RUN words in a row of a dealt one, or with fewer, fill up what the others leave missing:
    SST-2's phrases are parts of one another, and a rate that is chosen on parts of what clients train on rewards
    learning by heart.
    """
    rest = np.setdiff1d(np.arange(len(train)), dealt)
    shown = f"{len(rest)} of {len(train)} training examples are in no shard"
    refuse(n >= len(rest), f"--held-out-examples {n}: {shown}: lower it or --max-examples")
    strata, draws = strata[rest], stream(seed, "held out")
    some = sharding.stratified(strata, [n, len(rest) - n], draws, "examples")[0]
    order = draws.permutation(len(rest))
    order = order[np.argsort(shares_words(train, rest, dealt)[order], kind="stable")]
    counts = zip(*np.unique(strata[some], return_counts=True), strict=True)
    return np.sort(rest[np.concatenate([order[strata[order] == one][:count] for one, count in counts])])


def shares_words(train, rows, dealt):
    """bool [n]: which examples have RUN words in a row that a dealt one has, case and columns apart; or have fewer."""

    def runs(i):
        texts = [column[i].lower().split() for column in train.texts.values()]
        return {tuple(words[j : j + RUN]) for words in texts for j in range(len(words) - RUN + 1)}

    known = set().union(*map(runs, dealt))
    return np.array([not mine or not known.isdisjoint(mine) for mine in map(runs, rows)], dtype=bool)


def whole_labels(task, train, bin_stsb=True):
    """A whole number for each example: its class, or the bin of its score."""
    if not task.regression:
        return train.labels
    if bin_stsb:
        # 3.8 / 0.2 is 18.99... in floating point; the highest score is in the highest bin, not alone in one more
        return np.minimum(np.floor(train.labels.astype(np.float64) / BIN + 1e-6), round(5 / BIN) - 1).astype(np.int64)
    return np.unique(train.labels, return_inverse=True)[1]


def _strata(task, train, labels):
    """What iid keeps the proportions of: the label; mnli: label and genre."""
    if task.name != "mnli" or "genre" not in train.categories:
        return labels
    genres = np.unique(train.categories["genre"], return_inverse=True)[1]
    return genres * len(task.labels) + labels


# ---- manifests


def save_shard_manifests(out_dir, shard_info):
    """Writes out_dir/client_1.json ... client_k.json, held_out.json (if there is one) and summary.json.

    client_i.json: dataset (the task, as in the source), indices, and how they were dealt; summary.json: all of
    `shard_info`. Files of an earlier call are removed. Raises UsageError where the folder cannot be written.
    """
    folder, info = Path(out_dir), shard_info
    same = {"dataset": info["task"], "data": info["dataset"], "mode": info["mode"], **info["meta"]}
    same |= {key: info[key] for key in ("total_train", "fingerprint")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in (*client_files(folder).values(), folder / HELD_OUT):
            path.unlink(missing_ok=True)
        for i, indices in enumerate(info["client_indices"], 1):
            write_json(folder / f"client_{i}.json", {**same, "client": i, "indices": indices})
        if "held_out" in info:
            write_json(folder / HELD_OUT, {**same, "indices": info["held_out"]})
        write_json(folder / "summary.json", info)
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror}; choose another --out-dir") from error


def client_files(folder):
    """{number: path} of the clients' manifests in a folder, by number; {} where there is no folder."""
    folder = Path(folder)
    matches = [(_CLIENT_FILE.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def load_manifest(path, task=None, data=None):
    """A client's manifest, a dict with "indices": sorted int64 array.

    task: the name of the task that it must be of; data: a `TaskData` that it must fit, whose train split has these
    indices and its fingerprint (a manifest of the source has none: it cannot be checked).
    Raises UsageError when it is missing, unreadable, of another task or data, or has indices out of range or twice.
    """
    try:
        manifest = read_json(path)
        indices, there = np.array(manifest["indices"], dtype=np.int64), manifest["dataset"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{path} is no shard manifest ({type(error).__name__}): make it with sharding.py") from error
    other = f"{path} is of task {there}, not {task}: make shards of {task}, or give --task-name {there}"
    refuse(task not in (None, there), other)
    n, values = len(data.splits["train"]) if data else np.inf, np.unique(indices)
    odd = not len(values) or len(values) < indices.size or values[0] < 0 or values[-1] >= n
    refuse(odd, f"{path} has no indices, one twice, or one that is not below {n}: make the shards again")
    changed = data and manifest.get("fingerprint") not in (None, data.fingerprint["sha256"]["train"])
    refuse(changed, f"{path} was made from other data ({manifest.get('data')}): make the shards again from these data")
    return manifest | {"indices": values}


def load_shards(shard_dir, data):
    """The manifests of a folder, client 1 first.

    Raises UsageError as `load_manifest`, and when the folder is missing or empty, or a client's file is missing.
    """
    files = client_files(shard_dir)
    state = "has no client_1.json" if Path(shard_dir).is_dir() else "is missing"
    refuse(not files, f"shard folder {shard_dir} {state}: lora_glue_fl/sharding.py --out-dir {shard_dir} makes it")
    if absent := set(range(1, max(files))) - set(files):
        raise UsageError(f"shard folder {shard_dir} has client_{max(files)}.json but no client_{min(absent)}.json")
    return [load_manifest(path, data.task.name, data) for path in files.values()]


def load_held_out(shard_dir, data):
    """The examples of held_out.json, sorted int64 array, None where there is none. Raises as `load_manifest`."""
    path = Path(shard_dir) / HELD_OUT
    return load_manifest(path, data.task.name, data)["indices"] if path.exists() else None


# ---- the command


def build_parser():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--task-name", required=True, metavar="TASK", help="a GLUE task, such as sst2")
    add("--k", "--num-clients", type=positive_int, required=True, metavar="K", help="clients")
    add("--mode", choices=MODES, default="iid", help="how the examples are dealt")
    add("--out-dir", required=True, metavar="DIR", help="where the manifests go")
    add("--overlap-ratio", type=float, default=0.0, metavar="X", help="overlap: share drawn from all")
    add("--category-key", metavar="COLUMN", help="category: label or genre (default: label)")
    add("--dirichlet-alpha", type=positive_float, default=0.5, metavar="X", help="dirichlet: evenness")
    add("--min-samples", type=positive_int, default=1, metavar="N", help="dirichlet: least a client")
    text = "dirichlet: as many examples for all clients (equal), or as drawn"
    add("--sizes", choices=SIZES, default="dirichlet", help=text)
    add("--max-examples", type=positive_int, metavar="N", help="deal a stratified subset of N")
    text = "examples that no client gets; off: 0"
    add("--held-out-examples", type=positive_int, default=0, metavar="N", help=text)
    add("--seed", type=seed_number, default=42, metavar="N", help="random seed")
    add_data_flags(parser)
    return parser


def main(args):
    options = dict(vars(args))
    folder, _ = options.pop("out_dir"), options.pop("help_all")
    info = make_client_splits(**options)
    save_shard_manifests(folder, info)
    for note in info["notes"]:
        print(note)
    print(f"Client sizes: {info['size_per_client']}")
    print(folder)


if __name__ == "__main__":
    args = parse(build_parser())
    run_main(main, args)
