"""Random LoRA factors, and a small peft model with several adapters."""

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

from common.products import Product


def normal(draw, *shape, dtype=torch.float64):
    return torch.tensor(draw.standard_normal(shape)).to(dtype)


def close(a, b, tolerance=1e-13):
    a, b = (t.numpy() if isinstance(t, torch.Tensor) else t for t in (a, b))
    assert a.shape == b.shape
    assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), 1e-300)


def parts_of(seed, d, k, ranks):
    draw = np.random.default_rng(seed)
    return [(1.0 + i, 0.5 + i / 3, normal(draw, r, k), normal(draw, d, r)) for i, r in enumerate(ranks)]


def dense(parts):
    return sum(w * s * B.numpy() @ A.numpy() for w, s, A, B in parts)


def product_of(parts):
    """sum_i weight_i scale_i B_i A_i as a `Product`."""
    (*_, A, B), *_ = parts
    total = Product(len(B), A.shape[1])
    for weight, scale, A, B in parts:
        total.add(A, B, weight * scale)
    return total


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(10, 14)
        self.conv = Conv1D(9, 14)  # weight [14, 9]

    def forward(self, x):
        return self.conv(torch.tanh(self.linear(x)))


def peft_model(ranks, alphas):
    torch.manual_seed(0)
    for i, (r, alpha) in enumerate(zip(ranks, alphas, strict=True)):
        config = LoraConfig(r=r, lora_alpha=alpha, target_modules=["linear", "conv"])
        if i == 0:
            model = get_peft_model(Layers(), config, adapter_name="0")
        else:
            model.add_adapter(str(i), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return model
