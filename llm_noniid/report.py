"""One HTML file that says what the runs in a folder show: verdicts, tables, curves with their alarms, figures.

    python llm_noniid/report.py --results-dir results --out results/report.html

The file holds all it shows (figures as data URIs, no script, no font, no link to elsewhere), so that it can be mailed
and read offline. The verdicts are `llm_noniid.verdicts`', the tables `llm_noniid.tables`', the figures `plots/`'.
"""

import base64
import html
import math
import subprocess
import sys
from pathlib import Path

from common.checkpoint import read_json, saving
from common.cli import Parser, run_main
from llm_noniid import comparing, outcomes, tables
from llm_noniid import verdicts as judging

FIGURES = Path(__file__).resolve().parent.parent / "plots" / "noniid_figures.py"
CAPTIONS = {  # by the beginning of a figure's file name, in the report's order
    "curves": "Validation loss over the rounds, mean and spread over seeds, alarms marked",
    "drift": "How far the clients' updates are apart, over the rounds",
    "clients": "The loss of each client and topic",
    "topics": "The loss of each topic's texts",
    "similarity": "Cosines of the clients' updates, clients ordered by their main topic",
    "partition": "What the clients' texts are, and how far they are from the whole",
    "failure_map": "Where training breaks",
}
LETTERS = {"diverged": "D", "oscillating": "O", "drifting": "F", "slow": "S", "left_out": "L"}
COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9")
DASHES = ("", "6 2", "2 2", "8 3 2 3", "4 4", "1 3")
SIGNS = {"confirmed": "✓", "refuted": "✗", "not decided": "?", "not measured": "–"}
CSS = """
body { font: 15px/1.5 sans-serif; max-width: 76rem; margin: 1rem auto; padding: 0 1rem; color: #111; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #bbb; } h3 { margin-bottom: .3rem; }
table { border-collapse: collapse; font-size: .82rem; } th, td { border: 1px solid #ccc; padding: .2rem .45rem; }
th { background: #eee; text-align: left; } td { vertical-align: top; }
.wide td:first-child, .status { white-space: nowrap; }
.wide { overflow-x: auto; }
.confirmed, .refuted { font-weight: bold; } .beside td { color: #555; } img, svg { max-width: 100%; height: auto; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: .8rem; }
figure { margin: 1rem 0; } figcaption { font-size: .85rem; color: #333; } summary { cursor: pointer; }
"""


def write(folder, out, figures=True):
    """Writes the report of the runs in `folder` to `out`. Returns its path. Raises UsageError without a run."""
    folder, out = Path(folder), Path(out)
    found, notes = tables.read(folder)
    maps, damaged = outcomes.read_maps(folder)
    drawn, missing = draw(folder) if figures else ([], [])
    text = document(found, maps, drawn, [*notes, *damaged, *missing])
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = out.with_name(out.name + ".new")
    with saving(out, fresh):
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(out)
    return out


def draw(folder, script=FIGURES):
    """(PNG files of the figures that the runs allow, notes): drawn anew into `folder`/figures by plots/."""
    target = Path(folder) / "figures"
    if not script.is_file():
        return [], [f"no figures: {script.name} is not there"]
    for old in target.glob("*.png"):  # of runs that may be gone
        old.unlink()
    command = [sys.executable, str(script), "--data-dir", str(folder), "--out-dir", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    notes = [line for line in done.stdout.splitlines() if line.startswith("not drawn")]
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["no output"]
        notes.append(f"{script.name} ended with exit code {done.returncode}: {said[0]}")
    return sorted(target.glob("*.png"), key=lambda path: (_place(path), path.name)), notes


# ----------------------------------------------------------------------------------------------- the document


def document(found, maps=(), figures=(), notes=()):
    """The HTML text. Args: found: list of `Context`s; maps: failure maps as dicts; figures: PNG files."""
    main = tables.main_context(found)
    judged = judging.verdicts(main, outcomes.maps_of(main, maps))
    n = len(judging.QUESTIONS)
    runs = sum(len(context.runs) for context in found)
    parts = [
        f"<p>{runs} runs in {len(found)} group{'s' * (len(found) != 1)} of like runs, {len(maps)} failure "
        f"map{'s' * (len(maps) != 1)}. The verdicts are about the largest group: {escape(main.title())}.</p>",
        "<h2>Verdicts</h2>",
        _paragraphs(comparing.__doc__.split("\n\n", 1)[1]),
        verdict_table(judged),
        "<h2>Research questions</h2>",
        *map(verdict_part, judged[:n]),
        "<h2>What the source expects</h2>",
        *map(verdict_part, judged[n:]),
        "<h2>Tables</h2>",
        _paragraphs(tables.__doc__.split("\n\n", 1)[1]),
    ]
    for context in found:
        parts += [f"<h3>{escape(context.title())}</h3>", base_line(context), table(tables.rows(context))]
    parts += ["<h2>Failure maps</h2>"] if maps else []
    parts += [map_part(one) for one in maps]
    parts.append("<h2>Curves and alarms</h2>")
    legend = ", ".join(f"{letter} {name.replace('_', ' ')}" for name, letter in LETTERS.items())
    parts.append(
        f"<p>Validation loss (nats) against the round, a line for each seed; a letter marks an alarm: {legend}. Each "
        "picture has a scale of its own; what lies above 1.5 times the lowest first loss is cut off.</p>"
    )
    for context in found:
        parts += [f"<h3>{escape(context.title())}</h3>", '<div class="curves">']
        parts += [curve_picture(context.words(factors), seeds) for factors, seeds in context.groups()]
        parts.append("</div>")
    parts.append(alarm_list([run for context in found for run in context.runs]))
    parts += ["<h2>Figures</h2>"] if figures else []
    parts += [figure_part(path) for path in figures]
    parts += ["<h2>Notes</h2>", provenance(found), *(f"<p>{escape(note)}</p>" for note in notes)]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Federated fine-tuning on non-IID texts'
        f'</title><link rel="icon" href="data:,"><style>{CSS}</style></head><body>\n'
        f"<h1>When federated fine-tuning of language models breaks</h1>\n{body}\n</body></html>\n"
    )


