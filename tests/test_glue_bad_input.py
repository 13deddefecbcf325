"""lora_glue_fl: bad input ends with exit code 2, one line that names it, and nothing written; and what diverges."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from encoders import save_encoder
from running import ROOT
from safetensors.torch import load_file, save_file
from test_glue_rounds import call

from common.checkpoint import read_json, write_json
from common.runlog import read_metrics
from lora_glue_fl import fed_core
from lora_glue_fl.sharding import make_client_splits, save_shard_manifests

pytestmark = pytest.mark.slow
TINY = "--model tiny --dataset demo --task-name sst2".split()
SMALL = "--threads 1 --max-length 32 --lora-r 4".split()
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Folders of manifests: three clients of sst2, of rte, and of sst2 with a fingerprint of other data."""
    root = tmp_path_factory.mktemp("bad_shards")
    for task in ("sst2", "rte"):
        save_shard_manifests(root / task, make_client_splits(task, 3, max_examples=96, dataset="demo"))
    shutil.copytree(root / "sst2", root / "other")
    for path in (root / "other").glob("client_*.json"):
        write_json(path, {**read_json(path), "fingerprint": "0123456789abcdef"})
    return root


@pytest.fixture(scope="session")
def adapters(tmp_path_factory):
    """Adapters of the tiny model: two alike, of another task, of other targets, of a higher rank."""
    root = tmp_path_factory.mktemp("bad_adapters")
    base = "--dataset demo --do-train --threads 1 --max-examples 32 --num-train-epochs 1".split()
    for name, more in {
        "a": "--model tiny --task-name sst2 --lora-r 4",
        "b": "--model tiny --task-name sst2 --lora-r 4 --seed 1",
        "mnli": "--model tiny --task-name mnli --lora-r 4",
        "keys": "--model tiny --task-name sst2 --lora-r 4 --target-modules query key",
        "r8": "--model tiny --task-name sst2 --lora-r 8",
    }.items():
        where = ["--output-dir", root / "runs" / name, "--adapter-output-dir", root / name]
        assert call(*base, *more.split(), *where, script="main_glue_lora") == 0
        write_json(root / name / CONFIG, {**read_json(root / name / CONFIG), "base_model_name_or_path": "tiny"})
    return root


def snapshot(folder):
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def refused(capsys, script, words, line, *places):
    """Asserts exit code 2, one line with all of `words`, nothing printed and nothing changed in `places`."""
    before = [snapshot(place) for place in places]
    capsys.readouterr()
    assert call(*line, script=script) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.err.startswith("error: ") and not said.out, said
    assert all(str(word) in said.err for word in words), said.err
    assert [snapshot(place) for place in places] == before


