"""Outcomes, the questions' verdicts and the page of llm_noniid, on run folders with known numbers."""

import base64
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from noniid_made import make_run, make_seeds
from scipy import stats

from common.cli import UsageError
from llm_noniid import outcomes, report, verdicts
from llm_noniid.comparing import CONFIRMED, REFUTED, UNDECIDED, UNMEASURED, Part, combine, compare, majority, quantile
from plots import noniid_runs
from plots.noniid import STUDY, TABLE
from plots.runs import like_with_like, read_runs


def only(folder):
    """The Context of the largest group of like runs."""
    runs, _ = read_runs([folder], STUDY)
    return outcomes.Context([outcomes.outcome_of(run) for run in like_with_like(runs, TABLE.free)[0][1]])


# ------------------------------------------------------------------------------------------------ outcomes


def rows(*losses, alarm=None, before=None):
    lines = [{"round": 0, "val_loss": before}] if before else []
    lines += [{"round": t, "val_loss": v} for t, v in enumerate(losses, start=1)]
    if alarm:
        lines[0]["alarms"] = [{"detector": alarm}]
    return lines


JUDGED = [
    (rows(4.0, 3.0), None, ""),
    (rows(4.0, 4.0), None, ""),
    (rows(4.0, 3.0, 4.1), None, "ends above its first evaluation"),
    (rows(4.0, 3.0, alarm="diverged"), None, "diverged"),
    (rows(4.0, 3.0, alarm="slow"), None, ""),
    (rows(4.0, "nan"), None, "the loss is not finite"),
    (rows("inf"), None, "the loss is not finite"),
    ([], None, "no evaluation"),
    (rows(before=4.0), None, "no evaluation"),
    # broken in its first round, falling since: only the loss before training tells
    (rows(9.0, 7.0), None, ""),
    (rows(9.0, 7.0), 5.0, "ends above the model before training"),
    (rows(9.0, 7.0), 7.0, ""),
    (rows(9.0, 7.0, before=5.0), None, "ends above the model before training"),
    (rows(9.0, 7.0, before=8.0), None, ""),
    (rows(4.0, 4.5, before=8.0), None, "ends above its first evaluation"),
]


@pytest.mark.parametrize(("lines", "start", "why"), JUDGED)
def test_a_run_fails_when_it_diverged_or_ends_above_where_it_began(lines, start, why):
    assert outcomes.failure(lines, start) == why


@pytest.mark.parametrize(("lines", "why"), [(lines, why) for lines, start, why in JUDGED if start is None and lines])
def test_the_table_and_the_questions_agree_on_what_failed(tmp_path, lines, why):
    make_run(tmp_path, [4.0])
    (run,), _ = read_runs([tmp_path], STUDY)
    run.rows[:] = lines
    assert noniid_runs.has_failed(run) == bool(outcomes.outcome_of(run).failed) == bool(why)


def test_the_loss_before_training_is_that_of_round_0_or_of_an_old_run_of_no_size(tmp_path):
    make_run(tmp_path, [5.0], learning_rate=1e-30, num_rounds=1, partition="iid")
    make_run(tmp_path, [9.0, 7.0])
    make_run(tmp_path, [9.0, 7.0], seed=1)
    runs = only(tmp_path).find()
    assert runs[0].failed == "ends above the model before training" and not runs[1].failed
    # newer runs log it themselves, as round 0
    folder = make_run(tmp_path / "new", [4.0, 3.0])
    lines = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text('{"round": 0, "val_loss": 2.5}\n' + lines)
    (run,) = only(tmp_path / "new").find().values()
    assert run.start_loss == 2.5 and run.curve("val_loss") == ([1, 2], [4.0, 3.0])
    assert run.failed == "ends above the model before training"


def test_a_run_without_finite_updates_failed_with_an_infinite_loss(tmp_path):
    reason = "round 2: the updates of all 10 clients are not finite: lower --learning-rate"
    make_run(tmp_path, [4.0], "failed", reason)
    make_run(tmp_path, [4.0], "failed", "no space left", seed=1)
    (run,) = only(tmp_path).find().values()
    assert run.last("val_loss") == math.inf and run.failed == "no update was finite" and run.unstable


