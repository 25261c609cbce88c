"""Several captions of an image in a batch: what is read, the losses by hand, costs, and what it does not go with."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlg_scale import recipe
from mmlg_scale.accounting import forward_flops
from mmlg_scale.cli import main
from mmlg_scale.data.faults import EpochReport
from mmlg_scale.data.mixture import JoinedReader, Source
from mmlg_scale.data.pipeline import StreamSettings, TrainStream
from mmlg_scale.data.scenes import write_scenes
from mmlg_scale.objectives import contrastive, distillation
from mmlg_scale.recipe_file import load_recipe
from mmlg_scale.runtime import Runtime
from mmlg_scale.training.inputs import Inputs, text_length
from mmlg_scale.training.roles import AncestorRole
from mmlg_scale.training.run import run_role
from mmlg_scale.training.session import build_session
from mmlg_scale.training.stages import ClipStage
from tests.data.specs import spec_for

TRAIN, BATCH, STEPS = 48, 12, 4
NO_POOLS = [
    f"--{name}.teacher_pool=null"
    for name in ("extraction.loss", "adaptation.loss", "baselines.tleg.loss", "baselines.distil_loss", "baselines.even_loss")
]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("captions")
    write_scenes(root, num_train=TRAIN, num_val=4, num_test=4, seed=0, image_size=32)
    return root


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("count", [2, 4])
def test_an_image_comes_with_different_captions_of_its_own(scenes: Path, count: int, num_workers: int) -> None:
    """The samples, images and first captions are those of one caption each, on any ranks; the fourth of three captions is counted."""
    spec, reader, reports = spec_for(scenes), JoinedReader.of([Source(scenes / "train")]), list[EpochReport]()

    def batches(rank: int = 0, world_size: int = 1, **options: Any) -> list[Any]:
        settings = StreamSettings(global_batch_size=BATCH, seed=5, augment="crop", rank=rank, world_size=world_size, **options)
        return list(islice(TrainStream(scenes / "train", spec, settings, on_epoch=reports.append), 9))

    plain, several = batches(), batches(captions_per_image=count, num_workers=num_workers)
    of_several = reports[-2:]
    halves = [batches(rank, 2, captions_per_image=count) for rank in (0, 1)]
    for step, (one, batch) in enumerate(zip(plain, several, strict=True)):
        assert torch.equal(batch.samples_BS[:, :2], one.samples_BS)
        assert torch.equal(batch.image_uint8_BCHW, one.image_uint8_BCHW)
        assert torch.equal(batch.places_B, one.places_B)
        assert torch.equal(batch.text_NT[::count], one.text_NT)
        drawn = batch.samples_BS[:, 1:].tolist()
        assert all(len(set(captions)) == min(count, 3) for captions in drawn)
        words = [
            reader.texts(sample).captions[place]
            for (sample, *_), places in zip(batch.samples_BS.tolist(), drawn, strict=True)
            for place in places
        ]
        assert torch.equal(batch.text_NT, spec.tokenizer(words, spec.context_length))
        for name in ("samples_BS", "text_NT", "image_uint8_BCHW"):
            assert torch.equal(torch.cat([half[step].__dict__[name] for half in halves]), getattr(batch, name))
    repeats = TRAIN * max(0, count - 3)
    assert [(found.num_captions, found.num_repeated) for found in of_several] == [(TRAIN * count, repeats)] * 2
    if repeats:
        said = f"epoch 1: {repeats} of {4 * TRAIN} captions were read twice in a batch: their samples have fewer than"
        assert of_several[1].told_repeated().startswith(said)


@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([3, 0])])
def test_captions_stay_with_their_image(rows: slice | Tensor) -> None:
    image, text, lengths = torch.arange(4).reshape(4, 1, 1, 1), torch.arange(12).reshape(12, 1) // 3, torch.arange(12) // 3
    inputs = Inputs(image, text, samples=image.reshape(4, 1), lengths=lengths, places=torch.arange(4))
    assert (len(inputs), inputs.captions_per_image) == (4, 3)
    found, wanted = inputs.rows(rows), torch.arange(4)[rows]
    assert found.places is not None
    assert found.lengths is not None
    for images in (found.image.flatten(), found.places):
        assert torch.equal(images, wanted)
    for captions in (found.text.flatten(), found.lengths):
        assert torch.equal(captions, wanted.repeat_interleave(3))


def outputs(generator: torch.Generator, size: int, scale: float) -> dict[str, Tensor]:
    """Features of five images with three captions each."""
    features = {"image": torch.randn(5, size, generator=generator), "text": torch.randn(15, size, generator=generator)}
    return {f"{tower}_features": found for tower, found in features.items()} | {"logit_scale": torch.tensor([scale])}


def logits(found: dict[str, Tensor], number: int) -> Tensor:
    """Of the images and the caption of that number of each, in fp64."""
    image, text = (F.normalize(found[f"{tower}_features"].double(), dim=1) for tower in ("image", "text"))
    return found["logit_scale"].double() * image @ text.unflatten(0, (5, 3))[:, number].T


def test_losses_by_hand() -> None:
    """CLIP's, SigLIP's and affinity mimicking: the mean over the captions of an image, each against one caption of every other image."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = outputs(generator, 4, 3.0), outputs(generator, 6, 9.0)
    labels, losses, sigmoid, affinity = torch.arange(5), [], [], []
    signs = 2 * torch.eye(5, dtype=torch.float64) - 1
    for number in range(3):
        mine, theirs = logits(student, number), logits(teacher, number)
        losses.append((F.cross_entropy(mine, labels) + F.cross_entropy(mine.T, labels)) / 2)
        sigmoid.append(-F.logsigmoid(signs * (mine - 2)).sum() / 5)
        affinity.append((F.cross_entropy(mine, theirs.softmax(dim=1)) + F.cross_entropy(mine.T, theirs.T.softmax(dim=1))) / 2)
    assert float(contrastive(student)) == pytest.approx(float(sum(losses)) / 3, rel=1e-6)
    assert float(contrastive({**student, "logit_bias": torch.tensor([-2.0])})) == pytest.approx(float(sum(sigmoid)) / 3, rel=1e-6)
    weights = recipe.DistillationLoss(contrastive=0.5, affinity=2.0, feature=0.0, hidden=0.0)
    loss, _ = distillation(student, teacher, torch.zeros(15, 1, dtype=torch.long), weights)
    assert float(loss) == pytest.approx(float(0.5 * sum(losses) + 2 * sum(affinity)) / 3, rel=1e-6)


