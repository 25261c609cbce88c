"""A model as one object: configuration, weights, preprocessing, tokenizer. Loaded, checked and exported together.

Whoever reads or writes a model goes through here, so that a model never meets images or token ids that it was not trained on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmlg_scale.errors import UserError
from mmlg_scale.files import write_json_atomic
from mmlg_scale.towers.config import context_length, first_difference, image_size, model_config, with_sizes
from mmlg_scale.towers.library import CLIPTextCfg, CLIPVisionCfg, TextTransformer, VisionTransformer, open_clip
from mmlg_scale.towers.preprocess import Preprocess
from mmlg_scale.towers.tokenizer import BytePairTokenizer, Tokenizer, tokenizer_from_files
from mmlg_scale.towers.weights import load_weights

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"
TOWER_FILE, TOWER_WEIGHTS_FILE = "tower.json", "open_clip_tower.safetensors"


@dataclass(frozen=True)
class ModelSpec:
    """All that belongs to a model besides its weights.

    Attributes:
        config: open_clip's model_cfg; the activation is in it (quick_gelu).
        preprocess: how images are resized and normalised.
        tokenizer: what turned captions into the ids that the model was trained on.
    """

    config: dict[str, Any]
    preprocess: Preprocess = field(default_factory=Preprocess)
    tokenizer: Tokenizer = field(default_factory=BytePairTokenizer)

    @property
    def image_size(self) -> int:
        """Side of the input images in pixels."""
        return image_size(self.config)

    @property
    def context_length(self) -> int:
        """Tokens per caption."""
        return context_length(self.config)

    def sized(self, **sizes: int | None) -> ModelSpec:
        """The same at other depths and widths, see `with_sizes`."""
        return replace(self, config=with_sizes(self.config, **sizes))

    def to_header(self) -> dict[str, Any]:
        """As plain JSON, for files that carry a model's spec (a learngene, a digest)."""
        return {"model_config": self.config, "preprocess": self.preprocess.to_config(), "tokenizer_files": self.tokenizer.files}

    @classmethod
    def from_header(cls, header: Mapping[str, Any], where: str) -> ModelSpec:
        """The inverse of `to_header`; `where` starts the message.

        Raises:
            UserError: something in it is not supported.
        """
        return cls(
            model_config(header["model_config"]),
            Preprocess.from_config(header["preprocess"], where),
            tokenizer_from_files(header["tokenizer_files"]),
        )

    def digest(self) -> str:
        """SHA-256 of the header."""
        return hashlib.sha256(json.dumps(self.to_header(), sort_keys=True).encode()).hexdigest()


class Bundle(NamedTuple):
    """A model: what it is, and its state dict (logit scale and bias with one element)."""

    spec: ModelSpec
    state: dict[str, Tensor]

    def digest(self) -> str:
        """SHA-256 over spec and weights: equal for models that compute the same."""
        found = hashlib.sha256(self.spec.digest().encode())
        for name in sorted(self.state):
            found.update(name.encode())
            found.update(self.state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()


def export(model: Bundle, out: Path, *, overwrite: bool = False) -> None:
    """Write the folder that ``open_clip.create_model_and_transforms("local-dir:OUT")`` loads; whole or not at all.

    Tokenizer files lie beside the weights, so that ``open_clip.get_tokenizer("local-dir:OUT")`` finds them.

    Raises:
        UserError: OUT exists and is no export, or `overwrite` is not given.
    """
    spec = model.spec
    config = json.loads(json.dumps(spec.config))
    if spec.tokenizer.files:
        config["text_cfg"]["hf_tokenizer_name"] = "tokenizer"
    tensors = {name: tensor.reshape(()) if name in ("logit_scale", "logit_bias") else tensor for name, tensor in model.state.items()}
    size = spec.image_size
    preprocess = {"size": [size, size], "mode": "RGB", **spec.preprocess.to_config()}
    files = {CONFIG_FILE: {"model_cfg": config, "preprocess_cfg": preprocess}}
    _write_folder(out, files, WEIGHTS_FILE, tensors, spec.tokenizer.files, overwrite)


def export_tower(model: Bundle, modality: str, out: Path, *, overwrite: bool = False) -> None:
    """Write one tower: ``open_clip_tower.safetensors``, which loads strictly into open_clip's tower class, and ``tower.json``."""
    spec, is_image = model.spec, modality == "image"
    tensors = {name: model.state[f"visual.{name}" if is_image else name] for name in _meta_tower(spec.config, modality).state_dict()}
    description: dict[str, Any] = {"modality": modality, "model_cfg": spec.config}
    if is_image:
        description["preprocess_cfg"] = spec.preprocess.to_config()
    _write_folder(out, {TOWER_FILE: description}, TOWER_WEIGHTS_FILE, tensors, {} if is_image else spec.tokenizer.files, overwrite)


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

    description = json.loads((folder / TOWER_FILE).read_text())
    tower = _build_tower(description["model_cfg"], description["modality"])
    tower.load_state_dict(load_file(folder / TOWER_WEIGHTS_FILE), strict=True)
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

    is_export = (out / CONFIG_FILE).exists() or (out / TOWER_FILE).exists()
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


def load_ancestor(path: Path, config: Mapping[str, Any]) -> Bundle:
    """An ancestor: a model folder (`load_clip`), or a file of weights for the architecture `config`, which has byte pairs.

    Raises:
        UserError: as `load_clip` and `load_weights`; the folder's architecture is not that of `config`.
    """
    if not path.is_dir():
        return Bundle(ModelSpec(dict(config)), load_weights(path, config))
    model = load_clip(path)
    difference = first_difference(model.spec.config, config)
    if difference is not None:
        key, theirs, ours = difference
        raise UserError(f"{path} has {key} {theirs}, recipe key model.config.{key} is {ours}. Name the architecture of the folder.")
    return model


def load_clip(folder: Path) -> Bundle:
    """The model in a folder that `export` or open_clip wrote.

    Raises:
        UserError: the folder lacks a file, or its architecture is not supported.
    """
    from safetensors.torch import load_file

    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no {name}: not an open_clip model folder. Give one that mmlg train or open_clip wrote.")
    content = json.loads((folder / CONFIG_FILE).read_text())
    config = content["model_cfg"]
    files = {}
    if config["text_cfg"].pop("hf_tokenizer_name", None):
        files = {name: (folder / name).read_text(encoding="utf-8") for name in ("tokenizer.json", "tokenizer_config.json")}
    state = load_file(folder / WEIGHTS_FILE)
    state |= {name: state[name].reshape(1) for name in ("logit_scale", "logit_bias") if name in state}
    preprocess = Preprocess.from_config(content.get("preprocess_cfg"), str(folder / CONFIG_FILE))
    return Bundle(ModelSpec(model_config(config), preprocess, tokenizer_from_files(files)), state)
