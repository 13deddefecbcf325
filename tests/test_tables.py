"""Tables: the committed logs computed a second time with plain Python, and runs with numbers of hand's size."""

import json
import math
import re
import statistics

import numpy as np
import pandas as pd
import pytest
from made_runs import ROOT, call, log, mamba, noniid, run, tables, vit
from scipy.interpolate import PchipInterpolator
from scipy.stats import t as student
from scipy.stats import ttest_1samp

from plots.noniid import failure
from plots.pairs import compared, estimate, holm, paired, pooled, spread
from plots.read import STUDIES, read, study
from plots.rows import comparable

GAP = ROOT / "mamba_fl" / "results" / "gap.jsonl"
AVERAGES = ROOT / "mamba_fl" / "results" / "averages.jsonl"
SPLIT = ROOT / "lora_glue_fl" / "results" / "split.jsonl"
RATES = ROOT / "vit_sparse_fl" / "results" / "rates.jsonl"
ROUNDS = ROOT / "llm_noniid" / "results" / "rounds.jsonl"
REPLAY = ROOT / "vit_sparse_fl" / "results" / "replay.jsonl"


def numbers(cell):
    return [float(one.replace(",", "")) for one in re.findall(r"[-+]?[\d,]*\.?\d+", cell)]


def by_hand(values):
    """(mean, low, high) of a paired t test."""
    n, mean = len(values), statistics.fmean(values)
    half = student.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


# ---- the committed logs, a second time


def test_mambas_ratios_are_those_of_the_log():
    """From five seeds on with the spread of their own; of three it is pooled over the rows of the table."""
    every = log("mamba_fl/results/gap.jsonl")
    ((_, rows),) = tables("mamba_fl --data-dir", GAP)

    def logs(name):
        base = "three_central" if name.startswith("three") else "central_topics" if "topics" in name else "central"
        base = base if base in every else "topics_central"
        pairs = [(line["results"], every[base][seed]["results"]) for seed, line in every[name].items()]
        return [math.log(mine["test_ppl_last"] / central["test_ppl_last"]) for mine, central in pairs]

    federated = [name for name in every if "central" not in name]
    df = sum(len(every[name]) - 1 for name in federated)
    sd = math.sqrt(sum((len(x) - 1) * statistics.variance(x) for x in map(logs, federated)) / df)
    shown = {tuple(numbers(row["test ratio to central"])): row for row in rows.values()}
    for name in federated:
        mean, low, high = by_hand(x := logs(name))
        if len(x) == 3:
            half = student.ppf(0.975, df) * sd / math.sqrt(3)
            low, high = mean - half, mean + half
        row = shown[*(round(math.exp(end), 3) for end in (mean, low, high)), *([df] if len(x) == 3 else [])]
        final = [line["results"]["final_val_ppl"] for line in every[name].values()]
        assert row["final val ppl"] == f"{statistics.fmean(final):.2f} ± {statistics.stdev(final):.2f}"
        assert numbers(row["averages"]) == [line["curve"][-1]["round"] for line in every[name].values()][:1]
    assert {row["to FedAvg at its LU"] for name, row in rows.items() if name.startswith("Central")} == {"-"}
    assert len(rows) == len(every) and sum(int(row["seeds"]) for row in rows.values()) == sum(map(len, every.values()))


def test_mambas_effects_are_those_of_the_log():
    """Each a mean over pairs of rows, seed by seed; at equal bytes against numpy's line through the logarithms."""
    every = log("mamba_fl/results/averages.jsonl")
    _, (_, shown) = tables("mamba_fl --data-dir", AVERAGES)

    def logs(name):
        return np.array([math.log(every[name][seed]["results"]["test_ppl_last"]) for seed in range(5)])

    def megabytes(name):
        last = every[name][0]["curve"][-1]
        return math.log(last["bytes_up"] + last["bytes_down"])

    def at_equal_bytes(name):
        alike = name.replace("group", "all").partition("_lu")[0]
        rows = sorted((one for one in every if one.startswith(alike)), key=megabytes)
        xs, ys = [megabytes(one) for one in rows], np.array([logs(one) for one in rows])
        return logs(name) - [np.interp(megabytes(name), xs, y) for y in ys.T]

    drift = [logs(name) - logs(name.replace("drift", "steps")) for name in every if "drift" in name]
    pooled = [logs(name) - logs(name.replace("pooled", "keep")) for name in every if "pooled" in name]
    group = [at_equal_bytes(name) for name in every if "group" in name and name.endswith("lu64")]
    found = {
        "group / all at equal bytes, R = 12": sum(group) / len(group),
        "drift / steps": sum(drift) / len(drift),
        "pooled / keep": sum(pooled) / len(pooled),
        "conv held back / all at R = 96": logs("conv_lu64") - logs("keep_all_steps_lu8"),
        "alone / central": logs("alone") - logs("central"),
    }
    for name, values in found.items():
        assert numbers(shown[name]["ratio, seeds"]) == [*(round(math.exp(x), 3) for x in by_hand(values)), 5]