@pytest.mark.parametrize(
    "more, words",
    [
        ("--task-name sst3", ["'sst3'", "cola, sst2"]),
        ("--shard-dir {tmp}/none", ["/none is missing", "sharding.py"]),
        ("--shard-dir {tmp}", ["has no client_1.json", "sharding.py"]),
        ("--shard-dir {shards}/rte", ["of task rte", "not sst2", "--task-name rte"]),
        ("--shard-dir {shards}/other", ["other data", "0123456789ab", "make the shards again"]),
        ("--svd-rank 13", ["--svd-rank 13", "above 12", "lower it"]),
        ("--svd-rank 8 --client-ranks 1 2 4", ["--svd-rank 8", "above 7", "lower it"]),
        ("--aggregate naive --client-ranks 2 4", ["--client-ranks 2 4", "naive", "--aggregate svd or stack"]),
        ("--client-ranks 1 2 3 4", ["4 --client-ranks for 3 clients"]),
        ("--lora-r 65", ["rank 65", "above 64", "--lora-r"]),
        ("--skip-svd --aggregate svd", ["--skip-svd", "not svd"]),
        ("--server-optimizer adam", ["adam", "svd", "naive, ffa or rolora"]),
        ("--server-optimizer momentum --aggregate stack", ["momentum", "stack", "naive, ffa or rolora"]),
        ("--init-adapter {adapters}/none", ["/none does not exist", "give a folder"]),
        ("--init-adapter {adapters}/keys", ["its layers are not those of tiny", "self.key", "--model"]),
        ("--init-adapter {adapters}/mnli", ["out_proj.weight 3x64", "2x64", "--task-name"]),
        ("--init-adapter {adapters}/r8", ["has rank 8, above --lora-r 4", "--lora-r", "fedavg_merge.py"]),
        ("--init-adapter {adapters}/a --model {little}", ["its layers are not those of", "bert", "--model"]),
        ("--target-modules nope", ["no linear layer nope", "key", "query"]),
        ("--amp fp16", ["fp16", "--amp off"]),
        ("--max-length 4", ["4", "8 to"]),
        ("--run-name a/b", ["a/b", "--output-dir"]),
        ("--output-dir /proc/no", ["/proc/no", "--output-dir"]),
        ("--model {tmp}/none", ["none", "--model"]),
    ],
)
def test_fedavg_rounds(more, words, shards, adapters, tmp_path, capsys):
    little = tmp_path / "little"
    if "little" in more:
        save_encoder(little, "bert")
    more = more.format(tmp=tmp_path, shards=shards, adapters=adapters, little=little).split()
    line = [*TINY, *SMALL, "--rounds", 1, "--shard-dir", shards / "sst2", "--output-root", tmp_path / "out", *more]
    refused(capsys, "fedavg_rounds", words, line, tmp_path, shards, adapters)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["main_glue_lora", "baseline_run"])
