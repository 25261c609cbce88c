"""Weights from elsewhere: state dicts of open_clip, OpenAI and Hugging Face, as open_clip's plain CLIP names them. Nothing is unpickled."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmlg_scale.errors import UserError
from mmlg_scale.towers.run import build_meta

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
# Entries that are no weights: OpenAI's sizes, buffers that are rebuilt.
_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")

_HUGGING_FACE_STEM = {
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
_HUGGING_FACE_TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
_HUGGING_FACE_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def load_weights(path: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A CLIP state dict in fp32 (logit scale with one element) from a file of weights, for the architecture `config`.

    Understood: open_clip's state dicts (also inside its trainer's checkpoints, or with the text tower under `text.`), OpenAI's, and
    Hugging Face's CLIPModel.

    Raises:
        UserError: no such file, a TorchScript archive or a file that would have to be unpickled, tensors that are not those of the
            architecture, or OpenAI's weights with an architecture without QuickGELU, which they were trained with.
    """
    state = _read(path)
    is_openai = "input_resolution" in state
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if any(name.startswith("text_model.") for name in state):
        state = _from_hugging_face(state)
    state = {name.removeprefix("text."): tensor for name, tensor in state.items() if name not in _NO_WEIGHTS}
    if is_openai and not config.get("quick_gelu", False):
        raise UserError(
            f"{path} holds OpenAI's weights, which use QuickGELU; recipe key model does not. Use a configuration that does, such as "
            "ViT-B-32-quickgelu."
        )
    state = {name: tensor.float() for name, tensor in state.items()}
    if config.get("init_logit_bias") is not None and "logit_bias" not in state:
        state["logit_bias"] = torch.tensor(float(config["init_logit_bias"]))  # weights trained with CLIP's loss go on with SigLIP's
    state |= {name: state[name].reshape(1) for name in ("logit_scale", "logit_bias") if name in state}
    _check(state, config, path)
    return state


def _read(path: Path) -> dict[str, Any]:
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"{path} is no file of weights that is understood. Give one of: {', '.join(SUFFIXES)}, or an open_clip model folder."
        )
    if not path.is_file():
        raise UserError(f"no file of weights {path}. Give the path of an existing one.")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is not a safetensors file: {error}. Fetch it again.") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a TorchScript archive it warns before it refuses
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(
            f"{path} is not a plain state dict ({reason}). TorchScript archives and pickled models are not loaded: save the model's "
            "state_dict() as safetensors."
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, no state dict. Save the model's state_dict() as safetensors.")
    return dict(content)


def _from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's CLIPModel names -> open_clip's: queries, keys and values joined, projections transposed."""
    found: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name in _HUGGING_FACE_STEM:
            found[_HUGGING_FACE_STEM[name]] = tensor
        elif name in _HUGGING_FACE_TRANSPOSED:
            found[_HUGGING_FACE_TRANSPOSED[name]] = tensor.T.contiguous()
        elif ".encoder.layers." in name:
            tower, _, rest = name.partition(".encoder.layers.")
            number, _, rest = rest.partition(".")
            part, _, kind = rest.rpartition(".")
            prefix = ("visual." if tower == "vision_model" else "") + f"transformer.resblocks.{number}."
            if part in _HUGGING_FACE_LAYER:
                found[f"{prefix}{_HUGGING_FACE_LAYER[part]}.{kind}"] = tensor
            elif part.startswith("self_attn."):
                joined.setdefault(f"{prefix}attn.in_proj_{kind}", {})[part.removeprefix("self_attn.")] = tensor
        elif not name.endswith("position_ids"):
            found[name] = tensor  # unknown: named by the check that follows
    for name, parts in joined.items():
        found[name] = torch.cat([parts[key] for key in ("q_proj", "k_proj", "v_proj") if key in parts])
    return found


def _check(state: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in build_meta(config).state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name, shape in expected.items():
        if found.get(name) != shape:
            has = f"has it with shape {found[name]}" if name in found else "lacks it"
            raise UserError(
                f"{path}: recipe key model asks for {name} of shape {shape}, the file {has}. "
                "Name the architecture that the weights were trained with."
            )
    unknown = sorted(set(found) - set(expected))
    if unknown:
        raise UserError(f"{path} holds {unknown[0]}, which recipe key model does not have. Name the architecture of the weights.")
