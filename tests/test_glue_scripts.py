"""The source's documented commands, as written, with `--model tiny --dataset demo` and sizes added."""

import importlib.machinery
import shlex
import subprocess
import sys

import pytest
from harness import ROOT
from safetensors.torch import load_file
from test_glue_rounds import call

from common.checkpoint import read_json
from common.runlog import read_metrics
from lora_glue_fl.sharding import make_client_splits, save_shard_manifests

HERE = ROOT / "lora_glue_fl"
BASE = "--model_size base --task_name sst2"
ROUNDS = f"{BASE} --shard_dir ./out/sst2_base/shards_iid_k3 --rounds 5 --local_epochs 1.0"
SMALL = "--model tiny --dataset demo --max_length 24 --threads 1"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder, with the shards of the documentation's first step."""
    monkeypatch.chdir(tmp_path)
    info = make_client_splits(task_name="sst2", k=3, mode="iid", seed=123, max_examples=96, dataset="demo")
    save_shard_manifests("out/sst2_base/shards_iid_k3", info)
    return tmp_path


def run(script, documented, more=""):
    return call(*shlex.split(f"{documented} {SMALL} {more}"), script=script)


def products(folder, layer):
    """B A of a layer of the saved adapter, and the adapter's tensors."""
    tensors = load_file(folder / "adapter_model.safetensors")
    name = f"base_model.model.roberta.encoder.layer.{layer}.lora_"
    return tensors[f"{name}B.weight"] @ tensors[f"{name}A.weight"], tensors


