"""Shards of GLUE tasks: modes, manifests, refusals, the command."""

import importlib
import json
import sys

import harness
import numpy as np
import pytest
from comparing import check_partition

from common.cli import UsageError
from lora_glue_fl import sharding
from lora_glue_fl.data_prep import load_task
from lora_glue_fl.sharding import load_held_out, load_manifest, load_shards, make_client_splits, save_shard_manifests


def demo(task, k, mode="iid", **more):
    return make_client_splits(task, k, mode, dataset="demo", **more)


def parts_of(info):
    return [np.array(part) for part in info["client_indices"]]


@pytest.mark.parametrize(
    "task, mode",
    [("sst2", "iid"), ("mnli", "category"), ("stsb", "dirichlet")],
)
def test_partitions_of_every_task(task, mode):
    info = demo(task, 5, mode, seed=1)
    check_partition(parts_of(info), info["total_train"])
    assert info["size_per_client"] == [len(part) for part in info["client_indices"]]
    assert (info["task"], info["mode"], info["dataset"]) == (task, mode, "demo")
    assert info == json.loads(json.dumps(info))  # JSON values only
    assert info == demo(task, 5, mode, seed=1) and info["client_indices"] != demo(task, 5, mode)["client_indices"]


@pytest.mark.parametrize("task, source", [("cola", "demo"), ("mnli", "demo"), ("mnli", "hub"), ("stsb", "demo")])
def test_iid_keeps_labels_mnlis_genres_and_bins_of_scores(task, source, monkeypatch):
    data = load_task(task, "demo", splits=["train"])
    train = data.splits["train"]
    if source == "hub":
        train.categories.clear()  # it has no genres
    labels = np.floor(train.labels / 0.2 + 1e-4).clip(max=24) if task == "stsb" else train.labels
    genres = train.categories["genre"] if task == "mnli" and source == "demo" else [""] * len(train)
    keys = np.array([f"{label} {genre}" for label, genre in zip(labels, genres, strict=True)])
    monkeypatch.setattr(sharding, "load_task", lambda *_, **__: data)
    parts = parts_of(demo(task, 7))
    assert max(np.ptp([(keys[part] == key).sum() for part in parts]) for key in np.unique(keys)) <= 1


def test_the_sources_examples():
    info = demo("sst2", 5, "category", category_key="label", seed=42)  # two labels, five clients
    labels = load_task("sst2", "demo").splits["train"].labels
    assert all(len(set(labels[part])) == 1 for part in parts_of(info))
    info = demo("sst2", 5, "overlap", overlap_ratio=0.2, seed=42)
    assert info["meta"]["overlap_ratio"] == 0.2 and sum(info["size_per_client"]) == 1200
    assert len(set(sum(info["client_indices"], []))) < 1200
    assert {"seed", "overlap_ratio", "category_key", "bin_stsb"} <= set(info["meta"])


def test_categories_by_genre_and_unknown_columns():
    genres = np.array(load_task("mnli", "demo").splits["train"].categories["genre"])
    info = demo("mnli", 5, "category", category_key="genre")
    assert sorted(set(genres[part]).pop() for part in parts_of(info)) == sorted(set(genres))
    assert all(len(set(genres[part])) == 1 for part in parts_of(info))
    with pytest.raises(UsageError, match="--category-key genre: rte has label"):
        demo("rte", 3, "category", category_key="genre")


