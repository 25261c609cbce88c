"""What ranks agree on: the first one decides what exists on disk, and all learn its answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from mmlg_scale.errors import UserError

T = TypeVar("T")


def several_ranks() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first_rank() -> bool:
    """Whether this process is the one that writes, and tells the user what all ranks know."""
    return not several_ranks() or dist.get_rank() == 0


def on_first_rank(work: Callable[[], T]) -> T:
    """Run `work` on the first rank and return its result, which must be picklable, on every rank. Collective.

    Raises:
        UserError: what `work` raised, on every rank; none is left waiting.
        RuntimeError: on the other ranks, where `work` raised anything else.
    """
    if not several_ranks():
        return work()
    answer: list[Any] = [None, None]
    failure: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            answer[0] = work()
        except UserError as error:
            answer[1] = ("user", str(error))
            failure = error
        except Exception as error:
            answer[1] = ("internal", repr(error))
            failure = error
    dist.broadcast_object_list(answer, src=0)
    if failure is not None:
        raise failure
    if answer[1] is not None:
        kind, message = answer[1]
        raise UserError(message) if kind == "user" else RuntimeError(f"the first rank failed: {message}")
    return answer[0]
