"""Evaluates a saved adapter on its GLUE task.

python lora_glue_fl/adapters_eval.py --model_size base --task_name sst2 --adapter_path out/sst2_base/r8/adapter
python lora_glue_fl/adapters_eval.py --model tiny --dataset demo --task_name sst2 --adapter_path DIR      # offline
"""

from pathlib import Path

from common.checkpoint import write_json
from common.cli import Parser, UsageError, add_machine_flags, positive_int, run_main
from lora_glue_fl.flags import add_task_flags
from lora_glue_fl.models import model_name, size_label
from lora_glue_fl.task_model import evaluate_adapter


def main(args):
    found = evaluate_adapter(args.adapter_path, args)
    folder = Path(args.output_dir) / f"{args.task_name.lower()}_{size_label(args)}"
    about = {"adapter": args.adapter_path, "model": model_name(args), "task": args.task_name.lower()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "metrics.json", about | found)
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror}; choose --output-dir") from error
    print("  ".join(f"{name} {v:.4f}" for name, v in found.items() if name.startswith("val_")))
    print(folder)


def build_parser():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--adapter-path", required=True, metavar="DIR", help="an adapter in peft's format")
    add_task_flags(parser)
    run = parser.add_argument_group("the evaluation")
    run.add_argument("--output-dir", default="./out_eval", metavar="DIR", help="where metrics.json goes")
    run.add_argument(
        *("--eval-batch-size", "--per-device-eval-batch-size"),
        type=positive_int,
        default=32,
        metavar="B",
        help="examples a batch",
    )
    add_machine_flags(run)
    return parser


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
