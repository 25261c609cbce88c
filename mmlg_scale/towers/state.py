"""A CLIP's state dict taken apart into stem and blocks, and put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

BLOCK_PREFIX = {"image": "visual.transformer.resblocks.", "text": "transformer.resblocks."}


def split_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[dict[str, Tensor]]]]:
    """A CLIP state dict as (stem: every entry outside the blocks, blocks: {"image": [...], "text": [...]})."""
    stem: dict[str, Tensor] = {}
    blocks: dict[str, dict[int, dict[str, Tensor]]] = {"image": {}, "text": {}}
    for name, tensor in state.items():
        for tower, prefix in BLOCK_PREFIX.items():
            if name.startswith(prefix):
                number, _, rest = name.removeprefix(prefix).partition(".")
                blocks[tower].setdefault(int(number), {})[rest] = tensor
                break
        else:
            stem[name] = tensor
    return stem, {tower: [found[number] for number in sorted(found)] for tower, found in blocks.items()}


def join_state(stem: Mapping[str, Tensor], blocks: Mapping[str, Sequence[Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """The inverse of `split_state`."""
    state = dict(stem)
    for tower, prefix in BLOCK_PREFIX.items():
        for number, block in enumerate(blocks[tower]):
            state |= {f"{prefix}{number}.{name}": tensor for name, tensor in block.items()}
    return state