def escape(text):
    return html.escape(str(text))


def _paragraphs(text):
    parts = text.replace("`", "").strip("\n").split("\n\n")
    return "".join(
        f"<pre>{escape(part.rstrip())}</pre>" if part.startswith("    ") else f"<p>{escape(' '.join(part.split()))}</p>"
        for part in parts
    )


def table(lines):
    """Rows of cells, the head first."""
    head, *rest = lines
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in rest)
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def verdict_table(judged):
    """Question, claim and status of every verdict."""
    lines = "\n".join(
        f"<tr><td>{escape(v.question)}</td><td>{escape(v.claim)}</td>"
        f'<td class="status {v.status.replace(" ", "-")}">{SIGNS[v.status]} {v.status}</td></tr>'
        for v in judged
    )
    return (
        f"<table><thead><tr><th>question</th><th>claim</th><th>verdict</th></tr></thead><tbody>{lines}</tbody></table>"
    )


def verdict_part(verdict):
    """A verdict with the numbers that it rests on; what is said beside is grey."""
    lines = "".join(
        f"<tr{' class=beside' if p.beside else ''}><td>{escape(p.claim)}{' (beside)' if p.beside else ''}</td>"
        f"<td class=status>{SIGNS[p.status]} {p.status}</td><td>{escape(p.numbers)}</td></tr>"
        for p in verdict.parts
    )
    head = f"<h3>{escape(verdict.question)}</h3><p>{escape(verdict.claim)}: <strong>{verdict.status}</strong>.</p>"
    return f"{head}<table><tbody>{lines}</tbody></table>" if lines else head


def base_line(context):
    """What the settings of a context's table share unless they say otherwise."""
    said = [outcomes.FACTORS[name][0].format(value) for name, value in context.base.items() if _told(context, name)]
    return f"<p>Unless said otherwise: {escape(', '.join(said).replace('_', ' '))}.</p>"


def _told(context, name):
    value = context.base[name]
    differs = len({run.factors[name] for run in context.runs if run.factors[name] is not None}) > 1
    return (
        value is not None
        and name not in ("algorithm", "cluster", "partition")
        and (
            differs
            or name in ("learning_rate", "alpha", "participation_rate", "client_optimizer")
            or (name == "local_steps" and value > 0)
        )
    )


def map_part(one):
    """A failure map as tables: the boundary of each alpha, then every point."""
    axis = one["axis"].replace("_", " ")
    state = "" if one.get("finished", True) else ", not finished"
    title = f"{one['algorithm']}, {axis}, seed {one.get('seed', '-')}: {len(one['points'])} runs{state}"
    ends = [("alpha", f"largest {axis} that works", "smallest that fails")]
    ends += [
        tuple("-" if b[key] is None else f"{b[key]:g}" for key in ("alpha", "works", "fails"))
        for b in sorted(one["boundary"], key=lambda b: -b["alpha"])
    ]
    points = [("alpha", axis, "", "loss (nats)")]
    points += [
        (f"{p['alpha']:g}", f"{p['value']:g}", p.get("reason") or ("failed" if p["failed"] else "works"), _loss(p))
        for p in sorted(one["points"], key=lambda p: (-p["alpha"], p["value"]))
    ]
    odd = [
        f"<p>Not monotone: alpha {v['alpha']:g} fails at {v['failed']:g} but works at {v['worked']:g}.</p>"
        for v in one.get("violations") or []
    ]
    start = one.get("start_val_loss")
    before = "" if start is None else f"<p>Loss before training: {start:.4f} nats.</p>"
    more = f"<details><summary>All points</summary>{table(points)}</details>"
    return f"<h3>{escape(title)}</h3>{before}{table(ends)}{''.join(odd)}{more}"


def _loss(point):
    return "-" if point["val_loss"] is None else f"{point['val_loss']:.4f}"


# --------------------------------------------------------------------------------------------------- pictures