@pytest.mark.slow
def test_central_commands(here):
    sizes = "--per_device_train_batch_size 32 --per_device_eval_batch_size 32"
    less = "--max_examples 64 --num_train_epochs 1"
    assert run("baseline_run", f"{BASE} --output_dir ./out_baseline --do_train --do_eval {sizes} --learning_rate 2e-5 "
               "--num_train_epochs 3.0 --seed 42", less) == 0  # fmt: skip
    assert (here / "out_baseline/sst2_base/final/model.safetensors").exists()
    lora = "--lora_r 8 --lora_alpha 8 --lora_dropout 0.0"
    command = f"{BASE} --output_dir ./out --do_train --do_eval {lora} {sizes} --learning_rate 2e-4 --seed 42"
    assert run("main_glue_lora", command, less) == 0
    run_folder = here / "out/sst2_base/r8"
    assert {"adapter", "manifest.txt", "run.json", "metrics.jsonl"} <= {f.name for f in run_folder.iterdir()}
    said = (run_folder / "manifest.txt").read_text()
    assert "lora_r: 8\n" in said and "val_accuracy: " in said
    assert run("adapters_eval", f"{BASE} --adapter_path ./out/sst2_base/r8/adapter --output_dir ./out_eval") == 0
    found = read_json(here / "out_eval/sst2_base/metrics.json")
    assert found["val_accuracy"] == read_metrics(run_folder)[-1]["val_accuracy"]
    other = "--adapter_output_dir here/adapter --lora_r 4"
    assert run("main_glue_lora", f"{BASE} --do_train", f"{less} {other}") == 0
    assert (here / "here/adapter/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_rounds_one_after_the_other_in_one_folder(here, capsys):
    sizes = "--batch_size 32 --learning_rate 2e-4 --lora_r 8 --lora_alpha 8 --lora_dropout 0.0"
    svd = f"{ROUNDS} {sizes} --svd_rank 8 --output_root ./out_fedavg --eval_each_round --eval_batch_size 32 --seed 42"
    assert run("fedavg_rounds", svd, "--rounds 2 --keep all") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "out_fedavg/sst2_base"
    tree = here / "out_fedavg/sst2_base"
    paths = ["run.json", "metrics.jsonl", "round_1/client_1/adapter", "round_2/client_3/adapter"]
    paths += ["round_1/fused_r8/adapter/adapter_model.safetensors", "round_2/fused_r8/adapter"]
    assert [path for path in paths if not (tree / path).exists()] == []
    assert not list(here.rglob("*.pt")) and not list(here.rglob("*.bin"))

    naive = f"{ROUNDS} {sizes} --skip_svd --output_root ./out_fedavg --eval_each_round --seed 42"
    assert run("fedavg_rounds", naive, "--rounds 1") == 0
    assert (here / "out_fedavg/sst2_base_naive/round_1/fused_r8_nosvd/adapter").exists()

    assert run("main_glue_lora", f"{BASE} --do_train --output_dir ./out", "--num_train_epochs 1") == 0
    adapter = "--init_adapter ./out/sst2_base/r8/adapter"
    warm = f"{ROUNDS} {adapter} --lora_r 8 --lora_alpha 8 --svd_rank 8 --output_root ./out_fedavg --eval_each_round"
    assert run("fedavg_rounds", f"{warm} --seed 42", "--rounds 1 --learning_rate 1e-30") == 0
    # nothing was learnt: what is served is what it began with
    first, _ = products(here / "out/sst2_base/r8/adapter", "0.attention.self.query")
    last, _ = products(here / "out_fedavg/sst2_base_warm/final", "0.attention.self.query")
    assert (first - last).norm() <= 1e-5 * first.norm()


@pytest.mark.slow
def test_merge_of_the_clients_of_a_round(here):
    assert run("fedavg_rounds", ROUNDS, "--rounds 1 --keep all --output_root ./out_fedavg") == 0
    clients = " ".join(f"./out_fedavg/sst2_base/round_1/client_{i}/adapter" for i in (1, 2, 3))
    shards = " ".join(f"./out/sst2_base/shards_iid_k3/client_{i}.json" for i in (1, 2, 3))
    merge = f"{BASE} --adapters {clients} --svd_rank 8 --alpha 8 --save_adapter ./out_merged/sst2_fused_adapter"
    assert call(*shlex.split(f"{merge} --shard_manifests {shards}"), script="fedavg_merge") == 0
    found, merged = products(here / "out_merged/sst2_fused_adapter", "1.attention.self.value")
    wanted, served = products(here / "out_fedavg/sst2_base/final", "1.attention.self.value")
    assert (found - wanted).norm() <= 1e-5 * found.norm() and merged.keys() == served.keys()
    for name in merged:
        if "lora_" not in name:
            assert (merged[name] - served[name]).norm() <= 1e-6 * (1 + served[name].norm())


@pytest.mark.slow
def test_category_shards_of_two_labels_for_five_clients(here):
    words = "--task_name sst2 --k 5 --mode category --category_key label --out_dir cat --dataset demo --max_examples 90"
    assert call(*words.split(), script="sharding") == 0
    assert run("fedavg_rounds", f"{BASE} --shard_dir cat", "--rounds 1 --local_epochs 0.5 --eval_clients") == 0
    line = read_metrics(here / "out_fedavg/sst2_base")[-1]
    assert len(line["client_val_accuracy"]) == 5


@pytest.mark.slow
@pytest.mark.parametrize("task, names", [("stsb", "val_pearson val_spearman"), ("mnli", "val_mismatched_accuracy")])
def test_other_kinds_of_tasks(task, names, here):
    save_shard_manifests("shards", make_client_splits(task, 2, "iid", seed=0, max_examples=64, dataset="demo"))
    words = f"--model_size base --task_name {task} --shard_dir shards --aggregate residual --client_ranks 8 8"
    assert run("fedavg_rounds", words, "--rounds 1") == 0
    assert {*names.split()} <= read_metrics(here / f"out_fedavg/{task}_base_residual")[-1].keys()


@pytest.mark.slow
def test_scripts_run_from_inside_the_folder():
    done = subprocess.run([sys.executable, "main_glue_lora.py", "--help"], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0 and "--lora-r" in done.stdout, done.stderr
    # this folder is then where Python looks first: no file in it may hide an installed package
    elsewhere = [place for place in sys.path if place not in ("", str(HERE))]
    names = [path.stem for path in HERE.glob("*.py") if path.stem != "__init__"]
    assert not any(importlib.machinery.PathFinder.find_spec(name, elsewhere) for name in names)
