"""Reading files that others wrote: each is a regular file of bounded size, and whatever is wrong with it is one line.

Imports nothing heavy: the command line reads recipes through here.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from mmlg_scale.bounds import MAX_JSON_BYTES, MAX_JSON_DEPTH
from mmlg_scale.errors import UserError, is_of_the_machine


def shown(value: Any) -> str:
    """Something that a file says, for a message: on one line, printable, bounded."""
    text = "".join(letter if letter.isprintable() else "?" for letter in str(value)[:161])
    return text if len(text) <= 160 else f"{text[:150]}…"


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, bounded; its type where it says nothing."""
    lines = str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines()  # torch puts a page of advice in front
    return shown(lines[0].strip().rstrip(".")) if lines else type(error).__name__


def open_regular(path: str | os.PathLike[str], *, buffering: int = -1) -> BinaryIO:
    """Open a regular file for reading. A pipe, a socket or a device in its place is refused and never waited for.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb", buffering)


def require_file(path: Path, what: str, hint: str) -> int:
    """The size in bytes of the regular file `path`.

    Raises:
        UserError: there is none, or it is something else (a folder, a pipe, a broken link).
        OSError: the machine refuses (`errors.is_of_the_machine`).
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        if os.path.islink(path):
            raise UserError(f"{path} is a broken link to {os.readlink(path)}. {hint}") from error
        if isinstance(error, FileNotFoundError):
            raise UserError(f"no {what} {path}. {hint}") from error
        if is_of_the_machine(error):
            raise
        raise UserError(f"{what} {str(path)!r} cannot be read ({one_line(error)}). {hint}") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise UserError(f"{path} is {kind}, not a {what}. {hint}")
    return status.st_size


def read_bytes(path: Path, what: str, hint: str, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes.

    Raises:
        UserError, OSError: as `require_file`; it is longer, or a Git LFS pointer.
    """
    size = require_file(path, what, hint)
    if size > limit:
        raise UserError(f"{path} has {size} bytes, a {what} has at most {limit}. {hint}")
    try:
        with open_regular(path) as file:
            content = file.read(limit + 1)
    except OSError as error:
        if is_of_the_machine(error):
            raise
        raise UserError(f"{what} {path} cannot be read ({one_line(error)}). {hint}") from error
    if len(content) > limit:
        raise UserError(f"{path} has more than the {limit} bytes that a {what} has at most. {hint}")
    if content.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the file itself: run git lfs pull in its repository.")
    return content


def decoded(content: bytes, path: Path, hint: str) -> str:
    """The UTF-8 text in the content of the file `path`. Raises UserError for other encodings."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}). {hint}") from error


def read_text(path: Path, what: str, hint: str, limit: int) -> str:
    """The UTF-8 text of a file; raises as `read_bytes`, and for other encodings."""
    return decoded(read_bytes(path, what, hint, limit), path, hint)


def parse_json(text: str, where: str, hint: str, *, any_depth: bool = False) -> Any:
    """The JSON value in `text`.

    Args:
        any_depth: for manifests, which can be huge and are taken apart where they are read.

    Raises:
        UserError: not JSON, or nested too deeply; the message starts with `where`.
    """
    try:
        value = json.loads(text)
        # Whatever is done with a deeper value would fail somewhere.
        if not any_depth and not _is_shallow(value):
            raise RecursionError
    except RecursionError as error:
        raise UserError(f"{where} is JSON nested too deeply. {hint}") from error
    except ValueError as error:
        raise UserError(f"{where} is damaged: it is not JSON ({one_line(error)}). {hint}") from error
    return value


def _is_shallow(value: Any) -> bool:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_JSON_DEPTH):
        level = [item for part in level for item in (part.values() if isinstance(part, dict) else part) if isinstance(item, (dict, list))]
        if not level:
            return True
    return False


def parse_object(text: str, where: str, hint: str, *, any_depth: bool = False) -> dict[str, Any]:
    """The JSON object in `text`. Raises as `parse_json`, and for another kind of value."""
    value = parse_json(text, where, hint, any_depth=any_depth)
    if not isinstance(value, dict):
        raise UserError(f"{where} is a JSON {type(value).__name__}, not an object. {hint}")
    return value


def read_json(path: Path, what: str, hint: str, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file; raises as `read_text` and `parse_object`."""
    return parse_object(read_text(path, what, hint, limit), str(path), hint)
