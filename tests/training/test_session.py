"""Sessions: a recipe's model, engine and data without a folder, as notebooks and benchmarks use them."""

from __future__ import annotations

import copy
import json
import os
from contextlib import closing
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mmlg_kernels import exchange

from mmlg_scale import recipe, towers
from mmlg_scale.cli.benchmark import benchmark
from mmlg_scale.data.scenes import write_scenes
from mmlg_scale.errors import UserError
from mmlg_scale.learngene.file import load_learngene
from mmlg_scale.ranks import gloo_group
from mmlg_scale.recipe import Extraction, Pretraining, Size, Training
from mmlg_scale.recipe_file import load_recipe
from mmlg_scale.records import write_record
from mmlg_scale.runtime import Runtime
from mmlg_scale.training import learngene_roles
from mmlg_scale.training.engine import start_ranks, stop_ranks
from mmlg_scale.training.folder import result_of
from mmlg_scale.training.learngene_roles import ExtractionRole, PretrainingRole
from mmlg_scale.training.roles import AncestorRole, DescendantRole
from mmlg_scale.training.run import run_role
from mmlg_scale.training.session import build_session
from mmlg_scale.training.stages import ExtractionStage
from tests.artefacts import settings_for


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    data = tmp_path_factory.mktemp("session") / "data"
    write_scenes(data, num_train=64, num_val=8, num_test=8, seed=0, image_size=32)
    return {
        "data.path": str(data),
        "ancestor.steps": 3,
        "ancestor.batch_size": 16,
        "ancestor.eval_every": 3,
        "extraction.training.batch_size": 16,
        "extraction.loss.teacher_pool": "null",  # of more pairs than there are here
        "baselines.even_loss.teacher_pool": "null",
        "runtime.log_every": 1,
    }


def test_what_the_environment_says_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address alone, as clusters set it for everybody, is no rank; a rank without it is a mistake. Nothing stays behind."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    start_ranks(Runtime())
    assert dist.get_world_size() == 1
    stop_ranks()
    assert [name for name in names if name in os.environ] == ["MASTER_ADDR"]
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"RANK is set, but not WORLD_SIZE and MASTER_PORT\. Start ranks with mmlg launch"):
        start_ranks(Runtime())


