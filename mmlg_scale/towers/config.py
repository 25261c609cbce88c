"""open_clip's model configurations: which are supported, and what they say of sizes."""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmlg_scale.bounds import (
    MAX_CONTEXT,
    MAX_IMAGE_SIZE,
    MAX_LAYERS,
    MAX_PARAMETERS,
    MAX_POSITION_NUMBERS,
    MAX_VOCABULARY,
    MAX_WIDTH,
)
from mmlg_scale.errors import UserError
from mmlg_scale.reading import shown

JOINT = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_bias")
_PLAIN = "Supported: plain open_clip ViT + text transformer configurations."
# Whole numbers of a tower's configuration, with their bounds.
_WHOLE = {
    "vision_cfg": {
        "layers": (1, MAX_LAYERS),
        "width": (1, MAX_WIDTH),
        "head_width": (1, MAX_WIDTH),
        "patch_size": (1, MAX_IMAGE_SIZE),
        "image_size": (1, MAX_IMAGE_SIZE),
    },
    "text_cfg": {
        "layers": (1, MAX_LAYERS),
        "width": (1, MAX_WIDTH),
        "heads": (1, MAX_WIDTH),
        "context_length": (1, MAX_CONTEXT),
        "vocab_size": (1, MAX_VOCABULARY),
        "pad_id": (0, MAX_VOCABULARY),
        "eos_id": (0, MAX_VOCABULARY),
    },
}


def _is_number(value: Any) -> bool:
    """A finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


_OTHER: dict[str, tuple[Callable[[Any], bool], str]] = {
    "mlp_ratio": (lambda value: _is_number(value) and 0 < value <= 64, "a number above 0, up to 64"),
    "patch_dropout": (lambda value: _is_number(value) and 0 <= value < 1, "a fraction from 0 to below 1"),
    "norm_kwargs": (
        lambda value: (
            isinstance(value, dict) and set(value) <= {"eps"} and all(_is_number(eps) and 0 < eps <= 0.1 for eps in value.values())
        ),
        "only eps, up to 0.1",
    ),
    "act_kwargs": (lambda value: value in ({}, {"approximate": "tanh"}, {"approximate": "none"}), "approximate: tanh, without quick_gelu"),
}
# Other fields that may differ from open_clip's default, with the values that are supported. All the rest must have the default.
_CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "vision_cfg": {
        "no_ln_pre": (False, True),
        "final_ln_after_pool": (False, True),
        "pool_type": ("tok", "avg"),
        "pos_embed_type": ("learnable", "sin_cos_2d"),
    },
    "text_cfg": {"final_ln_after_pool": (False, True)},
}


_CUSTOM_BLOCK = {
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
# open_clip's CLIPVisionCfg and CLIPTextCfg: every field with its default. A test compares them with the installed open_clip.
DEFAULTS: dict[str, dict[str, Any]] = {
    "vision_cfg": {
        "layers": 12,
        "width": 768,
        "head_width": 64,
        "mlp_ratio": 4.0,
        "patch_size": 16,
        "image_size": 224,
        "ls_init_value": None,
        "patch_dropout": 0.0,
        "attentional_pool": False,
        "attn_pooler_queries": 256,
        "attn_pooler_heads": 8,
        "no_ln_pre": False,
        "pos_embed_type": "learnable",
        "final_ln_after_pool": False,
        "pool_type": "tok",
        "output_tokens": False,
        "act_kwargs": None,
        "norm_kwargs": None,
        **_CUSTOM_BLOCK,
        "timm_model_name": None,
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "timm_proj_bias": False,
        "timm_drop": 0.0,
        "timm_drop_path": None,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "hf_tokenizer_name": None,
        "tokenizer_mode": None,
        "tokenizer_kwargs": None,
        "width": 512,
        "heads": 8,
        "layers": 12,
        "mlp_ratio": 4.0,
        "ls_init_value": None,
        "embed_cls": False,
        "pad_id": 0,
        "eos_id": 2,
        "no_causal_mask": False,
        "final_ln_after_pool": False,
        "pool_type": "argmax",
        "proj_bias": False,
        "proj_type": "linear",
        "output_tokens": False,
        "act_kwargs": None,
        "norm_kwargs": None,
        **_CUSTOM_BLOCK,
        "hf_model_name": None,
        "hf_model_pretrained": True,
        "hf_proj_type": "mlp",
        "hf_pooler_type": "mean_pooler",
    },
}


def open_clip_version() -> str:
    """open_clip's version."""
    return importlib.metadata.version("open_clip_torch")


