"""The clients' shares of a task's training examples, dealt and as files: one manifest a client.

Clients count from 1 in files, as everywhere in this study's folders; indices are those of the task's train split.
"""

import re
from pathlib import Path

import numpy as np

from common import sharding
from common.checkpoint import read_json, write_json
from common.cli import UsageError
from common.seeding import stream
from common.sharding import equal_parts
from lora_glue_fl.flags import MODES
from lora_glue_fl.glue_data import load_task

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
    cache_dir=None,
    data=None,
):
    """The training examples of each of k clients.

    mode: "iid" (stratified by label; mnli by label and genre, where the data have it; stsb by bins of 0.2),
    "overlap" (iid, then a fraction `overlap_ratio` of each client's examples is drawn from all), "category" (whole
    categories round-robin), "category_overlap", "dirichlet" (each label in proportions of `dirichlet_alpha`, at
    least `min_samples` a client; with sizes "equal" as `sharding.equal_parts`). category_key: "label" (the default), or
    another column such as "genre". bin_stsb: without it every score of stsb is a label of its own. max_examples: deals
    a stratified subset of so many. held_out_examples: sets a stratified subset of the others apart, as `rest_of`.
    dataset, data_root, cache_dir: as `load_task`; data: a `TaskData` that is loaded already.

    Returns: {"client_indices": k sorted lists of int, "size_per_client", "total_train": size of the train split,
        "task", "mode", "meta": {seed, overlap_ratio, category_key, bin_stsb, ...}, "dataset", "fingerprint" (SHA-256
        of the train split), "notes": lines for the log, "held_out": list of int, only where asked for}.
    Raises: UsageError for an unknown task, mode or category_key, fewer examples than clients, a ratio out of range.
    """
    if mode not in MODES:
        raise UsageError(f"unknown --mode {mode!r}: choose one of {', '.join(MODES)}")
    data = data or load_task(task_name, dataset, data_root, splits=("train",))
    task, train = data.task, data.splits["train"]
    key = (category_key or "label") if mode.startswith("category") else category_key
    notes = [note for note in data.notes if " train" in note]
    rows = subset(data, max_examples, seed, bin_stsb)
    if len(rows) < len(train):
        notes.append(f"{len(rows)} of {len(train)} training examples are dealt")
    held_out = rest_of(data, rows, held_out_examples, seed, bin_stsb)
    if known := int(shares_words(train, held_out, rows).sum() if held_out_examples else 0):
        notes.append(f"{known} of {held_out_examples} held-out examples are short or share {RUN} words with a client's")

    generator, what, more = stream(seed, "sharding"), "examples", []
    if mode == "iid":
        parts = sharding.stratified(_strata(task, train, bin_stsb)[rows], k, generator, what)
    elif mode == "overlap":
        strata = _strata(task, train, bin_stsb)[rows]
        parts, more = sharding.overlap(strata, k, overlap_ratio, generator, what)
    elif mode == "dirichlet":
        labels = whole_labels(task, train, bin_stsb)[rows]
        called = {"what": what, "flag": "--dirichlet-alpha", "first": 1}
        if sizes == "equal":
            sharding.check_counts(len(labels), k, what)
            parts = equal_parts(labels, k, dirichlet_alpha, generator, called["flag"])
        else:
            parts, more = sharding.dirichlet(labels, k, dirichlet_alpha, generator, min_samples, **called)
    elif mode == "category":
        parts, more = sharding.category(_categories(task, train, key, bin_stsb)[rows], k, generator, what)
    else:
        categories = _categories(task, train, key, bin_stsb)[rows]
        parts, more = sharding.category_overlap(categories, k, overlap_ratio, generator, what)
    parts = [rows[part] for part in parts]
    return {
        "client_indices": [part.tolist() for part in parts],
        "size_per_client": [len(part) for part in parts],
        "total_train": len(train),
        "task": task.name,
        "mode": mode,
        "meta": {
            "seed": int(seed),
            "overlap_ratio": overlap_ratio,
            "category_key": key,
            "bin_stsb": bool(bin_stsb),
            "dirichlet_alpha": dirichlet_alpha if mode == "dirichlet" else None,
            "min_samples": min_samples if mode == "dirichlet" else None,
            "sizes": sizes if mode == "dirichlet" else None,
            "max_examples": max_examples,
        },
        "dataset": data.fingerprint["dataset"],
        "fingerprint": data.fingerprint["sha256"]["train"],
        "notes": notes + more,
    } | ({"held_out": held_out.tolist()} if held_out_examples else {})


def subset(data, n, seed, bin_stsb=True):
    """A stratified subset of n training examples (None: all), the same for the same seed: sorted int64 array."""
    train = data.splits["train"]
    if n is not None and n < 1:
        raise UsageError(f"--max-examples {n} must be at least 1")
    if n is None or n >= len(train):
        return np.arange(len(train))
    sizes = [n, len(train) - n]
    return sharding.stratified(_strata(data.task, train, bin_stsb), sizes, stream(seed, "subset"), "examples")[0]