def test_glues_splits_are_those_of_the_log():
    """What the split and what the product does, from the curves; Holm's correction written out."""
    every, values = log("lora_glue_fl/results/split.jsonl"), {}
    *_, (_, shown) = tables("lora_glue_fl --data-dir", SPLIT)

    def losses(name):
        return np.array([[row["val_loss"] for row in every[name][seed]["curve"]] for seed in range(5)])

    for shards, case in {"Dirichlet 0.3": "split", "IID": "split_iid"}.items():
        naive, split, svd = (losses(f"sst2_{case}_{rule}") for rule in ("naive", "naive_us", "svd_us"))
        pairs = {
            "split: naive in svd's split - naive": (split, naive),
            "product: svd - naive in svd's split": (svd, split),
        }
        for effect, (a, b) in pairs.items():
            row = f"{shards}, {effect}"
            for column, one in {"after 4 rounds": (a - b)[:, 4], "lowest": a.min(axis=1) - b.min(axis=1)}.items():
                assert numbers(shown[row][column]) == [*(round(x, 4) for x in by_hand(one)), 5]
                values[row, column] = ttest_1samp(one, 0).pvalue
    same = losses("sst2_split_rate_naive_us")[:, 4] - losses("sst2_split_naive")[:, 4]
    found = numbers(shown["Dirichlet 0.3, split, at naive's rate"]["after 4 rounds"])
    assert found == [*(round(x, 4) for x in by_hand(same)), 5]
    found, order = 0.0, sorted(values, key=values.get)
    for i, (row, column) in enumerate(order):
        found = max(found, min(1.0, values[row, column] * (len(order) - i)))
        assert shown[row][f"p, {column}"] == f"{found:.2g}"


@pytest.mark.parametrize("name", STUDIES)
def test_the_documents_have_the_printed_tables(name):
    folder = ROOT / name
    _, whole, _ = call(f"plots/tables.py {name}")
    said = (folder / "RESULTS.md").read_text()
    assert [line for line in whole.splitlines() if line and line not in said] == []
    printed, heads, shown = [rows for _, rows in tables(name)], None, 0
    for line in (folder / "README.md").read_text().splitlines():
        cells = line.strip("| ").split(" | ") if line.startswith("| ") else [""]
        if cells[0] in ("method", "rule"):
            heads = cells[1:]
        elif heads and len(cells) > 1 and "---" not in line:
            found = [rows[cells[0]] for rows in printed if cells[0] in rows]
            assert cells[1:] in [[row.get(head) for head in heads] for row in found]
            shown += 1
        elif len(cells) == 1:
            heads = None
    assert shown == 8


def test_vits_differences_are_those_of_the_log():
    """With a standard deviation pooled over the rows that are compared with dense training."""
    every = log("vit_sparse_fl/results/rates.jsonl")
    ((_, rows),) = [found for found in tables("vit_sparse_fl --data-dir", RATES) if "client: 5" in found[0]]

    def accuracies(name):
        lines = every[name].items()
        return {seed: 100 * line["results"]["test_accuracy_last"] for seed, line in lines if line["results"]}

    dense = accuracies("dense_nc5_J16")
    names = [
        name for name in every if name.endswith("nc5_J16") and name not in ("dense_nc5_J16", "most_sensitive_nc5_J16")
    ]
    apart = {name: [mine - dense[seed] for seed, mine in accuracies(name).items()] for name in names}
    df = sum(len(some) - 1 for some in apart.values())
    pooled = math.sqrt(sum((len(some) - 1) * statistics.variance(some) for some in apart.values()) / df)
    half = student.ppf(0.975, df) * pooled / math.sqrt(3)
    for label, name in (("Random, lr 1.0", "random_nc5_J16"), ("Lowest magnitude, lr 0.1", "lowest_magnitude_nc5_J16")):
        mean = statistics.fmean(apart[name])
        shown = numbers(rows[label]["vs dense"])
        assert shown == [*(round(x, 2) for x in (mean, mean - half, mean + half)), 3]
        curves = [line["curve"] for line in every[name].values()]
        own = [
            [-row["interference_own"] for row in curve if row.get("interference_own") is not None] for curve in curves
        ]
        assert numbers(rows[label]["gain"])[0] == round(statistics.fmean(map(statistics.fmean, own)), 3)
    assert rows["Dense FedAvg, lr 0.03"]["vs dense"] == f"0 ({df} df)"
    assert rows["Most sensitive, lr 0.1"]["diverged"] == "2" and "Random, lr 0.0435" not in rows


