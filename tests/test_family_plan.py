"""Plans of the family-cost benchmark: the pieces that they come to, what pieces are made of, and which are asked for."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import family_cost
from benchmarks.family_cost import chosen, next_trials, this_machine, with_needs
from benchmarks.family_plan import LEARNGENES, Piece, Pieces, load_plan
from mmlg_scale.errors import UserError
from mmlg_scale.recipe_file import load_recipe
from tests.test_family_cost import PLAN


def test_only_names_pieces_down_to_any_slash() -> None:
    every = [
        "scratch/short/i2-t2",
        "scratch/short/i2-t2w48",
        "mmlg/short/five/learngene",
        "mmlg/short-pool/five/i2-t2",
        "mmlg_adapted/short/five/i2-t2",
    ]
    pieces = [Piece(name, "", "", (), ()) for name in every]
    for only, wanted in (
        ([], every),
        (["scratch"], every[:2]),
        (["scratch/short/i2-t2"], every[:1]),
        (["mmlg"], every[2:4]),
        (["mmlg/short"], every[2:3]),
        (["mmlg/short-pool/five", "mmlg_adapted"], every[3:]),
        (["mml"], []),
    ):
        assert chosen(PLAN, pieces, only) == set(wanted)


def test_tuning_leaves_no_best_rate_at_an_edge_and_gives_every_method_as_many_trials() -> None:
    def tune(quality: Any, trials: int = 6) -> dict[str, Any]:
        start, found = {"steps": 80, "batch_size": 32, "learning_rate": 1.0}, {}
        while wanted := next_trials(start, found, trials):
            for settings in wanted:
                assert settings["steps"] * settings["batch_size"] == 80 * 32
                found[family_cost._key(settings)] = {"settings": settings, "quality": quality(**settings)}
        return found

    def peak_at(rate: float) -> Any:
        return lambda learning_rate, batch_size, steps: -abs(learning_rate - rate) - abs(batch_size - 16) / 1000

    near = tune(peak_at(1.0))
    assert [trial["settings"]["learning_rate"] for trial in near.values()][:3] == [1.0, 0.5, 2.0]
    assert len(near) == 6
    assert max(near.values(), key=lambda trial: trial["quality"])["settings"]["batch_size"] == 16
    far = tune(peak_at(16.0))
    rates = sorted(trial["settings"]["learning_rate"] for trial in far.values() if trial["settings"]["batch_size"] == 32)
    assert rates == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0]


def test_another_batch_size_sees_as_many_samples() -> None:
    """A schedule's steps are of the batch size with which tuning started; one that names its batch size keeps both."""
    methods = {"even": {"short": {"steps": 300}, "long": {"steps": 900, "batch_size": 32}}}
    plan = replace(PLAN, methods=methods, tuning={"even": {"steps": 200, "batch_size": 32, "learning_rate": 1e-3}})
    pieces = Pieces(plan, 0, {"even": {"learning_rate": 2e-3, "batch_size": 8}})
    found = {piece.schedule: dict(piece.options) for piece in pieces.all() if piece.method == "even"}
    keys = ("baselines.even.steps", "baselines.even.batch_size", "baselines.even.eval_every")
    assert [found["short"][key] for key in keys] == ["1200", "8", "400"]
    assert [found["long"][key] for key in keys] == ["900", "32", "100"]


def test_a_part_of_a_plan_brings_what_it_is_made_of() -> None:
    methods = {
        "mmlg": {"short": {"steps": 8}},
        "mmlg_adapted": {"short": {"steps": 4}},
        "scratch": {"short": {"steps": 8}},
    }
    plan = replace(PLAN, methods=methods, families=PLAN.families | {"one": [[3, 3]]})
    pieces = Pieces(plan, 0, {}).all()

    def names(*only: str, family: str | None = None) -> list[str]:
        return [piece.id for piece in with_needs(pieces, chosen(plan, pieces, only, family))]

    assert names("mmlg_adapted/short/two/i4-t4") == ["ancestor", "mmlg/short/two/learngene", "mmlg_adapted/short/two/i4-t4"]
    assert names("scratch/short") == [f"scratch/short/{size}" for size in ("i2-t2", "i4-t4", "i3-t3")]
    assert names() == [piece.id for piece in pieces]
    assert names("scratch", "mmlg_adapted", family="two") == [
        *("ancestor", "mmlg/short/two/learngene", "scratch/short/i2-t2", "scratch/short/i4-t4"),
        *("mmlg_adapted/short/two/i2-t2", "mmlg_adapted/short/two/i4-t4"),
    ]
    assert {piece.id for piece in pieces} == {*names(family="two"), *names(family="one")}


