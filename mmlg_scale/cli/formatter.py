"""How `--help` looks: a usage line written by hand, defaults that say something, examples at the end."""

from __future__ import annotations

import argparse
from typing import Any

from jsonargparse import DefaultHelpFormatter

EXAMPLES = "examples:"


class HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's formatter without types, which the help's own words say, and without defaults that are empty."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"max_help_position": 26, **kwargs})

    def start_section(self, heading: str | None) -> None:
        super().start_section("arguments" if heading == "positional arguments" else heading)

    def _get_help_string(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._HelpAction):
            return "Show this help and exit."
        told = action.help or ""
        if action.required and action.option_strings:
            return f"{told} Required."
        if action.option_strings and action.default not in (None, False, True, argparse.SUPPRESS):
            default = action.default
            shown = " ".join(f"{value!r}" for value in default) if isinstance(default, list) else default
            return f"{told} Default: {shown}."
        return told

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Paragraphs are filled; examples stay as they are, so that they can be copied."""
        if text.startswith(EXAMPLES):
            return text
        return super()._fill_text(text, width, indent)
