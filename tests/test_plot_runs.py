"""What the plots read of runs: folders and logs alike, facts of run.json, seeds of one curve, looks, captions."""

import json
import shlex

import numpy as np
import pytest
from fixed_runs import DENSE, SPARSE, STUDIES, change, change_rows, unpack, vit_study, write_mamba, write_vit
from noniid_made import write_regimes
from plotting import call, figures

from common.cli import UsageError
from plots import mamba, tables, vit
from plots.runs import read_runs
from plots.seeds import curves_of, paired
from plots.style import looks_of

ROOT = tables.ROOT


def log_of(folders, path):
    """A log with the runs of these folders."""
    rows = [json.loads((folder / "run.json").read_text(encoding="utf-8")) for folder in folders]
    for row, folder in zip(rows, folders, strict=True):
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        row |= {"name": folder.name, "curve": [json.loads(line) for line in lines]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- folders and logs


def test_a_log_and_its_folders_give_the_same_runs(tmp_path):
    vit_study(tmp_path / "runs")
    log = log_of(sorted((tmp_path / "runs").iterdir()), tmp_path / "results" / "all.jsonl")
    (folders, _), (lines, _) = read_runs(tmp_path / "runs", vit.STUDY), read_runs(log, vit.STUDY)
    assert len(folders) == len(lines) == 20
    for one, other in zip(folders, lines, strict=True):
        assert one.folder.name == other.name and other.folder is None
        for fact in ("args", "method", "data", "ended", "results", "rows", "kind", "setting", "variant", "seed"):
            assert getattr(one, fact) == getattr(other, fact), fact
    assert all(type(run.args["num_rounds"]) is int for run in lines if "num_rounds" in run.args), "8 stays 8"


def test_one_call_reads_several_folders_logs_and_studies(tmp_path):
    write_mamba(tmp_path / "a")
    log = log_of([write_vit(tmp_path / "b", name="one")], tmp_path / "logs" / "vit.jsonl")
    runs, notes = read_runs([tmp_path / "a", log], mamba.STUDY, vit.STUDY)
    assert [(run.study.name, run.command) for run in runs] == [("mamba_fl", "fed_avg"), ("vit_sparse_fl", DENSE)]
    assert notes == []
    with pytest.raises(UsageError, match="no finished run of central, fed_avg"):
        read_runs(log, mamba.STUDY)


# ---- facts of run.json


def test_the_method_of_run_json_decides_and_an_old_run_gets_it_from_its_args(tmp_path):
    old = write_vit(tmp_path / "old", SPARSE, calibration_rounds=1, lr=0.5, threads=2)
    (run,), _ = read_runs(old, vit.STUDY)
    assert run.kind == "random" and run.method["lr"] == 0.5 and run.method["seed"] == 0
    assert "calibration_rounds" not in run.method, "random masks are not calibrated"
    assert "threads" not in run.method and "output_dir" not in run.method
    # the same args, but run.json says what the run read
    args = run.args
    for seed, read in ((0, ["lr", "seed"]), (1, ["lr", "seed"]), (2, ["lr", "seed", "calibration_rounds"])):
        folder = write_vit(tmp_path / "new", SPARSE, seed=seed, calibration_rounds=seed)
        change(folder, method={key: args[key] for key in read} | {"seed": seed})
    runs, _ = read_runs(tmp_path / "new", vit.STUDY)
    assert sorted(len(curve.runs) for curve in curves_of(runs)) == [1, 2]


def test_how_a_run_ended_is_read_or_for_old_runs_said_by_its_status(tmp_path):
    ended = {"how": "stopped", "by": "early_stopping", "round": 7, "clients": None, "reason": "no better"}
    change(write_vit(tmp_path, name="a"), ended=ended)
    write_vit(tmp_path, name="b")
    reason = "round 2: the updates of all 3 clients are not finite: lower --lr"
    change(write_vit(tmp_path, name="c", status="failed"), reason=reason)
    write_vit(tmp_path, name="d", status="running")
    runs, _ = read_runs(tmp_path, vit.STUDY, unfinished=True)
    facts = [tuple(run.ended[key] for key in ("how", "by", "round")) for run in runs]
    assert facts[1:] == [("finished", None, 30), ("failed", "left_out", 2), ("running", None, 30)]
    assert runs[0].ended == ended and runs[2].ended["reason"] == reason


def test_runs_of_tune_are_in_no_table_but_their_own(tmp_path):
    for place in (tmp_path, tmp_path / "tuning"):
        write_vit(place, name=f"of_{place.name}")
    assert [run.folder.name for run in read_runs(tmp_path, vit.STUDY)[0]] == [f"of_{tmp_path.name}"]
    assert [run.folder.name for run in read_runs(tmp_path / "tuning", vit.STUDY)[0]] == ["of_tuning"]


def test_facts_of_the_shards_are_the_same_from_data_or_from_clients(tmp_path):
    old, new = write_vit(tmp_path / "old", name="a"), write_vit(tmp_path / "new", name="a")
    change(new, data={"sha256": {"train": "abc"}}, clients={"classes": [50, 100]})
    (one,), (other,) = (read_runs(folder, vit.STUDY)[0] for folder in (old, new))
    assert one.facts == other.facts and one.setting == other.setting


def test_round_0_is_the_start_of_a_curve_and_no_best_round(tmp_path):
    folder = write_mamba(tmp_path, ppl=(400.0, 200.0))
    rows = (folder / "metrics.jsonl").read_text()
    start = json.dumps({"round": 0, "tokens": 0, "val_ppl": 5000.0}) + "\n"
    (folder / "metrics.jsonl").write_text(start + rows)
    (curve,) = curves_of(read_runs(tmp_path, mamba.STUDY)[0])
    tokens, mean = curve.series("val_ppl", "tokens")
    assert tokens.tolist() == [0, 1000, 2000] and mean.tolist() == [5000, 400, 200]
    assert curve.results("best_val_ppl").tolist() == [200]


# ---- what is compared with what


def test_of_two_runs_with_one_seed_the_later_counts_and_the_other_is_named(tmp_path):
    folders = [write_vit(tmp_path, name=name) for name in "ab"]
    log = log_of(folders, tmp_path / "log.jsonl")
    notes = []
    (curve,) = curves_of(read_runs(log, vit.STUDY)[0], notes=notes)
    assert [run.name for run in curve.runs] == ["b"] and [note.name for note in notes] == ["a"]


def test_differences_are_taken_over_the_seeds_that_both_have(tmp_path):
    for seed, (dense, sparse) in enumerate([(0.5, 0.4), (0.7, 0.5), (0.9, None)]):
        write_vit(tmp_path, accuracy=dense, seed=seed)
        if sparse:
            write_vit(tmp_path, SPARSE, accuracy=sparse, seed=seed)
    dense, sparse = curves_of(read_runs(tmp_path, vit.STUDY)[0])
    for curve, base, sign in ((sparse, dense, -1), (dense, sparse, 1)):
        np.testing.assert_allclose(paired(curve, base, "test_accuracy_last"), [sign * 0.1, sign * 0.2])
    np.testing.assert_allclose(paired(sparse, dense, "test_accuracy_last", np.divide), [0.8, 5 / 7])


# ---- figures


def test_a_method_has_one_look_in_every_figure_and_its_variants_differ_in_grey(tmp_path):
    STUDIES["vit"](tmp_path)
    write_vit(tmp_path, SPARSE, mask_strategy="least_sensitive", calibration_rounds=1)
    runs, _ = read_runs(tmp_path, vit.STUDY)
    every = looks_of(curves_of(runs))
    alone = looks_of(curves_of([run for run in runs if run.kind in ("random", "topk")]))
    assert alone["Random"] == every["Random"] and alone["Top-k updates"] == every["Top-k updates"]
    first, second = (look for name, look in every.items() if name.startswith("Least sensitive, "))
    assert first["color"] == second["color"] and first["marker"] == second["marker"]
    assert first["linestyle"] != second["linestyle"] and "markerfacecolor" in second
    in_grey = {(str(look["linestyle"]), look["marker"], look.get("markerfacecolor")) for look in every.values()}
    assert len(in_grey) == len(every)


def test_a_figure_names_what_it_leaves_out_and_budgets_that_differ(tmp_path):
    for rounds in (30, 60):
        for nc in (1, 5):
            write_vit(tmp_path, sharding="non_iid", nc=nc, num_rounds=rounds, local_steps=rounds // 10)
    change_rows(write_vit(tmp_path, name="cut", status="failed"), dict)
    write_mamba(tmp_path / "m", ppl=(300.0, 200.0))
    write_mamba(tmp_path / "m", "central", ppl=(300.0, 200.0, 100.0))
    assert "left out: cut" in figures("vit heterogeneity", tmp_path)["heterogeneity.png"].get_suptitle()
    drawn = figures("mamba", tmp_path / "m")
    assert "tokens differ: 2,000 to 3,000" in drawn["1_central_vs_fed_pure_ssm_1_layer.png"].get_suptitle()


def test_an_unknown_figure_is_refused_with_the_names(tmp_path):
    write_vit(tmp_path)
    code, _, error = call(["plots/vit.py", "heterogenity", "--data-dir", str(tmp_path)])
    assert code == 2 and "'heterogenity'" in error and "local_steps" in error and error.count("\n") == 1


# ---- the READMEs


COLUMNS = '--columns "val loss" "vs FedAvg" "mean client" "worst client" cosine "1 - CKA" failed seeds'
FIELDS = "--fields val_accuracy test_accuracy val_loss"
AGAINST = f"--against iid {FIELDS}"
# study -> {log: flags of the table that its README has of it}; a log that is not there yet has no table
SHOWN = {
    "mamba_fl": {"gap": "", "gap_demo": "", "source": "", "source_tuned": ""},
    "vit_sparse_fl": {"rates": "--against dense"},
    "lora_glue_fl": {"small": "--wide", "replay": "--replay", "trajectories": "--against naive"},
}
SHOWN |= {"llm_noniid": {"study": COLUMNS, "regimes": AGAINST}}


def table_lines(study, *words):
    code, text, error = call(["plots/tables.py", study, *map(str, words)])
    assert code == 0, error
    return [line for line in text.splitlines() if line.startswith(("|", "###"))]


@pytest.mark.parametrize("study", SHOWN)
def test_the_readmes_tables_are_those_of_the_logs_and_of_the_folders_that_they_were_made_from(study, tmp_path):
    readme = (ROOT / study / "README.md").read_text(encoding="utf-8").splitlines()
    logs = sorted((ROOT / study / "results").glob("*.jsonl"))
    assert {log.stem for log in logs} <= SHOWN[study].keys()
    every = table_lines(study)
    for log in logs:
        unpack(log.relative_to(ROOT), tmp_path / log.stem)
        flags = shlex.split(SHOWN[study][log.stem])
        shown, other = (table_lines(study, *flags, "--data-dir", place) for place in (log, tmp_path / log.stem))
        assert shown == other
        if log.stem == "regimes":  # and what was compared with FedAvg
            beside = table_lines(study, "--against", "fedavg", *shlex.split(FIELDS), "--data-dir", log)
            shown = [*shown, *(line for line in beside if "[" in line)]
        missing = [line for line in shown if line.startswith("|") and line not in readme]
        assert not missing, f"print the table of {log} into its README:\n" + "\n".join(missing[:5])
        assert set(table_lines(study, "--data-dir", log)) <= set(every), "each log's tables stand apart"


def test_a_log_of_labels_beside_that_of_texts_has_tables_of_its_own(tmp_path):
    study = ROOT / "llm_noniid" / "results" / "study.jsonl"
    log = write_regimes(tmp_path / "regimes.jsonl", lambda *cell: 0.1, algorithms=("fedavg", "scaffold"))
    for flags in ("", COLUMNS, AGAINST, "--columns accuracy correction"):
        alone = [table_lines("llm_noniid", *shlex.split(flags), "--data-dir", place) for place in (study, log)]
        both = table_lines("llm_noniid", *shlex.split(flags), "--data-dir", study, log)
        assert len(both) == sum(map(len, alone)) and set(both) == {line for lines in alone for line in lines}, flags


def test_what_is_damaged_is_named_and_not_left_away(tmp_path):
    for seed in (0, 1):
        write_mamba(tmp_path, seed=seed)
    whole, _ = read_runs(tmp_path, mamba.STUDY)
    folder = whole[0].folder
    facts = (folder / "run.json").read_bytes()
    for content in (
        b"[" * 5000,
        b"[]",
        b"{}",
        b"\xff",
        None,
        *(change_part(facts, key) for key in ("args", "results")),
    ):
        (folder / "run.json").unlink(missing_ok=True)
        if content is not None:
            (folder / "run.json").write_bytes(content)
        runs, notes = read_runs(tmp_path, mamba.STUDY)
        assert len(runs) == len(whole) - 1 and [str(folder)] == [n.where for n in notes if "damaged" in n.why], content
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"\xe3\n")
    assert "damaged" in read_runs([tmp_path, log], mamba.STUDY)[1][-1].why


def change_part(facts, key):
    return json.dumps({**json.loads(facts), key: 3}).encode()
