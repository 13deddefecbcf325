"""Shards of GLUE tasks: modes, manifests, refusals, the command."""

import importlib
import json
import sys
from contextlib import nullcontext

import harness
import numpy as np
import pytest

from common.checkpoint import read_json, write_json
from common.cli import UsageError
from common.sharding import check
from lora_glue_fl import shards
from lora_glue_fl.glue_data import load_task
from lora_glue_fl.glue_tasks import TASKS
from lora_glue_fl.shards import load_held_out, load_manifest, load_shards, make_client_splits, save_shard_manifests


def demo(task, k, mode="iid", **more):
    return make_client_splits(task, k, mode, dataset="demo", **more)


def parts_of(info):
    return [np.array(part) for part in info["client_indices"]]


@pytest.mark.parametrize(
    "task, mode",
    [*((task, "iid") for task in TASKS), ("mnli", "category"), ("cola", "dirichlet"), ("stsb", "dirichlet")],
)
def test_partitions_of_every_task(task, mode):
    info = demo(task, 5, mode, seed=1)
    check(parts_of(info), info["total_train"])
    assert info["size_per_client"] == [len(part) for part in info["client_indices"]]
    assert (info["task"], info["mode"], info["dataset"]) == (task, mode, "demo")
    assert info == json.loads(json.dumps(info))  # JSON values only
    assert info == demo(task, 5, mode, seed=1) and info["client_indices"] != demo(task, 5, mode)["client_indices"]


@pytest.mark.parametrize("task, source", [("cola", "demo"), ("mnli", "demo"), ("mnli", "hub"), ("stsb", "demo")])
def test_iid_keeps_labels_mnlis_genres_and_bins_of_scores(task, source):
    data = load_task(task, "demo", splits=["train"])
    train = data.splits["train"]
    if source == "hub":
        train.categories.clear()  # it has no genres
    labels = np.floor(train.labels / 0.2 + 1e-4).clip(max=24) if task == "stsb" else train.labels
    genres = train.categories["genre"] if task == "mnli" and source == "demo" else [""] * len(train)
    keys = np.array([f"{label} {genre}" for label, genre in zip(labels, genres, strict=True)])
    parts = parts_of(make_client_splits(task, 7, data=data))
    assert max(np.ptp([(keys[part] == key).sum() for part in parts]) for key in np.unique(keys)) <= 1


def test_bins_of_scores():
    data = load_task("stsb", "demo", splits=["train"])
    train = data.splits["train"]
    object.__setattr__(train, "labels", np.array([0.0, 0.19, 0.2, 0.6, 3.8, 4.79, 4.8, 5.0], dtype=np.float32))
    assert shards.whole_labels(data.task, train, True).tolist() == [0, 0, 1, 3, 19, 23, 24, 24]
    assert shards.whole_labels(data.task, train, False).tolist() == list(range(8))


def test_the_sources_examples():
    info = demo("sst2", 5, "category", category_key="label", seed=42)  # two labels, five clients
    labels = load_task("sst2", "demo").splits["train"].labels
    assert all(len(set(labels[part])) == 1 for part in parts_of(info))
    info = demo("sst2", 5, "overlap", overlap_ratio=0.2, seed=42)
    assert info["meta"]["overlap_ratio"] == 0.2 and sum(info["size_per_client"]) == 1200
    assert len(set(sum(info["client_indices"], []))) < 1200
    info = demo("sst2", 2, "category_overlap", category_key="label", overlap_ratio=0.15, seed=123)
    shares = [labels[part].mean() for part in parts_of(info)]
    assert sorted(round(share) for share in shares) == [0, 1] and all(0 < share < 1 for share in shares)
    assert {"seed", "overlap_ratio", "category_key", "bin_stsb"} <= set(info["meta"])


def test_notes_count_clients_from_1():
    info = demo("rte", 10, "dirichlet", dirichlet_alpha=0.01, min_samples=3)
    clients = [int(c) for c in info["notes"][0].split("clients ")[-1].split(", ")]
    assert len(clients) > 2 and all(info["size_per_client"][c - 1] == 3 for c in clients)  # filled up, no further
    assert not all(info["size_per_client"][c] == 3 for c in clients)


