"""JSON files that carry their own SHA-256: what a run, a data set or a family has written down is noticed to have changed.

The last entry, `content_sha256`, is the SHA-256 of the bytes before it. A file without one (of an earlier version, or written by hand) is
read as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmlg_scale.bounds import MAX_JSON_BYTES
from mmlg_scale.errors import UserError
from mmlg_scale.files import write_text_atomic
from mmlg_scale.reading import decoded, parse_object, read_bytes

KEY = "content_sha256"
_MARK = f',\n "{KEY}": "'


def record_text(content: Mapping[str, Any]) -> str:
    """The file's text. NaN and infinity are refused because they are not JSON."""
    assert content
    assert KEY not in content
    return sealed(json.dumps(content, indent=1, allow_nan=False).removesuffix("\n}"))


def sealed(body: str) -> str:
    """A record's text, `body` being that of a JSON object without the brace that closes it."""
    return f'{body}{_MARK}{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with its SHA-256, whole or not at all."""
    write_text_atomic(path, record_text(content))


def parse_record(raw: bytes, path: Path, hint: str) -> dict[str, Any]:
    """The object in the bytes of the record `path`, without its SHA-256.

    Raises:
        UserError: not a JSON object, or not the bytes that the SHA-256 is of.
    """
    content = parse_object(decoded(raw, path, hint), str(path), hint, any_depth=len(raw) > MAX_JSON_BYTES)
    if content.pop(KEY, None) is None:
        return content
    body, _, end = raw.rpartition(_MARK.encode())
    if end != f'{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode():
        raise UserError(
            f"{path} is damaged or was edited: its content does not match its SHA-256. {hint} If the edit is yours, remove the entry {KEY}."
        )
    return content


def read_record(path: Path, what: str, hint: str, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a record; raises as `reading.read_bytes` and `parse_record`."""
    return parse_record(read_bytes(path, what, hint, limit), path, hint)
