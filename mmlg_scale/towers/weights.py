"""Weights from elsewhere: state dicts of open_clip, OpenAI and Hugging Face, as open_clip's plain CLIP names them. Nothing is unpickled."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmlg_scale.errors import UserError
from mmlg_scale.ranks import is_first_rank
from mmlg_scale.reading import read_json, shown
from mmlg_scale.towers import hugging_face
from mmlg_scale.towers.config import num_layers, with_sizes
from mmlg_scale.towers.foreign import read_tensors
from mmlg_scale.towers.run import build_meta
from mmlg_scale.towers.state import BLOCK_PREFIX

OPEN_CLIP_CONFIG = "open_clip_config.json"
# Names that wrappers put in: torch's DDP, compile, FSDP and checkpointing anywhere, trainers in front.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_HOLDERS = ("model", "clip", "text")
# Entries that are no weights: OpenAI's sizes, buffers that are rebuilt.
_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids")
_SCALARS = ("logit_scale", "logit_bias")
# Image width, patch size, image positions, text width, joint width of ViT-B/32, B/16, L/14 and L/14@336.
_OPENAI_SIZES = ((768, 32, 50, 512, 512), (768, 16, 197, 512, 512), (1024, 14, 257, 768, 768), (1024, 14, 577, 768, 768))
_FOREIGN = (
    (re.compile(r"visual\.(layer\d|attnpool)\."), "a ResNet image tower"),
    (re.compile(r"visual\.trunk\."), "an image tower of timm"),
    (re.compile(r"transformer\.(embeddings|encoder)\.|roberta\.|bert\."), "a text tower of transformers"),
    (re.compile(r"text_decoder\."), "a CoCa model"),
    (re.compile(r".*\.lora_[AB]\."), "LoRA adapters"),
)
_SIZES = (
    ("token_embedding.weight", 0, "a vocabulary of {} tokens"),
    ("token_embedding.weight", 1, "text width {}"),
    ("positional_embedding", 0, "a context of {} tokens"),
    ("visual.conv1.weight", 0, "image width {}"),
    ("visual.conv1.weight", 2, "patches of {} pixels"),
    ("visual.positional_embedding", 0, "{} image positions (patches and class token)"),
    ("visual.proj", 1, "a joint embedding of width {}"),
    ("visual.transformer.resblocks.0.mlp.c_fc.weight", 0, "image MLPs of width {}"),
    ("transformer.resblocks.0.mlp.c_fc.weight", 0, "text MLPs of width {}"),
)


def load_weights(path: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A CLIP state dict in fp32 (logit scale and bias with one element) from a file of weights, for the architecture `config`.

    Understood: open_clip's state dicts (also inside checkpoints, behind wrappers' prefixes, or with the text tower under `text.`),
    OpenAI's, and Hugging Face's CLIPModel; safetensors, and what torch.save writes in its present and former format. Weights of OpenAI's
    sizes of which neither the file nor a config.json beside it says the activation are told on stderr, as are state dicts left out.

    Raises:
        UserError: no such file; damaged, or what would have to be unpickled; not the tensors of the architecture; numbers that are not
            finite; or the file, or the configuration beside it, asks for another activation than `config`.
    """
    state, is_openai = read_state(path)
    quick_gelu = bool(config.get("quick_gelu", False))
    if is_openai and not quick_gelu:
        raise UserError(
            f"{path} contains OpenAI's weights, which use QuickGELU; recipe key model does not. Use a configuration that does, such as "
            "ViT-B-32-quickgelu."
        )
    stated = _activation_beside(path)
    if stated is not None and stated[1] != quick_gelu:
        names = {True: "QuickGELU", False: "GELU"}
        raise UserError(
            f"{stated[0]} says {names[stated[1]]}, recipe key model.config.quick_gelu is {str(quick_gelu).lower()} ({names[quick_gelu]}): "
            f"the features would differ. Set it to {str(stated[1]).lower()}, or use a configuration that has it."
        )
    if stated is None and not is_openai and "quick_gelu" not in config:
        warn_of_activation(state, path)
    return fit_state(state, config, path, asker="the recipe")


