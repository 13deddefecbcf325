"""What counts as failed, the paired differences and the page of llm_noniid, on run folders with known numbers."""

import base64
import math
from html.parser import HTMLParser

import pytest
from noniid_made import make_run, make_seeds
from plotting import tables

from common.cli import UsageError
from common.curves import failure
from llm_noniid import report
from plots.noniid import STUDY
from plots.noniid_runs import has_failed
from plots.runs import read_runs


def rows(*losses, alarm=None, before=None):
    lines = [{"round": 0, "val_loss": before}] if before else []
    lines += [{"round": t, "val_loss": v} for t, v in enumerate(losses, start=1)]
    if alarm:
        lines[0]["alarms"] = [{"detector": alarm}]
    return lines


JUDGED = [
    (rows(4.0, 3.0), ""),
    (rows(4.0, 4.0), ""),
    (rows(4.0, 3.0, 4.1), "ends above its first evaluation"),
    (rows(4.0, 3.0, alarm="diverged"), "diverged"),
    (rows(4.0, 3.0, alarm="slow"), ""),
    (rows(4.0, "nan"), "the loss is not finite"),
    (rows("inf"), "the loss is not finite"),
    ([], "no evaluation"),
    (rows(before=4.0), "no evaluation"),
    # broken in its first round, falling since: only the loss before training tells
    (rows(9.0, 7.0), ""),
    (rows(9.0, 7.0, before=7.0), ""),
    (rows(9.0, 7.0, before=5.0), "ends above the model before training"),
    (rows(9.0, 7.0, before=8.0), ""),
    (rows(4.0, 4.5, before=8.0), "ends above its first evaluation"),
]


@pytest.mark.parametrize(("lines", "why"), JUDGED)
def test_a_run_fails_when_it_diverged_or_ends_above_where_it_began(lines, why):
    assert failure(lines) == why


@pytest.mark.parametrize(("lines", "why"), [judged for judged in JUDGED if judged[0]])
def test_the_table_says_what_failed_and_a_log_what_it_said(tmp_path, lines, why):
    make_run(tmp_path, [4.0])
    (run,), _ = read_runs([tmp_path], STUDY)
    run.rows[:] = lines
    assert has_failed(run) == bool(why)
    run.results["failed"] = "what the study's log said"
    assert has_failed(run)


class Checker(HTMLParser):
    """Balanced tags; what is loaded from where; text."""

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.tags, self.text = [], [], set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in ("meta", "link", "img", "rect", "circle"):
            self.open.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "xlink:href")]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_paired_differences_are_printed_with_their_intervals(tmp_path):
    """Differences 0.2, 0.3, 0.4 to IID: 0.3 -+ 4.303 * 0.1 / sqrt 3."""
    for seed, above in enumerate((0.2, 0.3, 0.4)):
        make_run(tmp_path, [4.0, 3.0], partition="iid", seed=seed, learning_rate=1e-3)
        make_run(tmp_path, [4.0, 3.0 + above], seed=seed)
        make_run(tmp_path, [4.0, 2.5 + above], seed=seed, algorithm="fedprox")
        make_run(tmp_path, [4.0, 2.9], partition="iid", seed=seed, local_steps=9)  # other local work is no control
    _, (_, iid), (_, fedavg) = tables("compare noniid", tmp_path)
    assert len(iid) == len(fedavg) == 4 and not any("val accuracy" in row for row in iid.values())
    ((name, vs),) = ((name, row["val loss vs IID"]) for name, row in iid.items() if row["val loss vs IID"] != "-")
    assert name.startswith("FedAvg") and vs == "+0.300 [+0.052, +0.548], 3"
    (vs,) = (row["mean client val loss vs FedAvg"] for name, row in fedavg.items() if "FedProx" in name)
    assert vs == "-0.500 [-0.500, -0.500], 3"


def test_the_page_is_one_file_that_loads_nothing(tmp_path):
    folder = tmp_path / "runs"
    make_seeds(folder, 3.0, model="/models/<b>&small")
    make_run(folder, [4.0, math.inf, 9.0], model="/models/<b>&small", partition="iid", alarms=[("diverged", 2)])
    reason = "round 1: the updates of all 10 clients are not finite: lower it"
    make_run(folder, [], "failed", reason, model="/models/<b>&small", partition="style_skew")
    out = report.write(folder, tmp_path / "new/report.html")
    text = out.read_text(encoding="utf-8")
    page = Checker()
    page.feed(text)
    page.close()
    assert not page.open and not page.tags & {"script", "iframe", "object", "embed", "base"}
    assert page.loads and all(value.startswith("data:") for value in page.loads)
    assert "@import" not in text and "url(" not in text and "http" not in text
    images = [value for value in page.loads if value.startswith("data:image/png;base64,")]
    assert len(images) == len(list((folder / "figures").iterdir())) > 2
    assert all(base64.b64decode(image.partition(",")[2]).startswith(b"\x89PNG") for image in images)
    said = " ".join(page.text)
    for words in (
        "Differences to IID",
        "Differences to FedAvg",
        "<b>&small",
        "not drawn: noniid_similarity.png needs",
        "diverged <seen>",
        reason,
    ):
        assert words in said, words
    assert "damaged" not in said


def test_a_page_without_figures_or_runs(tmp_path):
    make_run(tmp_path, [4.0, 3.0])
    text = report.write(tmp_path, tmp_path / "r.html", figures=False).read_text()
    assert "No alarm in any run" in text and "<img" not in text and not (tmp_path / "figures").exists()
    with pytest.raises(UsageError, match="--results-dir .*nowhere is not a folder"):
        report.text(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no finished run"):
        report.write(tmp_path / "empty", tmp_path / "x.html")
