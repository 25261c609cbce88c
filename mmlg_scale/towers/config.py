"""open_clip's model configurations: which are carried, and what they say of sizes."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from mmlg_scale.errors import UserError
from mmlg_scale.towers.library import CLIPTextCfg, CLIPVisionCfg, open_clip

# Fields of open_clip's configurations whose value leads to another architecture than the plain one, with the value that is carried.
_PLAIN_VISION = {
    "ls_init_value": None,
    "attentional_pool": False,
    "timm_model_name": None,
    "block_type": None,
    "output_tokens": False,
}
_PLAIN_TEXT = {
    "ls_init_value": None,
    "embed_cls": False,
    "hf_model_name": None,
    "proj_type": "linear",
    "proj_bias": False,
    "block_type": None,
    "no_causal_mask": False,
    "pool_type": "argmax",
    "output_tokens": False,
}
_PLAIN_FLAGS = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")


def open_clip_version() -> str:
    """open_clip's version."""
    return str(open_clip.__version__)


def architecture_names() -> list[str]:
    """Names of open_clip's shipped configurations."""
    return list(open_clip.list_models())


def model_config(name_or_dict: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """A validated copy of an open_clip configuration given by name or inline.

    Raises:
        UserError: unknown name (with the nearest ones), unknown or missing field, or an architecture that is not carried.
    """
    if isinstance(name_or_dict, str):
        names = architecture_names()
        if name_or_dict not in names:
            near = ", ".join(difflib.get_close_matches(name_or_dict, names, n=3, cutoff=0.3))
            raise UserError(f"recipe key model.architecture: open_clip has no {name_or_dict!r}. Nearest: {near}.")
        config = open_clip.get_model_config(name_or_dict)
    else:
        config = json.loads(json.dumps(name_or_dict))
    if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(config):
        raise UserError("recipe key model.config: needs embed_dim, vision_cfg and text_cfg, as open_clip's model_configs have them.")
    config = {key: value for key, value in config.items() if value is not None}
    for key in set(config) - {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_bias"}:
        raise UserError(f"recipe key model.config.{key}: not carried. Plain open_clip ViT + text transformer configurations are.")
    _check_tower(config["vision_cfg"], CLIPVisionCfg, "vision_cfg", _PLAIN_VISION)
    _check_tower(config["text_cfg"], CLIPTextCfg, "text_cfg", _PLAIN_TEXT)
    if isinstance(config["vision_cfg"].get("layers"), list):
        raise UserError("recipe key model: a ResNet image tower is not carried. Use a ViT configuration, such as ViT-B-32.")
    if not isinstance(config.get("init_logit_bias", 0.0), (int, float)):
        raise UserError(f"recipe key model.config.init_logit_bias: {config['init_logit_bias']!r} is no number. SigLIP's is -10.")
    _check_sizes(config)
    return config


def with_logit_bias(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with SigLIP's logit bias: open_clip then builds a CLIP that has one."""
    return {"init_logit_bias": -10.0, **config}


def _check_tower(tower: dict[str, Any], fields: type, key: str, plain: Mapping[str, Any]) -> None:
    known = fields.__dataclass_fields__  # type: ignore[attr-defined]
    for name, value in tower.items():
        if name not in known:
            near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
            raise UserError(f"recipe key model.config.{key}.{name}: unknown. Nearest valid key: {near}.")
        if (name in plain and value != plain[name]) or (name in _PLAIN_FLAGS and value):
            raise UserError(f"recipe key model.config.{key}.{name}: {value!r} is not carried. Plain ViT + text transformers are.")


def _check_sizes(config: Mapping[str, Any]) -> None:
    vision = {**_defaults(CLIPVisionCfg), **config["vision_cfg"]}
    text = {**_defaults(CLIPTextCfg), **config["text_cfg"]}
    if vision["width"] % vision["head_width"]:
        raise UserError(
            f"recipe key model.config.vision_cfg.width: {vision['width']} is not a multiple of head_width {vision['head_width']}."
        )
    if text["width"] % text["heads"]:
        raise UserError(f"recipe key model.config.text_cfg.width: {text['width']} is not a multiple of heads {text['heads']}.")
    if vision["image_size"] % vision["patch_size"]:
        raise UserError(
            f"recipe key model.config.vision_cfg.image_size: {vision['image_size']} is not a multiple of patch_size {vision['patch_size']}."
        )
    for tower, key in ((vision, "vision_cfg"), (text, "text_cfg")):
        if tower["layers"] < 1:
            raise UserError(f"recipe key model.config.{key}.layers: is {tower['layers']}. Use 1 or more.")


def _field(config: Mapping[str, Any], tower: str, name: str) -> Any:
    """A tower's field, or open_clip's default."""
    key, defaults = ("vision_cfg", CLIPVisionCfg) if tower == "image" else ("text_cfg", CLIPTextCfg)
    return config[key].get(name, getattr(defaults, name))


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
    """Patches of an image, without the class token."""
    return (image_size(config) // int(_field(config, "image", "patch_size"))) ** 2


def patch_dropout(config: Mapping[str, Any]) -> float:
    """Share of the patches that training drops."""
    return float(_field(config, "image", "patch_dropout"))


def context_length(config: Mapping[str, Any]) -> int:
    """Tokens per caption."""
    return int(_field(config, "text", "context_length"))


def _defaults(fields: type) -> dict[str, Any]:
    return dict(vars(fields()))


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """(key, value in `one`, value in `other`) of the first field in which two architectures differ; None where they agree.

    Fields left out count with open_clip's defaults, but for a vocab_size that `other` leaves out, which is any. What changes no weight and
    no function (a tokenizer's name, dropout in training) is not compared.
    """
    pairs: list[tuple[str, Any, Any]] = [("embed_dim", one["embed_dim"], other["embed_dim"])]
    pairs.append(("quick_gelu", one.get("quick_gelu", False), other.get("quick_gelu", False)))
    for key, fields in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        first, second = {**_defaults(fields), **one[key]}, {**_defaults(fields), **other[key]}
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
    """A copy of `config` with other depths and residual widths; None keeps what stands.

    A narrower tower has fewer heads of the same dimension and the same MLP ratio; the joint embedding keeps its width.

    Raises:
        UserError: a depth below 1, or a width that is not a multiple of the head dimension between one head and the present width.
    """
    changed = json.loads(json.dumps(config))
    for tower, key, layers, wide in (("image", "vision_cfg", image_layers, image_width), ("text", "text_cfg", text_layers, text_width)):
        if layers is not None:
            if layers < 1:
                raise UserError(f"{tower} layers: {layers} is no depth. Use 1 or more.")
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