def curve_picture(title, runs, width=300, height=170):
    """An SVG figure: the validation loss of each seed's run, and its alarms as letters."""
    curves = {seed: run.curve("val_loss") for seed, run in sorted(runs.items())}
    ends = [(r, v) for rounds, values in curves.values() for r, v in zip(rounds, values, strict=True)]
    finite = [v for _, v in ends if math.isfinite(v)]
    caption = f"<figcaption>{escape(title)}</figcaption>"
    if not finite:
        return f"<figure>{caption}<p>No finite loss.</p></figure>"
    first = [values[0] for _, values in curves.values() if values and math.isfinite(values[0])]
    low, high = min(finite), min(max(finite), 1.5 * min(first, default=math.inf))
    high = max(high, low + 1e-3)
    most = max(max(r for r, _ in ends), 1)

    def place(r, v):
        y = 8 + (height - 30) * (1 - (min(max(v, low), high) - low) / (high - low))
        return f"{42 + (width - 52) * r / most:.1f}", f"{y:.1f}"

    drawn = [f'<rect x="42" y="8" width="{width - 52}" height="{height - 30}" fill="none" stroke="#bbb"/>']
    for i, (seed, (rounds, values)) in enumerate(curves.items()):
        color, dash = COLORS[i % len(COLORS)], DASHES[i % len(DASHES)]
        points = [place(r, v) for r, v in zip(rounds, values, strict=True) if math.isfinite(v)]
        joined = " ".join(",".join(p) for p in points)
        drawn.append(
            f'<polyline points="{joined}" fill="none" stroke="{color}" stroke-width="1.5" stroke-dasharray="{dash}">'
            f"<title>seed {seed}</title></polyline>"
        )
        drawn += [f'<circle cx="{x}" cy="{y}" r="1.6" fill="{color}"/>' for x, y in points]
        table_ = dict(zip(rounds, values, strict=True))
        for alarm in runs[seed].alarms:
            v = table_.get(alarm["round"], high)
            x, y = place(alarm["round"], v if math.isfinite(v) else high)
            drawn.append(
                f'<text x="{x}" y="{float(y) - 4:.1f}" font-size="11" font-weight="bold" text-anchor="middle" '
                f'fill="{color}">{LETTERS[alarm["detector"]]}<title>{escape(alarm["message"])}</title></text>'
            )
    labels = [(f"{high:.3g}", 38, 15), (f"{low:.3g}", 38, height - 22)]
    drawn += [f'<text x="{x}" y="{y}" font-size="10" text-anchor="end">{text}</text>' for text, x, y in labels]
    drawn.append(f'<text x="42" y="{height - 8}" font-size="10">0</text>')
    drawn.append(f'<text x="{width - 10}" y="{height - 8}" font-size="10" text-anchor="end">round {most}</text>')
    picture = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg>'
    return f"<figure>{picture}{caption}</figure>"


def alarm_list(runs):
    """Every alarm with its run, round, value and threshold."""
    lines = [("run", "detector", "round", "value", "threshold", "message")]
    for run in runs:
        for alarm in run.alarms:
            numbers = ("-" if alarm[key] is None else f"{alarm[key]:.3g}" for key in ("value", "threshold"))
            lines.append((run.folder.name, alarm["detector"], str(alarm["round"]), *numbers, alarm["message"]))
        if run.blown_up:
            lines.append((run.folder.name, "ended", "-", "-", "-", run.reason))
    n = len(lines) - 1
    if not n:
        return "<p>No alarm in any run.</p>"
    return f"<details><summary>All {n} alarms</summary>{table(lines)}</details>"


def _place(path):
    """Where in `CAPTIONS` a figure's file is; behind them if it is not."""
    name = Path(path).stem.removeprefix("noniid_")
    return next((i for i, start in enumerate(CAPTIONS) if name.startswith(start)), len(CAPTIONS))


def figure_part(path):
    """A PNG file as a figure that needs no file beside it."""
    name = Path(path).stem
    caption = list(CAPTIONS.values())[i] if (i := _place(path)) < len(CAPTIONS) else name.replace("_", " ")
    data = base64.b64encode(Path(path).read_bytes()).decode("ascii")
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
    return f"<figure>{image}<figcaption>{escape(f'{caption} ({name})')}</figcaption></figure>"


def provenance(found):
    """Commits, versions and devices of the runs."""
    commits, versions, devices = set(), set(), set()
    for context in found:
        for run in context.runs:
            about = read_json(run.folder / "run.json")
            commits.add(str(about.get("git_commit"))[:12])
            versions.add(", ".join(f"{k} {v}" for k, v in (about.get("versions") or {}).items()))
            devices.add(", ".join(f"{k} {v}" for k, v in (about.get("resolved") or {}).items()))
    lines = [("commits", sorted(commits)), ("versions", sorted(versions)), ("devices", sorted(devices))]
    return "".join(f"<p>{name}: {escape('; '.join(values))}</p>" for name, values in lines)


def main(args):
    print(write(args.results_dir, args.out or Path(args.results_dir) / "report.html", args.figures))


def build_parser():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--results-dir", "--output-dir", default="results", metavar="DIR", help="where run folders are")
    parser.add_argument("--out", metavar="FILE", help="the report (default: report.html in --results-dir)")
    parser.add_argument("--no-figures", dest="figures", action="store_false", help="without those of plots/")
    return parser


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
