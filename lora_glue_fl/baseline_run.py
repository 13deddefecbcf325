"""Central fine-tuning of all weights on a GLUE task, without LoRA.

    python lora_glue_fl/baseline_run.py --model_size base --task_name sst2 --do_train --do_eval
    python lora_glue_fl/baseline_run.py --model tiny --dataset demo --task_name sst2 --do_train --do_eval     # offline

AdamW (Loshchilov & Hutter 2019) on the mean loss over a batch, the rate going down linearly to 0.
"""

from common import parallel
from common.cli import UsageError, run_main
from common.evaluation import pick_device
from common.hub import quiet
from common.runlog import start_run
from lora_glue_fl.central import CentralStudy, complete, make_central_parser
from lora_glue_fl.models import size_label


def train(args):
    name = f"{args.task_name.lower()}_{size_label(args)}"
    with start_run("baseline_run", args, name, unit="examples") as run:
        study = CentralStudy(args, run)
        lasting = study.lasting
        study.load(run.restore(study.weights(), lasting))

        if not args.do_train:
            study.report(-1)
        for epoch in run.rounds(study.epochs):
            loss = study.train_epoch(epoch)
            study.report(epoch, loss)
            run.save(epoch, study.weights(), lasting)

        if args.do_train:
            run.write_final(lambda folder: save(study, folder))
        run.finish(study.results())


def save(study, folder):
    """The model and its tokenizer, as transformers loads them."""
    with quiet():
        study.task_model.model.save_pretrained(folder)
    study.task_model.tokenizer.save_pretrained(folder)


def main(args):
    if parallel.init_parallel(pick_device(args.device)).size > 1:
        raise UsageError("central training is one process: start it without torchrun")
    train(complete(args))


def build_parser():
    return make_central_parser(__doc__.split("\n")[0], "./out_baseline", 2e-5)[0]


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
