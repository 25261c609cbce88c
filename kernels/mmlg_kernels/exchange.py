"""What ranks exchange for a loss over all pairs: one tower's rows, sums over columns, and the gradient of the rows that travelled.

Across ranks each holds B rows of images against all G = W B columns of texts. The texts travel once, while the pairs of this rank's own
texts are computed; row sums are complete on their rank, column sums are combined over ranks. In the backward pass the gradients of the
others' texts travel while those of the own texts are computed; they are summed over ranks, and each takes its own rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

# torch imports it on its own at an operator's first call: too late, since its default arguments then keep the group alive.
import torch.distributed.nn.functional
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

# torch 2.13 renamed them.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
# Weak: a group kept alive past destroy_process_group keeps its threads, and gloo's abort a process that ends while they let go of tensors.
_over_gloo: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
timeout: timedelta | None = None
"""Of groups that are made here, which do not take the default group's; None: torch's own."""


def name_group(group: Any) -> str:
    """The name under which torch, and so the operators, find `group`; empty for no group or a group of one."""
    if group is None or dist.get_world_size(group) == 1:
        return ""
    return str(group.group_name)


def _group(name: str) -> Any:
    return _resolve_process_group(name)  # type: ignore[arg-type]  # a string, whose type torch 2.10 named


def check_shape(local_BD: Tensor, group_name: str) -> None:
    """Raise ValueError on every rank, with the shapes, where the ranks pass different ones. Collective, at every call of a loss.

    No rank may leave it out, whatever it has passed before: one that meets a new shape would wait for ranks that know theirs. Two numbers
    travel from host to host, over gloo where the group's own backend is another one, so that no rank waits for its device.
    """
    if not group_name:
        return
    group, (rows, width) = _host_group(group_name), local_BD.shape
    most = torch.tensor([rows, -rows, width, -width])
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    if torch.equal(most[::2], -most[1::2]):
        return
    shapes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(shapes, tuple(local_BD.shape), group=group)
    said = ", ".join(f"rank {rank}: {list(shape)}" for rank, shape in enumerate(shapes))
    raise ValueError(f"every rank must pass features of one shape, got {said}")


def _host_group(name: str) -> Any:
    """The group, or one over gloo of the same ranks, made at the first call."""
    group = _group(name)
    if dist.get_backend(group) == "gloo":
        return group
    if group not in _over_gloo:
        ranks = dist.get_process_group_ranks(group)
        _over_gloo[group] = dist.new_group(ranks, timeout=timeout, backend="gloo", use_local_synchronization=True)
    return _over_gloo[group]


def world_size(group_name: str) -> int:
    """Ranks in the group; one without a group."""
    return dist.get_world_size(_group(group_name)) if group_name else 1


def first_column(num_rows: int, group_name: str) -> int:
    """Where this rank's rows begin among all."""
    return dist.get_rank(_group(group_name)) * num_rows if group_name else 0


class Part(NamedTuple):
    """Some columns, where they lie among all, and which of them belongs to row 0 (none of them, if beyond the last)."""

    where: slice
    first: int


class Gathering:
    """All ranks' rows of several tensors [B, ...], which begin to travel at once."""

    def __init__(self, local: tuple[Tensor, ...], group_name: str) -> None:
        self.local, self.group_name = tuple(rows.contiguous() for rows in local), group_name
        self._all, self._under_way = self.local, []
        if group_name:
            count, group = world_size(group_name), _group(group_name)
            self._all = tuple(rows.new_empty(count * rows.shape[0], *rows.shape[1:]) for rows in self.local)
            self._under_way = [
                _all_gather(whole, rows, group=group, async_op=True) for whole, rows in zip(self._all, self.local, strict=True)
            ]

    def parts(self) -> Iterator[tuple[Part, tuple[Tensor, ...]]]:
        """This rank's rows, which are there already, and then the others'."""
        count = self.local[0].shape[0]
        own, *others = parts_of(count, self.group_name)
        yield own, self.local
        for part in others:
            yield part, tuple(whole[part.where] for whole in self.whole())

    def whole(self) -> tuple[Tensor, ...]:
        """The rows of all ranks, one rank after the other; waits for them."""
        for work in self._under_way:
            work.wait()
        self._under_way = []
        return self._all


