"""What belongs together stays together: every command gives a model the inputs that open_clip's own pipeline would.

Model folders of six kinds (own words, byte pairs, other mean and std, squashed or padded images, QuickGELU) go through eval, extract, train
and descend. What comes out is loaded by open_clip, with its transform and its tokenizer, and must give the features that we computed.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmlg_scale import load_learngene, recipe, towers
from mmlg_scale.cli import main
from mmlg_scale.data.corpus import open_pairs
from mmlg_scale.data.pack import PackSettings, pack_table
from mmlg_scale.data.reader import ShardReader
from mmlg_scale.data.tokens import word_tokenizer_files
from mmlg_scale.errors import UserError
from mmlg_scale.evaluation.evaluate import evaluate_folder, folder_features
from mmlg_scale.runtime import Runtime
from mmlg_scale.training.learngene_roles import ExtractionRole
from mmlg_scale.training.roles import AncestorRole, DescendantRole, features_identity
from mmlg_scale.training.run import run_role

CAPTIONS = [
    "A red Ring, left of &amp; a BLUE square",
    "two crosses \u2014 tiny",
    "the sky\u2019s edge",
    "a ring",
    "red red red red red red red red",
]
WORDS = ["a ring left of square blue red the sky edge two crosses tiny &"]
TRAINING = recipe.Training(steps=1, batch_size=8, eval_every=1)


@dataclass(frozen=True)
class Kind:
    """One way in which a model wants its inputs."""

    words: bool = False
    quick_gelu: bool = False
    preprocess: towers.Preprocess = field(default_factory=towers.Preprocess)


KINDS = {
    "byte pairs": Kind(),
    "own words": Kind(words=True),
    "other mean and std": Kind(preprocess=towers.Preprocess(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.5))),
    "squash": Kind(words=True, preprocess=towers.Preprocess(resize_mode="squash", interpolation="bilinear")),
    "longest": Kind(preprocess=towers.Preprocess(resize_mode="longest", fill_color=127)),
    "quick gelu": Kind(words=True, quick_gelu=True),
}


def model_of(kind: Kind) -> towers.Bundle:
    """A random CLIP whose features show every difference."""
    tokenizer = towers.tokenizer_from_files(word_tokenizer_files(WORDS)) if kind.words else towers.BytePairTokenizer()
    config = towers.model_config(
        {
            "embed_dim": 16,
            "quick_gelu": kind.quick_gelu,
            "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 2},
            "text_cfg": {"context_length": 9, "width": 16, "heads": 2, "layers": 2, "vocab_size": tokenizer.vocab_size},
        }
    )
    return towers.Bundle(towers.ModelSpec(config, kind.preprocess, tokenizer), towers.build_clip(config, seed=5).state_dict())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pairs packed three times: with no tokenizer, and with two vocabularies. Images of odd sizes, wide and tall."""
    root = tmp_path_factory.mktemp("contracts")
    generator, lines = np.random.default_rng(0), ["filepath,caption,split"]
    for index in range(24):
        height, width = (int(side) for side in generator.integers(20, 90, size=2))
        coarse = Image.fromarray(generator.integers(0, 256, size=(4, 4, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BILINEAR).save(root / f"{index}.png")
        split = ["train", "train", "val", "test"][index % 4]
        lines += [f'{index}.png,"{caption} {index % 5}",{split}' for caption in (CAPTIONS[index % 5], CAPTIONS[(index + 1) % 5])]
    (root / "pairs.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, tokenizer in (("none", "none"), ("words", "words")):
        pack_table(root / "pairs.csv", root / name, PackSettings(tokenizer=tokenizer))
    other = root / "tokenizer.json"
    other.write_text(word_tokenizer_files(["zebra yak red ring"])["tokenizer.json"])
    pack_table(root / "pairs.csv", root / "other", PackSettings(tokenizer=str(other)))
    return root


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "m"
    towers.export(model_of(KINDS[request.param]), out)
    return out


@torch.no_grad()
def open_clips_features(folder: Path, data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of the test split by open_clip only: its model, its transform, its tokenizer, on the packed bytes."""
    model, _, transform = towers.open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer, reader = towers.open_clip.get_tokenizer(f"local-dir:{folder}"), ShardReader(data / "test")
    images = torch.stack([transform(Image.open(io.BytesIO(reader.image_bytes(index)))) for index in range(len(reader))])
    captions = [text for index in range(len(reader)) for text in reader.about(index)["captions"]]
    model.eval()
    return model.encode_image(images), model.encode_text(tokenizer(captions))


def check_features(folder: Path, data: Path) -> None:
    images, texts, _ = folder_features(folder, data, "test")
    expected_images, expected_texts = open_clips_features(folder, data)
    torch.testing.assert_close(images, expected_images, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(texts, expected_texts, rtol=1e-5, atol=1e-5)


def settings_for(data: Path, tokenizer: str = "auto") -> recipe.Recipe:
    return recipe.Recipe(
        data=recipe.Data(path=str(data), tokenizer=tokenizer),  # type: ignore[arg-type]
        extraction=recipe.Extraction(min_layers=1, num_knots=2, training=TRAINING),
        adaptation=recipe.Adaptation(training=TRAINING),
    )


def described(folder: Path) -> Any:
    content = json.loads((folder / "open_clip_config.json").read_text())
    return content["preprocess_cfg"], content["model_cfg"].get("quick_gelu", False)


def test_every_command_feeds_a_model_what_it_was_trained_on(folder: Path, data: Path, tmp_path: Path) -> None:
    pairs, settings = data / "none", settings_for(data / "none")
    check_features(folder, pairs)
    run_role(ExtractionRole(settings, folder), tmp_path / "gene", Runtime())
    file = tmp_path / "gene" / "learngene.safetensors"
    load_learngene(file).descend(image_layers=1, text_layers=2).export(tmp_path / "small")
    check_features(tmp_path / "small", pairs)
    role = DescendantRole(settings, "mmlg", recipe.Size(2, 1), ancestor=folder, learngene=file)
    result = run_role(role, tmp_path / "adapted", Runtime())
    check_features(tmp_path / "adapted" / "model", pairs)
    for written in (tmp_path / "small", tmp_path / "adapted" / "model"):
        assert described(written) == described(folder)
        assert (written / "tokenizer.json").exists() == (folder / "tokenizer.json").exists()
    assert evaluate_folder(tmp_path / "adapted" / "model", pairs, "test") == pytest.approx(result["metrics"])


def test_an_ancestor_from_a_folder_stays_what_it_was(folder: Path, data: Path, tmp_path: Path) -> None:
    """mmlg train with model.weights: evaluated and exported with its own preprocessing and tokenizer, its numbers unchanged."""
    settings = settings_for(data / "none")
    settings.model.weights = str(folder)
    run_role(AncestorRole(settings), tmp_path / "run", Runtime())
    exported = towers.load_clip(tmp_path / "run" / "model")
    original = towers.load_clip(folder)
    assert exported.spec.digest() == original.spec.digest()
    assert all(torch.equal(exported.state[name], tensor) for name, tensor in original.state.items())
    check_features(tmp_path / "run" / "model", data / "none")


def test_another_vocabulary_of_the_same_pairs_changes_no_digit(folder: Path, data: Path) -> None:
    metrics = [evaluate_folder(folder, data / name, "test") for name in ("none", "words", "other")]
    assert metrics[0] == metrics[1] == metrics[2]


def test_training_refuses_another_tokenizer_and_says_what_to_do(folder: Path, data: Path, tmp_path: Path) -> None:
    """By identity, not by size; and with data.tokenizer model the model's own is used."""
    for role in (ExtractionRole, AncestorRole):
        settings = settings_for(data / "other")
        if role is AncestorRole:
            settings.model.weights = str(folder)
        made = ExtractionRole(settings, folder) if role is ExtractionRole else AncestorRole(settings)
        with pytest.raises(UserError, match=r"Set data\.tokenizer to model") as error:
            run_role(made, tmp_path / role.__name__, Runtime())
        assert "tokenizer" in str(error.value)
        assert not (tmp_path / role.__name__ / "result.json").exists()
    run_role(ExtractionRole(settings_for(data / "other", "model"), folder), tmp_path / "gene", Runtime())
    descendant = load_learngene(tmp_path / "gene" / "learngene.safetensors").descend(image_layers=2, text_layers=2)
    assert descendant.spec.tokenizer.identity == towers.load_clip(folder).spec.tokenizer.identity


def test_tokenizers_of_one_size_are_told_apart(data: Path, tmp_path: Path) -> None:
    model = model_of(KINDS["own words"])
    swapped = towers.tokenizer_from_files(word_tokenizer_files([WORDS[0].replace("ring", "rung")]))
    assert swapped.vocab_size == model.spec.tokenizer.vocab_size
    towers.export(towers.Bundle(replace(model.spec, tokenizer=swapped), model.state), tmp_path / "m")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "tokenizer.json").write_text(model.spec.tokenizer.files["tokenizer.json"])
    pack_table(data / "pairs.csv", tmp_path / "set", PackSettings(tokenizer=str(tmp_path / "own" / "tokenizer.json")))
    with pytest.raises(UserError, match=r"Set data\.tokenizer to model"):
        run_role(ExtractionRole(settings_for(tmp_path / "set"), tmp_path / "m"), tmp_path / "gene", Runtime())


def test_a_learngene_and_an_ancestor_that_want_other_inputs_do_not_mix(data: Path, tmp_path: Path) -> None:
    model = model_of(KINDS["byte pairs"])
    towers.export(model, tmp_path / "m")
    other = replace(model.spec, preprocess=towers.Preprocess(resize_mode="squash"))
    towers.export(towers.Bundle(other, model.state), tmp_path / "other")
    settings = settings_for(data / "none")
    run_role(ExtractionRole(settings, tmp_path / "m"), tmp_path / "gene", Runtime())
    role = DescendantRole(
        settings, "mmlg", recipe.Size(2, 2), ancestor=tmp_path / "other", learngene=tmp_path / "gene" / "learngene.safetensors"
    )
    with pytest.raises(UserError, match="another preprocessing than the ancestor"):
        run_role(role, tmp_path / "run", Runtime())


def test_an_edited_configuration_is_another_model(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An export whose mean and std were edited by hand: open_clip's features, one line, and another input to whatever reads it."""
    folder, settings = tmp_path / "m", settings_for(data / "none")
    towers.export(model_of(KINDS["own words"]), folder)
    pairs = open_pairs(data / "none")

    def identities() -> list[Any]:
        size = recipe.Size(1, 2)
        ancestor = replace(settings, model=replace(settings.model, weights=str(folder)))
        roles = (AncestorRole(ancestor), ExtractionRole(settings, folder), DescendantRole(settings, "even", size, ancestor=folder))
        return [*(role.identity(pairs)["inputs"] for role in roles), features_identity(settings, pairs, folder)["inputs"]]

    before, unedited = identities(), folder_features(folder, data / "none", "test")[0]
    config = folder / "open_clip_config.json"
    content = json.loads(config.read_text())
    content["preprocess_cfg"] |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.5]}
    config.write_text(json.dumps(content))
    capsys.readouterr()
    check_features(folder, data / "none")
    assert capsys.readouterr().err.count(f"mmlg: {config} has changed since it was exported") == 1
    assert (folder_features(folder, data / "none", "test")[0] - unedited).abs().max() > 0.01
    after = identities()
    assert all(one != other for one, other in zip(before, after, strict=True))
    run_role(ExtractionRole(settings, folder), tmp_path / "gene", Runtime())
    assert load_learngene(tmp_path / "gene" / "learngene.safetensors").spec.preprocess.std == (0.2, 0.3, 0.5)
    (folder / "mmlg.json").unlink()  # silences the line, and changes nothing that is used
    assert identities() == after


def test_cut_captions_are_counted(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    towers.export(model_of(KINDS["own words"]), tmp_path / "m")
    assert main(["eval", str(tmp_path / "m"), "--data", str(data / "none")]) == 0
    said = capsys.readouterr()
    model = towers.load_clip(tmp_path / "m")
    reader = ShardReader(data / "none" / "test")
    captions = [text for index in range(len(reader)) for text in reader.about(index)["captions"]]
    whole = model.spec.tokenizer(captions, 60)
    cut = int(((whole != 0).sum(dim=1) > 9).sum())
    assert 0 < cut < len(captions)
    assert f"{cut} of {len(captions)} captions" in said.out + said.err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"init": "scratch", "learngene": Path("g")}, "--learngene is not read by --init scratch. Leave it out, or use --init mmlg or"),
        ({"init": "distil", "learngene": Path("g"), "ancestor": Path("a")}, "--learngene is not read by --init distil"),
        (
            {"init": "distil", "features": Path("f"), "ancestor": Path("a")},
            "--features is given, and recipe key engine.keep_features is fal",
        ),
        ({"init": "scratch", "target_of": Path("t")}, "--target-of is given, and recipe key family.stop_at_target is false"),
        ({"init": None, "features": Path("f"), "ancestor": Path("a")}, "--features is given, and recipe key engine.keep_features is false"),
    ],
)
def test_what_a_run_would_not_read_is_refused(given: dict[str, Any], said: str, data: Path) -> None:
    """Someone who forgot --init mmlg would train from random weights for days."""
    settings = settings_for(data / "none")
    settings.family.stop_at_target = False
    init = given.pop("init")
    role = ExtractionRole(settings, **given) if init is None else DescendantRole(settings, init, recipe.Size(2, 1), **given)
    with pytest.raises(UserError, match=said):
        role.check(open_pairs(settings.data.path))
