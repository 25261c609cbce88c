"""Model folders: features as open_clip's own model, transform and tokenizer give them, and one line for every kind of damage."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmlg_scale import towers
from mmlg_scale.towers.bundle import CONFIG_FILE, WEIGHTS_FILE
from tests.towers.models import (
    CAPTIONS,
    PLAIN,
    assert_close,
    assert_one_line,
    changed,
    clip_of,
    is_refused,
    loaded,
    open_clip_folder,
    pictures,
    small_bpe,
    state_of,
    without,
    word_tokenizer,
)

WORDS = word_tokenizer("two small red squares above a circle dog cat runs sleeps word")
NUM_WORDS = 16
BYTE_PAIRS = {**changed(changed(PLAIN, "text_cfg", vocab_size=49408, context_length=16), "vision_cfg", image_size=32), "quick_gelu": False}


def own(vocab_size: int, **fields: Any) -> dict[str, Any]:
    return changed(BYTE_PAIRS, "text_cfg", vocab_size=vocab_size, **fields)


def preprocess(**fields: Any) -> dict[str, Any]:
    return {"interpolation": "bicubic", "resize_mode": "shortest", **fields}


FOLDERS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, dict[str, str]]] = {
    "byte pairs": (BYTE_PAIRS, None, {}),
    "own words": (own(NUM_WORDS), preprocess(), WORDS),
    "own byte pairs": (own(301), preprocess(), small_bpe()),
    "left padding": (own(301), preprocess(), small_bpe(padding_side="left", truncation_side="left")),
    "mean and std": (own(NUM_WORDS), preprocess(mean=[0.5, 0.4, 0.3], std=[0.2, 0.25, 0.3]), WORDS),
    "one mean": (own(NUM_WORDS), {"mean": 0.5, "std": 0.5}, WORDS),
    "bilinear": (own(NUM_WORDS), preprocess(interpolation="bilinear"), WORDS),
    "squash": (own(NUM_WORDS), preprocess(resize_mode="squash"), WORDS),
    "longest": (own(NUM_WORDS), preprocess(resize_mode="longest", fill_color=77), WORDS),
    "QuickGELU": ({**own(NUM_WORDS), "quick_gelu": True}, preprocess(), WORDS),
    "SigLIP's loss": ({**own(NUM_WORDS), "init_logit_bias": -10.0}, preprocess(), WORDS),
    "other ViT": (changed(own(NUM_WORDS), "vision_cfg", pool_type="avg", no_ln_pre=True, norm_kwargs={"eps": 1e-3}), None, WORDS),
    "null entries": (
        {**changed(own(NUM_WORDS), "vision_cfg", ls_init_value=None), "init_logit_bias": None},
        {"mean": None, "size": 32, "mode": "RGB", "fill_color": 0},
        WORDS,
    ),
}


def write_folder(folder: Path, config: dict[str, Any], preprocess: dict[str, Any] | None, files: dict[str, str]) -> dict[str, Tensor]:
    """A model folder as others write it: nothing of ours is used."""
    folder.mkdir()
    content = {"model_cfg": json.loads(json.dumps(config))}
    if files:
        content["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "anything"
    if preprocess is not None:
        content["preprocess_cfg"] = preprocess
    state = state_of(config)
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    save_file(state, folder / "open_clip_model.safetensors")
    return state


def own_features(model: towers.Bundle, transform: Any, paths: list[Path]) -> tuple[Tensor, Tensor]:
    """With our tokenizer and normalisation, on the pixels that open_clip's resize and crop make."""
    resize = type(transform)(transform.transforms[:-2])
    images = [np.asarray(resize(Image.open(path).convert("RGB"))) for path in paths]
    clip = loaded(model.state, model.spec.config)
    with torch.no_grad():
        pixels = model.spec.preprocess(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
        return clip.encode_image(pixels), clip.encode_text(model.spec.tokenizer(CAPTIONS, model.spec.context_length))


def assert_as_open_clip(folder: Path, pictures_in: Path) -> towers.Bundle:
    """The folder gives open_clip's features here, and so does our export of it, here and there."""
    paths, model = pictures(pictures_in), towers.load_clip(folder)
    with open_clip_folder(folder) as (theirs, transform, tokenizer), torch.no_grad():
        wanted = theirs.encode_image(torch.stack([transform(Image.open(path)) for path in paths])), theirs.encode_text(tokenizer(CAPTIONS))
        assert torch.equal(model.spec.tokenizer(CAPTIONS, model.spec.context_length), tokenizer(CAPTIONS))
        assert_close(own_features(model, transform, paths), wanted, 1e-5)
    out = pictures_in / "export"
    towers.export(model, out)
    with open_clip_folder(out) as (theirs, transform, tokenizer), torch.no_grad():
        again = theirs.encode_image(torch.stack([transform(Image.open(path)) for path in paths])), theirs.encode_text(tokenizer(CAPTIONS))
        assert_close(again, wanted, 0.0)
    assert towers.load_clip(out).digest() == model.digest()
    return model


@pytest.mark.parametrize("kind", FOLDERS)
def test_features_are_open_clips(kind: str, tmp_path: Path) -> None:
    config, preprocess, files = FOLDERS[kind]
    write_folder(tmp_path / "model", config, preprocess, files)
    model = assert_as_open_clip(tmp_path / "model", tmp_path)
    model.spec.require_tokenizer("here")
    assert towers.load_ancestor(tmp_path / "model", towers.model_config(config)).digest() == model.digest()
    assert model.state["logit_scale"].shape == (1,)


def test_preprocessing_makes_the_difference_that_it_should(tmp_path: Path) -> None:
    """The folders above are not all the same to the eye of a model, nor in their digest."""
    found, digests = [], set()
    for kind in ("own words", "mean and std", "bilinear", "squash", "longest", "QuickGELU"):
        folder = tmp_path / kind
        write_folder(folder, *FOLDERS[kind])
        model = towers.load_clip(folder)
        with open_clip_folder(folder) as (_, transform, _):
            found.append(own_features(model, transform, pictures(tmp_path))[0])
        digests.add(model.digest())
    assert len(digests) == 6
    for other in found[1:]:
        assert (other - found[0]).norm() > 1e-3 * found[0].norm()


@pytest.mark.parametrize("form", ["safetensors", "bin", "both"])
def test_folders_that_open_clip_saves(form: str, tmp_path: Path) -> None:
    """`save_for_hf`, which pushes to the hub: its tokenizer files are used where the configuration names a tokenizer."""
    write_folder(tmp_path / "source", *FOLDERS["own words"])
    with open_clip_folder(tmp_path / "source") as (model, _, tokenizer):
        config = changed(own(NUM_WORDS), "text_cfg", hf_tokenizer_name="someone/words")
        kinds = {"safetensors": True, "bin": False, "both": "both"}
        save_for_hf = importlib.import_module("open_clip.push_to_hf_hub").save_for_hf
        save_for_hf(model, tokenizer, config, str(tmp_path / "model"), safe_serialization=kinds[form])
    assert ((tmp_path / "model" / WEIGHTS_FILE).exists(), (tmp_path / "model" / "open_clip_pytorch_model.bin").exists()) == {
        "safetensors": (True, False),
        "bin": (False, True),
        "both": (True, True),
    }[form]
    assert isinstance(assert_as_open_clip(tmp_path / "model", tmp_path).spec.tokenizer, towers.FileTokenizer)


def test_tokenizer_files_that_no_configuration_names_are_not_used(tmp_path: Path) -> None:
    """As in open_clip: models with its byte pairs are pushed with a tokenizer of transformers beside them."""
    write_folder(tmp_path / "model", BYTE_PAIRS, None, {})
    for name, text in WORDS.items():
        (tmp_path / "model" / name).write_text(text)
    assert isinstance(assert_as_open_clip(tmp_path / "model", tmp_path).spec.tokenizer, towers.BytePairTokenizer)


def test_an_ancestor_of_another_architecture_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", *FOLDERS["own words"])
    config = towers.model_config(own(NUM_WORDS))
    _, state = towers.load_ancestor(tmp_path / "model", config)
    assert_close((state["visual.proj"],), (clip_of(config).visual.proj.detach(),), 0.0)
    for other, said in (
        (towers.with_sizes(config, image_layers=4), "has vision_cfg.layers 3, recipe key model.config.vision_cfg.layers is 4"),
        ({**config, "quick_gelu": True}, "has quick_gelu False, recipe key model.config.quick_gelu is True"),
    ):
        assert_one_line(lambda other=other: towers.load_ancestor(tmp_path / "model", other), "model", said)


def test_a_tokenizer_larger_than_the_model_is_named(tmp_path: Path) -> None:
    """Byte pairs, which are what a folder has that says nothing, are checked where they are used."""
    write_folder(tmp_path / "words", own(NUM_WORDS - 1), None, WORDS)
    assert_one_line(lambda: towers.load_clip(tmp_path / "words"), "words", "has ids up to 15, the model's vocabulary ends at 14")
    write_folder(tmp_path / "pairs", own(NUM_WORDS), None, {})
    spec = towers.load_clip(tmp_path / "pairs").spec
    assert_one_line(lambda: spec.require_tokenizer("eval"), "eval", "open_clip's byte pairs", "ids up to 49407")


Change = Callable[[Path], object]


def config_is(text: str | bytes) -> Change:
    return lambda folder: (folder / CONFIG_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())


def edited(**parts: Any) -> Change:
    """The configuration with other entries at the top (`model_cfg={...}` is merged, one level down too)."""

    def change(folder: Path) -> None:
        content = json.loads((folder / CONFIG_FILE).read_text())
        for key, value in parts.items():
            if key in ("vision_cfg", "text_cfg"):
                content["model_cfg"][key] |= value
            elif key == "model_cfg" and isinstance(value, dict):
                content["model_cfg"] |= value
            else:
                content[key] = value
        (folder / CONFIG_FILE).write_text(json.dumps(content))

    return change


def dropped(*keys: str) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / CONFIG_FILE).read_text())
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        (folder / CONFIG_FILE).write_text(json.dumps(content))

    return change