def test_what_is_pre_trained_directly_is_adapted_without_an_ancestor() -> None:
    methods = {"direct": {"short": {"steps": 30}}, "direct_adapted": {"short": {"steps": 8, "sizes": [[2, 2]]}}}
    pieces = Pieces(replace(PLAN, methods=methods), 0, {"direct_adapted": {"learning_rate": 1e-3, "batch_size": 64}}).all()
    (adapted,) = [piece for piece in pieces if piece.method == "direct_adapted"]
    assert (adapted.id, adapted.needs) == ("direct_adapted/short/two/i2-t2", ("direct/short/two/learngene",))
    settings, _ = load_recipe("demo", **dict(adapted.options))
    training = settings.adaptation.direct
    assert training is not None
    assert (training.steps, training.batch_size, training.optimizer.learning_rate) == (8, 64, 1e-3)
    assert settings.used_by("descendant", init="direct")["adaptation"] == {"direct": dataclasses.asdict(training)}
    # Neither the learngene nor the untrained model depends on it.
    for piece in pieces:
        if piece.method == "direct":
            assert "adaptation.direct" not in " ".join(key for key, _ in piece.options)


def test_a_schedule_that_continues_another_is_pre_training_of_its_end() -> None:
    """By the structure of the extraction, on the pairs alone; the extraction's own settings are not its."""
    schedules = {
        "long": {"steps": 8, "batch_size": 4, "embedding_rank": 5},
        "polished": {"continues": "long", "steps": 30, "batch_size": 64},
    }
    plan = replace(PLAN, methods={"tleg": schedules}, family_settings={"two": {"width_shares": [1.0]}})
    pieces = {each.id: each for each in Pieces(plan, 0, {"tleg": {"learning_rate": 3e-3}, "tleg@polished": {"learning_rate": 5e-4}}).all()}
    polished, origin = pieces["tleg/polished/two/learngene"], pieces["tleg/long/two/learngene"]
    assert (polished.command, polished.needs, polished.continues) == (("pretrain",), (origin.id,), origin.id)
    assert origin.continues is None
    assert pieces["tleg/polished/two/i2-t2"].needs == (polished.id,)
    settings, _ = load_recipe("demo", **dict(polished.options))
    pretraining, tleg = settings.pretraining, settings.baselines.tleg
    assert pretraining is not None
    assert tleg is not None
    assert (pretraining.basis, pretraining.num_multimodal, pretraining.num_unimodal, pretraining.embedding_rank) == ("linear", 0, 2, 5)
    assert pretraining.width_shares == [1.0]
    training = pretraining.training
    assert (training.steps, training.batch_size, training.optimizer.learning_rate, training.eval_every) == (30, 64, 5e-4, 30)
    assert tleg.training.steps == load_recipe("demo")[0].baselines.tleg.training.steps  # type: ignore[union-attr]


def test_a_schedule_can_be_for_one_family_only() -> None:
    """Its name is no setting of a run, and neither the schedule it continues nor an adaptation elsewhere depends on it."""
    schedules = {"long": {"steps": 8, "batch_size": 4}, "later": {"families": ["one"], "continues": "long", "steps": 6, "batch_size": 8}}
    adapted = {"long": {"steps": 4, "batch_size": 4}, "later": {"families": ["one"], "steps": 4, "batch_size": 4}}
    plan = replace(PLAN, families={"two": [[2, 2], [4, 4]], "one": [[2, 2]]}, methods={"mmlg": schedules, "mmlg_adapted": adapted})
    pieces = {each.id: each for each in Pieces(plan, 0, {}).all()}
    with_later = {each.family for each in pieces.values() if each.schedule == "later"}
    assert with_later == {"one"}
    assert {each.family for each in pieces.values() if each.schedule == "long"} == {"one", "two"}
    assert {each.method for each in pieces.values() if each.schedule == "later"} == {"mmlg", "mmlg_adapted"}
    assert not [key for piece in pieces.values() for key, _ in piece.options if key.endswith("families")]
    whole = dict(schedules, later={key: value for key, value in schedules["later"].items() if key != "families"})
    of_all = {each.id: each for each in Pieces(replace(plan, methods={"mmlg": whole}), 0, {}).all()}
    assert pieces["mmlg/later/one/learngene"].options == of_all["mmlg/later/one/learngene"].options