def test_vits_replay_is_that_of_the_log():
    """Areas by many narrow rectangles, in the place of Simpson's rule."""

    def cost(rows, j):
        """The gains between which the others' loss is known, and it as two functions of the gain."""
        points = [(0, 0, 0)]
        for row in rows:
            if row["gain"][j] is None or row["gain"][j] <= points[-1][0]:
                if row["gain"][j] is None or len(points) > 1:
                    break
                continue
            points.append((row["gain"][j], row["others"][j], row["others"][j] / row["gain"][j]))
        x, y, over = zip(*points[1:], strict=True)
        return x[0], x[-1], lambda at: at * np.interp(at, x, over), lambda at: PchipInterpolator(x, y)(at)

    def areas(line, method):
        found = np.zeros((2, 2))
        for replay in (row["replay"] for row in line["curve"] if "replay" in row):
            for j in range(10):
                curves = [cost(replay[name], j) for name in (method, "dense", "shorter")]
                low, high = max(0.1, *(low for low, *_ in curves)), min(high for _, high, *_ in curves)
                at = low + (high - low) * (np.arange(20000) + 0.5) / 20000
                if low < high:
                    found += [[one(at).mean() * (high - low) for one in lines] for _, _, *lines in curves[:2]]
        return np.log(found[0] / found[1])

    for (_, shown), name in zip(tables("vit_sparse_fl --data-dir", REPLAY), ("replay_nc5", "replay_nc1"), strict=True):
        for method, label in (("topk", "Top-k updates"), ("lowest_magnitude", "Lowest magnitude")):
            logs = [areas(line, method) for line in log(REPLAY)[name].values()]
            for column, mine in zip(("over dense", "cubic"), zip(*logs, strict=True), strict=True):
                *found, n = numbers(shown[label][column])
                assert n == len(mine) == 10 and found == pytest.approx(np.exp(by_hand(mine)), abs=0.006)


def test_glues_and_noniids_differences_are_those_of_their_logs():
    every = log("lora_glue_fl/results/trajectories.jsonl")
    found = tables("lora_glue_fl --data-dir", ROOT / "lora_glue_fl/results/trajectories.jsonl")
    (rows,) = [rows for about, rows in found if "4 rounds" in about and "participation" not in about]
    mine, naive = every["sst2_skew_rolora"], every["sst2_skew_naive"]
    apart = [mine[seed]["results"]["val_loss"] - naive[seed]["results"]["val_loss"] for seed in mine]
    assert numbers(rows["RoLoRA, lr 0.002"]["val loss vs naive"]) == [*(round(x, 4) for x in by_hand(apart)), 5]
    late = []
    for seed, one in naive.items():
        exact, lags = [row["val_loss"] for row in every["sst2_skew_residual"][seed]["curve"]], []
        for t, loss in enumerate(row["val_loss"] for row in one["curve"][1:]):
            u = next(u for u in range(len(exact)) if exact[u + 1] <= loss)
            lags.append(t + 1 - (u + (exact[u] - loss) / (exact[u] - exact[u + 1])))
        late.append(statistics.fmean(lags))
    assert numbers(rows["Naive (FedIT), lr 0.00025"]["rounds behind"]) == [*(round(x, 2) for x in by_hand(late)), 5]

    every = log("llm_noniid/results/regimes.jsonl")
    place = ROOT / "llm_noniid/results/regimes.jsonl"
    (_, rows), _ = tables("llm_noniid --data-dir", place)
    mine, iid = (every[f"regimes_fedavg_h50_{end}_ag_news_small"] for end in ("alpha_0.3", "iid"))
    accuracy = "test_accuracy"
    apart = [100 * (mine[seed]["results"][accuracy] - iid[seed]["results"][accuracy]) for seed in mine]
    assert numbers(rows["FedAvg, alpha 0.3, 4 rounds"]["vs IID"]) == [*(round(x, 1) for x in by_hand(apart)), 5]
    mine, base = (every[f"regimes_{a}_h50_alpha_0.03_ag_news_small"] for a in ("scaffold", "fedavg"))
    apart = [mine[seed]["results"]["val_loss"] - base[seed]["results"]["val_loss"] for seed in mine]
    found = rows["SCAFFOLD, alpha 0.03, 4 rounds"]["val loss vs FedAvg"]
    assert numbers(found) == [*(round(x, 3) for x in by_hand(apart)), 5]
    commonest = json.loads((ROOT / "llm_noniid/results/commonest.json").read_text())["--alpha 0.03 --sizes equal"]
    own = every["regimes_local_ag_news_small"]
    apart = [100 * (own[s]["curve"][-1]["mean_client_val_accuracy"] - commonest[s]) for s in own]
    found = rows["Local only, alpha 0.03, 4 rounds"]["vs commonest"]
    assert numbers(found) == [round(statistics.fmean(apart), 1), 3]  # three have no interval