def read_state(path: Path) -> tuple[dict[str, Any], bool]:
    """The entries of a file of weights under open_clip's names, unchecked, and whether it has OpenAI's size entries.

    Raises:
        UserError: as `read_tensors`; or two entries come to the same name.
    """
    entries, left_out = read_tensors(path)
    if left_out:
        say(left_out)
    state: dict[str, Any] = {}
    for name, value in entries.items():
        short = _bare(name)
        if short in state:
            raise UserError(f"{path} has {shown(short)} twice, the second time as {shown(name)}. Save one state dict by itself.")
        state[short] = value
    is_openai = "input_resolution" in state
    state = {name: value for name, value in state.items() if name.rpartition(".")[2] not in _NO_WEIGHTS}
    for name, value in state.items():
        check_kind(name, value, path)
    if hugging_face.is_hugging_face(state):
        state = hugging_face.from_hugging_face(state)
    return state, is_openai


def fit_state(state: Mapping[str, Tensor], config: Mapping[str, Any], path: Path, asker: str) -> dict[str, Tensor]:
    """The state dict in fp32 with exactly the tensors of the architecture `config`; `asker` is who asks for it, in messages.

    Raises:
        UserError: a tensor is missing, surplus, of another shape, or not finite.
    """
    state = dict(state)
    if config.get("init_logit_bias") is not None and "logit_bias" not in state:
        state["logit_bias"] = torch.tensor(float(config["init_logit_bias"]))  # weights trained with CLIP's loss, continued with SigLIP's
    state |= {name: state[name].reshape(1) for name in _SCALARS if name in state and state[name].numel() == 1}
    _check_names(state, config, path, asker)
    return {name: finite(name, tensor, path) for name, tensor in state.items()}


def finite(name: str, tensor: Tensor, path: Path) -> Tensor:
    """A copy of the tensor in fp32, which no longer hangs on the file.

    Raises:
        UserError: it holds NaN or infinity, as fp32.
    """
    tensor = tensor.detach().to(torch.float32, copy=True).contiguous()
    if not torch.isfinite(tensor).all():
        num = int((~torch.isfinite(tensor)).sum())
        raise UserError(f"{path}: {name} has {num} of {tensor.numel()} numbers that are NaN or infinite. Use an earlier checkpoint.")
    return tensor