@functools.cache
def _shipped() -> dict[str, Path]:
    """Name -> file of open_clip's configurations, which are read without importing it: that takes seconds."""
    found = importlib.util.find_spec("open_clip")
    assert found is not None  # a dependency of this package
    assert found.submodule_search_locations is not None
    files = Path(found.submodule_search_locations[0], "model_configs").glob("*.json")
    return {file.stem: file for file in sorted(files, key=lambda file: _natural(file.stem))}


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts the numbers in names as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name.lower())]


def open_clip_file(name: str) -> Path:
    """A file of the installed open_clip package."""
    return next(iter(_shipped().values())).parents[1] / name


def architecture_names() -> list[str]:
    """Names of open_clip's shipped configurations."""
    return list(_shipped())


def model_config(name_or_dict: str | Mapping[str, Any] | None, where: str = "recipe key model.config") -> dict[str, Any]:
    """A validated copy of an open_clip configuration given by name or inline. `where` starts the messages.

    Raises:
        UserError: unknown name (with the nearest ones), unknown or missing field, a value of another type or out of bounds, or an
            architecture that is not supported.
    """
    config = _copy(name_or_dict, where)
    for key in set(config) - set(JOINT):
        raise UserError(f"{where}.{shown(key)}: not supported. {_PLAIN}")
    for key in ("vision_cfg", "text_cfg"):
        if not isinstance(config[key], dict):
            raise UserError(f"{where}.{key}: {shown(config[key])!r} is not a mapping. {_PLAIN}")
    if isinstance(config["vision_cfg"].get("layers"), list):
        raise UserError(f"{where}: a ResNet image tower is not supported. Use a ViT configuration, such as ViT-B-32.")
    _check_whole(config["embed_dim"], (1, MAX_WIDTH), f"{where}.embed_dim")
    if not isinstance(config.get("quick_gelu", False), bool):
        raise UserError(f"{where}.quick_gelu: {shown(config['quick_gelu'])!r} is not true or false.")
    if "init_logit_bias" in config and not _is_number(config["init_logit_bias"]):
        raise UserError(f"{where}.init_logit_bias: {shown(config['init_logit_bias'])!r} is not a number. SigLIP's is -10.")
    for key in DEFAULTS:
        config[key] = _checked_tower(config[key], key, where, quick_gelu=config.get("quick_gelu", False))
    _check_sizes(config, where)
    return config


