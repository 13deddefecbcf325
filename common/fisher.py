"""The diagonal of the Fisher information: how precisely a client knows each of its weights."""

import torch


def diagonal_fisher(model, weights, nll, samples, *, method="auto", chunk_size=None):
    """F_j = mean over samples of (d NLL(sample) / d theta_j)^2   (Matena & Raffel 2022, eq. 3).

    The square is per sample: squaring the gradient of a batch's mean instead would underestimate F by about the
    batch's size and change the ranking. For a language model a sample is a sequence, its NLL the sum over tokens.
    Whether F is the Fisher information (labels drawn from the model) or the empirical one (the data's labels) is
    decided by the labels in `samples`.

    Args:
        model: an nn.Module. It is put in eval mode meanwhile; modes and `.grad` are as before afterwards.
        weights: `common.vector.Weights` of the model, those that are wanted.
        nll: function (model, sample) -> scalar: the plain summed NLL of one sample, a tuple of tensors without the
            leading dimension.
        samples: tuple of tensors, all with leading dimension n, at least 1.
        method: "loop" (one backward pass a sample), "vmap" (`chunk_size` samples at once; every operation must
            support torch.func) or "auto": vmap where the parameters are on CUDA, else the loop.
        chunk_size: samples at once under vmap; default: as many as hold 2^28 gradient elements.

    Returns: fp32 vector [n]; zeros where a parameter does not enter the NLL.
    Raises: ValueError for no samples or unequal leading dimensions.
    """
    sizes = {len(s) for s in samples}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"samples need one leading dimension of at least 1, got {[tuple(s.shape) for s in samples]}")
    if method == "auto":
        method = "vmap" if weights.theta.is_cuda else "loop"
    whole = torch.zeros_like(weights.theta, dtype=torch.float32)  # [n]
    fisher, parameters = weights.named(whole), weights.parameters
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.enable_grad():
            if method == "loop":
                _add_loop(fisher, model, parameters, nll, samples)
            else:
                _add_vmap(fisher, model, parameters, nll, samples, chunk_size)
    finally:
        for module, training in modes:
            module.training = training
    (n,) = sizes
    return whole.div_(n)


def _add_loop(fisher, model, parameters, nll, samples):
    tensors = list(parameters.values())
    for i in range(len(samples[0])):
        loss = nll(model, tuple(s[i] for s in samples))
        gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
        for f, g in zip(fisher.values(), gradients, strict=True):
            if g is not None:
                g = g.float()
                f.addcmul_(g, g)


def _add_vmap(fisher, model, parameters, nll, samples, chunk_size):
    shim = _Shim(model, nll)

    def loss(theta, *sample):
        exchanged = {f"model.{name}": p for name, p in theta.items()}
        return torch.func.functional_call(shim, exchanged, sample)

    theta = {name: p.detach() for name, p in parameters.items()}
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, *[0] * len(samples)))
    if chunk_size is None:
        chunk_size = max(1, 2**28 // sum(p.numel() for p in theta.values()))
    # vmap's own chunk_size would hold every sample's gradient until the end.
    for part in zip(*(s.split(chunk_size) for s in samples), strict=True):
        for name, g in per_sample(theta, *part).items():
            # parameters beside these may be trainable, so that g has a graph
            fisher[name].add_(g.detach().float().square().sum(0))


class _Shim(torch.nn.Module):
    """Makes nll(model, sample) a forward, so that functional_call can exchange the model's parameters under it."""

    def __init__(self, model, nll):
        super().__init__()
        self.model, self.nll = model, nll

    def forward(self, *sample):
        return self.nll(self.model, sample)
