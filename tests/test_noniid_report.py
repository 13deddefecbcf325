"""Outcomes, verdicts, tables and the HTML report, on run folders with known numbers."""

import base64
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from noniid_made import make_run, make_seeds
from scipy import stats

from common.cli import UsageError
from llm_noniid import outcomes, report, tables, verdicts
from llm_noniid.comparing import CONFIRMED, REFUTED, UNDECIDED, UNMEASURED, Part, combine, compare, quantile


def only(folder):
    found, _ = outcomes.read_outcomes(folder)
    return outcomes.contexts(found)[0]


# ------------------------------------------------------------------------------------------------ outcomes


def test_a_run_fails_when_it_diverged_or_ends_above_where_it_began():
    def rows(*losses, alarm=None):
        found = [{"round": i, "val_loss": v} for i, v in enumerate(losses)]
        if alarm:
            found[0]["alarms"] = [{"detector": alarm}]
        return found

    assert outcomes.failure(rows(4.0, 3.0)) == ""
    assert outcomes.failure(rows(4.0, 4.0)) == ""
    assert outcomes.failure(rows(4.0, 3.0, 4.1)) == "ends above its first evaluation"
    assert outcomes.failure(rows(4.0, 3.0, alarm="diverged")) == "diverged"
    assert outcomes.failure(rows(4.0, 3.0, alarm="slow")) == ""
    assert outcomes.failure(rows(4.0, "nan")) == outcomes.failure(rows("inf")) == "the loss is not finite"
    assert outcomes.failure([]) == "no evaluation"
    # broken in its first round, falling since: only the loss before training tells
    assert outcomes.failure(rows(9.0, 7.0)) == ""
    assert outcomes.failure(rows(9.0, 7.0), start_loss=5.0) == "ends above the model before training"
    assert outcomes.failure(rows(9.0, 7.0), start_loss=7.0) == ""


def test_the_loss_before_training_is_that_of_the_run_of_no_size(tmp_path):
    make_run(tmp_path, [5.0], learning_rate=1e-30, num_rounds=1, partition="iid")
    make_run(tmp_path, [9.0, 7.0])
    make_run(tmp_path, [9.0, 7.0], seed=1)
    runs = {run.seed: run for run in outcomes.read_outcomes(tmp_path)[0]}
    assert len(runs) == 2 and runs[0].start_loss == 5.0 and runs[1].start_loss is None
    # newer runs log it themselves, as round 0
    folder = make_run(tmp_path, [4.0, 3.0], seed=7)
    lines = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text('{"round": 0, "val_loss": 2.5}\n' + lines)
    run = outcomes.read_outcome(folder)
    assert run.start_loss == 2.5 and run.curve("val_loss") == ([1, 2], [4.0, 3.0])
    assert run.failed == "ends above the model before training"
    assert runs[0].failed and not runs[1].failed


def test_a_run_without_finite_updates_is_an_outcome_and_others_are_left_out(tmp_path):
    reason = "round 2: the updates of all 10 clients are not finite: lower --learning-rate"
    make_run(tmp_path, [4.0], "failed", reason, learning_rate=9.0)
    make_run(tmp_path, [4.0], "failed", "no space left", learning_rate=8.0)
    make_run(tmp_path, [4.0], "running", learning_rate=7.0)
    make_run(tmp_path, [4.0, 3.0])
    runs, notes = outcomes.read_outcomes(tmp_path)
    assert {run.args["learning_rate"] for run in runs} == {9.0, 5e-5}
    blown = next(run for run in runs if run.blown_up)
    assert blown.last("val_loss") == math.inf and blown.failed == "no update was finite" and blown.unstable
    assert len(notes) == 2 and any("no space left" in note for note in notes) and any("running" in n for n in notes)


def test_runs_of_a_failure_map_are_not_among_the_others(tmp_path):
    make_run(tmp_path, [4.0, 3.0])
    make_run(tmp_path / "map", [4.0, 3.0], learning_rate=0.3)
    (tmp_path / "map/failure_map.json").write_text("{}")
    assert len(outcomes.read_outcomes(tmp_path)[0]) == 1


