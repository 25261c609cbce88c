"""Hugging Face's model folders, against transformers' own CLIPModel, image processor and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlg_scale import towers
from mmlg_scale.towers import hugging_face
from tests.towers.models import WIDE, assert_close, assert_one_line, batch, clip_of, features, loaded, small_bpe

VISION = {"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 16, "patch_size": 8}
TEXT = {"hidden_size": 32, "intermediate_size": 70, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 20}
TEXT |= {"max_position_embeddings": 8, "eos_token_id": 19, "bos_token_id": 1, "pad_token_id": 0}
EXPECTED: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 48, "head_width": 16, "layers": 2, "mlp_ratio": 100 / 48},
    "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 4, "layers": 3, "mlp_ratio": 70 / 32},
}


def model_of(act: str, *, vision: dict[str, Any] = VISION, text: dict[str, Any] = TEXT) -> Any:
    """A CLIPModel whose every number is random."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(text_config={**text, "hidden_act": act}, vision_config={**vision, "hidden_act": act}, projection_dim=24)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


def their_features(model: Any, config: Any) -> tuple[Tensor, Tensor]:
    images, texts = batch(config)
    with torch.no_grad():
        image_features = model.visual_projection(model.vision_model(images).pooler_output)
        return image_features, model.text_projection(model.text_model(texts).pooler_output)


def save(model: Any, folder: Path, form: str = "safetensors") -> None:
    """As transformers writes it, or with the former pytorch_model.bin."""
    model.save_pretrained(folder)
    if form == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_a_folder_is_taken_as_it_is(act: str, form: str, tmp_path: Path) -> None:
    """Architecture, activation and features; the other activation gives other features."""
    theirs = model_of(act)
    save(theirs, tmp_path / "model", form)
    model = towers.load_clip(tmp_path / "model")
    assert model.spec.config == {**EXPECTED, "quick_gelu": act == "quick_gelu"}
    assert model.spec.preprocess == towers.Preprocess()
    wanted = their_features(theirs, EXPECTED)
    assert_close(features(loaded(model.state, model.spec.config), EXPECTED), wanted, 1e-5)
    other = features(loaded(model.state, {**model.spec.config, "quick_gelu": act == "gelu"}), EXPECTED)
    assert all((one - two).norm() > 1e-3 * two.norm() for one, two in zip(other, wanted, strict=True))
    towers.export(model, tmp_path / "export")
    assert towers.load_clip(tmp_path / "export").digest() == model.digest()
    assert towers.load_ancestor(tmp_path / "model", model.spec.config).digest() == model.digest()
    gelu = {**model.spec.config, "quick_gelu": act == "gelu"}
    assert_one_line(lambda: towers.load_ancestor(tmp_path / "model", gelu), "model", "quick_gelu")


