"""The model: a vision transformer with a linear head on its CLS token; how its weights are found, the head fitted.

DINO ViT-S/16 (Caron et al. 2021): patch 16, 384 wide, 12 blocks of 6 heads, 21,665,664 parameters, and a head of
38,500 for 100 classes. Modules and names are those of transformers' ViTForImageClassification.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common.cli import UsageError
from common.hub import hub_reachable, load_pretrained, quiet, reading
from common.seeding import torch_stream

DINO = "facebook/dino-vits16"
TINY = dict(hidden_size=96, num_hidden_layers=4, num_attention_heads=3, intermediate_size=384, patch_size=8)
VIT_S = dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, patch_size=16)
PENALTIES = tuple(10.0**e for e in range(-6, 2))  # ridge: times the mean eigenvalue of the features' scatter matrix
_WHERE = "give --model FOLDER, or take --model tiny"


class Classifier(nn.Module):
    """logits = classifier(dropout(CLS token after the last LayerNorm)), with the keys of ViTForImageClassification.

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


def make_model(name_or_path="dino_vits16", image_size=224, n_classes=100, dropout=0.1, seed=0, pretrained=True):
    """A Classifier with a pretrained backbone (random for "tiny") and a new head.

    Args:
        name_or_path: "tiny", "dino_vits16", a folder with a transformers ViT (e.g. a run's
            final/; its backbone is taken, `init_from` takes the head too), or a name on the Hugging Face hub.
        image_size: side in pixels, a multiple of the patch: the position embedding is interpolated to it once, here.
        pretrained: False: the architecture of that name with random weights.
        n_classes, dropout, seed: of the head; a new head, and a random backbone, are drawn by key from `seed`.
    Raises: UsageError.
    """
    from transformers import ViTModel

    config, source = _find(str(name_or_path), pretrained)
    patch = config.patch_size
    if image_size % patch or image_size < patch:
        low = image_size // patch * patch
        nearest = f"{low} or {low + patch}" if low > 0 else f"{patch}"
        raise UsageError(f"--image-size {image_size} is not a multiple of the patch ({patch}): take {nearest}")
    config.image_size, config.num_labels = image_size, n_classes
    model = Classifier(config, dropout)
    _initialise(model, seed)
    if source is not None and pretrained:
        _load(model.vit, _from_pretrained(ViTModel, source, add_pooling_layer=False), f"the weights {source}")
    return model


def _find(name, with_weights):
    """(config, where the backbone's own weights are: a folder, a hub name, or None)."""
    from transformers import ViTConfig

    if name == "tiny" or name == "dino_vits16" and not with_weights:
        return ViTConfig(layer_norm_eps=1e-6, **(TINY if name == "tiny" else VIT_S)), None
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _read_config(folder), folder
    name = DINO if name == "dino_vits16" else name
    with quiet(), reading(f"no model {name!r}: no such folder, and the hub does not give it", _WHERE):
        return ViTConfig.from_pretrained(name, local_files_only=not hub_reachable()), name


def _read_config(folder):
    """The ViTConfig of a folder that has the weights too."""
    from transformers import ViTConfig

    with reading(f"no model could be read from {folder}", _WHERE):
        if not list(folder.glob("model*.safetensors")):
            raise UsageError(f"{folder} has no model.safetensors (pickled weights are not read): {_WHERE}")
        return ViTConfig.from_pretrained(folder, local_files_only=True)


def _from_pretrained(kind, source, **options):
    """{name: tensor} of a model in a folder or on the hub; what is there besides (another head) is left."""
    model, info = load_pretrained(kind, source, f"no weights could be read from {source}", _WHERE, **options)
    if missing := sorted(info["missing_keys"]):
        raise UsageError(f"the weights {source} lack {missing[0]} and {len(missing) - 1} more: {_WHERE}")
    return model.state_dict()


@torch.no_grad()
def _initialise(model, seed):
    """Draws the weights by key: Xavier-uniform matrices as in the first ViT (Dosovitskiy et al. 2021, code), normal
    with deviation 1/sqrt(fan in) for the patches, 0.02 for CLS token and positions, zero biases, unit norms."""
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


