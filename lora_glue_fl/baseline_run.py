"""Central fine-tuning of all weights on a GLUE task, without LoRA.

    python lora_glue_fl/baseline_run.py --model_size base --task_name sst2 --do_train --do_eval
    python lora_glue_fl/baseline_run.py --model tiny --dataset demo --task_name sst2 --do_train --do_eval     # offline

AdamW (Loshchilov & Hutter 2019) on the mean loss over a batch, the rate going down linearly to 0.
"""

from common.cli import parse, run_main
from common.hub import quiet
from common.runlog import start_run
from lora_glue_fl import central
from lora_glue_fl.flags import complete_central, make_central_parser, size_label


def build_parser():
    return make_central_parser(__doc__.split("\n")[0], "./out_baseline", 2e-5)


def main(args):
    name = f"{args.task_name.lower()}_{size_label(args)}"
    with start_run("baseline_run", args, name, unit="examples") as run:
        study = central.load_study(args, run)
        central.train(study)

        if args.do_train:
            run.write_final(lambda folder: save(study, folder))
        run.finish(central.results(study))


def save(study, folder):
    """The model and its tokenizer, as transformers loads them."""
    with quiet():
        study.model.model.save_pretrained(folder)
    study.model.tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    args = parse(build_parser(), complete_central)
    run_main(main, args)