def test_equal_sizes_have_unequal_labels():
    info = demo("sst2", 7, "dirichlet", dirichlet_alpha=0.05, sizes="equal", seed=3, max_examples=600)
    labels = load_task("sst2", "demo").splits["train"].labels
    shares = [labels[part].mean() for part in parts_of(info)]
    assert set(info["size_per_client"]) == {85, 86} and len(set(sum(info["client_indices"], []))) == 600
    assert sum(0.02 < share < 0.98 for share in shares) <= 2 and 0.4 < np.mean(shares) < 0.6
    even = demo("sst2", 7, "dirichlet", dirichlet_alpha=1e6, sizes="equal", seed=3)
    assert max(abs(labels[part].mean() - labels.mean()) for part in parts_of(even)) < 0.01
    assert [info["meta"]["sizes"], demo("sst2", 3)["meta"]["sizes"]] == ["equal", None]
    with pytest.raises(UsageError, match="--dirichlet-alpha 0 must"):
        demo("rte", 2, "dirichlet", dirichlet_alpha=0, sizes="equal")
    with pytest.raises(UsageError, match="80 examples cannot be dealt to 90 clients"):
        demo("sst2", 90, "dirichlet", sizes="equal", max_examples=80)


def test_categories_by_genre_and_unknown_columns():
    genres = np.array(load_task("mnli", "demo").splits["train"].categories["genre"])
    info = demo("mnli", 5, "category", category_key="genre")
    assert sorted(set(genres[part]).pop() for part in parts_of(info)) == sorted(set(genres))
    assert all(len(set(genres[part])) == 1 for part in parts_of(info))
    with pytest.raises(UsageError, match="--category-key genre is no column of rte: .* label, sentence1, sentence2"):
        demo("rte", 3, "category", category_key="genre")


def test_a_stratified_subset():
    info = demo("cola", 4, max_examples=200)
    indices = sum(info["client_indices"], [])
    labels = load_task("cola", "demo").splits["train"].labels
    assert info["size_per_client"] == [50] * 4 and len(set(indices)) == 200 and info["total_train"] == 1200
    assert labels[indices].mean() == pytest.approx(labels.mean(), abs=0.006)
    assert max(indices) > 1100 and "200 of 1200 training examples are dealt" in info["notes"]
    assert demo("cola", 4, max_examples=5000)["size_per_client"] == [300] * 4


def test_held_out_examples_are_stratified_and_no_clients():
    plain, info = (demo("cola", 4, max_examples=200, held_out_examples=n) for n in (0, 300))
    labels = load_task("cola", "demo").splits["train"].labels
    held = info["held_out"]
    assert info["client_indices"] == plain["client_indices"] and "held_out" not in plain
    assert len(held) == len(set(held)) == 300 and held == sorted(held)
    assert not set(held) & set(sum(info["client_indices"], []))
    assert labels[held].mean() == pytest.approx(labels.mean(), abs=0.004)
    assert demo("cola", 4, max_examples=200, held_out_examples=300) == info
    every = demo("cola", 4, max_examples=200, held_out_examples=1000)
    assert sorted(every["held_out"] + sum(every["client_indices"], [])) == list(range(1200))
    assert any("held-out examples are short or share 4 words with a client's" in note for note in every["notes"])


