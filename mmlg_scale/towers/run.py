"""Building CLIPs and running their towers block by block."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from mmlg_scale.towers.block import Block, take_rows
from mmlg_scale.towers.config import require_memory, with_sizes
from mmlg_scale.towers.modules import CLIP, ResidualAttentionBlock, VisionTransformer
from mmlg_scale.towers.packing import Packing, lengths_of

MAX_LOGIT_SCALE = math.log(100.0)
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
CUT_MULTIPLE = 8
"""Cut captions have a multiple of this many tokens: fast products, and few different shapes."""
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
    return take_rows(tokens_BTd, index_BP)


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
        blocks: called as ``block(x)`` on [B, T, d]; see `block.Block`.
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
    rows = None
    if visual.pool_type == "tok":
        rows = torch.zeros(len(image), 1, dtype=torch.int64, device=image.device)
    hidden, kept = _run_blocks(blocks, hidden, rows, tap, checkpoint)
    pooled, _ = visual._pool(hidden)
    return pooled @ visual.proj, kept


def run_text_tower(
    clip: CLIP,
    blocks: Sequence[Block],
    text: Tensor,
    tap: Sequence[int] = (),
    *,
    packing: Packing | None = None,
    checkpoint: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """The text tower with `blocks` in place of its own; see `run_image_tower`.

    Args:
        text: token ids [B, T]; T is the context length, or less where captions are cut (`cut_length`).
        packing: of these captions: nothing is then computed behind their end tokens, where hidden states are 0.
    """
    assert clip.text_pool_type == "argmax", clip.text_pool_type
    if packing is not None:
        embedded = clip.token_embedding(packing.pack(text)) + F.embedding(packing.positions_N, clip.positional_embedding)
        hidden, kept = _run_blocks(blocks, embedded, packing.ends_B, tap, checkpoint, packing)
        features = clip.ln_final(hidden) @ clip.text_projection
        return features.index_select(0, packing.ranks_B), [packing.unpack(state) for state in kept]
    rows = text.argmax(dim=-1, keepdim=True)
    embedded = clip.token_embedding(text) + clip.positional_embedding[: text.shape[1]]
    hidden, kept = _run_blocks(blocks, embedded, rows, tap, checkpoint)
    return clip.ln_final(hidden[:, 0]) @ clip.text_projection, kept


def _run_blocks(
    blocks: Sequence[Block],
    hidden: Tensor,
    rows: Tensor | None,
    tap: Sequence[int],
    checkpoint: bool,
    packing: Packing | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The hidden state after the last block, with `rows` [B, 1] only at these positions [B, 1, d]; and those after the tapped blocks.

    The last block computes no more than `rows`, unless its hidden state is tapped.
    """
    states: dict[int, Tensor] = {}
    for number, block in enumerate(blocks, start=1):
        asked = rows if number == len(blocks) and number not in tap else None
        if checkpoint:
            # A block has no randomness of its own, so there is no state to bring back.
            hidden = torch_checkpoint(block, hidden, asked, packing, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = block(hidden, asked, packing)
        states[number] = hidden
    if rows is not None and (not blocks or len(blocks) in tap):
        hidden = take_rows(hidden, rows)
    return hidden, [states[number] for number in tap]


def cut_length(text_BT: Tensor) -> int:
    """Tokens that a text tower needs of these captions: up to the last end token, rounded up to 8, at most T.

    Exact, since the towers that are supported are causal and pooled at the end token, the highest id: what follows it changes nothing.
    The tokens are on the CPU: to read them from a device would be to wait for it.
    """
    longest = int(lengths_of(text_BT).numpy().max())
    return min(text_BT.shape[1], -(-longest // CUT_MULTIPLE) * CUT_MULTIPLE)


def encode_image_with_hidden(
    clip: CLIP, image: Tensor, tap: Sequence[int] = (), *, patches: Tensor | None = None, checkpoint: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """`run_image_tower` with the model's own blocks."""
    return run_image_tower(clip.visual, list(clip.visual.transformer.resblocks), image, tap, patches=patches, checkpoint=checkpoint)


def encode_text_with_hidden(
    clip: CLIP, text: Tensor, tap: Sequence[int] = (), *, packing: Packing | None = None, checkpoint: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """`run_text_tower` with the model's own blocks."""
    return run_text_tower(clip, list(clip.transformer.resblocks), text, tap, packing=packing, checkpoint=checkpoint)


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
