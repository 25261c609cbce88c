"""State dicts and folders: taking a CLIP's weights apart, writing and reading what open_clip loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmlg_scale.errors import UserError
from mmlg_scale.files import write_json_atomic
from mmlg_scale.towers.config import first_difference, image_size, model_config
from mmlg_scale.towers.library import CLIPTextCfg, CLIPVisionCfg, TextTransformer, VisionTransformer, open_clip
from mmlg_scale.towers.run import Preprocess
from mmlg_scale.towers.weights import load_weights

BLOCK_PREFIX = {"image": "visual.transformer.resblocks.", "text": "transformer.resblocks."}


def split_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[dict[str, Tensor]]]]:
    """A CLIP state dict as (stem: every entry outside the blocks, blocks: {"image": [...], "text": [...]})."""
    stem: dict[str, Tensor] = {}
    blocks: dict[str, dict[int, dict[str, Tensor]]] = {"image": {}, "text": {}}
    for name, tensor in state.items():
        for tower, prefix in BLOCK_PREFIX.items():
            if name.startswith(prefix):
                number, _, rest = name.removeprefix(prefix).partition(".")
                blocks[tower].setdefault(int(number), {})[rest] = tensor
                break
        else:
            stem[name] = tensor
    return stem, {tower: [found[number] for number in sorted(found)] for tower, found in blocks.items()}


def join_state(stem: Mapping[str, Tensor], blocks: Mapping[str, Sequence[Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """The inverse of `split_state`."""
    state = dict(stem)
    for tower, prefix in BLOCK_PREFIX.items():
        for number, block in enumerate(blocks[tower]):
            state |= {f"{prefix}{number}.{name}": tensor for name, tensor in block.items()}
    return state


def export(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    out: Path,
    *,
    preprocess: Preprocess | None = None,
    tokenizer_files: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the folder that ``open_clip.create_model_and_transforms("local-dir:OUT")`` loads; whole or not at all.

    Args:
        state: a CLIP state dict.
        tokenizer_files: name -> content; written beside the weights, so that ``open_clip.get_tokenizer("local-dir:OUT")`` finds them.

    Raises:
        UserError: OUT exists and is no export, or `overwrite` is not given.
    """
    config = json.loads(json.dumps(config))
    if tokenizer_files:
        config["text_cfg"]["hf_tokenizer_name"] = "tokenizer"
    preprocess = preprocess or Preprocess()
    size = image_size(config)
    tensors = {name: tensor.reshape(()) if name in ("logit_scale", "logit_bias") else tensor for name, tensor in state.items()}
    files = {
        "open_clip_config.json": {
            "model_cfg": config,
            "preprocess_cfg": {"size": [size, size], "mode": "RGB", **preprocess.to_config()},
        }
    }
    _write_folder(out, files, "open_clip_model.safetensors", tensors, tokenizer_files or {}, overwrite)


def export_tower(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    modality: str,
    out: Path,
    *,
    preprocess: Preprocess | None = None,
    tokenizer_files: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write one tower: ``open_clip_tower.safetensors``, which loads strictly into open_clip's tower class, and ``tower.json``."""
    tensors = {name: state[_clip_name(name, modality)] for name in _meta_tower(config, modality).state_dict()}
    description: dict[str, Any] = {"modality": modality, "model_cfg": config}
    if modality == "image":
        description["preprocess_cfg"] = (preprocess or Preprocess()).to_config()
    files = {"tower.json": description}
    _write_folder(
        out,
        files,
        "open_clip_tower.safetensors",
        tensors,
        (tokenizer_files or {}) if modality == "text" else {},
        overwrite,
    )


def _clip_name(name: str, modality: str) -> str:
    """The name that a tower's tensor has inside a CLIP."""
    return f"visual.{name}" if modality == "image" else name


def _meta_tower(config: Mapping[str, Any], modality: str) -> VisionTransformer | TextTransformer:
    with torch.device("meta"):
        return _build_tower(config, modality)


def _build_tower(config: Mapping[str, Any], modality: str) -> VisionTransformer | TextTransformer:
    quick_gelu = config.get("quick_gelu", False)
    if modality == "image":
        return open_clip.model._build_vision_tower(config["embed_dim"], CLIPVisionCfg(**config["vision_cfg"]), quick_gelu)
    return open_clip.model._build_text_tower(config["embed_dim"], CLIPTextCfg(**config["text_cfg"]), quick_gelu)


def load_tower(folder: Path) -> VisionTransformer | TextTransformer:
    """The open_clip tower that `export_tower` wrote."""
    from safetensors.torch import load_file

    description = json.loads((folder / "tower.json").read_text())
    tower = _build_tower(description["model_cfg"], description["modality"])
    tower.load_state_dict(load_file(folder / "open_clip_tower.safetensors"), strict=True)
    return tower


def _write_folder(
    out: Path,
    json_files: Mapping[str, Any],
    weights_name: str,
    tensors: Mapping[str, Tensor],
    other_files: Mapping[str, str],
    overwrite: bool,
) -> None:
    from safetensors.torch import save_file

    is_export = (out / "open_clip_config.json").exists() or (out / "tower.json").exists()
    if out.exists() and not (is_export and overwrite) and any(out.iterdir()):
        raise UserError(f"{out} exists. Give another --out" + (", or --overwrite to replace the export." if is_export else "."))
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        for name, content in json_files.items():
            write_json_atomic(temporary / name, content)
        for name, content in other_files.items():
            (temporary / name).write_text(content, encoding="utf-8")
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary / weights_name)
        if out.exists():
            shutil.rmtree(out)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_ancestor(path: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and state dict of an ancestor: an open_clip folder (`load_clip`), or a file of weights for `config`.

    Raises:
        UserError: as `load_clip` and `load_weights`; the folder's architecture is not that of `config`.
    """
    if not path.is_dir():
        return dict(config), load_weights(path, config)
    own, state = load_clip(path)
    difference = first_difference(own, config)
    if difference is not None:
        key, theirs, ours = difference
        raise UserError(f"{path} has {key} {theirs}, recipe key model.config.{key} is {ours}. Name the architecture of the folder.")
    return own, state


def load_clip(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and state dict (logit scale and bias with one element) of a folder that `export` or open_clip wrote.

    Raises:
        UserError: the folder lacks a file, or its architecture is not carried.
    """
    from safetensors.torch import load_file

    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no {name}: not an open_clip model folder. Give one that mmlg train or open_clip wrote.")
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"].pop("hf_tokenizer_name", None)
    state = load_file(folder / "open_clip_model.safetensors")
    state |= {name: state[name].reshape(1) for name in ("logit_scale", "logit_bias") if name in state}
    return model_config(config), state