def test_noniids_rounds_are_those_of_the_log():
    """What skew costs after the last round, in rounds and against FedAvg, from the raw lines; Holm's correction too."""
    every, (_, (_, shown)) = log(ROUNDS), tables("llm_noniid --data-dir", ROUNDS)
    p, found = {}, []

    def of(algorithm, skew, share, more=""):
        lines = every[f"rounds{'-more' * bool(more)}_{algorithm}_{skew}_{share}{more}_ag_news_small"]
        curves = [{line["round"]: line["val_accuracy"] for line in lines[seed]["curve"]} for seed in range(5)]
        return np.array([lines[seed]["results"]["test_accuracy"] for seed in range(5)]), curves

    def end(curve, last=40):
        return statistics.fmean(y for t, y in curve.items() if last - 10 < t <= last)

    def first(curve, target):
        means = {t: statistics.fmean((curve[t - 4], curve[t - 2], curve[t])) for t in range(6, 41, 2)}
        return next((t for t, y in means.items() if y >= target), math.inf)

    def row_of(numbers_of_it):
        (row,) = [row for row in shown.values() if all(numbers(row[k]) == v for k, v in numbers_of_it.items())]
        return row

    for share in ("all", "some"):
        for algorithm in ("fedavg", "scaffold"):
            flat, curves = of(algorithm, "iid", share)
            targets = [0.95 * end(curve) for curve in curves]
            for alpha in ("1", "0.3", "0.1", "0.03"):
                test, mine = of(algorithm, f"alpha_{alpha}", share)
                costs = [100 * (end(a) - end(b)) for a, b in zip(curves, mine, strict=True)]
                before = [100 * (end(a, 30) - end(b, 30)) for a, b in zip(curves, mine, strict=True)]
                cells = {"points below IID": 100 * (flat - test), "below IID, last quarter": costs}
                cells = {head: [*(round(x, 1) for x in by_hand(values)), 5] for head, values in cells.items()}
                row = row_of(cells)
                gone = by_hand([a - b for a, b in zip(before, costs, strict=True)])
                assert numbers(row["gone in it"]) == [*(round(x, 1) for x in gone), 5]
                times = [first(curve, target) for curve, target in zip(mine, targets, strict=True)]
                there = sum(map(math.isfinite, times))
                ends = [first(curve, end(other)) for curve, other in zip(curves, mine, strict=True)]
                for head, some in (("rounds to 95 %", times), ("its end in IID's rounds", ends)):
                    middle = statistics.median(some)
                    said = f"{middle:g}" if math.isfinite(middle) else "> 40"
                    assert row[head] == f"{said} ({sum(map(math.isfinite, some))} of 5)"
                if there == 5:
                    again = [
                        math.log(a / first(*b)) for a, b in zip(times, zip(curves, targets, strict=True), strict=True)
                    ]
                    assert numbers(row["times IID's"])[:3] == [round(math.exp(x), 2) for x in by_hand(again)]
                p[len(found)] = ttest_1samp(100 * (flat - test), 0).pvalue
                found.append(row["p after Holm"])
                if algorithm == "scaffold":
                    opponents = {"points above FedAvg": of("fedavg", f"alpha_{alpha}", share)[0]}
                    if share == "all" and alpha in ("0.3", "0.03"):
                        opponents["above FedAvg, equal bytes"] = of("fedavg", f"alpha_{alpha}", share, "_rounds_80")[0]
                    for head, other in opponents.items():
                        assert numbers(row[head]) == [*(round(x, 1) for x in by_hand(100 * (test - other))), 5]
                    p[len(found)] = ttest_1samp(test - opponents["points above FedAvg"], 0).pvalue
                    found.append(row["its p"])
    alone = [("iid", "all"), ("iid", "some"), ("alpha_0.03", "all", "_h50")]  # rows that have no cost to tell them by
    rows = [row for row in shown.values() if row["its p"] != "-" and row["points below IID"] == "-"]
    for one in alone:
        values = of("scaffold", *one)[0] - of("fedavg", *one)[0]
        cell = [*(round(x, 1) for x in by_hand(100 * values)), 5]
        (row,) = [row for row in rows if numbers(row["points above FedAvg"]) == cell]
        p[len(found)] = ttest_1samp(values, 0).pvalue
        found.append(row["its p"])
    assert len(found) == 27
    highest, order = 0.0, sorted(p, key=p.get)
    for i, at in enumerate(order):
        highest = max(highest, min(1.0, p[at] * (len(order) - i)))
        assert found[at] == f"{highest:.2g}"


