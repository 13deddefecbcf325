"""How a model is made from its sizes, by which kernel it computes, and how it is saved for other libraries."""

import importlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from common.cli import UsageError
from common.hub import read_config, reading
from common.vector import is_finite
from mamba_fl.mamba2 import LanguageModel, Mamba2Config, Mamba2LM

TRANSFORMERS_NAMES = {  # of the fields of Mamba2Config
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "headdim": "head_dim",
    "ngroups": "n_groups",
    "norm_eps": "layer_norm_epsilon",
}


def make_model(config, *, kernel="auto", device="cpu", seed=0):
    """A model with fresh weights that depend on (config, seed) only: not on the kernel, the device or what ran before.

    kernel: "torch" (Mamba2LM), "mamba_ssm" (its CUDA kernels), or "auto": mamba_ssm where it imports and the device
    is CUDA, else torch. Raises UsageError when mamba_ssm is asked for and cannot be had.
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[]), reading("a model of these sizes cannot be made", "lower them"):
        torch.random.default_generator.manual_seed(seed)
        model = Mamba2LM(config)
    library = find_mamba_ssm(kernel, device)
    if library is None:
        return model.to(device)
    fast = MambaSSMLM(config, library, device)
    fast.load_state_dict(model.state_dict())
    return fast


class MambaSSMLM(LanguageModel):
    """mamba-ssm's `MambaLMHeadModel` with the methods and the parameter names of `Mamba2LM`. CUDA only.

    library: (the module mamba_ssm.models.mixer_seq_simple, the class MambaConfig, whether causal_conv1d imports).
    """

    def __init__(self, config, library, device):
        super().__init__()
        self.config = config
        mixer_seq_simple, config_class, has_causal_conv1d = library
        ssm_cfg = {name: getattr(config, name) for name in ("d_state", "d_conv", "expand", "headdim", "ngroups")}
        ssm_cfg |= {"layer": "Mamba2", "chunk_size": config.chunk_size or 256}
        if not has_causal_conv1d:
            ssm_cfg["use_mem_eff_path"] = False  # that path calls causal_conv1d without asking whether it is there
        theirs = mixer_seq_simple.MambaLMHeadModel(
            config_class(
                d_model=config.d_model,
                n_layer=config.n_layer,
                vocab_size=config.vocab_size,
                ssm_cfg=ssm_cfg,
                rms_norm=True,
                residual_in_fp32=True,
                fused_add_norm=True,
                pad_vocab_size_multiple=config.pad_vocab_size_multiple,
                tie_embeddings=True,
            ),
            device=device,
        )
        self.backbone, self.lm_head = theirs.backbone, theirs.lm_head
        self._theirs = [theirs]  # in a list, so that its parameters are not registered a second time

    def hidden(self, input_ids):
        """[B, T] token ids -> [B, T, D], after the last norm."""
        return self.backbone(input_ids)

    def generate(self, input_ids, max_new_tokens):
        """Greedy continuation with mamba-ssm's own cache: [B, T] -> [B, T + max_new_tokens]."""
        length = input_ids.shape[1] + max_new_tokens
        return self._theirs[0].generate(input_ids, max_length=length, top_k=1, vocab_size=self.vocab_size)


def find_mamba_ssm(kernel, device):
    """What `MambaSSMLM` needs of mamba-ssm, or None for the torch kernel. Imports nothing unless the device is CUDA."""
    if kernel == "torch" or (kernel == "auto" and device.type != "cuda"):
        return None
    if device.type != "cuda":
        raise UsageError(f"--kernel mamba_ssm runs on CUDA only, the device is {device}: use --kernel torch")
    try:
        simple = importlib.import_module("mamba_ssm.models.mixer_seq_simple")
        config_class = importlib.import_module("mamba_ssm.models.config_mamba").MambaConfig
    except ImportError as error:
        if kernel == "auto":
            return None
        reason = str(error).splitlines()[0]
        raise UsageError(f"mamba_ssm does not import ({reason}): install it, or use --kernel torch") from None
    try:
        importlib.import_module("causal_conv1d")
    except ImportError:
        return simple, config_class, False
    return simple, config_class, True


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
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        special = {name: getattr(tokenizer, name) for name in special}
    c = model.config
    description = {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        **{theirs: getattr(c, ours) for ours, theirs in TRANSFORMERS_NAMES.items()},
        "vocab_size": c.padded_vocab_size,
        "num_heads": c.n_heads,
        "chunk_size": c.chunk_size or 64,
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": True,
        "tie_word_embeddings": True,
        "dtype": str(tensors["backbone.norm_f.weight"].dtype).removeprefix("torch."),
        **special,
        "mamba_ssm": c.to_dict(),
    }
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load_pretrained(folder, *, kernel="auto", device="cpu"):
    """The model that `save_pretrained` wrote, or any tied Mamba2ForCausalLM whose weights are one safetensors file.

    Raises UsageError when the folder holds no such model.
    """
    config, tensors = read_pretrained(folder)
    model = make_model(config, kernel=kernel, device=device)
    model.load_state_dict(tensors)
    return model


def read_pretrained(folder):
    """(Mamba2Config, {name: tensor}) of the model that `load_pretrained` loads. Raises UsageError as it does."""
    folder = Path(folder)
    with reading(f"no model could be read from {folder}", "give a run's final/"):
        description = read_config(folder / "config.json")
        kind = description.get("model_type")
        if kind != "mamba2":
            raise UsageError(f"{folder} holds a model of type {kind}: give a folder with a mamba2 model, as final/")
        tensors = load_file(folder / "model.safetensors")
    tensors = {name.replace("backbone.embeddings.", "backbone.embedding."): value for name, value in tensors.items()}
    embedding = tensors.get("backbone.embedding.weight")
    if embedding is not None and not torch.equal(tensors.setdefault("lm_head.weight", embedding), embedding):
        raise UsageError(f"{folder} has a head of its own: only models whose head is tied to the embedding can be read")
    with reading(f"{folder}/config.json names no mamba2 model", "give a folder that was saved whole"):
        sizes = {ours: description[theirs] for ours, theirs in TRANSFORMERS_NAMES.items()}
        sizes |= {"vocab_size": description["vocab_size"], "pad_vocab_size_multiple": 1}
        config = Mamba2Config(**sizes | description.get("mamba_ssm", {}))
        many = config.n_layer > len(tensors)  # which would take for ever to build
        with torch.device("meta"):
            wanted = {} if many else {name: p.shape for name, p in Mamba2LM(config).state_dict().items()}
    if wanted != {name: t.shape for name, t in tensors.items()}:
        raise UsageError(f"the weights in {folder} do not fit its config.json: give a folder that was saved whole")
    if not is_finite(*tensors.values()):
        raise UsageError(f"the weights in {folder} are not finite: give the folder of another run")
    return config, tensors
