"""A whole family at the smallest size: the real command, killed in three stages, against an undisturbed run."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from mmlg_launchers import Cluster, Resources, SlurmLauncher
from PIL import Image

from mmlg_scale import records
from mmlg_scale.assemble import _cost_of_weights, _measured_on
from mmlg_scale.cli import main
from mmlg_scale.data.scenes import write_scenes
from mmlg_scale.errors import UserError
from mmlg_scale.family_jobs import FamilyJobs
from mmlg_scale.forecast import forecast
from mmlg_scale.recipe_file import load_recipe
from mmlg_scale.records import KEY

RECIPE = {
    "data": {"scenes": {"num_train": 160, "num_val": 24, "num_test": 24}},
    "model": {
        "config": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 3},
            "text_cfg": {"context_length": 16, "width": 16, "heads": 2, "layers": 3},
        }
    },
    "ancestor": {"steps": 60, "batch_size": 32, "eval_every": 12},
    "extraction": {"min_layers": 1, "num_knots": 3, "training": {"steps": 60, "batch_size": 32, "eval_every": 12}},
    "pretraining": {"min_layers": 1, "num_knots": 3, "training": {"steps": 8, "batch_size": 32, "eval_every": 4}},
    "adaptation": {
        "training": {"steps": 4, "batch_size": 32, "eval_every": 2},
        "direct": {"steps": 3, "batch_size": 16, "eval_every": 1},
    },
    "baselines": {
        "scratch": {"steps": 8, "batch_size": 32, "eval_every": 4},
        "even": {"steps": 8, "batch_size": 32, "eval_every": 4},
        "distil": {"steps": 60, "batch_size": 32, "eval_every": 12},
    },
    "family": {"sizes": [{"image_layers": 2, "text_layers": 2}, {"image_layers": 2, "modality": "image"}], "stop_at_target": False},
}


def start(recipe: Path, out: Path) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "mmlg_scale", "family", str(recipe), "--out", str(out)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(recipe: Path, out: Path, *options: str) -> tuple[int, str]:
    """Exit code and console of the command in this process: the heavy imports, and the server that jobs are forked from, are paid once."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(["family", str(recipe), "--out", str(out), *options])
    return code, said.getvalue()


def complete(recipe: Path, out: Path, *options: str) -> str:
    """What a run that succeeds prints."""
    code, said = run(recipe, out, *options)
    assert code == 0, said
    return said


def figures(out: Path) -> dict[str, Any]:
    """family.json without what the clock decides, and the learngene's bytes."""
    family = json.loads((out / "family.json").read_text())
    del family["environment"], family["cost_ratio_seconds"], family[KEY]
    for part in (
        family["ancestor"],
        family["learngene"],
        *family["rival_learngenes"].values(),
        *family["descendants"],
        *family["totals_by_init"].values(),
    ):
        part.pop("seconds", None)
        part.pop("seconds_to_target", None)
        for point in part.get("curve", []):
            del point["seconds"]
    family["learngene_file"] = (out / "learngene" / "learngene.safetensors").read_bytes()
    return family