@pytest.mark.parametrize("name", STUDIES)
def test_a_row_of_a_log_is_a_row_of_its_grid(name):
    """The flags tell runs apart as the names of the grid's rows do."""
    for path in sorted((ROOT / name / "results").glob("*.jsonl")):
        one = study(name)
        for _, rows in comparable(read(path, one), one):
            for row in rows:
                assert len({re.sub(r"_?seed_\d+", "", run) for run in row.runs["name"]}) == 1


# ---- cells by hand


def test_cells():
    assert spread(np.array([1.0, 3.0])) == "2.00 ± 1.41" and spread(np.array([1500.0])) == "1,500"
    assert spread(np.array([1.0, math.nan])) == "-" == spread(np.array([]))
    apart = paired(pd.Series({0: 1.0, 1: 2.0, 2: 9.0}), pd.Series({1: 1.0, 0: 0.5, 3: 7.0}))
    assert apart.tolist() == [0.5, 1.0] and compared(apart, 2) == "+0.75, 2"  # by seed
    assert compared([1.0, math.nan]) == "+1.000, 1 of 2"
    assert compared([math.nan]) == "none of 1 finite" and compared([]) == "-"


def test_five_differences_have_their_own_spread_and_fewer_a_pooled_one_by_hand():
    rows = [[1.0, 2.0, 3.0], [5.0, 7.0], [4.0], [1.0, math.nan]]  # squares: 2 + 2 over 2 + 1 degrees of freedom
    pool = pooled(rows)
    assert pool == (pytest.approx(math.sqrt(4 / 3)), 3)
    half = student.ppf(0.975, 3) * math.sqrt(4 / 3) / math.sqrt(2)
    p = 2 * student.sf(6 / math.sqrt(4 / 3) * math.sqrt(2), 3)
    assert estimate([5.0, 7.0], pool) == pytest.approx((6, 6 - half, 6 + half, p))
    cell = compared([5.0, 7.0], 2, pool)
    assert cell == f"+6.00 [{6 - half:+.2f}, {6 + half:+.2f}], 2" and cell.p == pytest.approx(p)
    assert compared([0.0, 0.0], 1, pool, "", math.exp).startswith("1.0 [")
    five, test = [1.0, 2.0, 4.0, 5.0, 9.0], ttest_1samp([1.0, 2.0, 4.0, 5.0, 9.0], 0)
    ends = test.confidence_interval()
    assert estimate(five, pool) == pytest.approx((4.2, ends.low, ends.high, test.pvalue))
    assert estimate([1.0, 2.0]) == pytest.approx((1.5, *[math.nan] * 3), nan_ok=True)


def test_holms_correction_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 x 0.01, 2 x 0.03, and 0.04 not below it
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_holm_over_the_comparisons_of_a_table(tmp_path):
    for seed, (central, federated) in enumerate([(100, 120), (101, 121.5), (99, 118)]):
        mamba(tmp_path, f"central_seed_{seed}", "central", seed, central)
        mamba(tmp_path, f"fed_seed_{seed}", "fed_avg", seed, federated)
        mamba(tmp_path, f"entropy_seed_{seed}", "fed_entropy", seed, federated + seed)
    *_, (about, rows) = tables("mamba_fl --holm --data-dir", tmp_path)
    assert about == "Holm's correction over 3 comparisons of 2 rows"
    assert {row["row"] for row in rows.values()} <= {"FedAvg", "FedEntropy"}
    assert all(float(row["after Holm"]) >= float(row["p"]) for row in rows.values())


def test_mambas_base_has_as_many_tokens_as_large_a_batch_and_the_best_rate(tmp_path):
    mamba(tmp_path, "fed", ppl=60.0)
    mamba(tmp_path, "central", "central", ppl=50.0)
    mamba(tmp_path, "worse", "central", ppl=55.0, lr=0.5)
    mamba(tmp_path, "batch", "central", ppl=45.0, batch_size=32)
    longer = mamba(tmp_path, "longer", "central", ppl=40.0, rounds=4) / "run.json"
    longer.write_text(longer.read_text().replace('"tokens": 2000', '"tokens": 4000'))
    ((_, rows),) = tables("mamba_fl --data-dir", tmp_path)
    assert rows["FedAvg"]["test ratio to central"] == "1.200"


# ---- rows


def test_labels_say_what_differs_and_the_table_what_most_share(tmp_path):
    for name, more in (("a", {}), ("b", {}), ("c", {"lr": 0.02}), ("d", {"server_lr": 0.5})):
        mamba(tmp_path, f"{name}_seed_0", seed=0, **{"server_lr": 1.0, "local_updates": 8 if name == "b" else 1} | more)
    code, text, _ = call("plots/tables.py mamba_fl --data-dir", tmp_path)
    assert code == 0 and "Unless said otherwise: lr 0.01, server lr 1.0." in text
    labels = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| FedAvg")]
    assert labels == ["| FedAvg, LU 1", "| FedAvg, LU 8", "| FedAvg, LU 1, lr 0.02", "| FedAvg, LU 1, server lr 0.5"]