def _copy(name_or_dict: str | Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    if isinstance(name_or_dict, str):
        names = architecture_names()
        if name_or_dict not in names:
            near = ", ".join(difflib.get_close_matches(name_or_dict, names, n=3, cutoff=0.3)) or "ViT-B-32"
            raise UserError(f"recipe key model.architecture: open_clip has no {shown(name_or_dict)!r}. Nearest: {near}.")
        config = json.loads(_shipped()[name_or_dict].read_text(encoding="utf-8"))
    else:
        try:
            config = json.loads(json.dumps(name_or_dict))
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{where}: not plain JSON ({type(error).__name__}). {_PLAIN}") from error
    if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(config):
        raise UserError(f"{where}: needs embed_dim, vision_cfg and text_cfg, as open_clip's model_configs have them.")
    return {key: value for key, value in config.items() if value is not None or key in ("embed_dim", "vision_cfg", "text_cfg")}


def with_logit_bias(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with SigLIP's logit bias: open_clip then builds a CLIP that has one."""
    return {"init_logit_bias": -10.0, **config}


def _checked_tower(tower: Mapping[str, Any], key: str, where: str, *, quick_gelu: bool) -> dict[str, Any]:
    """The tower's fields that are not None; every one is known, of its type, in bounds, and leads to the plain architecture."""
    defaults = DEFAULTS[key]
    for name, value in tower.items():
        at = f"{where}.{key}.{shown(name)}"
        if name not in defaults:
            near = difflib.get_close_matches(name, list(defaults), n=1, cutoff=0.0)
            raise UserError(f"{at}: unknown." + (f" Nearest valid key: {near[0]}." if near else ""))
        if value is None and defaults[name] is None:
            continue
        if name in _WHOLE[key]:
            _check_whole(value, _WHOLE[key][name], at)
        elif name in _OTHER:
            is_valid, supported = _OTHER[name]
            if not is_valid(value) or (name == "act_kwargs" and quick_gelu):
                raise UserError(f"{at}: {shown(value)!r} is not supported. Use {supported}.")
        else:
            valid = _CHOICES[key].get(name, (defaults[name],))
            if not any(type(value) is type(choice) and value == choice for choice in valid):
                raise UserError(f"{at}: {shown(value)!r} is not supported. {_PLAIN}")
    return {name: value for name, value in tower.items() if value is not None}


def _check_whole(value: Any, bounds: tuple[int, int], at: str) -> None:
    least, most = bounds
    if type(value) is not int or not least <= value <= most:
        raise UserError(f"{at}: {shown(value)!r} is not a whole number from {least} to {most}.")


def _check_sizes(config: Mapping[str, Any], where: str) -> None:
    vision, text = fields_of(config, "image"), fields_of(config, "text")
    for key, tower, whole, part in (
        ("vision_cfg", vision, "width", "head_width"),
        ("text_cfg", text, "width", "heads"),
        ("vision_cfg", vision, "image_size", "patch_size"),
    ):
        if tower[whole] % tower[part]:
            raise UserError(f"{where}.{key}.{whole}: {tower[whole]} is not a multiple of {part} {tower[part]}.")
    for key, tower in (("vision_cfg", vision), ("text_cfg", text)):
        if int(tower["width"] * tower["mlp_ratio"]) < 1:
            raise UserError(f"{where}.{key}.mlp_ratio: {tower['mlp_ratio']} of width {tower['width']} leaves no MLP.")
    if num_patches(config) * vision["width"] > MAX_POSITION_NUMBERS:
        raise UserError(
            f"{where}.vision_cfg.patch_size: {num_patches(config)} patches of width {vision['width']} are more than the "
            f"{MAX_POSITION_NUMBERS:,} numbers that are supported. Use larger patches."
        )
    if approximate_parameters(config) > MAX_PARAMETERS:
        raise UserError(
            f"{where}: a model of {approximate_parameters(config):,} parameters; {MAX_PARAMETERS:,} are supported. Use a smaller one."
        )


def approximate_parameters(config: Mapping[str, Any]) -> int:
    """Parameters of a model to within a few percent, without building it: the blocks' matrices and the embeddings."""
    total = vocab_size(config) * width(config, "text") + num_patches(config) * width(config, "image")
    for tower in ("image", "text"):
        total += num_layers(config, tower) * int((4 + 2 * _field(config, tower, "mlp_ratio")) * width(config, tower) ** 2)
    return total


def require_memory(config: Mapping[str, Any]) -> None:
    """Raise UserError where the weights of a model are larger than this machine's memory: it would be killed without a word."""
    needed, memory = 4 * approximate_parameters(config), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        layers = " + ".join(str(num_layers(config, tower)) for tower in ("image", "text"))
        raise UserError(
            f"a model of {layers} layers takes {needed / 2**30:.0f} GiB of memory, this machine has {memory / 2**30:.0f}. Use fewer."
        )


def _field(config: Mapping[str, Any], tower: str, name: str) -> Any:
    """A tower's field, or open_clip's default."""
    return fields_of(config, tower)[name]


def fields_of(config: Mapping[str, Any], tower: str) -> dict[str, Any]:
    """All fields of the "image" or "text" tower; those left out have open_clip's defaults."""
    key = "vision_cfg" if tower == "image" else "text_cfg"
    return {**DEFAULTS[key], **config[key]}


def width(config: Mapping[str, Any], tower: str) -> int:
    """The residual width of the "image" or "text" tower."""
    return int(_field(config, tower, "width"))


def num_layers(config: Mapping[str, Any], tower: str) -> int:
    """The depth of the "image" or "text" tower."""
    return int(_field(config, tower, "layers"))


def image_size(config: Mapping[str, Any]) -> int:
    """Side of the input images in pixels."""
    return int(_field(config, "image", "image_size"))


def num_patches(config: Mapping[str, Any]) -> int:
    """Patches of an image, square or not, without the class token."""
    size, patch = _field(config, "image", "image_size"), int(_field(config, "image", "patch_size"))
    height, width = (size, size) if isinstance(size, int) else size
    return (height // patch) * (width // patch)


def patch_dropout(config: Mapping[str, Any]) -> float:
    """Fraction of the patches that training drops."""
    return float(_field(config, "image", "patch_dropout"))


def context_length(config: Mapping[str, Any]) -> int:
    """Tokens per caption."""
    return int(_field(config, "text", "context_length"))


def vocab_size(config: Mapping[str, Any]) -> int:
    """Token ids that have an embedding."""
    return int(_field(config, "text", "vocab_size"))


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """(key, value in `one`, value in `other`) of the first field in which two architectures differ; None where they agree.

    Fields left out count with open_clip's defaults, but for a vocab_size that `other` leaves out, which is any. What changes no weight and
    no function (a tokenizer's name, dropout in training) is not compared.
    """
    pairs: list[tuple[str, Any, Any]] = [("embed_dim", one["embed_dim"], other["embed_dim"])]
    pairs.append(("quick_gelu", one.get("quick_gelu", False), other.get("quick_gelu", False)))
    for key, tower in (("vision_cfg", "image"), ("text_cfg", "text")):
        first, second = fields_of(one, tower), fields_of(other, tower)
        ignored = {"patch_dropout", "hf_tokenizer_name", "tokenizer_kwargs"} | ({"vocab_size"} - set(other[key]))
        pairs += [(f"{key}.{name}", first.get(name), second.get(name)) for name in first if name not in ignored]
    return next((pair for pair in pairs if pair[1] != pair[2]), None)


def head_dim(config: Mapping[str, Any], tower: str) -> int:
    """Channels of one attention head."""
    if tower == "image":
        return int(_field(config, "image", "head_width"))
    return int(_field(config, "text", "width")) // int(_field(config, "text", "heads"))


def with_sizes(
    config: Mapping[str, Any],
    *,
    image_layers: int | None = None,
    text_layers: int | None = None,
    image_width: int | None = None,
    text_width: int | None = None,
) -> dict[str, Any]:
    """A copy of `config` with other depths and residual widths; None keeps what is there.

    A narrower tower has fewer heads of the same dimension and the same MLP ratio; the joint embedding keeps its width.

    Raises:
        UserError: a depth below 1, or a width that is not a multiple of the head dimension between one head and the present width.
    """
    changed = json.loads(json.dumps(config))
    for tower, key, layers, wide in (("image", "vision_cfg", image_layers, image_width), ("text", "text_cfg", text_layers, text_width)):
        if layers is not None:
            if not 1 <= layers <= MAX_LAYERS:
                raise UserError(f"{tower} layers: {layers} is not a valid depth. Use 1 to {MAX_LAYERS}.")
            changed[key]["layers"] = layers
        if wide is None:
            continue
        head, most = head_dim(config, tower), width(config, tower)
        if wide % head or not head <= wide <= most:
            raise UserError(f"{tower} width: {wide} does not fit. Use a multiple of the head dimension {head}, at most {most}.")
        changed[key]["width"] = wide
        if tower == "text":
            changed[key]["heads"] = wide // head
    return changed
