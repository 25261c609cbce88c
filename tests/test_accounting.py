"""Costs by hand, against torch's own FLOP counter, and against published parameter counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmlg_scale import towers
from mmlg_scale.accounting import charge, first_reached, forward_flops, parameter_counts, summarise
from tests.training.tiny import CONFIG, batch


def test_flops_equal_torchs_counter() -> None:
    clip = towers.build_clip(towers.model_config(CONFIG), seed=0)
    images, texts = batch(0)
    for tower, encode, inputs in (("image", clip.encode_image, images), ("text", clip.encode_text, texts)):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            encode(inputs)
        # The counter sees the products of the attention too, on the math path; the eight captions and images are one batch.
        assert counter.get_total_flops() == 8 * forward_flops(CONFIG)[tower]


def test_vit_b_32_by_its_published_size() -> None:
    config = towers.model_config("ViT-B-32")
    flops = forward_flops(config)
    assert flops["total"] == pytest.approx(14.78e9, rel=2e-3)
    assert flops["text"] == pytest.approx(5.96e9, rel=2e-3)
    shapes = {name: tuple(tensor.shape) for name, tensor in towers.build_meta(config).state_dict().items()}
    counts = parameter_counts(shapes)
    assert counts == {
        "image_blocks": 12 * 7_087_872,
        "text_blocks": 12 * 3_152_384,
        "image_stem": 2_794_752,
        "text_stem": 25_599_488,
        "shared": 1,
        "total": 151_277_313,
    }


def test_depths_can_be_replaced() -> None:
    assert forward_flops(CONFIG, image_layers=1, text_layers=2) == forward_flops(towers.with_layers(CONFIG, 1, 2))


def curve(*values: float, start: int = 1) -> list[dict[str, float]]:
    return [{"step": 10 * n, "flops": 100 * n, "seconds": n, "q": value} for n, value in enumerate(values, start=start)]


def test_reached_means_twice_in_a_row() -> None:
    points = curve(0.1, 0.5, 0.4, 0.5, 0.6)
    found = first_reached(points, 0.5, "q")
    assert found is not None
    assert found["step"] == 40
    assert charge(points, 0.5, "q") == {"reached": True, "flops": 400, "seconds": 4, "step": 40}
    assert charge(curve(0.1, 0.2, 0.5), 0.5, "q") == {"reached": False, "flops": 300, "seconds": 3, "step": 30}


def test_a_model_used_as_written_has_one_evaluation() -> None:
    assert charge(curve(0.5, start=0), 0.5, "q")["reached"]
    assert charge(curve(0.5, start=0), 0.5, "q")["flops"] == 0
    assert not charge(curve(0.4, start=0), 0.5, "q")["reached"]


def entry(init: str, layers: int, values: list[float], *, first: float | None = None, start: int = 1, modality: str = "both") -> dict:
    return {
        "name": f"{layers}-{init}",
        "init": init,
        "image_layers": layers,
        "text_layers": layers,
        "image_width": 8,
        "text_width": 8,
        "modality": modality,
        "params": 10 * layers,
        "seed": 0,
        "metrics_at_0": None if first is None else {"q": first},
        "metrics_final": {"q": values[-1]},
        "curve": curve(*values, start=start),
    }


def family(*entries: dict) -> dict:
    return {
        "metric": "q",
        "ancestor": {"params": 100, "flops": 1000, "seconds": 10, "metrics": {"q": 0.9}},
        "learngene": {"params": 20, "bytes": 90, "flops": 150, "teacher_flops": 50, "seconds": 2},
        "descendants": list(entries),
    }


def test_family_by_hand() -> None:
    found = summarise(
        family(
            entry("scratch", 2, [0.2, 0.4]),  # target 0.4, cost 200
            entry("mmlg", 2, [0.45, 0.45], first=0.3, start=0),  # there as written: cost 0
            entry("distil", 2, [0.5, 0.5]),  # cost 100
            entry("scratch", 3, [0.2, 0.6, 0.6]),  # target 0.6, there after 200
            entry("mmlg", 3, [0.5, 0.6, 0.6], first=0.6, start=0),  # cost 100
            entry("distil", 3, [0.5, 0.5, 0.5]),  # never: 300
            entry("mmlg", 4, [0.5], first=0.5, start=0, modality="image"),  # not in the sum
        )
    )
    assert found["cost_ratio"] == (200 + 200) / (150 + 50 + 0 + 100)
    assert found["cost_ratio_by_baseline"] == {"distil": (100 + 300) / 300}
    assert found["cost_ratio_with_ancestor"] == 400 / 1300
    assert found["cost_ratio_with_ancestor_by_baseline"] == {"distil": (400 + 1000) / 1300}
    assert found["cost_ratio_seconds"] == (2 + 2) / (2 + 1)
    assert found["break_even_descendants"] == (1000 + 200) / ((400 - 100) / 2)
    assert found["mean_quality_at_0_over_scratch"] == pytest.approx((0.3 + 0.6) / (0.4 + 0.6))
    assert found["storage_ratio_ancestor"] == 0.2
    assert found["storage_ratio_family"] == 20 / (20 + 30 + 40)
    by_name = {e["name"]: e for e in found["descendants"]}
    assert by_name["3-distil"]["reached"] is False
    assert by_name["2-scratch"]["reached"] is True
    assert by_name["4-mmlg"]["target"] is None
    assert found["notes"] == []


def test_a_baseline_that_lacks_a_size_has_no_ratio() -> None:
    found = summarise(
        family(
            *(entry("scratch", n, [0.5, 0.5]) for n in (2, 3)),
            *(entry("mmlg", n, [0.5], first=0.5, start=0) for n in (2, 3)),
            entry("even", 2, [0.5, 0.5]),
        )
    )
    assert found["cost_ratio_by_baseline"] == {"even": None}
    assert "even" in found["notes"][0]


def test_descendants_that_miss_the_target_are_noted() -> None:
    found = summarise(family(entry("scratch", 2, [0.5, 0.5]), entry("mmlg", 2, [0.3], first=0.3, start=0)))
    assert found["descendants"][1]["reached"] is False
    assert "1 of 1" in found["notes"][0]