def test_settings_ignore_what_a_run_does_not_read(tmp_path):
    make_run(tmp_path, [4.0, 3.0], mu=0.5, num_clusters=7)
    make_run(tmp_path, [4.0, 3.0], seed=1)
    make_run(tmp_path, [4.0, 3.0], partition="iid", alpha=3.0)
    make_run(tmp_path, [4.0, 3.0], partition="iid", seed=1)
    context = only(tmp_path)
    assert sorted(context.find()) == sorted(context.find(partition="iid")) == [0, 1]
    assert [factors["partition"] for factors, _ in context.groups()] == ["iid", "topic_skew"]
    assert context.words(context.groups()[0][0]) == "fedavg, iid"


def test_the_base_is_what_most_runs_share_and_the_default_among_ties(tmp_path):
    for lr in (1e-3, 1e-2):
        for seed in (0, 1) if lr == 1e-3 else (0,):
            make_run(tmp_path, [4.0, 3.0], learning_rate=lr, seed=seed, local_steps=20)
    make_run(tmp_path, [4.0, 3.0], algorithm="fedprox", mu=0.3, learning_rate=1e-3)
    for rate in (0.3, 0.5):  # as often as participation 1
        make_run(tmp_path, [4.0, 3.0], participation_rate=rate, learning_rate=1e-3, seed=2, local_steps=20)
        make_run(tmp_path, [4.0, 3.0], participation_rate=rate, learning_rate=1e-3, seed=3, local_steps=20)
        make_run(tmp_path, [4.0, 3.0], participation_rate=rate, learning_rate=1e-3, seed=4, local_steps=20)
    base = only(tmp_path).base
    assert base["learning_rate"] == 1e-3 and base["local_steps"] == 20 and base["participation_rate"] == 1.0
    assert base["mu"] == 0.3 and only(tmp_path).values("participation_rate") == [0.3, 0.5, 1.0]


def test_other_data_models_and_lengths_are_other_contexts(tmp_path):
    for other in ({}, {"dataset": "wikitext"}, {"num_rounds": 9, "seed": 1}, {"model": "gpt2", "seed": 2}):
        make_run(tmp_path, [4.0, 3.0], **other)
    make_run(tmp_path, [4.0, 3.0], model="/elsewhere/distilgpt2", seed=3)
    found = outcomes.contexts(outcomes.read_outcomes(tmp_path)[0])
    assert sorted(len(context.runs) for context in found) == [1, 1, 1, 2] and len(found[0].runs) == 2


# ------------------------------------------------------------------------------------------------ comparing


def test_a_difference_is_judged_by_its_spread_over_the_seeds():
    a = {0: 3.0, 1: 4.0, 2: 5.0}
    word, d, s = compare(a, {0: 3.1, 1: 4.12, 2: 5.11})
    assert word == "more" and d == pytest.approx(0.11) and s == pytest.approx(0.01)
    assert compare({k: v + 0.2 for k, v in a.items()}, a)[0] == "less"
    assert compare(a, {0: 3.3, 1: 4.0, 2: 5.0})[0] == "open"  # one seed only
    assert compare(a, {0: 3.001, 1: 4.002, 2: 5.001})[0] == "same"  # below the floor
    assert compare(a, {0: 3.009, 1: 4.0095, 2: 5.0092})[0] == "same"
    assert compare(a, {0: 3.02, 1: 4.0, 2: 5.01})[0] == "open"
    assert compare(a, {0: 9.0}) == ("open", 6.0, None)
    assert compare(a, {7: 9.0})[0] == compare({}, a)[0] == ""
    inf = dict.fromkeys(a, math.inf)
    assert compare(a, inf)[0] == "more" and compare(inf, a)[0] == "less" and compare(inf, inf)[0] == "open"
    assert compare(a, a | {0: math.inf})[0] == "open" and compare({0: 1.0}, {0: math.inf})[0] == "open"


