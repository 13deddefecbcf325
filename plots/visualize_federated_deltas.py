"""What training changes: heat maps and singular values of the updates of in_proj, of the server or of the clients.

    python plots/visualize_federated_deltas.py --data_dir results --output_dir results/plots --entity server
    python plots/visualize_federated_deltas.py --data_dir results --output_dir results/plots --entity client

Needs federated runs with --save-deltas (of central runs: visualize_deltas.py). {method} is the source's: federated,
fed_momentum, fed_entropy, fed_fisher. For each run (a heat map cannot be averaged):

    heatmap_{method}_{config}_lu_{LU}_seed_{s}_layer_{i}_server.png   |update|, 80 rows and columns, 10 rounds
    heatmap_{method}_{config}_lu_{LU}_seed_{s}_layer_{i}_client.png   the same of every client's last update

and for each method, a panel per layer, the mean over seeds (--entity client: over clients and seeds):

    svd_evolution_{method}_{config}_lu_{LU}.png      the 8 largest singular values over training
    svd_spectrum_{method}_{config}_lu_{LU}.png       the last update's, and the rank that holds 95 % of the energy

The last two end in `_client` with --entity client.
"""

from common.cli import run_main
from plots.visualize_deltas import build_parser, draw_updates

if __name__ == "__main__":
    parser = build_parser("Draws the parameter updates of federated runs.", federated=True)
    run_main(lambda args: draw_updates(args, args.entity), parser.parse_args())
