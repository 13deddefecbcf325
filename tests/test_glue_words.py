"""README.md and RESULTS.md of lora_glue_fl: their tables are those that plots/tables.py prints from the logs."""

import pytest
from harness import ROOT
from made_runs import call, tables

STUDY = ROOT / "lora_glue_fl"


@pytest.mark.parametrize("log", ["trajectories", "replay", "small"])
def test_the_results_are_what_the_command_prints(log):
    code, text, err = call("plots/tables.py lora_glue_fl --data-dir", STUDY / "results" / f"{log}.jsonl")
    assert code == 0, err
    written = (STUDY / "RESULTS.md").read_text().splitlines()
    assert [line for line in text.splitlines() if line not in written] == []


def test_the_readmes_table_is_the_first_of_whole_runs():
    part = (STUDY / "README.md").read_text().partition("## Four rounds")[2].partition("##")[0]
    lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in part.splitlines() if line[:2] == "| "]
    (_, rows), *_ = tables("lora_glue_fl --data-dir", STUDY / "results" / "trajectories.jsonl")
    head, _, *shown = lines
    assert len(head) == 6 and len(shown) == 8
    for label, *cells in shown:
        assert cells == [rows[label][name] for name in head[1:]]
