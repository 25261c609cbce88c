"""The modules against open_clip's own: random start (bit for bit), functions, gradients; and the tables in place of its dataclasses."""

from __future__ import annotations

import contextlib

import pytest
import torch

from mmlg_scale import towers
from mmlg_scale.towers.config import DEFAULTS
from mmlg_scale.towers.modules import LayerNorm
from tests.towers.models import PLAIN, WIDE, batch, changed, open_clips_own

SINE = changed(PLAIN, "vision_cfg", pos_embed_type="sin_cos_2d", no_ln_pre=True, pool_type="avg")
LATE = changed(changed(PLAIN, "vision_cfg", final_ln_after_pool=True), "text_cfg", norm_kwargs={"eps": 1e-3}, mlp_ratio=2.5)
TANH = {**changed(changed(PLAIN, "text_cfg", act_kwargs={"approximate": "tanh"}), "vision_cfg", mlp_ratio=3.3), "init_logit_bias": -10.0}
CONFIGS = {"plain": PLAIN, "quick_gelu": WIDE, "sine": SINE, "late": LATE, "tanh": TANH}


@pytest.mark.parametrize("name", CONFIGS)
def test_start_features_and_gradients_are_open_clips(name: str) -> None:
    config = towers.model_config(CONFIGS[name])
    own, theirs = towers.build_clip(config, seed=5), open_clips_own(config, 5)
    found, wanted = own.state_dict(), theirs.state_dict()
    assert list(found) == list(wanted)
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key
    assert {key: p.requires_grad for key, p in own.named_parameters()} == {key: p.requires_grad for key, p in theirs.named_parameters()}
    images, texts = batch(config)
    for clip in (own, theirs):
        (clip.encode_image(images, normalize=True) @ clip.encode_text(texts, normalize=True).T).square().sum().backward()
    for (key, one), other in zip(own.named_parameters(), theirs.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), key
        if one.grad is not None and other.grad is not None:
            assert (one.grad - other.grad).norm() <= 1e-5 * other.grad.norm(), key
    own, theirs = own.eval(), theirs.eval()
    with torch.no_grad():
        for context, bound in ((contextlib.nullcontext(), 1e-6), (torch.autocast("cpu", dtype=torch.bfloat16), 1e-2)):
            with context:
                for mine, other in (
                    (own.encode_image(images), theirs.encode_image(images)),
                    (own.encode_text(texts), theirs.encode_text(texts)),
                ):
                    assert mine.dtype == other.dtype
                    assert (mine - other).norm() <= bound * other.norm()


def test_layer_norm_keeps_its_type() -> None:
    norm: torch.nn.Module = LayerNorm(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", CONFIGS)
def test_the_meta_device_has_the_same_names_and_shapes(name: str) -> None:
    config = towers.model_config(CONFIGS[name])

    def shapes(clip: torch.nn.Module) -> dict[str, tuple[int, ...]]:
        return {key: tuple(tensor.shape) for key, tensor in clip.state_dict().items()}

    meta = towers.build_meta(config)
    assert {tensor.device.type for tensor in [*meta.parameters(), *meta.buffers()]} == {"meta"}
    assert shapes(meta) == shapes(towers.build_clip(config, seed=0))


def test_tables_are_open_clips() -> None:
    """Fields and defaults; names of architectures, in order; and what each says."""
    assert vars(towers.open_clip.CLIPVisionCfg()) == DEFAULTS["vision_cfg"]
    assert vars(towers.open_clip.CLIPTextCfg()) == DEFAULTS["text_cfg"]
    assert towers.architecture_names() == towers.open_clip.list_models()
    assert towers.open_clip_version() == towers.open_clip.__version__
    plain = towers.Preprocess()
    assert (plain.mean, plain.std) == (towers.open_clip.OPENAI_DATASET_MEAN, towers.open_clip.OPENAI_DATASET_STD)


def test_a_tower_has_the_tensors_of_open_clips_class() -> None:
    from mmlg_scale.towers.bundle import _tower_shapes
    from mmlg_scale.towers.library import build_tower

    for config in CONFIGS.values():
        for modality in ("image", "text"):
            theirs = build_tower(config, modality).state_dict()
            assert _tower_shapes(config, modality) == {name: tuple(tensor.shape) for name, tensor in theirs.items()}
