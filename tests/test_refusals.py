"""Bad input of every script: exit code 2, one line on stderr that names it, nothing printed and nothing written.

And runs that cannot go on: exit code 1, the reason in the last line and in run.json.
"""

import importlib.util
import json
import runpy
import shutil
import sys
from pathlib import Path

import harness
import pytest

pytestmark = pytest.mark.slow

GRIDS = ["mamba_fl/run_study.py", "vit_sparse_fl/run_all_experiments.py", "lora_glue_fl/run_study.py"]
GRIDS += ["llm_noniid/run_experiments.py"]
SST2 = "--dataset glue --data-root {tmp} --task-name sst2"
MERGE = "fedavg_merge.py", "--task-name sst2 --svd-rank 4 --save-adapter {tmp}/out --adapters {a}"


# --------------------------------------------------------------------------------------------- what rows begin with


def text(name, content):
    def write(tmp):
        (tmp / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp / name).write_text(content)

    return write


def taken(tmp):
    text("out/r/thesis.txt", "years of work")(tmp)


def run_of(name, damage=lambda folder: None):
    """The finished run `name` as one that failed, and damaged."""

    def write(tmp):
        folder = shutil.copytree(harness.whole(name), tmp / "out" / "r")
        (tmp / "out" / "logs").mkdir()  # vit_sparse_fl's, which that run has made
        edited(folder / "run.json", lambda run: run.update(status="failed"))
        damage(folder)

    return write


def edited(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def half(file):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-9])


def copied(run, part, name, damage):
    return lambda tmp: damage(shutil.copytree(harness.whole(run) / part, tmp / name))


def of_other_data(folder):
    for path in folder.glob("client_*.json"):
        edited(path, lambda about: about.update(fingerprint="0123456789abcdef"))


half_a_model = copied("vit_sparse_fl/centralized", "final", "model", half("model.safetensors"))
pickled = copied(
    "vit_sparse_fl/centralized", "final", "model", lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin")
)
half_an_adapter = copied("lora_glue_fl/svd", "round_1/client_1/adapter", "mine", half("adapter_model.safetensors"))
other_data = copied("lora_glue_fl/sharding", "", "shards", of_other_data)


# --------------------------------------------------------------------------------------------------------- the rows
# (run of tests/harness.py, or a script; flags after that run's own; parts of the line; what fills {tmp} before). In the
# flags {tmp} is the test's empty folder, {a} and {b} are adapters of sst2, {NAME} is the folder of the run NAME.

