"""How a model is made from its sizes, by which kernel it computes, and how it is saved for transformers."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from common.cli import UsageError
from mamba_fl.mamba2 import LanguageModel, Mamba2LM


def make_model(config, *, kernel="auto", device="cpu", seed=0):
    """A model with fresh weights that depend on (config, seed) only: not on the kernel, the device or what ran before.

    kernel: "torch" (Mamba2LM), "mamba_ssm" (its CUDA kernels), or "auto": mamba_ssm where it imports and the device
    is CUDA, else torch. Raises UsageError when mamba_ssm is asked for and cannot be had.
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        model = Mamba2LM(config)
    library = find_mamba_ssm(kernel, device)
    if library is None:
        return model.to(device)
    fast = MambaSSMLM(config, *library, device)
    fast.load_state_dict(model.state_dict())
    return fast


def find_mamba_ssm(kernel, device):
    """mamba-ssm's (MambaLMHeadModel, MambaConfig), None for the torch kernel. Imports nothing unless it is CUDA."""
    if kernel == "torch" or (kernel == "auto" and device.type != "cuda"):
        return None
    if device.type != "cuda":
        raise UsageError(f"--kernel mamba_ssm runs on CUDA only, the device is {device}: use --kernel torch")
    try:
        import causal_conv1d  # noqa: F401 - mamba_ssm calls it without asking whether it is there
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    except ImportError as error:
        if kernel == "auto":
            return None
        said = f"--kernel mamba_ssm: {error}: install mamba_ssm and causal_conv1d, or use --kernel torch"
        raise UsageError(said) from None
    return MambaLMHeadModel, MambaConfig


class MambaSSMLM(LanguageModel):
    """mamba-ssm's `MambaLMHeadModel` with the methods and the parameter names of `Mamba2LM`. CUDA only."""

    def __init__(self, config, model_class, config_class, device):
        super().__init__()
        self.config = config
        ssm_cfg = {name: getattr(config, name) for name in ("d_state", "d_conv", "expand", "headdim")}
        theirs = model_class(
            config_class(
                d_model=config.d_model,
                n_layer=config.n_layer,
                vocab_size=config.vocab_size,
                ssm_cfg=ssm_cfg | {"layer": "Mamba2"},
                rms_norm=True,
                residual_in_fp32=True,
                fused_add_norm=True,
                pad_vocab_size_multiple=config.pad_vocab_size_multiple,
                tie_embeddings=True,
            ),
            device=device,
        )
        self.backbone, self.lm_head = theirs.backbone, theirs.lm_head

    def hidden(self, input_ids):
        """[B, T] token ids -> [B, T, D], after the last norm."""
        return self.backbone(input_ids)


def save_pretrained(model, tokenizer, folder):
    """Writes `model` as transformers' Mamba2ForCausalLM: config.json, model.safetensors, and the tokenizer (or None).

    `AutoModelForCausalLM.from_pretrained(folder)` loads it; only one key is renamed (embedding -> embeddings).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name.replace("backbone.embedding.", "backbone.embeddings."): value.detach().to("cpu").contiguous()
        for name, value in model.named_parameters()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    special = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    c = model.config
    description = {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layer,
        "state_size": c.d_state,
        "conv_kernel": c.d_conv,
        "expand": c.expand,
        "head_dim": c.headdim,
        "n_groups": 1,
        "layer_norm_epsilon": c.norm_eps,
        "vocab_size": c.padded_vocab_size,
        "num_heads": c.n_heads,
        "chunk_size": 64,
        "tie_word_embeddings": True,
        "dtype": "float32",
        **special,
    }
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
