"""Products of LoRA factors: sums of them, their norms and their truncation, without forming them where factors suffice.

A layer's adapter is a pair (A [r, k], B [d, r]) that adds Delta = s B A [d, k] to what the layer computes, s = alpha/r.
A torch.nn.Linear's weight is [d, k]; transformers' Conv1D keeps the transpose (peft's `fan_in_fan_out`), which matters
only in `add_to_weight`.

All products are computed in fp64 on the CPU, with one thread, so that neither a device nor a number of threads enters
the bits.
"""

import contextlib
import math

import torch


class Product:
    """A sum of low-rank products, sum_i c_i B_i A_i [d, k], in fp64 on the CPU.

    Kept as stacked factors while they have at most min(d, k) columns, as the d x k matrix from then on: memory stops
    growing, whatever the number of products. Adding in the same order gives the same bits.

    Args: d, k: outputs and inputs of the layer.
    """

    def __init__(self, d, k):
        self.shape = (d, k)
        self._A, self._B, self._dense = [_zeros(0, k)], [_zeros(d, 0)], None

    @property
    def columns(self):
        """R, the number of columns of the stacked factors; None once the d x k matrix is kept."""
        return None if self._dense is not None else sum(A.shape[0] for A in self._A)

    def add(self, A, B, factor=1.0):
        """Adds factor * B A. Args: A [r, k], B [d, r], any floating dtype and device. Returns self."""
        A, B = _exact(A), _exact(B).mul_(factor)
        if self._dense is None and self.columns + A.shape[0] > min(self.shape):
            self._dense = self.full()
            self._A = self._B = None
        if self._dense is not None:
            with one_thread():
                self._dense.addmm_(B, A)
        else:
            self._A.append(A)
            self._B.append(B)
        return self

    def add_product(self, other, factor=1.0):
        """Adds factor * another `Product` of the same shape, which is not changed. Returns self."""
        if other.columns is not None:
            return self.add(*other.factors(), factor)
        self._dense = self.full().add_(other._dense, alpha=factor)
        self._A = self._B = None
        return self

    def factors(self):
        """The stacked (A [R, k], B [d, R]); only while `columns` is not None."""
        self._A, self._B = [torch.cat(self._A)], [torch.cat(self._B, dim=1)]  # [R, k], [d, R]
        return self._A[0], self._B[0]

    def full(self):
        """The matrix [d, k], a new tensor."""
        if self._dense is not None:
            return self._dense.clone()
        A, B = self.factors()
        with one_thread():
            return B @ A  # [d, k]

    def norm(self):
        """The Frobenius norm. Of factors: ||R_B R_A^T||, R_B and R_A^T from QR of B and A^T, as QR keeps norms.

        (Gram matrices would lose differences of products under 1e-8 of the products.)
        """
        if self._dense is not None:
            return torch.linalg.vector_norm(self._dense).item()
        A, B = self.factors()
        with one_thread():
            R_B, R_A = (torch.linalg.qr(M, mode="r").R for M in (B, A.T))  # [R, R]
            return torch.linalg.vector_norm(R_B @ R_A.T).item()

    def scaled(self, factor):
        """factor times the product, a new `Product`."""
        return Product(*self.shape).add_product(self, factor)

    def divide_(self, number):
        """Divides by a number, in place. Returns self."""
        for tensor in self._B if self._dense is None else [self._dense]:
            tensor.div_(number)
        return self


def add_to_weight(weight, update, fan_in_fan_out=False):
    """The base weight plus a `Product`, in fp64 and rounded once; a new tensor, where nothing changes the same bits.

    Args: weight [d, k], or [k, d] with `fan_in_fan_out` (transformers' Conv1D).
    """
    full = update.full()
    if fan_in_fan_out:
        full = full.T  # [k, d]
    full = full.to(weight.device)
    # Not weight + 0: that would turn -0.0 into 0.0.
    return torch.where(full == 0, weight.detach(), (weight.detach().double() + full).to(weight.dtype))


