"""All figures of llm_noniid that the runs in a folder allow.

    python plots/noniid_figures.py --data-dir results --out-dir results/plots

Each is one script of its own: noniid_curves, noniid_drift, noniid_clients, noniid_similarity, noniid_partition,
noniid_failure_map.
"""

from common.cli import run_main
from plots import (
    noniid_clients,
    noniid_curves,
    noniid_drift,
    noniid_failure_map,
    noniid_partition,
    noniid_similarity,
)
from plots.every_figure import draw_every
from plots.noniid_drawing import figure_parser

SCRIPTS = (
    noniid_curves,
    noniid_drift,
    noniid_clients,
    noniid_similarity,
    noniid_partition,
    noniid_failure_map,
)


def build_parser():
    return figure_parser("Draws every figure of llm_noniid that the runs allow.")


def main(args):
    draw_every(SCRIPTS, args)


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
