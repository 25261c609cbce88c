"""Captions one after the other without padding, and attention within each of them.

Exact for a causal tower that is pooled at the end token, the highest id of a caption: what follows it changes nothing. Every text tower
that is supported is one; configurations of others are refused when they are read.

Tokens are sorted by the length of their caption. Captions of one length then lie side by side and are a batch without padding: on a CPU,
attention of one length after the other takes less time than any other way that was measured (`benchmarks/README.md`).
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlg_scale.errors import UserError

Backend = Literal["lengths", "padded", "varlen", "flash"]
"""lengths: torch's attention for each length in turn. padded: torch's attention on padded sequences. varlen: torch.nn.attention.varlen.
flash: flash-attn 3 or 2, where installed. The last two need CUDA and half precision."""
BACKENDS: tuple[Backend, ...] = get_args(Backend)
VARIABLE = "MMLG_PACKED_ATTENTION"
"""Environment variable that names a backend instead of the one that `backend_for` would choose: for tests and comparisons."""
MAX_FLASH_HEAD = 256
"""Channels of a head up to which flash attention works, in multiples of 8."""


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a [B, T] batch of captions lie among its N packed ones.

    Attributes:
        lengths: each caption's tokens, up to and including its end token, in ascending order: that of the packing; known on the host.
        width: T.
        places_N: int64, each packed token's place in the flattened [B * T].
        positions_N: int64, its position in its caption.
        starts_S: int32 [B + 1], where captions start among the packed tokens, and N.
        ends_B: int64, where they end: their end tokens.
        ranks_B: int64, of each row of the batch, its caption's place in the packing.
    """

    lengths: tuple[int, ...]
    width: int
    places_N: Tensor
    positions_N: Tensor
    starts_S: Tensor
    ends_B: Tensor
    ranks_B: Tensor

    @classmethod
    def of(cls, lengths_B: Tensor, width: int, device: torch.device | str = "cpu") -> Packing:
        """The packing of captions of these lengths (int64 [B], on the CPU; at most `width`); copies to `device` do not wait."""
        order = lengths_B.numpy().argsort(kind="stable")
        lengths = lengths_B.numpy()[order]
        starts = np.concatenate([[0], lengths.cumsum()])
        rows = np.repeat(np.arange(len(lengths)), lengths)
        positions = np.arange(len(rows)) - starts[rows]

        def there(array: np.ndarray) -> Tensor:
            tensor = torch.from_numpy(array)
            return tensor.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else tensor.to(device)

        where = (order[rows] * width + positions, positions, starts.astype(np.int32), starts[1:] - 1, order.argsort())
        return cls(tuple(lengths.tolist()), width, *map(there, where))

    def __len__(self) -> int:
        """Captions."""
        return len(self.lengths)

    @functools.cached_property
    def groups(self) -> list[tuple[int, int]]:
        """(length, captions of that length), in ascending order."""
        return [(length, len(list(same))) for length, same in groupby(self.lengths)]

    def pack(self, x_BT: Tensor) -> Tensor:
        """[B, T, ...] -> [N, ...]."""
        return x_BT.flatten(0, 1).index_select(0, self.places_N)

    def unpack(self, x_N: Tensor) -> Tensor:
        """[N, ...] -> [B, T, ...] with zeros behind each end token."""
        empty = x_N.new_zeros(len(self) * self.width, *x_N.shape[1:])
        return empty.index_copy(0, self.places_N, x_N).unflatten(0, (len(self), self.width))


def lengths_of(text_BT: Tensor) -> Tensor:
    """Each caption's tokens up to and including its end token, int64 [B]. The tokens are on the CPU: the lengths are needed there."""
    return torch.from_numpy(text_BT.numpy().argmax(axis=-1)) + 1


def attention(query_NHd: Tensor, key_NHd: Tensor, value_NHd: Tensor, packing: Packing) -> Tensor:
    """Causal attention within each caption: [N, H, d / H] -> [N, d]."""
    backend = backend_for(query_NHd)
    return _RUN[backend](query_NHd, key_NHd, value_NHd, packing, packing.starts_S, packing.width).flatten(1)


def attention_of_ends(query_BHd: Tensor, key_NHd: Tensor, value_NHd: Tensor, packing: Packing) -> Tensor:
    """Attention of each caption's end token alone, over the whole caption: [B, H, d / H] -> [B, d].

    Args:
        query_BHd: of the end tokens, in the order of the captions in the packing.
    """
    backend = backend_for(query_BHd)
    one_each_S = torch.arange(len(packing) + 1, dtype=torch.int32, device=query_BHd.device)
    return _RUN[backend](query_BHd, key_NHd, value_NHd, packing, one_each_S, 1).flatten(1)