def parts_of(num_rows: int, group_name: str) -> list[Part]:
    """The columns of this rank's own rows, then those before and after them."""
    first, count = first_column(num_rows, group_name), num_rows * world_size(group_name)
    own = Part(slice(first, first + num_rows), 0)
    others = (slice(0, first), slice(first + num_rows, count))
    return [own] + [Part(where, count) for where in others if where.stop > where.start]


class PartBackward(Protocol):
    """Adds some columns' share of the gradient to dx, and those columns' own gradient to dy."""

    def __call__(self, part: Part, dx_BD: Tensor, dy_GD: Tensor, /) -> None: ...


def backward(x_BD: Tensor, dtype: torch.dtype, group_name: str, add: PartBackward) -> tuple[Tensor, Tensor]:
    """(dx [B, D], this rank's rows of the sum of dy over ranks, [B, D]), in `dtype`. The others' gradients travel during the own part."""
    dx = torch.zeros_like(x_BD, dtype=dtype, memory_format=torch.contiguous_format)
    own, *others = parts_of(x_BD.shape[0], group_name)
    if not others:
        dy = torch.zeros_like(dx)
        add(own, dx, dy)
        return dx, dy
    total = dx.new_zeros(x_BD.shape[0] * world_size(group_name), x_BD.shape[1])
    for part in others:
        add(part, dx, total[part.where])
    summed, work = _start_scatter(total, group_name)
    dy = torch.zeros_like(dx)
    add(own, dx, dy)
    work.wait()
    return dx, dy.add_(summed)


def _start_scatter(total_GD: Tensor, group_name: str) -> tuple[Tensor, Any]:
    """This rank's rows of the sum over ranks, and what to wait for before they are read."""
    group, count = _group(group_name), total_GD.shape[0] // world_size(group_name)
    if dist.get_backend(group) == "nccl":
        own = torch.empty_like(total_GD[:count])
        return own, _reduce_scatter(own, total_GD, group=group, async_op=True)
    # gloo has no reduce-scatter for every dtype
    work = dist.all_reduce(total_GD, group=group, async_op=True)
    return total_GD[first_column(count, group_name) :][:count], work


def gather_rows(local: Tensor, group_name: str) -> Tensor:
    """All ranks' rows one after the other, without gradient."""
    return Gathering((local,), group_name).whole()[0]


def combine_lse(partial_G: Tensor, group_name: str) -> Tensor:
    """log-sum-exp over ranks of each rank's log-sum-exps."""
    if not group_name:
        return partial_G
    return torch.logsumexp(gather_rows(partial_G[None], group_name), dim=0)


def sum_columns(partial_G: Tensor, num_rows: int, group_name: str) -> Tensor:
    """This rank's own columns of the sum over ranks, [B]."""
    if group_name:
        dist.all_reduce(partial_G, group=_group(group_name))
    return partial_G[first_column(num_rows, group_name) :][:num_rows]


class Gather(torch.autograd.Function):
    """All ranks' rows, [W * B, D]; backward: this rank's rows of the gradients' sum over ranks. For the materialised reference."""

    @staticmethod
    def forward(ctx: Any, local_BD: Tensor, group_name: str) -> Tensor:
        ctx.group_name = group_name
        return gather_rows(local_BD, group_name)

    @staticmethod
    def backward(ctx: Any, grad_GD: Tensor) -> tuple[Tensor, None]:
        own, work = _start_scatter(grad_GD.contiguous().clone(), ctx.group_name)
        work.wait()
        return own, None