def rest_of(data, dealt, n, seed, bin_stsb=True):
    """A stratified subset of n of the training examples that are not `dealt`, int64: sorted int64 array.

    Of each stratum those with RUN words in a row of a dealt one, or with fewer, fill up what the others leave missing:
    SST-2's phrases are parts of one another, and a rate that is chosen on parts of what clients train on rewards
    learning by heart.
    """
    train = data.splits["train"]
    rest = np.setdiff1d(np.arange(len(train)), dealt)
    if n > len(rest):
        raise UsageError(
            f"--held-out-examples {n}: {len(rest)} of {len(train)} training examples are in no shard: lower it or "
            "--max-examples"
        )
    if n in (0, len(rest)):
        return rest[:n]
    strata, draws = _strata(data.task, train, bin_stsb)[rest], stream(seed, "held out")
    some = sharding.stratified(strata, [n, len(rest) - n], draws, "examples")[0]
    order = draws.permutation(len(rest))
    order = order[np.argsort(shares_words(train, rest, dealt)[order], kind="stable")]
    chosen = [
        order[strata[order] == one][:count]
        for one, count in zip(*np.unique(strata[some], return_counts=True), strict=True)
    ]
    return np.sort(rest[np.concatenate(chosen)])


def shares_words(train, rows, dealt):
    """bool [n]: which examples have RUN words in a row that a dealt one has, case and columns apart; or have fewer."""

    def runs(i):
        for column in train.texts.values():
            words = column[i].lower().split()
            yield from (tuple(words[j : j + RUN]) for j in range(len(words) - RUN + 1))

    known = {run for i in dealt for run in runs(i)}

    def shares(i):
        mine = set(runs(i))
        return not mine or not known.isdisjoint(mine)

    return np.array([shares(i) for i in rows], dtype=bool)


def whole_labels(task, train, bin_stsb):
    """A whole number for each example: its class, or the bin of its score."""
    if not task.regression:
        return train.labels
    if bin_stsb:
        # 3.8 / 0.2 is 18.99... in floating point; the highest score is in the highest bin, not alone in one more
        return np.minimum(np.floor(train.labels.astype(np.float64) / BIN + 1e-6), round(5 / BIN) - 1).astype(np.int64)
    return np.unique(train.labels, return_inverse=True)[1]


def _strata(task, train, bin_stsb):
    """What iid keeps the proportions of: the label; mnli: label and genre."""
    labels = whole_labels(task, train, bin_stsb)
    if task.name != "mnli" or "genre" not in train.categories:
        return labels
    genres = np.unique(train.categories["genre"], return_inverse=True)[1]
    return genres * len(task.labels) + labels


def _categories(task, train, key, bin_stsb):
    if key in ("label", "labels", "score"):
        return whole_labels(task, train, bin_stsb)
    columns = {**train.texts, **train.categories}
    if key not in columns:
        raise UsageError(
            f"--category-key {key} is no column of {task.name}: choose one of {', '.join(['label', *columns])}"
        )
    return np.array(columns[key])


# ---------------------------------------------------------------------------------------------- manifests


def save_shard_manifests(out_dir, shard_info):
    """Writes out_dir/client_1.json ... client_k.json, held_out.json (if there is one) and summary.json, each whole or
    not at all.

    client_i.json: dataset (the task, as in the source), indices, task, data ("glue" or "demo"), seed, total_train,
    fingerprint; held_out.json: the same without client; summary.json: all of `shard_info`. Files of an earlier call
    that this one does not write are removed.
    Raises UsageError where the folder cannot be written.
    """
    folder = Path(out_dir)
    k = len(shard_info["client_indices"])
    same = {
        "dataset": shard_info["task"],
        "task": shard_info["task"],
        "data": shard_info["dataset"],
        "mode": shard_info["mode"],
        **{key: shard_info["meta"].get(key) for key in ("dirichlet_alpha", "sizes", "overlap_ratio", "category_key")},
        "seed": shard_info["meta"]["seed"],
        "total_train": shard_info["total_train"],
        "fingerprint": shard_info["fingerprint"],
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").unlink(missing_ok=True)  # while it is missing, the folder is not complete
        (folder / HELD_OUT).unlink(missing_ok=True)
        for number, path in client_files(folder):
            if number > k:
                path.unlink()
        for i, indices in enumerate(shard_info["client_indices"], 1):
            write_json(folder / f"client_{i}.json", {**same, "client": i, "indices": indices})
        if "held_out" in shard_info:
            write_json(folder / HELD_OUT, {**same, "indices": shard_info["held_out"]})
        write_json(folder / "summary.json", shard_info)
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror}; choose another --out-dir") from error