def kill_when(process: subprocess.Popen[str], appears: Path, unless: Path) -> None:
    """SIGKILL the command as soon as a checkpoint of a stage is there, and check that the stage was not over."""
    end = time.monotonic() + 120
    while not list(appears.glob("step-*")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(1.0)  # its jobs end with it
    assert not unless.exists()


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture(scope="module")
def undisturbed(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("family") / "undisturbed"
    (out.parent / "said.txt").write_text(complete(recipe_file, out))
    return out


def test_a_log_file_has_a_line_for_each_start_evaluation_and_end(undisturbed: Path) -> None:
    said = (undisturbed.parent / "said.txt").read_text()
    assert f"ancestor: started, log in {undisturbed / 'ancestor.launch' / 'log.txt'}\n" in said
    for step, total, every in (("ancestor", 60, 12), ("i2-t2-scratch", 8, 4), ("i2-t2-mmlg", 4, 2)):
        folder = undisturbed / ("" if step == "ancestor" else "descendants") / step
        curve = {point["step"]: point["mean_recall@1"] for point in json.loads((folder / "result.json").read_text())["curve"]}
        told = re.findall(rf"^{step}: (\d+)/{total}  mean_recall@1 ([0-9.]+)  \d+ s$", said, re.MULTILINE)
        assert [(int(number), value) for number, value in told] == [(number, f"{value:.3f}") for number, value in curve.items()]
        assert set(range(every, total + 1, every)) <= set(curve)
        assert re.search(rf"^\[\d+/10\] {step}: complete after \d+ s$", said, re.MULTILINE)


def test_the_plan_is_what_the_runs_charged(
    recipe_file: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every step's parameters, steps and FLOPs before the run, against its result.json; and which are complete."""

    def plan(*options: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["plan", str(recipe_file), "--json", "--flops-per-second", "1e12", *options]) == 0
        return json.loads(capsys.readouterr().out)

    fresh, there = plan(), plan("--out", str(undisturbed))
    results = {path.parent.name: json.loads(path.read_text()) for path in undisturbed.rglob("result.json")}
    steps = {step["id"]: step for step in fresh["steps"]}
    assert set(steps) == {*results, "data"}
    for name, result in results.items():
        for key in ("params", "steps", "flops", "teacher_flops"):
            assert steps[name][key] == result[key], (name, key)
        weights = list(undisturbed.rglob(f"{name}/model/*.safetensors")) or list(undisturbed.rglob(f"{name}/*.safetensors"))
        assert steps[name]["export_bytes"] == pytest.approx(weights[0].stat().st_size, rel=0.35)  # headers: the models are tiny
    assert {step["state"] for step in fresh["steps"]} == {"new"}
    assert {step["state"] for step in there["steps"]} == {"kept"}
    assert there["totals"]["seconds"] == 0 < fresh["totals"]["seconds"]
    changed = plan("--out", str(undisturbed), "--baselines.scratch.steps", "12", "--adaptation.training.steps", "6")
    states = {step["id"]: step["state"] for step in changed["steps"]}
    again = {"i2-t2-scratch", "i2-t2-mmlg"}
    # A single tower is not trained; targets are not used here, so that what is compared with scratch stays too.
    assert {name for name, state in states.items() if state != "kept"} == again
    assert {states[name] for name in again} == {"again"}
    # A run that was stopped half-way, and a folder that the family would refuse.
    stopped = tmp_path / "stopped"
    shutil.copytree(undisturbed, stopped)
    (stopped / "descendants" / "i2-t2-even" / "result.json").unlink()
    (stopped / "descendants" / "i2-t2-even" / "checkpoints" / "step-00000004").mkdir(parents=True)
    left = next(step for step in plan("--out", str(stopped))["steps"] if step["state"] != "kept")
    assert (left["id"], left["state"], left["done"]) == ("i2-t2-even", "resumes", 4)
    assert left["seconds"] == pytest.approx(steps["i2-t2-even"]["seconds"] / 2)
    assert main(["plan", str(recipe_file), "--out", str(stopped), "--ancestor.steps", "61"]) == 2
    assert "contains a family of another ancestor or data set: ancestor.steps was 60, now 61" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_in_three_stages_gives_the_same_numbers(recipe_file: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    for stage in ("ancestor", "learngene", "descendants/i2-t2-distil"):
        kill_when(start(recipe_file, out), out / stage / "checkpoints", out / stage / "result.json")
    complete(recipe_file, out)
    assert figures(out) == figures(undisturbed)


def test_family_json_report_and_metrics(undisturbed: Path) -> None:
    family = json.loads((undisturbed / "family.json").read_text())
    inits = {(entry["init"], entry["modality"]) for entry in family["descendants"]}
    assert inits == {("mmlg", "both"), ("mmlg", "image"), *((init, "both") for init in ("direct", "scratch", "even", "distil"))}
    assert family["cost_ratio"] > 0
    assert set(family["cost_ratio_by_baseline"]) == {"even", "distil", "direct"}
    totals = family["totals_by_init"]
    by_init = {entry["init"]: entry for entry in family["descendants"] if entry["modality"] == "both"}
    direct = by_init["direct"]
    assert [point["step"] for point in direct["curve"]] == [0, 1, 2, 3]
    results = [json.loads((undisturbed / folder / "result.json").read_text()) for folder in ("direct", "descendants/i2-t2-direct")]
    assert [result["teacher_flops"] for result in results] == [0, 0]
    once = family["rival_learngenes"]["direct"]["flops"]
    assert totals["direct"]["flops"] == totals["direct"]["flops_with_ancestor"] == once + direct["flops_to_target"] > 0
    assert [point["step"] for point in by_init["mmlg"]["curve"]] == [0, 2, 4]
    assert [point["step"] for point in by_init["scratch"]["curve"]] == [4, 8]
    assert by_init["scratch"]["target"] == by_init["scratch"]["curve"][-1]["mean_recall@1"]
    page = (undisturbed / "report.html").read_text()
    assert "What is not claimed" in page
    assert page.count("data:image/png;base64,") == 34  # six captions with five images each, and four images
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace("http://creativecommons.org", "")
    lines = [json.loads(line) for line in (undisturbed / "ancestor" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "evaluation" in line] == [12, 24, 36, 48, 60]
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [1, *range(10, 61, 10)]
    positive = ("loss", "samples_per_second", "gradient_norm", "peak_memory_bytes")
    assert all(line[key] > 0 for line in trained for key in positive)
    assert trained[0]["logit_scale"] == pytest.approx(1 / 0.07)
    assert list((undisturbed / "ancestor" / "tensorboard").iterdir())


def written(recipe: Path, content: dict[str, Any]) -> Path:
    """A recipe file with this content."""
    recipe.write_text(yaml.safe_dump(content))
    return recipe


def stamps(out: Path) -> dict[str, tuple[int, dict[str, Any]]]:
    """When each step ended, and the digests of what it read."""
    return {
        str(path.parent.relative_to(out)): (path.stat().st_mtime_ns, json.loads((path.parent / "run.json").read_text())["inputs"])
        for path in out.rglob("result.json")
        if "superseded" not in path.parts
    }


def test_a_second_start_repeats_nothing(recipe_file: Path, undisturbed: Path) -> None:
    before, numbers = stamps(undisturbed), figures(undisturbed)
    assert len(before) == 9
    said = complete(recipe_file, undisturbed)
    assert stamps(undisturbed) == before
    assert figures(undisturbed) == numbers
    assert all(f"{step}: kept" in said for step in ("data", "ancestor", "learngene", "i2-t2-scratch", "i2-mmlg"))


LONGER = {"steps": 6, "batch_size": 32, "eval_every": 2}
SIZES = RECIPE["family"]["sizes"]
CHANGES: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    "another size, metric and runtime": (
        {
            "family": {**RECIPE["family"], "sizes": [*SIZES, {"image_layers": 3, "text_layers": 1, "in_sum": False}]},
            "evaluation": {"metric": "mean_recall@5"},
            "runtime": {"num_workers": 1, "log_every": 5, "trackers": ["jsonl"], "threads": None, "parallel": 1, "num_processes": 2},
        },
        set(),
        {"descendants/i3-t1-mmlg"},
    ),
    "adaptation and baselines": (
        {
            "adaptation": {**RECIPE["adaptation"], "training": LONGER},
            "baselines": {**RECIPE["baselines"], "even": LONGER, "distil": None},
        },
        {"descendants/i2-t2-mmlg", "descendants/i2-t2-even"},
        set(),
    ),
    "adaptation of what is pre-trained directly": (
        {"adaptation": {**RECIPE["adaptation"], "direct": LONGER}, "baselines": {**RECIPE["baselines"], "distil": None}},
        {"descendants/i2-t2-direct"},
        set(),
    ),
    "extraction": (
        {
            "extraction": {**RECIPE["extraction"], "stem_rate": 0.25},
            "family": {**RECIPE["family"], "sizes": [{**SIZES[0], "in_sum": False}, SIZES[1]]},
        },
        {"learngene", "descendants/i2-t2-mmlg", "descendants/i2-mmlg"},
        set(),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_recipe_runs_again_what_depends_on_the_change(change: str, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "family"
    shutil.copytree(undisturbed, out)
    before = stamps(out)
    changed, again, added = CHANGES[change]
    said = complete(written(tmp_path / "r.yaml", {**RECIPE, **changed}), out)
    after = stamps(out)
    assert {step for step in before if after[step][0] != before[step][0]} == again
    assert set(after) - set(before) == added
    reads_another_learngene = {step for step in before if after[step][1].get("learngene") != before[step][1].get("learngene")}
    assert reads_another_learngene == (again - {"learngene"} if change == "extraction" else set())
    assert {path.name for path in (out / "superseded").glob("*")} == {f"{Path(step).name}-1" for step in again}
    for step in again:
        assert f"{Path(step).name}: " in said
    assert "ancestor: kept" in said
    assert "i2-t2-scratch: kept" in said or change == "extraction"
    family = json.loads((out / "family.json").read_text())
    listed = {entry["name"] for entry in family["descendants"]}
    assert family["metric"] == changed.get("evaluation", {}).get("metric", "mean_recall@1")
    assert ("i2-t2-distil" in listed) == (change.startswith("another"))  # what the recipe leaves out is not counted, and not removed
    assert (out / "descendants" / "i2-t2-distil" / "result.json").exists()


def test_a_continued_learngene_is_what_descendants_are_written_from(undisturbed: Path, tmp_path: Path) -> None:
    """Added to a family that is complete: the extraction stays, and what was spent on both trainings is charged."""
    out, recipe = tmp_path / "family", tmp_path / "r.yaml"
    shutil.copytree(undisturbed, out)
    before = stamps(out)
    continuation = {"training": {"steps": 6, "batch_size": 16, "eval_every": 3}, "growth": 0.5}
    said = complete(written(recipe, {**RECIPE, "extraction": {**RECIPE["extraction"], "continuation": continuation}}), out)
    after = stamps(out)
    again = {"descendants/i2-t2-mmlg", "descendants/i2-mmlg"}
    assert {step for step in before if after[step][0] != before[step][0]} == again
    assert set(after) - set(before) == {"learngene-continued"}
    file = out / "learngene-continued" / "learngene.safetensors"
    assert said.endswith(f"learngene: {file}\n")
    assert {after[step][1]["learngene"] for step in again} == {hashlib.sha256(file.read_bytes()).hexdigest()}
    results = [json.loads((out / name / "result.json").read_text()) for name in ("learngene", "learngene-continued")]
    entry = json.loads((out / "family.json").read_text())["learngene"]
    assert entry["flops"] == sum(result["flops"] for result in results)
    assert (entry["teacher_flops"], results[1]["teacher_flops"]) == (results[0]["teacher_flops"], 0)
    assert entry["metrics"] == results[1]["metrics"] != results[0]["metrics"]
    assert [point["step"] for point in entry["curve"]] == [12, 24, 36, 48, 60, 63, 66]
    assert [point["samples"] for point in entry["curve"]] == [384, 768, 1152, 1536, 1920, 1968, 2016]
    assert entry["curve"][-1]["flops"] == entry["flops"] + entry["teacher_flops"]
    settings, runtime = load_recipe(str(recipe))
    steps = {step.id: step for step in forecast(settings, runtime, out, peak_flops=1e12, mfu=0.5).steps}
    assert {step.state for step in steps.values()} == {"kept"}
    planned = steps["learngene-continued"]
    assert (planned.needs, planned.cost.flops, planned.cost.teacher_flops) == (("data", "learngene"), results[1]["flops"], 0)
    assert "learngene, continued on pairs" in planned.cost.trains


def test_an_extraction_without_the_outputs_that_are_to_be_reused_runs_again(tmp_path: Path) -> None:
    """The same learngene, and only what was adapted on other outputs runs again; complete members need none."""
    content = json.loads(json.dumps(RECIPE)) | {"pretraining": None}
    content["baselines"] |= {"even": None, "distil": None}
    content["family"]["stop_at_target"] = True
    content["extraction"]["loss"] = {"teacher_pool": 96}
    content["adaptation"]["loss"] = {"teacher_pool": 32}
    recipe, out = written(tmp_path / "r.yaml", content), tmp_path / "family"
    complete(recipe, out)
    before = stamps(out)
    content["adaptation"]["reuse_teacher_pool"] = True
    shutil.rmtree(out / "descendants" / "i2-t2-scratch")  # whose quality is the target, not known when the extraction is looked at
    said = complete(written(recipe, content), out)
    after = stamps(out)
    assert "learngene: it kept no outputs of the ancestor, which the adaptation reuses. It runs again" in said
    assert {step for step in before if after[step][0] != before[step][0]} == {
        "learngene",
        "descendants/i2-t2-mmlg",
        "descendants/i2-t2-scratch",
    }
    assert after["descendants/i2-t2-mmlg"][1] == before["descendants/i2-t2-mmlg"][1]
    assert json.loads((out / "descendants" / "i2-t2-mmlg" / "result.json").read_text())["teacher_flops"] == 0
    shutil.rmtree(out / "learngene" / "teacher-pool")
    complete(recipe, out)
    assert stamps(out) == after


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 5}, "seed was 0, now 5"),
        ({"ancestor": {**RECIPE["ancestor"], "steps": 61}}, "ancestor.steps was 60, now 61"),
        ({"data": {"scenes": {**RECIPE["data"]["scenes"], "num_val": 25}}}, "data.scenes.num_val was 24, now 25"),
        ({"engine": {"precision": "bf16"}}, 'engine.precision was "fp32", now "bf16"'),
        ({"evaluation": {"metric": "recall@5"}}, "Did you mean mean_recall@5?"),
        ({"family": {"sizes": [{"image_layers": 2, "image_width": 12}]}}, "family.sizes[0]: image width: 12 does not fit"),
    ],
)
def test_another_ancestor_or_data_set_is_refused_by_its_keys(changed: dict[str, Any], said: str, undisturbed: Path, tmp_path: Path) -> None:
    """And what can be known to fail is said before anything runs."""
    before = stamps(undisturbed)
    code, lines = run(written(tmp_path / "r.yaml", {**RECIPE, **changed}), undisturbed)
    assert code == 2
    assert lines.count("\n") == 1
    assert said in lines
    assert stamps(undisturbed) == before


def test_a_metric_of_classes_needs_them_before_anything_is_trained(tmp_path: Path) -> None:
    write_scenes(tmp_path / "data", num_train=64, num_val=8, num_test=8, seed=0)
    (tmp_path / "data" / "classes.json").unlink()
    recipe = written(tmp_path / "r.yaml", {**RECIPE, "evaluation": {"metric": "acc1"}})
    code, said = run(recipe, tmp_path / "out", "--data.path", str(tmp_path / "data"))
    assert code == 2
    assert "acc1 needs classes" in said
    assert not (tmp_path / "out").exists()


def test_an_ancestor_that_exists_is_taken_with_its_cost(undisturbed: Path, tmp_path: Path) -> None:
    """--ancestor DIR: no second training, the same learngene, the ancestor's cost from the run it came from; unknown for bare models."""
    data = ("--data.path", str(undisturbed / "data"))
    complete(written(tmp_path / "r.yaml", RECIPE), tmp_path / "one", *data, "--ancestor", str(undisturbed / "ancestor"))
    original, found = (json.loads((where / "family.json").read_text()) for where in (undisturbed, tmp_path / "one"))
    assert found["ancestor"]["flops"] == original["ancestor"]["flops"] > 0
    assert found["ancestor"]["metrics"] == original["ancestor"]["metrics"]
    assert found["cost_ratio_with_ancestor"] == pytest.approx(original["cost_ratio_with_ancestor"])
    result = json.loads((tmp_path / "one" / "ancestor" / "result.json").read_text())
    assert result["steps"] == 0
    files = [where / "learngene" / "learngene.safetensors" for where in (undisturbed, tmp_path / "one")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_ancestor_with_another_tokenizer_is_refused_before_anything_runs(undisturbed: Path, tmp_path: Path) -> None:
    """By the plan as by the family: both check alike."""
    for number, split in enumerate(("train", "val", "test")):
        Image.new("RGB", (32, 32), (80 * number, 0, 0)).save(tmp_path / f"{split}.png")
    rows = ["filepath,caption,split", *(f"{split}.png,words of the {split} split,{split}" for split in ("train", "val", "test"))]
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    assert main(["data", "pack", str(tmp_path / "pairs.csv"), "--out", str(tmp_path / "data"), "--tokenizer", "words"]) == 0
    recipe = written(tmp_path / "r.yaml", RECIPE)
    options = ("--data.path", str(tmp_path / "data"), "--ancestor", str(undisturbed / "ancestor"))
    for command in ("plan", "family"):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert main([command, str(recipe), "--out", str(tmp_path / "out"), *options]) == 2
        assert "Set data.tokenizer to model to tokenise" in said.getvalue().replace("\n", " "), said.getvalue()
    assert not (tmp_path / "out").exists()


def test_the_cost_of_bare_weights_is_unknown(undisturbed: Path, tmp_path: Path) -> None:
    model = undisturbed / "ancestor" / "model"
    assert _cost_of_weights(model)["flops"] == json.loads((undisturbed / "ancestor" / "result.json").read_text())["flops"] > 0
    shutil.copytree(model, tmp_path / "bare")
    unknown = {"flops": None, "seconds": None}
    assert _cost_of_weights(tmp_path / "bare") == unknown
    assert _cost_of_weights(undisturbed / "descendants" / "i2-t2-scratch" / "model")["flops"] > 0
    for name in ("distil", "even", "mmlg"):  # what they came out of cost something too
        assert _cost_of_weights(undisturbed / "descendants" / f"i2-t2-{name}" / "model") == unknown
    shutil.copytree(undisturbed / "ancestor", tmp_path / "read")  # by a family that was given the weights of another one
    result = json.loads((tmp_path / "read" / "result.json").read_text())
    records.write_record(
        tmp_path / "read" / "result.json", {key: value for key, value in result.items() if key != KEY} | {"steps": 0, "flops": 0}
    )
    assert _cost_of_weights(tmp_path / "read" / "model") == unknown


def test_the_report_names_the_machines_of_the_runs(undisturbed: Path) -> None:
    """On Slurm the report is drawn without a GPU by a job of its own."""
    here = json.loads((undisturbed / "family.json").read_text())["environment"]
    assert here["device"] == json.loads((undisturbed / "ancestor" / "result.json").read_text())["device"]
    gpu = {"device": "H100", "cores": 8}
    assert _measured_on([gpu, gpu]) == gpu
    assert _measured_on([gpu, {"device": "L40S", "cores": 8}, {}]) == {"device": "H100, L40S", "cores": 8}
    assert _measured_on([{}]) == {}  # of earlier versions


def test_two_families_at_once(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = start(recipe_file, out)
    while not (out / "run.json").exists():
        assert first.poll() is None
        time.sleep(0.02)
    code, said = run(recipe_file, out)
    assert code == 2
    assert f"is in use by process {first.pid}" in said
    assert said.count("\n") == 1
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()


def test_descendants_are_open_clip_models(undisturbed: Path) -> None:
    """Every exported folder, and its tokenizer, loads through open_clip and scores what the run's result says."""
    from mmlg_scale import towers
    from mmlg_scale.evaluation.evaluate import evaluate_folder

    for folder in sorted((undisturbed / "descendants").glob("i2-t2-*")):
        if folder.suffix == ".launch":
            continue
        clip, _, _ = towers.open_clip.create_model_and_transforms(f"local-dir:{folder / 'model'}")
        assert len(clip.visual.transformer.resblocks) == 2
        tokenizer = towers.open_clip.get_tokenizer(f"local-dir:{folder / 'model'}")
        assert tokenizer(["a big red circle"]).shape == (1, 16)
        result = json.loads((folder / "result.json").read_text())
        assert evaluate_folder(folder / "model", undisturbed / "data", "test") == pytest.approx(result["metrics"])


@pytest.mark.slow
def test_kept_features_change_no_number(tmp_path: Path) -> None:
    """A family whose runs read the ancestor's features against one that runs the ancestor at every step."""
    few = {"steps": 4, "batch_size": 32, "eval_every": 2}
    loss = {"hidden": 0.0, "affinity": 1.0}
    shared = {
        **RECIPE,
        "ancestor": few,
        "extraction": {"min_layers": 1, "num_knots": 3, "training": {**few, "accumulation": 2}, "loss": loss},
        "adaptation": {"training": few, "loss": loss},
        "baselines": {"scratch": few, "even": None, "distil": few, "distil_loss": loss},
        "family": {"sizes": [{"image_layers": 2, "text_layers": 2}], "stop_at_target": False},
    }
    found = {}
    for kept in (True, False):
        complete(written(tmp_path / f"{kept}.yaml", {**shared, "engine": {"keep_features": kept}}), tmp_path / str(kept))
        found[kept] = tmp_path / str(kept)
    for run in ("learngene", "descendants/i2-t2-mmlg", "descendants/i2-t2-distil"):
        with_features, without = (json.loads((found[kept] / run / "result.json").read_text()) for kept in (True, False))
        lines = [[json.loads(line) for line in (found[kept] / run / "metrics.jsonl").read_text().splitlines()] for kept in (True, False)]
        losses = [[line["loss"] for line in each if "loss" in line] for each in lines]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert losses[0]
        assert with_features["metrics"] == pytest.approx(without["metrics"], abs=0.05)
        assert with_features["teacher_flops"] == 0 < without["teacher_flops"]
        assert with_features["flops"] == without["flops"]
    family = json.loads((found[True] / "family.json").read_text())
    kept_flops = family["kept_features"]["flops"]
    settings, runtime = load_recipe(str(tmp_path / "True.yaml"))
    planned = {step.id: step.cost for step in forecast(settings, runtime, None, peak_flops=1e12, mfu=0.5).steps}
    assert 0.5 * planned["features"].flops < kept_flops <= planned["features"].flops  # planned are whole captions
    assert planned["learngene"].flops == family["learngene"]["flops"]
    assert planned["learngene"].teacher_flops == planned["i2-t2-distil"].teacher_flops == 0
    assert kept_flops == json.loads((found[True] / "features" / "result.json").read_text())["flops"] > 0
    assert family["totals_by_init"]["mmlg"]["flops_once"] == family["learngene"]["flops"] + kept_flops
    assert family["totals_by_init"]["distil"]["flops_once"] == kept_flops


def test_jobs_under_way_keep_their_recipe_and_a_family_is_complete_with_its_report(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs read the recipe when they start, hours after it was submitted. The report is written last."""
    out = tmp_path / "family"
    shutil.copytree(undisturbed, out)
    settings, runtime = load_recipe(str(out / "recipe.yaml"))

    def jobs(**changes: int) -> FamilyJobs:
        changed = copy.deepcopy(settings)
        changed.extraction.training.steps += changes.get("steps", 0)
        nodes = changes.get("nodes", 1)
        return FamilyJobs(changed, runtime, out, SlurmLauncher(Cluster(), tmp_path), Resources(num_nodes=nodes))

    assert jobs()._is_drawn()
    assert not jobs(steps=1)._is_drawn()
    jobs(steps=1).scripts(None)
    with monkeypatch.context() as patched:
        patched.setattr("mmlg_scale.family_jobs.active_job", lambda folder: object() if folder.name == "ancestor.launch" else None)
        jobs()._require_no_changes_under_way()
        jobs(nodes=2)._require_no_changes_under_way()
        for submit in (lambda: jobs(steps=1).scripts(None), lambda: jobs(steps=1).submit(None)):
            with pytest.raises(UserError, match=r"the recipe's extraction changed, and 1 of its steps are under way \(ancestor\)"):
                submit()
        assert (out / "recipe.yaml").read_text() == (undisturbed / "recipe.yaml").read_text()
    (out / "report.html").unlink()
    assert not jobs()._is_drawn()
