"""The command line as a user meets it: help at once, mistakes in one line with exit code 2, nothing half-written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmlg_scale import towers
from mmlg_scale.cli import main
from mmlg_scale.data.scenes import write_scenes
from mmlg_scale.family import Plan
from mmlg_scale.recipe_file import SHIPPED, check_yaml, load_recipe
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


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_builds(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It parses, its architecture is supported, every member can be built, and its plan is one that can be run."""
    settings, runtime = load_recipe(path.stem)
    given = settings.model.config or settings.model.architecture
    if isinstance(given, dict):
        given["text_cfg"].setdefault("vocab_size", 50)
    config = towers.model_config(given)
    for size in settings.family.sizes:
        towers.build_meta(towers.with_sizes(config, image_layers=size.image_layers, text_layers=size.text_layers))
    plan = Plan(settings, runtime, Path("out"), image_size=towers.image_size(config))
    steps = [member.step for member in plan.members]
    known: set[str] = set()
    pending = list(steps)
    while ready := [step for step in pending if set(step.needs) <= known]:
        known |= {step.id for step in ready}
        pending = [step for step in pending if step.id not in known]
    assert not pending
    assert len({step.marker for step in steps}) == len(steps)


def test_the_architecture_takes_options_as_every_other_key(capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe has a free mapping there, all of which the parser would replace by the one key, whose number it would leave as text."""
    words = {"model.config.vision_cfg.layers": "3", "model.config.text_cfg.mlp_ratio": "2.5", "model.config.quick_gelu": "true"}
    settings, _ = load_recipe("demo", **words)
    config = settings.model.config
    assert config is not None
    assert (config["vision_cfg"]["layers"], config["text_cfg"]["mlp_ratio"], config["quick_gelu"]) == (3, 2.5, True)
    assert config["vision_cfg"]["width"] == 64  # the recipe's others stay
    said = refused("family", "demo", "--model.config.vision_cfg.layers", "{", "--out", "x", capsys=capsys)
    assert "--model.config.vision_cfg.layers: '{' is not valid YAML" in said


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
        ("--family.sizes=[{image_layers: 0}]", "image_layers"),
        ("--extraction.num_knots=1", "extraction.num_knots"),
        ("--ancestor.steps=0", "ancestor.steps"),
        ("--ancestor.steps=many", "ancestor.steps"),
        ("--model.architecture=ViT-B-32", "has architecture and config"),
        ("--ancestor.optimizer.beta1=1.5", "ancestor.optimizer.beta1"),
        ("--ancestor.batch_size=1", "ancestor.batch_size"),
        ("--extraction.width_shares=[0]", "extraction.width_shares"),
        ("--evaluation.metric=recall@5", "Did you mean mean_recall@5?"),
        ("--runtime.trackers=[mlflow]", "runtime.trackers"),
        ("--runtime.num_processes=3", "ancestor.batch_size: 128 is not a multiple of runtime.num_processes 3"),
        ("--engine.keep_features=true", "extraction.loss.hidden is 1.0 and compares hidden states"),
        ("--baselines.scratch.batch_size=20001", "baselines.scratch: the data set has 20000 samples, batch_size is 20001. Use a smaller"),
        ("--baselines.distil_loss.teacher_pool=20032", "baselines.distil_loss: the data set has 20,000 samples, a teacher_pool of 20,032"),
    ],
)
def test_values_out_of_range_name_their_key(option: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused("family", "demo", "--out", str(tmp_path / "o"), option, capsys=capsys)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data", "scenes", "--out", "o", "--image-size", "100000"], "a whole number from 16 to 8,192"),
        (["data", "pack", "s.csv", "--out", "o", "--seed", "-1"], "a whole number of 0 or more"),
        (["data", "pack", "s.csv", "--out", "o", "--val", "1.5"], "a number from 0 to below 1"),
        (["data", "check", "d", "--threads", "0"], "a whole number from 1 to 1,024"),
        (["data", "index", "d", "--val-shards", "-1"], "a whole number of 0 or more"),
    ],
)
def test_values_out_of_range_of_commands_on_data(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(*words, capsys=capsys)


def test_print_config_gives_a_recipe_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed is a recipe file: it resolves to the same recipe, and needs none of the command's own options."""
    assert main(["train", "demo", "--extraction.training.steps", "17", "--runtime.num_workers=3", "--print-config"]) == 0
    printed = capsys.readouterr().out
    file = tmp_path / "again.yaml"
    file.write_text(printed)
    settings, runtime = load_recipe(str(file))
    assert (settings.extraction.training.steps, runtime.num_workers) == (17, 3)
    assert main(["extract", str(file), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


def test_print_config_has_the_ancestor_that_an_option_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["family", "demo", "--ancestor", str(tmp_path / "run"), "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["weights"] == str(tmp_path / "run")


@pytest.mark.parametrize(("command", "section"), [("pretrain", "pretraining"), ("extract", "extraction"), ("extract", "baselines.tleg")])
def test_a_depth_that_the_model_does_not_have_names_its_own_key(
    command: str, section: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scenes(tmp_path / "data", num_train=32, num_val=8, num_test=8)
    words = [command, "demo", "--data.path", str(tmp_path / "data"), "--out", str(tmp_path / "o"), f"--{section}.min_layers", "20"]
    words += ["--ancestor-model", str(tmp_path)] if command == "extract" else []
    words += ["--method", "tleg"] if "tleg" in section else []
    assert f"recipe key {section}.min_layers: is 20, the image tower has 8" in refused(*words, capsys=capsys)


@pytest.mark.parametrize("words", [["--baselines.tleg.loss.teacher_pool", "null"], ["--baselines.tleg.loss.teacher_pool=~"]])
def test_null_two_levels_below_a_baseline(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """It is null, and the section's other keys keep their values."""
    assert main(["plan", "demo", "--baselines.tleg.loss.feature", "3", *words, "--print-config"]) == 0
    loss = yaml.safe_load(capsys.readouterr().out)["baselines"]["tleg"]["loss"]
    assert (loss["feature"], loss["hidden"], loss["teacher_pool"]) == (3.0, 1.0, None)


@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        ("baselines.tleg.training.optimizer.name", "null", "optimizer.name: null does not fit. Use one of 'adamw', 'muon'. See"),
        ("baselines.tleg.training.optimizer.name", "sgd", "optimizer.name: sgd does not fit. Use one of 'adamw', 'muon'. See"),
        ("baselines.tleg.loss.teacher_pool", "x", "teacher_pool: 'x' does not fit. Use a whole number of 1 or more or null. See"),
        ("baselines.tleg.lss.feature", "3", "unknown recipe key baselines.tleg.lss. Nearest valid key: baselines.tleg.loss."),
        (
            "pretraining.training.stepss",
            "null",
            "unknown recipe key pretraining.training.stepss. Nearest valid key: pretraining.training.steps.",
        ),
        ("baselines.scratch.step_count", "3", "unknown recipe key baselines.scratch.step_count."),
    ],
)
def test_what_is_wrong_below_a_section_that_may_be_null(word: str, value: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused("plan", "demo", f"--{word}", value, capsys=capsys)
    assert message in said
    assert not any(internal in said for internal in ("NestedArg", "class_path", "Union"))


def test_a_recipe_builds_no_class_that_it_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A value of free type may look like jsonargparse's request for an instance: it stays data, and is refused as a configuration."""
    file, trace = tmp_path / "r.yaml", tmp_path / "trace"
    file.write_text(f"model: {{config: {{class_path: subprocess.Popen, init_args: {{args: [touch, {trace}]}}}}}}\n")
    said = refused("train", str(file), "--data.path", str(tmp_path), "--out", str(tmp_path / "o"), capsys=capsys)
    assert not trace.exists()
    assert "mmlg: error" in said


def test_empty_data_and_missing_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    said = refused("train", "demo", "--data.path", str(tmp_path / "empty"), "--out", str(tmp_path / "o"), capsys=capsys)
    assert "contains no data set" in said
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
    assert "image layers: 0 is not a valid depth" in said
    assert "--text-layers is missing" in refused("descend", str(file), "--image-layers", "2", "--out", str(out), capsys=capsys)
    assert not out.exists()
    code, _ = run("descend", str(file), "--image-layers", "2", "--modality", "image", "--out", str(out), capsys=capsys)
    assert code == 0
    assert (out / "tower.json").exists()


def test_a_folder_of_something_else_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    assert "is not an mmlg family: it contains notes.txt" in refused("family", "demo", "--out", str(tmp_path / "mine"), capsys=capsys)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "kept"


@pytest.mark.parametrize("command", ["train", "extract", "features", "family", "plan"])
def test_a_recipe_that_is_left_out_or_not_first_is_asked_for(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(command, "--out", str(tmp_path / "o"), "demo", capsys=capsys)
    assert f"RECIPE is missing. It comes first: mmlg {command} RECIPE" in said
    assert main([command, "--model.architecture", "ViT-B-32", "--print-config"]) == 0  # all of it by options


def test_runtime_keys_in_the_wrong_place_are_shown_the_right_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("data:\n  num_workers: 3\n")
    said = refused("family", str(path), "--out", str(tmp_path / "o"), capsys=capsys)
    assert "unknown recipe key data.num_workers. Nearest valid key: runtime.num_workers." in said


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("ViT-B-33", "Nearest: "),
        ("RN50", "ResNet"),
        ({"embed_dim": 8}, "needs embed_dim, vision_cfg and text_cfg"),
        ({**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "widht": 3}}, "vision_cfg.widht: unknown. Nearest valid key: width"),
        ({**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "width": 20}}, "not a multiple of head_width"),
        ({**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "timm_model_name": "x"}}, "not supported"),
        ({**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "hf_model_name": "x"}}, "not supported"),
    ],
)
def test_architectures_that_are_not_supported(config, said: str) -> None:
    from mmlg_scale.errors import UserError

    with pytest.raises(UserError, match=said):
        towers.model_config(config)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("seed: 1\nseed: 2\n", "the key seed is there twice in one mapping"),
        ("ancestor:\n  steps: 3\n  optimizer: {name: muon, name: adamw}\n", "the key name is there twice in one mapping"),
        ("ancestor:\n", "recipe key ancestor is empty. Give a mapping of keys, or leave it out."),
        ("extraction: {training: null}\n", "recipe key extraction.training is empty."),
        ("family: {sizes: [null]}\n", "recipe key family.sizes is empty."),
        ("baselines: {tleg: {}}\n", "recipe key baselines.tleg.basis: is knots, which is not what TLEG does. Set it to linear."),
        ("baselines: {sws: {basis: linear}}\n", "recipe key baselines.sws.basis: is linear, which is not what SWS does. Set it to step."),
        ("ancestor: {optimizer: {learning_rate: .inf}}\n", "learning_rate: inf does not fit. Use a number above 0."),
        ("extraction: {coefficient_rate: .inf}\n", "coefficient_rate: inf does not fit. Use a number of 0 or more."),
    ],
)
def test_a_recipe_that_says_nothing_or_two_things_is_refused(
    recipe: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my.yaml").write_text(recipe)
    assert main(["recipe", "show", str(tmp_path / "my.yaml")]) == 2
    assert said in capsys.readouterr().err
    (tmp_path / "my.yaml").write_text("a: &x {seed: 1}\nb: {<<: *x, seed: 2}\n")  # merged keys may be overridden
    check_yaml((tmp_path / "my.yaml").read_text())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "demo", "--out", "x", "--learngene", "g"], "--learngene is of a descendant or a baseline, and the ancestor is trained."),
        (["train", "demo", "--out", "x", "--image-layers", "4"], "--image-layers is of a descendant or a baseline"),
        (["train", "demo", "--out", "x", "--modality", "both"], "--modality is of a descendant or a baseline"),
        (
            ["train", "demo", "--out", "x", "--init", "mmlg", "--learngene", "g", "--modality", "image", "--text-width", "8"],
            "--text-width is given, and --modality image has no text tower.",
        ),
        (["plan", "demo", "--nodes", "4"], "--nodes needs --cluster"),
        (["plan", "demo.yaml"], "no recipe file 'demo.yaml'."),
        (["plan", "demo", "--model", "null"], "--model: is null, and has keys: architecture, config"),
        (["plan", "demo", "--data.scenes=null"], "--data.scenes: is null, and has keys: num_train"),
        (["plan", "demo", "--out", "file"], "file is a file. Give a folder as --out."),
        (["descend", "g", "--image-layers", "2", "--text-width", "8", "--modality", "image", "--out", "x"], "writes no text tower."),
        (
            ["descend", "gene", "--image-layers", "2", "--text-layers", "2", "--out", "x"],
            "Give the file in it: gene/learngene.safetensors.",
        ),
        (["eval", "tower", "--data", "d", "--out", "gene"], "--out gene is a folder."),
        (["data", "pack", "twice.csv", "--out", "x"], "twice.csv has the column 'caption' 2 times."),
        (["data", "pack", "semicolons.csv", "--out", "x"], "Separate its columns by commas or tabs."),
        (["data", "pack", "empty.csv", "--out", "x"], "empty.csv is empty."),
        (["data", "pack", "twice.csv", "--out", "x", "--resize", "99999999"], "resize: 99999999 does not fit."),
        (
            ["data", "pack", "empty.csv", "--out", "x", "--images", "gene"],
            "--images is for a JSON file, and empty.csv is a table. Leave it out.",
        ),
        (["data", "pack", "gene", "--out", "x", "--caption-column", "b"], "--caption-column is for a table, and gene is a folder."),
        (["data", "pack", "coco.json", "--out", "x", "--templates", "a {}"], "--templates is for a folder, and coco.json is a JSON file."),
        (["launch", "local", "--num-processes", "2", "train", "demo"], "the command train needs -- before it"),
        (["launch", "slurm", "--dry-run", "--", "train", "demo"], "mmlg train: --out is missing."),
        (
            ["launch", "slurm", "--dry-run", "--nodes", "2", "--", "eval", "m", "--data", "d"],
            "mmlg eval runs in one process. Leave --nodes",
        ),
        (["launch", "slurm", "--dry-run", "--gpus-per-node=8", "--", "eval", "m", "--data", "d"], "Leave --gpus-per-node out."),
        (["launch", "local", "--num-processes", "2", "--", "data", "check", "d"], "mmlg data runs in one process."),
        (["launch", "slurm", "--dry-run", "--", "eval", "m", "--dta", "d"], "Did you mean '--data'? See mmlg eval --help."),
        (["launch", "slurm", "--dry-run", "--", "data", "index", "cc3m", "--part", "0/x", "--processes", "0"], "processes"),
    ],
)
def test_options_that_do_not_apply_are_refused(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, and not left out in silence."""
    monkeypatch.chdir(tmp_path)
    for folder in ("gene", "tower"):
        (tmp_path / folder).mkdir()
    for name, text in (
        ("file", ""),
        ("gene/learngene.safetensors", ""),
        ("twice.csv", "filepath,caption,caption\na.png,b,c\n"),
        ("semicolons.csv", "filepath;caption\na.png;b\n"),
        ("empty.csv", ""),
        ("coco.json", "{}"),
    ):
        (tmp_path / name).write_text(text)
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
