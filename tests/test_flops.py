"""Parameters and FLOPs against open_clip itself, torch's counter and the design's figures."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmlg_scale import towers
from mmlg_scale.accounting import forward_flops, over_lengths, parameter_counts

# Unequal widths, depths and MLP ratios, and a second image side: a formula that mixes two of them up cannot pass.
ODD = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": [32, 48], "layers": 3, "width": 96, "head_width": 32, "patch_size": 8, "mlp_ratio": 2.0},
    "text_cfg": {"context_length": 11, "vocab_size": 50, "width": 64, "heads": 2, "layers": 2},
}


def _measured_flops(config: dict[str, Any], num_samples: int = 2) -> dict[str, int]:
    """FLOPs that torch counts in one sample's forward pass."""
    clip = towers.build_clip(config, seed=0).eval()
    height, width = config["vision_cfg"]["image_size"]
    image_BCHW = torch.zeros(num_samples, 3, height, width)
    text_BT = torch.ones(num_samples, config["text_cfg"]["context_length"], dtype=torch.long)
    measured = {}
    for tower, encode, inputs in (("image", clip.encode_image, image_BCHW), ("text", clip.encode_text, text_BT)):
        # Plain attention is two counted products; what is counted of a fused kernel depends on torch's version.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            encode(inputs)
        measured[tower] = counter.get_total_flops() // num_samples
    return measured


def test_forward_flops_agree_with_torchs_count_of_a_real_model() -> None:
    formula, measured = forward_flops(ODD), _measured_flops(ODD)
    assert {tower: formula[tower] for tower in measured} == measured


def test_forward_flops_of_vit_b_32_are_the_designs() -> None:
    flops = forward_flops(towers.model_config("ViT-B-32"))
    assert flops["total"] == flops["image"] + flops["text"]
    assert (round(flops["image"] / 1e9, 2), round(flops["text"] / 1e9, 2), round(flops["total"] / 1e9, 2)) == (8.82, 5.96, 14.78)


def test_a_block_by_hand() -> None:
    """Width 4, 3 tokens, MLP ratio 4: qkv 2*3*4*12 + out 2*3*4*4 + MLP 2*(2*3*4*16) + scores and values 2*(2*3*3*4) = 1296."""
    config = copy.deepcopy(ODD)
    config["text_cfg"] = {"context_length": 3, "vocab_size": 5, "width": 4, "heads": 1, "layers": 1}
    one, two = (forward_flops(config, text_layers=n)["text"] for n in (1, 2))
    assert two - one == 288 + 96 + 768 + 144
    assert forward_flops(config, text_layers=0)["text"] == 2 * 4 * 24  # only the projection
    assert forward_flops(config)["text"] == one
    assert forward_flops(config, image_layers=7)["text"] == one


def test_depths_can_be_replaced() -> None:
    assert forward_flops(ODD, image_layers=1, text_layers=5) == forward_flops(towers.with_sizes(ODD, image_layers=1, text_layers=5))


def test_parameter_counts_of_vit_b_32_are_the_designs() -> None:
    state = towers.build_meta(towers.model_config("ViT-B-32")).state_dict()
    counts = parameter_counts(state)
    assert counts == {
        "image_blocks": 12 * 7_087_872,
        "text_blocks": 12 * 3_152_384,
        "image_stem": 2_794_752,
        "text_stem": 25_599_488,
        "shared": 1,
        "total": 151_277_313,
    }
    assert parameter_counts({name: tuple(tensor.shape) for name, tensor in state.items()}) == counts


@pytest.mark.parametrize(("length", "dropout"), [(8, 0.0), (24, 0.0), (16, 0.5)])
def test_a_step_is_charged_what_it_computes(length: int, dropout: float) -> None:
    """Cut captions, dropped patches, and a last block of one row where no hidden state of it is compared: as torch counts products."""
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 3, "patch_dropout": dropout}
    text = {"context_length": 24, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    config = towers.model_config({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text})
    clip = towers.build_clip(config, seed=0)
    images, texts = torch.randn(4, 3, 32, 32), torch.randint(1, 50, (4, length))
    patches = torch.randperm(16)[: int(16 * (1 - dropout))].expand(4, -1) if dropout else None
    for tap, pooled in (((), ("image", "text")), ((1,), ("image", "text")), ((3,), ("text",))):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            towers.encode_image_with_hidden(clip, images, tap, patches=patches)
            towers.encode_text_with_hidden(clip, texts, () if tap == (3,) else tap)
        charged = forward_flops(config, text_length=length, drops_patches=True, pooled=pooled)["total"]
        assert counter.get_total_flops() == 4 * charged, (tap, pooled)
        assert charged <= forward_flops(config)["total"]


def test_packed_captions_are_charged_one_by_one() -> None:
    """As torch counts products; the image's part is added, which is not computed here."""
    text = {"context_length": 24, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    config = towers.model_config(
        {"embed_dim": 16, "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 1}, "text_cfg": text}
    )
    clip, lengths = towers.build_clip(config, seed=0), [24, 3, 9, 9, 1]
    packing = towers.Packing.of(torch.tensor(lengths), 24)
    for tap, pooled in (((), ("text",)), ((2,), ())):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            towers.encode_text_with_hidden(clip, torch.ones(5, 24, dtype=torch.int64), tap, packing=packing)
        charged = sum(forward_flops(config, text_length=length, pooled=pooled)["text"] for length in lengths)
        assert counter.get_total_flops() == charged
        flops = over_lengths(lambda length, pooled=pooled: forward_flops(config, text_length=length, pooled=pooled)["text"], lengths)
        assert flops == round(charged / 5)
