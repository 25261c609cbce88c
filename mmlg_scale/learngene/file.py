"""The learngene file: safetensors with a versioned JSON header. Everything needed to write descendants is in this one file."""

from __future__ import annotations

import hashlib
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
from mmlg_scale.learngene.auxiliary import learngene_tensors
from mmlg_scale.learngene.descend import Descendant, compose_descendant
from mmlg_scale.learngene.structure import STEM, TOWERS, Structure

FORMAT, VERSION = "mmlg-learngene", 2
CHANGED = "The file was changed; extract it again."


@dataclass(frozen=True)
class Learngene:
    """Blocks, coefficients and stems, with what is needed to write models from them.

    Attributes:
        tensors: named and shaped as `Structure.shapes` says.
        structure: the ancestor's configuration, and how layers are made of blocks.
        tokenizer_files: name -> content, for sets whose tokenizer travels with the model.
        extraction: the recipe section that made it, for the record.
    """

    tensors: dict[str, Tensor]
    structure: Structure
    tokenizer_files: dict[str, str]
    extraction: dict[str, Any]

    @classmethod
    def from_auxiliary(
        cls, structure: Structure, state: Mapping[str, Tensor], *, tokenizer_files: Mapping[str, str], extraction: Mapping[str, Any]
    ) -> Learngene:
        """From the state dict of a trained AuxiliaryCLIP."""
        return cls(learngene_tensors(state), structure, dict(tokenizer_files), dict(extraction))

    @property
    def config(self) -> dict[str, Any]:
        """The ancestor's open_clip configuration."""
        return self.structure.config

    @property
    def num_params(self) -> int:
        """All numbers in the file."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def block_params(self) -> int:
        """Numbers in blocks, coefficients, vectors and maps."""
        return self.num_params - self.stem_params

    @property
    def stem_params(self) -> int:
        """Numbers in the stems and the logit scale."""
        return sum(tensor.numel() for name, tensor in self.tensors.items() if name.startswith(STEM))

    def descend(
        self,
        *,
        image_layers: int | None = None,
        text_layers: int | None = None,
        image_width: int | None = None,
        text_width: int | None = None,
        modality: str = "both",
    ) -> Descendant:
        """Write a plain CLIP, or one tower of it, of any depth and of any residual width up to the ancestor's: closed form, no data.

        A width is a multiple of the tower's head dimension; None is the ancestor's.

        Raises:
            UserError: a depth is missing or below 1, a width does not fit, or the modality is unknown.
        """
        return compose_descendant(
            self.structure,
            self.tensors,
            layers=dict(zip(TOWERS, (image_layers, text_layers), strict=True)),
            widths=dict(zip(TOWERS, (image_width, text_width), strict=True)),
            modality=modality,
            tokenizer_files=self.tokenizer_files,
        )

    def to_bytes(self) -> bytes:
        """The file's content: the same learngene always gives the same bytes."""
        header = {
            "format": FORMAT,
            "version": VERSION,
            "model_config": self.config,
            "structure": self.structure.to_header(),
            "tokenizer_files": self.tokenizer_files,
            "extraction": self.extraction,
        }
        tensors = {name: self.tensors[name].detach().cpu().contiguous() for name in sorted(self.tensors)}
        # One entry alone: safetensors writes several in an order of its own.
        return save(tensors, metadata={"mmlg": json.dumps({**header, "sha256": _digest(header)}, sort_keys=True)})

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
    header = _header(metadata, path)
    structure = Structure(towers.model_config(header["model_config"]), **header["structure"])
    _check(structure, tensors, path)
    return Learngene(tensors, structure, header["tokenizer_files"], header["extraction"])


def _digest(header: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _header(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    try:
        header = json.loads(metadata["mmlg"])
        form, version = header["format"], header["version"]
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} has no learngene header. Give the file that mmlg extract wrote.") from error
    if form != FORMAT or version != VERSION:
        raise UserError(f"{path} is {form!r} version {version}; this program reads {FORMAT!r} version {VERSION}. Extract it again.")
    if header.pop("sha256", None) != _digest(header):
        raise UserError(f"{path}: the header does not match its own digest. {CHANGED}")
    return header


def _check(structure: Structure, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Compare every tensor's shape with what the header asks for."""
    expected = structure.shapes()
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted({*expected, *found}):
        if name not in found:
            raise UserError(f"{path} lacks the tensor {name}. {CHANGED}")
        if expected.get(name) != found[name]:
            raise UserError(f"{path}: tensor {name} has shape {found[name]}, its header asks for {expected.get(name)}. {CHANGED}")
