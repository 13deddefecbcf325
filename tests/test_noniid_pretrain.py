"""llm_noniid/pretrain.py: a base that learns, is the same every time, loads in transformers and serves train.py."""

import math

import pytest
from noniid_script import call, losses, token_rows, words

from common.checkpoint import read_json
from common.cli import run_main
from common.runlog import read_metrics
from llm_noniid import pretrain
from llm_noniid.data import load_texts

TINY = "--dataset demo --max-samples 160 --tokenizer bpe:800 --max-length 96 --d-model 32 --layers 2 --heads 2".split()
TINY += "--epochs 2 --batch-size 8 --learning-rate 5e-3 --threads 1".split()

pytestmark = pytest.mark.slow


def made(folder, *more):
    """pretrain.py in this process."""
    line = [*TINY, "--out", str(folder), *map(str, more)]
    with pytest.raises(SystemExit) as stop:
        run_main(lambda parser: pretrain.main(parser.parse_args(line)), pretrain.build_parser())
    assert stop.value.code == 0
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return made(tmp_path_factory.mktemp("pretrained") / "models" / "small")


def test_the_loss_falls_and_is_what_transformers_finds(base, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    about = read_json(base / "pretraining.json")
    history = about["history"]
    assert [row["epoch"] for row in history] == [1, 2]
    chance = math.log(800)
    assert history[1]["val_loss"] < history[0]["val_loss"] < chance - 0.3
    assert history[1]["train_loss"] < history[0]["train_loss"] - 0.3
    assert about["args"]["d_model"] == 32 and about["data"]["dataset"] == "demo" and about["versions"]["torch"]

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    assert (model.config.n_embd, model.config.n_layer, model.config.n_positions) == (32, 2, 96)
    assert len(tokenizer) == 800 and tokenizer.eos_token_id == model.config.eos_token_id
    nll, n = losses(model, token_rows(tokenizer, load_texts("demo", max_samples=160).splits["validation"]))
    assert history[-1]["val_loss"] == pytest.approx(nll.sum() / n.sum(), rel=1e-5)
    assert history[-1]["val_ppl"] == pytest.approx(math.exp(nll.sum() / n.sum()), rel=1e-4)


def test_train_adapts_it_and_begins_where_it_ended(base, tmp_path):
    line = words(tmp_path, "a", f"--model {base} --num-rounds 1 --local-steps 1 --eval-samples 0")
    del line[line.index("--tokenizer") : line.index("--tokenizer") + 2]
    assert call(*line) == 0
    row = read_metrics(tmp_path / "a")[0]  # before training
    assert row["val_loss"] == pytest.approx(read_json(base / "pretraining.json")["history"][-1]["val_loss"], rel=1e-5)
