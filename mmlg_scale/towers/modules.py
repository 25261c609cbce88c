"""The plain CLIP as modules: names, shapes, random start and arithmetic of open_clip's `CLIP`, without importing it.

Importing open_clip takes three seconds of a processor, since it imports torchvision, timm and transformers for models that are not
supported here; each command, rank and loader worker would spend them. What this module promises is tested against open_clip bit for bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmlg_scale.towers.config import fields_of
from mmlg_scale.towers.config import num_patches as count_patches


class Parts(NamedTuple):
    """How a tower's norms and activations are made."""

    norm: Callable[[int], nn.LayerNorm]
    activation: Callable[[], nn.Module]


class LayerNorm(nn.LayerNorm):
    """Gives its input's type back, where autocast would give fp32."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(input.dtype)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), which OpenAI's weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Mlp(nn.Module):
    """Two products with the activation between them."""

    def __init__(self, width: int, inner: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, inner)
        self.gelu = activation()
        self.c_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class ResidualAttentionBlock(nn.Module):
    """A transformer block with its norms in front (pre-LN): [B, T, d] -> [B, T, d]."""

    def __init__(self, fields: Mapping[str, Any], heads: int, parts: Parts) -> None:
        super().__init__()
        width = fields["width"]
        self.ln_1 = parts.norm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ls_1, self.ls_2 = nn.Identity(), nn.Identity()  # LayerScale in open_clip, which no supported configuration has
        self.ln_2 = parts.norm(width)
        self.mlp = Mlp(width, int(width * fields["mlp_ratio"]), parts.activation)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        normed = self.ln_1(x)
        mask = None if attn_mask is None else attn_mask.to(x.dtype)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """The blocks of one tower."""

    def __init__(self, fields: Mapping[str, Any], heads: int, parts: Parts) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([ResidualAttentionBlock(fields, heads, parts) for _ in range(fields["layers"])])

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, attn_mask=attn_mask)
        return x


class VisionTransformer(nn.Module):
    """The image tower: [B, 3, H, W], normalised -> features [B, D].

    Training chooses the patches itself and passes them on (`run.keep_patches`): a configuration's patch_dropout does nothing here.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        fields, parts = fields_of(config, "image"), _parts(config, "image")
        width, patch, num_patches = fields["width"], fields["patch_size"], count_patches(config)
        self.pool_type, self.final_ln_after_pool = fields["pool_type"], fields["final_ln_after_pool"]
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        scale = width**-0.5
        self.class_embedding = nn.Parameter(_drawn(scale, width))
        if fields["pos_embed_type"] == "learnable":
            self.positional_embedding = nn.Parameter(_drawn(scale, num_patches + 1, width))
        else:
            self.positional_embedding = nn.Parameter(torch.tensor(sine_positions(math.isqrt(num_patches), width)), requires_grad=False)
        self.ln_pre = nn.Identity() if fields["no_ln_pre"] else parts.norm(width)
        self.transformer = Transformer(fields, width // fields["head_width"], parts)
        self.ln_post = parts.norm(width)
        self.proj = nn.Parameter(_drawn(scale, width, config["embed_dim"]))

    def _embeds(self, image: Tensor) -> Tensor:
        """Patches behind the class token, with their positions: [B, 1 + P, d]."""
        patches = self.conv1(image).flatten(2).transpose(1, 2)
        classes = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        return self.ln_pre(torch.cat([classes, patches], dim=1) + self.positional_embedding.to(patches.dtype))

    def _pool(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What the tower says of an image, [B, d], and its patches."""
        if not self.final_ln_after_pool:
            hidden = self.ln_post(hidden)
        patches = hidden[:, 1:]
        pooled = patches.mean(dim=1) if self.pool_type == "avg" else hidden[:, 0]
        return self.ln_post(pooled) if self.final_ln_after_pool else pooled, patches

    def forward(self, image: Tensor) -> Tensor:
        pooled, _ = self._pool(self.transformer(self._embeds(image)))
        return pooled @ self.proj


def _drawn(scale: float, *shape: int) -> Tensor:
    """Normal numbers; on the meta device none, for which torch would import its compiler: two seconds."""
    drawn = torch.empty(shape)
    return drawn if drawn.is_meta else drawn.normal_().mul_(scale)


def sine_positions(grid: int, width: int) -> np.ndarray:
    """Fixed positions of a class token (zeros) and grid x grid patches: float32 [1 + grid^2, width].

    The first half of the channels is of a patch's column, the second of its row, each half sines and then cosines of falling frequency
    (Vaswani et al. 2017, in two dimensions as in MAE, He et al. 2021).
    """
    frequency = 1.0 / 10_000 ** (np.arange(width // 4) / (width / 4))
    angle_gf = np.outer(np.arange(grid), frequency)
    one_gd = np.concatenate([np.sin(angle_gf), np.cos(angle_gf)], axis=1)
    column, row = np.broadcast_to(one_gd, (grid, grid, width // 2)), np.broadcast_to(one_gd[:, None], (grid, grid, width // 2))
    patches = np.concatenate([column, row], axis=2).reshape(grid**2, width)
    return np.concatenate([np.zeros((1, width)), patches]).astype(np.float32)


class CLIP(nn.Module):
    """Both towers; the text tower's tensors lie directly in it. The text tower is causal, and pooled where the highest id is."""

    attn_mask: Tensor

    def __init__(self, config: Mapping[str, Any], *, logit_scale: float) -> None:
        super().__init__()
        fields, parts = fields_of(config, "text"), _parts(config, "text")
        width, length = fields["width"], fields["context_length"]
        self.visual = VisionTransformer(config)
        self.context_length, self.text_pool_type = length, fields["pool_type"]
        # open_clip draws in this order, and has the parameters in another; the embedding is drawn again below.
        embedding = nn.Embedding.from_pretrained(_drawn(1.0, fields["vocab_size"], width), freeze=False)
        self.positional_embedding = nn.Parameter(torch.empty(length, width))
        self.transformer = Transformer(fields, fields["heads"], parts)
        self.token_embedding = embedding
        self.ln_final = parts.norm(width)
        self.text_projection = nn.Parameter(torch.empty(width, config["embed_dim"]))
        self.register_buffer("attn_mask", torch.empty(length, length), persistent=False)
        bias = config.get("init_logit_bias")
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = None if bias is None else nn.Parameter(torch.empty(1))
        if self.attn_mask.is_meta:
            return
        self.attn_mask.fill_(float("-inf")).triu_(1)
        nn.init.constant_(self.logit_scale, logit_scale)
        if bias is not None and self.logit_bias is not None:
            nn.init.constant_(self.logit_bias, bias)
        self._draw_text(width, fields["layers"])

    def _draw_text(self, width: int, layers: int) -> None:
        """The text tower's random start, as OpenAI's code drew it."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.transformer.resblocks:
            assert isinstance(block, ResidualAttentionBlock)
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Features [B, D] of images [B, 3, H, W]."""
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Features [B, D] of token ids [B, T]."""
        hidden = self.transformer(self.token_embedding(text) + self.positional_embedding, attn_mask=self.attn_mask)
        features = text_global_pool(self.ln_final(hidden), text) @ self.text_projection
        return F.normalize(features, dim=-1) if normalize else features


def text_global_pool(hidden: Tensor, text: Tensor) -> Tensor:
    """The hidden states [B, T, d] at the end token, which has the highest id of each row of `text`: [B, d]."""
    return hidden[torch.arange(len(hidden), device=hidden.device), text.argmax(dim=-1)]


def _parts(config: Mapping[str, Any], tower: str) -> Parts:
    fields = fields_of(config, tower)
    activation: type[nn.Module] = QuickGELU if config.get("quick_gelu", False) else nn.GELU
    norm = functools.partial(LayerNorm, **(fields["norm_kwargs"] or {}))
    return Parts(norm, functools.partial(activation, **(fields["act_kwargs"] or {})))
