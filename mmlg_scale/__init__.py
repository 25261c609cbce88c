"""mmlg_scale: one big CLIP, a small learngene distilled out of it once, and CLIPs of any depth written from the learngene."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmlg_scale.learngene.file import Learngene, load_learngene

__all__ = ["Learngene", "load_learngene"]


def __getattr__(name: str) -> Any:
    """Import torch only when something that needs it is asked for, so that `mmlg --help` stays quick."""
    if name in __all__:
        from mmlg_scale.learngene import file

        return getattr(file, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
