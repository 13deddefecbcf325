"""The page of this study's runs: its questions and verdicts on top of plots/report.py's tables, endings and figures.

    python llm_noniid/report.py --results-dir results --out results/report.html

The verdicts (`llm_noniid.verdicts`) are about the group of like runs with most of them. A script may read with plots/
what the study's modules must not know, so the two are put together here.
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

from llm_noniid import comparing
from llm_noniid.outcomes import Context, maps_of, outcome_of
from llm_noniid.verdicts import QUESTIONS, verdicts
from plots import report, tables
from plots.noniid import STUDY, TABLE
from plots.noniid_maps import read_maps
from plots.report import details, escape, paragraph, prose, table_html
from plots.runs import describe, like_with_like, read_runs, shared_setting
from plots.seeds import curves_of

TITLE = "When federated fine-tuning of language models breaks"
SIGNS = {"confirmed": "✓", "refuted": "✗", "not decided": "?", "not measured": "–"}


def judged(folder):
    """(title of the largest group of like runs, its `Verdict`s, all failure maps, notes on damaged ones).

    Raises UsageError without a run.
    """
    if not Path(folder).is_dir():
        raise UsageError(f"--results-dir {folder} is not a folder: run an experiment first, or name where they are")
    runs, _ = read_runs([folder], STUDY)
    notes, context, title = [], None, "-"
    maps = read_maps([Path(folder)], notes, strict=False)
    if runs:
        setting, members = like_with_like(runs, TABLE.free)[0]
        title = describe(STUDY, shared_setting(setting, curves_of(members, TABLE.free)))
        context = Context([outcome_of(run) for run in members])
    return title, verdicts(context, maps_of(context, maps)), maps, list(map(str, notes))


def text(folder):
    """The table of the runs as Markdown, and the verdicts of the largest group."""
    title, answers, _, notes = judged(folder)
    args = tables.build_parser().parse_args([STUDY.name])
    rows = [["question", "claim", "verdict"], *([v.question, v.claim, v.status] for v in answers)]
    parts = [tables.report(TABLE, [folder], args), f"### Verdicts: {title}", tables.layout(rows), *notes]
    return "\n\n".join(parts)


def write(folder, out, figures=True):
    """Writes the page of the runs in `folder` to `out`; its figures also into `folder`/figures. Returns its path."""
    title, answers, maps, notes = judged(folder)
    rows = [["question", "claim", "verdict"]]
    rows += [[v.question, v.claim, f"{SIGNS[v.status]} {v.status}"] for v in answers]
    n = len(QUESTIONS)
    lead = [
        "<h2>Verdicts</h2>",
        paragraph(f"They are about the largest group: {title}."),
        details("how settings are compared", prose(comparing.__doc__.split("\n\n", 1)[1])),
        table_html(rows),
        "<h2>Research questions</h2>",
        *map(verdict_part, answers[:n]),
        "<h2>What the source expects</h2>",
        *map(verdict_part, answers[n:]),
        "<h2>Failure maps</h2>" if maps else "",
        *map(map_part, maps),
        *map(paragraph, notes),
    ]
    keep = Path(folder) / "figures" if figures else None
    return report.write([folder], out, TITLE, "\n".join(lead), figures, keep=keep)


def verdict_part(verdict):
    """A verdict with the numbers that it rests on; what is said beside is grey."""
    lines = "".join(
        f"<tr{' class=beside' if p.beside else ''}><td>{escape(p.claim)}{' (beside)' if p.beside else ''}</td>"
        f"<td class=status>{SIGNS[p.status]} {p.status}</td><td>{escape(p.numbers)}</td></tr>"
        for p in verdict.parts
    )
    head = f"<h3>{escape(verdict.question)}</h3><p>{escape(verdict.claim)}: <strong>{verdict.status}</strong>.</p>"
    return f"{head}<table><tbody>{lines}</tbody></table>" if lines else head


def map_part(one):
    """A failure map as tables: the boundary of each alpha, then every point."""
    axis = one["axis"].replace("_", " ")
    state = "" if one.get("finished", True) else ", not finished"
    title = f"{one['algorithm']}, {axis}, seed {one.get('seed', '-')}: {len(one['points'])} runs{state}"
    ends = [["alpha", f"largest {axis} that works", "smallest that fails"]]
    for line in sorted(one["boundary"], key=lambda line: -line["alpha"]):
        ends.append(["-" if line[key] is None else f"{line[key]:g}" for key in ("alpha", "works", "fails")])
    points = [["alpha", axis, "", "loss (nats)"]]
    for point in sorted(one["points"], key=lambda point: (-point["alpha"], point["value"])):
        loss = "-" if point["val_loss"] is None else f"{point['val_loss']:.4f}"
        state = point.get("reason") or ("failed" if point["failed"] else "works")
        points.append([f"{point['alpha']:g}", f"{point['value']:g}", state, loss])
    start = one.get("start_val_loss")
    odd = [
        paragraph(f"Not monotone: alpha {v['alpha']:g} fails at {v['failed']:g} but works at {v['worked']:g}.")
        for v in one.get("violations") or []
    ]
    before = "" if start is None else paragraph(f"Loss before training: {start:.4f} nats.")
    shown = [f"<h3>{escape(title)}</h3>", before, table_html(ends), *odd, details("All points", table_html(points))]
    return "".join(shown)


def main(args):
    print(write(args.results_dir, args.out or Path(args.results_dir) / "report.html", args.figures))


if __name__ == "__main__":
    run_main(main, args)
