"""The block function against open_clip's own module, and towers that compute less than everything against those that compute all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmlg_scale import towers
from tests.towers.models import PLAIN, WIDE, assert_close, batch, changed, clip_of, open_clips_own

FORMS: dict[str, dict[str, Any]] = {
    "gelu": PLAIN,
    "quick_gelu": WIDE,
    "tanh": changed(changed(PLAIN, "text_cfg", act_kwargs={"approximate": "tanh"}), "vision_cfg", norm_kwargs={"eps": 1e-3}),
}


def open_clip_of(config: dict[str, Any]) -> Any:
    """open_clip's own model with the weights of `clip_of`."""
    theirs = open_clips_own(towers.model_config(config), 0)
    theirs.load_state_dict(clip_of(config).state_dict())
    return theirs.eval()


def gradients(outputs: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(5))
    return list(torch.autograd.grad((outputs * weights).sum(), inputs, retain_graph=True))


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("name", FORMS)
def test_a_block_is_open_clip_s(name: str, tower: str) -> None:
    """Outputs and all gradients, of the whole sequence and of one row of each."""
    config = towers.model_config(FORMS[name])
    clip = open_clip_of(FORMS[name])
    block = (clip.visual.transformer if tower == "image" else clip.transformer).resblocks[1]
    form, mask = towers.BlockForm.of(config, tower), clip.attn_mask if tower == "text" else None
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(6, 8, towers.width(config, tower), generator=generator, requires_grad=True)
    named = dict(block.named_parameters())
    inputs = [hidden, *named.values()]
    expected = block(hidden, attn_mask=mask)
    rows = torch.tensor([[7], [0], [3], [7], [4], [1]])
    picked = expected[torch.arange(6)[:, None], rows]
    for found, wanted in ((towers.run_block(hidden, named, form), expected), (towers.run_block(hidden, named, form, rows), picked)):
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()
        for mine, theirs in zip(gradients(found, inputs), gradients(wanted, inputs), strict=True):
            assert (mine - theirs).norm() <= 1e-6 * theirs.norm()


def test_state_dicts_are_open_clip_s() -> None:
    """Names, order and tensors: what optimiser groups and files rest on."""
    theirs, ours = open_clip_of(PLAIN), clip_of(PLAIN)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]


@pytest.mark.parametrize("pool_type", ["tok", "avg"])
@pytest.mark.parametrize("after", [False, True])
def test_towers_are_open_clip_s(pool_type: str, after: bool) -> None:
    """Features however a tower is pooled; hidden states as hooks in open_clip's blocks see them."""
    config = changed(PLAIN, "vision_cfg", pool_type=pool_type, final_ln_after_pool=after)
    theirs, ours = open_clip_of(config), clip_of(config)
    images, texts = batch(config)
    seen: list[Tensor] = []
    hooks = [
        transformer.resblocks[layer].register_forward_hook(lambda module, args, out: seen.append(out))
        for transformer in (theirs.visual.transformer, theirs.transformer)
        for layer in (1, 2)
    ]
    with torch.no_grad():
        expected = theirs.encode_image(images), theirs.encode_text(texts)
        for tap in ((), (2,), (2, 3)):
            image, image_hidden = towers.encode_image_with_hidden(ours, images, tap)
            text, text_hidden = towers.encode_text_with_hidden(ours, texts, tap)
            assert_close((image, text), expected, 1e-6)
            for layers, hidden in ((seen[:2], image_hidden), (seen[2:], text_hidden)):
                assert_close(tuple(hidden), tuple(layers[: len(tap)]), 1e-6)
        assert_close((ours.encode_image(images), ours.encode_text(texts)), expected, 1e-6)
    for hook in hooks:
        hook.remove()


def test_cut_length_by_hand() -> None:
    """One behind the last end token, the highest id of its row; a multiple of 8, but not beyond the context."""
    texts = torch.zeros(3, 20, dtype=torch.int64)
    texts[0, 4] = texts[1, 2] = 19
    texts[2, 0] = 5
    assert towers.cut_length(texts) == 8
    texts[1, 7:9] = torch.tensor([3, 19])
    texts[1, 2] = 4
    assert towers.cut_length(texts) == 16
    texts[0, 4], texts[0, 19] = 4, 19
    assert towers.cut_length(texts) == 20
    assert towers.cut_length(texts[:1, :12]) == 8


@pytest.mark.parametrize("length", [8, 16])
def test_cut_captions_give_the_features_of_whole_ones(length: int) -> None:
    """And the gradients of every parameter, with and without hidden states at the last layer."""
    config = changed(WIDE, "text_cfg", context_length=20)
    clip = clip_of(config)
    texts = torch.randint(3, 19, (5, 20), generator=torch.Generator().manual_seed(6))
    for row, end in enumerate((length - 1, 1, 4, 0, length - 2)):
        texts[row, end], texts[row, end + 1 :] = 19, 0
    assert towers.cut_length(texts) == length
    used = [parameter for name, parameter in clip.named_parameters() if not name.startswith(("visual.", "logit_"))]
    for tap in ((), (3,)):
        whole, whole_hidden = towers.encode_text_with_hidden(clip, texts, tap)
        cut, cut_hidden = towers.encode_text_with_hidden(clip, texts[:, :length], tap)
        assert_close((cut, *cut_hidden), (whole, *(hidden[:, :length] for hidden in whole_hidden)), 1e-6)
        for mine, theirs in zip(gradients(cut, used), gradients(whole, used), strict=True):
            assert (mine - theirs).norm() <= 1e-5 * theirs.norm()