def settings_of(scenes: Path, captions: int) -> tuple[recipe.Recipe, Runtime]:
    options = {"steps": STEPS, "batch_size": BATCH, "eval_every": STEPS}
    given: dict[str, Any] = {f"ancestor.{key}": value for key, value in options.items()} | {"data.path": str(scenes)}
    pools = {word.removeprefix("--").partition("=")[0]: None for word in NO_POOLS}
    settings, runtime = load_recipe("demo", **given, **pools, **{"data.captions_per_image": captions})
    return settings, runtime


def test_a_run_trains_on_them_and_is_charged_for_them(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image once and each of its captions; another number of captions is another run."""
    settings, runtime = settings_of(scenes, 3)
    result = run_role(AncestorRole(settings), tmp_path / "run", runtime)
    session = build_session(settings, runtime=runtime)
    assert isinstance(session.stage, ClipStage)
    expected = 0
    for batch in islice(session.stream(), STEPS):
        length = text_length(batch, "cut")
        assert isinstance(length, int)
        flops = forward_flops(session.stage.config, text_length=length, pooled=("image", "text"))
        expected += 3 * BATCH * (flops["image"] + 3 * flops["text"])
    session.close()
    assert result["flops"] == expected
    assert result["curve"][-1]["samples"] == STEPS * BATCH
    assert f"{4 * TRAIN}" not in capsys.readouterr().out  # all three are there: nothing is read twice
    words = ["train", "demo", "--data.path", str(scenes), "--out", str(tmp_path / "run"), *NO_POOLS, "--data.captions_per_image=2"]
    assert main([*words, f"--ancestor.steps={STEPS}", f"--ancestor.batch_size={BATCH}", f"--ancestor.eval_every={STEPS}"]) == 2
    assert "captions_per_image" in capsys.readouterr().err


def test_the_plan_counts_them(capsys: pytest.CaptureFixture[str]) -> None:
    def steps(captions: int) -> dict[str, Any]:
        words = ["plan", "demo", "--json", "--flops-per-second=1e9", *NO_POOLS, f"--data.captions_per_image={captions}"]
        assert main(words) == 0
        return {step["id"]: step for step in json.loads(capsys.readouterr().out)["steps"]}

    one, two, three = steps(1), steps(2), steps(3)
    for name in ("ancestor", "learngene", "direct", "i8-t8-distil"):
        for key in ("flops", "teacher_flops"):
            assert three[name][key] - two[name][key] == two[name][key] - one[name][key]  # the same for each caption
            assert one[name][key] < two[name][key] < 2 * one[name][key] or key == "teacher_flops"
        assert one[name]["memory"]["activations"] < two[name]["memory"]["activations"] < 2 * one[name]["memory"]["activations"]
    assert one["learngene"]["teacher_flops"] < two["learngene"]["teacher_flops"] < 2 * one["learngene"]["teacher_flops"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data.captions_per_image=2"], "recipe key extraction.loss.teacher_pool: keeps one caption of each sample"),
        ([*NO_POOLS, "--data.captions_per_image=0"], "data.captions_per_image"),
        ([*NO_POOLS, "--data.captions_per_image=1000000000"], "a whole number from 1 to 64"),
    ],
)
def test_what_does_not_go_together(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "demo", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
