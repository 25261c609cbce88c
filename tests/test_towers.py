"""Configurations, block-wise running and weights from elsewhere, against open_clip's and Hugging Face's own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmlg_scale import towers
from mmlg_scale.errors import UserError
from tests.training.tiny import CONFIG, batch

# Widths that are multiples of 64: OpenAI's format says the number of heads by the width.
WIDE: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 128, "head_width": 64, "layers": 2},
    "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 64, "heads": 1, "layers": 3},
}


def clip_of(config: dict[str, Any]) -> towers.CLIP:
    """Every tensor random, so that a wrong place would show."""
    clip = towers.build_clip(towers.model_config(config), seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            if name != "logit_scale":
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return clip


def features(clip: Any) -> tuple[Tensor, Tensor]:
    images, texts = batch(0)
    with torch.no_grad():
        return clip.encode_image(images), clip.encode_text(texts)


def assert_same_features(state: dict[str, Tensor], config: dict[str, Any], expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    clip = towers.build_clip(config, seed=7).eval()
    clip.load_state_dict(state, strict=True)
    for found, wanted in zip(features(clip), expected, strict=True):
        assert wanted.norm() > 0.1
        assert (found - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("config", [CONFIG, WIDE])
def test_blocks_one_by_one_are_the_whole_tower(config: dict[str, Any]) -> None:
    """Features bit for bit, and tapped hidden states as forward hooks see them."""
    clip = clip_of(config)
    images, texts = batch(0)
    seen: list[Tensor] = []
    hook = clip.visual.transformer.resblocks[1].register_forward_hook(lambda module, args, out: seen.append(out))
    image_features, text_features = features(clip)
    hook.remove()
    with torch.no_grad():
        found, hidden = towers.encode_image_with_hidden(clip, images, tap=(2,))
        assert torch.equal(found, image_features)
        assert torch.equal(towers.encode_text_with_hidden(clip, texts)[0], text_features)
    assert torch.equal(hidden[0], seen[0])


def test_openai_weights(tmp_path: Path) -> None:
    """fp16 as OpenAI ships them, read by open_clip's own builder and by ours; a plain GELU architecture is refused."""
    clip = clip_of(WIDE)
    state = {name: tensor.half() for name, tensor in clip.state_dict().items()}
    state["logit_scale"] = state["logit_scale"].reshape(())
    sizes = {"input_resolution": 16, "context_length": 8, "vocab_size": 20}
    torch.save({**state, **{name: torch.tensor(value) for name, value in sizes.items()}}, tmp_path / "openai.pt")
    theirs = towers.open_clip.model.build_model_from_openai_state_dict(dict(state), cast_dtype=torch.float32).float().eval()
    config = towers.model_config(WIDE)
    assert_same_features(towers.load_weights(tmp_path / "openai.pt", config), config, features(theirs), 1e-6)
    with pytest.raises(UserError, match="use QuickGELU; recipe key model does not"):
        towers.load_weights(tmp_path / "openai.pt", {**config, "quick_gelu": False})


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_hugging_face_weights(form: str, tmp_path: Path) -> None:
    """A random transformers CLIPModel, by its own forward and by open_clip's with the weights that were read."""
    from transformers import CLIPConfig, CLIPModel

    common = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    text = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 1, "vocab_size": 20}
    text |= {"max_position_embeddings": 8, "eos_token_id": 19, "bos_token_id": 1, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = CLIPModel(CLIPConfig(text_config={**text, **common}, vision_config={**vision, **common}, projection_dim=24)).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
    state = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    if form == "safetensors":
        save_file(state, tmp_path / "model.safetensors")
    else:
        torch.save(state, tmp_path / "model.bin")
    images, texts = batch(0)
    with torch.no_grad():
        image_features = theirs.visual_projection(theirs.vision_model(images).pooler_output)
        text_features = theirs.text_projection(theirs.text_model(texts).pooler_output)
    config = towers.model_config(WIDE)
    assert_same_features(towers.load_weights(tmp_path / f"model.{form}", config), config, (image_features, text_features), 1e-5)


@pytest.mark.parametrize("form", ["plain", "trainer", "text tower apart"])
def test_open_clip_weights(form: str, tmp_path: Path) -> None:
    clip = clip_of(CONFIG)
    state = dict(clip.state_dict())
    path = tmp_path / "weights.pt"
    if form == "plain":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    elif form == "trainer":
        torch.save({"epoch": 3, "name": "run", "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    else:
        own = ("visual.", "logit_scale")
        torch.save({name if name.startswith(own) else f"text.{name}": tensor for name, tensor in state.items()}, path)
    config = towers.model_config(CONFIG)
    assert_same_features(towers.load_weights(path, config), config, features(clip), 0.0)


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_files_that_are_refused(tmp_path: Path) -> None:
    config = towers.model_config(CONFIG)

    def refused(name: str, said: str) -> None:
        with pytest.raises(UserError, match=said):
            towers.load_weights(tmp_path / name, config)

    refused("weights.onnx", "no file of weights that is understood")
    refused("none.pt", "no file of weights .*none.pt")
    torch.save({"visual.proj": Payload(tmp_path / "created")}, tmp_path / "pickle.pt")
    refused("pickle.pt", "not a plain state dict")
    assert not (tmp_path / "created").exists()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "archive.pt")
    refused("archive.pt", "with TorchScript archives passed")
    torch.save([1, 2], tmp_path / "list.pt")
    refused("list.pt", "holds a list, no state dict")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    refused("cut.safetensors", "not a safetensors file")
    state = dict(clip_of(CONFIG).state_dict())
    save_file({name: tensor for name, tensor in state.items() if name != "visual.proj"}, tmp_path / "less.safetensors")
    refused("less.safetensors", r"asks for visual.proj of shape \(16, 16\), the file lacks it")
    save_file({**state, "visual.proj": torch.zeros(16, 8)}, tmp_path / "other.safetensors")
    refused("other.safetensors", r"the file has it with shape \(16, 8\)")
    save_file({**state, "extra": torch.zeros(1)}, tmp_path / "more.safetensors")
    refused("more.safetensors", "holds extra")


def test_an_ancestor_folder_of_another_architecture(tmp_path: Path) -> None:
    config = towers.model_config(CONFIG)
    towers.export(clip_of(CONFIG).state_dict(), config, tmp_path / "m")
    own, state = towers.load_ancestor(tmp_path / "m", config)
    assert towers.num_layers(own, "image") == 3
    assert state["logit_scale"].shape == (1,)
    with pytest.raises(UserError, match=r"has vision_cfg.layers 3, recipe key model.config.vision_cfg.layers is 4"):
        towers.load_ancestor(tmp_path / "m", towers.with_sizes(config, image_layers=4))


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
        ({"image_layers": 0}, "image layers: 0 is no depth"),
    ):
        with pytest.raises(UserError, match=said):
            towers.with_sizes(config, **sizes)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("ViT-B-33", "open_clip has no 'ViT-B-33'. Nearest: ViT-B-32"),
        ("RN50", "a ResNet image tower is not carried"),
        ("ViT-B-16-SigLIP", "not carried"),
        ("coca_ViT-B-32", "not carried"),
        ("roberta-ViT-B-32", "not carried"),
        ({**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "widht": 3}}, "vision_cfg.widht: unknown. Nearest valid key: width"),  # type: ignore[dict-item]
        ({**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "width": 20}}, "20 is not a multiple of head_width 8"),  # type: ignore[dict-item]
    ],
)
def test_architectures_that_are_not_carried(given: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        towers.model_config(given)