def test_where_a_run_was_computed_tells_nothing_apart_and_the_later_of_two_counts(tmp_path):
    mamba(tmp_path, "x", seed=0, threads=1, init_from="runs/base_seed_0/final")
    mamba(tmp_path, "y", seed=1, threads=2, init_from="/other/base_seed_1/final")
    ((_, rows),) = tables("mamba_fl --data-dir", tmp_path)
    assert [row["seeds"] for row in rows.values()] == ["2"]
    mamba(tmp_path, "z", seed=1, ppl=50.0, init_from="base_seed_1")
    code, text, _ = call("plots/tables.py mamba_fl --data-dir", tmp_path)
    assert code == 0 and "left out" in text and "a later run has the same flags and seed" in text and "75.00" in text


def test_runs_that_diverged_are_counted_and_in_no_mean(tmp_path):
    vit(tmp_path, "a_seed_0", accuracy=0.5)
    vit(tmp_path, "a_seed_1", seed=1, accuracy=0.05)  # below half of the accuracy before training
    folder = vit(tmp_path, "a_seed_2", seed=2)
    about = json.loads((folder / "run.json").read_text()) | {"status": "failed", "results": None}
    about["ended"] = {"how": "failed", "by": "left_out", "round": 2}
    (folder / "run.json").write_text(json.dumps(about))
    ((_, rows),) = tables("vit_sparse_fl --data-dir", tmp_path)
    (row,) = rows.values()
    assert row["test %"] == "50.00" and row["diverged"] == "2" and row["seeds"] == "3"


def test_others_loss_at_equal_gain_by_hand(tmp_path):
    """Dense training gains 0.5 and 2 at its rates and costs 0.1 and 1.6, loss ~ gain^2: at a gain of 1 it costs 0.4."""
    for lr, gain in ((0.01, 0.5), (0.1, 2.0)):
        vit(tmp_path, f"dense_{lr}", lr=lr, own=(-gain, -gain), others=(0.4 * gain**2,) * 2, accuracy=0.4 + lr)
    vit(tmp_path, "mask", "train_federated_sparse", mask_strategy="random", own=(-1, -1), others=(0.2, 0.2), lr=0.3)
    ((_, rows),) = tables("vit_sparse_fl --data-dir", tmp_path)
    (cell,) = [row["at equal gain"] for name, row in rows.items() if "Random" in name]
    assert cell == "0.50, 1"


def test_a_replay_is_compared_within_a_client_by_hand(tmp_path):
    """Dense: loss = c gain^2, another c for each client, below 0 for the third. A mask twice that, for the second four
    times; shorter half. The second client's gain falls at the highest rate, the fourth's is too small to count."""
    gains = np.array([[0.2, 0.4, 0.8], [0.3, 0.6, 0.5], [0.2, 0.3, 0.4], [0.01, 0.02, 0.04]])
    costs, times = np.array([1.0, 0.5, -0.3, 9.0]), np.array([2.0, 4.0, 2.0, 2.0])

    def rows(times, drift):
        others = (times * costs)[:, None] * gains**2
        return [
            {"factor": f, "gain": list(gains[:, i]), "others": list(others[:, i]), "drift": list(drift * gains[:, i])}
            for i, f in enumerate((1, 2, 3))
        ]

    for seed, more in enumerate((1.0, 1.5)):
        one = np.ones(4)
        replay = {"dense": rows(one, 1.0), "random": rows(more * times, 3.0), "shorter": rows(0.5 * one, 1.0)}
        lines = [{"val_accuracy": 0.2}, {"val_accuracy": 0.2, "replay": replay}]
        args = {"dataset": "demo", "model": "tiny", "sharding": "iid", "local_steps": 4, "seed": seed}
        run(tmp_path, f"r{seed}", "replay", args, lines, {"test_accuracy_last": 0.2})
    ((_, shown),) = tables("vit_sparse_fl --data-dir", tmp_path)
    ends = np.array([[0.2, 0.8], [0.3, 0.6], [0.2, 0.4]])
    area = costs[:3] * (ends[:, 1] ** 3 - ends[:, 0] ** 3) / 3  # of c gain^2, where each client has a curve
    wanted = math.sqrt(1.5) * (times[:3] * area).sum() / area.sum()
    of_gain = (ends[:, 1] ** 2 - ends[:, 0] ** 2).sum() / 2
    more = np.mean([((one * times[:3] - 1) * area).sum() / of_gain for one in (1.0, 1.5)])
    mine = shown["Random"]
    assert float(mine["nats a nat"].split(",")[0]) == pytest.approx(more, abs=0.006)
    assert float(mine["over dense"].split(",")[0]) == pytest.approx(wanted, rel=0.02)
    assert float(mine["over shorter"].split(",")[0]) == pytest.approx(2 * wanted, rel=0.02)
    assert mine["shorter over dense"] == shown["Dense, one update scaled"]["over dense"] == "0.50, 2"
    assert float(mine["cubic"].split(",")[0]) == pytest.approx(wanted, rel=0.03)
    assert mine["length over dense"] == "3.00, 2" and mine["clients counted %"] == "75"


