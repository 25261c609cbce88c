"""Reading weights that others wrote: whatever is wrong with a file becomes one line, and nothing in it is run."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmlg_scale.digests import tensors_digest
from mmlg_scale.errors import UserError
from mmlg_scale.reading import one_line, open_regular, parse_object, require_file, shown

DIGEST = "mmlg_sha256"
"""Key of the SHA-256 of the tensors in safetensors' metadata."""
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# torch's older format starts with this number as a pickle of protocol 2 or 3 (the byte in front). Anything else that torch.load takes for a
# pickle or a tar file never reaches it.
_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "module")


def is_folder(path: Path) -> bool:
    """Whether a folder is there; False also where that cannot be known."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def require_folder(path: Path) -> None:
    """Raise UserError unless `path` is a folder that can be read."""
    if not is_folder(path):
        require_file(path, "model folder", "Give the path of an existing one.")
        raise UserError(f"{path} is a file, not a model folder. Give the folder that mmlg train or open_clip wrote.")
    try:
        next(path.iterdir(), None)
    except OSError as error:
        raise UserError(f"model folder {path} cannot be read ({one_line(error)}). Make it readable.") from error


def read_tensors(path: Path) -> tuple[dict[str, Any], str]:
    """The entries of a file of weights, with their own names, and a sentence on state dicts that were left out ('' where there are none).

    What the file is, is told by its content. Values that are not dense CPU tensors can occur.

    Raises:
        UserError: what the file holds cannot be read as a state dict, with the reason.
    """
    hint = "Fetch it again, or save the model's state_dict() as safetensors."
    size = require_file(path, "file of weights", "Give the path of an existing one, or of a model folder.")
    if path.suffix.lower() not in WEIGHT_SUFFIXES:
        raise UserError(f"{path} does not have the name of a weights file. Give one of {', '.join(WEIGHT_SUFFIXES)}, or a model folder.")
    try:
        with open_regular(path) as file:
            head = file.read(256)
    except OSError as error:
        raise UserError(f"file of weights {path} cannot be read ({one_line(error)}). Make it readable.") from error
    _refuse_impostor(path, head, size)
    try:
        if head[8:9] == b"{" or path.suffix.lower() == ".safetensors":
            return _read_safetensors(path, head, size), ""
        content = _read_torch(path, head)
        return _state_dict(content, path)
    except UserError:
        raise
    except Exception as error:  # of every kind, depending on which byte is damaged
        raise UserError(f"{path} is damaged or not a file of weights ({one_line(error)}). {hint}") from error


def _refuse_impostor(path: Path, head: bytes, size: int) -> None:
    """What is saved in place of weights by mistake."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if size == 0:
        raise UserError(f"{path} is empty (0 bytes). Fetch it again.")
    if text.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the weights: run git lfs pull in its repository.")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")):
        raise UserError(f"{path} is a web page (HTML), saved instead of the weights. Fetch the file itself.")
    if text.startswith((b"{", b"[")):
        raise UserError(f"{path} is text (JSON), not weights. Give the file with the tensors.")
    if text.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"bzh", b"\xfd7zxz")):
        raise UserError(f"{path} is a compressed file. Unpack it first.")


def _read_safetensors(path: Path, head: bytes, size: int) -> dict[str, Any]:
    from safetensors.torch import load_file

    stated = _stated_digest(path, head, size)
    try:
        tensors = dict(load_file(path))
    except Exception as error:
        raise UserError(f"{path} is not a safetensors file ({one_line(error)}). Fetch it again.") from error
    if stated is not None and stated != tensors_digest(tensors):
        raise UserError(f"{path} is damaged: its tensors do not match the SHA-256 in its header. Fetch or export it again.")
    return tensors