def warn_of_activation(state: Mapping[str, Tensor], path: Path) -> None:
    """Say on stderr that nothing says which activation these weights were trained with, where they look like OpenAI's."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    vision, positions = shapes.get("visual.conv1.weight", (0, 0, 0, 0)), shapes.get("visual.positional_embedding", (0,))
    text, joint = shapes.get("ln_final.weight", (0,)), shapes.get("visual.proj", (0, 0))
    sizes = (vision[0], vision[-1], positions[0], text[0], joint[-1])
    if sizes in _OPENAI_SIZES or any(tensor.dtype == torch.float16 for tensor in state.values()):
        say(
            f"{path}: nothing says which activation these weights were trained with, and GELU is used. OpenAI's need QuickGELU (a "
            "configuration with quick_gelu: true, such as ViT-B-32-quickgelu); most of open_clip's and LAION's need GELU (quick_gelu: "
            "false says so and silences this)."
        )


@functools.cache
def say(line: str) -> None:
    """Tell the user a line on stderr; once, and by one rank."""
    if is_first_rank():
        print(f"mmlg: {line}", file=sys.stderr, flush=True)


def _bare(name: str) -> str:
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] in _HOLDERS:
        parts = parts[1:]
    return ".".join(parts)


def check_kind(name: str, value: Any, path: Path) -> None:
    """Raise UserError for anything but a dense CPU tensor of floating point numbers."""
    if not isinstance(value, Tensor):
        raise UserError(f"{path}: {shown(name)} is a {type(value).__name__}, not a tensor. Save the model's state_dict() by itself.")
    if value.is_quantized or not value.is_floating_point():
        raise UserError(f"{path}: {shown(name)} has {str(value.dtype).removeprefix('torch.')} numbers. Give weights in floating point.")
    if value.layout != torch.strided or value.device.type != "cpu":
        raise UserError(f"{path}: {shown(name)} is a sparse tensor, or one without numbers. Save the model's state_dict() again.")


def _activation_beside(path: Path) -> tuple[Path, bool] | None:
    """The configuration in the same folder, and whether it says QuickGELU; None where none says anything of a CLIP."""
    for name in (OPEN_CLIP_CONFIG, hugging_face.CONFIG_FILE):
        beside = path.parent / name
        if not os.path.lexists(beside):
            continue
        try:
            content = read_json(beside, "configuration", "Remove or replace it.")
        except UserError as error:
            say(f"{error} It is not used.")
            continue
        model = content.get("model_cfg")
        if name == OPEN_CLIP_CONFIG and isinstance(model, dict):
            say(f"{path} lies in a model folder, whose preprocessing and tokenizer are not used: give the folder to use them.")
            return beside, model.get("quick_gelu") is True
        if name == hugging_face.CONFIG_FILE and content.get("model_type", "clip") == "clip" and hugging_face.describes_clip(content):
            return beside, hugging_face.activation(content, str(beside)) == "quick_gelu"
    return None


def _expected(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes by name, from a model of one layer: building a thousand to read one file would take seconds."""
    one = build_meta(with_sizes(config, image_layers=1, text_layers=1))
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in one.state_dict().items():
        tower = next((tower for tower, prefix in BLOCK_PREFIX.items() if name.startswith(prefix)), None)
        if tower is None:
            shapes[name] = tuple(tensor.shape)
        else:
            rest = name.removeprefix(BLOCK_PREFIX[tower]).partition(".")[2]
            shapes |= {f"{BLOCK_PREFIX[tower]}{number}.{rest}": tuple(tensor.shape) for number in range(num_layers(config, tower))}
    return shapes


def _check_names(state: Mapping[str, Tensor], config: Mapping[str, Any], path: Path, asker: str) -> None:
    remedy = "Name the architecture that the weights were trained with."
    for pattern, kind in _FOREIGN:
        if any(pattern.match(name) for name in state):
            raise UserError(f"{path} contains {kind}, which is not supported. Use a CLIP of plain ViT and text transformer.")
    for prefix, tower in (("visual.", "image"), ("", "text")):
        if not any(name.startswith(f"{prefix}transformer.resblocks.") for name in state):
            raise UserError(f"{path} has no {tower} tower under the names of open_clip, OpenAI or Hugging Face. Give the whole CLIP.")
        held = {name.removeprefix(BLOCK_PREFIX[tower]).partition(".")[0] for name in state if name.startswith(BLOCK_PREFIX[tower])}
        if len(held) != num_layers(config, tower):
            raise UserError(f"{path} has {len(held)} {tower} layers, {asker} asks for {num_layers(config, tower)}. {remedy}")
    if "logit_scale" not in state:
        raise UserError(f"{path} has no logit_scale, without which similarities have no temperature. Save the whole CLIP.")
    expected = _expected(config)
    for name, axis, words in _SIZES:
        shape = tuple(state[name].shape) if name in state else ()
        if len(shape) == len(expected.get(name, ())) and shape[axis:] and shape[axis] != expected[name][axis]:
            raise UserError(f"{path} has {words.format(shape[axis])}, {asker} asks for {expected[name][axis]}. {remedy}")
    for name, wanted in expected.items():
        if name not in state:
            raise UserError(f"{path} has no {name} of shape {wanted}, which {asker} asks for. {remedy}")
        if tuple(state[name].shape) != wanted:
            raise UserError(f"{path}: {name} has shape {tuple(state[name].shape)}, {asker} asks for {wanted}. {remedy}")
    unknown = sorted(set(state) - set(expected))
    if unknown:
        raise UserError(f"{path} has {shown(unknown[0])}, which {asker} does not have. {remedy}")