def test_what_the_study_said_of_a_run_in_its_log_counts(tmp_path):
    make_run(tmp_path, [4.0, 3.0])
    (run,), _ = read_runs([tmp_path], STUDY)
    run.results["failed"] = "ends above the model before training"
    assert outcomes.outcome_of(run).failed == run.results["failed"] and noniid_runs.has_failed(run)


def test_settings_ignore_what_a_run_does_not_read(tmp_path):
    make_run(tmp_path, [4.0, 3.0], mu=0.5, num_clusters=7)
    make_run(tmp_path, [4.0, 3.0], seed=1)
    make_run(tmp_path, [4.0, 3.0], partition="iid", alpha=3.0)
    make_run(tmp_path, [4.0, 3.0], partition="iid", seed=1)
    context = only(tmp_path)
    assert sorted(context.find()) == sorted(context.find(partition="iid")) == [0, 1]


def test_runs_of_equal_sizes_are_another_setting_than_those_whose_sizes_are_drawn():
    drawn = {"algorithm": "fedavg", "partition": "topic_skew", "alpha": 0.1, "seed": 0}
    made = {"a": drawn, "b": drawn | {"sizes": "equal"}, "c": drawn | {"seed": 1}, "iid": {**drawn, "partition": "iid"}}
    runs = [outcomes.Outcome(name, method, [], {}, "finished") for name, method in made.items()]
    context = outcomes.Context(runs)
    assert {run.name for run in context.find().values()} == {"a", "c"}
    assert {run.name for run in context.find(sizes="equal").values()} == {"b"}
    assert {run.name for run in context.find(partition="iid").values()} == {"iid"}


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


@pytest.mark.parametrize(("sigmas", "word"), [(0.9, "open"), (1.1, "open"), (1.9, "open"), (2.1, "more")])
def test_of_three_seeds_two_standard_deviations_decide_and_not_one(sigmas, word):
    differences = 0.1 + 0.1 / sigmas * np.array([-1.0, 0.0, 1.0])  # mean 0.1, standard deviation 0.1 / sigmas
    assert compare(dict.fromkeys(range(3), 5.0), dict(enumerate(5.0 + differences)))[0] == word


@pytest.mark.parametrize(
    ("held", "of", "status"),
    [(0, 0, UNMEASURED), (1, 1, UNDECIDED), (1, 2, UNDECIDED), (2, 4, UNDECIDED), (2, 3, CONFIRMED), (3, 4, CONFIRMED)]
    + [(0, 2, REFUTED), (0, 1, UNDECIDED), (1, 4, UNDECIDED)],
)
def test_half_of_the_seeds_are_no_majority(held, of, status):
    assert majority(dict(enumerate(range(of))), lambda seed: seed < held) == (status, held)


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


# ----------------------------------------------------------------------------------------------------- page


@pytest.mark.parametrize(("n", "c"), [(2, 6.04), (3, 2.0), (4, 1.34)])
def test_how_many_standard_deviations_decide(n, c):
    """The t-test's p-value at c standard deviations is the same for every number of seeds."""
    assert quantile(n) == pytest.approx(c, abs=0.01)
    values = np.arange(n) - (n - 1) / 2
    values += quantile(n) * values.std(ddof=1)
    assert stats.ttest_1samp(values, 0).pvalue == pytest.approx(0.0742, abs=3e-4)


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
    _, _, maps, notes = report.judged(tmp_path)
    assert len(maps) == 2 and len(notes) == 2 and all("damaged" in note for note in notes)
    (kept,) = outcomes.maps_of(only(tmp_path), maps)
    assert kept["setting"]["model"].endswith("/small")
    assert "damaged" in report.text(tmp_path)


def test_the_page_is_one_file_that_loads_nothing(tmp_path):
    folder = tmp_path / "runs"
    make_seeds(folder, 3.0, model="/models/<b>&small")
    make_run(folder, [4.0, math.inf, 9.0], model="/models/<b>&small", partition="iid", alarms=[("diverged", 2)])
    reason = "round 1: the updates of all 10 clients are not finite: lower it"
    make_run(folder, [], "failed", reason, model="/models/<b>&small", partition="style_skew")
    (folder / "map").mkdir()
    (folder / "map/failure_map.json").write_text(MAP)
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
        "When does federated training break down?",
        "High learning rate",
        "<b>&small",
        "not drawn: noniid_similarity.png needs",
        "diverged <seen>",
        "Not monotone: alpha 0.1 fails at 0.1 but works at 0.3",
        "Loss before training: 5.0000",
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
