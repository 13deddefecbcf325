"""training_history.json: the curves of a run in the source's fields, for tools that read those."""


def training_history(command, lines):
    """The lines of metrics.jsonl as the source's lists, one entry per evaluation."""

    def column(field, default=None):
        return [line.get(field, default) for line in lines]

    if command == "central":
        fields = ("val_loss", "val_ppl", "train_loss", "generated", "grad_cosine", "delta_norms")
        return {"step": column("round"), **{field: column(field) for field in fields}}
    entropies = [line.get("client_entropy") for line in lines]
    return {
        "global_step": column("steps"),
        "train_ppl": column("train_ppl"),
        "server_val_ppl": column("val_ppl"),
        "client_val_ppls": column("client_val_ppl", []),
        "avg_client_entropy": [_mean(h) for h in entropies],
        "generated": column("generated"),
    }


def _mean(values):
    seen = [v for v in values or [] if v is not None]  # null: a client that was left out
    return sum(seen) / len(seen) if seen else None
