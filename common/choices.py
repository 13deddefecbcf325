"""Words that flags choose among, for what checks a command line and must not wait for what computes with them."""

CLIENT_OPTIMIZERS = ("sgd", "sgdm", "adamw")
RULES = ("svd", "naive", "ffa", "stack", "residual", "rolora", "rotate", "head")  # of `common.lowrank`
SIZES = ("dirichlet", "equal")  # of clients whose labels a Dirichlet draw deals, `common.sharding.equal_parts`
SPLITS = ("us", "balanced")  # of the singular values, `common.products.truncate`