def signed(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata for safetensors' `save`: on the CPU, with their SHA-256, which `read_tensors` compares."""
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return dense, {DIGEST: tensors_digest(dense)}


def stated_digest(path: Path) -> str | None:
    """The SHA-256 of its tensors that the header of a safetensors file states. Raises UserError where it cannot be read."""
    size = require_file(path, "file of weights", "Take the folder as it was exported.")
    try:
        with open_regular(path) as file:
            head = file.read(256)
        return _stated_digest(path, head, size)
    except OSError as error:
        raise UserError(f"file of weights {path} cannot be read ({one_line(error)}). Make it readable.") from error


def _stated_digest(path: Path, head: bytes, size: int) -> str | None:
    """The SHA-256 in a safetensors file's header, where we wrote it; the file's size is compared with what the header asks for."""
    length = struct.unpack("<Q", head[:8])[0] if size >= 8 else 0
    if head[8:9] != b"{" or length >= 10**8:
        return None
    with open_regular(path) as file:
        file.seek(8)
        header = file.read(length)
    if len(header) < length:
        raise UserError(f"{path} is cut off: {size} of at least {8 + length} bytes are there. Fetch it again.")
    tensors = parse_object(header.decode("utf-8", "replace"), f"the header of {path}", "Fetch it again.")
    metadata = tensors.pop("__metadata__", None)
    try:
        ends = [int(entry["data_offsets"][1]) for entry in tensors.values()]
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is damaged: its header does not say where each tensor is. Fetch it again.") from error
    if ends and size < 8 + length + max(ends):
        raise UserError(f"{path} is cut off: {size} of {8 + length + max(ends)} bytes are there. Fetch it again.")
    return metadata.get(DIGEST) if isinstance(metadata, dict) else None


def _read_torch(path: Path, head: bytes) -> Any:
    is_zip = head.startswith(b"PK\x03\x04")
    if is_zip:
        _check_archive(path)
    elif head[:1] != b"\x80" or head[2 : 2 + len(_LEGACY_MAGIC)] != _LEGACY_MAGIC:
        kind = "a pickle of another program" if head[:1] == b"\x80" else "neither a torch nor a safetensors file"
        raise UserError(f"{path} is {kind}. Save the model's state_dict() as safetensors.")
    # From memory, torch does not try the tar files of its first versions, which would be unpacked to disk.
    source: Any = path if is_zip else io.BytesIO(_content(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(source, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        found = re.search(r"GLOBAL (\S+) was not an allowed global|Unsupported (?:global|class)[: ]+(?:GLOBAL )?(\S+)", str(error))
        if found:
            raise UserError(
                f"{path} contains a pickled {shown(found[1] or found[2])}, not only tensors, and is not unpickled. Save the model's "
                "state_dict() by itself, preferably as safetensors."
            ) from error
        raise UserError(f"{path} is damaged, cut off, or not a state dict ({one_line(error)}). Fetch it again.") from error


def _content(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read()


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise UserError(f"{path} is cut off or damaged ({one_line(error)}). Fetch it again.") from error
    names = [member.filename for member in members]
    if any(name.partition("/")[2] == "constants.pkl" for name in names):
        raise UserError(
            f"{path} is a TorchScript archive, which is a program and is not loaded. Save its state_dict() by itself, preferably as "
            "safetensors."
        )
    if not any(name.partition("/")[2] == "data.pkl" for name in names):
        raise UserError(f"{path} is a ZIP archive, but not one that torch.save wrote. Give the file with the weights.")
    # torch.save compresses nothing; a few compressed kilobytes could fill the memory.
    if any(member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size for member in members):
        raise UserError(f"{path} is a compressed ZIP archive, which torch.save does not write. Save the state_dict() again.")


def _state_dict(content: Any, path: Path) -> tuple[dict[str, Any], str]:
    """The state dict in a checkpoint's dictionary, and what of the same kind was left out."""
    if not isinstance(content, Mapping):
        kind = "one tensor" if isinstance(content, torch.Tensor) else f"a {type(content).__name__}"
        raise UserError(f"{path} contains {kind}, not a state dict. Save the model's state_dict() as safetensors.")
    left_out = []
    for _ in range(3):  # a checkpoint's `model` can be a checkpoint
        key = next((key for key in _STATE_DICT_KEYS if isinstance(content.get(key), Mapping)), None)
        if key is None:
            break
        left_out += [shown(other) for other, value in content.items() if other != key and _is_state_dict(value)]
        content = content[key]
    if not _is_state_dict(content):
        keys = ", ".join(shown(key) for key in list(content)[:6]) or "nothing"
        raise UserError(f"{path} has no state dict: its keys are {keys}. Save the model's state_dict() as safetensors.")
    told = f"{path} also contains weights under {', '.join(left_out)}, which are not read." if left_out else ""
    return {str(name): value for name, value in content.items()}, told


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(entry, torch.Tensor) for entry in value.values())
