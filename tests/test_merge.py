"""fedavg_merge.py: the mean against peft and numpy, weights, refusals."""

import json

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from test_lora import PREFIX, change, roberta, save_by_peft

from common.checkpoint import read_json
from common.cli import run_main
from common.lora import CONFIG, WEIGHTS, read_adapter
from lora_glue_fl import fedavg_merge

TARGETS = ("query", "value", "intermediate.dense")  # the last is 24 x 16


def clients(folder, ranks=(2, 2, 2), alphas=(4, 4, 4), **options):
    """Adapters saved by peft: their folders."""
    for i, (r, alpha) in enumerate(zip(ranks, alphas, strict=True)):
        save_by_peft(folder / f"c{i}", seed=10 + i, r=r, alpha=alpha, **{"targets": TARGETS, **options})
    return [folder / f"c{i}" for i in range(len(ranks))]


def merge(folders, out, *more):
    """The script in this process. Returns its exit code."""
    words = ["--adapters", *folders, "--save_adapter", out, *more]
    words += [] if "--svd_rank" in more else ["--svd_rank", 2]
    args = fedavg_merge.build_parser().parse_args([str(word) for word in words])
    with pytest.raises(SystemExit) as stop:
        run_main(fedavg_merge.main, args)
    return stop.value.code


def deltas(folder):
    """{layer: s B A} in numpy, read without this project."""
    tensors, config = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())
    scale = config["lora_alpha"] / config["r"]
    layers = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {
        layer.removeprefix(PREFIX): scale
        * tensors[f"{layer}.lora_B.weight"].double().numpy()
        @ tensors[f"{layer}.lora_A.weight"].double().numpy()
        for layer in layers
    }


def mean_deltas(folders, weights):
    parts = [deltas(folder) for folder in folders]
    total = sum(weights)
    return {name: sum(w / total * part[name] for w, part in zip(weights, parts, strict=True)) for name in parts[0]}


def truncated(matrix, rank):
    U, S, Vh = np.linalg.svd(matrix)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def gap(found, wanted):
    """||found - wanted|| / ||wanted|| over all layers."""
    stack = [np.concatenate([d[name].ravel() for name in sorted(wanted)]) for d in (found, wanted)]
    return np.linalg.norm(stack[0] - stack[1]) / np.linalg.norm(stack[1])


# ---- what is merged


def same_as_pefts(out, folders, weights, **how):
    model = peft.PeftModel.from_pretrained(roberta(), folders[0], adapter_name="c0")
    for folder in folders[1:]:
        model.load_adapter(folder, adapter_name=folder.name)
    model.add_weighted_adapter(["c0", "c1", "c2"], weights, "fused", **how)
    found = deltas(out)
    assert len(found) == 6
    for layer, delta in found.items():
        wanted = model.get_submodule(PREFIX + layer).get_delta_weight("fused").numpy()
        assert delta.shape == wanted.shape and np.abs(delta - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_the_merge_equals_pefts_own_and_its_error_is_that_of_the_dense_matrices(tmp_path, capsys):
    weights = [0.5, 0.3, 0.2]
    # without heads, which peft does not average
    folders = clients(tmp_path, ranks=(2, 3, 4), alphas=(4, 3, 8), task_type=None, modules_to_save=None)
    for folder in folders:
        change(folder, auto_mapping=None, base_model_name_or_path="roberta-base")
    assert merge(folders, tmp_path / "out", "--svd_rank", 3, "--alpha", 6, "--weights", *weights) == 0
    file = read_adapter(tmp_path / "out")
    assert (file.head, file.base_model) == ({}, "roberta-base")
    same_as_pefts(tmp_path / "out", folders, weights, combination_type="svd", svd_rank=3)
    for A, _ in file.factors.values():
        torch.testing.assert_close(A.norm(dim=1), torch.ones(3), rtol=1e-5, atol=1e-5)  # V^T
    wanted = mean_deltas(folders, weights)
    best = {name: truncated(delta, 3) for name, delta in wanted.items()}
    error = read_json(tmp_path / "out" / "fuse_manifest.json")["relative_error"]
    assert gap(deltas(tmp_path / "out"), best) < 1e-6 and error == pytest.approx(gap(best, wanted), rel=1e-6)
    assert capsys.readouterr().out.splitlines() == [f"relative error {error:.4g}", str(tmp_path / "out")]


# ---- weights and the manifest


def shard(path, n, **fields):
    manifest = {"dataset": "sst2", "indices": list(range(n)), "fingerprint": "ab", **fields}
    path.write_text(json.dumps(manifest))
    return path


def test_weights_are_numbers_of_examples(tmp_path):
    folders = clients(tmp_path, ranks=(2, 2), alphas=(4, 4))
    dealings = [{"mode": "iid", "seed": seed} for seed in (1, 2)]  # which may have examples in common
    shards = [shard(tmp_path / f"client_{i}.json", n, **dealings[i]) for i, n in enumerate((30, 10))]
    assert merge(folders, tmp_path / "a", "--task_name", "SST2", "--shard_manifests", *shards) == 0
    assert merge(folders, tmp_path / "b", "--weights", 3, 1) == 0
    assert merge(folders, tmp_path / "equal") == 0
    a, b, equal = (read_json(tmp_path / name / "fuse_manifest.json") for name in ("a", "b", "equal"))
    assert a["weights"] == b["weights"] == [0.75, 0.25] and equal["weights"] == [0.5, 0.5]
    assert (a["task"], b["task"]) == ("sst2", "glue")
    hashes = [read_adapter(tmp_path / name).sha256 for name in ("a", "b", "equal")]
    assert hashes[0] == hashes[1] != hashes[2]
    assert merge(folders, tmp_path / "first", "--weights", 7, 0, "--svd_rank", 2) == 0
    assert gap(deltas(tmp_path / "first"), deltas(folders[0])) < 1e-6


# ---- what is refused


@pytest.mark.parametrize(
    "more, words",
    [
        ("--weights 1 nan", "nan"),
        ("--weights 1 1 --shard_manifests a b", "--weights and --shard-manifests"),
        ("--shard_manifests no.json no.json", "no.json"),
        ("--svd_rank 5", "is above 4"),
    ],
)
def test_flags_that_are_refused(more, words, tmp_path, capsys):
    folders = clients(tmp_path, ranks=(2, 2), alphas=(4, 4))
    for folder in folders:
        change(folder, base_model_name_or_path="FacebookAI/roberta-base")
    refused(folders, tmp_path, capsys, words, *more.split())


@pytest.mark.parametrize("place, options, words", [(0, {"targets": ["query"]}, "layers"), (2, {"base": 2}, "head")])
def test_adapters_that_do_not_fit(place, options, words, tmp_path, capsys):
    """One of three, at this place, is of another kind."""
    for i in range(3):
        mine = options if i == place else {}
        base = roberta(labels=mine["base"]) if "base" in mine else roberta()
        save_by_peft(tmp_path / f"c{i}", **{"targets": TARGETS, **mine, "seed": i, "base": base})
        change(tmp_path / f"c{i}", base_model_name_or_path="roberta-base")
    said = refused([tmp_path / f"c{i}" for i in range(3)], tmp_path, capsys, f"differ in their {words}")
    assert str(tmp_path / f"c{place}") in said


def refused(folders, tmp_path, capsys, words, *more):
    assert merge(folders, tmp_path / "out", *more) == 2
    said = capsys.readouterr()
    assert words in said.err and len(said.err.strip().splitlines()) == 1 and not said.out, said
    assert not list(tmp_path.glob("out*"))
    return said.err
