"""The plain CLIP as modules: names, shapes, random start and arithmetic of open_clip's `CLIP`, without importing it.

Importing open_clip takes three seconds of a processor, since it imports torchvision, timm and transformers for models that are not
supported here; each command, rank and loader worker would spend them. What this module promises is tested against open_clip bit for bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmlg_scale.towers.block import NAMES, BlockForm, run_block
from mmlg_scale.towers.compiled import CompiledBlocks
from mmlg_scale.towers.config import fields_of
from mmlg_scale.towers.config import num_patches as count_patches
from mmlg_scale.towers.packing import Packing

Norm = Callable[[int], nn.LayerNorm]
_PLACES = [(name, *name.rsplit(".", 1)) for name in NAMES]


class LayerNorm(nn.LayerNorm):
    """Gives its input's type back, where autocast would give fp32."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(input.dtype)


class Mlp(nn.Module):
    """The tensors of a block's two products."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, inner)
        self.c_proj = nn.Linear(inner, width)


class ResidualAttentionBlock(CompiledBlocks):
    """A transformer block with its norms in front (pre-LN), computed by `block.run_block`: [B, T, d] -> [B, T, d].

    A module, because ZeRO-3 and torch's sharding gather parameters in the forward of the module that owns them. It owns those of its
    submodules, which are never called.
    """

    def __init__(self, fields: Mapping[str, Any], form: BlockForm, norm: Norm) -> None:
        super().__init__()
        width = fields["width"]
        self.form = form
        self.ln_1 = norm(width)
        self.attn = nn.MultiheadAttention(width, form.num_heads, batch_first=True)
        self.ln_2 = norm(width)
        self.mlp = Mlp(width, int(width * fields["mlp_ratio"]))

    def forward(self, hidden: Tensor, rows: Tensor | None = None, packing: Packing | None = None) -> Tensor:
        """See `block.Block`."""
        # Of its own modules, and from where they keep them: to look through all of them takes a twentieth of a small model's step.
        attention, mlp = self.attn, self.mlp
        owners: dict[str, Any] = {"ln_1": self.ln_1, "attn": attention, "attn.out_proj": attention.out_proj, "ln_2": self.ln_2}
        owners |= {"mlp.c_fc": mlp.c_fc, "mlp.c_proj": mlp.c_proj}
        tensors = {whole: owners[owner]._parameters[name] for whole, owner, name in _PLACES}
        return run_block(hidden, tensors, self.form, rows, packing, compiled=self.runs_compiled())


class Transformer(nn.Module):
    """The blocks of one tower."""

    def __init__(self, fields: Mapping[str, Any], form: BlockForm, norm: Norm) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([ResidualAttentionBlock(fields, form, norm) for _ in range(fields["layers"])])

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.resblocks:
            hidden = block(hidden)
        return hidden


class VisionTransformer(nn.Module):
    """The image tower: [B, 3, H, W], normalised -> features [B, D].

    Training chooses the patches itself and passes them on (`run.keep_patches`): a configuration's patch_dropout does nothing here.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        fields, norm = fields_of(config, "image"), _norm(config, "image")
        width, patch, num_patches = fields["width"], fields["patch_size"], count_patches(config)
        self.pool_type, self.final_ln_after_pool = fields["pool_type"], fields["final_ln_after_pool"]
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        scale = width**-0.5
        self.class_embedding = nn.Parameter(_drawn(scale, width))
        if fields["pos_embed_type"] == "learnable":
            self.positional_embedding = nn.Parameter(_drawn(scale, num_patches + 1, width))
        else:
            self.positional_embedding = nn.Parameter(torch.tensor(sine_positions(math.isqrt(num_patches), width)), requires_grad=False)
        self.ln_pre = nn.Identity() if fields["no_ln_pre"] else norm(width)
        self.transformer = Transformer(fields, BlockForm.of(config, "image"), norm)
        self.ln_post = norm(width)
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

    def __init__(self, config: Mapping[str, Any], *, logit_scale: float) -> None:
        super().__init__()
        fields, norm = fields_of(config, "text"), _norm(config, "text")
        width, length = fields["width"], fields["context_length"]
        self.visual = VisionTransformer(config)
        self.context_length, self.text_pool_type = length, fields["pool_type"]
        # open_clip draws in this order, and has the parameters in another; the embedding is drawn again below.
        embedding = nn.Embedding.from_pretrained(_drawn(1.0, fields["vocab_size"], width), freeze=False)
        self.positional_embedding = nn.Parameter(torch.empty(length, width))
        self.transformer = Transformer(fields, BlockForm.of(config, "text"), norm)
        self.token_embedding = embedding
        self.ln_final = norm(width)
        self.text_projection = nn.Parameter(torch.empty(width, config["embed_dim"]))
        bias = config.get("init_logit_bias")
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = None if bias is None else nn.Parameter(torch.empty(1))
        if self.logit_scale.is_meta:
            return
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
        hidden = self.transformer(self.token_embedding(text) + self.positional_embedding[: text.shape[1]])
        features = text_global_pool(self.ln_final(hidden), text) @ self.text_projection
        return F.normalize(features, dim=-1) if normalize else features


def text_global_pool(hidden: Tensor, text: Tensor) -> Tensor:
    """The hidden states [B, T, d] at the end token, which has the highest id of each row of `text`: [B, d]."""
    return hidden[torch.arange(len(hidden), device=hidden.device), text.argmax(dim=-1)]


def _norm(config: Mapping[str, Any], tower: str) -> Norm:
    return functools.partial(LayerNorm, **(fields_of(config, tower)["norm_kwargs"] or {}))
