"""SCAFFOLD's control variates   (Karimireddy et al. 2020, Alg. 1): what corrects a client's gradients for its drift.

    variates = ControlVariates(theta, num_clients)
    for round in ...:
        lanes = Lanes(clients, sticky=True)
        for k in lanes:
            done = local_steps(..., correction=variates.correction(k), record=True)   # y <- y - lr (g + c - c_k)
            mean.add(theta_k, 1)
            variates.offer(k, done.mean_gradient)                                     # c_k+
        theta = mean.result()                                                         # or with a server's step size
        variates.close_round(lanes)                                                   # c += (1/K) sum_S (c_k+ - c_k)

c_k+ is the mean of the round's raw local gradients. Under plain SGD with a constant learning rate that is the paper's
option II, c_k - c + (theta - y) / (H lr); unlike it, it holds for any optimiser, schedule and clipping.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common import parallel
from common.before.aggregation import effective_steps, finite
from common.before.local import check_scaffold
from common.checkpoint import saving
from common.cli import RunFailed


class ControlVariates:
    """c and the c_k of K clients, all zero at first.

    After every `close_round`, at any participation: c = sum_k w_k c_k / sum_k w_k over all K clients, with w_k = 1 as
    published. Where the global weights are the mean by numbers of examples, give these as `weights`: the published c
    would lead to the minimum of the plain mean of the clients' losses, whatever the weights of theta's mean are.

    c is fp64 on the template's device. The c_k are fp32 (fp64 of an fp64 template), each in the process that
    `Lanes(..., sticky=True)` gives client k to: on the CPU, or with `folder` in a file per client, so that memory does
    not grow with their number. A client that never took part has none. The files are working copies: a checkpoint
    holds its own, and what an earlier process left in the folder is never read.

    Args: template: {name: float tensor}, what clients train (only shapes, dtypes and device are used);
        total_clients: K, ids from 0; folder: made when first needed; weights: K numbers of at least 0, their sum
        above 0.
    """

    def __init__(self, template, total_clients, folder=None, weights=None):
        self.weights = [1.0] * total_clients if weights is None else [float(w) for w in weights]
        total = sum(self.weights)
        if len(self.weights) != total_clients or not all(w >= 0 for w in self.weights) or not 0 < total < math.inf:
            raise ValueError(f"weights must be {total_clients} finite numbers of at least 0, their sum above 0")
        if odd := [name for name, t in template.items() if not t.is_floating_point()]:
            raise ValueError(f"not trainable, so without a control variate: {', '.join(odd[:5])}")
        self.total_clients = total_clients
        self._like = {name: t.new_empty(0) for name, t in template.items()}  # dtype and device
        self.c = {name: torch.zeros_like(t, dtype=torch.float64).contiguous() for name, t in template.items()}
        if folder is None:
            self._states, self._offers = _Memory(), _Memory()
        else:
            self._states, self._offers = _Files(folder, "client"), _Files(folder, "offer")

    # ---- a round

    def correction(self, k):
        """{name: c - c_k}, what client k adds to its gradients, in the template's dtype and on its device.

        Zeros are -0.0, which added to a gradient changes no bit of it (0.0 would turn -0.0 into 0.0).
        """
        self._check_owner(k)
        c_k = self._states.get(k)
        result = {}
        for name, like in self._like.items():
            c = self.c[name]
            held = 0.0 if c_k is None else c_k[name].to(c.device, c.dtype)
            result[name] = (held - c).neg_().to(like.dtype)
        return result

    def offer(self, k, mean_gradient):
        """Takes client k's new c_k, which counts from `close_round` on. A client left out of the round offers nothing
        and keeps its c_k: the whole round is as if it had not taken part.

        Args: mean_gradient: {name: tensor}, the mean of the raw gradients of its local steps (copied).
        Raises: ValueError for a second offer in a round, other names or shapes, or values that are not finite.
        """
        self._check_owner(k)
        if k in self._offers:
            raise ValueError(f"client {k} has offered its control variate in this round already")
        if mean_gradient.keys() != self.c.keys():
            odd = sorted(mean_gradient.keys() ^ self.c.keys())
            raise ValueError(f"client {k}'s entries differ from the template's: {', '.join(odd[:5])}")
        for name, c in self.c.items():
            if mean_gradient[name].shape != c.shape:
                raise ValueError(f"{name}: client {k} has {tuple(mean_gradient[name].shape)}, not {tuple(c.shape)}")
        if not finite(mean_gradient):
            raise ValueError(f"client {k}'s mean gradient is not finite: leave it out of the round")
        self._offers[k] = {name: self._stored(name, g) for name, g in mean_gradient.items()}

    def close_round(self, lanes):
        """c += sum_{k in S} w_k (c_k+ - c_k) / sum w over all K, and the offers become the c_k.

        Summed in fp64 in the order of the lanes, as the mean of the weights: the same bits of c on 1 to 8 processes
        and for any order of the ids. Every process must call it.

        Args: lanes: the round's `Lanes(clients, sticky=True)`. Raises: ValueError for others.
        """
        if not lanes.sticky:
            raise ValueError("control variates live with their clients: deal them by Lanes(clients, sticky=True)")
        if strangers := sorted(set(self._offers) - set(lanes.mine)):
            raise ValueError(f"offers of clients that are not of this round: {strangers[:5]}")
        changes = parallel.LaneSum(lanes)
        for k in lanes:
            if k not in self._offers:
                continue
            new, old = self._offers[k], self._states.get(k)
            part = changes.begin(self.weights[k])
            for name in self.c:
                before = torch.zeros_like(new[name]) if old is None else old[name]
                part.add(name, (new[name], before), _weighted_change, part.weight)
        everyone = sum(self.weights)
        for name, change in changes.total().sums.items():
            self.c[name].add_(change.div_(everyone).to(self.c[name].device))
        self._states.adopt(self._offers)

    # ---- what a checkpoint holds

    @property
    def lasting(self):
        """{name: object} for `common.runlog.Run.save` and `restore`: merge it into the study's own.

        Two objects, since a run keeps either one state or a state per client of each.
        """
        return {
            "control_variate": SimpleNamespace(state_dict=self._state_dict, load_state_dict=self._load_state_dict),
            "control_variates": SimpleNamespace(client_states=self._client_states, load_client=self._load_client),
        }

    def delete_files(self):
        """Deletes what this process has in `folder`, at the end of a run: its last call. Nothing to do without one."""
        self._states.remove()
        self._offers.remove()

    def _state_dict(self):
        return dict(self.c)

    def _load_state_dict(self, state):
        if state.keys() != self.c.keys():
            odd = sorted(state.keys() ^ self.c.keys())
            raise ValueError(f"control variates of another model: {', '.join(odd[:5])}")
        for name, c in self.c.items():
            c.copy_(state[name])

    def _client_states(self):
        return self._states  # a mapping whose files are read one at a time

    def _load_client(self, k, read):
        if self._owns(k) and (state := read(k)):
            self._states[k] = {name: self._stored(name, t) for name, t in state.items()}

    # ---- details

    def _stored(self, name, tensor):
        dtype = torch.float64 if self._like[name].dtype == torch.float64 else torch.float32
        return tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)

    def _owns(self, k):
        return parallel.Lanes([k], sticky=True).owner(k) == parallel.world().rank

    def _check_owner(self, k):
        if not 0 <= k < self.total_clients:
            raise ValueError(f"client {k} is none of 0 to {self.total_clients - 1}")
        if not self._owns(k):
            raise ValueError(f"client {k} lives in another process: deal clients by Lanes(clients, sticky=True)")


def option_two(correction, theta, theta_k, steps, kind, lr, momentum=0.9):
    """The paper's option II: c_k+ = c_k - c + (theta - theta_k) / (a lr), {name: tensor} for `ControlVariates.offer`.

    a = H for "sgd"; for "sgdm", whose momentum starts at zero, `effective_steps`. Under a constant learning rate,
    without FedProx and clipping, it is for "sgd" the mean of the raw gradients (weight decay included); for "sgdm" a
    mean that weights early gradients more. Computed in fp64, but theta - theta_k is a difference of rounded weights:
    the recorded mean is the more precise.

    Args: correction: {name: c - c_k} of this round; theta, theta_k: weights before and after; steps: H, steps of the
        optimiser, not epochs; lr: what they were taken with.
    Raises: UsageError for "adamw", with the reason.
    """
    check_scaffold(kind, "II")
    scale = lr * effective_steps(steps, kind, momentum)
    result = {}
    for name, start in theta.items():
        moved = (start.double() - theta_k[name].double()).div_(scale)
        result[name] = moved.sub_(correction[name]).to(start.dtype)
    return result


class _Memory(dict):
    """{client: {name: tensor}} on the CPU."""

    def adopt(self, other):
        self.update(other)
        other.clear()

    def remove(self):
        self.clear()


class _Files(Mapping):
    """{client: {name: tensor}}, a safetensors file each; only what this object wrote counts."""

    def __init__(self, folder, stem):
        self.folder, self.stem = Path(folder), stem
        self._known = set()

    def path(self, k):
        return self.folder / f"{self.stem}_{k:06d}.safetensors"

    def __getitem__(self, k):
        if k not in self._known:
            raise KeyError(k)
        try:
            return load_file(self.path(k))
        except (OSError, SafetensorError) as error:
            raise RunFailed(
                f"cannot read {self.path(k)}: {error}; the checkpoint has its own: continue with --resume"
            ) from error

    def __setitem__(self, k, tensors):
        # Never over the old file: what was read from it may still be mapped into memory.
        fresh = self.path(k).with_suffix(".new")
        with saving(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with saving(self.path(k), fresh):
            save_file(tensors, fresh)
            os.replace(fresh, self.path(k))
        self._known.add(k)

    def __contains__(self, k):
        return k in self._known

    def __iter__(self):
        return iter(sorted(self._known))

    def __len__(self):
        return len(self._known)

    def adopt(self, other):
        for k in other:
            with saving(self.path(k)):
                os.replace(other.path(k), self.path(k))
        self._known |= other._known
        other._known.clear()

    def remove(self):
        for k in self:
            self.path(k).unlink(missing_ok=True)
        self._known.clear()


def _weighted_change(new, old, weight):
    return new.to(torch.float64, copy=True).sub_(old).mul_(weight)
