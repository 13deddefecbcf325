"""Runs this study's experiments, one process a run, and reports on them; the rows are in grid.py.

    python llm_noniid/run_experiments.py --mode quick                                # minutes, offline
    python llm_noniid/run_experiments.py --mode main                                 # the source's grid: a GPU
    python llm_noniid/run_experiments.py --mode failure                              # the source's failure settings
    python llm_noniid/run_experiments.py --mode study --model models/small --jobs 2  # one factor at a time: 2 hours
    python llm_noniid/run_experiments.py --mode regimes --model models/small --tune  # then without --tune
    python llm_noniid/run_experiments.py --mode compare                              # the tables of what is there
    python llm_noniid/run_experiments.py --mode analyze                              # report.html

--preset is another spelling of --mode. Flags that are not listed are train.py's and go to every run; a row's own win.
"""

from common.cli import UsageError, run_main
from llm_noniid.grid import STUDY
from plots import runner


def build_parser():
    modes = STUDY | {"presets": STUDY["presets"] | {"compare": {}, "analyze": {}}}
    return runner.build_parser(modes, __doc__.split("\n")[0], ["--mode"], ["--results-dir"])


def main(argv=None):
    from plots import report, tables  # only here: they take a while to import

    args, words = build_parser().parse_known_args(argv)
    if args.preset in STUDY["presets"]:
        return runner.run_study(STUDY, args, words)
    if words:
        raise UsageError(f"{words[0]}: --mode {args.preset} runs nothing, so it takes no flag of train.py: drop it")
    output = runner.output_of(STUDY, args)
    if args.preset == "analyze":
        print(report.write([output], output / "report.html"))
    else:
        tables.main(tables.build_parser().parse_args(["llm_noniid", "--data-dir", str(output)]))
    return 0


if __name__ == "__main__":
    run_main(main, None)