@pytest.mark.parametrize(
    "more, words",
    [
        ("", ["nothing to do", "--do-train, --do-eval or both"]),
        ("--do-train --task-name sst3", ["'sst3'", "cola, sst2"]),
        ("--do-train --shard {tmp}/none.json", ["none.json", "sharding.py"]),
        ("--do-train --shard {shards}/rte/client_1.json", ["client_1.json", "rte", "sst2"]),
        ("--do-train --shard {shards}/other/client_1.json", ["client_1.json", "other data", "again"]),
        ("--do-train --shard {shards}/sst2/client_1.json --max-examples 3", ["--shard", "--max-examples", "choose"]),
        ("--do-train --max-examples 0", ["--max-examples 0", "at least 1"]),
        ("--do-train --amp fp16", ["fp16", "--amp off"]),
        ("--do-train --model {tmp}/cut", ["/cut", "cannot be read", "give a folder"]),
        ("--do-eval --tokenizer {tmp}/none", ["/none", "tokenizer"]),
    ],
)
def test_central(script, more, words, shards, tmp_path, capsys):
    if "cut" in more:
        cut(save_encoder(tmp_path / "cut", "bert") / "model.safetensors")
    more = more.format(tmp=tmp_path, shards=shards).split()
    refused(capsys, script, words, [*TINY, *more, "--output-dir", tmp_path / "out"], tmp_path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("script", ["fedavg_rounds", "main_glue_lora", "baseline_run", "adapters_eval"])
def test_no_model(script, shards, adapters, tmp_path, capsys):
    line = ["--dataset", "demo", "--task-name", "sst2", "--output-dir", tmp_path / "out"]
    line += {
        "fedavg_rounds": ["--shard-dir", shards / "sst2"],
        "adapters_eval": ["--adapter-path", adapters / "r8"],
    }.get(script, ["--do-train"])
    words = ["no model", "--model-size base or large", "--model NAME_OR_PATH"]
    refused(capsys, script, words, line, tmp_path, shards)


@pytest.mark.parametrize(
    "more, words",
    [
        ("--task-name sst3", ["'sst3'", "cola, sst2"]),
        ("--task-name wnli --k 401", ["401", "400"]),
        ("--k 90 --max-examples 80", ["90", "80"]),
        ("--mode overlap --overlap-ratio 1.5", ["1.5"]),
        ("--mode category --category-key genre", ["genre", "label, sentence"]),
        ("--mode dirichlet --k 20 --min-samples 70", ["70", "20"]),
    ],
)
def test_sharding(more, words, tmp_path, capsys):
    line = ["--dataset", "demo", "--task-name", "sst2", "--k", 3, "--out-dir", tmp_path / "out", *more.split()]
    refused(capsys, "sharding", words, line, tmp_path)


@pytest.mark.parametrize("script", ["fedavg_rounds", "main_glue_lora", "sharding", "adapters_eval"])
@pytest.mark.parametrize("label", ["2", "-1", "maybe"])
def test_a_label_out_of_range_is_named_with_its_line(script, label, shards, adapters, tmp_path, capsys):
    place = tmp_path / "data" / "glue" / "SST-2"
    place.mkdir(parents=True)
    for name in ("train", "dev"):
        (place / f"{name}.tsv").write_text(f"sentence\tlabel\na good film\t1\na dull film\t{label}\na scene\t0\n")
    line = ["--task-name", "sst2", "--dataset", "glue", "--data-root", tmp_path / "data"]
    more = {"sharding": ["--k", 1, "--out-dir", tmp_path / "out"]}
    more["main_glue_lora"] = ["--model", "tiny", "--tokenizer", "demo", "--do-train", "--output-dir", tmp_path / "out"]
    more["adapters_eval"] = [*more["main_glue_lora"][:4], "--adapter-path", adapters / "a", "--output-dir"]
    more["adapters_eval"] += [tmp_path / "out"]
    more["fedavg_rounds"] = [*more["main_glue_lora"][:4], "--shard-dir", shards / "sst2", "--output-root"]
    more["fedavg_rounds"] += [tmp_path / "out"]
    words = [
        f"{'dev' if script == 'adapters_eval' else 'train'}.tsv line 3",
        f"'{label}'",
        "negative, positive",
        "corr",
    ]
    refused(capsys, script, words, [*line, *more[script]], tmp_path)


# ---- adapters on disk


def names_code(folder):
    (folder.parent / "glue_evil.py").write_text("raise SystemExit(77)\n")
    about = {"base_model_class": "Evil", "parent_library": "glue_evil"}
    write_json(folder / CONFIG, {**read_json(folder / CONFIG), "auto_mapping": about})


def not_finite(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors[next(name for name in tensors if "lora_B" in name)][0, 0] = math.nan
    save_file(tensors, folder / WEIGHTS)


BROKEN = {
    "cut": (lambda folder: cut(folder / WEIGHTS), [WEIGHTS, "damaged"]),
    "code": (names_code, [CONFIG, "auto_mapping", "code", "null"]),
    "nan": (not_finite, [WEIGHTS, "not finite"]),
    "json": (lambda folder: (folder / CONFIG).write_text("{"), [CONFIG, "cannot be read"]),
    "pickle": (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), ["pickle", "not read"]),
    "dora": (
        lambda folder: write_json(folder / CONFIG, {**read_json(folder / CONFIG), "use_dora": True}),
        ["use_dora"],
    ),
}


@pytest.mark.parametrize("script", ["fedavg_rounds", "adapters_eval", "fedavg_merge"])
@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_adapter(script, how, shards, adapters, tmp_path, capsys, monkeypatch):
    break_it, words = BROKEN[how]
    shutil.copytree(adapters / "a", tmp_path / "mine")
    break_it(tmp_path / "mine")
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "out"
    line = {
        "fedavg_rounds": [*TINY, *SMALL, "--shard-dir", shards / "sst2", "--init-adapter", tmp_path / "mine"],
        "adapters_eval": [*TINY, "--adapter-path", tmp_path / "mine"],
        "fedavg_merge": ["--adapters", adapters / "a", tmp_path / "mine", "--svd-rank", 4, "--save-adapter", out],
    }[script]
    line += [] if script == "fedavg_merge" else ["--output-dir", out]
    refused(capsys, script, [tmp_path / "mine", *words], line, tmp_path)
    assert "glue_evil" not in sys.modules


@pytest.mark.parametrize(
    "others, more, words",
    [
        ("b", "--weights 3 -1", ["--weights 3 -1", "at least 0"]),
        ("b", "--weights 1", ["1 --weights for 2", "give one for each"]),
        ("b", "--weights 1 2 3", ["3 --weights for 2", "give one for each"]),
        ("b", "--weights 0 0", ["--weights 0 0", "sum above 0"]),
        ("b", "--shard-manifests {shards}/sst2/client_1.json {shards}/rte/client_1.json", ["rte", "sst2"]),
        ("b", "--shard-manifests {shards}/sst2/client_1.json {shards}/other/client_2.json", ["0123456789ab"]),
        ("b", "--task-name sst3", ["'sst3'"]),
        ("b", "--svd-rank 65", ["--svd-rank 65", "64", "lower it"]),
        ("b", "--svd-rank 9", ["--svd-rank 9", "above 8", "lower it"]),
        ("b", "--skip-svd --svd-rank 2", ["--svd-rank 2", "--aggregate svd"]),
        ("keys", "", ["different targets", "key, query", "query, value"]),
        ("mnli", "", ["different heads", "merge adapters of one task"]),
        ("none", "", ["none does not exist"]),
        ("b", "--save-adapter {adapters}/b", ["/b exists", "--overwrite"]),
        ("b", "--save-adapter {adapters}/b --overwrite", ["is one of --adapters"]),
        ("b", "--eval --dataset demo --model tiny --task-name mnli", ["its head", "not the task's"]),
    ],
)
def test_fedavg_merge(others, more, words, shards, adapters, tmp_path, capsys):
    more = more.format(shards=shards, adapters=adapters).split()
    line = ["--adapters", adapters / "a", adapters / others, "--svd-rank", 4, "--save-adapter", tmp_path / "out", *more]
    refused(capsys, "fedavg_merge", words, line, tmp_path, adapters)


@pytest.mark.parametrize(
    "more, words",
    [
        ("--task-name sst3", ["'sst3'"]),
        ("--task-name mnli", ["its head", "out_proj.bias 2", "out_proj.bias 3", "--task-name"]),
        ("--adapter-path {adapters}/none", ["/none does not exist"]),
        ("--adapter-path {adapters}/a/" + WEIGHTS, ["is a file"]),
        ("--amp fp16", ["fp16", "--amp off"]),
        ("--device cuda:99", ["cuda:99"]),
    ],
)
def test_adapters_eval(more, words, adapters, tmp_path, capsys):
    more = more.format(adapters=adapters).split()
    line = [*TINY, "--adapter-path", adapters / "a", "--output-dir", tmp_path / "out", *more]
    refused(capsys, "adapters_eval", words, line, tmp_path, adapters)


def test_as_a_command_stderr_is_one_line_too(adapters, shards, tmp_path):
    """What libraries say on the way would be seen only here."""
    little = save_encoder(tmp_path / "little", "bert")
    line = [*TINY, "--model", little, "--shard-dir", shards / "sst2", "--output-root", tmp_path / "out"]
    line += ["--max-length", 32, "--init-adapter", adapters / "a"]
    script = [sys.executable, "fedavg_rounds.py", *map(str, line)]
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT / "lora_glue_fl", timeout=300, check=False)
    assert (done.returncode, done.stdout) == (2, "") and not (tmp_path / "out").exists()
    assert done.stderr.count("\n") == 1 and "its layers are not those of" in done.stderr, done.stderr


