"""The learngene file: safetensors with a versioned JSON header. Everything needed to write descendants is in this one file."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mmlg_scale import towers
from mmlg_scale.digests import tensors_digest
from mmlg_scale.errors import UserError
from mmlg_scale.files import write_bytes_atomic
from mmlg_scale.learngene.auxiliary import learngene_tensors
from mmlg_scale.learngene.descend import Descendant, compose_descendant
from mmlg_scale.learngene.structure import STEM, TOWERS, Structure
from mmlg_scale.reading import one_line, parse_object, require_file, shown

FORMAT, VERSION = "mmlg-learngene", 4
READABLE = (3, VERSION)
"""Version 3 has no SHA-256 of the tensors."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHANGED = "The file was changed; extract it again."
Trained = Mapping[str, Mapping[str, Sequence[int]]]
"""Per tower the least and most `layers` and `width` that extraction trained."""


class RangeWarning(UserWarning):
    """A size outside what the learngene was trained for."""


@dataclass(frozen=True)
class Learngene:
    """Blocks, coefficients and stems, with what is needed to write models from them.

    Attributes:
        tensors: named and shaped as `Structure.shapes` says.
        structure: how layers are made of blocks.
        spec: the ancestor's configuration, preprocessing and tokenizer, which its descendants have too.
        extraction: the recipe section that made it, for the record.
        trained: the depths and widths that it was trained for.
        dtype: of the file's numbers, see `stored_dtype`. In memory all are fp32; those of a bf16 file are rounded.
    """

    tensors: dict[str, Tensor]
    structure: Structure
    spec: towers.ModelSpec
    extraction: dict[str, Any]
    trained: Trained
    dtype: str = "fp32"

    @classmethod
    def from_auxiliary(
        cls,
        structure: Structure,
        state: Mapping[str, Tensor],
        *,
        spec: towers.ModelSpec,
        extraction: Mapping[str, Any],
        trained: Trained,
        dtype: str = "fp32",
    ) -> Learngene:
        """From the state dict of a trained AuxiliaryCLIP; `dtype` as in `rounded`."""
        return cls(learngene_tensors(state), structure, spec, dict(extraction), trained).rounded(dtype)

    def rounded(self, dtype: str) -> Learngene:
        """The same learngene for a file of `dtype`, fp32 or bf16, its tensors rounded as the file will hold them."""
        tensors = {name: tensor.to(stored_dtype(name, tensor.shape, dtype)).float() for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, dtype=dtype)

    @property
    def config(self) -> dict[str, Any]:
        """The ancestor's open_clip configuration."""
        return self.spec.config

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

        A width is a multiple of the tower's head dimension; None is the ancestor's. Sizes that the learngene was not trained for are
        written too, with a RangeWarning.

        Raises:
            UserError: a depth is missing or below 1, a width does not fit, or the modality is unknown.
        """
        layers, widths = (
            dict(zip(TOWERS, (image_layers, text_layers), strict=True)),
            dict(zip(TOWERS, (image_width, text_width), strict=True)),
        )
        descendant = compose_descendant(self.structure, self.tensors, self.spec, layers=layers, widths=widths, modality=modality)
        for note in self.untrained_sizes(descendant):
            warnings.warn(note, RangeWarning, stacklevel=2)
        return descendant

    def untrained_sizes(self, descendant: Descendant) -> list[str]:
        """What of a descendant's size lies outside the depths and widths that the learngene was trained for, in words."""
        found = []
        for tower in TOWERS if descendant.modality == "both" else (descendant.modality,):
            config = descendant.spec.config
            for kind, value in (("layers", towers.num_layers(config, tower)), ("width", towers.width(config, tower))):
                least, most = self.trained[tower][kind]
                if not least <= value <= most:
                    span = f"{least} to {most}" if least < most else f"{most} only"
                    found.append(
                        f"{tower} {kind} {value}: this learngene was trained for {span}; "
                        + ("expect a model near chance." if value < least and kind == "layers" else "expect a weaker model; check it.")
                    )
        return found

    def to_bytes(self) -> bytes:
        """The file's content: the same learngene always gives the same bytes."""
        header = {
            "format": FORMAT,
            "version": VERSION,
            **self.spec.to_header(),
            "structure": self.structure.to_header(),
            "extraction": self.extraction,
            "trained": self.trained,
            "dtype": self.dtype,
        }
        tensors = {name: self.tensors[name].detach().cpu().contiguous() for name in sorted(self.tensors)}
        tensors = {name: tensor.to(stored_dtype(name, tensor.shape, self.dtype)) for name, tensor in tensors.items()}
        header["tensors_sha256"] = tensors_digest(tensors)
        # Only one entry: safetensors writes several in an order of its own.
        return save(tensors, metadata={"mmlg": json.dumps({**header, "sha256": _digest(header)}, sort_keys=True)})

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        write_bytes_atomic(Path(path), self.to_bytes())


