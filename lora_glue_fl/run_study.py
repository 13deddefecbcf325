"""Runs the grids of this study: central LoRA and the rules, one factor at a time, one process a run.

    python lora_glue_fl/run_study.py --model PATH --jobs 2                       # a laptop: subsets, 6 rounds
    python lora_glue_fl/run_study.py --preset quick                              # small, offline: minutes
    python lora_glue_fl/run_study.py --preset trajectories --model PATH --tune --tune-seed 101   # then without both

small         3 clients, IID, rank 4; beside it one factor at a time
replay        from a checkpoint one round of naive with --replay: local epochs x Dirichlet's alpha
split         does svd gain by its product, or by how it splits the singular values between B and A?
trajectories  eight rules from one trained head, each at the rate that --tune found on examples that no client has
"""

from common.cli import run_main
from plots import runner
from plots.runner import preset, row

SIX = ("svd", "naive", "ffa", "stack", "residual", "rolora")
FIVE = ("naive", "svd", "residual", "rotate", "head")
DEALT = {  # how examples are dealt to the clients
    "iid": "",
    "dirichlet": "--dirichlet-alpha 0.3 --sizes dirichlet --min-samples 32",
    "dirichlet_0.3_equal": "--dirichlet-alpha 0.3 --sizes equal",
    "dirichlet_0.1_equal": "--dirichlet-alpha 0.1 --sizes equal",
}


def ranked(rank):
    return f"--lora-r {rank} --svd-rank {rank} --lora-alpha {2 * rank} --alpha {2 * rank}"


def case(words="", clients=3, dealt="iid", rules=SIX, start="", rates=(), rate_of="", seeds=None):
    """What is varied. rules: those that run; start: the case and rule whose run they begin with; rates: {rule: what
    --tune tries}; rate_of: the case whose rules' rates its own take."""
    return locals()


CASES = {
    "base": case(),
    "clients20": case(clients=20),
    "dirichlet": case("--eval-clients", dealt="dirichlet"),
    "lr6e-3": case("--learning-rate 6e-3"),
    "lr2e-2": case("--learning-rate 2e-2"),
    "balanced": case("--split balanced", 20, rules=("svd",)),
    "rank16": case(ranked(16), rules=("svd", "naive")),
    "ranks": case("--client-ranks 2 4 8", rules=("svd", "stack")),
}
ONE_FACTOR = tuple(CASES)


def replayed(epochs, dealt="dirichlet_0.3_equal", clients=10, rank=4):
    """One round of naive with --replay."""
    start = "checkpoint_naive" if rank == 4 else f"checkpoint_r{rank}_naive"
    words = f"--replay --local-epochs {epochs} --learning-rate 1e-3 --lora-r {rank} --lora-alpha {2 * rank}"
    return case(words, clients, dealt, ("naive",), start)


# one round: from the end of three, at 2e-3, every further round raised the validation loss, IID too
CASES["checkpoint"] = case(rules=("naive",))
CASES["checkpoint_r16"] = case("--lora-r 16 --lora-alpha 32", rules=("naive",))
SKEWS = {"iid": "iid", "a0.3": "dirichlet_0.3_equal", "a0.1": "dirichlet_0.1_equal"}
REPLAY = {f"replay_e{epochs}_{name}": replayed(epochs, how) for epochs in (1, 4, 16) for name, how in SKEWS.items()}
# beside e4_a0.3, at as many steps a client: 100 of 8 examples; 3 clients have 667 examples each, 10 have 200
REPLAY |= {"replay_e4_r16": replayed(4, rank=16), "replay_e1.2_k3": replayed(1.2, clients=3)}
CASES |= REPLAY

RATES = dict.fromkeys(("svd", "naive", "residual", "rotate"), (2.5e-4, 5e-4, 1e-3))
RATES |= dict.fromkeys(("ffa", "stack", "rolora"), (5e-4, 1e-3, 2e-3)) | {"head": (2.5e-3, 5e-3, 1e-2)}
EQUAL = {"clients": 10, "dealt": "dirichlet_0.3_equal"}
WARM, RANK8 = {**EQUAL, "start": "warm_head"}, ranked(8)
CASES["warm"] = case(f"{RANK8} --local-epochs 4 --rounds 2 --learning-rate 5e-3", **EQUAL, rules=("head",))
# one local epoch: after four the averaging error is no larger (results/replay.jsonl), and the loss rose from round 2 on
CASES["skew"] = case(RANK8, **WARM, rules=(*SIX, "rotate", "head"), rates=RATES)
# whether what naive lacks is more than a lag
CASES["skew_8"] = case(f"{RANK8} --rounds 8", **WARM, rules=("naive", "svd", "residual"), rate_of="skew")
CASES["skew_longer"] = case(f"{RANK8} --learning-rate 3e-4", **WARM, rules=("naive", "residual"))
CASES["skew_some"] = CASES["skew_8"] | {"words": f"{RANK8} --participation 0.3", "rules": FIVE, "seeds": 3}