def test_the_baseline_is_the_rate_with_most_seeds_then_the_lowest_loss(tmp_path):
    for lr, seeds, loss in ((0.1, 3, 3.0), (0.2, 3, 2.5), (0.3, 1, 1.0)):
        for seed in range(seeds):
            noniid(tmp_path, f"iid_{lr}_{seed}", seed=seed, loss=loss + seed / 10, learning_rate=lr)
    for seed in range(3):
        skewed = {"partition": "topic_skew", "loss": 3.0 + seed / 5, "learning_rate": 0.5}
        noniid(tmp_path, f"skew_{seed}", seed=seed, **skewed)
    ((_, rows),) = tables("llm_noniid --data-dir", tmp_path)
    (cell,) = [row["vs IID"] for name, row in rows.items() if "topic" in name]
    assert cell == "+0.600, 3"  # 0.5, 0.6, 0.7 above lr 0.2


def test_time_and_plateau_by_hand(tmp_path):
    """Accuracies of 32 rounds, evaluated in each: IID reaches 0.8 in steps of 0.1 and stays; under skew every step
    takes twice as long and ends at 0.78. 95 % of 0.8 is 0.76: a mean of three has it three evaluations after 0.7."""
    kinds = ("fedavg", "iid", 1, 0.8), ("fedavg", "topic_skew", 2, 0.78), ("fedavg", "topic_skew", 9, 0.5)
    kinds += ("scaffold", "topic_skew", 2, 0.81), ("fedavg", "topic_skew", 2, 0.79)
    for seed in range(5):
        for algorithm, name, pace, end in kinds:
            rounds = 64 if end == 0.79 else 32  # FedAvg's bytes in them are SCAFFOLD's in 32
            curve = [min(end, 0.1 * (t // pace)) + 0.001 * seed for t in range(rounds + 1)]
            args = {"algorithm": algorithm, "partition": name, "alpha": 0.3 if end > 0.5 else 0.03, "seed": seed}
            args |= {"num_rounds": rounds, "learning_rate": 0.1, "model": "tiny", "num_clients": 4, "target": "label"}
            rows = [{"val_loss": 2.0 - one, "val_accuracy": one} for one in curve]
            sent = 2 * rounds if algorithm == "scaffold" else rounds
            results = {"test_accuracy": curve[-1], "bytes_up": sent, "bytes_down": sent} | rows[-1]
            run(tmp_path, f"{algorithm}_{name}_{end}_{seed}", "train", args | {"local_steps": 10}, rows, results)
    _, (_, shown) = tables("llm_noniid --data-dir", tmp_path)
    iid, some, much = shown["FedAvg, IID"], shown["FedAvg"], shown["FedAvg, alpha 0.03"]
    assert some["above FedAvg, equal bytes"] == "-" and "FedAvg, 64 rounds" not in shown  # compared with nothing
    assert iid["rounds to 95 %"] == "9 (5 of 5)" and iid["points below IID"] == iid["its end in IID's rounds"] == "-"
    assert some["rounds to 95 %"] == "18 (5 of 5)" and some["times IID's"] == "2.00 [2.00, 2.00], 5"
    assert some["its end in IID's rounds"] == "10 (5 of 5)"  # 0.78: after 9 it is 0.767
    assert numbers(some["points below IID"])[0] == numbers(some["below IID, last quarter"])[0] == 2.0
    assert much["rounds to 95 %"] == "> 32 (0 of 5)" and much["times IID's"] == "-"
    # rounds 25 to 32: 2 of 0.2 and 6 of 0.3, mean 0.275; 17 to 24: 1 of 0.1 and 7 of 0.2, mean 0.1875
    assert numbers(much["gone in it"])[0] == pytest.approx(8.75, abs=0.06)
    scaffold = shown["SCAFFOLD"]  # at alpha 0.3, without IID runs of its own
    assert numbers(scaffold["points above FedAvg"])[0] == 3.0 and scaffold["points below IID"] == "-"
    assert numbers(scaffold["above FedAvg, equal bytes"])[0] == 2.0


def test_seeds_that_diverged_or_miss_a_baseline_in_time_and_plateau(tmp_path):
    """IID without seed 5; FedAvg at alpha 0.3 with seed 4 diverged, at 0.1 all, at 0.03 a seed that ended early; at
    alpha 1 too few rounds, at alpha 3 a second rate, with a higher loss. All reach 0.8 at once."""
    kinds = {"iid": None, "topic_skew_0.3": 0.3, "topic_skew_0.1": 0.1, "topic_skew_0.03": 0.03, "topic_skew_1": 1.0}
    kinds |= {"topic_skew_3": 3.0, "again_topic_skew_3": 3.0}
    for name, alpha in kinds.items():
        for seed in range(5 if alpha is None else 6):
            lost = alpha == 0.1 or (alpha == 0.3 and seed == 4)
            rounds, last = 20 if alpha == 1.0 else 32, 28 if alpha == 0.03 and seed == 0 else 32
            args = {"algorithm": "fedavg", "partition": "topic_skew" if alpha else "iid", "alpha": alpha or 0.5}
            args |= {"num_rounds": rounds, "num_clients": 4, "target": "label", "local_steps": 10, "seed": seed}
            args |= {"learning_rate": 0.2 if name.startswith("again") else 0.1, "model": "tiny"}
            # 0.77 to 0.79 under skew: a few seeds' costs differ, so that there is a p value
            end = 0.8 if alpha is None else 0.77 + 0.004 * seed
            rows = [{"val_loss": 1.0, "val_accuracy": 0.9}]  # before training: no round
            rows += [{"val_loss": 1.0, "val_accuracy": end}] * min(rounds, last)
            results = {"test_accuracy": math.nan if lost else end, "val_loss": 1.0 + args["learning_rate"]}
            broken = {"status": "failed", "ended": {"how": "failed", "by": "not_finite"}} if lost else {}
            run(tmp_path, f"{name}_{seed}", "train", args, rows, results, **broken)
    _, shown = tables("llm_noniid --data-dir", tmp_path)[-1]
    rows = {label.partition("alpha ")[2].partition(",")[0]: row for label, row in shown.items() if "alpha" in label}
    assert len(shown) == 1 + len(rows) and set(rows) == {"0.3", "0.1", "0.03", "3"}  # no row of 20 rounds, one rate
    assert rows["0.3"]["rounds to 95 %"] == "3 (4 of 5)"  # of seeds 0 to 3, and 4; 5 has no target
    assert rows["0.3"]["times IID's"] == "-"
    assert rows["0.1"]["rounds to 95 %"] == "> 32 (0 of 6)" and rows["0.1"]["points below IID"] == "-"
    assert rows["3"]["rounds to 95 %"] == "3 (5 of 5)" and rows["3"]["times IID's"].startswith("1.00")
    assert numbers(rows["0.03"]["below IID, last quarter"])[-2:] == [4, 5]  # seed 0 has not all of it
    assert rows["0.03"]["its end in IID's rounds"] == "3 (4 of 4)"
    # alpha 0.3 has four pairs: no p, and yet a comparison beside the two that have one
    p = ttest_1samp([0.8 - (0.77 + 0.004 * seed) for seed in range(5)], 0).pvalue
    assert rows["0.3"]["p after Holm"] == "-" and rows["3"]["p after Holm"] == f"{3 * p:.2g}"


def test_which_runs_failed():
    for losses, said in (
        ([4, 3, 2], ""),
        ([4, 3, 3.5], "first evaluation"),
        ([4, 5, 4.5], "before training"),
        ([4, math.nan], "finite"),
    ):
        words = failure([{"round": t, "val_loss": loss} for t, loss in enumerate(losses)])
        assert said in words and bool(words) == bool(said)


# ---- reading


def test_what_is_left_out_is_said(tmp_path):
    mamba(tmp_path, "whole")
    run(tmp_path, "running", "fed_avg", {"seed": 1}, [{"val_ppl": 2.0}], status="running")
    run(tmp_path, "empty", "fed_avg", {"seed": 1}, [])
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "run.json").write_text('{"command": "fed_avg"')
    mamba(tmp_path / "tuning", "tuned", seed=100)
    notes = []
    runs = read(tmp_path, study("mamba_fl"), notes=notes)
    assert list(runs["name"]) == ["whole"] and len(notes) == 3
    said = " ".join(notes)
    assert "damaged" in said and "running: running, 1 eval" in said and "empty: finished, 0 eval" in said
    assert list(read(tmp_path / "tuning")["tuning"]) == [True]  # asked for by name


@pytest.mark.parametrize(
    "words, said",
    [
        ("mamba_fl --data-dir {}/none", "not a folder"),
        ("vit_sparse_fl --data-dir {}", "train first"),
    ],
)
def test_what_is_refused(words, said, tmp_path):
    mamba(tmp_path, "a")
    code, _, err = call("plots/tables.py", *words.format(tmp_path).split())
    assert code == 2 and said in err and err.count("\n") == 1
