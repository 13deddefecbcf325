"""Validation perplexity of mamba_fl's runs, under the source's name: all figures of plots/mamba.py.

python plots/plot_perplexities.py --data_dir results --out_dir results/plots
python plots/plot_perplexities.py --data_dir results --config pure_ssm_2_layer --format pdf
"""

from common.cli import run_main
from plots.mamba import build_parser, main

if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
