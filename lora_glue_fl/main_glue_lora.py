"""Central LoRA on a GLUE task: the ceiling of the federated runs, and adapters to begin with or to merge.

    python lora_glue_fl/main_glue_lora.py --model_size base --task_name sst2 --do_train --do_eval
    python lora_glue_fl/main_glue_lora.py --model tiny --dataset demo --task_name sst2 --do_train --do_eval   # offline

W + s B A with s = alpha / r; A random, B zero, W frozen   (Hu et al. 2022), trained by AdamW together with the head.
"""

from pathlib import Path

from common.adapter_files import write_adapter
from common.cli import parse, run_main
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
        study = baseline_run.load_study(args, run, lora)
        baseline_run.train(study)

        results = baseline_run.results(study)
        if args.do_train:
            run.note("writing the adapter")
            save(study, Path(args.adapter_output_dir or run.folder / "adapter"))
        write_manifest(study, results)
        run.finish(results)


def save(study, folder):
    """The adapter in peft's format, with the head; beside the tiny model's adapter the model itself."""
    model, adapted = study.model, study.model.adapted
    about = model.about(study.run.folder)
    write_adapter(folder, adapted.factors(), adapted.head, alpha=study.args.lora_alpha, **about)
    model.save_base(study.run.folder)


def write_manifest(study, results):
    """manifest.txt: what was trained, with which flags, and what it reached; `key: value` lines."""
    counts = study.run.manifest["parameters"]
    lines = {"trainable parameters": counts["trainable"], "total parameters": counts["total"]}
    lines |= vars(study.args) | {"target_modules": " ".join(study.model.adapted.targets)} | results
    path = study.run.folder / "manifest.txt"
    path.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()), encoding="utf-8")


if __name__ == "__main__":
    args = parse(build_parser(), baseline_run.complete)
    run_main(main, args)
