"""Clients with quadratic losses f_k(w) = 1/2 (w - w_k)^T A_k (w - w_k): every optimum and fixed point is known."""

import torch

from common.aggregation import WeightedMean
from common.local import client_optimizer, local_steps
from common.rounds import Round
from common.vector import Weights

SIZES = {"w": 3, "b": 2}  # the five coordinates are split into two parameters


class Quadratics:
    """K clients of their own curvature and minimum; theta [5] starts at 0. Attributes: A [K, 5, 5]; target [K, 5]."""

    def __init__(self, clients=5, seed=0, dtype=torch.float64):
        draw = torch.Generator().manual_seed(seed)
        roots = torch.randn(clients, 5, 5, generator=draw, dtype=torch.float64)
        self.A = (roots @ roots.mT / 5 + 0.5 * torch.eye(5, dtype=torch.float64)).to(dtype)
        self.target = torch.randn(clients, 5, generator=draw, dtype=torch.float64).to(dtype)
        parameters = {name: torch.nn.Parameter(torch.zeros(n, dtype=dtype)) for name, n in SIZES.items()}
        self.weights = Weights(None, parameters)
        self.start = self.weights.snapshot()

    def __len__(self):
        return len(self.target)

    def loss(self, k):
        """f_k as `local_steps` wants it; a batch is added to its minimum (0: the full gradient)."""

        def value(batch):
            away = torch.cat(list(self.weights.parameters.values())) - (self.target[k] + batch)
            return away @ self.A[k] @ away / 2

        return value

    def gradient(self, k, theta):
        return self.A[k] @ (theta - self.target[k])

    def optimum(self, weights=None):
        """The minimum of sum_k p_k f_k."""
        p = torch.tensor([1.0] * len(self) if weights is None else weights, dtype=self.A.dtype)
        p = p / p.sum()
        A, right = torch.einsum("k,kij->ij", p, self.A), torch.einsum("k,kij,kj->i", p, self.A, self.target)
        return torch.linalg.solve(A, right)

    def local(self, theta, k, steps, lr, kind="sgd", momentum=0.9, **options):
        """Client k's work from theta: (theta_k, LocalResult)."""
        self.weights.load(theta)
        optimizer = client_optimizer(kind, self.weights.parameters, lr, momentum)
        batches = [(torch.zeros_like(theta),)] * steps
        done = local_steps(self.loss(k), batches, self.weights, optimizer, **options)
        return self.weights.snapshot(), done

    def train(self, theta, rounds, steps, lr, variates=None, ids=None, after=None, weights=None, **options):
        """Rounds of FedAvg, or of SCAFFOLD with `variates`. ids: function of the round; after: called with it."""
        for t in range(rounds):
            followers = [variates, variates.rows] if variates else ()
            clients = Round(ids(t) if ids else range(len(self)), weights, followers=followers)
            mean = WeightedMean(theta, clients)
            for k in clients:
                correction = variates.correction(k) if variates else None
                theta_k, done = self.local(theta, k, steps, lr, correction=correction, record=True, **options)
                if variates:
                    variates.offer(k, done.mean_gradient)
                mean.add(theta_k)
            theta = mean.result()
            if after:
                after(t)
        return theta


def near(a, b, tolerance=1e-12):
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)
    return True
