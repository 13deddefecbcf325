"""Evaluates a saved adapter on its GLUE task.

python lora_glue_fl/adapters_eval.py --model_size base --task_name sst2 --adapter_path out/sst2_base/r8/adapter
python lora_glue_fl/adapters_eval.py --model tiny --dataset demo --task_name sst2 --adapter_path DIR      # offline
"""

from pathlib import Path

from common.checkpoint import write_json
from common.cli import Parser, UsageError, add_machine_flags, parse, run_main
from lora_glue_fl.flags import add_task_flags, model_name, size_label
from lora_glue_fl.models import evaluate_adapter, print_values


def build_parser():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--adapter-path", required=True, metavar="DIR", help="an adapter in peft's format")
    add_task_flags(parser)
    text = "where metrics.json goes"
    parser.group("the run").add_argument("--output-dir", default="./out_eval", metavar="DIR", help=text)
    add_machine_flags(parser)
    return parser


def main(args):
    results = evaluate_adapter(args.adapter_path, args)
    folder = Path(args.output_dir) / f"{args.task_name.lower()}_{size_label(args)}"
    about = {"adapter": args.adapter_path, "model": model_name(args), "task": args.task_name.lower()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "metrics.json", about | results)
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror}; choose --output-dir") from error
    print_values(results)
    print(folder)


if __name__ == "__main__":
    args = parse(build_parser())
    run_main(main, args)
