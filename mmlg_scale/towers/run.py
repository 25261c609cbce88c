"""Building CLIPs and running their towers block by block."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from mmlg_scale.towers.config import require_memory, with_sizes
from mmlg_scale.towers.modules import CLIP, ResidualAttentionBlock, VisionTransformer, text_global_pool

Block = Callable[..., Tensor]
MAX_LOGIT_SCALE = math.log(100.0)
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
SIGLIP_LOGIT_SCALE = math.log(10.0)
"""With a logit bias of -10: Zhai et al. 2023, section 3.2."""


def build_clip(config: Mapping[str, Any], *, seed: int) -> CLIP:
    """A CLIP with open_clip's names and its own initialisation under `seed`.

    Logit scale and bias have one element instead of none: DeepSpeed cannot broadcast 0-dim parameters. `export` writes them 0-dim again.

    Raises:
        UserError: the model is larger than this machine's memory.
    """
    config = json.loads(json.dumps(config))
    if torch.get_default_device().type != "meta":
        require_memory(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = CLIP(config, logit_scale=INITIAL_LOGIT_SCALE if config.get("init_logit_bias") is None else SIGLIP_LOGIT_SCALE)
    return clip


def logit_multiplier(logit_scale: Tensor) -> Tensor:
    """exp of the logit scale, bounded by 100 as in CLIP, with the gradient of the unbounded value.

    A plain clamp has no gradient above the bound, so a scale that went over it could never come back.
    """
    bounded = logit_scale + (logit_scale.clamp(max=MAX_LOGIT_SCALE) - logit_scale).detach()
    return bounded.exp()


def logits_outputs(clip: CLIP) -> dict[str, Any]:
    """What a forward pass gives for the logits: `logit_scale`, the multiplier, and `logit_bias` where the model has one (SigLIP)."""
    outputs: dict[str, Any] = {"logit_scale": logit_multiplier(clip.logit_scale)}
    if clip.logit_bias is not None:
        outputs["logit_bias"] = clip.logit_bias * 1.0  # an output of its own: micro-batches carry its gradient
    return outputs


def keep_patches(tokens_BTd: Tensor, patches_BP: Tensor) -> Tensor:
    """The class token and the patches at positions `patches_BP` (counted from 0): [B, 1 + P, d]."""
    index_BP = torch.cat([torch.zeros_like(patches_BP[:, :1]), patches_BP + 1], dim=1)
    return tokens_BTd.gather(1, index_BP[..., None].expand(-1, -1, tokens_BTd.shape[-1]))


def run_image_tower(
    visual: VisionTransformer,
    blocks: Sequence[Block],
    image: Tensor,
    tap: Sequence[int] = (),
    *,
    patches: Tensor | None = None,
    checkpoint: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """The image tower with `blocks` in place of its own.

    Args:
        visual: supplies stem, pooling and projection.
        blocks: called as ``block(x, attn_mask=...)`` on [B, T, d].
        image: [B, 3, H, W], normalised.
        tap: layers, counted from 1, after which the hidden state is kept.
        patches: [B, P'] positions of the patches that stay (patch dropout); None: all.
        checkpoint: keep only the inputs of each block for the backward pass, which computes the block again.

    Returns:
        Features [B, D], not normalised, and the hidden states in the order of `tap`.
    """
    hidden = visual._embeds(image)
    if patches is not None:
        hidden = keep_patches(hidden, patches)  # the norm in front of the blocks works token by token: dropping after it is the same
    hidden, kept = _run_blocks(blocks, hidden, None, tap, checkpoint)
    pooled, _ = visual._pool(hidden)
    return pooled @ visual.proj, kept


def run_text_tower(
    clip: CLIP, blocks: Sequence[Block], text: Tensor, tap: Sequence[int] = (), *, checkpoint: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """The text tower with `blocks` in place of its own; see `run_image_tower`. `text` holds token ids [B, T]."""
    hidden, kept = _run_blocks(blocks, clip.token_embedding(text) + clip.positional_embedding, clip.attn_mask, tap, checkpoint)
    pooled = text_global_pool(clip.ln_final(hidden), text)
    return pooled @ clip.text_projection, kept


def _run_blocks(
    blocks: Sequence[Block], hidden: Tensor, mask: Tensor | None, tap: Sequence[int], checkpoint: bool
) -> tuple[Tensor, list[Tensor]]:
    states: dict[int, Tensor] = {}
    for number, block in enumerate(blocks, start=1):
        if checkpoint:
            # A block has no randomness of its own, so there is no state to bring back.
            hidden = torch_checkpoint(block, hidden, attn_mask=mask, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = block(hidden, attn_mask=mask)
        states[number] = hidden
    return hidden, [states[number] for number in tap]


def encode_image_with_hidden(
    clip: CLIP, image: Tensor, tap: Sequence[int] = (), *, patches: Tensor | None = None, checkpoint: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """`run_image_tower` with the model's own blocks."""
    return run_image_tower(clip.visual, list(clip.visual.transformer.resblocks), image, tap, patches=patches, checkpoint=checkpoint)


def encode_text_with_hidden(clip: CLIP, text: Tensor, tap: Sequence[int] = (), *, checkpoint: bool = False) -> tuple[Tensor, list[Tensor]]:
    """`run_text_tower` with the model's own blocks."""
    return run_text_tower(clip, list(clip.transformer.resblocks), text, tap, checkpoint=checkpoint)


def block_template(config: Mapping[str, Any], tower: str) -> ResidualAttentionBlock:
    """One block of the tower ("image" or "text") on the meta device: its structure, to be called with other tensors."""
    with torch.device("meta"):
        clip = build_meta(with_sizes(config, image_layers=1, text_layers=1))
    block = clip.visual.transformer.resblocks[0] if tower == "image" else clip.transformer.resblocks[0]
    assert isinstance(block, ResidualAttentionBlock)
    return block


def build_meta(config: Mapping[str, Any]) -> CLIP:
    """`build_clip` on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return build_clip(config, seed=0)


def empty_stem(config: Mapping[str, Any]) -> CLIP:
    """A CLIP without blocks: the stems that the auxiliary model owns beside the learngene's blocks."""
    # One layer, then none: open_clip's initialisation divides by the depth.
    clip = build_clip(with_sizes(config, image_layers=1, text_layers=1), seed=0)
    clip.visual.transformer.resblocks = nn.ModuleList()
    clip.transformer.resblocks = nn.ModuleList()
    return clip