RUNS = {  # a run of each script that trains -> a bad value
    "mamba_fl/central": ("--lr nan", "--lr"),
    "mamba_fl/fed_avg": ("--rounds 0", "--rounds"),
    "mamba_fl/fed_momentum": ("--server-momentum 1", "--server-momentum"),
    "mamba_fl/fed_entropy": ("--temperature 0", "--temperature"),
    "mamba_fl/fed_fisher": ("--fisher-samples 0", "--fisher-samples"),
    "vit_sparse_fl/centralized": ("--batch-size 1000", "720"),
    "vit_sparse_fl/federated": ("--classes 0:101", "101"),
    "vit_sparse_fl/sparse": ("--sparsity-ratio 1.5", "1.5"),
    "lora_glue_fl/svd": ("--svd-rank 13", "above 12"),
    "llm_noniid/fedavg": ("--partition dirichlet", "topic_skew"),
}
OTHERS = {  # another script -> what it needs, a bad value
    "lora_glue_fl/main_glue_lora.py": ("--task-name sst2 --do-train", "--amp fp64", "fp16"),
    "lora_glue_fl/baseline_run.py": ("--task-name sst2 --do-train", "--task-name sst3", "cola, sst2"),
    "lora_glue_fl/adapters_eval.py": ("--task-name sst2 --adapter-path {a}", "--device no-such", "no-such"),
    "lora_glue_fl/sharding.py": ("--task-name wnli --dataset demo --out-dir {tmp}/out --k 2", "--k 401", "400"),
    "lora_glue_fl/fedavg_merge.py": (MERGE[1] + " {b}", "--weights 3 -1", "at least 0"),
    "lora_glue_fl/download_roberta_models.py": ("", "--hf-home {tmp}/none/../x --models", "--models"),
    "llm_noniid/pretrain.py": ("--out {tmp}/out --dataset demo", "--epochs 0", "--epochs"),
    **{script: ("", "--seeds x", "--seeds") for script in GRIDS},
    "plots/vit.py": ("--out-dir {tmp}/out", "--data-dir {tmp}/none", "{tmp}/none"),
    "plots/tables.py": ("", "{tmp}/none", "{tmp}/none"),
}
ONE = [run for run in RUNS if run.endswith(("fed_fisher", "sparse", "svd", "noniid/fedavg"))]  # of each study
EVERY = [
    *((run, more, [part]) for run, (more, part) in RUNS.items()),
    *((script, f"{flags} {more}", [part]) for script, (flags, more, part) in OTHERS.items()),
    *((run, "--no-such-flag", ["--no-such-flag"]) for run in ONE),
    *((run, "--overwrite", ["is not a run folder", "--run-name"], taken) for run in ONE),
    *((run, "", ["r exists (failed)", "--resume", "--overwrite"], run_of(run)) for run in ONE),
    *((run, "--resume --seed 77", ["--seed ", " -> 77"], run_of(run)) for run in ONE),
    *(
        (run, "--resume", ["theta.safetensors is damaged"], run_of(run, half("checkpoint/theta.safetensors")))
        for run in ONE
    ),
]
MISSING = [
    ("mamba_fl/fed_avg", "--dataset wikitext2 --data-root {tmp}", ["wiki.train.raw", "--dataset demo"]),
    ("mamba_fl/central", "--tokenizer gpt2 --data-root {tmp}", ["no tokenizer 'gpt2'", "{tmp}", "bpe:"]),
    ("vit_sparse_fl/federated", "--dataset cifar100 --data-root {tmp}", ["cifar100.npz", "--dataset demo"]),
    ("vit_sparse_fl/federated", "--init-from {tmp}/none", ["{tmp}/none"]),
    ("lora_glue_fl/sharding.py", f"{SST2} --k 2 --out-dir {{tmp}}/out", ["train.tsv", "--dataset demo"]),
    ("lora_glue_fl/svd", "--shard-dir {tmp}/none", ["none is missing", "sharding.py"]),
    ("lora_glue_fl/svd", "--model {tmp}/none", ["none", "--model"]),
    ("lora_glue_fl/baseline", f"{SST2} --model roberta-base", ["train.tsv", "--dataset demo"]),
    ("llm_noniid/fedavg", "--dataset ag_news --data-root {tmp}", ["no AG News", "train.csv", "--dataset demo"]),
    ("llm_noniid/fedavg", "--model distilgpt2", ["no model distilgpt2", "pretrain.py", "--model tiny"]),
    ("llm_noniid/pretrain", "--tokenizer nope", ["nope", "bpe:N"]),
]
OWN = [
    ("mamba_fl/fed_avg", "--participation 0.1", ["0.1 of 4 clients samples nobody", "raise it to 0.25"]),
    ("mamba_fl/fed_avg", "--num-clients 1000", ["1000"]),
    ("mamba_fl/fed_avg", "--average-every conf=8", ["'conf=8' is not GROUP=H", "conv"]),
    ("mamba_fl/fed_avg", "--average-every conv=2 conv=4", ["conv twice"]),
    ("mamba_fl/fed_avg", "--local-updates 8 --average-every conv=12", ["conv=12 is no multiple", "conv=16"]),
    ("mamba_fl/fed_avg", "--rounds-by drift --participation 0.5", ["all clients", "drop --participation 0.5"]),
    ("mamba_fl/fed_avg", "--client-state keep", ["--moments-every 3 needs --client-state pooled"]),
    ("mamba_fl/fed_avg", "--headdim 24", ["24"]),
    ("mamba_fl/fed_avg", "--track wandb", ["wandb", "pip install"]),
    ("mamba_fl/fed_avg", "--run-name ../escape", ["../escape", "--output-dir"]),
    ("mamba_fl/fed_avg", "--output-dir /proc/no", ["/proc/no", "--output-dir"]),
    ("mamba_fl/fed_avg", "--resume --overwrite", ["--overwrite: not allowed with argument --resume"]),
    ("mamba_fl/fed_avg", "--local-update 3", ["--local-update:", "did you mean --local-updates?"]),
    ("mamba_fl/fed_entropy", "--resume", ["is a run of fed_avg"], run_of("mamba_fl/fed_avg")),
    ("vit_sparse_fl/federated", "--sharding non_iid --nc 11", ["11", "10"]),
    ("vit_sparse_fl/federated", "--image-size 36", ["36", "32 or 40"]),
    ("vit_sparse_fl/federated", "--head keep", ["--init-from"]),
    ("vit_sparse_fl/federated", "--heterogeneity-experiment --local-steps-experiment", ["are sweeps"]),
    ("vit_sparse_fl/federated", "--init-from {tmp}/model", ["could be read"], half_a_model),
    ("vit_sparse_fl/federated", "--init-from {tmp}/model", ["no model.safetensors", "pickled"], pickled),
    ("vit_sparse_fl/federated", "--config {tmp}/a.yaml", ["federated.num_rounds?"],
     text("a.yaml", "federated: {num_round: 3}")),
    ("lora_glue_fl/svd", "--client-ranks 1 2 3 4", ["4 --client-ranks for 3 clients"]),
    ("lora_glue_fl/svd", "--aggregate ffa --split us", ["--split us is for svd, naive, residual, rotate", "drop it"]),
    ("lora_glue_fl/svd", "--shard-dir {tmp}/shards", ["other data", "make the shards again"], other_data),
    ("lora_glue_fl/svd", "--init-adapter {tmp}/mine", ["{tmp}/mine"], half_an_adapter),
    ("lora_glue_fl/adapters_eval.py", "--task-name sst2 --adapter-path {tmp}/mine", ["{tmp}/mine"], half_an_adapter),
    ("lora_glue_fl/sharding.py", f"{SST2} --k 1 --out-dir {{tmp}}/out", ["train.tsv line 3", "'2'"],
     text("glue/SST-2/train.tsv", "sentence\tlabel\na good film\t1\na dull film\t2\n")),
    ("lora_glue_fl/fedavg_merge.py", f"{MERGE[1]} {{b}} --weights 1", ["1 --weights for 2", "give one for each"]),
    ("llm_noniid/fedavg", "--num-clients 161 --min-samples 1", ["160 texts", "161 clients", "--num-clients"]),
    ("llm_noniid/fedavg", "--algorithm fednova", ["fednova", "adamw", "sgd or sgdm"]),
    ("llm_noniid/fedavg", "--target-modules c_attn nope", ["no linear layer nope", "c_attn", "c_proj"]),
    ("llm_noniid/fedavg", "--model {llm_noniid/pretrain} --max-length 97", ["97", "96 positions", "lower it"]),
    ("llm_noniid/fedavg", "--config {tmp}/a.yaml", ["data.num_clients", "few"],
     text("a.yaml", "data: {num_clients: few}")),
    ("llm_noniid/pretrain", "--out {tmp}/full", ["/full exists", "--overwrite"], text("full/x", "x")),
]  # fmt: skip
ROWS = EVERY + MISSING + OWN