def test_held_out_examples_are_stratified_and_no_clients(tmp_path):
    plain, info = (demo("cola", 4, max_examples=200, held_out_examples=n) for n in (0, 300))
    labels = load_task("cola", "demo").splits["train"].labels
    held = info["held_out"]
    assert info["client_indices"] == plain["client_indices"] and "held_out" not in plain
    assert len(held) == len(set(held)) == 300 and held == sorted(held)
    assert not set(held) & set(sum(info["client_indices"], []))
    assert labels[held].mean() == pytest.approx(labels.mean(), abs=0.004)
    assert demo("cola", 4, max_examples=200, held_out_examples=300) == info
    data = load_task("cola", "demo")
    for dealt, wanted in ((info, held), (plain, None)):
        save_shard_manifests(tmp_path, dealt)
        found = load_held_out(tmp_path, data)
        assert (found if found is None else found.tolist()) == wanted and len(load_shards(tmp_path, data)) == 4


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
    assert sharding.shares_words(train, rows, [0]).tolist() == [True, True, False, True, False, False]
    half, most = (
        sharding.rest_of(train, train.labels, np.array([0]), n, 0).tolist() for n in (len(train) // 2, len(train) - 3)
    )
    assert not {1, 2, 4} & set(half) and len(half) == len(set(half)) == len(train) // 2
    assert {1, 2, 4} & set(most) and len(most) == len(train) - 3  # too few without


# ---- manifests


@pytest.fixture
def saved(tmp_path):
    """(folder, data): shards of the demo's rte, twelve clients."""
    save_shard_manifests(tmp_path / "shards", demo("rte", 12, seed=7))
    return tmp_path / "shards", load_task("rte", "demo")


def change(path, **values):
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | values).items() if v is not None}))


def refused(match, path, *given, read=load_manifest):
    with pytest.raises(UsageError, match=match) as error:
        read(path, *given)
    assert "\n" not in str(error.value) and path.name in str(error.value)


def test_manifests_come_back_and_fewer_clients_leave_no_old_ones(saved):
    (folder, data), info = saved, demo("rte", 12, seed=7)
    assert {p.name for p in folder.iterdir()} == {*(f"client_{i}.json" for i in range(1, 13)), "summary.json"}
    found = load_shards(folder, data)
    assert [shard["indices"].tolist() for shard in found] == info["client_indices"]
    assert [shard["client"] for shard in found] == list(range(1, 13))  # not as names sort: 1, 10, 11, 2
    for shard in found:
        assert shard["dataset"] == "rte" and shard["seed"] == 7 and shard["data"] == "demo"
        assert shard["fingerprint"] == data.fingerprint["sha256"]["train"]
    assert json.loads((folder / "summary.json").read_text()) == info
    save_shard_manifests(folder, demo("rte", 2))
    assert sorted(p.name for p in folder.iterdir()) == ["client_1.json", "client_2.json", "summary.json"]


def test_manifests_that_do_not_fit_are_refused_by_name(saved, tmp_path):
    folder, data = saved
    path = folder / "client_2.json"
    good = path.read_text()
    refused("is of task rte, not mrpc", path, "mrpc")
    for indices in ([0, 1200], [3, 4, 3]):
        change(path, indices=indices)
        refused("one twice, or one that is not below 1200", path, "rte", data)
    path.write_text(good)
    change(path, fingerprint="0" * 64)
    refused(r"was made from other data \(demo\)", path, "rte", data)
    for text in (good[:-40], '{"dataset": "rte"}'):
        path.write_text(text)
        refused("is no shard manifest", path)
    path.unlink()
    refused("is no shard manifest", path)
    refused("client_12.json but no client_2.json", folder, data, read=load_shards)
    refused("is missing", tmp_path / "none", data, read=load_shards)


def test_the_command_from_the_root_and_the_module_from_inside(tmp_path, monkeypatch):
    words = f"--task_name sst2 --k 5 --mode iid --out_dir {tmp_path}/a --dataset demo --seed 123".split()
    ended = harness.run(["lora_glue_fl/sharding.py", *words])
    assert ended.code == 0, ended.err
    said = ["1200 of 1200 training examples are dealt", "Client sizes: [240, 240, 240, 240, 240]", f"{tmp_path}/a"]
    assert ended.out.splitlines() == said
    monkeypatch.syspath_prepend(harness.ROOT / "lora_glue_fl")
    monkeypatch.delitem(sys.modules, "sharding", raising=False)
    inside = importlib.import_module("sharding")
    info = inside.make_client_splits(task_name="sst2", k=5, mode="iid", seed=123, dataset="demo")
    inside.save_shard_manifests(tmp_path / "b", info)
    for name in (*(f"client_{i}.json" for i in range(1, 6)), "summary.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
