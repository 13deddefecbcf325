"""All figures of lora_glue_fl that the runs in a folder allow.

    python plots/glue_figures.py --data-dir out_fedavg --out-dir results/plots

Each is one script of its own: glue_metric, glue_error, glue_bytes, glue_clients.
"""

from common.cli import run_main
from plots import glue_bytes, glue_clients, glue_error, glue_metric
from plots.every_figure import draw_every
from plots.glue_drawing import figure_parser

SCRIPTS = (glue_metric, glue_error, glue_bytes, glue_clients)


def build_parser():
    return figure_parser("Draws every figure of lora_glue_fl that the runs allow.")


def main(args):
    draw_every(SCRIPTS, args)


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
