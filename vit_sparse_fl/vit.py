"""The model: a vision transformer with a linear head on its CLS token, and how its weights are found.

DINO ViT-S/16 (Caron et al. 2021): patch 16, 384 wide, 12 blocks of 6 heads, 21,665,664 parameters, and a head of
38,500 for 100 classes. Modules and names are those of transformers' ViTForImageClassification.
"""

import argparse
import math
import pickle
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from common.cache import one_line
from common.cli import UsageError
from common.hub import hub_reachable, load_pretrained, quiet, read_config, reading
from common.seeding import torch_stream
from vit_sparse_fl.flags import NATIVE

DINO = "facebook/dino-vits16"
MODELS = {"tiny": "tiny", "small": "small", "dino_vits16": DINO}  # every other name is a folder or one of the hub
TINY = dict(hidden_size=96, num_hidden_layers=4, num_attention_heads=3, intermediate_size=384, patch_size=8)
_VIT_S = dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, patch_size=16)
LARGEST = 4096  # pixels a side: the position embedding of more fits into no memory
_WHERE = "give --model FOLDER or --weights FILE, or take --model tiny"


class Classifier(nn.Module):
    """logits = classifier(dropout(CLS token after the last LayerNorm)).

    Its state dict has the keys of transformers' ViTForImageClassification. Dropout stands before the head only.
    Args: config: a ViTConfig; config.num_labels classes, square images of config.image_size pixels.
    """

    def __init__(self, config, dropout=0.1):
        from transformers import ViTModel

        super().__init__()
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        self.config = config
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def features(self, pixels):
        """CLS features [B, D] of normalised pixels [B, 3, S, S]."""
        e = self.vit.embeddings
        x = e.patch_embeddings.projection(pixels).flatten(2).transpose(1, 2)  # [B, T, D]
        x = torch.cat([e.cls_token.expand(len(x), -1, -1), x], dim=1) + e.position_embeddings  # [B, 1 + T, D]
        *blocks, last = self.vit.layers
        for block in blocks:
            x = _block(block, x, x.shape[1])
        # Only the CLS token is read, so the last block computes no other: a fifth of the work of 4 blocks.
        x = _block(last, x, 1)  # [B, 1, D]
        return self.vit.layernorm(x[:, 0])  # [B, D]

    def forward(self, pixels):
        """Logits [B, C] of normalised pixels [B, 3, S, S]."""
        return self.classifier(self.dropout(self.features(pixels)))  # [B, C]


