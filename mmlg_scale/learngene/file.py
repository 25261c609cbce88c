"""The learngene file: safetensors with a versioned JSON header. Everything needed to write descendants is in this one file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mmlg_scale import towers
from mmlg_scale.errors import UserError
from mmlg_scale.files import write_bytes_atomic
from mmlg_scale.learngene.auxiliary import TOWERS, AuxiliaryCLIP, common_layout
from mmlg_scale.learngene.blocks import BlockLayout
from mmlg_scale.learngene.descend import Descendant, compose_descendant

FORMAT, VERSION = "mmlg-learngene", 1
BLOCK_TENSORS = ("multimodal", *(f"{kind}_{tower}" for kind in ("unimodal", "coefficients", "vectors") for tower in TOWERS))


@dataclass(frozen=True)
class Learngene:
    """Blocks, coefficients and stems, with what is needed to write models from them.

    Attributes:
        tensors: the auxiliary model's state dict: `multimodal` [K_M, P], `unimodal_*` [K_U, P], `coefficients_*` [R, G, K],
            `vectors_*` [R, V], and the stems under `stem.` with open_clip's names.
        config: the ancestor's open_clip configuration.
        tokenizer_files: name -> content, for sets whose tokenizer travels with the model.
        extraction: the recipe section that made it, for the record.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    tokenizer_files: dict[str, str]
    extraction: dict[str, Any]

    @classmethod
    def from_auxiliary(
        cls, config: dict[str, Any], state: Mapping[str, Tensor], *, tokenizer_files: Mapping[str, str], extraction: Mapping[str, Any]
    ) -> Learngene:
        """From the state dict of a trained AuxiliaryCLIP."""
        return cls(dict(state), config, dict(tokenizer_files), dict(extraction))

    @property
    def layout(self) -> BlockLayout:
        """The blocks' flat layout."""
        return common_layout(self.config)

    @property
    def num_params(self) -> int:
        """All numbers in the file."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def block_params(self) -> int:
        """Numbers in blocks, coefficients and vectors."""
        return sum(self.tensors[name].numel() for name in BLOCK_TENSORS)

    @property
    def stem_params(self) -> int:
        """Numbers in the stems and the logit scale."""
        return self.num_params - self.block_params

    def descend(self, *, image_layers: int | None = None, text_layers: int | None = None, modality: str = "both") -> Descendant:
        """Write a plain CLIP, or one tower of it, of any depth: closed form, no data.

        Raises:
            UserError: a depth is missing or below 1, or the modality is unknown.
        """
        return compose_descendant(
            self.tensors,
            self.config,
            self.layout,
            image_layers=image_layers,
            text_layers=text_layers,
            modality=modality,
            tokenizer_files=self.tokenizer_files,
        )

    def to_bytes(self) -> bytes:
        """The file's content: the same learngene always gives the same bytes."""
        header = {
            "format": FORMAT,
            "version": VERSION,
            "model_config": self.config,
            "layout": self.layout.to_header(),
            "tokenizer_files": self.tokenizer_files,
            "extraction": self.extraction,
        }
        tensors = {name: self.tensors[name].detach().cpu().contiguous() for name in sorted(self.tensors)}
        return save(tensors, metadata={"mmlg": json.dumps(header, sort_keys=True)})

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_bytes_atomic(path, self.to_bytes())


def load_learngene(path: str | Path) -> Learngene:
    """Read a learngene file.

    Raises:
        UserError: no such file, not a learngene, another version, or tensors that do not fit the header.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no learngene file {path}. mmlg extract writes one.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a handle, not a mapping)
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file: {error}. Give the file that mmlg extract wrote.") from error
    try:
        header = json.loads(metadata["mmlg"])
        form, version = header["format"], header["version"]
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} has no learngene header. Give the file that mmlg extract wrote.") from error
    if form != FORMAT or version != VERSION:
        raise UserError(f"{path} is {form!r} version {version}; this program reads {FORMAT!r} version {VERSION}. Extract it again.")
    learngene = Learngene(tensors, towers.model_config(header["model_config"]), header["tokenizer_files"], header["extraction"])
    _check(learngene, header, path)
    return learngene


def _check(learngene: Learngene, header: Mapping[str, Any], path: Path) -> None:
    """Compare every tensor's shape with what the header's configuration asks for."""
    if header["layout"] != json.loads(json.dumps(learngene.layout.to_header())):
        raise UserError(f"{path}: the header's layout is not that of its model configuration. The file was changed; extract it again.")
    missing = [name for name in BLOCK_TENSORS if name not in learngene.tensors]
    if missing:
        raise UserError(f"{path} lacks the tensor {missing[0]}. The file was changed; extract it again.")
    coefficients = learngene.tensors["coefficients_image"].shape
    num_multimodal, num_unimodal = (learngene.tensors[name].shape[0] for name in ("multimodal", "unimodal_image"))
    model = AuxiliaryCLIP.empty(learngene.config, num_multimodal=num_multimodal, num_unimodal=num_unimodal, num_knots=coefficients[0])
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in learngene.tensors.items()}
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{path}: tensor {name} has shape {found.get(name)}, its header asks for {expected.get(name)}. "
                "The file was changed; extract it again."
            )
