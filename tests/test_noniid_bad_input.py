"""llm_noniid: bad input ends with exit code 2, one line that names it, and nothing written; the keys of --config."""

import csv
import subprocess
import sys

import pytest
import torch
import yaml
from noniid_script import TINY, call, done, words
from running import ROOT

from common.checkpoint import read_json
from common.cli import UsageError, run_main
from llm_noniid import flags, pretrain, train

CONFIG = ROOT / "llm_noniid" / "configs" / "default.yaml"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def snapshot(folder):
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def refused(capsys, found, line, folder, start="error: "):
    """Asserts exit code 2, one line with all words of `found`, nothing printed, nothing changed in `folder`."""
    before = snapshot(folder)
    capsys.readouterr()
    assert call(*line) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and start in said.err and not said.out, said
    assert all(word in said.err for word in found), said.err
    assert snapshot(folder) == before


def little(folder, kind):
    """A folder of a tiny causal language model of architecture `kind`, with a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from common.text import load_tokenizer
    from llm_noniid.data import as_corpus, load_texts

    tokenizer = load_tokenizer("bpe:800", as_corpus(load_texts("demo", max_samples=160)))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    sizes = {
        "opt": {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1},
        "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
    }[kind]
    if kind == "opt":
        sizes |= {"num_attention_heads": 2, "max_position_embeddings": 200}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "more, found",
    [
        ("--alpha 0", ["--alpha", "0 is not a number above 0"]),
        ("--alpha -1", ["--alpha", "-1 is not a number above 0"]),
        ("--alpha nan", ["--alpha", "nan"]),
        ("--participation-rate 0", ["--participation-rate", "above 0"]),
        ("--participation-rate 1.5", ["--participation-rate", "at most 1"]),
        ("--algorithm fedsgd", ["fedsgd", "fedavg"]),
        ("--partition dirichlet", ["dirichlet", "topic_skew"]),
        ("--max-samples -1", ["--max-samples", "-1"]),
        ("--num-rounds 0", ["--num-rounds", "0"]),
        ("--mu -0.1", ["--mu", "-0.1"]),
        ("--learning-rate 0", ["--learning-rate"]),
        ("--lora-dropout 1", ["--lora-dropout", "below 1"]),
        ("--stop-on always", ["always", "divergence"]),
        ("--nonsense 1", ["--nonsense"]),
    ],
)
def test_a_flag_that_is_wrong_by_itself(more, found, tmp_path, capsys):
    refused(capsys, [*found, "--help"], words(tmp_path / "out", "a", more), tmp_path)


@pytest.mark.parametrize(
    "more, found",
    [
        ("--participation-rate 0.1", ["0.1 of 4 clients samples nobody", "raise it to 0.25"]),
        ("--num-clients 161 --min-samples 1", ["160 texts", "161 clients", "--num-clients"]),
        ("--num-clients 17 --min-samples 10", ["160 texts", "17 clients 10 each", "lower --num-clients to at most 16"]),
        ("--max-samples 3", ["3 texts", "4 clients 6 each", "--num-clients to at most 3"]),
        ("--max-samples 5", ["5 texts", "4 clients 6 each", "--min-samples to at most 1"]),
        ("--algorithm fednova", ["fednova", "adamw", "sgd or sgdm"]),
        ("--algorithm scaffold --scaffold-option II", ["option II", "adamw", "mean_gradient"]),
        ("--algorithm fedprox --cluster updates", ["--cluster updates", "--algorithm fedprox"]),
        ("--cluster labels --num-clusters 5", ["--num-clusters 5", "--num-clients 4"]),
        ("--cluster updates --cluster-round 9 --num-rounds 8", ["--cluster-round 9", "--num-rounds 8"]),
        ("--target-modules c_attn nope", ["no linear layer nope", "c_attn", "c_proj"]),
        ("--model {tmp}/opt --tokenizer {tmp}/opt", ["opt", "--target-modules", "q_proj"]),
        ("--model {tmp}/gpt2", ["--max-length 96", "32 positions", "lower it"]),
        ("--model {tmp}/gpt2 --max-length 32 --tokenizer bpe:900", ["800 tokens", "900", "--tokenizer"]),
        ("--model {tmp}", ["config.json", "safetensors", "give a folder"]),
        ("--model {tmp}/none", ["no model", "none", "pretrain.py", "--model tiny"]),
        ("--model distilgpt2", ["no model distilgpt2", "pretrain.py", "--model tiny"]),
        ("--max-length 1", ["--max-length 1", "2 to"]),
        ("--tokenizer bpe:9", ["bpe:9"]),
        ("--dataset ag_news --data-root {tmp}", ["no AG News", "train.csv", "--dataset demo"]),
        ("--dataset wikitext --data-root {tmp}", ["--data-root"]),
        ("--amp fp16", ["fp16", "--amp off"]),
        ("--device cuda:99", ["cuda:99"]),
        ("--name a/b", ["a/b", "--output-dir"]),
        ("--output-dir /proc/no", ["/proc/no", "--output-dir"]),
        ("--config {tmp}/none.yaml", ["none.yaml", "name a yaml file"]),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(more, found, tmp_path, capsys):
    for kind in ("opt", "gpt2"):
        if f"/{kind}" in more:
            little(tmp_path / kind, kind)
    refused(capsys, found, words(tmp_path / "out", "a", more.format(tmp=tmp_path)), tmp_path)
    assert not (tmp_path / "out").exists()


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)


@pytest.mark.parametrize(
    "broken, found",
    [
        ('"2","Only a title"\n', ["line 4", "2 columns", "mend it"]),
        ('"2","A title,"and more"\n', ["line 4 is broken", "quotes"]),
        ('"0","A title","A text."\n', ["line 4", "class '0' is outside 1 to 4", "World"]),
        ('"5","A title","A text."\n', ["line 4", "class '5' is outside 1 to 4"]),
        ('"Sports","A title","A text."\n', ["line 4", "class 'Sports'"]),
        ('"3",""," "\n', ["line 4", "empty text"]),
    ],
)
@pytest.mark.parametrize("file", ["train", "test"])
def test_a_broken_row_is_named(file, broken, found, tmp_path, capsys):
    for name in ("train", "test"):
        write_csv(tmp_path / "ag_news" / f"{name}.csv", [(i % 4 + 1, f"Title {i}", f"Text {i}.") for i in range(80)])
    path = tmp_path / "ag_news" / f"{file}.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], broken, *lines[3:]]))
    line = words(tmp_path / "out", "a", f"--dataset ag_news --data-root {tmp_path}")
    refused(capsys, [f"{file}.csv", *found], line, tmp_path)


def test_a_run_of_this_name_is_never_replaced_unasked(tmp_path, capsys):
    more = "--num-rounds 1 --local-steps 1 --probe-samples 0"
    done(tmp_path, "a", more)
    line = words(tmp_path, "a", more)
    refused(capsys, ["/a exists (finished)", "--resume", "--overwrite"], line, tmp_path)
    refused(capsys, ["other flags", "--mu 0.01 -> 0.5"], [*line, "--algorithm", "fedprox", "--mu", 0.5, "--resume"],
            tmp_path)  # fmt: skip
    assert call(*line, "--resume") == 0 and "already finished" in capsys.readouterr().out


def test_as_a_command_stderr_is_one_line_too(tmp_path):
    """What libraries say on the way would be seen only here."""
    line = words(tmp_path / "out", "a", f"--model {little(tmp_path / 'gpt2', 'gpt2')}")
    script = [sys.executable, "train.py", *line]
    ended = subprocess.run(script, capture_output=True, text=True, cwd=ROOT / "llm_noniid", timeout=600, check=False)
    assert (ended.returncode, ended.stdout) == (2, "") and not (tmp_path / "out").exists()
    assert ended.stderr.count("\n") == 1 and "32 positions" in ended.stderr, ended.stderr


def test_a_learning_rate_that_breaks_every_client_fails_with_a_reason(tmp_path, capsys):
    assert call(*words(tmp_path, "a", "--learning-rate 1e38")) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("failed: round 1: ") and "all 4 clients" in last and "--learning-rate (1e+38)" in last
    assert read_json(tmp_path / "a" / "run.json")["status"] == "failed"


# ----------------------------------------------------------------------------------------------- --mu, --config


@pytest.mark.parametrize("given", [["--mu", "0.1"], ["--mu=0.1"]])
def test_mu_where_it_has_no_effect_is_warned_of(given, capsys, monkeypatch):
    for algorithm, warned in (("fedavg", True), ("scaffold", True), ("fedprox", False)):
        flags.parse(train.build_parser(), ["--algorithm", algorithm, *given])
        said = capsys.readouterr().err
        assert said.count("\n") == warned and ("--mu has no effect" in said) == warned
        monkeypatch.setattr(sys, "argv", ["train.py", "--algorithm", algorithm, *given])
        flags.parse(train.build_parser())
        assert ("--mu has no effect" in capsys.readouterr().err) == warned
    flags.parse(train.build_parser(), ["--algorithm", "fedavg"])
    assert not capsys.readouterr().err


SOURCE_KEYS = {  # the source's configs/default.yaml
    "name": "mine",
    "model": {
        "name": "gpt2",
        "lora_r": 4,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "use_quantization": True,
        "max_length": 64,
    },
    "data": {
        "dataset": "wikitext",
        "partition_strategy": "style_skew",
        "num_clients": 7,
        "alpha": 0.5,
        "style_criteria": "formality",
        "skew_type": "vocabulary",
        "batch_size": 3,
        "seed": 5,
    },
    "federated": {
        "algorithm": "fedprox",
        "num_rounds": 9,
        "participation_rate": 0.5,
        "local_epochs": 2,
        "learning_rate": 0.001,
        "mu": 0.3,
    },
    "eval_every": 2,
    "save_checkpoints": False,
    "checkpoint_dir": "somewhere",
    "results_dir": "other",
    "seed": 6,
    "device": "cpu",
}


def test_every_key_of_the_source_sets_its_flag(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(SOURCE_KEYS))
    args = flags.parse(train.build_parser(), ["--config", str(path)])
    plain = flags.parse(train.build_parser(), [])
    assert (args.run_name, args.model, args.lora_r, args.lora_alpha, args.lora_dropout) == ("mine", "gpt2", 4, 32, 0.1)
    assert (args.max_length, args.dataset, args.partition, args.num_clients) == (64, "wikitext", "style_skew", 7)
    assert (args.alpha, args.style_criterion, args.skew_type, args.batch_size) == (0.5, "formality", "vocabulary", 3)
    assert (args.algorithm, args.num_rounds, args.participation_rate, args.local_epochs) == ("fedprox", 9, 0.5, 2)
    assert (args.learning_rate, args.mu, args.eval_every, args.output_dir) == (0.001, 0.3, 2, "other")
    assert (args.seed, args.device) == (6, "cpu")
    changed = {name for name, value in vars(args).items() if value != getattr(plain, name)}
    without_effect = {"use_quantization", "save_checkpoints", "checkpoint_dir"}
    flat = {key for key, value in SOURCE_KEYS.items() if not isinstance(value, dict)}
    flat |= {key for part in SOURCE_KEYS.values() if isinstance(part, dict) for key in part}
    assert len(changed - {"config"}) == len(flat - without_effect) + 1  # `name` stands for two flags

    over = flags.parse(train.build_parser(), ["--config", str(path), "--mu", "0.7", "--num_rounds", "3"])
    assert (over.mu, over.num_rounds, over.alpha) == (0.7, 3, 0.5)


def test_our_default_file_holds_the_source_s_keys_and_the_flags_own_defaults():
    args = flags.parse(train.build_parser(), ["--config", str(CONFIG)])
    plain = flags.parse(train.build_parser(), [])
    assert {**vars(args), "config": None} == vars(plain)
    content = yaml.safe_load(CONFIG.read_text())
    assert content.keys() == SOURCE_KEYS.keys()
    for section in ("model", "data", "federated"):
        assert content[section].keys() - {"max_samples"} == SOURCE_KEYS[section].keys()
    plain = vars(plain)
    source = {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "max_length": 128, "num_clients": 10, "alpha": 0.1}
    source |= {"batch_size": 8, "num_rounds": 50, "participation_rate": 1.0, "local_epochs": 1, "learning_rate": 5e-5}
    source |= {"mu": 0.01, "eval_every": 5, "seed": 42, "max_samples": 0, "device": "auto", "output_dir": "results"}
    source |= {"client_optimizer": "adamw", "model": "distilgpt2", "dataset": "ag_news", "algorithm": "fedavg"}
    assert {name: plain[name] for name in source} == source


@pytest.mark.parametrize(
    "content, found",
    [
        (
            "federated: {learning_rat: 1}",
            ["unknown key federated.learning_rat:", "mean federated.learning_rate?"],
        ),
        ("learning_rate: 1", ["unknown key learning_rate", "federated.learning_rate?"]),
        ("data: {style_criterion: length}", ["unknown key data.style_criterion", "data.style_criteria?"]),
        ("federated: {participation_rate: 2}", ["federated.participation_rate", "2", "at most 1"]),
        ("federated: {algorithm: fedsgd}", ["federated.algorithm", "'fedsgd'", "fedavg"]),
        ("data: {alpha: [1, 2]}", ["data.alpha", "one value"]),
        ("data: {num_clients: few}", ["data.num_clients", "few"]),
        ("- a list", ["keys and values"]),
        ("a: [1", ["is not yaml"]),
    ],
)
def test_a_wrong_yaml_file_is_refused(content, found, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(content)
    line = [*TINY, "--output-dir", tmp_path / "out", "--config", tmp_path / "mine.yaml"]
    refused(capsys, ["--config", "mine.yaml", *found], line, tmp_path)


def test_numbers_as_the_document_writes_them_are_read(tmp_path):
    (tmp_path / "mine.yaml").write_text("federated:\n  learning_rate: 5e-5\n")  # yaml's own rules make it a text
    assert flags.parse(train.build_parser(), ["--config", str(tmp_path / "mine.yaml")]).learning_rate == 5e-5


# --------------------------------------------------------------------------------------------------- pretrain.py


@pytest.mark.parametrize(
    "more, found",
    [
        ("--heads 3", ["--d-model 16", "--heads 3"]),
        ("--out {tmp}/full", ["/full exists", "--overwrite"]),
        ("--out {tmp}/file", ["/file", "is a file"]),
        ("--max-samples -1", ["--max-samples -1"]),
        ("--max-length 1", ["--max-length 1"]),
        ("--dataset ag_news --data-root {tmp}", ["no AG News"]),
        ("--tokenizer nope", ["nope", "bpe:N"]),
        ("--amp fp16", ["fp16", "--amp off"]),
        ("--device tpu", ["tpu"]),
        ("--epochs 0", ["--epochs", "0"]),
        ("--warmup-ratio 1.5", ["--warmup-ratio", "at most 1"]),
        ("--compile", ["--compile"]),
    ],
)
def test_pretraining_refuses_bad_flags(more, found, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "file").write_text("x")
    line = f"--dataset demo --d-model 16 --heads 2 --threads 1 --out {tmp_path}/out {more.format(tmp=tmp_path)}".split()
    before = snapshot(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_main(lambda parser: pretrain.main(parser.parse_args(line)), pretrain.build_parser())
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.err.count("\n") == 1 and not said.out
    assert all(word in said.err for word in found), said.err
    assert snapshot(tmp_path) == before


def test_flags_that_contradict_each_other_are_found_without_a_model():
    with pytest.raises(UsageError, match="samples nobody"):
        flags.parse(train.build_parser(), ["--participation-rate", "0.04"])
    assert flags.parse(train.build_parser(), ["--participation-rate", "0.05"]).participation_rate == 0.05