def backend_for(query: Tensor) -> Backend:
    """How attention is computed on a tensor of this device, dtype and head size."""
    forced = os.environ.get(VARIABLE)
    if forced is not None:
        if forced not in BACKENDS:
            raise UserError(f"{VARIABLE} is {forced!r}. Use one of {', '.join(BACKENDS)}, or unset it.")
        return forced
    if query.device.type == "cpu":
        return "lengths"
    dtype = torch.get_autocast_dtype("cuda") if query.is_cuda and torch.is_autocast_enabled("cuda") else query.dtype
    head = query.shape[-1]
    if not query.is_cuda or dtype == torch.float32 or head % 8 or head > MAX_FLASH_HEAD or _capability(query.device) < (8, 0):
        return "padded"
    if _varlen() is not None:
        return "varlen"
    return "flash" if _flash() is not None else "padded"


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


Attention = Callable[[Tensor, Tensor, Tensor, Packing, Tensor, int], Tensor]
"""query [Q, H, d'], key and value [N, H, d'], the packing, where each caption's queries start [B + 1], the most of one -> [Q, H, d']."""


def _by_length(query: Tensor, key: Tensor, value: Tensor, packing: Packing, starts_S: Tensor, longest: int) -> Tensor:
    """Captions of one length are a batch; either all of a caption's tokens are queries, or only the last."""
    sizes = [length * count for length, count in packing.groups]
    asked = [count for _, count in packing.groups] if longest == 1 else sizes
    found = []
    parts = zip(packing.groups, query.split(asked), key.split(sizes), value.split(sizes), strict=True)
    for (_, count), *tensors in parts:
        queries, keys, values = (tensor.unflatten(0, (count, -1)).transpose(1, 2) for tensor in tensors)
        found.append(F.scaled_dot_product_attention(queries, keys, values, is_causal=longest > 1).transpose(1, 2).flatten(0, 1))
    return torch.cat(found)


def _padded(query: Tensor, key: Tensor, value: Tensor, packing: Packing, starts_S: Tensor, longest: int) -> Tensor:
    """In any precision and on any device."""
    count = len(packing)
    # Captions in the packing's order, each with `width` places.
    lengths_B = packing.starts_S.diff()
    places_N = torch.repeat_interleave(torch.arange(count, device=key.device), lengths_B, output_size=len(key))
    places_N = places_N * packing.width + packing.positions_N
    wide = [key.new_zeros(count * packing.width, *key.shape[1:]).index_copy(0, places_N, x) for x in (key, value)]
    keys, values = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in wide)
    if longest == 1:
        seen = torch.arange(packing.width, device=key.device) < lengths_B[:, None]
        return F.scaled_dot_product_attention(query[:, :, None], keys, values, attn_mask=seen[:, None, None]).squeeze(2)
    queries = query.new_zeros(count * packing.width, *query.shape[1:]).index_copy(0, places_N, query)
    queries = queries.unflatten(0, (count, -1)).transpose(1, 2)
    found = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    return found.transpose(1, 2).flatten(0, 1).index_select(0, places_N)


def _of_varlen(query: Tensor, key: Tensor, value: Tensor, packing: Packing, starts_S: Tensor, longest: int) -> Tensor:
    run = _varlen()
    assert run is not None, "torch.nn.attention.varlen came with torch 2.10"
    # One query at the end of each caption sees all of it: no mask.
    return run(query, key, value, starts_S, packing.starts_S, longest, packing.width, **({} if longest == 1 else _causal_option()))


@functools.cache
def _varlen() -> Callable[..., Any] | None:
    """torch's function, where this torch has it (from 2.10 on)."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


@functools.cache
def _causal_option() -> dict[str, object]:
    """torch 2.10 says `is_causal`, later ones a window without an end to the left."""
    run = _varlen()
    assert run is not None
    return {"is_causal": True} if "is_causal" in inspect.signature(run).parameters else {"window_size": (-1, 0)}


def _of_flash(query: Tensor, key: Tensor, value: Tensor, packing: Packing, starts_S: Tensor, longest: int) -> Tensor:
    run = _flash()
    if run is None:
        raise UserError(f"{VARIABLE} is flash, but flash-attn is not installed. Install it, or unset the variable.")
    found = run(query, key, value, starts_S, packing.starts_S, longest, packing.width, causal=longest > 1)
    return found[0] if isinstance(found, tuple) else found


@functools.cache
def _flash() -> Callable[..., Tensor] | None:
    """flash_attn_varlen_func of flash-attn 3 (flash_attn_interface) or 2 (flash_attn), where one is installed."""
    for name in ("flash_attn_interface", "flash_attn"):
        if importlib.util.find_spec(name) is not None:
            return getattr(importlib.import_module(name), "flash_attn_varlen_func", None)
    return None


_RUN: dict[Backend, Attention] = {"lengths": _by_length, "padded": _padded, "varlen": _of_varlen, "flash": _of_flash}