def test_sizes_at_their_target_untrained_are_not_adapted() -> None:
    adapted = {"steps": 4, "teacher_pool": 8, "reuse_teacher_pool": True}
    methods = {
        "mmlg_adapted": {"short": adapted | {"until": "medium"}, "long": adapted},
        "mmlg": {name: {"steps": 8, "teacher_pool": 8} for name in ("short", "long")},
        "scratch": {"medium": {"steps": 8}, "long": {"steps": 8}},
    }
    pieces = Pieces(replace(PLAN, methods=methods, marks=["medium", "long"]), 0, {})
    names = [each.id for each in pieces.all()]
    adaptations = [f"mmlg_adapted/{schedule}/two/{size}" for schedule in ("short", "long") for size in ("i2-t2", "i4-t4")]
    assert names[-4:] == adaptations  # last, when it is known which sizes miss their targets
    kept = {
        f"scratch/{mark}/{size}": {"curve": [{"q": 0.9}, {"q": target}]}
        for mark, target in (("medium", 0.5), ("long", 0.7))
        for size in ("i2-t2", "i4-t4")
    }
    kept |= {
        f"mmlg/{schedule}/two/{size}": {"curve": [{"q": quality}]}
        for schedule in ("short", "long")
        for size, quality in (("i2-t2", 0.4), ("i4-t4", 0.6))
    }
    assert pieces.spared(kept) == {adaptations[1]}
    assert pieces.spared(kept | {"mmlg/long/two/i4-t4": {"curve": [{"q": 0.7 - 1e-12}]}}) == {adaptations[1], adaptations[3]}
    for unknown in ("scratch/medium/i4-t4", "mmlg/short/two/i4-t4"):
        assert pieces.spared({name: found for name, found in kept.items() if name != unknown}) == set()
    assert all("until" not in key for each in pieces.all() for key, _ in each.options)


def test_a_plan_like_another_has_what_it_does_not_name_itself(tmp_path: Path) -> None:
    (tmp_path / "variant.yaml").write_text("like: scenes\nsettings: {seed: 7}\nmethods: {mmlg: {short: {steps: 5}}}\nmarks: []\n")
    plan, origin = load_plan(str(tmp_path / "variant.yaml")), load_plan("scenes")
    assert (plan.name, plan.origin, plan.methods, plan.marks) == ("variant", "scenes", {"mmlg": {"short": {"steps": 5}}}, [])
    assert plan.settings == origin.settings | {"seed": 7}
    assert (plan.recipe, plan.metric, plan.families, plan.tuning) == (origin.recipe, origin.metric, origin.families, origin.tuning)
    with pytest.raises(UserError, match=r"variant uses the tuning of scenes: run python -m benchmarks.family_cost scenes --tune"):
        family_cost.tune(plan, tmp_path, tmp_path, this_machine(plan))


@pytest.mark.parametrize(("name", "methods"), [("gpu-small", ("scratch", "direct")), ("cluster", ("even", "sws"))])
def test_plans_that_need_gpus_are_recipes(name: str, methods: tuple[str, ...]) -> None:
    plan = load_plan(name)
    pieces = Pieces(plan, 1, {}).all()
    assert {piece.method for piece in pieces} == {"ancestor", *plan.methods}
    for method in methods:
        piece = next(piece for piece in pieces if piece.method == method)
        settings, _ = load_recipe(plan.recipe, **dict(piece.options))
        trained = {
            "scratch": settings.baselines.scratch,
            "direct": settings.pretraining and settings.pretraining.training,
            "even": settings.baselines.even,
            "sws": settings.baselines.sws and settings.baselines.sws.training,
        }[method]
        assert trained is not None
        assert (trained.steps, trained.optimizer.name) == (plan.methods[method]["short"]["steps"], "muon")
        assert trained.eval_every == (trained.steps if method in LEARNGENES else plan.eval_samples // trained.batch_size)
