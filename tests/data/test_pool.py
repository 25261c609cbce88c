"""A pool of samples: the first of the order, again and again, each as it was in the first pass."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from mmlg_scale.data.faults import EpochReport
from mmlg_scale.data.mixture import Source
from mmlg_scale.data.pipeline import Batch, StreamSettings, TrainStream
from mmlg_scale.data.scenes import scenes_tokenizer, write_scenes
from mmlg_scale.errors import UserError
from mmlg_scale.towers import ModelSpec, model_config
from tests.data.damage import image_zeroed

TRAIN, BATCH, POOL = 60, 12, 36
STEPS = 9  # three passes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pool") / "data"
    write_scenes(root, num_train=TRAIN, num_val=4, num_test=4, seed=0, image_size=32, samples_per_shard=20)
    return root / "train"


def spec() -> ModelSpec:
    tokenizer = scenes_tokenizer()
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 1},
        "text_cfg": {"context_length": 16, "vocab_size": tokenizer.vocab_size, "width": 16, "heads": 2, "layers": 1},
    }
    return ModelSpec(model_config(config), tokenizer=tokenizer)


def batches(folder: Path, count: int = STEPS, start: int = 0, **settings: object) -> list[Batch]:
    chosen = {"global_batch_size": BATCH, "seed": 5, "augment": "crop", "pool": POOL} | settings
    stream = TrainStream(folder, spec(), StreamSettings(**chosen), start_step=start)  # type: ignore[arg-type]
    return list(islice(stream, count))


def rows(found: list[Batch]) -> list[tuple[int, ...]]:
    """Each pair as place, sample, caption, its pixels and its tokens."""
    every = []
    for batch in found:
        assert batch.places_B is not None
        for place, sample, image, text in zip(batch.places_B, batch.samples_BS, batch.image_uint8_BCHW, batch.text_NT, strict=True):
            every.append((int(place), *sample.tolist(), hash(image.numpy().tobytes()), hash(text.numpy().tobytes())))
    return every


def test_every_pass_has_the_same_pairs_in_another_order(folder: Path) -> None:
    """The first one as without a pool; crops, captions and all are those of the first pass."""
    found = rows(batches(folder))
    first, second, third = found[:POOL], found[POOL : 2 * POOL], found[2 * POOL :]
    assert first == rows(batches(folder, POOL // BATCH, pool=None))
    assert sorted(first) == sorted(second) == sorted(third)
    assert [row[0] for row in first] == list(range(POOL))
    assert len({tuple(part) for part in (first, second, third)}) == 3
    assert len({row[1] for row in first}) == POOL


@pytest.mark.parametrize(("start", "world_size"), [(4, 1), (2, 2), (7, 3)])
def test_it_is_resumed_anywhere_at_any_world_size(folder: Path, start: int, world_size: int) -> None:
    expected = rows(batches(folder))[start * BATCH :]
    parts = [batches(folder, STEPS - start, start, rank=rank, world_size=world_size) for rank in range(world_size)]
    found = [row for step in range(STEPS - start) for part in parts for row in rows([part[step]])]
    assert found == expected


def test_a_pool_of_more_samples_than_there_are_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="has 60 samples, a teacher_pool of 72 needs as many different ones"):
        batches(folder, pool=72)
    assert len({row[1] for row in rows(batches(folder, 10, pool=60))}) == 60


def test_damage_counts_once_however_often_it_is_met(tmp_path: Path) -> None:
    """One damaged image in sixty is below 2 %, three times in three passes it would be above; and the epoch is reported once."""
    write_scenes(tmp_path / "data", num_train=TRAIN, num_val=4, num_test=4, seed=0, image_size=32, samples_per_shard=20)
    image_zeroed(tmp_path / "data" / "train", 0, 7)
    reports: list[EpochReport] = []
    settings = StreamSettings(global_batch_size=BATCH, seed=5, check="structure", max_bad_fraction=0.02, pool=TRAIN)
    stream = TrainStream(tmp_path / "data" / "train", spec(), settings, on_epoch=reports.append)
    found = list(islice(stream, 3 * TRAIN // BATCH))
    assert all(7 not in batch.indices_B.tolist() for batch in found)
    assert [(report.epoch, sum(report.skipped.values()), report.num_captions) for report in reports] == [(0, 1, TRAIN)]
    assert stream.figures(10) == {"pool_passes": 2.0}
    assert sorted(rows(found[:5])) == sorted(rows(found[5:10]))


def test_no_source_of_a_mixture_is_read_twice(folder: Path, tmp_path: Path) -> None:
    """Three quarters of 108 pairs are 81 of the first set's 60 samples; of 72, they are 54."""
    write_scenes(tmp_path / "other", num_train=TRAIN, num_val=4, num_test=4, seed=1, image_size=32)
    sources = [Source(folder, share=3, name="much"), Source(tmp_path / "other" / "train", share=1, name="little")]
    with pytest.raises(UserError, match="has 60 samples, a teacher_pool of 108 takes 81 of this source"):
        TrainStream(sources, spec(), StreamSettings(global_batch_size=BATCH, seed=5, pool=108))
    found = rows(list(islice(TrainStream(sources, spec(), StreamSettings(global_batch_size=BATCH, seed=5, pool=72)), 12)))
    assert sorted(found[:72]) == sorted(found[72:])
    assert len({row[1] for row in found}) == 72
