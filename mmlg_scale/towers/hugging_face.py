"""Hugging Face's CLIPModel in open_clip's terms: tensor names, config.json, preprocessor_config.json, and which tokenizer it has."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmlg_scale.errors import UserError
from mmlg_scale.reading import read_json, shown
from mmlg_scale.towers.config import model_config
from mmlg_scale.towers.preprocess import Preprocess

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_SUPPORTED = "Supported: CLIPModel as plain ViT and text transformer."

_STEM = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "logit_scale": "logit_scale",
    **{
        f"{theirs}.{kind}": f"{ours}.{kind}"
        for kind in ("weight", "bias")
        for theirs, ours in (
            ("vision_model.pre_layrnorm", "visual.ln_pre"),  # spelled so there
            ("vision_model.post_layernorm", "visual.ln_post"),
            ("text_model.final_layer_norm", "ln_final"),
        )
    },
}
_TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
# What a config.json leaves out has transformers' default: `save_pretrained` does not write those.
_TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
_VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def is_hugging_face(names: Mapping[str, Any]) -> bool:
    """Whether these are the tensor names of a CLIPModel."""
    return any(name.startswith(("text_model.", "vision_model.")) for name in names)


def from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIPModel's names -> open_clip's: queries, keys and values joined, projections transposed. Unknown names stay as they are."""
    found: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name in _STEM:
            found[_STEM[name]] = tensor
        elif name in _TRANSPOSED and tensor.ndim == 2:
            found[_TRANSPOSED[name]] = tensor.T.contiguous()
        else:
            tower, _, rest = name.partition(".encoder.layers.")
            number, _, rest = rest.partition(".")
            part, _, kind = rest.rpartition(".")
            prefix = ("visual." if tower == "vision_model" else "") + f"transformer.resblocks.{number}."
            if part in _LAYER:
                found[f"{prefix}{_LAYER[part]}.{kind}"] = tensor
            elif part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                joined.setdefault(f"{prefix}attn.in_proj_{kind}", {})[part.removeprefix("self_attn.")] = tensor
            else:
                found[name] = tensor
    for name, parts in joined.items():
        rows = [parts[key] for key in ("q_proj", "k_proj", "v_proj") if key in parts]
        if len({tensor.shape[1:] for tensor in rows}) == 1:  # otherwise the check that follows misses it
            found[name] = torch.cat(rows)
    return found


def describes_clip(content: Mapping[str, Any]) -> bool:
    """Whether a config.json says anything of a model."""
    return any(key in content for key in ("model_type", "text_config", "vision_config"))