def test_parts_are_combined():
    def parts(*statuses):
        return [Part("x", status, "") for status in statuses]

    assert combine(parts(CONFIRMED, CONFIRMED)) == CONFIRMED
    assert combine(parts(CONFIRMED, REFUTED, UNDECIDED)) == REFUTED
    assert combine(parts(CONFIRMED, UNMEASURED)) == combine(parts(CONFIRMED, UNDECIDED)) == UNDECIDED
    assert combine(parts(UNMEASURED, UNMEASURED)) == combine([]) == UNMEASURED
    assert combine(parts(REFUTED, CONFIRMED, UNMEASURED), any_of=True) == CONFIRMED
    assert combine(parts(REFUTED, REFUTED), any_of=True) == REFUTED
    assert combine(parts(REFUTED, UNDECIDED), any_of=True) == UNDECIDED
    assert combine([*parts(CONFIRMED), Part("x", REFUTED, "", beside=True)]) == CONFIRMED


# ------------------------------------------------------------------------------------------------- verdicts


def status_of(folder, judge, maps=()):
    status, parts = judge(only(folder), list(maps))
    assert all(part.claim and part.status and part.numbers for part in parts)
    return status


ALL = ("fedavg", "fedprox", "scaffold")


def make_map(algorithm, axis="learning_rate", **ends):
    boundary = [{"alpha": float(a), "works": w, "fails": f} for a, (w, f) in ends["ends"].items()]
    return {"algorithm": algorithm, "axis": axis, "seed": 0, "boundary": boundary, "points": [{}], "setting": {}}


def test_when_it_breaks_down(tmp_path):
    make_seeds(tmp_path, 3.0)
    make_seeds(tmp_path, 2.9, alpha=100.0)
    assert status_of(tmp_path, verdicts.breaks_down) == REFUTED
    falls = make_map("fedavg", ends={100: (0.1, 0.2), 0.1: (0.01, 0.02)})
    assert status_of(tmp_path, verdicts.breaks_down, [falls]) == REFUTED  # one seed stands beside, and decides nothing
    assert [p.status for p in verdicts.breaks_down(only(tmp_path), [falls])[1] if p.beside][-1] == CONFIRMED
    make_seeds(tmp_path, 4.5, alpha=0.01)
    assert status_of(tmp_path, verdicts.breaks_down) == CONFIRMED


@pytest.mark.parametrize(
    ("low", "high", "status"),
    [
        ((0.01, 0.02), (0.02, 0.04), CONFIRMED),
        ((None, 0.001), (0.02, None), CONFIRMED),
        ((0.04, 0.08), (0.02, 0.04), REFUTED),
        ((None, 0.1), (None, 0.1), UNDECIDED),
        ((0.1, 0.2), (0.1, 0.2), UNDECIDED),
        ((0.1, 0.2), (0.1, 0.4), UNDECIDED),
        ((0.01, None), (0.02, None), UNDECIDED),
    ],
)
def test_boundaries_are_judged_by_their_brackets(low, high, status):
    found = verdicts.boundary_falls(make_map("fedavg", ends={0.01: low, 100: high}))
    assert found.status == status and "alpha 0.01" in found.numbers


@pytest.mark.parametrize(("losses", "status"), [((3.1, 3.2, 3.3), CONFIRMED), ((3.1, 3.2, 3.0), REFUTED)])
def test_which_skews_hurt(tmp_path, losses, status):
    make_seeds(tmp_path, 3.0, partition="iid")
    for skew, loss in zip(verdicts.SKEWS, losses, strict=True):
        make_seeds(tmp_path, loss, partition=skew)
    assert status_of(tmp_path, verdicts.skews_hurt) == status


