"""open_clip's configurations: which are supported, with which bounds, and what other sizes change."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mmlg_scale import towers
from mmlg_scale.errors import UserError
from tests.towers.models import PLAIN, assert_one_line, changed


def test_the_plain_vits_that_open_clip_ships_are_supported() -> None:
    """Whatever has no other tower, pooling or text model; open_clip builds what it built from the original."""
    supported = []
    for name in towers.architecture_names():
        original = towers.open_clip.get_model_config(name)
        odd = ("timm", "hf_", "no_causal", "pool", "ls_")
        is_plain = set(original) <= {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"} and not {
            key for tower in ("vision_cfg", "text_cfg") for key in original[tower] if key.startswith(odd)
        }
        is_plain = is_plain and not isinstance(original["vision_cfg"]["layers"], list)
        try:
            assert towers.model_config(name) == original
            supported.append(name)
            assert is_plain, name
        except UserError:
            assert not is_plain, name
    assert len(supported) >= 31
    assert {"ViT-B-32", "ViT-B-16-quickgelu", "ViT-L-14-336", "ViT-H-14", "ViT-bigG-14"} <= set(supported)


def test_sizes_change_what_they_say_and_nothing_else() -> None:
    config = towers.model_config("ViT-B-32")
    before = json.dumps(config)
    narrow = towers.with_sizes(config, image_layers=3, image_width=512, text_width=256)
    assert (towers.num_layers(narrow, "image"), towers.num_layers(narrow, "text")) == (3, 12)
    assert (towers.width(narrow, "image"), towers.head_dim(narrow, "image")) == (512, 64)
    assert (towers.width(narrow, "text"), towers.head_dim(narrow, "text")) == (256, 64)
    assert narrow["embed_dim"] == 512
    assert json.dumps(config) == before
    for sizes, said in (
        ({"text_width": 100}, "text width: 100 does not fit. Use a multiple of the head dimension 64, at most 512"),
        ({"image_layers": 0}, "image layers: 0 is not a valid depth"),
    ):
        with pytest.raises(UserError, match=said):
            towers.with_sizes(config, **sizes)


REFUSED: list[tuple[Any, str]] = [
    ("ViT-B-33", "open_clip has no 'ViT-B-33'. Nearest: ViT-B-32"),
    ("日本", "open_clip has no '日本'"),
    (None, "needs embed_dim, vision_cfg and text_cfg"),
    ([1], "needs embed_dim, vision_cfg and text_cfg"),
    ({**PLAIN, "x": {1, 2}}, "not plain JSON (TypeError)"),
    ("RN50", "a ResNet image tower is not supported"),
    ("ViT-B-16-SigLIP", "not supported"),
    ("coca_ViT-B-32", "not supported"),
    ("roberta-ViT-B-32", "not supported"),
    (changed(PLAIN, "vision_cfg", widht=3), "vision_cfg.widht: unknown. Nearest valid key: width"),
    (changed(PLAIN, "vision_cfg", width=20), "20 is not a multiple of head_width 8"),
    (changed(PLAIN, "text_cfg", heads=3), "16 is not a multiple of heads 3"),
    (changed(PLAIN, "vision_cfg", image_size=17), "17 is not a multiple of patch_size 8"),
    (changed(PLAIN, "vision_cfg", image_size=[16, 16]), "image_size: '[16, 16]' is not a whole number from 1 to 8192"),
    (changed(PLAIN, "vision_cfg", layers=1001), "layers: '1001' is not a whole number from 1 to 1000"),
    (changed(PLAIN, "text_cfg", width=65552), "width: '65552' is not a whole number from 1 to 65536"),
    (changed(PLAIN, "text_cfg", vocab_size=10_000_001), "is not a whole number from 1 to 10000000"),
    (changed(PLAIN, "text_cfg", context_length=16_385), "is not a whole number from 1 to 16384"),
    (changed(PLAIN, "text_cfg", mlp_ratio=0.01), "mlp_ratio: 0.01 of width 16 leaves no MLP"),
    (changed(PLAIN, "text_cfg", hf_tokenizer_name="someone/evil"), "hf_tokenizer_name: 'someone/evil' is not supported"),
    (changed(PLAIN, "text_cfg", tokenizer_kwargs={"trust_remote_code": True}), "tokenizer_kwargs"),
    (changed(PLAIN, "text_cfg", hf_model_pretrained=False), "hf_model_pretrained: 'False' is not supported"),
    (changed(PLAIN, "text_cfg", pool_type="last"), "pool_type: 'last' is not supported"),
    (changed(PLAIN, "vision_cfg", pool_type="none"), "pool_type: 'none' is not supported"),
    (changed(PLAIN, "vision_cfg", attentional_pool=1), "attentional_pool: '1' is not supported"),
    (changed(PLAIN, "vision_cfg", patch_dropout=1.0), "patch_dropout: '1.0' is not supported. Use a fraction"),
    (changed(PLAIN, "vision_cfg", norm_kwargs={"eps": 1e-6, "bias": False}), "Use only eps"),
    ({**changed(PLAIN, "vision_cfg", act_kwargs={"approximate": "tanh"}), "quick_gelu": True}, "without quick_gelu"),
    ({**PLAIN, "embed_dim": True}, "embed_dim: 'True' is not a whole number"),
    ({**PLAIN, "quick_gelu": 1}, "quick_gelu: '1' is not true or false"),
    ({**PLAIN, "init_logit_bias": float("nan")}, "init_logit_bias: 'nan' is not a number"),
    ({**PLAIN, "init_logit_bias": True}, "init_logit_bias: 'True' is not a number"),
]


@pytest.mark.parametrize(("given", "said"), REFUSED, ids=[row[1] for row in REFUSED])
def test_architectures_that_are_not_supported(given: Any, said: str) -> None:
    assert_one_line(lambda: towers.model_config(given), "recipe key model", said)
    if isinstance(given, dict):
        assert_one_line(lambda: towers.model_config(given, where="a.json: model_cfg"), "a.json: model_cfg", said)
