"""mamba_fl's scripts as a user runs them: the source's command line, what a run leaves."""

import math

import harness
import pytest
import torch
from running import flags

from common.runlog import read_metrics
from mamba_fl import fed_momentum
from mamba_fl.data import build_data, inputs_and_labels


@pytest.mark.slow
def test_final_loads_in_transformers_and_gives_the_logged_loss():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = harness.whole("mamba_fl/fed_fisher")
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert len(AutoTokenizer.from_pretrained(folder / "final")) == 400
    data, lines, results = build_data("demo", "bpe:400", 32, 4), read_metrics(folder), harness.read_results(folder)

    def loss(blocks):
        inputs, labels = inputs_and_labels(blocks)
        with torch.no_grad():
            logits = model(inputs).logits[..., :400].double()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()

    last = lines[-1]
    assert loss(data.validation[:6]) == pytest.approx(last["val_loss"], abs=2e-5)
    size = data.token_bytes[data.validation[:6, 1:]].sum().item()
    assert last["val_bits_per_byte"] == pytest.approx(last["val_loss"] * 6 * 32 / size / math.log(2))
    assert last["val_ppl"] == pytest.approx(math.exp(last["val_loss"]))
    assert last["train_ppl"] == pytest.approx(math.exp(last["train_loss"]))
    assert math.log(results["test_ppl_last"]) == pytest.approx(loss(data.test), abs=2e-5)
    assert math.log(results["final_val_ppl"]) == pytest.approx(loss(data.validation), abs=2e-5)
    best = min(lines, key=lambda line: line["val_loss"])
    assert (results["best_round"], results["best_val_ppl"]) == (best["round"], best["val_ppl"])


def test_the_sources_command_line_runs(tmp_path):
    words = "--num_clients 3 --local_updates 2 --config pure_ssm_1_layer --n_epochs 0.2 --lr 5e-4 --batch_size 2 "
    words += f"--sequence_length 32 --seed 1 --val_freq 30 --data_dir {tmp_path} --cache_dir {tmp_path} "
    words += "--server_momentum 0.9 --server_lr 1.0 --dataset demo --tokenizer bpe:400 --d-model 32 --headdim 16"
    fed_momentum.main(flags(fed_momentum, words))
    assert (tmp_path / "fed_momentum_config_pure_ssm_1_layer_lu_2_seed_1_demo" / "run.json").exists()
