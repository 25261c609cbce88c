"""What ranks agree on: the first one decides what exists on disk, and all learn its answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from mmlg_scale.errors import FollowingError, UserError, in_words

T = TypeVar("T")


def gloo_group() -> dist.ProcessGroup:
    """A group of all ranks for what is on the host. As patient as the default group, whose timeout it would not have. Collective."""
    from mmlg_kernels import exchange

    return dist.new_group(backend="gloo", timeout=exchange.timeout)


def several_ranks() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first_rank() -> bool:
    """Whether this process is the one that writes, and tells the user what all ranks know."""
    return not several_ranks() or dist.get_rank() == 0


def on_first_rank(work: Callable[[], T]) -> T:
    """Run `work` on the first rank and return its result, which must be picklable, on every rank. Collective.

    Raises:
        UserError: what `work` raised, on every rank; none is left waiting. What the machine refuses is one on the other ranks.
        FollowingError: on the other ranks, where `work` raised anything else.
    """
    if not several_ranks():
        return work()
    answer: list[Any] = [None, None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            answer[0] = work()
        except Exception as error:
            line = str(error) if isinstance(error, UserError) else in_words(error)
            answer[1] = ("internal", repr(error)) if line is None else ("user", line)
            failure = error
    dist.broadcast_object_list(answer, src=0)
    if failure is not None:
        raise shared(failure)
    if answer[1] is not None:
        kind, message = answer[1]
        raise shared(UserError(message) if kind == "user" else FollowingError(f"the first rank failed: {message}"))
    return answer[0]


def shared(error: Exception) -> Exception:
    """`error`, which every rank raises, marked as such."""
    error.on_every_rank = True  # type: ignore[attr-defined]
    return error


def on_every_rank(error: BaseException) -> bool:
    """Whether every rank has raised this error, or one that follows from it, so that none waits for another."""
    return getattr(error, "on_every_rank", False) is True
