"""The command line as a user meets it: help at once, mistakes in one line with exit code 2, nothing half-written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mmlg_scale import recipe, towers
from mmlg_scale.cli import COMMANDS, main
from mmlg_scale.family import plan
from mmlg_scale.training.checkpoint import claim_run_folder
from tests.training.tiny import ANY_SIZE, CONFIG


def run(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.err


def refused(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a mistake gives."""
    code, said = run(*words, capsys=capsys)
    assert code == 2, said
    assert said.count("\n") == 1
    assert said.startswith("mmlg: error: ")
    return said


def test_help_imports_nothing_heavy() -> None:
    """What makes --help quick: torch, open_clip, deepspeed and the recipe parser stay out."""
    script = (
        "import sys; from mmlg_scale.cli import main; assert main(['--help']) == 0; "
        "print(sorted({'torch', 'open_clip', 'deepspeed', 'jsonargparse', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert "mmlg family demo" in done.stdout


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_has_help(command: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0


@pytest.mark.parametrize("path", sorted(recipe.SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_builds(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It parses, its architecture is carried, every member can be built, and its plan is one that can be run."""
    from mmlg_scale.cli import _parse_recipe, _parser

    _, settings = _parse_recipe(_parser("family", ""), [path.stem])
    given = settings.model.config or settings.model.architecture
    if isinstance(given, dict):
        given["text_cfg"].setdefault("vocab_size", 50)
    config = towers.model_config(given)
    for size in settings.family.sizes:
        towers.build_meta(towers.with_sizes(config, image_layers=size.image_layers, text_layers=size.text_layers))
    steps = plan(settings, Path("out"), image_size=towers.image_size(config))
    known: set[str] = set()
    pending = list(steps)
    while ready := [step for step in pending if set(step.needs) <= known]:
        known |= {step.id for step in ready}
        pending = [step for step in pending if step.id not in known]
    assert not pending
    assert len({step.marker for step in steps}) == len(steps)


def test_unknown_keys_name_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("extraction:\n  training:\n    stepps: 3\n")
    said = refused("family", str(path), "--out", str(tmp_path / "o"), capsys=capsys)
    assert "unknown recipe key extraction.training.stepps. Nearest valid key: extraction.training.steps." in said
    path.write_text("family:\n  sizes:\n    - {image_layerss: 2}\n")
    assert "family.sizes[0].image_layers" in refused("family", str(path), "--out", str(tmp_path / "o"), capsys=capsys)
    said = refused("family", "demo", "--out", str(tmp_path / "o"), "--extraction.training.stepps", "3", capsys=capsys)
    assert "--extraction.training.steps" in said
    assert "shipped recipes: " in refused("family", "dmeo", "--out", str(tmp_path / "o"), capsys=capsys)
    assert "'family'" in refused("famly", capsys=capsys)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--family.sizes=[{image_layers: 0}]", "family.sizes[0].image_layers: is 0"),
        ("--extraction.num_knots=1", "extraction.num_knots"),
        ("--ancestor.steps=0", "ancestor.steps"),
        ("--ancestor.steps=many", "ancestor.steps"),
        ("--model.architecture=ViT-B-32", "exactly one of"),
        ("--engine.keep_features=true", "extraction.loss.hidden is 1.0 and compares hidden states"),
    ],
)
def test_values_out_of_range_name_their_key(option: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused("family", "demo", "--out", str(tmp_path / "o"), option, capsys=capsys)
    assert not (tmp_path / "o").exists()


def test_overrides_reach_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "demo", "--out", "x", "--extraction.training.steps", "17", "--print-config"])
    assert "steps: 17" in capsys.readouterr().out


def test_empty_data_and_missing_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    said = refused("train", "demo", "--data.path", str(tmp_path / "empty"), "--out", str(tmp_path / "o"), capsys=capsys)
    assert "holds no data set" in said
    table = tmp_path / "t.csv"
    table.write_text("filepath,caption\nnowhere.png,x\n")
    assert "row 2: no image" in refused("data", "pack", str(table), "--out", str(tmp_path / "o"), capsys=capsys)
    assert not (tmp_path / "o").exists()


def test_depth_zero_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mmlg_scale.learngene.auxiliary import AuxiliaryCLIP
    from mmlg_scale.learngene.file import Learngene
    from mmlg_scale.learngene.structure import Structure

    config = towers.model_config(CONFIG)
    model = AuxiliaryCLIP.from_ancestor(towers.build_clip(config, seed=0).state_dict(), Structure(config, num_knots=2), seed=0)
    file = tmp_path / "learngene.safetensors"
    Learngene.from_auxiliary(
        model.structure, model.state_dict(), spec=towers.ModelSpec(model.structure.config), extraction={}, trained=ANY_SIZE
    ).save(file)
    out = tmp_path / "out"
    said = refused("descend", str(file), "--image-layers", "0", "--text-layers", "2", "--out", str(out), capsys=capsys)
    assert "image layers: 0 is no depth" in said
    assert "--text-layers is missing" in refused("descend", str(file), "--image-layers", "2", "--out", str(out), capsys=capsys)
    assert not out.exists()
    code, _ = run("descend", str(file), "--image-layers", "2", "--modality", "image", "--out", str(out), capsys=capsys)
    assert code == 0
    assert (out / "tower.json").exists()


def test_a_folder_of_another_run_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    settings = recipe.Recipe()
    claim_run_folder(out, {"role": "family", "recipe": settings.to_dict()})
    said = refused("family", "demo", "--out", str(out), capsys=capsys)
    assert "holds another recipe's run" in said
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    assert "holds no run of mmlg" in refused("family", "demo", "--out", str(tmp_path / "mine"), capsys=capsys)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("ViT-B-33", "Nearest: "),
        ("RN50", "ResNet"),
        ({"embed_dim": 8}, "needs embed_dim, vision_cfg and text_cfg"),
        ({**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "widht": 3}}, "vision_cfg.widht: unknown. Nearest valid key: width"),
        ({**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "width": 20}}, "not a multiple of head_width"),
        ({**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "timm_model_name": "x"}}, "not carried"),
        ({**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "hf_model_name": "x"}}, "not carried"),
    ],
)
def test_architectures_that_are_not_carried(config, said: str) -> None:
    from mmlg_scale.errors import UserError

    with pytest.raises(UserError, match=said):
        towers.model_config(config)
