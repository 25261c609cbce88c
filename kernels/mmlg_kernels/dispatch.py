"""Which backend computes a loss where."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "chunked", "reference")
HAS_TRITON = importlib.util.find_spec("triton") is not None
_said: set[Any] = set()
_log = logging.getLogger("mmlg_kernels")


def choose(backend: str, image_BD: Tensor) -> str:
    """The backend to run: the named one, or for `auto` the best for the tensors' device.

    Raises:
        ValueError: no such backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; valid: {', '.join(BACKENDS)}")
    if backend != "auto":
        return backend
    name, reason = _auto(image_BD)
    # Once for each kind of input, and not from inside a compiled graph.
    if not torch.compiler.is_compiling() and (key := (image_BD.device.type, image_BD.dtype)) not in _said:
        _said.add(key)
        _log.debug("backend auto: %s for %s on %s, since %s", name, image_BD.dtype, image_BD.device.type, reason)
    return name


def _auto(image_BD: Tensor) -> tuple[str, str]:
    """A backend and why."""
    if image_BD.device.type != "cuda":
        return "chunked", "Triton runs on GPUs"
    if image_BD.dtype == torch.float64:
        return "chunked", "the Triton kernels accumulate in fp32"
    if not HAS_TRITON:
        return "chunked", "triton is not installed"
    return "triton", "a GPU and triton are there"