def test_how_the_algorithms_differ(tmp_path):
    for algorithm in ALL:
        make_seeds(tmp_path, 3.0, spread=0.0, algorithm=algorithm)
    maps = [make_map(a, ends={0.1: (0.1, 0.2)}) for a in ("fedavg", "scaffold")]
    assert status_of(tmp_path, verdicts.algorithms_differ, maps) == UNDECIDED  # other partitions are not measured
    for partition in ("iid", "style_skew", "token_skew"):
        for algorithm in ALL:
            make_seeds(tmp_path, 3.0, spread=0.0, algorithm=algorithm, partition=partition)
    assert status_of(tmp_path, verdicts.algorithms_differ, maps) == REFUTED
    maps[1]["boundary"][0] = {"alpha": 0.1, "works": 0.3, "fails": 0.4}
    status, parts = verdicts.algorithms_differ(only(tmp_path), maps)
    assert status == REFUTED and [p.status for p in parts if p.beside] == [CONFIRMED]
    maps[1]["setting"] = {"local_steps": 99}  # another setting is not compared
    assert not [p for p in verdicts.algorithms_differ(only(tmp_path), maps)[1] if p.beside]


@pytest.mark.parametrize(("loss", "status"), [(2.5, CONFIRMED), (3.0, REFUTED), (3.5, REFUTED)])
def test_whether_clusters_help(tmp_path, loss, status):
    make_seeds(tmp_path, 3.0)
    make_seeds(tmp_path, 3.4, cluster="updates")
    make_seeds(tmp_path, loss, cluster="labels")
    assert status_of(tmp_path, verdicts.clusters_help) == status


def test_iid_is_stable(tmp_path):
    for algorithm in ALL:
        make_seeds(tmp_path, 3.0, partition="iid", algorithm=algorithm)
    assert status_of(tmp_path, verdicts.iid_is_stable) == CONFIRMED
    odd = {"partition": "iid", "algorithm": "scaffold"}
    make_run(tmp_path, [4.0, 3.0], alarms=[("oscillating", 2)], seed=3, **odd)
    assert status_of(tmp_path, verdicts.iid_is_stable) == UNDECIDED
    for seed in range(4, 9):
        make_run(tmp_path, [4.0, 4.5], seed=seed, **odd)
    assert status_of(tmp_path, verdicts.iid_is_stable) == REFUTED


def test_topic_skew(tmp_path):
    make_seeds(tmp_path, 4.5)
    for algorithm in ALL[1:]:
        make_seeds(tmp_path, 3.0, algorithm=algorithm)
    assert status_of(tmp_path, verdicts.topic_skew_breaks_fedavg) == CONFIRMED
    other = tmp_path / "other"
    make_seeds(other, 3.5)
    for algorithm in ALL[1:]:
        make_seeds(other, 3.0, algorithm=algorithm)
    status, parts = verdicts.topic_skew_breaks_fedavg(only(other), [])
    assert [part.status for part in parts] == [REFUTED, CONFIRMED, CONFIRMED] and status == REFUTED


@pytest.mark.parametrize(("variance", "status"), [(0.6, CONFIRMED), (0.5, REFUTED), (0.4, REFUTED)])
def test_style_skew(tmp_path, variance, status):
    make_seeds(tmp_path, 3.0, partition="iid")
    make_seeds(tmp_path, 3.0, partition="style_skew", rows={"gradient_norm_variance": variance})
    assert status_of(tmp_path, verdicts.style_skew_gives_variance) == status


@pytest.mark.parametrize(("loss", "status"), [(3.1, CONFIRMED), (3.0, REFUTED)])
def test_token_skew(tmp_path, loss, status):
    for algorithm in ALL:
        make_seeds(tmp_path, 3.0, partition="iid", algorithm=algorithm)
        make_seeds(tmp_path, loss if algorithm == "scaffold" else 3.2, partition="token_skew", algorithm=algorithm)
    assert status_of(tmp_path, verdicts.token_skew_biases_all) == status


@pytest.mark.parametrize(("swing", "status"), [(0.2, CONFIRMED), (0.01, REFUTED)])
def test_low_participation(tmp_path, swing, status):
    for seed in range(3):
        for rate, size, more in ((1.0, 0.01, 0.0), (0.1, swing, 0.5)):
            losses = [4 - 0.1 * t + size * (-1) ** t + 0.001 * seed + more for t in range(8)]
            alarms = [("oscillating", 8)] if rate == 0.1 and swing > 0.1 and seed else []
            make_run(tmp_path, losses, alarms=alarms, participation_rate=rate, seed=seed, num_rounds=8)
    for seed in range(3, 5):
        make_run(tmp_path, [4 - 0.1 * t + 0.01 * (-1) ** t for t in range(8)], seed=seed, num_rounds=8)
    assert status_of(tmp_path, verdicts.few_clients_oscillate) == status


