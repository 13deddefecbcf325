"""theta is one vector: a module's trainable parameters in one contiguous tensor, and their names as views of it.

    weights = Weights(model)                     # after the model is on its device
    theta = weights.snapshot()                   # [n]
    weights.load(theta)                          # one copy: the model computes with theta
    weights.named(theta)["head.weight"]          # a view of its shape, for files, masks and logs

In the papers theta and delta are vectors, and here an algorithm is its formula: theta_k - theta is a client's update.
"""

import hashlib

import torch


class Weights:
    """The trainable parameters of `module` as one vector [n], in `named_parameters` order, tied weights once.

    From here on the parameters are views of `theta`: what trains them changes it, what is copied into it they compute
    with. Frozen parameters and buffers stay where they are. The module must not be moved or cast afterwards.

    Attributes: theta: the live vector; parameters: {name: parameter}; size: n; bytes: of the vector.
    Args: module; parameters: {name: parameter} in the vector's order, by default all that are trainable.
    Raises: ValueError for no trainable parameter, or for parameters of several dtypes or devices.
    """

    def __init__(self, module, parameters=None):
        if parameters is None:
            parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.parameters = dict(parameters)
        kinds = {(p.dtype, p.device) for p in self.parameters.values()}
        if len(kinds) != 1:
            raise ValueError(f"one vector needs one dtype and device, the trainable parameters have {kinds or 'none'}")
        self.shapes = {name: p.shape for name, p in self.parameters.items()}
        self.theta = torch.cat([p.detach().reshape(-1) for p in self.parameters.values()])  # [n]
        for p, view in zip(self.parameters.values(), self.named(self.theta).values(), strict=True):
            p.data = view

    @property
    def size(self):
        return self.theta.numel()

    @property
    def bytes(self):
        return self.theta.numel() * self.theta.element_size()

    def named(self, vector):
        """{name: view of `vector` [n] in the parameter's shape}."""
        pieces = vector.split([shape.numel() for shape in self.shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}

    def vector(self, tensors):
        """The vector [n] of {name: tensor}, on theta's device. Raises: ValueError for other names or shapes."""
        if tensors.keys() != self.shapes.keys() or any(tensors[n].shape != s for n, s in self.shapes.items()):
            odd = [n for n in {**self.shapes, **tensors} if n not in tensors or self.shapes.get(n) != tensors[n].shape]
            raise ValueError(f"the entries differ from the model's: {', '.join(odd[:5])}")
        return torch.cat([tensors[name].to(self.theta).reshape(-1) for name in self.shapes])

    def snapshot(self):
        """A copy of the live vector: what the model computes with now."""
        return self.theta.clone()

    def load(self, theta):
        """Puts theta [n] into the model."""
        self.theta.copy_(theta)


def is_finite(*vectors):
    """Whether every element of every vector is finite: one pass each, nothing allocated."""
    for vector in vectors:
        if vector.numel():
            low, high = torch.aminmax(vector)  # both are NaN when any element is
            if not (torch.isfinite(low) and torch.isfinite(high)):
                return False
    return True


def fingerprint(tensors):
    """SHA-256 of {name: tensor}: names, dtypes, shapes and bits. A fact of a run: of the weights that it freezes."""
    hashed = hashlib.sha256()
    for name, t in tensors.items():
        hashed.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        hashed.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()