def file_is(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def removed(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def linked(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(folder / "gone")

    return change


def a_folder(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def weights_with(edit: Callable[[dict[str, Tensor]], object]) -> Change:
    def change(folder: Path) -> None:
        state = load_file(folder / WEIGHTS_FILE)
        edit(state)
        save_file(state, folder / WEIGHTS_FILE)

    return change


def cut(folder: Path) -> None:
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(content[:-100])


def several(folder: Path) -> None:
    (folder / WEIGHTS_FILE).rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")


def sharded(folder: Path) -> None:
    (folder / WEIGHTS_FILE).rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")


def tokenizer_config(**entries: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return change


def reinit(folder: Path) -> None:
    shutil.rmtree(folder)


def as_file(folder: Path) -> None:
    reinit(folder)
    folder.write_text("x")


def as_broken_link(folder: Path) -> None:
    reinit(folder)
    folder.symlink_to(folder.parent / "gone")


DAMAGE: list[tuple[str, Change, str]] = [
    ("no folder", reinit, "no model folder"),
    ("a file", as_file, "is a file, not a model folder"),
    ("a broken link", as_broken_link, "is a broken link to"),
    ("no config", removed(CONFIG_FILE), "has no open_clip_config.json and no config.json"),
    ("config: broken link", linked(CONFIG_FILE), "is a broken link to"),
    ("config: a folder", a_folder(CONFIG_FILE), "is a folder, not a model configuration"),
    ("config: empty", config_is(""), "is not JSON"),
    ("config: cut", config_is('{"model_cfg": {'), "is not JSON"),
    ("config: latin-1", config_is('{"model_cfg": "é"}'.encode("latin-1")), "is not UTF-8 text (byte 15)"),
    ("config: a list", config_is("[1]"), "is a JSON list, not an object"),
    ("config: deep", config_is('{"model_cfg": ' + "[" * 100_000), "is JSON nested too deeply"),
    ("config: long", config_is(b" " * (2**24 + 1)), "has 16777217 bytes, a model configuration has at most"),
    ("config: LFS", config_is("version https://git-lfs.github.com/spec/v1\n"), "run git lfs pull"),
    ("no model_cfg", dropped("model_cfg"), "has no object model_cfg"),
    ("model_cfg: a string", edited(model_cfg="ViT-B-32"), "has no object model_cfg"),
    ("no text_cfg", dropped("model_cfg", "text_cfg"), "text_cfg: 'None' is not a mapping"),
    ("no vision_cfg", dropped("model_cfg", "vision_cfg"), "needs embed_dim, vision_cfg and text_cfg"),
    ("text_cfg: a list", edited(model_cfg={"text_cfg": []}), "text_cfg: '[]' is not a mapping"),
    ("unknown key", edited(text_cfg={"widht": 3}), "text_cfg.widht: unknown. Nearest valid key: width"),
    ("unknown part", edited(model_cfg={"audio_cfg": {}}), "audio_cfg: not supported"),
    ("negative layers", edited(vision_cfg={"layers": -1}), "vision_cfg.layers: '-1' is not a whole number from 1 to 1000"),
    ("absurd layers", edited(text_cfg={"layers": 10**9}), "text_cfg.layers: '1000000000' is not a whole number"),
    ("string width", edited(vision_cfg={"width": "16"}), "vision_cfg.width: '16' is not a whole number"),
    ("fraction", edited(text_cfg={"heads": 2.0}), "text_cfg.heads: '2.0' is not a whole number"),
    ("true", edited(text_cfg={"heads": True}), "text_cfg.heads: 'True' is not a whole number"),
    ("null width", edited(text_cfg={"width": None}), "text_cfg.width: 'None' is not a whole number"),
    ("zero heads", edited(text_cfg={"heads": 0}), "text_cfg.heads: '0' is not a whole number"),
    ("image pair", edited(vision_cfg={"image_size": [32, 16]}), "image_size: '[32, 16]' is not a whole number from 1 to 8192"),
    ("vocabulary", edited(text_cfg={"vocab_size": 10**8}), "vocab_size: '100000000' is not a whole number"),
    ("NaN ratio", edited(vision_cfg={"mlp_ratio": float("nan")}), "mlp_ratio: 'nan' is not supported. Use a number above 0"),
    ("string flag", edited(model_cfg={"quick_gelu": "yes"}), "quick_gelu: 'yes' is not true or false"),
    ("ResNet", edited(vision_cfg={"layers": [3, 4, 6, 3]}), "a ResNet image tower is not supported"),
    ("timm", edited(vision_cfg={"timm_model_name": "vit"}), "timm_model_name: 'vit' is not supported"),
    ("text tower", edited(text_cfg={"hf_model_name": "someone/bert"}), "hf_model_name: 'someone/bert' is not supported"),
    ("tokenizer options", edited(text_cfg={"tokenizer_kwargs": {"trust_remote_code": True}}), "tokenizer_kwargs"),
    ("tokenizer mode", edited(text_cfg={"tokenizer_mode": "clips"}), "tokenizer_mode 'clips' is not supported"),
    ("preprocess: a list", edited(preprocess_cfg=[1]), "preprocess_cfg is '[1]'"),
    ("preprocess: mean", edited(preprocess_cfg={"mean": [0.5, "x", 1]}), "preprocess_cfg.mean is"),
    ("preprocess: std", edited(preprocess_cfg={"std": [0.5, 0, 1]}), "preprocess_cfg.std is '[0.5, 0, 1]'. Use three positive numbers"),
    ("preprocess: zero", edited(preprocess_cfg={"mean": 0}), "preprocess_cfg.mean is '0'"),
    ("preprocess: mode", edited(preprocess_cfg={"mode": "L"}), "preprocess_cfg.mode is 'L'"),
    ("preprocess: resize", edited(preprocess_cfg={"resize_mode": {}}), "preprocess_cfg.resize_mode is '{}'"),
    ("preprocess: fill", edited(preprocess_cfg={"fill_color": True}), "preprocess_cfg.fill_color is 'True'"),
    ("no weights", removed(WEIGHTS_FILE), "has no open_clip_model.safetensors"),
    ("several weights", several, "has several files of weights"),
    ("sharded weights", sharded, "has its weights in several files (model.safetensors.index.json)"),
    ("weights: broken link", linked(WEIGHTS_FILE), "is a broken link to"),
    ("weights: cut", cut, "is cut off"),
    ("weights: LFS", file_is(WEIGHTS_FILE, b"version https://git-lfs.github.com/spec/v1\n"), "run git lfs pull"),
    ("weights: depth", edited(vision_cfg={"layers": 4}), "has 3 image layers, open_clip_config.json asks for 4"),
    ("weights: NaN", weights_with(lambda state: state["visual.proj"].fill_(float("nan"))), "visual.proj has"),
    ("weights: no scale", weights_with(lambda state: state.pop("logit_scale")), "has no logit_scale"),
    ("no tokenizer", removed("tokenizer.json"), "names a tokenizer (text_cfg.hf_tokenizer_name), but there is no tokenizer.json"),
    ("tokenizer: damaged", file_is("tokenizer.json", b'{"version": "1.0"}'), "tokenizer.json is damaged"),
    ("tokenizer: cut", file_is("tokenizer.json", b'{"version": '), "tokenizer.json is damaged: it is not JSON"),
    ("tokenizer: broken link", linked("tokenizer_config.json"), "is a broken link to"),
    ("tokenizer: code", tokenizer_config(auto_map={"AutoTokenizer": ["code.Evil", None]}), "tokenizer_config.json has auto_map"),
    ("tokenizer: class", tokenizer_config(tokenizer_class="LlamaTokenizer"), "tokenizer_class LlamaTokenizer is not supported"),
    ("tokenizer: padding", tokenizer_config(pad_token="<gone>"), "pad_token '<gone>' is not in tokenizer.json"),
    ("tokenizer: side", tokenizer_config(padding_side="up"), "padding_side 'up'"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    write_folder(folder, *FOLDERS["own words"])
    return folder


@pytest.mark.parametrize(("name", "change", "said"), DAMAGE, ids=[row[0] for row in DAMAGE])
def test_damaged_folders(name: str, change: Change, said: str, whole: Path, tmp_path: Path) -> None:
    folder, config = tmp_path / "model", towers.load_clip(whole).spec.config
    shutil.copytree(whole, folder)
    change(folder)
    assert_one_line(lambda: towers.load_clip(folder), str(folder), said)
    if folder.is_dir():
        assert_one_line(lambda: towers.load_ancestor(folder, config), str(folder), said)


def test_any_change_of_the_configuration_is_one_line_or_a_model(whole: Path, tmp_path: Path) -> None:
    """Every value of the configuration replaced by every kind of value."""
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    content = json.loads((folder / CONFIG_FILE).read_text())
    kinds: list[Any] = [None, True, -1, 0, 10**30, 1.5, float("inf"), "x", [], [1, 2], {}, {"a": {"b": []}}]
    places = [(), *((key,) for key in content), *(("model_cfg", key) for key in content["model_cfg"])]
    places += [("model_cfg", tower, key) for tower in ("vision_cfg", "text_cfg") for key in content["model_cfg"][tower]]
    refused = 0
    for place in places:
        for kind in kinds:
            new = json.loads(json.dumps(content))
            inner = new
            for key in place[:-1]:
                inner = inner[key]
            if place:
                inner[place[-1]] = kind
            (folder / CONFIG_FILE).write_text(json.dumps(new if place else kind))
            refused += is_refused(lambda: towers.load_clip(folder))
    assert refused > 150


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda header: header.pop("preprocess"), "preprocess is missing"),
        (lambda header: header.update(model_config=[]), "model_config is missing or not an object"),
        (lambda header: header["model_config"]["text_cfg"].update(hf_tokenizer_name="a/b"), "hf_tokenizer_name: 'a/b' is not supported"),
        (lambda header: header["tokenizer_files"].update({"../x": ""}), "'../x' is not a tokenizer file"),
        (lambda header: header["tokenizer_files"].update({"code.py": ""}), "'code.py' is not a tokenizer file"),
        (lambda header: header["tokenizer_files"].update({"vocab.json": 3}), "vocab.json is not text"),
        (lambda header: header["tokenizer_files"].pop("tokenizer.json"), "no tokenizer.json"),
        (lambda header: header["tokenizer_files"].update({"merges.txt": "x" * (50 * 2**20 + 1)}), "merges.txt has 52428801 characters"),
    ],
)
def test_headers_that_are_refused(edit: Callable[[dict[str, Any]], object], said: str, whole: Path) -> None:
    spec = towers.load_clip(whole).spec
    header = json.loads(json.dumps(spec.to_header()))
    assert towers.ModelSpec.from_header(header, "file").digest() == spec.digest()
    edit(header)
    assert_one_line(lambda: towers.ModelSpec.from_header(header, "some.file"), "some.file", said)


def test_defaults_need_not_be_said(tmp_path: Path) -> None:
    """Two configurations that open_clip builds alike are no difference."""
    write_folder(tmp_path / "model", without(own(NUM_WORDS), "quick_gelu"), None, WORDS)
    config = towers.model_config(changed(own(NUM_WORDS), "vision_cfg", mlp_ratio=4.0, patch_dropout=0.5))
    assert towers.load_ancestor(tmp_path / "model", config).spec.config["vision_cfg"]["layers"] == 3
