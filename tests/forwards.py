"""What the modules of a model are asked for: in which mode they compute, and with which seed of torch's generator."""

import contextlib

import torch


@contextlib.contextmanager
def noted():
    """Within it the set that it gives gets (gradients are on, the module trains, torch's seed) of all forward calls."""
    seen = set()

    def note(module, _):
        seen.add((torch.is_grad_enabled(), module.training, torch.initial_seed()))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield seen
    finally:
        hook.remove()


def check(seen, turns):
    """Training computes in training mode, each of its turns (a client in a round) with a dropout seed of its own;
    evaluation in evaluation mode."""
    assert {(gradients, training) for gradients, training, _ in seen} == {(True, True), (False, False)}
    assert len({seed for gradients, _, seed in seen if gradients}) == turns
