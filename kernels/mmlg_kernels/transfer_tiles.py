"""Triton backend of block transfer: every layer of every target in one launch.

A plan's tensors are cut into tiles of rows and columns. A program reads its tile of the K blocks once, keeps it in registers, and writes
it summed for each layer; in the backward pass it reads each layer's gradient once, and both the blocks' and the coefficients' gradients
come of it. Addresses come from a table that depends only on the plan. No atomics: the coefficients' sums over tiles are added up in a
fixed order, and where targets share a source, their launches follow one another. The same inputs give the same bits.

Works under TRITON_INTERPRET=1 on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmlg_kernels.transfer_plan import MAX_SOURCES, Slice, Target, TransferPlan

ROWS, COLUMNS = 4, 256
"""Of a tile: 1,024 numbers, 8 for each of 128 threads, so that eight blocks of them fit into registers."""
SHARES = 1024
"""Of a coefficient's sum over tiles, added up at once."""
FIELDS = 16
"""Numbers in a tile's entry; the kernels say which is which."""


@dataclass(frozen=True)
class Tiles:
    """A plan cut into tiles.

    Attributes:
        table: [num_tiles, FIELDS], int64.
        ranges: first and end tile of each target.
        coefficients: [N, 4], int64: of each coefficient its place among all, its place among its layer's L x K, first and end tile.
        aligned: every offset, stride and width is a multiple of 16, so that loads and stores are of 16 bytes.
    """

    table: Tensor
    ranges: tuple[tuple[int, int], ...]
    coefficients: Tensor
    aligned: bool


@triton.jit
def _pick(index, p0, p1, p2, p3):
    """The pointer of source `index`."""
    pointer = p0
    if index == 1:
        pointer = p1
    if index == 2:
        pointer = p2
    if index == 3:
        pointer = p3
    return pointer


@triton.jit
def _entry(table_ptr, tile, field, ALIGNED: tl.constexpr):
    """A field that is an offset, a stride or a width."""
    value = tl.load(table_ptr + tile * 16 + field)
    if ALIGNED:
        value = tl.multiple_of(value, 16)
    return value


