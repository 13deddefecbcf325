"""All figures of vit_sparse_fl that the runs in a folder allow.

    python plots/vit_figures.py --data-dir results --out-dir results/plots

Each is one script of its own, with further flags: vit_curves, vit_heterogeneity, vit_local_steps, vit_strategies,
vit_sparsity, vit_layers, vit_interference, vit_shards.
"""

from common.cli import run_main
from plots import (
    vit_curves,
    vit_heterogeneity,
    vit_interference,
    vit_layers,
    vit_local_steps,
    vit_shards,
    vit_sparsity,
    vit_strategies,
)
from plots.every_figure import draw_every
from plots.vit_drawing import figure_parser

SCRIPTS = (
    vit_curves,
    vit_heterogeneity,
    vit_local_steps,
    vit_strategies,
    vit_sparsity,
    vit_layers,
    vit_interference,
    vit_shards,
)


def build_parser():
    return figure_parser("Draws every figure of vit_sparse_fl that the runs allow.", at=True)


def main(args):
    draw_every(SCRIPTS, args)


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
