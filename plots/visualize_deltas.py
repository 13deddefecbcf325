"""What central training changes: heat maps and singular values of the updates of Mamba-2's in_proj.

    python plots/visualize_deltas.py --data_dir results --output_dir results/plots

Needs runs of mamba_fl/central.py with --save-deltas. For each run (a heat map cannot be averaged):

    heatmap_structure_{run}_layer_{i}.png   |update| of the 80 rows and columns with the largest norm, at 10 steps

and for each configuration, the mean over layers, then over seeds:

    averaged_svd_evolution_{config}.png     the 8 largest singular values over training
    averaged_final_spectrum_{config}.png    the last update's, and the rank that holds 95 % of the energy
"""

from common.cli import run_main
from plots.deltas import build_parser, draw_updates

if __name__ == "__main__":
    parser = build_parser("Draws the parameter updates of central runs.", federated=False)
    run_main(lambda args: draw_updates(args, "central"), parser.parse_args())
