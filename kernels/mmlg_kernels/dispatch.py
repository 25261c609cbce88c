"""Which backend computes a loss where."""

from __future__ import annotations

import functools
import logging

from torch import Tensor

BACKENDS = ("auto", "chunked", "reference")
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
    return _auto(image_BD.device.type)


@functools.cache
def _auto(device_type: str) -> str:
    _log.debug("backend auto: chunked on %s, since it runs on every device and stores no B x B matrix", device_type)
    return "chunked"