def truncate(target, rank, new_scale, split="us", generator=None):
    """The best approximation of a product by an adapter: new_scale B A = the `rank` leading singular triplets.

        B = Q_B R_B,  A^T = Q_A R_A,  R_B R_A^T = U S V^T     (QR of d x R and k x R, SVD of R x R)
        us:        B = Q_B U S / s,           A = V^T Q_A^T             (the source's)
        balanced:  B = Q_B U sqrt(S / s),     A = sqrt(S / s) V^T Q_A^T
        sv:        B = Q_B U,                 A = S V^T Q_A^T / s

    O((d + k) R^2 + R^3) without forming Delta [d, k] (FlexLoRA takes the SVD of Delta). Where Delta's rank is below
    `rank`, the missing directions get B = 0 and A random, as a fresh adapter: with both zero they would never learn.

    Args: target: a `Product`; rank: at least 1, also above Delta's; new_scale: s of the new adapter, above 0; split: of
        `common.cli.SPLITS`; generator: for the missing directions, needed only where there are any.
    Returns: (A [rank, k], B [d, rank]), fp64.
    """
    with one_thread():
        if target.columns is None:
            U, S, Vh = torch.linalg.svd(target._dense, full_matrices=False)
        else:
            A, B = target.factors()
            Q_B, R_B = torch.linalg.qr(B)  # [d, R], [R, R]
            Q_A, R_A = torch.linalg.qr(A.T)  # [k, R], [R, R]
            U, S, Vh = torch.linalg.svd(R_B @ R_A.T)  # [R, R], [R], [R, R]
            U, Vh = Q_B @ U[:, :rank], Vh[:rank] @ Q_A.T  # [d, rank], [rank, k]
        # As matrix_rank: below this a singular value is rounding, and its direction arbitrary.
        found = int((S[:rank] > S[:1] * max(target.shape) * torch.finfo(S.dtype).eps).sum())
        U, S, Vh = U[:, :found], S[:found] / new_scale, Vh[:found]
        power = {"us": 1.0, "balanced": 0.5, "sv": 0.0}[split]
        B, A = U * S**power, S[:, None] ** (1 - power) * Vh  # [d, found], [found, k]
    return fit_rank(A, B, rank, generator)


def fit_rank(A, B, rank, generator=None, ratio=1.0):
    """An adapter cut or padded to another rank: (A [rank, k], B [d, rank]), new tensors.

    Cut: the first directions stay, which are the leading ones after `truncate`. Padded: B with zeros and A with random
    rows (peft's initialisation, uniform on +-1/sqrt(k)), so that the product stays and the new directions learn.

    Args: ratio: old scale / new scale, which B takes over; generator: a torch.Generator on the CPU, for padding.
    Raises: ValueError when rows are missing and there is no generator.
    """
    r, k = A.shape
    new_A, new_B = A[:rank].clone(), B[:, :rank] * ratio
    if r < rank:
        if generator is None:
            raise ValueError(f"{rank - r} of {rank} directions are missing: pass a generator to draw them")
        rows = fresh_A(rank - r, k, generator).to(A)  # [rank - r, k]
        new_A = torch.cat([new_A, rows])  # [rank, k]
        new_B = torch.cat([new_B, new_B.new_zeros(len(B), rank - r)], dim=1)  # [d, rank]
    return new_A, new_B


def fresh_A(r, k, generator):
    """Rows A [r, k] as peft draws them: kaiming_uniform(a = sqrt 5), which is uniform on +-1/sqrt(k); fp32, CPU."""
    return (2 * torch.rand(r, k, generator=generator) - 1) / math.sqrt(k)


def distance(served, target):
    """||served - target||, the Frobenius norm, of two `Product`s."""
    return Product(*target.shape).add_product(served).add_product(target, -1.0).norm()


def _zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64)


def _exact(tensor):
    """A contiguous fp64 copy on the CPU."""
    return tensor.detach().to("cpu", torch.float64, copy=True).contiguous()


@contextlib.contextmanager
def one_thread():
    """CPU products on one thread inside: sums do not depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