def stored_dtype(name: str, shape: Sequence[int], dtype: str) -> torch.dtype:
    """What a tensor's numbers are in a file of `dtype`.

    bf16 is for blocks, maps, embeddings and other matrices. Coefficients and vectors are few, and an error in one shifts a whole layer;
    an error of bf16 in the logit scale is up to 2 % of the temperature. They stay fp32.
    """
    return DTYPES[dtype] if len(shape) >= 2 and not name.startswith(("coefficients", "vectors")) else torch.float32


def tensor_bytes(structure: Structure, dtype: str) -> int:
    """Bytes of a file's tensors, without its header."""
    return sum(math.prod(shape) * stored_dtype(name, shape, dtype).itemsize for name, shape in structure.shapes().items())


def load_learngene(path: str | Path) -> Learngene:
    """Read a learngene file.

    Raises:
        UserError: no such file, not a learngene, another version, damaged (its SHA-256 is compared), or tensors that do not fit the header.
    """
    path = Path(path)
    if path.is_dir() and (path / "learngene.safetensors").is_file():
        raise UserError(f"{path} is a folder. Give the file in it: {path / 'learngene.safetensors'}.")
    require_file(path, "learngene file", "mmlg extract writes one.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            header = _header(metadata, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a handle, not a mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a safetensors file: {one_line(error)}. Give the file that mmlg extract wrote.") from error
    try:
        spec = towers.ModelSpec.from_header(header, str(path))
        structure = _structure(spec.config, header["structure"], path)
        trained = {tower: {kind: _pair(header["trained"][tower][kind]) for kind in ("layers", "width")} for tower in TOWERS}
        extraction, dtype = dict(header["extraction"]), str(header.get("dtype", "fp32"))
        DTYPES[dtype]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its header is damaged ({one_line(error)}). {CHANGED}") from error
    _check(structure, tensors, dtype, path)
    if header["version"] == VERSION and header.get("tensors_sha256") != tensors_digest(tensors):
        raise UserError(f"{path} is damaged: its tensors do not match the SHA-256 in its header. Copy or extract it again.")
    if header["version"] != VERSION:
        towers.say(f"{path} is of version {header['version']} and has no SHA-256 of its tensors: damage would not be noticed.")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    return Learngene(tensors, structure, spec, extraction, trained, dtype)


def _structure(config: dict[str, Any], settings: Any, path: Path) -> Structure:
    """The structure that a header describes. What a recipe's author would be told of keys is the file's damage here."""
    try:
        return Structure(config, **settings)
    except UserError as error:
        what = str(error).removeprefix("recipe key extraction").lstrip(".: ")
        raise UserError(f"{path}: its header is damaged ({what.rstrip('.')}). {CHANGED}") from error


def _pair(value: Any) -> list[int]:
    least, most = value
    if not (type(least) is int and type(most) is int):
        raise ValueError(f"{value!r} is no range")
    return [least, most]


def _digest(header: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _header(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    hint = "Give the file that mmlg extract wrote."
    if "mmlg" not in metadata:
        raise UserError(f"{path} has no learngene header. {hint}")
    header = parse_object(metadata["mmlg"], f"{path}: its learngene header", hint)
    form, version = header.get("format"), header.get("version")
    if form != FORMAT or version not in READABLE:
        raise UserError(
            f"{path} is {shown(form)!r} version {shown(version)}; this program reads {FORMAT!r} version {VERSION}. Extract it again."
        )
    try:
        unchanged = header.pop("sha256", None) == _digest(header)
    except (ValueError, RecursionError):  # half of a surrogate pair, or too deep
        unchanged = False
    if not unchanged:
        raise UserError(f"{path}: the header does not match its own digest. {CHANGED}")
    return header


def _check(structure: Structure, tensors: Mapping[str, Tensor], dtype: str, path: Path) -> None:
    """Compare every tensor's shape and type with what the header asks for; its numbers are finite."""
    expected = structure.shapes()
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted({*expected, *found}):
        if name not in found:
            raise UserError(f"{path} has no tensor {name}. {CHANGED}")
        if expected.get(name) != found[name]:
            raise UserError(f"{path}: tensor {shown(name)} has shape {found[name]}, its header asks for {expected.get(name)}. {CHANGED}")
        wanted = stored_dtype(name, found[name], dtype)
        if tensors[name].dtype != wanted:
            kinds = [str(kind).removeprefix("torch.") for kind in (tensors[name].dtype, wanted)]
            raise UserError(f"{path}: tensor {name} holds {kinds[0]} numbers, not {kinds[1]}. {CHANGED}")
        # The sum is finite only where all are; where it overflows, each is looked at.
        if not tensors[name].sum().isfinite() and not tensors[name].isfinite().all():
            raise UserError(f"{path}: tensor {name} holds numbers that are NaN or infinite. {CHANGED}")
