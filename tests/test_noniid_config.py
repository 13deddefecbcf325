"""llm_noniid: what diverges, and the keys of --config."""

import yaml
from running import ROOT

from llm_noniid import flags, train
from llm_noniid.data import AG_NEWS_TOPICS, ARTICLE_TOPICS, DEMO_TOPICS

CONFIG = ROOT / "llm_noniid" / "configs" / "default.yaml"


SOURCE_KEYS = """
name: mine
model: {name: gpt2, lora_r: 4, lora_alpha: 32, lora_dropout: 0.1, use_quantization: true, max_length: 64}
data: {dataset: wikitext, partition_strategy: style_skew, num_clients: 7, alpha: 0.5, style_criteria: formality,
  skew_type: vocabulary, batch_size: 3, seed: 5}
federated: {algorithm: fedprox, num_rounds: 9, participation_rate: 0.5, local_epochs: 2, learning_rate: 0.001, mu: 0.3}
eval_every: 2
save_checkpoints: false
checkpoint_dir: somewhere
results_dir: other
seed: 6
device: cpu
"""  # of the source's configs/default.yaml
FLAGS = {"run_name": "mine", "model": "gpt2", "lora_r": 4, "lora_alpha": 32, "lora_dropout": 0.1, "max_length": 64}
FLAGS |= {"dataset": "wikitext", "partition": "style_skew", "num_clients": 7, "alpha": 0.5, "batch_size": 3}
FLAGS |= {"style_criterion": "formality", "skew_type": "vocabulary", "algorithm": "fedprox", "num_rounds": 9}
FLAGS |= {"participation_rate": 0.5, "local_epochs": 2, "learning_rate": 0.001, "mu": 0.3, "eval_every": 2}
FLAGS |= {"output_dir": "other", "seed": 6, "device": "cpu"}
DEFAULTS = {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "max_length": 128, "num_clients": 10, "alpha": 0.1}
DEFAULTS |= {"batch_size": 8, "num_rounds": 50, "participation_rate": 1.0, "local_epochs": 1, "learning_rate": 5e-5}
DEFAULTS |= {"mu": 0.01, "eval_every": 5, "seed": 42, "max_samples": 0, "device": "auto", "output_dir": "results"}
DEFAULTS |= {"client_optimizer": "adamw", "model": "distilgpt2", "dataset": "ag_news", "algorithm": "fedavg"}


def test_every_key_of_the_source_sets_its_flag(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(SOURCE_KEYS)
    args = vars(flags.parse(train.build_parser(), ["--config", str(path)]))
    plain = vars(flags.parse(train.build_parser(), []))
    changed = {name: value for name, value in args.items() if value != plain[name]}
    assert changed == FLAGS | {"config": str(path)}
    over = flags.parse(train.build_parser(), ["--config", str(path), "--mu", "0.7", "--num_rounds", "3"])
    assert (over.mu, over.num_rounds, over.alpha) == (0.7, 3, 0.5)


def test_our_default_file_holds_the_source_s_keys_and_the_flags_own_defaults():
    args = flags.parse(train.build_parser(), ["--config", str(CONFIG)])
    plain = vars(flags.parse(train.build_parser(), []))
    assert {**vars(args), "config": None} == plain
    content, source = yaml.safe_load(CONFIG.read_text()), yaml.safe_load(SOURCE_KEYS)
    assert content.keys() == source.keys()
    for section in ("model", "data", "federated"):
        assert content[section].keys() - {"max_samples"} == source[section].keys()
    assert {name: plain[name] for name in DEFAULTS} == DEFAULTS


def test_there_are_as_many_clusters_as_topics():
    for line, groups in (("--dataset wikitext", 8), ("--dataset demo --num-clients 3", 3)):
        assert flags.parse(train.build_parser(), f"--cluster labels {line}".split()).num_clusters == groups
    sizes = {"ag_news": len(AG_NEWS_TOPICS), "wikitext": ARTICLE_TOPICS, "demo": len(DEMO_TOPICS)}
    assert sizes == flags.TOPICS