@pytest.mark.parametrize(
    ("ends", "status"),  # of topic skew and IID at the high learning rate
    [((4.5, 3.0), CONFIRMED), ((3.0, 3.0), REFUTED), ((4.5, 4.5), REFUTED), ((4.9, 4.5), CONFIRMED)],
)
def test_high_learning_rates(tmp_path, ends, status):
    for partition, end in zip(("topic_skew", "iid"), ends, strict=True):
        make_seeds(tmp_path, 3.0, partition=partition)
        for seed in range(2):
            make_run(tmp_path, [4.0, end + 0.001 * seed], partition=partition, learning_rate=0.1, seed=seed)
    assert status_of(tmp_path, verdicts.high_rates_diverge) == status


def test_what_is_not_measured_is_said_so(tmp_path):
    make_run(tmp_path, [4.0, 3.0], algorithm="fednova", client_optimizer="sgd")
    judged = verdicts.verdicts(only(tmp_path))
    assert len(judged) == 10 and {v.status for v in judged} == {UNMEASURED}
    assert {v.status for v in verdicts.verdicts(None)} == {UNMEASURED}
    one = tmp_path / "one"
    for partition in ("iid", *verdicts.SKEWS):  # one seed has no spread
        for algorithm in ALL:
            make_run(one, [4.0, 3.0 + 0.1 * len(partition)], partition=partition, algorithm=algorithm)
    assert {v.status for v in verdicts.verdicts(only(one))} == {UNDECIDED, UNMEASURED}


# --------------------------------------------------------------------------------------------------- tables


def test_table(tmp_path):
    for seed, (mine, other) in enumerate([(3.0, 3.1), (3.2, 3.32), (3.4, 3.51)]):
        make_run(tmp_path, [4.0, 3.6, 3.5, mine], seed=seed)
        make_run(tmp_path, [4.0, 3.7, 3.55, other], seed=seed, algorithm="scaffold", alarms=[("slow", 3)])
    make_run(tmp_path, [4.0, 9.0], seed=0, partition="iid")
    context = only(tmp_path)
    lines = {line[0]: dict(zip(tables.HEAD, line, strict=True)) for line in tables.rows(context)[1:]}
    fedavg, scaffold = lines["fedavg, topic skew"], lines["scaffold, topic skew"]
    assert fedavg["loss (nats)"] == "3.2 ± 0.2" and fedavg["difference"] == "-"
    assert scaffold["difference"] == "+0.11 ± 0.01" and scaffold["alarms"] == "slow 3"
    assert fedavg["rounds to target"] == "2/2/2" and scaffold["rounds to target"] == "3/3/3"
    assert lines["fedavg, iid"]["failed"] == "1 of 1" and lines["fedavg, iid"]["difference"] == "+6"
    assert fedavg["minutes"] == "0.1 ± 0" and fedavg["1 - CKA"].startswith("0.01")
    said = tables.text(tmp_path)
    assert "| scaffold, topic skew | 3.31 ± 0.2" in said and "### Verdicts" in said
    with pytest.raises(UsageError, match="is not a folder"):
        tables.read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no finished run"):
        tables.read(tmp_path / "empty")


# --------------------------------------------------------------------------------------------------- report


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


PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
MAP = """{"algorithm": "fedavg", "axis": "learning_rate", "seed": 0, "finished": true, "start_val_loss": 5.0,
 "points": [{"alpha": 0.1, "value": 0.01, "failed": false, "reason": "", "val_loss": 3.0, "run": "x"},
            {"alpha": 0.1, "value": 0.1, "failed": true, "reason": "diverged", "val_loss": null, "run": "y"}],
 "setting": {"model": "/elsewhere/<b>&small", "stop_on": "divergence"},
 "boundary": [{"alpha": 0.1, "works": 0.01, "fails": 0.1}],
 "violations": [{"alpha": 0.1, "failed": 0.1, "worked": 0.3}]}"""