# RULE_SPLIT; the rule alone serves the means as they are. Tuned over four rounds; three rules have eight, too
SPLIT_RULES, SAME = ("naive", "naive_us", "svd_us"), {"clients": 10, "dealt": "iid", "start": "warm_iid_head"}
CASES["warm_iid"] = CASES["warm"] | {"dealt": "iid"}
CASES["split_4"] = case(RANK8, **WARM, rules=(*SPLIT_RULES, "svd_balanced", "svd_sv"))
CASES["split_4"]["rates"] = dict.fromkeys(CASES["split_4"]["rules"], (2.5e-4, 3.5e-4))
CASES["split"] = case(f"{RANK8} --rounds 8", **WARM, rules=SPLIT_RULES, rate_of="split_4")
CASES["split_iid_4"] = CASES["split_4"] | SAME | {"rules": SPLIT_RULES}
CASES["split_iid"] = CASES["split"] | SAME | {"rate_of": "split_iid_4"}
# at naive's rate: a split changes the rate that is best, and the head takes it too
CASES["split_rate"] = case(f"{RANK8} --learning-rate 3.5e-4", **WARM, rules=("naive_us",))


def rows(tasks, rounds, one_seed=(), held_out=0, dataset="glue"):
    """Central LoRA and the rules. tasks: (task, training examples, cases); one_seed: tasks and cases of one seed;
    held_out: examples that no client has."""
    found = {}
    for task, examples, cases in tasks:
        some, apart = f"--max-examples {examples}", f"--held-out-examples {held_out}" if held_out else ""
        for name in cases:
            one, seeds = CASES[name], 1 if {task, name} & set(one_seed) else CASES[name]["seeds"]
            if name == "base":
                # as many passes; at a constant rate averaging has what a falling rate gives, central training has not
                for end, words in (("", ""), ("_linear", "--lr-scheduler linear")):
                    line = f"lora_glue_fl/main_glue_lora.py --task-name {task} --do-train --do-eval --lora-r 4"
                    line += f" --lora-alpha 8 --num-train-epochs {rounds} {some} {words}"
                    found[f"{task}_central{end}"] = row(line, "central", seeds)
            how, k = one["dealt"], one["clients"]
            shards = f"shards/{task}_{how}_k{k}"
            dealt = f"lora_glue_fl/sharding.py --dataset {dataset} --task-name {task} --k {k} {some}"
            dealt += f" --mode {how.partition('_')[0]} {DEALT[how]} --seed {{seed}} {apart}"
            dealt += f" --out-dir {{output}}/{shards}_seed_{{seed}}"
            found[shards] = row(dealt, "first", record="summary.json")
            start = one["start"] and f"{task}_{one['start']}"
            for rule in one["rules"]:
                method, _, split = rule.partition("_")
                line = f"lora_glue_fl/fedavg_rounds.py --task-name {task} --aggregate {method} --rounds {rounds}"
                line += f" --split {split}" if split else ""
                line += f" --shard-dir {{output}}/{shards}_seed_{{seed}} --eval-each-round --keep last"
                line += f" --no-save-clients {ranked(4)} {one['words']}"
                line += f" --init-from {{output}}/{start}_seed_{{seed}}" if start else ""
                tuned = {"learning-rate": one["rates"][rule]} if one["rates"] else {}
                rate_of = one["rate_of"] and f"{task}_{one['rate_of']}_{rule}"
                needs = (shards, start) if start else (shards,)
                found[f"{task}_{name}_{rule}"] = row(line, name, seeds, tuned, rate_of, needs)
    return found


BASE = ("base",)
SMALL = rows(
    [("sst2", 2000, ("base", "clients20", "dirichlet")), ("mrpc", 1200, BASE), ("rte", 600, BASE)]
    + [("sst2", 2000, ("lr6e-3", "lr2e-2", "balanced", "rank16", "ranks")), ("cola", 1500, BASE), ("stsb", 1000, BASE)],
    rounds=6,
    one_seed=("cola", "stsb", "rank16", "ranks", "lr6e-3", "lr2e-2"),
)
QUICK = rows([("sst2", 600, [name for name in ONE_FACTOR if "lr" not in name])], 5, dataset="demo")
AGAIN = rows((("sst2", 2000, ("checkpoint", "checkpoint_r16", *REPLAY)),), 1)
TRAJECTORIES = rows((("sst2", 2000, ("warm", "skew", "skew_8", "skew_longer", "skew_some")),), 4, held_out=1000)
SPLIT_CASES = ("warm", "split_4", "split", "split_rate", "warm_iid", "split_iid_4", "split_iid")
SPLIT = rows([("sst2", 2000, SPLIT_CASES)], 4, held_out=1000)
CONSTANT = "--batch-size 8 --lr-scheduler constant --threads 1"
MEAN = f"--learning-rate 2e-3 --amp auto --pooling mean {CONSTANT} --dataset glue"
FOUND = "lora_glue_fl/results/tuning/trajectories.json"
PRESETS = {
    "small": preset(SMALL, f"--learning-rate 2e-3 --amp auto {CONSTANT} --dataset glue"),
    "replay": preset(AGAIN, MEAN),
    "trajectories": preset(TRAJECTORIES, MEAN, range(5), "held_out_loss", tuned=FOUND),
    "split": preset(SPLIT, MEAN, range(5), "held_out_loss", tuned="lora_glue_fl/results/tuning/split.json"),
    "quick": preset(QUICK, f"--model tiny --dataset demo --learning-rate 1e-2 {CONSTANT}", seeds=(0,)),
}
STUDY = {
    "presets": PRESETS,
    "default": "small",
    "output": "results/glue_{preset}",
    "show": [
        "plots/glue.py --data-dir {output} --out-dir {output}/figures",
        "plots/tables.py lora_glue_fl --data-dir {output}",
    ],
}


def main(argv=None):
    return runner.run_study(STUDY, *runner.build_parser(STUDY, __doc__.split("\n")[0]).parse_known_args(argv))


if __name__ == "__main__":
    run_main(main, None)