def _block(block, x, tokens):
    """A pre-norm transformer block: its first `tokens` outputs [B, tokens, D] for x [B, T, D]."""
    a = block.attention
    y = block.layernorm_before(x)
    q, k, v = a.q_proj(y[:, :tokens]), a.k_proj(y), a.v_proj(y)
    q, k, v = (t.unflatten(-1, (-1, a.head_dim)).transpose(1, 2) for t in (q, k, v))  # [B, H, tokens or T, D/H]
    y = attention(q, k, v)  # [B, H, tokens, D/H]
    x = x[:, :tokens] + a.o_proj(y.transpose(1, 2).flatten(2))  # [B, tokens, D]
    return x + block.mlp(block.layernorm_after(x))


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v over the last two dimensions."""
    if q.device.type == "cpu":
        # torch's own kernel has a slow bf16 backward there (with it a step takes twice the time at 32 px) and no
        # rule for vmap; in fp32 the two are equally fast.
        return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


def make_model(name_or_path=DINO, weights=None, image_size=224, n_classes=100, dropout=0.1, seed=0, pretrained=True):
    """A Classifier with a pretrained backbone (random for "tiny" and "small" without `weights`) and a new head.

    Args:
        name_or_path: "tiny", "small" (ViT-S/8), "dino_vits16", a folder with a transformers ViT (e.g. a run's
            final/; its backbone is taken, `init_from` takes the head too), or a name on the Hugging Face hub.
        weights: a file in DINO's own layout (dino_deitsmall16_pretrain.pth, or the full checkpoint, of which the
            teacher is taken; .pth read weights-only, or .safetensors) instead of the model's own weights.
        image_size: side in pixels, a multiple of the patch. The position embedding is interpolated to this grid
            once, here, and is from then on a parameter of this size.
        pretrained: False: the architecture of that name with random weights.
        n_classes, dropout, seed: of the head; a new head, and a random backbone, are drawn by key from `seed`.
    Raises: UsageError for an image size that is no multiple of the patch, weights that are missing or that have
        missing or extra keys or other shapes, and a name that neither the disk nor the hub has.
    """

    from transformers import ViTModel

    config, source = _find(MODELS.get(str(name_or_path), str(name_or_path)), weights, pretrained)
    check_image_size(image_size, config.patch_size)
    config.image_size, config.num_labels = image_size, n_classes
    model = Classifier(config, dropout)
    _initialise(model, seed)
    if weights is not None:
        _load(model.vit, read_dino(weights, model.vit), f"the weights {weights}")
    elif source is not None and pretrained:
        beside = ("classifier.", "pooler.", "vit.pooler.")
        tensors = _from_pretrained(ViTModel, source, beside, add_pooling_layer=False)
        _load(model.vit, tensors, f"the weights {source}")
    return model


def check_image_size(image_size, patch):
    """Raises UsageError unless image_size is a positive multiple of the patch; it names the nearest ones."""
    if image_size > LARGEST:
        raise UsageError(f"--image-size {image_size} is above {LARGEST} pixels: lower it")
    if image_size >= patch and image_size % patch == 0:
        return
    low = image_size // patch * patch
    nearest = f"{low} or {low + patch}" if low > 0 else f"{patch}"
    raise UsageError(f"--image-size {image_size} is not a multiple of the patch ({patch}): take {nearest}")


def _find(name, weights, pretrained):
    """(config, where the backbone's own weights are: a folder, a hub name, or None)."""

    from transformers import ViTConfig

    if name in NATIVE:
        shape = TINY if name == "tiny" else _VIT_S | {"patch_size": 8}
        return ViTConfig(image_size=NATIVE[name], layer_norm_eps=1e-6, **shape), None
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _read_config(folder, pretrained and weights is None), folder
    if name == DINO and (weights is not None or not pretrained):
        return ViTConfig(image_size=224, layer_norm_eps=1e-6, **_VIT_S), None
    try:  # what an earlier download left, without asking the network
        return ViTConfig.from_pretrained(name, local_files_only=True), name
    except (OSError, ValueError):
        pass
    reason = "no such folder, and the Hugging Face hub cannot be reached"
    if hub_reachable():
        try:
            return ViTConfig.from_pretrained(name), name
        except (OSError, ValueError) as error:
            reason = one_line(error)
    raise UsageError(f"no model {name!r} ({reason}): {_WHERE}")


def _read_config(folder, weights=True):
    """The folder's ViTConfig. weights: whether its weights are needed."""

    from transformers import ViTConfig

    with quiet(), reading(f"no model could be read from {folder}", _WHERE):
        kind = read_config(folder / "config.json").get("model_type")
        if kind != "vit":
            raise UsageError(f"{folder} holds a model of type {kind}, not vit: {_WHERE}")
        if weights and not list(folder.glob("model*.safetensors")):
            raise UsageError(f"{folder} has no model.safetensors (pickled weights are not read): {_WHERE}")
        config = ViTConfig.from_pretrained(folder, local_files_only=True)
    if type(config.patch_size) is not int or config.num_channels != 3:
        shown = f"patches of {config.patch_size} in {config.num_channels} channels"
        raise UsageError(f"{folder} holds a model with {shown}: square patches in 3 are taken")
    return config


def _from_pretrained(kind, source, beside=(), **options):
    """The tensors of a model in a folder or on the hub; what is there `beside` them, by the names' begin, is left."""
    what = f"no weights could be read from {source}"
    model, info = load_pretrained(kind, source, what, _WHERE, **options)
    extra = [name for name in info["unexpected_keys"] if not name.startswith(tuple(beside))]
    _check_names(info["missing_keys"], extra, f"the weights {source}")
    return model.state_dict()


@torch.no_grad()
def _initialise(model, seed):
    """Draws the weights by key: Xavier-uniform matrices as in the first ViT (Dosovitskiy et al. 2021, code), normal
    with deviation 1/sqrt(fan in) for the patches, 0.02 for CLS token and positions, zero biases, unit norms.

    transformers draws every matrix with deviation 0.02, with which a narrow model learns much more slowly.
    """
    generator = torch_stream(seed, "backbone")
    for name, p in model.vit.named_parameters():
        if name.endswith("bias"):
            p.zero_()
        elif "layernorm" in name:
            p.fill_(1.0)
        elif "projection" in name:
            nn.init.trunc_normal_(p, std=p[0].numel() ** -0.5, generator=generator)
        elif p.ndim == 2:
            nn.init.xavier_uniform_(p, generator=generator)
        else:
            nn.init.trunc_normal_(p, std=0.02, generator=generator)
    new_head(model, seed)


def new_head(model, seed):
    """Draws the head anew, by key: weights truncated normal with deviation 0.02, biases 0 (`--head random`)."""
    nn.init.trunc_normal_(model.classifier.weight, std=0.02, generator=torch_stream(seed, "head"))
    nn.init.zeros_(model.classifier.bias)


def interpolate_positions(positions, grid):
    """Position embeddings [1, 1 + g*g, D] for a grid x grid image, by DINO's formula; the CLS token's stays.

    Bicubic with the scale factor (grid + 0.1) / g, as in DINO's vision_transformer.py, which the weights were
    trained with (its small crops). transformers' interpolate_pos_encoding leaves out the 0.1, which shifts the
    samples by up to a tenth of a cell. Equal grids: unchanged.
    """
    old = math.isqrt(max(0, positions.shape[1] - 1))
    if old == 0 or old * old != positions.shape[1] - 1:
        raise UsageError(f"{positions.shape[1] - 1} position embeddings do not form a square: {_WHERE}")
    if old == grid:
        return positions
    cells = positions[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)  # [1, D, g, g]
    scale = (grid + 0.1) / old
    cells = F.interpolate(cells, scale_factor=(scale, scale), mode="bicubic")  # [1, D, grid, grid]
    return torch.cat([positions[:, :1], cells.flatten(2).transpose(1, 2)], dim=1)  # [1, 1 + grid*grid, D]


# ---- DINO's own checkpoints


# our names -> DINO's; queries, keys and values are the thirds of one matrix there
DINO_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layers.": "blocks.",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layernorm": "norm",
    "attention.q_proj": "attn.qkv",
    "attention.k_proj": "attn.qkv",
    "attention.v_proj": "attn.qkv",
    "attention.o_proj": "attn.proj",
}


