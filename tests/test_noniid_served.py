"""llm_noniid/train.py: what a run serves and logs, its memory, how runs end, the source's commands."""

import gc
import math
import shlex

import numpy as np
import pytest
import torch
from noniid_script import call, done, lines_of, served, spied, token_rows, words
from running import ROOT
from safetensors.torch import load_file

from common.checkpoint import read_json
from common.runlog import Run, read_metrics
from llm_noniid import detectors, fed_core, text_model
from llm_noniid.data import load_texts

pytestmark = pytest.mark.slow

# ------------------------------------------------------------------------------------- what is served and logged


def losses(model, rows):
    """(summed NLL, scored tokens) of each text alone by transformers' own loss."""
    model.eval()
    with torch.no_grad():
        found = [model(input_ids=torch.tensor([r]), labels=torch.tensor([r])).loss.item() * (len(r) - 1) for r in rows]
    return np.array(found), np.array([len(r) - 1 for r in rows])


@pytest.mark.parametrize("adapter", ["adapter", "group_1"])
def test_what_is_served_gives_the_logged_losses_in_plain_peft(adapter, tmp_path, monkeypatch):
    """Text by text, so without any padding: padding that was scored, or an end that was not, would show."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    studies = spied(monkeypatch)
    cluster = "updates" if adapter == "group_1" else "none"
    folder = done(tmp_path, "a", f"--cluster {cluster} --eval-samples 0 --learning-rate 0.02")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, folder / "final" / adapter)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    assert read_json(folder / "final" / adapter / "adapter_config.json")["task_type"] == "CAUSAL_LM"
    texts, last = load_texts("demo", max_samples=160), read_metrics(folder)[-1]

    # each client's own texts under the model that serves it
    train_rows = token_rows(tokenizer, texts.splits["train"])
    group = last.get("group", [0] * 4)
    mine = [k for k in range(4) if group[k] == (cluster == "updates")]
    assert mine
    for k in mine:
        nll, n = losses(model, [train_rows[i] for i in studies[0].held[k]])
        assert last["client_val_loss"][k] == pytest.approx(nll.sum() / n.sum(), rel=1e-5)
    assert last["worst_client_val_loss"] == max(last["client_val_loss"])
    assert last["mean_client_val_loss"] == pytest.approx(np.mean(last["client_val_loss"]), rel=1e-12)
    if cluster == "updates":
        return

    results = read_json(folder / "run.json")["results"]
    for split, name, found in (("validation", "val", last), ("test", "test", results)):
        rows = token_rows(tokenizer, texts.splits[split])
        nll, n = losses(model, rows)
        assert found[f"{name}_loss"] == pytest.approx(nll.sum() / n.sum(), rel=1e-5)
        assert found[f"{name}_ppl"] == pytest.approx(math.exp(nll.sum() / n.sum()), rel=1e-4)
        n_bytes = sum(len(tokenizer.decode(row[1:], skip_special_tokens=True).encode()) for row in rows)
        assert found[f"{name}_bits_per_byte"] == pytest.approx(nll.sum() / n_bytes / math.log(2), rel=2e-3)
        for topic, value in enumerate(found[f"{name}_topic_loss"]):
            at = texts.labels[split] == topic
            assert value == (pytest.approx(nll[at].sum() / n[at].sum(), rel=1e-5) if at.any() else None)


def test_evaluation_does_not_depend_on_the_batches(tmp_path, monkeypatch):
    studies = spied(monkeypatch)
    done(tmp_path, "a", "--num-rounds 1")
    (study,) = studies
    model = study.text_model
    rows = np.arange(len(model.tokens["validation"]))
    lengths = model.tokens["validation"].lengths()
    assert len(set(lengths.tolist())) > 1 and lengths.min() < 96  # so that padding has something to do
    nll = model.sums("validation", rows)
    order = np.random.default_rng(0).permutation(rows)
    np.testing.assert_allclose(model.sums("validation", order), nll[order], rtol=1e-5)
    np.testing.assert_allclose([model.sums("validation", [i])[0] for i in rows[:30]], nll[:30], rtol=1e-5)
    monkeypatch.setattr(text_model, "EVAL_BATCH", 5)
    np.testing.assert_allclose(model.sums("validation", rows), nll, rtol=1e-5)


def test_a_rounds_memory_does_not_grow_with_its_clients(tmp_path, monkeypatch):
    def live():
        storages = {}
        for thing in gc.get_objects():
            if type(thing) in (torch.Tensor, torch.nn.Parameter):
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        return sum(storages.values())

    real, held, begun = fed_core.Study.left_out, {}, []

    def counted(self, k, theta_k, found):
        assert all(theta_k[name].data_ptr() == p.data_ptr() for name, p in self.text_model.parameters.items())
        if k == self._sampled.mine[0]:
            begun.append(live())
        if k == self._sampled.mine[-1]:
            held[len(self.rows), self._watched != set()] = live() - begun[-1]
        return real(self, k, theta_k, found)

    monkeypatch.setattr(fed_core.Study, "left_out", counted)
    for n in (16, 32):  # two and four clients a lane
        more = f"--num-clients {n} --min-samples 2 --partition iid --num-rounds 2 --eval-every 2 --local-steps 1"
        done(tmp_path, f"{n}", more)
    theta = sum(t.numel() * 4 for t in served(tmp_path / "16").values())
    assert abs(held[32, False] - held[16, False]) < theta
    # what is watched in evaluated rounds is kept, of 64 clients at most: the measure sees it
    assert held[32, True] > held[32, False] + 30 * theta


# ------------------------------------------------------------------------------------------- how runs end


def failing(monkeypatch, when):
    """Makes the updates of the clients in `when`, a set of (round from 0, client), infinite."""
    real = fed_core.Study.local_update

    def update(self, theta, k, round):
        found = real(self, theta, k, round)
        if (round, k) in when:
            next(iter(found[0].values())).fill_(math.inf)
        return found

    monkeypatch.setattr(fed_core.Study, "local_update", update)


def test_a_client_with_an_update_that_is_not_finite_is_left_out(tmp_path, monkeypatch, capsys):
    failing(monkeypatch, {(1, 2)})
    folder = done(tmp_path, "a", "--algorithm scaffold --eval-every 3")
    assert "round 2: update not finite, left out: client 2" in capsys.readouterr().err
    (line,) = read_metrics(folder)
    assert line["left_out"] == [[2, 2]] and line["left_out_updates"] == 1 and line["clients"] == [0, 1, 2, 3]
    assert [(alarm["detector"], alarm["round"]) for alarm in line["alarms"]] == [("left_out", 2)]
    assert all(t.isfinite().all() for t in served(folder).values())
    # as if it had not taken part: its weight went to the others, and c is still the mean of all c_k
    saved = folder / "checkpoint"
    states = [load_file(saved / f"client_{k:06d}.safetensors") for k in range(4)]
    sizes = read_json(folder / "run.json")["data"]["examples"]
    sizes = [n - max(1, n // 10) for n in sizes]
    for name, c in load_file(saved / "control_variate.safetensors").items():
        mean = sum(n * state[name].double() for n, state in zip(sizes, states, strict=True)) / sum(sizes)
        torch.testing.assert_close(c, mean, rtol=1e-12, atol=1e-15)


def test_without_the_left_out_client_the_mean_is_that_of_the_others(tmp_path, monkeypatch):
    studies = spied(monkeypatch)
    failing(monkeypatch, {(0, 1)})
    folder, seen = tmp_path / "a", {}
    real = fed_core.Study.observe

    def observe(self, k, theta_k, found):
        seen[k] = {name: t.double() for name, t in theta_k.items()}
        real(self, k, theta_k, found)

    monkeypatch.setattr(fed_core.Study, "observe", observe)
    done(tmp_path, "a", "--num-rounds 1")
    assert sorted(seen) == [0, 2, 3] and read_metrics(folder)[-1]["clients"] == [0, 2, 3]
    n = studies[0].examples
    for name, t in load_file(folder / "checkpoint" / "theta.safetensors").items():
        mean = sum(n[k] * seen[k][name.removeprefix("0/")] for k in seen) / sum(n[k] for k in seen)
        torch.testing.assert_close(t.double(), mean, rtol=1e-6, atol=1e-9)


def test_a_run_whose_loss_is_not_finite_ends_with_all_its_files(tmp_path):
    """The weights are finite, the loss under them is not."""
    folder = done(tmp_path, "a", "--learning-rate 1e20 --local-steps 1 --num-rounds 1")
    (line,) = read_metrics(folder)
    results = read_json(folder / "run.json")["results"]
    assert not math.isfinite(float(line["val_loss"])) and not math.isfinite(float(line["worst_client_val_loss"]))
    assert not math.isfinite(float(results["val_ppl"])) and results["best_val_loss"] == "nan"
    assert [alarm["detector"] for alarm in results["alarms"]] == ["diverged"] and results["stopped"] is None
    assert (folder / "final" / "adapter").is_dir()


def rising(monkeypatch):
    """Makes the logged loss rise from the third round on, by a half of itself a round."""
    real, told = fed_core.Study.quality, []

    def quality(self, thetas, split, rows, name):
        found = real(self, thetas, split, rows, name)
        if name == "val":
            told.append(len(self.run.metrics()) + 1 if (self.run.folder / "metrics.jsonl").exists() else 1)
            found["val_loss"] *= 1 + max(0, told[-1] - 2) / 2
        return found

    monkeypatch.setattr(fed_core.Study, "quality", quality)
    return told


@pytest.mark.parametrize("stop_on, rounds", [("never", 7), ("divergence", 5), ("any", 5)])
def test_stop_on_ends_the_run_at_the_alarm(stop_on, rounds, tmp_path, monkeypatch, capsys):
    rising(monkeypatch)
    folder = done(tmp_path, "a", f"--num-rounds 7 --local-steps 1 --probe-samples 0 --stop-on {stop_on}")
    results = read_json(folder / "run.json")["results"]
    assert results["rounds"] == rounds == read_metrics(folder)[-1]["round"]
    found = [alarm for alarm in results["alarms"] if alarm["detector"] == "diverged"]
    assert [alarm["round"] for alarm in found] == [5]  # the third loss in a row above 1.3 times the best
    assert results["stopped"] == (None if stop_on == "never" else found[0])
    assert "alarm: round 5: " in capsys.readouterr().err
    live = [alarm for line in read_metrics(folder) for alarm in line.get("alarms", [])]
    after = detectors.run_detectors(detectors.curves_of(read_metrics(folder)))
    assert sorted(a["message"] for a in live) == sorted(a.message for a in after)


def test_a_run_that_was_cut_off_after_its_last_alarm_does_not_go_on(tmp_path, monkeypatch):
    more = "--num-rounds 7 --local-steps 1 --probe-samples 0 --stop-on divergence"
    rising(monkeypatch)
    whole = done(tmp_path, "whole", more)
    real = Run.write_final

    def broken(self, write):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "write_final", broken)
    assert call(*words(tmp_path, "a", more)) == 130
    monkeypatch.setattr(Run, "write_final", real)
    assert call(*words(tmp_path, "a", more), "--resume") == 0
    ends = [read_json(folder / "run.json")["results"] for folder in (whole, tmp_path / "a")]
    assert ends[0]["stopped"] == ends[1]["stopped"] and ends[0]["rounds"] == ends[1]["rounds"] == 5
    assert lines_of(whole) == lines_of(tmp_path / "a")


def test_groups_are_of_all_clients_however_many_are_compared_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(fed_core, "WATCHED", 2)
    studies = spied(monkeypatch)
    folder = done(tmp_path, "a", "--cluster updates --num-clusters 4 --num-rounds 2 --eval-every 2")
    assert studies[0].group.tolist() == [0, 1, 2, 3] == read_metrics(folder)[-1]["group"]
    for g in range(4):
        assert (folder / "final" / f"group_{g}" / "adapter_model.safetensors").exists()
    done(tmp_path, "b", "--num-rounds 1")
    row = read_metrics(tmp_path / "b")[-1]
    assert len(row["update_cosines"]) == 2 == len(row["compared"]) and set(row["compared"]) <= set(row["clients"])


def test_groups_of_clients_by_their_topics(tmp_path):
    folder = done(tmp_path, "a", "--cluster labels --num-clusters 2 --num-rounds 1 --alpha 0.05")
    partition, group = read_json(folder / "partition.json"), read_metrics(folder)[-1]["group"]
    main = [int(np.argmax(row)) for row in partition["label_histograms"]]
    assert set(group) == {0, 1} and group[0] == 0
    for i in range(4):
        for j in range(i):
            if main[i] == main[j] and max(partition["label_histograms"][i]) > 30:
                assert group[i] == group[j] or max(partition["label_histograms"][j]) <= 30


# -------------------------------------------------------------------------------------- the source's commands

SMALL = "--model tiny --dataset demo --tokenizer bpe:400 --max-length 24 --max-samples 200 --eval-samples 16"
SMALL += " --local-steps 1 --batch-size 2 --probe-samples 4 --threads 1"


@pytest.mark.parametrize(
    "documented, name",
    [
        ("--algorithm fedavg --partition topic_skew --num-rounds 50", "fedavg_topic_skew_alpha_0.1_demo_tiny"),
        ("--algorithm fedprox --partition style_skew --mu 0.01", "fedprox_style_skew_length_demo_tiny"),
        ("--algorithm scaffold --partition token_skew", "scaffold_token_skew_frequency_demo_tiny"),
        ("--config configs/default.yaml", "fedavg_topic_skew_alpha_0.1_demo_tiny"),
    ],
)
def test_documented_commands(documented, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/default.yaml").write_text((ROOT / "llm_noniid/configs/default.yaml").read_text())
    few = "" if "--num-rounds" in documented else "--num-rounds 5"  # the evaluation is at each fifth
    assert call(*shlex.split(f"{documented} {SMALL} {few}")) == 0
    said = capsys.readouterr()
    assert "warning" not in said.err
    assert said.out.splitlines()[-1] == f"results/{name}_lr_5e-05_seed_42"
    folder = tmp_path / said.out.splitlines()[-1]
    rounds = [line["round"] for line in read_metrics(folder)]
    assert rounds == (list(range(5, 51, 5)) if "50" in documented else [5])
    assert len(read_metrics(folder)[-1]["client_val_loss"]) == 10
    assert {f.name for f in folder.iterdir()} >= {"run.json", "partition.json", "final", "checkpoint", "base"}