# ---- runs that fail, and clients that do


@pytest.mark.parametrize("script", ["main_glue_lora", "baseline_run"])
def test_a_learning_rate_that_diverges_fails_with_a_reason(script, tmp_path, capsys):
    words = "--do-train --learning-rate 1e38 --max-examples 96 --num-train-epochs 2 --run-name x --threads 1".split()
    assert call(*TINY, *words, "--output-dir", tmp_path, script=script) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("failed: ") and "--learning-rate (1e+38)" in last
    (manifest,) = tmp_path.rglob("run.json")
    run = read_json(manifest)
    assert run["status"] == "failed" and run["reason"] == last.removeprefix("failed: ") and run["results"] is None
    assert not list(tmp_path.rglob("adapter")) and not list(tmp_path.rglob("final"))


def rounds(shards, out, *more):
    line = [*TINY, *SMALL, "--shard-dir", shards / "sst2", "--output-root", out, "--run-name", "x", "--rounds", 1]
    return call(*line, "--learning-rate", "5e-3", "--keep", "all", *more)


def test_all_clients_that_diverge_end_the_run(shards, tmp_path, capsys):
    assert rounds(shards, tmp_path, "--learning-rate", 1e38) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("failed: round 1") and "3 of 3 clients" in last and "--learning-rate (1e+38)" in last
    run = read_json(tmp_path / "x" / "run.json")
    assert run["status"] == "failed" and run["reason"] == last.removeprefix("failed: ")


