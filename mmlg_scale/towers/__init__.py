"""The one place that talks to open_clip: configurations, building, running towers block by block, loading and exporting.

Only open_clip's plain VisionTransformer and TextTransformer are carried; every other configuration is refused in one line.
"""

from mmlg_scale.towers.config import (
    architecture_names,
    bpe_tokenizer,
    context_length,
    head_dim,
    image_size,
    model_config,
    num_layers,
    num_patches,
    open_clip_version,
    patch_dropout,
    width,
    with_sizes,
)
from mmlg_scale.towers.files import BLOCK_PREFIX, export, export_tower, join_state, load_ancestor, load_clip, load_tower, split_state
from mmlg_scale.towers.library import CLIP, open_clip
from mmlg_scale.towers.run import (
    INITIAL_LOGIT_SCALE,
    MAX_LOGIT_SCALE,
    Block,
    Preprocess,
    block_template,
    build_clip,
    build_meta,
    empty_stem,
    encode_image_with_hidden,
    encode_text_with_hidden,
    keep_patches,
    logit_multiplier,
    run_image_tower,
    run_text_tower,
)
from mmlg_scale.towers.weights import load_weights

__all__ = [
    "BLOCK_PREFIX",
    "CLIP",
    "INITIAL_LOGIT_SCALE",
    "MAX_LOGIT_SCALE",
    "Block",
    "Preprocess",
    "architecture_names",
    "block_template",
    "bpe_tokenizer",
    "build_clip",
    "build_meta",
    "context_length",
    "empty_stem",
    "encode_image_with_hidden",
    "encode_text_with_hidden",
    "export",
    "export_tower",
    "head_dim",
    "image_size",
    "join_state",
    "keep_patches",
    "load_ancestor",
    "load_clip",
    "load_tower",
    "load_weights",
    "logit_multiplier",
    "model_config",
    "num_layers",
    "num_patches",
    "open_clip",
    "open_clip_version",
    "patch_dropout",
    "run_image_tower",
    "run_text_tower",
    "split_state",
    "width",
    "with_sizes",
]
