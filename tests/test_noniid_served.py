"""llm_noniid/train.py: what a run serves and logs, its memory, groups of clients, the source's commands."""

import math
import shlex

import numpy as np
import pytest
import torch
from noniid_script import call, done, losses, parsed, token_rows, words
from running import ROOT

from common.checkpoint import read_json
from common.runlog import read_metrics
from llm_noniid import text_model
from llm_noniid.data import load_texts
from llm_noniid.partition import clients_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("adapter", ["adapter", "group_1"])
def test_what_is_served_gives_the_logged_losses_in_plain_peft(adapter, tmp_path):
    """Text by text, so without any padding: padding that was scored, or an end that was not, would show."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cluster = "labels" if adapter == "group_1" else "none"
    line = f"--cluster {cluster} --eval-samples 0 --learning-rate 0.02 --num-rounds 1 --probe-samples 0"
    folder = done(tmp_path, "a", line)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    texts, lines = load_texts("demo", max_samples=160), read_metrics(folder)
    last, results = lines[-1], read_json(folder / "run.json")["results"]
    validation = token_rows(tokenizer, texts.splits["validation"])
    if cluster == "none":
        nll, n = losses(base, validation)
        assert lines[0]["val_loss"] == pytest.approx(nll.sum() / n.sum(), rel=1e-5)  # round 0: before training
    model = PeftModel.from_pretrained(base, folder / "final" / adapter)
    assert read_json(folder / "final" / adapter / "adapter_config.json")["task_type"] == "CAUSAL_LM"

    # each client's own texts under the model that serves it
    rows, held, _ = clients_of(parsed(*words(tmp_path, "a", line)), texts)
    train_rows = token_rows(tokenizer, texts.splits["train"])
    group = read_json(folder / "partition.json")["group"]
    mine = [k for k in range(4) if group[k] == (cluster == "labels")]
    assert mine
    for k in mine:
        nll, n = losses(model, [train_rows[i] for i in held[k]])
        assert last["client_val_loss"][k] == pytest.approx(nll.sum() / n.sum(), rel=1e-5)
    assert last["mean_client_val_loss"] == pytest.approx(np.mean(last["client_val_loss"]), rel=1e-12)
    if cluster == "labels":
        total = 0.0  # a random client sees the validation texts under its own group's model
        sizes = [len(mine) for mine in rows]
        for g, examples in enumerate(np.bincount(group, sizes)):
            fresh = AutoModelForCausalLM.from_pretrained(folder / "base")
            nll, n = losses(PeftModel.from_pretrained(fresh, folder / "final" / f"group_{g}"), validation)
            total += examples / sum(sizes) * nll.sum()
        assert last["val_loss"] == pytest.approx(total / n.sum(), rel=1e-5)
        return

    assert last["generalization_gap"] == pytest.approx(last["val_loss"] - last["train_loss"], abs=1e-12)
    for split, name, logged in (("validation", "val", last), ("test", "test", results)):
        nll, n = losses(model, token_rows(tokenizer, texts.splits[split]))
        assert logged[f"{name}_loss"] == pytest.approx(nll.sum() / n.sum(), rel=1e-5)
        assert logged[f"{name}_ppl"] == pytest.approx(math.exp(nll.sum() / n.sum()), rel=1e-4)


def test_hidden_states_are_those_of_the_tokens_without_padding(tmp_path):
    args, texts = parsed(*words(tmp_path, "a")), load_texts("demo", max_samples=160)
    model = text_model.load_text_model(args, texts, torch.device("cpu"), None)
    states = text_model.hidden_states(model, "validation", np.arange(20))
    with torch.no_grad():
        one = [torch.tensor([ids]) for ids in token_rows(model.tokenizer, texts.splits["validation"][:20])]
        alone = torch.cat([model.module(input_ids=i, output_hidden_states=True).hidden_states[-1][0] for i in one])
    torch.testing.assert_close(states, alone, rtol=1e-3, atol=1e-4)


# -------------------------------------------------------------------------------------- the source's commands

SMALL = "--model tiny --dataset demo --tokenizer bpe:400 --max-length 24 --max-samples 200 --eval-samples 4"
SMALL += " --local-steps 1 --batch-size 2 --participation-rate 0.1 --threads 1"


@pytest.mark.parametrize(
    "documented, name",
    [
        ("--algorithm fedavg --partition topic_skew --num-rounds 50", "fedavg_topic_skew_alpha_0.1"),
        ("--algorithm scaffold --partition token_skew --num-rounds 5", "scaffold_token_skew_frequency"),
        ("--config configs/default.yaml --num-rounds 5", "fedavg_topic_skew_alpha_0.1"),
    ],
)
def test_documented_commands(documented, name, tmp_path, capsys):
    documented = documented.replace("configs", shlex.quote(str(ROOT / "llm_noniid" / "configs")))
    assert call(*shlex.split(f"{documented} {SMALL} --output-dir {tmp_path}")) == 0
    folder = tmp_path / f"{name}_demo_tiny_participation_0.1_lr_5e-05_seed_42"
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == str(folder) and "warning" not in said.err
    rounds = [line["round"] for line in read_metrics(folder)]
    assert rounds == (list(range(0, 51, 5)) if "50" in documented else [0, 5])
    assert len(read_metrics(folder)[-1]["client_val_loss"]) == 10
    assert {f.name for f in folder.iterdir()} >= {"run.json", "partition.json", "final", "checkpoint", "base"}
