"""Central LoRA on a GLUE task: the ceiling of the federated runs, and adapters to begin with or to merge.

    python lora_glue_fl/main_glue_lora.py --model_size base --task_name sst2 --do_train --do_eval
    python lora_glue_fl/main_glue_lora.py --model tiny --dataset demo --task_name sst2 --do_train --do_eval   # offline

W + s B A with s = alpha / r; A random, B zero, W frozen   (Hu et al. 2022), trained by AdamW together with the head.
"""

from pathlib import Path

from common.cli import parse, run_main
from common.lora import write_adapter
from common.runlog import start_run
from lora_glue_fl import baseline_run
from lora_glue_fl.flags import add_lora_flags, size_label


def build_parser():
    parser = baseline_run.build_parser(__doc__, "./out", 2e-4)
    add_lora_flags(parser)
    text = "where the adapter goes (default: RUN/adapter)"
    parser.group("the run").add_argument("--adapter-output-dir", metavar="DIR", help=text)
    return parser


def main(args):
    args.output_dir = str(Path(args.output_dir) / f"{args.task_name.lower()}_{size_label(args)}")
    with start_run("main_glue_lora", args, f"r{args.lora_r}", unit="examples") as run:
        lora = (args.lora_r, args.lora_alpha, args.lora_dropout, args.target_modules)
        model = baseline_run.train(args, run, lora)

        results = baseline_run.results(run)
        if args.do_train:
            run.note("writing the adapter")
            folder = Path(args.adapter_output_dir or run.folder / "adapter")
            about = model.about(run.folder) | {"alpha": args.lora_alpha}
            write_adapter(folder, model.adapted.factors(), model.adapted.head, **about)
            model.save_base(run.folder)
        write_manifest(run, model, results)
        run.finish(results)


def write_manifest(run, model, results):
    """manifest.txt: what was trained, with which flags, and what it reached; `key: value` lines."""
    counts = run.manifest["parameters"]
    lines = {"trainable parameters": counts["trainable"], "total parameters": counts["total"]}
    lines |= vars(run.args) | {"target_modules": " ".join(model.adapted.targets)} | results
    text = "".join(f"{key}: {value}\n" for key, value in lines.items())
    (run.folder / "manifest.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    args = parse(build_parser(), baseline_run.complete)
    run_main(main, args)