def test_a_session_that_cannot_be_built_leaves_no_ranks_behind(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What a notebook starts next takes RANK for a launcher's. A session that is open already keeps its ranks."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    settings, _ = load_recipe("demo", **options)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such kernel")

    class Broken(AncestorRole):
        build = broken  # type: ignore[assignment]

    with pytest.raises(RuntimeError, match="no such kernel"):
        build_session(settings, Broken(settings))
    assert not dist.is_initialized()
    assert "RANK" not in os.environ
    with closing(build_session(settings)):
        with pytest.raises(RuntimeError, match="no such kernel"):
            build_session(settings, Broken(settings))
        with closing(build_session(settings)):
            pass
        run_role(AncestorRole(settings), tmp_path / "run", Runtime())
        assert dist.get_world_size() == 1
    assert not dist.is_initialized()
    monkeypatch.setattr("mmlg_scale.throughput.measure_cell", broken)
    with pytest.raises(RuntimeError, match="no such kernel"):
        benchmark(["demo", "--out", str(tmp_path / "out"), "--data.path", options["data.path"], "--roles", "ancestor"])
    assert not dist.is_initialized()
    assert "RANK" not in os.environ


@pytest.mark.parametrize("zero_stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_runs_one_after_another_in_one_process(zero_stage: int, options: dict[str, Any], tmp_path: Path) -> None:
    """A run, one that fails in the middle, and the first again elsewhere: the same numbers, and so for what is distilled from them."""
    options |= {"runtime.zero_stage": zero_stage, "extraction.training.steps": 2}
    if zero_stage == 3:  # which divides matrices
        options |= {"ancestor.optimizer.name": "adamw", "extraction.training.optimizer.name": "adamw"}
    settings, runtime = load_recipe("demo", **options)

    def run(name: str) -> tuple[dict[str, float], bytes]:
        result = run_role(AncestorRole(settings), tmp_path / name, runtime)
        return result["metrics"], (tmp_path / name / "model" / "open_clip_model.safetensors").read_bytes()

    first = run("first")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(AncestorRole, "stop", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            run("broken")
    assert run("second") == first
    genes = []
    for name in ("one", "two"):
        run_role(ExtractionRole(settings, tmp_path / "first" / "model"), tmp_path / name, runtime)
        genes.append((tmp_path / name / "learngene.safetensors").read_bytes())
    assert genes[0] == genes[1]


def test_a_session_trains_as_a_run_does(options: dict[str, Any], tmp_path: Path) -> None:
    """The same losses, bit for bit, without a folder; twice in one process; and its extraction of what the run exported."""
    settings, runtime = load_recipe("demo", **options)
    result = run_role(AncestorRole(settings), tmp_path / "run", runtime)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line["loss"] for line in lines if "loss" in line]
    for _ in range(2):
        session = build_session(settings, runtime=runtime)
        losses = [session.train_step(batch, step).item() for step, batch in enumerate(islice(session.stream(), 3))]
        metrics = session.evaluate(session.eval_split("test"))
        session.close()
        assert losses == logged
        assert metrics == result["metrics"]
    session = build_session(settings, ExtractionRole(settings, tmp_path / "run" / "model"), runtime=runtime)
    loss = session.train_step(next(iter(session.stream())), 0)
    assert torch.isfinite(loss)
    assert set(session.stage.evaluated_sizes()) == {"i2-t2", "i5-t5", "i8-t8", "i8w48-t8w48"}
    session.close()


def test_a_resumed_extraction_is_not_fitted_again(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in its third step, with a checkpoint of the second: the same learngene as in one go, and no second alignment."""
    settings, runtime = settings_for(Path(options["data.path"])), Runtime(checkpoint_every=1, trackers=["jsonl"])
    settings.extraction = Extraction(min_layers=1, num_knots=2, training=Training(steps=3, batch_size=8, eval_every=3))
    run_role(AncestorRole(settings), tmp_path / "ancestor", runtime)
    role, fits, steps = ExtractionRole(settings, tmp_path / "ancestor" / "model"), [], []
    inherit, flops = learngene_roles.inherit, ExtractionStage.flops

    def stop_in_the_third(stage: ExtractionStage, step: int, *rest: Any) -> Any:
        steps.append(step)
        if steps == [0, 1, 2]:
            raise UserError("stopped by the test")
        return flops(stage, step, *rest)

    monkeypatch.setattr(learngene_roles, "inherit", lambda *args: fits.append(1) or inherit(*args))
    run_role(role, tmp_path / "straight", runtime)
    monkeypatch.setattr(ExtractionStage, "flops", stop_in_the_third)
    with pytest.raises(UserError, match="stopped by the test"):
        run_role(role, tmp_path / "stopped", runtime)
    assert len(fits) == 2
    run_role(role, tmp_path / "stopped", runtime)
    assert (steps, len(fits)) == ([0, 1, 2, 2], 2)
    assert len({(tmp_path / name / "learngene.safetensors").read_bytes() for name in ("straight", "stopped")}) == 1


@pytest.mark.parametrize(("target", "steps"), [(0.0, 0), (1.1, 4)])
def test_a_run_that_is_at_its_target_untrained_is_not_trained(target: float, steps: int, options: dict[str, Any], tmp_path: Path) -> None:
    """Uniform layer selection compared with the ancestor: charged nothing, teacher included; or trained, and then both are charged."""
    settings, runtime = load_recipe("demo", **options)
    run_role(AncestorRole(settings), tmp_path / "ancestor", runtime)
    settings.baselines.even = Training(steps=4, batch_size=16, eval_every=2)
    assert settings.baselines.even_loss is not None
    size, scratch = Size(2, 2), tmp_path / "ancestor"  # in place of a run from scratch, whose last evaluation is the target
    result = result_of(scratch)
    assert result is not None
    result["curve"][-1]["mean_recall@1"] = target
    write_record(scratch / "result.json", result)
    role = DescendantRole(settings, "even", size, ancestor=tmp_path / "ancestor" / "model", target_of=scratch)
    found = run_role(role, tmp_path / "even", runtime)
    assert (found["steps"], found["stopped_early"]) == (steps, steps == 0)
    assert found["metrics"] == found["metrics_at_0"] if steps == 0 else [point["step"] for point in found["curve"]] == [0, 2, 4]
    assert (found["flops"] > 0, found["teacher_flops"] > 0) == (steps > 0, steps > 0)


def test_the_training_of_an_extracted_learngene_is_continued(options: dict[str, Any], tmp_path: Path) -> None:
    """From the file's own weights, at every size; and no file that is not of the recipe's structure."""
    settings, runtime = settings_for(Path(options["data.path"])), Runtime(trackers=["jsonl"])
    settings.extraction = Extraction(min_layers=1, num_knots=2, training=Training(steps=2, batch_size=8, eval_every=2))
    settings.pretraining = Pretraining(min_layers=1, num_knots=2, training=Training(steps=2, batch_size=8, eval_every=2))
    run_role(AncestorRole(settings), tmp_path / "ancestor", runtime)
    run_role(ExtractionRole(settings, tmp_path / "ancestor" / "model"), tmp_path / "gene", runtime)
    file = tmp_path / "gene" / "learngene.safetensors"
    role, gene = PretrainingRole(settings, file), load_learngene(file)
    with closing(build_session(settings, role, runtime=runtime)) as session, torch.no_grad():
        batch = next(iter(session.stream()))
        image = session.stage.spec.preprocess(batch.image_uint8_BCHW)
        for size in ({"image_layers": 1, "text_layers": 2}, {"image_layers": 2, "text_layers": 1}):
            descendant = gene.descend(**size)
            written = towers.build_clip(descendant.spec.config, seed=0)
            written.load_state_dict(descendant.state)
            found = session.stage.model(image, batch.text_NT, **size)
            for name, features in (("image", written.encode_image(image)), ("text", written.encode_text(batch.text_NT))):
                torch.testing.assert_close(found[f"{name}_features"], features, rtol=1e-5, atol=1e-6)
    result = run_role(role, tmp_path / "further", runtime)
    trained = load_learngene(tmp_path / "further" / "learngene.safetensors").tensors
    assert set(trained) == set(gene.tensors)
    # Two steps of Adam's move every number by at most twice the rate.
    assert 0 < max(float((trained[name] - tensor).abs().max()) for name, tensor in gene.tensors.items()) < 0.02
    assert result["flops"] > 0 == result["teacher_flops"]
    with pytest.raises(UserError, match=r"contains another run: another learngene \(sha256 \w+, now None\)"):
        run_role(PretrainingRole(settings), tmp_path / "further", runtime)
    settings.pretraining.num_knots = 4
    with pytest.raises(UserError, match=r"recipe key pretraining\.num_knots: is 4, .*learngene\.safetensors has 2\. Use what the file has"):
        run_role(role, tmp_path / "other", runtime)
    settings.pretraining.num_knots = 2
    settings.model.config = settings.model.config | {"embed_dim": 16}  # type: ignore[operator]
    with pytest.raises(UserError, match=r"recipe key model\.config\.embed_dim: is 16, .*learngene\.safetensors has 8"):
        run_role(role, tmp_path / "other", runtime)
    with pytest.raises(UserError, match=r"no learngene file .*none\.safetensors"):
        run_role(PretrainingRole(settings, tmp_path / "none.safetensors"), tmp_path / "other", runtime)
    assert not (tmp_path / "other").exists()


def test_a_continuation_has_the_extractions_structure_and_its_own_training(options: dict[str, Any], tmp_path: Path) -> None:
    """The same numbers as pre-training of the same settings; the extraction is the same run with and without it."""
    settings, runtime = settings_for(Path(options["data.path"])), Runtime(trackers=["jsonl"])
    structure: dict[str, Any] = {"min_layers": 1, "num_knots": 2, "width_shares": [1.0, 0.5], "embedding_rank": 2}
    further = Training(steps=2, batch_size=16, optimizer=recipe.Optimizer(learning_rate=3e-3), eval_every=1)
    settings.extraction = Extraction(**structure, stem_rate=0.9, training=Training(steps=2, batch_size=8, eval_every=2))
    plain = copy.deepcopy(settings)
    settings.extraction.continuation = recipe.Continuation(further, growth=0.5, coefficient_rate=0.7)
    settings.pretraining = Pretraining(**structure, growth=0.5, coefficient_rate=0.7, training=further)
    assert settings.continuations() == {"mmlg": settings.pretraining}
    run_role(AncestorRole(settings), tmp_path / "ancestor", runtime)
    ancestor, file = tmp_path / "ancestor" / "model", tmp_path / "gene" / "learngene.safetensors"
    run_role(ExtractionRole(plain, ancestor), file.parent, runtime)
    before = file.read_bytes()
    run_role(ExtractionRole(settings, ancestor), file.parent, runtime)
    assert file.read_bytes() == before  # complete
    for name, method in (("continued", "mmlg"), ("pretrained", None)):
        run_role(PretrainingRole(settings, file, method), tmp_path / name, runtime)
    found = [load_learngene(tmp_path / name / "learngene.safetensors").tensors for name in ("continued", "pretrained")]
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=0, atol=0)
    settings.extraction.num_knots = 3
    with pytest.raises(UserError, match=r"recipe key extraction\.num_knots: is 3, .*learngene\.safetensors has 2\. Use what the file has"):
        run_role(PretrainingRole(settings, file, "mmlg"), tmp_path / "other", runtime)
    settings.extraction.min_layers = 9
    with pytest.raises(UserError, match=r"recipe key extraction\.min_layers: is 9"):
        run_role(PretrainingRole(settings, file, "mmlg"), tmp_path / "other", runtime)
    with pytest.raises(UserError, match=r"--method mmlg continues the training of a learngene\. Give --learngene"):
        run_role(PretrainingRole(settings, None, "mmlg"), tmp_path / "other", runtime)
    with pytest.raises(UserError, match=r"recipe key baselines\.tleg\.continuation is null: that learngene is not trained further"):
        run_role(PretrainingRole(settings, file, "tleg"), tmp_path / "other", runtime)


def test_groups_of_the_host_are_as_patient_as_the_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank's slow disk must not end the others' wait for it after torch's own half an hour."""
    monkeypatch.setattr(exchange, "timeout", None)
    start_ranks(Runtime(hang_minutes=41.0))
    try:
        for group in (gloo_group(), dist.group.WORLD):
            assert group is not None
            assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(minutes=82)
        assert exchange.timeout == timedelta(minutes=82)
    finally:
        stop_ranks()