def test_maps_of_other_models_and_damaged_ones_are_left_out(tmp_path):
    make_seeds(tmp_path, 3.0, model="/models/small")
    for name, content in (("mine", MAP.replace("<b>&small", "small")), ("other", MAP), ("bad", "{bad"), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "failure_map.json").write_text(content)
    maps, notes = outcomes.read_maps(tmp_path)
    assert len(maps) == 2 and len(notes) == 2 and all("damaged" in note for note in notes)
    (kept,) = outcomes.maps_of(only(tmp_path), maps)
    assert kept["setting"]["model"].endswith("/small")
    assert "damaged" in tables.text(tmp_path)


@pytest.mark.parametrize(("n", "c"), [(2, 6.04), (3, 2.0), (4, 1.34)])
def test_how_many_standard_deviations_decide(n, c):
    """The t-test's p-value at c standard deviations is the same for every number of seeds."""
    assert quantile(n) == pytest.approx(c, abs=0.01)
    values = np.arange(n) - (n - 1) / 2
    values += quantile(n) * values.std(ddof=1)
    assert stats.ttest_1samp(values, 0).pvalue == pytest.approx(0.0742, abs=3e-4)


def test_the_report_is_one_file_that_loads_nothing(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    make_seeds(runs, 3.0, model="/models/<b>&small")
    make_run(runs, [4.0, math.inf, 9.0], model="/models/<b>&small", partition="iid", alarms=[("diverged", 2)])
    reason = "round 1: the updates of all 10 clients are not finite: lower it"
    make_run(runs, [], "failed", reason, model="/models/<b>&small", partition="style_skew")
    (runs / "map").mkdir()
    (runs / "map/failure_map.json").write_text(MAP)
    script = tmp_path / "plots.py"
    script.write_text(
        "import pathlib, sys\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out-dir') + 1])\n"
        "out.mkdir(parents=True, exist_ok=True)\n"
        f"(out / 'noniid_drift_iid.png').write_bytes({PNG!r})\n"
        "print('not drawn: a heat map')\n"
    )
    monkeypatch.setattr(report, "draw", lambda folder, draw=report.draw: draw(folder, script))
    (runs / "figures").mkdir()
    (runs / "figures/old.png").write_bytes(PNG)
    out = report.write(runs, tmp_path / "new/report.html")
    text = out.read_text(encoding="utf-8")
    page = Checker()
    page.feed(text)
    page.close()
    assert not page.open and not page.tags & {"script", "iframe", "object", "embed", "base"}
    assert page.loads and all(value.startswith("data:") for value in page.loads)
    assert "@import" not in text and "url(" not in text and "http" not in text
    images = [value for value in page.loads if value.startswith("data:image/png;base64,")]
    assert [base64.b64decode(image.partition(",")[2]) for image in images] == [PNG]  # not the old one
    said = " ".join(page.text)
    for words in (
        "When does federated training break down?",
        "High learning rate",
        "<b>&small",
        "not drawn: a heat map",
        "diverged <seen>",
        "Not monotone: alpha 0.1 fails at 0.1 but works at 0.3",
        "Loss before training: 5.0000",
        reason,
    ):
        assert words in said, words
    assert text.count("<polyline") == 4 and ">D<title>" in text
    assert "damaged" not in said


def test_a_report_without_figures_says_so(tmp_path):
    make_run(tmp_path, [4.0, 3.0])
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no matplotlib')")
    assert report.draw(tmp_path, broken) == ([], ["broken.py ended with exit code 1: no matplotlib"])
    assert report.draw(tmp_path, tmp_path / "none.py") == ([], ["no figures: none.py is not there"])
    assert "No alarm in any run" in report.write(tmp_path, tmp_path / "r.html", figures=False).read_text()
