"""Packed captions against whole ones: features, hidden states and gradients, by every backend that runs on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlg_scale import towers
from mmlg_scale.errors import UserError
from mmlg_scale.towers import packing as module
from tests.towers.models import WIDE, assert_close, changed, clip_of
from tests.towers.test_block import gradients

ENDS = (13, 1, 4, 0, 12, 4, 19, 4)


def captions() -> tuple[towers.CLIP, Tensor, towers.Packing]:
    """A CLIP of 20 positions; captions of every kind: all of them, the end token alone, several of one length."""
    clip = clip_of(changed(WIDE, "text_cfg", context_length=20))
    texts = torch.randint(3, 19, (len(ENDS), 20), generator=torch.Generator().manual_seed(6))
    for row, end in enumerate(ENDS):
        texts[row, end], texts[row, end + 1 :] = 19, 0
    return clip, texts, towers.Packing.of(towers.lengths_of(texts), 20)


def test_a_packing_by_hand() -> None:
    """Captions of 3, 1 and 3 tokens: the shortest first, then those of 3 in their order."""
    texts = torch.tensor([[5, 6, 19, 0], [19, 7, 7, 7], [8, 9, 19, 19]])
    lengths = towers.lengths_of(texts)
    assert lengths.tolist() == [3, 1, 3]
    packing = towers.Packing.of(lengths, 4)
    assert packing.lengths == (1, 3, 3)
    assert packing.groups == [(1, 1), (3, 2)]
    assert packing.pack(texts).tolist() == [19, 5, 6, 19, 8, 9, 19]
    assert packing.positions_N.tolist() == [0, 0, 1, 2, 0, 1, 2]
    assert packing.starts_S.tolist() == [0, 1, 4, 7]
    assert packing.starts_S.dtype == torch.int32
    assert packing.ends_B.tolist() == [0, 3, 6]
    assert packing.ranks_B.tolist() == [1, 0, 2]
    assert packing.unpack(packing.pack(texts)).tolist() == [[5, 6, 19, 0], [19, 0, 0, 0], [8, 9, 19, 0]]


def _as_varlen(causal: Callable[[dict[str, Any]], bool]) -> Callable[..., Tensor]:
    """What torch and flash-attn document of their functions, one sequence after the other: a mask is aligned at the end of the keys."""

    def run(
        query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts_k: Tensor, max_q: int, max_k: int, **options: Any
    ) -> Tensor:
        assert starts_q.dtype == starts_k.dtype == torch.int32
        assert starts_q.diff().max() <= max_q
        assert starts_k.diff().max() <= max_k
        found = []
        for index in range(len(starts_q) - 1):
            one, (other_k, other_v) = (
                query[starts_q[index] : starts_q[index + 1]],
                (x[starts_k[index] : starts_k[index + 1]] for x in (key, value)),
            )
            seen = torch.ones(len(one), len(other_k), dtype=torch.bool)
            if causal(options):
                seen = seen.tril(len(other_k) - len(one))
            heads = [x.transpose(0, 1) for x in (one, other_k, other_v)]
            found.append(F.scaled_dot_product_attention(*heads, attn_mask=seen).transpose(0, 1))
        return torch.cat(found)

    return run


def varlen_2_10(*args: Any, is_causal: bool = False) -> Tensor:
    return _as_varlen(lambda options: is_causal)(*args)


def varlen_2_11(*args: Any, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
    return _as_varlen(lambda options: {(-1, -1): False, (-1, 0): True}[window_size])(*args)


def flash_2(*args: Any, causal: bool = False) -> Tensor:
    return _as_varlen(lambda options: causal)(*args)


def flash_3(*args: Any, causal: bool = False) -> tuple[Tensor, Tensor]:
    return flash_2(*args, causal=causal), torch.empty(0)


STAND_INS = {"varlen": (varlen_2_10, varlen_2_11), "flash": (flash_2, flash_3)}
CASES = [("lengths", None), ("padded", None), *((name, stand_in) for name, both in STAND_INS.items() for stand_in in both)]


@pytest.mark.parametrize("tap", [(), (1, 3)], ids=["pooled", "hidden"])
@pytest.mark.parametrize(("backend", "stand_in"), CASES)
def test_packed_captions_give_what_whole_ones_do(
    backend: str, stand_in: Callable[..., Tensor] | None, tap: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What needs a GPU is called as its documentation says, in place of the kernels."""
    monkeypatch.setenv(module.VARIABLE, backend)
    module._causal_option.cache_clear()
    if stand_in is not None:
        monkeypatch.setattr(module, f"_{backend}", lambda: stand_in)
    clip, texts, packing = captions()
    used = [parameter for name, parameter in clip.named_parameters() if not name.startswith(("visual.", "logit_"))]
    whole, whole_hidden = towers.encode_text_with_hidden(clip, texts, tap)
    for checkpoint in (False, True):
        packed, hidden = towers.encode_text_with_hidden(clip, texts, tap, packing=packing, checkpoint=checkpoint)
        assert_close((packed,), (whole,), 1e-6)
        valid_BT1 = (torch.arange(20) < towers.lengths_of(texts)[:, None])[..., None]
        assert_close(tuple(hidden), tuple(each * valid_BT1 for each in whole_hidden), 1e-6)
        for mine, theirs in zip(gradients(packed, used), gradients(whole, used), strict=True):
            assert (mine - theirs).norm() <= 1e-5 * theirs.norm()
        if tap:
            below = list(clip.transformer.resblocks[0].parameters())
            wanted = gradients(whole_hidden[-1] * valid_BT1, below)
            for mine, theirs in zip(gradients(hidden[-1], below), wanted, strict=True):
                assert (mine - theirs).norm() <= 1e-5 * theirs.norm()
    module._causal_option.cache_clear()


def test_the_backend_suits_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash kernels only where they work: CUDA from 8.0 on, half precision, heads of a multiple of 8 up to 256."""

    class Query:
        is_cuda, device = True, torch.device("cuda", 0)

        def __init__(self, dtype: torch.dtype, head: int) -> None:
            self.dtype, self.shape = dtype, (5, 2, head)

    def chosen(dtype: torch.dtype = torch.bfloat16, head: int = 64) -> str:
        return module.backend_for(Query(dtype, head))  # type: ignore[arg-type]

    monkeypatch.delenv(module.VARIABLE, raising=False)
    assert module.backend_for(torch.empty(5, 2, 8)) == "lengths"
    monkeypatch.setattr(module, "_capability", lambda device: (9, 0))
    assert chosen() == "varlen"
    assert [chosen(torch.float32), chosen(head=12), chosen(head=512)] == ["padded"] * 3
    monkeypatch.setattr(module, "_varlen", lambda: None)
    assert chosen() == "padded"
    monkeypatch.setattr(module, "_flash", lambda: flash_2)
    assert chosen() == "flash"
    monkeypatch.setattr(module, "_capability", lambda device: (7, 5))
    assert chosen() == "padded"
    monkeypatch.setenv(module.VARIABLE, "quick")
    with pytest.raises(UserError, match=r"MMLG_PACKED_ATTENTION is 'quick'\. Use one of lengths, padded, varlen, flash"):
        chosen()
