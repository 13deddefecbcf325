"""Downloads roberta-base and roberta-large, once; the other scripts find them.

    python lora_glue_fl/download_roberta_models.py --hf_home ./hf_cache
    python lora_glue_fl/download_roberta_models.py                      # into the library's own cache

Configuration, tokenizer and model.safetensors, no pickled weights. What broke off is continued by the same command.
Prints each model's folder, which --model takes too.
"""

from pathlib import Path

from common.cli import Parser, UsageError, run_main
from common.hub import download, hub_reachable, remember

MODELS = ("roberta-base", "roberta-large")


def main(args):
    home = Path(args.hf_home).expanduser().absolute() if args.hf_home else None
    if home and home.is_file():
        raise UsageError(f"--hf-home {home} is a file: give a folder")
    online = hub_reachable()
    try:
        for model in dict.fromkeys(args.models):
            folder = download(model, home and home / "hub", online)
            print(f"{model}: {folder}", flush=True)
            if home:
                remember(home / "hub")  # here, so that a command that finds nothing changes nothing
    except KeyboardInterrupt as error:
        error.add_note("run the same command again to go on")
        raise


def build_parser():
    parser = Parser(__doc__.split("\n")[0])
    text = "where the models go, for the other scripts too (default: the library's cache)"
    parser.add_argument("--hf-home", metavar="DIR", help=text)
    text = "names on the hub (default: both RoBERTas)"
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME", help=text)
    return parser


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
