"""Runs the grids of this study: central LoRA and the rules, one factor at a time, one process a run.

    python lora_glue_fl/run_study.py --model PATH --jobs 2                       # a laptop: subsets, 6 rounds
    python lora_glue_fl/run_study.py --preset full --model-size base             # a GPU: whole tasks, 30 rounds
    python lora_glue_fl/run_study.py --preset quick                              # small, offline: minutes
    python lora_glue_fl/run_study.py --preset replay --model PATH --jobs 2       # does the averaging error cost loss?
    python lora_glue_fl/run_study.py --preset trajectories --model PATH --tune --tune-seed 101   # then without both
    python lora_glue_fl/run_study.py --model PATH --plan                         # only shows the commands

small, full   3 clients, IID, rank 4; beside it, each alone: 20 clients, Dirichlet shards, higher rates, rank 16,
              clients of different ranks, the balanced split
replay        from a checkpoint (a round of naive, 3 clients, IID, of the same rank) one round of naive with --replay at
              half the rate: local epochs x Dirichlet's alpha with 10 clients of equal size
trajectories  eight rules from one trained head, 10 clients of equal size, alpha 0.3, rank 8, each at the rate that
              --tune found on examples that no client has (seed 101, whose shards are as skewed as the measured ones);
              naive and residual at 3e-4 too; three for 8 rounds; five with 3 of the 10 clients a round
"""

from common.cli import run_main
from plots import runner
from plots.runner import preset, row

SIX = ("svd", "naive", "ffa", "stack", "residual", "rolora")
EIGHT = (*SIX, "rotate", "head")
EQUAL = {"clients": 10, "mode": "dirichlet", "sizes": "equal"}


def ranked(rank):
    return f"--lora-r {rank} --svd-rank {rank} --lora-alpha {2 * rank} --alpha {2 * rank}"


def case(
    words="",
    clients=3,
    mode="iid",
    rules=SIX,
    alpha=0.3,
    sizes="dirichlet",
    start="",
    rates=None,
    rate_of="",
    seeds=None,
):
    """What is varied: flags, clients, how examples are dealt to them, the rules that run; start: the case and rule
    whose run they begin with; rates: {rule: what --tune tries}; rate_of: the case whose rules' rates its own take."""
    return dict(words=words, clients=clients, mode=mode, rules=rules, alpha=alpha, sizes=sizes) | dict(
        start=start, rates=rates or {}, rate_of=rate_of, seeds=seeds
    )


CASES = {
    "base": case(),
    "clients20": case(clients=20),
    "dirichlet": case("--eval-clients", mode="dirichlet"),
    "lr6e-3": case("--learning-rate 6e-3"),
    "lr2e-2": case("--learning-rate 2e-2"),
    "balanced": case("--svd-split balanced", 20, rules=("svd",)),
    "rank16": case(ranked(16), rules=("svd", "naive")),
    "ranks": case("--client-ranks 2 4 8", rules=("svd", "stack")),
}
ONE_FACTOR = tuple(CASES)


def replayed(epochs, alpha=0.3, clients=10, rank=4):
    """One round of naive with --replay. alpha: of equal clients, None: IID."""
    start = "checkpoint_naive" if rank == 4 else f"checkpoint_r{rank}_naive"
    words = f"--replay --local-epochs {epochs} --learning-rate 1e-3 --lora-r {rank} --lora-alpha {2 * rank}"
    return case(words, clients, "dirichlet" if alpha else "iid", ("naive",), alpha, "equal", start)


# one round: from the end of three, at 2e-3, every further round raised the validation loss, IID too
CASES["checkpoint"] = case(rules=("naive",))
CASES["checkpoint_r16"] = case("--lora-r 16 --lora-alpha 32", rules=("naive",))
ALPHAS = {"iid": None, "a0.3": 0.3, "a0.1": 0.1}
REPLAY = {f"replay_e{epochs}_{name}": replayed(epochs, a) for epochs in (1, 4, 16) for name, a in ALPHAS.items()}
# beside e4_a0.3, at as many steps a client: 100 of 8 examples; 3 clients have 667 examples each, 10 have 200
REPLAY |= {"replay_e4_r16": replayed(4, rank=16), "replay_e1.2_k3": replayed(1.2, clients=3)}
CASES |= REPLAY

RATES = dict.fromkeys(("svd", "naive", "residual", "rotate"), (2.5e-4, 5e-4, 1e-3))
RATES |= dict.fromkeys(("ffa", "stack", "rolora"), (5e-4, 1e-3, 2e-3)) | {"head": (2.5e-3, 5e-3, 1e-2)}
WARM, RANK8 = {**EQUAL, "start": "warm_head"}, ranked(8)
CASES["warm"] = case(f"{RANK8} --local-epochs 4 --rounds 2 --learning-rate 5e-3", **EQUAL, rules=("head",))
# one local epoch: after four the averaging error is no larger (results/replay.jsonl), and the loss rose from round 2 on
CASES["skew"] = case(RANK8, **WARM, rules=EIGHT, rates=RATES)
# twice as many rounds, and a little more than the best rate: whether what naive lacks is more than a lag
CASES["skew_8"] = case(f"{RANK8} --rounds 8", **WARM, rules=("naive", "svd", "residual"), rate_of="skew")
CASES["skew_longer"] = case(f"{RANK8} --learning-rate 3e-4", **WARM, rules=("naive", "residual"))
FIVE = ("naive", "svd", "residual", "rotate", "head")
CASES["skew_some"] = case(f"{RANK8} --participation 0.3", **WARM, rules=FIVE, rate_of="skew", seeds=3)


