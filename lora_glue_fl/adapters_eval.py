"""Evaluates a saved adapter on its GLUE task.

python lora_glue_fl/adapters_eval.py --model_size base --task_name sst2 --adapter_path out/sst2_base/r8/adapter
python lora_glue_fl/adapters_eval.py --model tiny --dataset demo --task_name sst2 --adapter_path DIR      # offline
"""

import time
from pathlib import Path

from common.checkpoint import write_json
from common.cli import Parser, add_machine_flags, parse, run_main
from common.runlog import prepare_machine
from lora_glue_fl.flags import add_task_flags, model_name, size_label
from lora_glue_fl.models import TaskModel, print_values, read_served


def build_parser():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--adapter-path", required=True, metavar="DIR", help="an adapter in peft's format")
    add_task_flags(parser)
    text = "where metrics.json goes"
    parser.group("the run").add_argument("--output-dir", default="./out_eval", metavar="DIR", help=text)
    add_machine_flags(parser)
    return parser


def main(args):
    folder = Path(args.output_dir) / f"{args.task_name.lower()}_{size_label(args)}"
    about = {"adapter": args.adapter_path, "model": model_name(args), "task": args.task_name.lower()}
    started = time.perf_counter()
    prepare_machine(args)
    file = read_served(args.adapter_path)
    args.pooling = file.head_pooling
    if args.model == "tiny" and file.base_model and Path(file.base_model).is_dir():
        # its weights follow from a seed: take those that the adapter was trained on
        args.model = file.base_model
    model = TaskModel(args, (file.r, file.alpha, 0.0, file.target_modules), train=False)
    model.check_fits(file)
    model.adapted.load_base(file.base)
    model.adapted.load(file.factors, file.head, file.scale)
    results = print_values(model.evaluate())
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", about | results | {"seconds": time.perf_counter() - started})
    print(folder)


if __name__ == "__main__":
    args = parse(build_parser())
    run_main(main, args)
