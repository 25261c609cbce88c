"""Training and a whole family through real daemons, as a user starts them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from mmlg_launchers import Cluster, JobState, Resources, SlurmLauncher
from mmlg_launchers.slurm import SlurmJob, preflight_argv
from mmlg_launchers.slurm_script import Task

from benchmarks import family_cost
from benchmarks.family_plan import load_plan
from mmlg_scale.cli import main
from mmlg_scale.data.scenes import write_scenes
from tests.slurm.daemons import Daemons
from tests.slurm.test_jobs import until
from tests.test_family import RECIPE as FAMILY
from tests.test_family_cost import RECIPE as TINY_RECIPE
from tests.test_family_cost import TINY
from tests.training.test_end_to_end import RECIPE, STEPS

pytestmark = pytest.mark.slow


def states(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What mmlg launch status says: state by step."""
    capsys.readouterr()
    assert main(["launch", "status", str(folder)]) == 0
    return {line.split()[0]: line.split()[2] for line in capsys.readouterr().out.splitlines()}


def test_two_nodes_of_two_ranks_train_with_zero_2(slurm: Daemons, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_scenes(tmp_path / "data", num_train=96, num_val=12, num_test=12, seed=0, image_size=32)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    train = ["train", str(tmp_path / "recipe.yaml"), "--data.path", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    assert main(["launch", "slurm", "--nodes=2", "--processes-per-node=2", "--", *train, "--runtime.zero_stage=2"]) == 0
    assert f"  mmlg launch logs {tmp_path / 'run.launch'} --follow\n" in capsys.readouterr().out
    assert main(["launch", "logs", str(tmp_path / "run"), "--follow"]) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == "mmlg: run: completed"
    assert f"ancestor {STEPS}/{STEPS}" in printed.out
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == STEPS
    assert states(tmp_path / "run", capsys) == {"run": "completed"}


def test_a_family_is_cancelled_half_way_and_submitted_again(slurm: Daemons, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = {"steps": 4, "batch_size": 32, "eval_every": 4}
    recipe = copy.deepcopy(FAMILY) | {"ancestor": few, "baselines": {"scratch": None, "even": None, "distil": None}}
    recipe["extraction"]["training"] = few  # type: ignore[index]
    recipe["family"] = {"sizes": [{"image_layers": n, "text_layers": n} for n in (1, 2, 3)]}
    del recipe["pretraining"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "family"
    words = ["launch", "slurm", "--array-parallelism=2", "--", "family", str(tmp_path / "recipe.yaml"), "--out", str(out)]
    assert main(words) == 0
    said = [line.split(": job ")[0] for line in capsys.readouterr().out.splitlines() if ": job " in line]
    assert said == ["data", "ancestor", "learngene", "i3-t3-mmlg", "i2-t2-mmlg", "i1-t1-mmlg", "report"]
    until((out / "ancestor" / "result.json").exists, 600)
    until(lambda: states(out, capsys)["ancestor"] == "completed")
    assert main(["launch", "cancel", str(out)]) == 0
    until(lambda: set(states(out, capsys).values()) == {"completed", "cancelled"})
    assert not (out / "family.json").exists()
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "data: complete\nancestor: complete\n" in printed
    array = {line.partition(": job ")[2].partition("_")[0] for line in printed.splitlines() if "-mmlg: job" in line}
    assert len(array) == 1
    until(lambda: not {"pending", "running"} & set(states(out, capsys).values()), 900)
    assert set(states(out, capsys).values()) == {"completed"}
    family = json.loads((out / "family.json").read_text())
    assert [found["name"] for found in family["descendants"]] == ["i3-t3-mmlg", "i2-t2-mmlg", "i1-t1-mmlg"]
    assert (out / "report.html").is_file()
    capsys.readouterr()
    assert main(words) == 0
    assert ": job " not in capsys.readouterr().out


def test_the_family_cost_benchmark_has_the_figures_of_one_machine(slurm: Daemons, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(TINY_RECIPE))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"recipe": str(tmp_path / "recipe.yaml")}))
    plan = load_plan(str(tmp_path / "tiny.yaml"))
    there = family_cost.slurm(plan, "generic", nodes=1, gpus_per_node=None, time=None, parallel=3)
    found = []
    for name, place in (("here", family_cost.this_machine(plan)), ("there", replace(there, poll_seconds=0.5))):
        (tmp_path / name).mkdir()
        target = family_cost.run_seed(plan, 0, tmp_path / name / "runs", tmp_path / name, place)
        pieces = json.loads(target.read_text(), parse_float=lambda text: round(float(text), 6))["pieces"]
        for piece in pieces.values():
            for timed in (piece, *piece["curve"]):
                del timed["seconds"]
        found.append(pieces)
    assert found[0] == found[1]
    job = SlurmJob(next((tmp_path / "there" / "runs" / "tiny" / "seed0").glob("ancestor-*.launch")))
    assert job.state() is JobState.COMPLETED


def test_the_nodes_are_looked_at(slurm: Daemons, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two nodes on one machine are alike; a GPU that neither has is missed, and keeps a job from starting."""
    folder = tmp_path / "check.launch"
    assert main(["launch", "check", "--nodes=2", f"--run-folder={folder}"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed[1:3]] == [["n1", "0"], ["n2", "0"]]
    assert all(float(line.split()[-1]) > 0 for line in printed[1:3])
    assert printed[3] == "2 nodes: nothing wrong."

    launcher = SlurmLauncher(Cluster(), tmp_path)
    ran = launcher.batch("ran", [Task(("touch", str(tmp_path / "ran")), tmp_path / "ran.launch")], Resources(num_nodes=2))
    launcher.submit_batch(replace(ran, preflight=preflight_argv(Resources(gpus_per_node=1))))
    job = SlurmJob(tmp_path / "ran.launch")
    assert job.wait(300) is JobState.FAILED
    assert job.exit_code == 1
    said = (tmp_path / "ran.launch" / "preflight.txt").read_text()
    assert "n1: has 0 GPUs instead of 1\nn2: has 0 GPUs instead of 1\nleave out: --exclude=n1,n2 " in said
    assert not (tmp_path / "ran").exists()