# Runs that start and cannot go on: exit code 1, the reason in the last line and in run.json
FAILED = [
    ("mamba_fl/fed_avg", "--lr 1e30", ["lower --lr (1e+30)"]),
    ("vit_sparse_fl/centralized", "--lr 1e30", ["--lr (1e+30)"]),
    ("lora_glue_fl/svd", "--learning-rate 1e38", ["round 1", "3 of 3 clients", "--learning-rate (1e+38)"]),
    ("llm_noniid/fedavg", "--learning-rate 1e38", ["round 1: ", "4 of 4 clients", "--learning-rate (1e+38)"]),
]


def placed(row, tmp):
    """The row's command line and the parts of the line that it is refused with, in `tmp`, which is filled."""
    first, flags, parts, *make = row
    words = [first] if first.endswith(".py") else harness.command(first, tmp / "out")
    places = {"tmp": tmp} | {name: harness.whole(name) for name in harness.GOLDEN if "{" + name + "}" in flags}
    if "{a}" in flags:
        places |= {
            n: harness.whole("lora_glue_fl/svd") / f"round_1/client_{k}/adapter" for n, k in (("a", 1), ("b", 2))
        }
    for fill in make:
        fill(tmp)
    for name, path in places.items():
        flags = flags.replace("{" + name + "}", str(path))
    return [*words, *flags.split()], [part.replace("{tmp}", str(tmp)) for part in parts]