@pytest.mark.parametrize("form", ["safetensors", "bin", "prefixed.pt"])
def test_files_of_weights(form: str, tmp_path: Path) -> None:
    """Alone, without a folder around; also as another model holds it, with buffers that older versions wrote."""
    theirs = model_of("quick_gelu", vision={**VISION, "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2})
    state = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    config = towers.model_config(
        {
            **EXPECTED,
            "quick_gelu": True,
            "vision_cfg": {**EXPECTED["vision_cfg"], "width": 128, "head_width": 64, "mlp_ratio": 4.0},
        }
    )
    path = tmp_path / f"model.{form}"
    if form == "safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        if form == "prefixed.pt":
            state = {f"model.clip.{name}": tensor for name, tensor in state.items()}
            state |= {"clip.vision_model.embeddings.position_ids": torch.arange(5)[None]}
        torch.save(state, path)
    own = loaded(towers.load_weights(path, config), config)
    assert_close(features(own, config), their_features(theirs, config), 1e-5)


def test_a_configuration_that_says_nothing_leaves_it_to_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = model_of("quick_gelu")
    save(theirs, tmp_path / "model")
    (tmp_path / "model/config.json").write_text("{}")
    capsys.readouterr()
    config = towers.model_config({**EXPECTED, "quick_gelu": True})
    model = towers.load_ancestor(tmp_path / "model", config)
    assert_close(features(loaded(model.state, config), config), their_features(theirs, config), 1e-5)
    assert_one_line(lambda: towers.load_clip(tmp_path / "model"), "config.json", "does not describe a model")
    four = towers.with_sizes(config, text_layers=4)
    assert_one_line(lambda: towers.load_ancestor(tmp_path / "model", four), "model.safetensors", "3 text layers, the recipe asks for 4")
    assert capsys.readouterr().err == ""


def test_what_a_configuration_leaves_out_has_transformers_default() -> None:
    """OpenAI's ViT-B/32, as in open_clip."""
    from transformers import CLIPConfig

    found = hugging_face.config_of({"model_type": "clip"}, "here")
    wanted = towers.model_config("ViT-B-32-quickgelu")
    assert towers.bundle.first_difference(found, wanted) is None
    written = CLIPConfig().to_diff_dict()
    assert hugging_face.config_of(written, "here") == found
    # The older way to write a configuration rules over the newer, as there.
    older = {"model_type": "clip", "text_config": {"hidden_act": "gelu"}, "text_config_dict": {"hidden_act": "quick_gelu"}}
    assert hugging_face.activation(older, "here") == CLIPConfig(**older).text_config.hidden_act == "quick_gelu"


def test_mlps_of_any_width_are_those_of_open_clip() -> None:
    """open_clip takes a ratio and rounds down."""
    for width in (7, 48, 768, 1280):
        for inner in (width, width + 1, 3 * width - 1, 4 * width, 5 * width + 3):
            ratio = hugging_face._ratio({"hidden_size": width, "intermediate_size": inner})
            assert int(width * ratio) == inner


def edited(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **entries: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        content["text_config"] |= text or {}
        content["vision_config"] |= vision or {}
        (folder / "config.json").write_text(json.dumps(content | entries))

    return change


def preprocessor(**entries: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "preprocessor_config.json").write_text(json.dumps(entries))


REFUSED: list[tuple[Callable[[Path], object], str]] = [
    (edited(model_type="siglip"), "model_type is 'siglip', not clip"),
    (edited(text_config=[1]), "text_config is not an object"),
    (edited(text={"hidden_act": "gelu_new"}), "text_config.hidden_act is 'gelu_new'. Supported: gelu and quick_gelu"),
    (edited(text={"hidden_act": "gelu"}), "hidden_act is gelu in text_config and quick_gelu in vision_config"),
    (edited(vision={"layer_norm_eps": 1e-6}), "vision_config.layer_norm_eps is 1e-06. Supported: 1e-05"),
    (edited(vision={"num_attention_heads": 5}), "hidden_size 48 is not a multiple of num_attention_heads 5"),
    (edited(vision={"num_attention_heads": 0}), "num_attention_heads is '0'"),
    (edited(vision={"hidden_size": "48"}), "hidden_size is '48'"),
    (edited(vision={"image_size": [16, 8]}), "image_size: '[16, 8]' is not a whole number"),
    (edited(vision={"num_channels": 4}), "num_channels is 4"),
    (edited(vision={"num_hidden_layers": 3}), "has 2 image layers, config.json asks for 3"),
    (edited(text={"num_hidden_layers": 10**9}), "text_cfg.layers: '1000000000' is not a whole number"),
    (edited(text={"eos_token_id": 7}), "text_config.eos_token_id is 7 of 20 tokens"),
    (edited(text={"vocab_size": 21, "eos_token_id": 20}), "has a vocabulary of 20 tokens, config.json asks for 21"),
    (edited(projection_dim="x"), "embed_dim: 'x' is not a whole number"),
    (lambda folder: (folder / "config.json").write_text("["), "config.json is damaged: it is not JSON"),
    (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
    (lambda folder: (folder / "preprocessor_config.json").write_text("no"), "preprocessor_config.json is damaged: it is not JSON"),
    (preprocessor(resample=1), "resample is 1. Supported: 2 (bilinear) or 3 (bicubic)"),
    (preprocessor(do_resize=False), "do_resize is False. Supported: true"),
    (preprocessor(do_rescale=False), "do_rescale is False"),
    (preprocessor(rescale_factor=1.0), "rescale_factor is 1.0. Supported: 1/255"),
    (preprocessor(size={"shortest_edge": 20}, crop_size=16), "do not give images of 16 pixels"),
    (preprocessor(size={"shortest_edge": 16}, do_center_crop=False), "do not give images of 16 pixels"),
    (preprocessor(image_mean=[0.5]), "preprocess_cfg.mean is"),
    (preprocessor(image_std="x"), "preprocess_cfg.std is"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json is damaged"),
    (lambda folder: (folder / "vocab.json").write_text("{}"), "no tokenizer.json"),
]


@pytest.mark.parametrize(("change", "said"), REFUSED, ids=[row[1] for row in REFUSED])
def test_folders_that_are_refused(change: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    save(model_of("quick_gelu"), tmp_path / "model")
    change(tmp_path / "model")
    assert_one_line(lambda: towers.load_clip(tmp_path / "model"), str(tmp_path / "model"), said)


@pytest.mark.parametrize(
    "options",
    [
        {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}},
        {"size": 16, "crop_size": 16, "resample": 2, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
        {"size": {"height": 16, "width": 16}, "do_center_crop": False},
        {"size": {"height": 16, "width": 16}, "crop_size": {"height": 16, "width": 16}, "do_normalize": False},
    ],
)
@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_preprocessing(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Normalised as transformers' processor does it on an image of the right size, and resized as open_clip names it."""
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(**options)
    processor.save_pretrained(tmp_path)
    if name == "processor_config.json":
        content = json.loads((tmp_path / "preprocessor_config.json").read_text())
        (tmp_path / name).write_text(json.dumps({"image_processor": content, "processor_class": "CLIPProcessor"}))
        (tmp_path / "preprocessor_config.json").unlink()
    found = hugging_face.preprocess_of(tmp_path, 16)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wanted = processor(list(images), return_tensors="pt")["pixel_values"]
    assert_close((found(images),), (wanted,), 1e-6)
    assert found.interpolation == ("bilinear" if options.get("resample") == 2 else "bicubic")
    assert found.resize_mode == ("squash" if isinstance(options["size"], dict) and "height" in options["size"] else "shortest")


def test_byte_pairs_are_recognised(tmp_path: Path) -> None:
    """OpenAI's tokenizer as transformers saves it has open_clip's ids, but for the padding; a changed one is a tokenizer of its own."""
    from transformers import CLIPTokenizer

    own = towers.BytePairTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): index for token, index in own.vocabulary.items()}
    merges = [" ".join(pair) for pair in own.merges]
    theirs = CLIPTokenizer(vocab=vocabulary, merges=[tuple(merge.split()) for merge in merges])
    theirs.save_pretrained(tmp_path)
    files = {path.name: path.read_text() for path in tmp_path.iterdir() if path.name in towers.TOKENIZER_FILES}
    assert hugging_face.has_byte_pairs(files)
    assert hugging_face.has_byte_pairs({"vocab.json": json.dumps(vocabulary), "merges.txt": "\n".join(merges)})
    texts = ["a photo of a dog", "TWO  cats, running!"]
    ids = theirs(texts, padding="max_length", max_length=20, return_tensors="pt")["input_ids"]
    ends = (ids == 49407).int().argmax(dim=-1)
    for row, end in enumerate(ends.tolist()):
        assert torch.equal(own(texts, 20)[row, : end + 1], ids[row, : end + 1])
    vocabulary["the</w>"], vocabulary["a</w>"] = vocabulary["a</w>"], vocabulary["the</w>"]
    assert not hugging_face.has_byte_pairs({"vocab.json": json.dumps(vocabulary)})
    assert not hugging_face.has_byte_pairs({"tokenizer.json": "{}"})


def test_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    theirs = model_of("gelu", text={**TEXT, "vocab_size": 301, "eos_token_id": 300})
    save(theirs, tmp_path / "model")
    for name, text in small_bpe().items():
        (tmp_path / "model" / name).write_text(text, encoding="utf-8")
    spec = towers.load_clip(tmp_path / "model").spec
    assert isinstance(spec.tokenizer, towers.FileTokenizer)
    assert spec.tokenizer(["a dog"], 8).max() == 300


def test_open_clips_own_folder_is_not_taken_for_one(tmp_path: Path) -> None:
    """A folder with both configurations is open_clip's, as in open_clip."""
    config = towers.model_config(WIDE)
    towers.export(towers.Bundle(towers.ModelSpec(config), clip_of(config).state_dict()), tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"model_type": "bert"}')
    assert towers.load_clip(tmp_path / "model").spec.config == config
    (tmp_path / "model/open_clip_config.json").unlink()
    assert_one_line(lambda: towers.load_clip(tmp_path / "model"), "config.json", "model_type is 'bert', not clip")