def test_held_out_examples_are_no_parts_of_clients():
    data = load_task("sst2", "demo", splits=["train"])
    train = data.splits["train"]
    dealt = "A film that nobody has to see twice"
    texts = [
        dealt,
        "that nobody has to forget",
        "THAT nobody has to",
        "nobody has to sit",
        "see twice",
        "one of its kind",
    ]
    train.texts["sentence"][:] = [*texts, *["it has no such words"] * (len(train) - 6)]
    rows = np.arange(1, 7)
    assert shards.shares_words(train, rows, [0]).tolist() == [True, True, False, True, False, False]
    half, most = (shards.rest_of(data, np.array([0]), n, 0).tolist() for n in (len(train) // 2, len(train) - 3))
    assert not {1, 2, 4} & set(half) and len(half) == len(set(half)) == len(train) // 2
    assert {1, 2, 4} & set(most) and len(most) == len(train) - 3  # too few without


@pytest.mark.parametrize(
    "words, task, k, mode, more",
    [
        ("unknown --mode 'even'", "rte", 2, "even", {}),
        ("400 examples .* 401 clients", "wnli", 401, "category", {}),
        ("--dirichlet-alpha 0 must", "rte", 2, "dirichlet", {"dirichlet_alpha": 0}),
        ("0 clients", "rte", 0, "iid", {}),
        ("--max-examples 0", "rte", 2, "iid", {"max_examples": 0}),
        ("--held-out-examples 1: 0 of 1200 .* lower it or", "rte", 2, "iid", {"held_out_examples": 1}),
    ],
)
def test_what_cannot_be_dealt(words, task, k, mode, more):
    """As a module; what the command refuses is in tests/test_refusals.py."""
    with pytest.raises(UsageError, match=words):
        demo(task, k, mode, **more)


# ---------------------------------------------------------------------------------------------- manifests


@pytest.fixture
def saved(tmp_path):
    """(folder, data): shards of the demo's rte, three clients."""
    save_shard_manifests(tmp_path / "shards", demo("rte", 3, seed=7))
    return tmp_path / "shards", load_task("rte", "demo")


def change(path, **values):
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def refused(match, path, data=None, **more):
    with pytest.raises(UsageError, match=match) as error:
        load_manifest(path, data, **more)
    assert "\n" not in str(error.value) and path.name in str(error.value)


def test_manifests_come_back(tmp_path):
    info, data, folder = demo("rte", 12, seed=7), load_task("rte", "demo"), tmp_path
    save_shard_manifests(folder, info)
    assert {p.name for p in folder.iterdir()} == {*(f"client_{i}.json" for i in range(1, 13)), "summary.json"}
    found = load_shards(folder, data)
    assert [shard["indices"].tolist() for shard in found] == info["client_indices"]
    assert [shard["client"] for shard in found] == list(range(1, 13))  # not as names sort: 1, 10, 11, 2
    for shard in found:
        assert shard["dataset"] == shard["task"] == "rte" and shard["seed"] == 7 and shard["data"] == "demo"
        assert shard["fingerprint"] == data.fingerprint["sha256"]["train"]
    assert json.loads((folder / "summary.json").read_text()) == info


def test_fewer_clients_leave_no_old_ones(saved):
    folder, data = saved
    (folder / "notes.txt").write_text("mine")
    save_shard_manifests(folder, demo("rte", 2))
    assert sorted(p.name for p in folder.iterdir()) == ["client_1.json", "client_2.json", "notes.txt", "summary.json"]
    assert len(load_shards(folder, data)) == 2


def test_held_out_examples_have_a_manifest_of_their_own(saved):
    folder, data = saved
    assert load_held_out(folder, data, load_shards(folder, data)) is None
    info = demo("rte", 3, max_examples=90, held_out_examples=20)
    save_shard_manifests(folder, info)
    shards = load_shards(folder, data)
    assert load_held_out(folder, data, shards).tolist() == info["held_out"] and len(shards) == 3
    change(folder / "held_out.json", indices=[*info["held_out"], both := info["client_indices"][1][0]])
    with pytest.raises(UsageError, match=f"index {both} is in .*held_out.json and in a client's file"):
        load_held_out(folder, data, shards)
    save_shard_manifests(folder, demo("rte", 3))
    assert not (folder / "held_out.json").exists()


def test_a_manifest_of_the_source_is_read(tmp_path):
    path = tmp_path / "client_1.json"
    path.write_text(json.dumps({"dataset": "rte", "indices": [5, 3, 1199]}))
    data = load_task("rte", "demo")
    assert load_shards(tmp_path, data)[0]["indices"].tolist() == [3, 5, 1199]
    assert len(load_manifest(path)["indices"]) == 3  # without data: counts for a merge


def test_manifests_that_do_not_fit_are_refused_by_name(saved):
    folder, data = saved
    path = folder / "client_2.json"
    good = path.read_text()
    refused("is of task rte, not mrpc", path, load_task("mrpc", "demo"))
    refused("is of task rte, not mrpc", path, task_name="mrpc")
    for indices, match in (
        ([0, 1200], "index 1200 is outside the training examples 0 to 1199"),
        ([-1, 0], "index -1 is outside"),
        ([2**70], f"index {2**70} is outside"),
        ([3, 4, 3], "index 3 stands there twice"),
        ([], "no indices"),
        ([1.5], "not whole numbers"),
        ([True], "not whole numbers"),
        ("12", "not whole numbers"),
        ({"1": 2}, "not whole numbers"),
    ):
        change(path, indices=indices)
        refused(match, path, data)
    path.write_text(good)
    change(path, fingerprint="0" * 64)
    refused(r"was made from other data \(demo, fingerprint 000000000000, here", path, data)
    for text in (good[:-40], "[]", '{"dataset": "rte"}', "3", "[" * 100_000, "\udcff"):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        refused("is no shard manifest", path, data)
    path.unlink()
    refused("no shard manifest", path, data)


def test_an_example_of_two_clients_is_refused_where_each_is_dealt_once(tmp_path):
    data = load_task("sst2", "demo")
    for mode, refused in (("iid", True), ("overlap", False)):
        save_shard_manifests(tmp_path / mode, make_client_splits("sst2", 2, mode, data=data, overlap_ratio=0.0))
        first, second = (tmp_path / mode / f"client_{k}.json" for k in (1, 2))
        other = read_json(second)["indices"]
        about = read_json(first)
        (tmp_path / mode / "summary.json").unlink()
        write_json(first, {**about, "indices": [*about["indices"][1:], other[0]]})
        with pytest.raises(UsageError, match=f"index {other[0]} is in ") if refused else nullcontext():
            load_shards(tmp_path / mode, data)


def test_folders_that_are_no_shards(saved, tmp_path):
    folder, data = saved

    def refuse_folder(path, match):
        with pytest.raises(UsageError, match=match) as error:
            load_shards(path, data)
        assert str(path) in str(error.value)

    refuse_folder(tmp_path / "none", "is missing")
    (tmp_path / "empty").mkdir()
    refuse_folder(tmp_path / "empty", "has no client_1.json")
    two, three = folder / "client_2.json", folder / "client_3.json"
    rows, others = (json.loads(path.read_text())["indices"] for path in (two, three))
    change(two, seed=3)
    refuse_folder(folder, "client_2.json has seed 3, client_1.json 7")
    change(two, seed=7, indices=sorted([*others[:1], *rows[1:]]))  # as many of another dealing
    change(three, indices=sorted([*rows[:1], *others[1:]]))
    refuse_folder(folder, "summary.json does not fit the 3 client files")
    two.rename(folder / "client_4.json")
    refuse_folder(folder, "client_4.json but no client_2.json")
    (folder / "client_4.json").unlink()
    (folder / "client_3.json").unlink()
    refuse_folder(folder, "summary.json does not fit the 1 client files")
    (folder / "summary.json").write_text("{")
    refuse_folder(folder, "summary.json is damaged")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write .*file"):
        save_shard_manifests(tmp_path / "file", demo("wnli", 2))


# ------------------------------------------------------------------------------------------------ command


def test_the_command_from_the_root_and_the_module_from_inside(tmp_path, monkeypatch):
    words = f"--task_name sst2 --k 5 --mode iid --out_dir {tmp_path}/a --dataset demo --seed 123".split()
    ended = harness.run(["lora_glue_fl/sharding.py", *words])
    assert ended.code == 0, ended.err
    assert ended.out.splitlines() == ["Client sizes: [240, 240, 240, 240, 240]", f"{tmp_path}/a"]
    monkeypatch.syspath_prepend(harness.ROOT / "lora_glue_fl")
    monkeypatch.delitem(sys.modules, "sharding", raising=False)
    inside = importlib.import_module("sharding")
    info = inside.make_client_splits(task_name="sst2", k=5, mode="iid", seed=123, dataset="demo")
    inside.save_shard_manifests(tmp_path / "b", info)
    for name in (*(f"client_{i}.json" for i in range(1, 6)), "summary.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
