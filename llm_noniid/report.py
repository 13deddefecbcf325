"""The page of this study's runs: paired differences on top of plots/report.py's tables and figures.

    python llm_noniid/report.py --results-dir results --out results/report.html

A script may read with plots/ what the study's modules must not know, so the two are put together here.
"""

from pathlib import Path

from common.cli import Parser, UsageError, run_main
from common.early import parsed


def build_parser():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--results-dir", "--output-dir", default="results", metavar="DIR", help="where run folders are")
    parser.add_argument("--out", metavar="FILE", help="the page (default: report.html in --results-dir)")
    parser.add_argument("--no-figures", dest="figures", action="store_false", help="without those of plots/")
    return parser


if __name__ == "__main__":  # above the imports that take seconds: --help and a typo are answered at once
    args = parsed(build_parser().parse_args)

from plots import report, tables
from plots.noniid import STUDY, TABLE
from plots.report import from_markdown
from plots.runs import read_runs

TITLE = "When federated fine-tuning of language models breaks"
FIELDS = ("val_loss", "val_accuracy", "mean_client_val_loss", "worst_client_val_loss")
AGAINST = {"iid": "Differences to IID", "fedavg": "Differences to FedAvg"}


def differences(folder):
    """{heading: the table of paired differences as list[str]} of the runs in `folder`, of the FIELDS that they have.

    Raises UsageError without that folder.
    """
    if not Path(folder).is_dir():
        raise UsageError(f"--results-dir {folder} is not a folder: run an experiment first, or name where they are")
    runs, _ = read_runs([folder], STUDY)
    fields = [name for name in FIELDS if any(name in row for run in runs for row in run.rows)]
    words = ["llm_noniid", "--fields", *fields, "--against"]
    parse = tables.build_parser().parse_args
    return {head: tables.parts_of(TABLE, runs, [], parse([*words, to])) for to, head in AGAINST.items() if fields}


def text(folder):
    """The tables of the runs as Markdown: what they reached, then the paired differences."""
    pairs = [part for head, parts in differences(folder).items() for part in (f"## {head}", *parts)]
    return "\n\n".join([tables.report(TABLE, [folder], tables.build_parser().parse_args([STUDY.name])), *pairs])


def write(folder, out, figures=True):
    """Writes the page of the runs in `folder` to `out`; its figures also into `folder`/figures. Returns its path."""
    lead = []
    for head, parts in differences(folder).items():
        lead += [f"<h2>{head}</h2>", *from_markdown(parts)]
    keep = Path(folder) / "figures" if figures else None
    return report.write([folder], out, TITLE, "\n".join(lead), figures, keep=keep)


def main(args):
    print(write(args.results_dir, args.out or Path(args.results_dir) / "report.html", args.figures))


if __name__ == "__main__":
    run_main(main, args)
