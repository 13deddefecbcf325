"""Clients with quadratic losses f_k(w) = 1/2 (w - w_k)^T A_k (w - w_k): every optimum and fixed point is known."""

import torch

from common.before.aggregation import WeightedMean
from common.before.local import client_optimizer, local_steps
from common.parallel import Lanes

SIZES = {"w": 3, "b": 2}  # the five coordinates are split into two parameters


class Quadratics:
    """K clients of their own curvature and minimum; theta starts at 0. Attributes: A [K, 5, 5]; target [K, 5]."""

    def __init__(self, clients=5, seed=0, same=False, dtype=torch.float64):
        draw = torch.Generator().manual_seed(seed)
        roots = torch.randn(clients, 5, 5, generator=draw, dtype=torch.float64)
        self.A = (roots @ roots.mT / 5 + 0.5 * torch.eye(5, dtype=torch.float64)).to(dtype)
        self.target = torch.randn(clients, 5, generator=draw, dtype=torch.float64).to(dtype)
        if same:
            self.A, self.target = self.A[:1].repeat(clients, 1, 1), self.target[:1].repeat(clients, 1)
        self.parameters = {name: torch.nn.Parameter(torch.zeros(n, dtype=dtype)) for name, n in SIZES.items()}

    def __len__(self):
        return len(self.target)

    def start(self):
        return {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    def load(self, theta):
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(theta[name])

    def loss(self, k):
        """f_k as `local_steps` wants it; a batch is added to its minimum (0: the full gradient)."""

        def value(batch):
            away = flat(self.parameters) - (self.target[k] + batch)
            return away @ self.A[k] @ away / 2

        return value

    def gradient(self, k, theta):
        return unflat(self.A[k] @ (flat(theta) - self.target[k]))

    def optimum(self, weights=None, mu=0.0, anchor=None):
        """The minimum of sum_k p_k f_k (+ mu/2 ||w - anchor||^2), flat."""
        p = torch.tensor([1.0] * len(self) if weights is None else weights, dtype=torch.float64)
        p = (p / p.sum()).to(self.A.dtype)
        A, right = torch.einsum("k,kij->ij", p, self.A), torch.einsum("k,kij,kj->i", p, self.A, self.target)
        if mu:
            A, right = A + mu * torch.eye(5, dtype=A.dtype), right + mu * anchor
        return torch.linalg.solve(A, right)

    def local(self, theta, k, steps, lr, kind="sgd", momentum=0.9, **options):
        """Client k's work from theta: (theta_k, LocalResult)."""
        self.load(theta)
        optimizer = client_optimizer(kind, self.parameters, lr, momentum)
        batches = [torch.zeros(5, dtype=self.A.dtype)] * steps
        done = local_steps(self.loss(k), batches, self.parameters, optimizer, **options)
        return {name: p.detach().clone() for name, p in self.parameters.items()}, done

    def train(self, theta, rounds, steps, lr, variates=None, clients=None, after=None, weights=None, **options):
        """Rounds of FedAvg, or of SCAFFOLD with `variates`. clients: function of the round; after: called with it."""
        for round in range(rounds):
            lanes = Lanes(clients(round) if clients else range(len(self)), sticky=True)
            mean = WeightedMean(theta, lanes)
            for k in lanes:
                correction = variates.correction(k) if variates else None
                theta_k, done = self.local(theta, k, steps, lr, correction=correction, record=True, **options)
                mean.add(theta_k, weights[k] if weights else 1.0)
                if variates:
                    variates.offer(k, done.mean_gradient)
            theta = mean.result()
            if variates:
                variates.close_round(lanes)
            if after:
                after(round)
        return theta


def flat(theta):
    return torch.cat([theta[name] for name in SIZES])


def unflat(vector):
    return dict(zip(SIZES, vector.split(list(SIZES.values())), strict=True))