def _sections(content: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """text_config and vision_config with transformers' defaults; the older `*_config_dict` rule over them, as there."""
    found = []
    for key, defaults in (("text_config", _TEXT_DEFAULTS), ("vision_config", _VISION_DEFAULTS)):
        parts = [content.get(key) or {}, content.get(f"{key}_dict") or {}]
        if not all(isinstance(part, dict) for part in parts):
            raise UserError(f"{where}: {key} is not an object. {_SUPPORTED}")
        section: dict[str, Any] = {**defaults}
        for part in parts:
            section |= {name: value for name, value in part.items() if value is not None}
        found.append(section)
    return found[0], found[1]


def activation(content: Mapping[str, Any], where: str) -> str:
    """`gelu` or `quick_gelu`, as a config.json that `describes_clip` says.

    Raises:
        UserError: another activation, or one for each tower.
    """
    text, vision = _sections(content, where)
    acts = [section["hidden_act"] for section in (text, vision)]
    for key, act in zip(("text_config", "vision_config"), acts, strict=True):
        if act not in ("gelu", "quick_gelu"):
            raise UserError(f"{where}: {key}.hidden_act is {shown(act)!r}. Supported: gelu and quick_gelu.")
    if acts[0] != acts[1]:
        raise UserError(f"{where}: hidden_act is {acts[0]} in text_config and {acts[1]} in vision_config. One for both is supported.")
    return str(acts[0])


def config_of(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """open_clip's model_cfg for a config.json that `describes_clip`.

    Raises:
        UserError: another kind of model, or a value that open_clip's plain CLIP does not have.
    """
    if content.get("model_type", "clip") != "clip":
        raise UserError(f"{where}: model_type is {shown(content['model_type'])!r}, not clip. {_SUPPORTED}")
    text, vision = _sections(content, where)
    quick_gelu = activation(content, where) == "quick_gelu"
    for key, section in (("text_config", text), ("vision_config", vision)):
        if section["layer_norm_eps"] != 1e-5:
            raise UserError(f"{where}: {key}.layer_norm_eps is {shown(section['layer_norm_eps'])}. Supported: 1e-05, as open_clip has it.")
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"):
            if type(section[name]) is not int or section[name] < 1:
                raise UserError(f"{where}: {key}.{name} is {shown(section[name])!r}. Use a whole number of 1 or more.")
        if section["hidden_size"] % section["num_attention_heads"]:
            raise UserError(
                f"{where}: {key}.hidden_size {section['hidden_size']} is not a multiple of num_attention_heads "
                f"{section['num_attention_heads']}."
            )
    if vision["num_channels"] != 3:
        raise UserError(f"{where}: vision_config.num_channels is {shown(vision['num_channels'])}. Supported: 3.")
    # With 2, transformers takes the highest id as open_clip does; otherwise the end token, which is the highest id in CLIP's vocabulary.
    if text["eos_token_id"] not in (2, text["vocab_size"] - 1 if type(text["vocab_size"]) is int else None):
        raise UserError(
            f"{where}: text_config.eos_token_id is {shown(text['eos_token_id'])} of {shown(text['vocab_size'])} tokens. Supported: the "
            "last one, where open_clip takes the features."
        )
    projection = content.get("projection_dim")
    config = {
        "embed_dim": 512 if projection is None else projection,
        "quick_gelu": quick_gelu,
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "width": vision["hidden_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "layers": vision["num_hidden_layers"],
            "mlp_ratio": _ratio(vision),
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
            "mlp_ratio": _ratio(text),
        },
    }
    return model_config(config, where=where)


def _ratio(section: Mapping[str, Any]) -> float:
    """The mlp_ratio with which open_clip, which rounds down, comes to the same width."""
    width, inner = section["hidden_size"], section["intermediate_size"]
    if inner > 64 * width:
        return float(inner // width)  # out of bounds, and refused as that
    return inner / width if int(width * (inner / width)) == inner else (inner + 0.5) / width


def preprocess_of(folder: Path, image_size: int) -> Preprocess:
    """What preprocessor_config.json (or processor_config.json) says; OpenAI's preprocessing where there is neither.

    Raises:
        UserError: damaged, or what open_clip's preprocessing cannot do.
    """
    hint = "Take the one that the model was published with."
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if not os.path.lexists(path):
            continue
        content = read_json(path, "preprocessing configuration", hint)
        if name == "processor_config.json":
            content = content.get("image_processor", {})
        return _preprocess(content, image_size, str(path))
    return Preprocess()


def _preprocess(content: Any, image_size: int, where: str) -> Preprocess:
    if not isinstance(content, dict):
        raise UserError(f"{where}: not a JSON object. Take the one that the model was published with.")
    given = {key: value for key, value in content.items() if value is not None}
    factor = given.get("rescale_factor", 1 / 255)
    fixed: list[tuple[str, Callable[[Any], bool], str]] = [
        ("do_resize", lambda value: value is True, "true"),
        ("do_rescale", lambda value: value is True, "true"),
        ("resample", lambda value: type(value) is int and value in (2, 3), "2 (bilinear) or 3 (bicubic)"),
        ("do_normalize", lambda value: type(value) is bool, "true or false"),
        ("do_center_crop", lambda value: type(value) is bool, "true or false"),
        ("rescale_factor", lambda value: isinstance(value, (int, float)) and math.isclose(factor, 1 / 255, rel_tol=1e-4), "1/255"),
    ]
    for key, is_valid, supported in fixed:
        if key in given and not is_valid(given[key]):
            raise UserError(f"{where}: {key} is {shown(given[key])}. Supported: {supported}.")
    config: dict[str, Any] = {"interpolation": "bilinear" if given.get("resample", 3) == 2 else "bicubic"}
    size, both = given.get("size", image_size), [image_size, image_size]
    crop = _sides(given.get("crop_size", image_size))
    is_cropped = given.get("do_center_crop", True)
    if size in (image_size, {"shortest_edge": image_size}) and is_cropped and crop == both:
        config["resize_mode"] = "shortest"
    elif isinstance(size, dict) and _sides(size) == both and (not is_cropped or crop == both):
        config["resize_mode"] = "squash"
    else:
        raise UserError(
            f"{where}: size {shown(size)}, crop_size {shown(given.get('crop_size'))}, do_center_crop {is_cropped} do not give images of "
            f"{image_size} pixels as open_clip makes them. Supported: shortest_edge and crop of {image_size}, or height and width."
        )
    if given.get("do_normalize", True):
        config |= {key: given[f"image_{key}"] for key in ("mean", "std") if f"image_{key}" in given}
    else:
        config |= {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    return Preprocess.from_config(config, where)


def _sides(size: Any) -> list[Any] | None:
    """Height and width."""
    if isinstance(size, dict):
        return [size.get("height"), size.get("width")]
    return [size, size] if type(size) is int else None


def has_byte_pairs(files: Mapping[str, str]) -> bool:
    """Whether tokenizer.json (or vocab.json) has the vocabulary of open_clip's byte pairs: all ids but those of start and end, which have
    other names there.
    """
    from mmlg_scale.towers.tokenizer import BytePairTokenizer

    vocabulary: Any = None
    try:
        if "tokenizer.json" in files:
            vocabulary = json.loads(files["tokenizer.json"])["model"]["vocab"]
        elif "vocab.json" in files:
            vocabulary = json.loads(files["vocab.json"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return False  # damaged: said where it is read
    if not isinstance(vocabulary, dict):
        return False
    own: dict[str, int] = BytePairTokenizer().vocabulary
    num_plain = len(own) - 2
    plain = {token: index for token, index in own.items() if index < num_plain}
    return len(vocabulary) == len(own) and all(vocabulary.get(token) == index for token, index in plain.items())