def dino_name(name):
    """The name in DINO's (= timm's) layout of a backbone's parameter."""
    for ours, theirs in DINO_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def read_dino(path, vit):
    """The tensors of the backbone `vit`, by its names, from a checkpoint in DINO's (= timm's) layout.

    Nothing is unpickled but tensors, plain containers and argparse.Namespace (the full checkpoint's flags).
    Raises: UsageError for a file that cannot be read, and one with missing or extra keys or other shapes.
    """
    theirs = _dino_tensors(_read_file(Path(path).expanduser()), path)
    names = {ours: dino_name(ours) for ours, _ in vit.named_parameters()}
    _check_names(set(names.values()), theirs, f"the checkpoint {path}")
    width, tensors = vit.config.hidden_size, {}
    for ours, name in names.items():
        tensors[ours] = theirs[name]
        if "attn.qkv" in name:
            if theirs[name].shape[:1] != (3 * width,):
                raise UsageError(f"{name} in {path} is {list(theirs[name].shape)}, not of {3 * width} rows: {_WHERE}")
            third = "qkv".index(ours.split("attention.")[1][0])
            tensors[ours] = theirs[name].chunk(3)[third]
    return tensors


def _read_file(path):
    what = f"no checkpoint could be read from {path}"
    if not path.is_file():
        raise UsageError(f"{what} (no such file): {_WHERE}")
    with reading(what, _WHERE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what else the file may be
        if path.suffix == ".safetensors":
            return load_file(path)
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UsageError(f"{what} (damaged, or it holds more than weights): {_WHERE}") from error


def _dino_tensors(state, path):
    """The flat tensors of a checkpoint: unwrapped from teacher or student, without prefixes and projection head."""
    if isinstance(state, dict):
        for part in ("teacher", "student", "state_dict", "model"):
            if isinstance(state.get(part), dict):
                state = state[part]
                break
    if not isinstance(state, dict) or not all(isinstance(n, str) and _plain(t) for n, t in state.items()):
        raise UsageError(f"{path} is not a checkpoint in DINO's layout (names and tensors): {_WHERE}")
    state = {name.removeprefix("module."): t for name, t in state.items()}
    if any(name.startswith("backbone.") for name in state):
        state = {n.removeprefix("backbone."): t for n, t in state.items() if not n.startswith("head.")}
    return state


def _plain(tensor):
    return isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"


def _check_names(wanted, given, what):
    """Raises: UsageError where the names of the tensors that are `wanted` and `given` differ."""
    missing, extra = sorted({*wanted} - {*given}), sorted({*given} - {*wanted})
    if missing or extra:
        lacks = [f"{label} {_some(names)}" for label, names in (("lacks", missing), ("has besides", extra)) if names]
        raise UsageError(f"{what} {' and '.join(lacks)}: not the weights of this model, {_WHERE}")


def _some(names, shown=4):
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


@torch.no_grad()
def _load(module, tensors, what):
    """Copies tensors into module's parameters of the same names, all of them; shapes are checked first. Positions of
    another grid are interpolated."""
    own = dict(module.named_parameters())
    _check_names(own, tensors, what)
    (key,) = (name for name in own if name.endswith("position_embeddings"))
    if tensors[key].ndim == 3 and tensors[key].shape[2] == own[key].shape[2]:
        grid = math.isqrt(own[key].shape[1] - 1)
        tensors = {**tensors, key: interpolate_positions(tensors[key].float(), grid)}
    other = [f"{n} {list(tensors[n].shape)} not {list(p.shape)}" for n, p in own.items() if tensors[n].shape != p.shape]
    if other:
        raise UsageError(f"{what} have other shapes: {_some(other)}: {_WHERE}")
    odd = [name for name in own if not (tensors[name].is_floating_point() and torch.isfinite(tensors[name]).all())]
    if odd:
        raise UsageError(f"{what} are not finite numbers in {_some(odd)}: {_WHERE}")
    for name, p in own.items():
        p.copy_(tensors[name])


# ---- a run's final weights


def save_pretrained(model, folder):
    """Writes `model` as transformers' ViTForImageClassification: config.json and model.safetensors.

    `AutoModelForImageClassification.from_pretrained(folder)` loads it and gives the same logits.
    """

    from transformers import ViTForImageClassification

    tensors = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    with torch.device("meta"):
        shell = ViTForImageClassification(model.config)
    shell.load_state_dict(tensors, assign=True)
    with quiet():
        shell.save_pretrained(folder)


def init_from(model, folder):
    """Copies the weights of another run (its folder, or its final/) into `model`. Returns notes: a list of lines.

    The head is copied when it has as many classes; else model's own, new one stays, which a note says. A position
    embedding of another grid is interpolated.
    Raises: UsageError for a folder without a ViT, and for another architecture (names or shapes that differ).
    """

    from transformers import ViTForImageClassification

    folder = Path(folder).expanduser()
    if (folder / "final").is_dir():
        folder = folder / "final"
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"--init-from {folder} holds no model: give the folder of a run that is finished, or its final/"
        )
    _read_config(folder)
    tensors, notes = _from_pretrained(ViTForImageClassification, folder, local_files_only=True), []
    own, theirs = model.classifier.weight, tensors["classifier.weight"]
    if own.shape[0] != theirs.shape[0]:
        notes.append(f"{folder} has a head of {theirs.shape[0]} classes, this run {own.shape[0]}: the head starts new")
        tensors |= {f"classifier.{n}": p.detach() for n, p in model.classifier.named_parameters()}
    _load(model, tensors, f"the weights {folder}")
    return notes


def freeze(model, backbone=False, layers=0, head=False):
    """Turns gradients off: `layers` = n: the embeddings and the first n blocks (0: nothing); backbone: all but the
    head (a linear probe); head. All else is turned on.

    Raises: UsageError for more layers than there are, or when nothing is left to train.
    """
    depth = len(model.vit.layers)
    if layers > depth:
        raise UsageError(f"--freeze-layers {layers}, but the model has {depth}: take at most {depth}")
    if backbone and head:
        raise UsageError("backbone and head are both frozen, nothing is left to train: free one of them")
    model.requires_grad_(True)
    frozen = [model.vit] if backbone else []
    if layers:
        frozen += [model.vit.embeddings, *model.vit.layers[:layers]]
    if head:
        frozen.append(model.classifier)
    for module in frozen:
        module.requires_grad_(False)
