"""The table of lora_glue_fl's runs, on made-up run folders."""

import json

from glue_folders import CENTRAL, FULL, parse, write_run, write_study

from lora_glue_fl.glue_tasks import TASKS
from plots import glue_runs, glue_table


def cells(text):
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert len({len(row) for row in rows}) == 1
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def test_the_table_has_mean_spread_and_differences_seed_by_seed(tmp_path, capsys):
    for seed, (central, svd, naive) in enumerate([(0.70, 0.60, 0.59), (0.72, 0.65, 0.63), (0.74, 0.70, 0.67)]):
        write_run(tmp_path, CENTRAL, central, seed)
        write_run(tmp_path, value=svd, seed=seed)
        write_run(tmp_path, value=naive, seed=seed, aggregate="naive")
    write_run(tmp_path, value=0.5, seed=9, aggregate="ffa")
    glue_table.main(parse(glue_table, tmp_path, "--markdown"))
    text = capsys.readouterr().out
    about = "### RTE, glue, roberta-base, r 4, alpha 8, 3 clients, IID, 3 rounds, 1 local epoch, lr 0.0005, 90 training"
    assert text.startswith(about)
    table = cells(text)
    svd = table["SVD (FlexLoRA)"]
    assert (svd["Accuracy (%)"], svd["best"]) == ("65.00 +- 5.00", "66.00 +- 5.00")
    assert svd["vs central"] == "-7.00 +- 3.00", "the spread of the pairs, not of the runs"
    assert (svd["error %"], svd["discarded %"]) == ("20.00 +- 0.00", "4.00 +- 0.00")
    assert (svd["MB up"], svd["MB down"], svd["minutes"], svd["seeds"]) == ("3.00", "9.00", "1.0 +- 0.0", "3")
    assert table["FFA-LoRA"]["error %"] == "<0.01" and table["FFA-LoRA"]["discarded %"] == "-"
    assert table["FFA-LoRA"]["vs central"] == "-", "no central run of that seed"
    assert table["Central LoRA"]["MB up"] == "-" and table["Central LoRA"]["vs central"] == "-"
    glue_table.main(parse(glue_table, tmp_path, "--markdown", "--against", "svd"))
    table = cells(capsys.readouterr().out)
    assert table["Naive (FedIT)"]["vs svd"] == "-2.00 +- 1.00" and table["Central LoRA"]["vs svd"] == "+7.00 +- 3.00"


def test_a_headline_is_before_the_other_metrics_of_its_task():
    order = list(glue_runs.METRICS)
    assert all(sorted(task.metrics, key=order.index) == list(task.metrics) for task in TASKS.values())


def test_the_table_has_all_metrics_of_a_task_the_headline_first(tmp_path, capsys):
    folder = write_run(tmp_path, task_name="stsb", value=0.8)
    manifest = json.loads((folder / "run.json").read_text())
    manifest["results"] |= {"val_spearman": 0.79}
    (folder / "run.json").write_text(json.dumps(manifest))
    glue_table.main(parse(glue_table, tmp_path, "--markdown"))
    row = cells(capsys.readouterr().out)["SVD (FlexLoRA)"]
    assert list(row)[1:4] == ["Pearson correlation (x 100)", "Spearman correlation (x 100)", "best"]
    assert (row["Pearson correlation (x 100)"], row["Spearman correlation (x 100)"]) == ("80.00", "79.00")


def test_the_wide_table_has_a_row_per_setting_and_a_column_per_rule(tmp_path, capsys):
    write_study(tmp_path)
    glue_table.main(parse(glue_table, tmp_path, "--markdown", "--wide", "--tasks", "cola", "rte"))
    first = capsys.readouterr().out.split("\n### ")[0]
    table = cells(first)
    assert list(table) == [f"RTE, {k}" for k in ("3 clients, IID", "3 clients, Dirichlet 0.5", "20 clients, IID")] + [
        "CoLA, 3 clients, IID"
    ]
    row = table["RTE, 3 clients, IID"]
    names = [glue_runs.KINDS[kind] for kind in ("central", *glue_runs.RULES)]
    assert list(row) == ["setting", "metric", *names, "seeds"]
    assert (row["Central LoRA"], row["SVD (FlexLoRA)"], row["seeds"]) == ("71.0 +- 1.4", "62.0 +- 2.8", "2")
    assert table["CoLA, 3 clients, IID"]["Naive (FedIT)"] == "-"


def test_central_runs_alone_have_a_table(tmp_path, capsys):
    write_run(tmp_path, CENTRAL, 0.7)
    write_run(tmp_path, FULL, 0.72, learning_rate=2e-5)
    glue_table.main(parse(glue_table, tmp_path, "--markdown"))
    text = capsys.readouterr().out
    assert "Central LoRA | 70.00" in text and "Central, all weights | 72.00" in text


def test_a_seed_without_a_result_is_a_dash_not_a_mean_of_the_others(tmp_path, capsys):
    write_run(tmp_path, seed=0)
    folder = write_run(tmp_path, seed=1, drop=["val_accuracy"])
    manifest = json.loads((folder / "run.json").read_text())
    manifest["results"]["val_accuracy"] = "nan"
    (folder / "run.json").write_text(json.dumps(manifest))
    glue_table.main(parse(glue_table, tmp_path, "--markdown"))
    row = cells(capsys.readouterr().out)["SVD (FlexLoRA)"]
    assert row["Accuracy (%)"] == "-" and row["best"] == "51.00 +- 0.00"