def rows(tasks, rounds, one_seed=(), falling=True, held_out=0, dataset="glue"):
    """Task by task, case by case: central LoRA and the rules. tasks: (task, examples of its training split or None for
    all, cases); one_seed: tasks and cases of which only the first seed runs; falling: central training also at a rate
    that falls to 0; held_out: training examples that no client has."""
    found = {}
    for task, examples, cases in tasks:
        some = f"--max-examples {examples}" if examples else ""
        for name in cases:
            one, seeds = CASES[name], 1 if {task, name} & set(one_seed) else CASES[name]["seeds"]
            if name == "base":
                # as many passes; at a constant rate averaging has what a falling rate gives, central training has not
                for end, words in (("", ""), ("_linear", "--lr-scheduler linear"))[: 1 + falling]:
                    line = f"lora_glue_fl/main_glue_lora.py --task-name {task} --do-train --do-eval --lora-r 4"
                    line += f" --lora-alpha 8 --num-train-epochs {rounds} {some} {words}"
                    found[f"{task}_central{end}"] = row(line, "central", seeds)
            how = one["mode"] + (
                f"_{one['alpha']:g}_equal" if one["mode"] == "dirichlet" and one["sizes"] == "equal" else ""
            )
            shards = f"shards/{task}_{how}_k{one['clients']}"
            dealt = f"lora_glue_fl/sharding.py --dataset {dataset} --task-name {task} --k {one['clients']} {some}"
            dealt += f" --mode {one['mode']} --held-out-examples {held_out} --seed {{seed}}"
            if one["mode"] == "dirichlet":
                dealt += f" --dirichlet-alpha {one['alpha']} --sizes {one['sizes']}"
                dealt += " --min-samples 32" if one["sizes"] == "dirichlet" else ""
            dealt += f" --out-dir {{output}}/{shards}_seed_{{seed}}"
            found[shards] = row(dealt, "first", record="summary.json")
            start = one["start"] and f"{task}_{one['start']}"
            for rule in one["rules"]:
                line = f"lora_glue_fl/fedavg_rounds.py --task-name {task} --aggregate {rule} --rounds {rounds}"
                line += f" --shard-dir {{output}}/{shards}_seed_{{seed}} --eval-each-round --keep last"
                line += f" --no-save-clients {ranked(4)} {one['words']}"
                line += f" --init-from {{output}}/{start}_seed_{{seed}}" if start else ""
                tuned = {"learning-rate": one["rates"][rule]} if one["rates"] else {}
                rate_of = one["rate_of"] and f"{task}_{one['rate_of']}_{rule}"
                needs = (shards, start) if start else (shards,)
                found[f"{task}_{name}_{rule}"] = row(line, name, seeds, tuned, rate_of, needs)
    return found


SMALL = rows(
    (
        ("sst2", 2000, ("base", "clients20", "dirichlet")),
        ("mrpc", 1200, ("base",)),
        ("rte", 600, ("base",)),
        ("sst2", 2000, ("lr6e-3", "lr2e-2", "balanced", "rank16", "ranks")),
        ("cola", 1500, ("base",)),
        ("stsb", 1000, ("base",)),
    ),
    rounds=6,
    one_seed=("cola", "stsb", "rank16", "ranks", "lr6e-3", "lr2e-2"),
)
FULL = rows([(task, None, ONE_FACTOR) for task in ("rte", "mrpc", "cola", "stsb", "sst2")], 30, falling=False)
QUICK = (("sst2", 600, ("base", "clients20", "dirichlet", "balanced", "rank16", "ranks")),)
AGAIN = rows((("sst2", 2000, ("checkpoint", "checkpoint_r16", *REPLAY)),), 1)
TRAJECTORIES = rows((("sst2", 2000, ("warm", "skew", "skew_8", "skew_longer", "skew_some")),), 4, held_out=1000)
CONSTANT = "--batch-size 8 --lr-scheduler constant --threads 1"
MEAN = f"--learning-rate 2e-3 --amp auto --pooling mean {CONSTANT}"
RATES_FOUND = "lora_glue_fl/results/tuning/trajectories.json"
PRESETS = {
    "small": preset(SMALL, f"--learning-rate 2e-3 --amp auto {CONSTANT} --dataset glue"),
    "full": preset(FULL, "--learning-rate 4e-4 --warmup-ratio 0.06 --amp auto --dataset glue"),
    "replay": preset(AGAIN, f"{MEAN} --dataset glue"),
    "trajectories": preset(TRAJECTORIES, f"{MEAN} --dataset glue", range(5), "held_out_loss", tuned=RATES_FOUND),
    "quick": preset(
        rows(QUICK, 5, dataset="demo"),
        f"--model tiny --dataset demo --learning-rate 1e-2 {CONSTANT}",
        seeds=(0,),
    ),
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
    return runner.main(STUDY, argv, runner.build_parser(STUDY, __doc__.split("\n")[0]))


if __name__ == "__main__":
    run_main(main, None)