@triton.jit
def _offsets(offset, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return offset + tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def transfer_kernel(
    table_ptr,
    p0,
    p1,
    p2,
    p3,
    coefficients_ptr,
    out_ptr,
    KA: tl.constexpr,
    KB: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Program i: tile i of all layers of its target."""
    tile = tl.program_id(0).to(tl.int64)
    out, out_stride = _entry(table_ptr, tile, 0, ALIGNED), _entry(table_ptr, tile, 1, ALIGNED)
    num_rows, num_columns = tl.load(table_ptr + tile * 16 + 2), _entry(table_ptr, tile, 3, ALIGNED)
    num_layers, layer_stride = tl.load(table_ptr + tile * 16 + 4), _entry(table_ptr, tile, 5, ALIGNED)
    coefficient, coefficient_stride = tl.load(table_ptr + tile * 16 + 6), tl.load(table_ptr + tile * 16 + 7)
    inside = (tl.arange(0, ROWS)[:, None] < num_rows) & (tl.arange(0, COLUMNS)[None, :] < num_columns)
    blocks = ()
    a_ptr = _pick(tl.load(table_ptr + tile * 16 + 8), p0, p1, p2, p3)
    a_at = _offsets(_entry(table_ptr, tile, 9, ALIGNED), _entry(table_ptr, tile, 10, ALIGNED), ROWS, COLUMNS)
    a_stride = _entry(table_ptr, tile, 11, ALIGNED)
    for k in tl.static_range(KA):
        blocks = blocks + (tl.load(a_ptr + k * a_stride + a_at, mask=inside, other=0.0).to(tl.float32),)
    b_ptr = _pick(tl.load(table_ptr + tile * 16 + 12), p0, p1, p2, p3)
    b_at = _offsets(_entry(table_ptr, tile, 13, ALIGNED), _entry(table_ptr, tile, 14, ALIGNED), ROWS, COLUMNS)
    b_stride = _entry(table_ptr, tile, 15, ALIGNED)
    for k in tl.static_range(KB):
        blocks = blocks + (tl.load(b_ptr + k * b_stride + b_at, mask=inside, other=0.0).to(tl.float32),)
    out_at = _offsets(out, out_stride, ROWS, COLUMNS)
    for layer in range(num_layers):
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for k in tl.static_range(KA + KB):
            total += tl.load(coefficients_ptr + coefficient + layer * coefficient_stride + k).to(tl.float32) * blocks[k]
        tl.store(out_ptr + layer * layer_stride + out_at, total.to(out_ptr.dtype.element_ty), mask=inside)


# Not specialised: an integer of 1 would become a constant, which cannot be cast.
@triton.jit(do_not_specialize=["num_tiles", "first_tile"])
def transfer_gradient_kernel(
    table_ptr,
    p0,
    p1,
    p2,
    p3,
    coefficients_ptr,
    out_grad_ptr,
    g0,
    g1,
    g2,
    g3,
    part_ptr,
    num_tiles,
    first_tile,
    KA: tl.constexpr,
    KB: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ADD_A: tl.constexpr,
    ADD_B: tl.constexpr,
):
    """Program i: from tile first_tile + i of all layers' gradients, the blocks' gradients and the tile's share of the coefficients'.

    ADD_A and ADD_B: whether an earlier launch has written gradients of that source. Shares go to part [L * K, num_tiles].
    """
    tile = tl.program_id(0).to(tl.int64) + first_tile
    out, out_stride = _entry(table_ptr, tile, 0, ALIGNED), _entry(table_ptr, tile, 1, ALIGNED)
    num_rows, num_columns = tl.load(table_ptr + tile * 16 + 2), _entry(table_ptr, tile, 3, ALIGNED)
    num_layers, layer_stride = tl.load(table_ptr + tile * 16 + 4), _entry(table_ptr, tile, 5, ALIGNED)
    coefficient, coefficient_stride = tl.load(table_ptr + tile * 16 + 6), tl.load(table_ptr + tile * 16 + 7)
    inside = (tl.arange(0, ROWS)[:, None] < num_rows) & (tl.arange(0, COLUMNS)[None, :] < num_columns)
    blocks, totals = (), ()
    a = tl.load(table_ptr + tile * 16 + 8)
    a_at = _offsets(_entry(table_ptr, tile, 9, ALIGNED), _entry(table_ptr, tile, 10, ALIGNED), ROWS, COLUMNS)
    a_stride = _entry(table_ptr, tile, 11, ALIGNED)
    a_ptr, a_grad_ptr = _pick(a, p0, p1, p2, p3), _pick(a, g0, g1, g2, g3)
    for k in tl.static_range(KA):
        blocks = blocks + (tl.load(a_ptr + k * a_stride + a_at, mask=inside, other=0.0).to(tl.float32),)
        totals = totals + (tl.zeros((ROWS, COLUMNS), dtype=tl.float32),)
    b = tl.load(table_ptr + tile * 16 + 12)
    b_at = _offsets(_entry(table_ptr, tile, 13, ALIGNED), _entry(table_ptr, tile, 14, ALIGNED), ROWS, COLUMNS)
    b_stride = _entry(table_ptr, tile, 15, ALIGNED)
    b_ptr, b_grad_ptr = _pick(b, p0, p1, p2, p3), _pick(b, g0, g1, g2, g3)
    for k in tl.static_range(KB):
        blocks = blocks + (tl.load(b_ptr + k * b_stride + b_at, mask=inside, other=0.0).to(tl.float32),)
        totals = totals + (tl.zeros((ROWS, COLUMNS), dtype=tl.float32),)
    out_at = _offsets(out, out_stride, ROWS, COLUMNS)
    for layer in range(num_layers):
        grad = tl.load(out_grad_ptr + layer * layer_stride + out_at, mask=inside, other=0.0).to(tl.float32)
        added = ()
        for k in tl.static_range(KA + KB):
            weight = tl.load(coefficients_ptr + coefficient + layer * coefficient_stride + k).to(tl.float32)
            added = added + (totals[k] + weight * grad,)
            share = tl.sum(tl.sum(grad * blocks[k], axis=1), axis=0)
            tl.store(part_ptr + (layer * (KA + KB) + k) * num_tiles.to(tl.int64) + tile, share)
        totals = added
    for k in tl.static_range(KA):
        total = totals[k]
        at = a_grad_ptr + k * a_stride + a_at
        if ADD_A:
            total += tl.load(at, mask=inside, other=0.0)
        tl.store(at, total, mask=inside)
    for k in tl.static_range(KB):
        total = totals[KA + k]
        at = b_grad_ptr + k * b_stride + b_at
        if ADD_B:
            total += tl.load(at, mask=inside, other=0.0)
        tl.store(at, total, mask=inside)


@triton.jit(do_not_specialize=["num_tiles"])
def add_shares_kernel(part_ptr, coefficient_tiles_ptr, out_ptr, num_tiles, BLOCK: tl.constexpr):
    """Program i: the gradient of coefficient i, its shares added up over its tensor's tiles."""
    entry = coefficient_tiles_ptr + tl.program_id(0) * 4
    place, share, first, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(first, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(part_ptr + share * num_tiles.to(tl.int64) + at, mask=at < end, other=0.0)
    tl.store(out_ptr + place, tl.sum(total, axis=0))


def cut(plan: TransferPlan) -> Tiles:
    """The plan's tiles; made once, and kept as long as the plan."""
    if "tiles" not in plan.kept:
        plan.kept["tiles"] = _cut(plan)
    return plan.kept["tiles"]


def _cut(plan: TransferPlan) -> Tiles:
    assert plan.mixes is not None
    entries: list[Tensor] = []
    ranges, rows_of_coefficients = [], []
    num_tiles = out = place = 0
    for target in plan.targets:
        first = num_tiles
        for tensor in range(len(target.names)):
            tiles = _cut_tensor(plan, target, tensor, out, place)
            entries.append(tiles)
            rows_of_coefficients.append(_coefficient_rows(target, tensor, sum(plan.mixes), place, num_tiles, num_tiles + len(tiles)))
            num_tiles += len(tiles)
        ranges.append((first, num_tiles))
        out += target.num_layers * sum(target.sizes)
        place += target.num_layers * len(target.names) * sum(plan.mixes)
    table = torch.cat(entries)
    aligned = not bool((table[:, [0, 1, 3, 5, 9, 10, 11, 13, 14, 15]] % 16).any())
    return Tiles(table.to(plan.device), tuple(ranges), torch.cat(rows_of_coefficients).to(plan.device), aligned)


def _cut_tensor(plan: TransferPlan, target: Target, tensor: int, out: int, place: int) -> Tensor:
    """[n, FIELDS]: the tiles of one tensor of a target whose layers begin at `out` and whose coefficients begin at `place`."""
    assert plan.mixes is not None
    width, sources = sum(plan.mixes), plan.used(target)
    found, start = [], out + sum(target.sizes[:tensor])
    for rows, columns, reads in _rectangles(target.sizes[tensor], [target.slices[i][tensor] for i in sources]):
        down = torch.arange(0, rows, ROWS).repeat_interleave(-(-columns // COLUMNS))
        right = torch.arange(0, columns, COLUMNS).repeat(-(-rows // ROWS))
        entry = torch.zeros(len(down), FIELDS, dtype=torch.int64)
        entry[:, 0], entry[:, 1] = start + down * columns + right, columns
        entry[:, 2], entry[:, 3] = (rows - down).clamp(max=ROWS), (columns - right).clamp(max=COLUMNS)
        entry[:, 4], entry[:, 5] = target.num_layers, sum(target.sizes)
        entry[:, 6], entry[:, 7] = place + tensor * width, len(target.names) * width
        for i, (offset, row_stride) in enumerate(reads):
            source = target.sources[sources[i]]
            entry[:, 8 + 4 * i], entry[:, 9 + 4 * i] = source, offset + down * row_stride + right
            entry[:, 10 + 4 * i], entry[:, 11 + 4 * i] = row_stride, plan.source_shapes[source][1]
        start += rows * columns
        found.append(entry)
    return torch.cat(found)


def _rectangles(size: int, slices: list[Slice]) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """The parts of a tensor in their order: (rows, columns, per source where it begins and its rows' stride)."""
    if all(piece.contiguous for piece in slices):
        whole = size // COLUMNS * COLUMNS
        for start, rows, columns in ((0, whole // COLUMNS, COLUMNS), (whole, 1, size - whole)):
            if rows * columns:
                yield rows, columns, [(piece.offset + start, COLUMNS) for piece in slices]
        return
    for group in range(slices[0].groups):
        yield slices[0].rows, slices[0].columns, [(piece.offset + group * piece.group_stride, piece.row_stride) for piece in slices]


def _coefficient_rows(target: Target, tensor: int, width: int, place: int, first: int, end: int) -> Tensor:
    layer, k = torch.meshgrid(torch.arange(target.num_layers), torch.arange(width), indexing="ij")
    where = place + (layer * len(target.names) + tensor) * width + k
    columns = (where, layer * width + k, torch.full_like(where, first), torch.full_like(where, end))
    return torch.stack(columns, dim=-1).flatten(0, 1)


def forward(plan: TransferPlan, sources: Sequence[Tensor], coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    """All targets' layers one after the other, flat; `coefficients` flat in the same order."""
    tiles, held = cut(plan), [source.contiguous() for source in sources]
    out = coefficients.new_empty(plan.out_size, dtype=dtype)
    with torch.cuda.device_of(out):
        transfer_kernel[(len(tiles.table),)](tiles.table, *_four(held), coefficients, out, **_options(plan, tiles))
    return out


def backward(plan: TransferPlan, sources: Sequence[Tensor], coefficients: Tensor, out_grad: Tensor) -> tuple[list[Tensor], Tensor]:
    """Gradients by the sources, in fp32, and by the flat coefficients: one launch per target, and one for the coefficients' sums."""
    assert plan.mixes is not None
    tiles, held, out_grad = cut(plan), [source.contiguous() for source in sources], out_grad.contiguous()
    grads, written = [torch.zeros_like(source, dtype=torch.float32) for source in held], set[int]()
    num_tiles, most = len(tiles.table), max(target.num_layers for target in plan.targets) * sum(plan.mixes)
    part = out_grad.new_empty(most, num_tiles, dtype=torch.float32)
    coefficient_grads = torch.empty_like(coefficients)
    with torch.cuda.device_of(part):
        for target, (first, end) in zip(plan.targets, tiles.ranges, strict=True):
            mine = [target.sources[i] for i in plan.used(target)]
            add_first, add_second = mine[0] in written, mine[-1] in written
            transfer_gradient_kernel[(end - first,)](
                tiles.table, *_four(held), coefficients, out_grad, *_four(grads), part, num_tiles, first,
                **_options(plan, tiles), ADD_A=add_first, ADD_B=add_second,
            )  # fmt: skip
            written.update(mine)
        add_shares_kernel[(len(tiles.coefficients),)](part, tiles.coefficients, coefficient_grads, num_tiles, BLOCK=SHARES, num_warps=4)
    return grads, coefficient_grads


def _four(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [*tensors, *[tensors[0]] * (MAX_SOURCES - len(tensors))]


def _options(plan: TransferPlan, tiles: Tiles) -> dict[str, object]:
    assert plan.mixes is not None
    return {"KA": plan.mixes[0], "KB": plan.mixes[1], "ROWS": ROWS, "COLUMNS": COLUMNS, "ALIGNED": tiles.aligned, "num_warps": 4}