@pytest.mark.parametrize("rule", ["naive", "svd", "stack"])
def test_one_client_that_diverges_is_left_out_and_named(rule, shards, tmp_path, capsys, monkeypatch):
    """Naive: what is served is the mean of the others' adapters."""
    real, calls = fed_core.fit, []

    def fit(loss, encoded, steps, parameters, *rest):
        value = real(loss, encoded, steps, parameters, *rest)
        calls.append(None)
        if len(calls) == 2:
            with torch.no_grad():
                parameters[next(name for name in parameters if name.startswith("B."))][0, 0] = math.nan
        return value

    monkeypatch.setattr(fed_core, "fit", fit)
    assert rounds(shards, tmp_path, "--aggregate", rule, "--svd-rank", 4, "--rounds", 2, "--eval-clients") == 0
    assert len(calls) == 6
    said = capsys.readouterr().err
    assert "round 1: update not finite, left out: client 2" in said and said.count("left out") == 1
    first, second = read_metrics(tmp_path / "x")
    assert first["left_out"] == [[1, 1]] and first["left_out_updates"] == 1 == second["left_out_updates"]
    assert first["clients"] == [0, 2] and second["clients"] == [0, 1, 2] and "left_out" not in second
    assert len(first["client_train_loss"]) == len(first["client_val_accuracy"]) == 2
    folder = tmp_path / "x" / "round_1"
    assert sorted(path.name for path in folder.glob("client_*")) == ["client_1", "client_3"]
    assert len(list((tmp_path / "x" / "round_2").glob("client_*"))) == 3
    fused = next(folder.glob("fused_*"))
    manifest = json.loads((fused / "fuse_manifest.json").read_text())
    sizes = [len(read_json(shards / "sst2" / f"client_{k}.json")["indices"]) for k in (1, 3)]
    assert manifest["left_out"] == [2] and manifest["k_adapters"] == 2
    assert manifest["adapters"] == ["../client_1/adapter", "../client_3/adapter"]
    assert manifest["weights"] == pytest.approx([n / sum(sizes) for n in sizes])
    served = load_file(fused / "adapter" / WEIGHTS)
    assert all(torch.isfinite(tensor).all() for tensor in served.values())
    if rule != "naive":
        return
    one, three = (load_file(folder / name / "adapter" / WEIGHTS) for name in ("client_1", "client_3"))
    for name, tensor in served.items():
        mean = (sizes[0] * one[name].double() + sizes[1] * three[name].double()) / sum(sizes)
        assert torch.allclose(tensor.double(), mean, rtol=1e-6, atol=1e-8), name
        assert "lora_A" in name or not torch.equal(one[name], three[name])  # B is 0 in the only step: A stays
