"""The one place that talks to open_clip: configurations, building, running towers block by block, loading and exporting.

Only open_clip's plain VisionTransformer and TextTransformer are supported; every other configuration is refused in one line.
"""

from __future__ import annotations

from typing import Any

from mmlg_scale.towers.block import Block, BlockForm, run_block
from mmlg_scale.towers.bundle import Bundle, ModelSpec, export, export_tower, load_ancestor, load_clip, load_tower
from mmlg_scale.towers.compiled import CompiledBlocks, compile_blocks, require_compiler
from mmlg_scale.towers.config import (
    architecture_names,
    context_length,
    first_difference,
    head_dim,
    image_size,
    model_config,
    num_layers,
    num_patches,
    open_clip_version,
    patch_dropout,
    require_memory,
    vocab_size,
    width,
    with_logit_bias,
    with_sizes,
)
from mmlg_scale.towers.foreign import read_tensors, signed
from mmlg_scale.towers.modules import CLIP, ResidualAttentionBlock
from mmlg_scale.towers.packing import Packing, lengths_of
from mmlg_scale.towers.preprocess import Preprocess
from mmlg_scale.towers.run import (
    INITIAL_LOGIT_SCALE,
    MAX_LOGIT_SCALE,
    block_template,
    build_clip,
    build_meta,
    cut_length,
    empty_stem,
    encode_image_with_hidden,
    encode_text_with_hidden,
    keep_patches,
    logit_multiplier,
    logits_outputs,
    run_image_tower,
    run_text_tower,
)
from mmlg_scale.towers.state import BLOCK_PREFIX, join_state, split_state
from mmlg_scale.towers.tokenizer import (
    TOKENIZER_FILES,
    BytePairTokenizer,
    FileTokenizer,
    Tokenizer,
    clean,
    same_tokenizer,
    tokenizer_from_files,
    told,
)
from mmlg_scale.towers.torchvision_ops import provide_operators
from mmlg_scale.towers.weights import load_weights, say

__all__ = [
    "BLOCK_PREFIX",
    "CLIP",
    "INITIAL_LOGIT_SCALE",
    "MAX_LOGIT_SCALE",
    "TOKENIZER_FILES",
    "Block",
    "BlockForm",
    "Bundle",
    "BytePairTokenizer",
    "CompiledBlocks",
    "FileTokenizer",
    "ModelSpec",
    "Packing",
    "Preprocess",
    "ResidualAttentionBlock",
    "Tokenizer",
    "architecture_names",
    "block_template",
    "build_clip",
    "build_meta",
    "clean",
    "compile_blocks",
    "context_length",
    "cut_length",
    "empty_stem",
    "encode_image_with_hidden",
    "encode_text_with_hidden",
    "export",
    "export_tower",
    "first_difference",
    "head_dim",
    "image_size",
    "join_state",
    "keep_patches",
    "lengths_of",
    "load_ancestor",
    "load_clip",
    "load_tower",
    "load_weights",
    "logit_multiplier",
    "logits_outputs",
    "model_config",
    "num_layers",
    "num_patches",
    "open_clip",
    "open_clip_version",
    "patch_dropout",
    "read_tensors",
    "require_compiler",
    "require_memory",
    "run_block",
    "run_image_tower",
    "run_text_tower",
    "same_tokenizer",
    "say",
    "signed",
    "split_state",
    "tokenizer_from_files",
    "told",
    "vocab_size",
    "width",
    "with_logit_bias",
    "with_sizes",
]


provide_operators()  # whoever imports mmlg_scale first may import open_clip afterwards


def __getattr__(name: str) -> Any:
    """`towers.open_clip` is imported when it is asked for: that takes seconds, and training and evaluating do without it."""
    if name == "open_clip":
        from mmlg_scale.towers.library import open_clip

        return open_clip
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
