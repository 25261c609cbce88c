"""The `mmlg` command: one module a family of commands. Parse, call, print; no logic."""

from mmlg_scale.cli.main import main

__all__ = ["main"]
