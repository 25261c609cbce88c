"""state.json of a launch folder: which job it is, and of which launcher."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmlg_launchers.interface import LaunchError

STATE_FILE = "state.json"
MAX_BYTES = 10_000_000


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the record, whole or not at all. Raises OSError."""
    temporary = folder / f".{STATE_FILE}.tmp"
    temporary.unlink(missing_ok=True)  # a symbolic link in its place would be followed
    temporary.write_text(json.dumps(state, indent=1))
    os.replace(temporary, folder / STATE_FILE)


def read_state(folder: Path) -> dict[str, Any]:
    """The record. Raises LaunchError where there is none, or it is damaged."""
    file = folder / STATE_FILE
    try:
        with open(file, "rb") as opened:
            state = json.loads(opened.read(MAX_BYTES))
    except FileNotFoundError as error:
        raise LaunchError(f"{folder} has no {STATE_FILE}: nothing was launched there.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise LaunchError(f"{file} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(state, dict):
        raise LaunchError(f"{file} is no record of a launch.")
    return state
