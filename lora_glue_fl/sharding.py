"""Deals a task's training examples to clients, as a module or as a command; one manifest a client.

python lora_glue_fl/sharding.py --task_name sst2 --k 5 --mode iid --out_dir out/sst2_base/shards_iid_k5
python lora_glue_fl/sharding.py --task_name sst2 --k 5 --mode iid --out_dir shards --dataset demo      # offline

from sharding import make_client_splits, save_shard_manifests          # inside this folder
info = make_client_splits(task_name="sst2", k=5, mode="iid", seed=123)
save_shard_manifests("out/sst2_base/shards_iid_k5", info)
"""

from common.choices import SIZES
from common.cli import Parser, non_negative_int, parse, positive_float, positive_int, run_main, seed_number
from lora_glue_fl.flags import MODES, add_data_flags
from lora_glue_fl.shards import make_client_splits, save_shard_manifests


def build_parser():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--task-name", required=True, metavar="TASK", help="a GLUE task, such as sst2")
    parser.add_argument("--k", "--num-clients", type=positive_int, required=True, metavar="K", help="clients")
    parser.add_argument("--mode", choices=MODES, default="iid", help="how the examples are dealt")
    parser.add_argument("--out-dir", required=True, metavar="DIR", help="where the manifests go")
    some, text = {"type": float, "default": 0.0, "metavar": "X"}, "overlap: share drawn from all"
    parser.add_argument("--overlap-ratio", **some, help=text)
    text = "category: label or genre (default: label)"
    parser.add_argument("--category-key", metavar="COLUMN", help=text)
    some = {"type": positive_float, "default": 0.5, "metavar": "X"}
    parser.add_argument("--dirichlet-alpha", **some, help="dirichlet: evenness")
    some = {"type": positive_int, "default": 1, "metavar": "N"}
    text = "dirichlet: as many examples for all clients (equal), or as drawn"
    parser.add_argument("--min-samples", **some, help="dirichlet: least a client")
    parser.add_argument("--sizes", choices=SIZES, default="dirichlet", help=text)
    parser.add_argument("--max-examples", type=positive_int, metavar="N", help="deal a stratified subset of N")
    some, text = {"type": non_negative_int, "default": 0, "metavar": "N"}, "examples that no client gets; off: 0"
    parser.add_argument("--held-out-examples", **some, help=text)
    parser.add_argument("--seed", type=seed_number, default=42, metavar="N", help="random seed")
    add_data_flags(parser)
    return parser


def main(args):
    options = dict(vars(args))
    folder = options.pop("out_dir")
    info = make_client_splits(**options)
    save_shard_manifests(folder, info)
    for note in info["notes"]:
        print(note)
    print(f"Client sizes: {info['size_per_client']}")
    print(folder)


if __name__ == "__main__":
    args = parse(build_parser())
    run_main(main, args)
