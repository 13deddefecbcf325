"""What a federated round of LoRA costs beyond its optimiser steps.

    python benchmarks/glue_round.py
    python benchmarks/glue_round.py --aggregate residual --examples 32

Rounds of lora_glue_fl with 10 clients (local work, mean of the adapters, truncation or base update, client and server
folders, checkpoint; no evaluation) against the same AdamW steps on the same batches in a bare loop over the same model,
alternating in one run. The model is a RoBERTa with random weights (`--hidden`, `--layers`; default: MiniLM's size).
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from common.before.aggregation import WeightedMean
from common.before.lowrank import RULES
from common.cli import Parser, positive_int, run_main
from common.runlog import start_run
from lora_glue_fl import fedavg_rounds
from lora_glue_fl.demo_glue import demo_tokenizer
from lora_glue_fl.fed_core import Study
from lora_glue_fl.fitting import plan_steps
from lora_glue_fl.sharding import make_client_splits, save_shard_manifests


def main(args):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(args, folder / "model")
        examples = args.clients * args.examples
        info = make_client_splits("rte", args.clients, max_examples=examples, dataset="demo", seed=0)
        save_shard_manifests(folder / "shards", info)
        words = f"--model {folder}/model --tokenizer demo --dataset demo --task-name rte --shard-dir {folder}/shards "
        words += f"--aggregate {args.aggregate} --threads {args.threads} --output-dir {folder} --run-name run "
        words += f"--amp {args.amp} --batch-size {args.batch_size} --rounds 1000"
        flags = fedavg_rounds.complete(fedavg_rounds.build_parser().parse_args(words.split()))
        with start_run("benchmark", flags, "run", unit="examples") as run:
            study = Study(flags, run)
            for _ in run.rounds(1):
                measure(args, study)


def make_model(args, folder):
    """A RoBERTa with random weights, as transformers writes it."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    tokenizer = demo_tokenizer()
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        intermediate_size=4 * args.hidden,
    )
    RobertaForSequenceClassification(config).save_pretrained(folder)


def measure(args, study):
    seconds = {"bare steps": [], "round": []}
    theta = study.initial_weights()
    for repeat in range(args.repeats + 1):
        started = time.perf_counter()
        bare(study, repeat)
        between = time.perf_counter()
        theta = one_round(study, theta, repeat)
        if repeat:  # the first is for warming up
            seconds["bare steps"].append(between - started)
            seconds["round"].append(time.perf_counter() - between)
    floor = statistics.median(seconds["bare steps"])
    weights = study.run.manifest["parameters"]
    steps = sum(len(plan_steps(lengths, study.args, 1.0)) for lengths in study.lengths)
    print(f"{weights['total']} weights, {weights['trainable']} trained; {len(study.examples)} clients, {steps} steps")
    for kind, values in seconds.items():
        median = statistics.median(values)
        print(f"{kind:11s} {1000 * median:8.1f} ms   ratio {median / floor:.3f}")


def bare(study, round):
    """The round's steps in one model, one optimiser after the other."""
    found = study.task_model
    trained = study.adapted.trainable()
    found.model.train()
    for k in range(len(study.examples)):
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-4, weight_decay=0.0, fused=True)
        for (rows,) in plan_steps(study.lengths[k], study.args, 1.0, round, k):
            batch = found.encoded["train"].batch(study.rows[k][rows])
            labels = batch.pop("labels")
            optimizer.zero_grad()
            with torch.autocast("cpu", study.amp, enabled=study.amp is not None):
                logits = found.model(**batch).logits
            F.cross_entropy(logits.float(), labels).backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()


def one_round(study, theta, round):
    """A round as in fedavg_rounds.py, without evaluation."""
    clients = study.begin_round(theta, round)
    mean, heads = study.adapter_mean(theta, round), WeightedMean(study.head(theta), clients)
    for k in clients:
        factors_k, head_k, n_k = study.local_update(theta, k, round)
        if study.left_out(k, factors_k, head_k):
            continue
        mean.add(factors_k, weight=n_k)
        heads.add(head_k, weight=n_k)
        study.keep_client(k, factors_k, head_k, round)
    study.check_left_out(round)
    served = mean.result(study.step())
    study.close_round(served, round)
    theta = study.serve(theta, served, heads)
    study.report(theta, served, round)
    study.run.save(round, theta, study.lasting)
    study.folders.prune(round)
    return theta


def build_parser():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--aggregate", choices=RULES, default="svd", help="the rule")
    parser.add_argument("--clients", type=positive_int, default=10, metavar="K", help="clients")
    parser.add_argument("--examples", type=positive_int, default=96, metavar="N", help="examples a client")
    parser.add_argument("--batch-size", type=positive_int, default=32, metavar="B", help="examples a step")
    parser.add_argument("--hidden", type=positive_int, default=384, metavar="N", help="width of the model")
    parser.add_argument("--layers", type=positive_int, default=6, metavar="N", help="its layers")
    parser.add_argument("--amp", choices=["off", "bf16"], default="off", help="precision of the products")
    parser.add_argument("--threads", type=positive_int, default=1, metavar="N", help="CPU threads")
    parser.add_argument("--repeats", type=positive_int, default=5, metavar="N", help="timed repeats of each")
    return parser


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