def client_files(folder):
    """[(number, path)] of the clients' manifests in a folder, by number."""
    matches = [(_CLIENT_FILE.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in matches if match)


def load_manifest(path, data=None, task_name=None):
    """A client's manifest, a dict with "indices": sorted int64 array.

    data: a `TaskData` that it must fit: its task, indices in range, and the fingerprint of the train split (a
    manifest of the source has none: it cannot be checked). task_name: the task alone.
    Raises UsageError, with the file's name, when it is missing, unreadable, of another task or other data, or has
    indices that are out of range, twice there or missing.
    """
    path = Path(path)
    try:
        manifest = read_json(path)
        indices = manifest["indices"]
        task = manifest.get("task") or manifest["dataset"]
    except FileNotFoundError:
        raise UsageError(f"no shard manifest {path}: make it with sharding.py") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} is no shard manifest ({type(error).__name__}): make it again") from error
    wanted = data.task.name if data else task_name
    if wanted is not None and task != wanted:
        raise UsageError(f"{path} is of task {task}, not {wanted}: make shards of {wanted}, or give --task-name {task}")
    whole = isinstance(indices, list) and all(type(i) is int for i in indices)
    if not whole or not indices:
        odd = "no indices" if whole else "indices that are not whole numbers"
        raise UsageError(f"{path} has {odd}: make the shards again")
    # Ahead of numpy, which has no room for a number above 2^63
    limit = len(data.splits["train"]) if data else 2**62
    wrong = [i for i in indices if not 0 <= i < limit]
    if wrong:
        raise UsageError(
            f"{path}: index {wrong[0]} is outside the training examples 0 to {limit - 1} of {task}: make the shards "
            "again from these data"
        )
    values, counts = np.unique(np.array(indices, dtype=np.int64), return_counts=True)
    if len(values) < len(indices):
        raise UsageError(f"{path}: index {values[counts > 1][0]} stands there twice: make the shards again")
    if data and manifest.get("fingerprint") not in (None, data.fingerprint["sha256"]["train"]):
        raise UsageError(
            f"{path} was made from other data ({manifest.get('data') or 'unknown'}, fingerprint "
            f"{str(manifest['fingerprint'])[:12]}, here {data.fingerprint['sha256']['train'][:12]}): make the shards "
            "again from these data"
        )
    return {**manifest, "task": task, "indices": values}


def check_disjoint(paths, manifests):
    """Raises UsageError where an example belongs to two clients of a `mode` that gives each to one."""
    seen = {}
    for path, manifest in zip(paths, manifests, strict=True):
        for i in manifest["indices"].tolist() if manifest.get("mode") in ("iid", "category", "dirichlet") else ():
            if seen.setdefault(i, path) != path:
                raise UsageError(
                    f"index {i} is in {seen[i]} and in {path}, but --mode {manifest['mode']} deals each example once: "
                    "make the shards again"
                )


def load_shards(shard_dir, data):
    """The manifests of a folder, client 1 first.

    Raises UsageError as `load_manifest`, and when the folder is missing or empty, or a client's file is missing, is of
    another dealing than the first, or does not fit summary.json (where that is there).
    """
    folder = Path(shard_dir)
    files = client_files(folder) if folder.is_dir() else []
    if not files:
        state = "has no client_1.json" if folder.is_dir() else "is missing"
        raise UsageError(f"shard folder {folder} {state}: python lora_glue_fl/sharding.py --out-dir {folder} makes it")
    numbers = [number for number, _ in files]
    if numbers != list(range(1, len(files) + 1)):
        absent = min(set(range(1, numbers[-1])) - set(numbers))
        raise UsageError(f"shard folder {folder} has client_{numbers[-1]}.json but no client_{absent}.json")
    manifests = [load_manifest(path, data) for _, path in files]
    first = manifests[0]
    for (_, path), each in zip(files, manifests, strict=True):
        for key in ("seed", "mode"):  # the source's have none
            if each.get(key) != first.get(key):
                shown = f"{path} has {key} {each.get(key)}, client_1.json {first.get(key)}"
                raise UsageError(f"{shown}: make the shards again")
    check_disjoint([path for _, path in files], manifests)
    summary = folder / "summary.json"
    if summary.is_file():
        try:
            saved = read_json(summary)
            sizes = saved["size_per_client"]
            dealt = [sorted(part) for part in saved.get("client_indices", [])]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(f"{summary} is damaged ({type(error).__name__}): make the shards again") from error
        rows = [manifest["indices"].tolist() for manifest in manifests]
        if sizes != [len(mine) for mine in rows] or dealt and dealt != rows:
            raise UsageError(f"{summary} does not fit the {len(files)} client files beside it: make the shards again")
    return manifests


def load_held_out(shard_dir, data, shards):
    """The examples of held_out.json beside the `shards`, sorted int64 array, None where there is none.

    Raises UsageError as `load_manifest`, and for an example that a client has.
    """
    path = Path(shard_dir) / HELD_OUT
    if not path.exists():
        return None
    rows = load_manifest(path, data)["indices"]
    both = np.intersect1d(rows, np.concatenate([shard["indices"] for shard in shards]))
    if len(both):
        raise UsageError(f"index {both[0]} is in {path} and in a client's file: make the shards again")
    return rows