def here(words, capsys):
    """The script's exit code, and what it wrote: in this process, which has imported what it needs."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", [str(harness.ROOT / words[0]), *words[1:]])
        capsys.readouterr()
        runpy.run_path(sys.argv[0], run_name="__main__")
    return stop.value.code, capsys.readouterr()


def snapshot(folder):
    return {path: path.is_file() and path.read_bytes() for path in Path(folder).rglob("*")}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[1]}"[-90:])
def test_bad_input_is_one_line_and_nothing_is_written(row, tmp_path, capsys, monkeypatch):
    words, parts = placed(row, tmp_path)
    before = snapshot(tmp_path)
    plain = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *at: None if name == "wandb" else plain(name, *at))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, said = here(words, capsys)
    assert code == 2, said
    assert said.err.count("\n") == 1 and "error: " in said.err and not said.out, said
    assert all(part in said.err for part in parts), said.err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("part", ["--headdim 24", "--classes 0:101", "{tmp}/model", "--max-length 97"])
def test_in_a_process_of_its_own_stderr_is_one_line_too(part, tmp_path):
    """What libraries say on the way would be seen only here."""
    words, parts = placed(next(row for row in ROWS if part in row[1]), tmp_path)
    ended = harness.run(words)
    assert (ended.code, ended.out) == (2, "") and ended.err.count("\n") == 1, ended
    assert all(part in ended.err for part in parts)


@pytest.mark.parametrize("name, flags, parts", FAILED)
def test_a_run_that_cannot_go_on_says_why(name, flags, parts, tmp_path):
    ended = harness.run([*harness.command(name, tmp_path / "out"), *flags.split()])
    last = ended.err.strip().splitlines()[-1]
    assert ended.code == 1 and last.startswith("failed: ") and "Traceback" not in ended.err, ended.err
    assert all(part in last for part in parts), last
    [path] = tmp_path.rglob("run.json")
    run = json.loads(path.read_text())
    assert (run["status"], run["results"]) == ("failed", None) and run["reason"] == last.removeprefix("failed: ")
    assert not list(tmp_path.rglob("final"))


@pytest.mark.parametrize("script", sorted({*harness.SCRIPTS, *OTHERS}))
def test_help_is_grouped_and_complete(script, capsys):
    code, said = here([script, "--help"], capsys)
    lines = said.out.splitlines()
    assert lines[0].startswith(f"usage: {script.split('/')[1]} ") and lines[1].startswith("    python ")
    assert code == 0 and not said.err and sum(line.startswith("  -") for line in lines) <= 30
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("  -"):
            assert "  " in line.strip() or following.startswith(" " * 20), line
