"""Validation perplexity of mamba_fl's runs, under the source's name: all figures of plots/mamba.py.

    python plots/plot_perplexities.py --data_dir results --out_dir results/plots
    python plots/plot_perplexities.py --data_dir results --config pure_ssm_2_layer

Writes 1_central_vs_fed_{config}.png, 2_lu_comparison_{config}.png, 3_method_comparison_{config}.png and
4_multi_config_comparison.png.
"""

from plots.mamba import main

if __name__ == "__main__":
    main()