def sums_bytes(head):
    """Bytes that a client would send for `ridge_head`, which needs sums over images only: X'X, X'Y, means, in fp64."""
    size, classes = head.in_features, head.out_features
    return 8 * (size * (size + 1) // 2 + (size + 1) * (classes + 1))


@torch.no_grad()
def ridge_head(model, features, labels, validation):
    """Fits `model.classifier` to features [n, D] and labels [n] in closed form, in fp64; returns (l2, scale).

    W, b = argmin sum_i ||onehot(y_i) - W x_i - b||^2 + l2 ||W||^2, the intercept b not penalised:
        W = Y'X (X'X + l2 I)^-1 with X and Y centred, b = mean(y) - W mean(x)
    The outputs approximate probabilities in 0..1, so their softmax over C classes would be nearly uniform and the
    cross-entropy's gradients far too large for a fitted head. So W and b are multiplied by one scale (an inverse
    temperature) that minimises the mean NLL of `validation`, (features, labels); it changes no prediction.
    l2: of `PENALTIES` times the mean eigenvalue of X'X the one with the best validation accuracy, the smallest of
    equals, in the units of sklearn's Ridge(alpha=l2).
    """
    held, truth = validation[0].double(), validation[1]
    x = features.double()
    y = F.one_hot(labels, model.classifier.out_features).double()  # [n, C]
    mean_x, mean_y = x.mean(0), y.mean(0)
    x = x - mean_x
    # One eigendecomposition serves every l2.
    values, vectors = torch.linalg.eigh(x.T @ x)
    values = values.clamp_min(0.0)
    cross = vectors.T @ (x.T @ (y - mean_y))  # [D, C]

    def fit(penalty):
        weight = (vectors @ (cross / (values + penalty)[:, None])).T  # [C, D]
        return weight, mean_y - weight @ mean_x

    def outputs(penalty):
        weight, bias = fit(penalty)
        return held @ weight.T + bias  # [m, C]

    unit = max(values.mean().item(), torch.finfo(torch.float64).tiny)
    l2 = max((unit * g for g in PENALTIES), key=lambda p: (outputs(p).argmax(1) == truth).sum().item())
    scale = _best_scale(outputs(l2), truth)
    weight, bias = fit(l2)
    model.classifier.weight.copy_(scale * weight)
    model.classifier.bias.copy_(scale * bias)
    return l2, scale


def _best_scale(z, labels, low=1e-2, high=1e4, halvings=40):
    """argmin over s in [low, high] of the mean NLL of softmax(s z), z [n, C]: bisection of its derivative.

    The NLL is convex in s; d NLL / d s = mean(sum_c p_c z_c - z_y).
    """
    picked = z.gather(1, labels[:, None]).squeeze(1)  # [n]
    for _ in range(halvings):
        s = (low * high) ** 0.5
        slope = ((torch.softmax(s * z, dim=1) * z).sum(1) - picked).mean()
        low, high = (low, s) if slope > 0 else (s, high)
    return (low * high) ** 0.5


def interpolate_positions(positions, grid):
    """Position embeddings [1, 1 + g*g, D] for a grid x grid image, by DINO's formula; the CLS token's stays.

    Bicubic with the scale factor (grid + 0.1) / g, as in DINO's vision_transformer.py; transformers leaves out the 0.1,
    which shifts the samples by up to a tenth of a cell.
    """
    old = math.isqrt(positions.shape[1] - 1)
    if old == grid:
        return positions
    cells = positions[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)  # [1, D, g, g]
    scale = (grid + 0.1) / old
    cells = F.interpolate(cells, scale_factor=(scale, scale), mode="bicubic")  # [1, D, grid, grid]
    return torch.cat([positions[:, :1], cells.flatten(2).transpose(1, 2)], dim=1)  # [1, 1 + grid*grid, D]


def _load(module, tensors, what):
    """Copies {name: tensor} into the module's parameters, all of them; positions of another grid are interpolated.

    Raises: UsageError for missing or extra names and other shapes.
    """
    for name, p in module.named_parameters():
        if name.endswith("position_embeddings"):
            tensors = {**tensors, name: interpolate_positions(tensors[name].float(), math.isqrt(p.shape[1] - 1))}
    own, given = ({name: t.shape for name, t in of.items()} for of in (module.state_dict(), tensors))
    if odd := sorted(name for name in own | given if own.get(name) != given.get(name)):
        raise UsageError(f"{what} are not of this model: {odd[0]} and {len(odd) - 1} more differ: {_WHERE}")
    module.load_state_dict(tensors)


def save_pretrained(model, folder):
    """Writes `model` as transformers' ViTForImageClassification: config.json and model.safetensors."""
    from transformers import ViTForImageClassification

    shell = ViTForImageClassification(model.config)
    shell.load_state_dict(model.state_dict())
    with quiet():
        shell.save_pretrained(folder)


def init_from(model, folder):
    """Copies the weights of another run (its folder, or its final/) into `model`. Returns notes: a list of lines.

    The head is copied when it has as many classes; else model's own, new one stays, which a note says.
    Raises: UsageError for a folder without a ViT, and for another architecture.
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
    own, theirs = len(model.classifier.weight), len(tensors["classifier.weight"])
    if own != theirs:
        notes.append(f"{folder} has a head of {theirs} classes, this run {own}: the head starts new")
        tensors |= {f"classifier.{n}": p.detach() for n, p in model.classifier.named_parameters()}
    _load(model, tensors, f"the weights {folder}")
    return notes


def freeze(model, backbone=False, layers=0, head=False):
    """Turns gradients off: layers = n > 0: the embeddings and the first n blocks; backbone: all but the head; head.

    Raises: UsageError for more layers than there are, or when nothing is left to train.
    """
    depth = len(model.vit.layers)
    if layers > depth:
        raise UsageError(f"--freeze-layers {layers}, but the model has {depth}: take at most {depth}")
    if backbone and head:
        raise UsageError("backbone and head are both frozen, nothing is left to train: free one of them")
    model.requires_grad_(True)
    model.vit.requires_grad_(not backbone)
    model.classifier.requires_grad_(not head)
    if layers:
        for module in (model.vit.embeddings, *model.vit.layers[:layers]):
            module.requires_grad_(False)
