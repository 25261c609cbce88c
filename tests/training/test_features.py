"""The ancestor's cached features against the ancestor itself: looked up, stopped halfway, on two ranks, of damaged samples."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mmlg_scale import recipe, towers
from mmlg_scale.accounting import forward_flops
from mmlg_scale.data.corpus import open_pairs
from mmlg_scale.data.mixture import JoinedReader
from mmlg_scale.data.pipeline import StreamSettings, TrainStream
from mmlg_scale.data.reader import ShardReader
from mmlg_scale.data.scenes import write_scenes
from mmlg_scale.data.sweep import Sweep
from mmlg_scale.digests import content_digest
from mmlg_scale.errors import UserError
from mmlg_scale.files import write_json_atomic
from mmlg_scale.records import read_record
from mmlg_scale.runtime import Runtime
from mmlg_scale.training import features
from mmlg_scale.training.features import compute_features, open_features
from mmlg_scale.training.folder import claim
from mmlg_scale.training.inputs import Inputs
from mmlg_scale.training.roles import Context, teacher_of
from mmlg_scale.training.teacher import CachedTeacher, LiveTeacher
from tests.data.damage import image_zeroed
from tests.forks import run_ranks

TRAIN = 70
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("features") / "scenes"
    write_scenes(root, num_train=TRAIN, num_val=4, num_test=4, seed=0, image_size=32)
    return root


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def ancestor(data: Path, seed: int = 1) -> towers.Bundle:
    tokenizer = open_pairs(data).tokenizer
    assert tokenizer is not None
    config = towers.model_config(
        {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 2},
            "text_cfg": {"context_length": 16, "vocab_size": tokenizer.vocab_size, "width": 16, "heads": 2, "layers": 2},
        }
    )
    return towers.Bundle(towers.ModelSpec(config, tokenizer=tokenizer), towers.build_clip(config, seed=seed).state_dict())


def identity(data: Path, seed: int = 1, precision: str = "fp32") -> dict[str, Any]:
    inputs = {"data_set": open_pairs(data).digest(), "ancestor": f"{seed}" * 64}
    return {"role": "features", "recipe": {"engine": {"precision": precision}}, "inputs": inputs}


def write(data: Path, out: Path) -> dict[str, Any]:
    """Items of 8 samples, blocks of 2 items: nine items, the last of 6 samples, in five blocks."""
    model = ancestor(data)
    sweep = Sweep(JoinedReader([ShardReader(data / "train")]), model.spec, item_size=8)
    if dist.get_rank() == 0:
        out.mkdir(exist_ok=True)
        claim(out, identity(data))
    found = compute_features(LiveTeacher(model, CPU), sweep, out, autocast=nullcontext, device=CPU, items_per_block=2)
    if dist.get_rank() == 0:
        assert (out / "blocks").exists()  # a kill before the result is written costs no more than joining them again
        write_json_atomic(out / "result.json", {"role": "features", **found})
        features.remove_blocks(out)
    return found


def sign(folder: Path) -> None:
    """Take the files as they are for those that were written."""
    result = read_record(folder / "result.json", "result", "")
    result["files"] = {name: content_digest(folder / name) for name in result["files"]}
    write_json_atomic(folder / "result.json", result)


def kept(data: Path, folder: Path, **other: Any) -> CachedTeacher:
    return CachedTeacher(folder, ancestor(data).spec, identity(data, **other))


@pytest.fixture
def folder(data: Path, tmp_path: Path) -> Path:
    write(data, tmp_path / "kept")
    return tmp_path / "kept"


@pytest.mark.parametrize("per_image", [1, 2])
def test_every_batch_finds_what_the_ancestor_computes(per_image: int, data: Path, folder: Path) -> None:
    model = ancestor(data)
    teacher, looked_up, captions = LiveTeacher(model, CPU), kept(data, folder), set()
    stream = TrainStream(data / "train", model.spec, StreamSettings(global_batch_size=24, seed=3, captions_per_image=per_image))
    for batch in islice(stream, 9):  # 216 pairs: three epochs of 70, with other captions in each
        inputs = Inputs(model.spec.preprocess(batch.image_uint8_BCHW), batch.text_NT, samples=batch.samples_BS)
        found, expected = looked_up(inputs, nullcontext, ()), teacher(inputs, nullcontext, ())
        for name in ("image_features", "text_features", "logit_scale"):
            assert (found[name].reshape(expected[name].shape) - expected[name]).norm() <= 1e-5 * expected[name].norm()
        captions |= set(batch.samples_BS[:, 1:].flatten().tolist())
    assert captions == {0, 1, 2}


def test_numbers_and_cost(data: Path, tmp_path: Path) -> None:
    """Captions are charged as they are computed: item by item in parts of as many as it has images, by length, each cut to its longest."""
    found, spec = write(data, tmp_path / "kept"), ancestor(data).spec
    assert (found["num_images"], found["num_captions"]) == (TRAIN, 3 * TRAIN)
    expected = TRAIN * forward_flops(spec.config, pooled=("image",))["image"]
    sweep = Sweep(JoinedReader([ShardReader(data / "train")]), spec, item_size=8)
    for item in (sweep[number] for number in range(len(sweep))):
        lengths = sorted(row.tolist().index(max(row.tolist())) + 1 for row in item.text_MT)
        size = len(item.num_captions_N)
        for part in (lengths[first : first + size] for first in range(0, len(lengths), size)):
            length = 8 * math.ceil(part[-1] / 8)
            expected += len(part) * forward_flops(spec.config, text_length=length, pooled=("text",))["text"]
    assert found["flops"] == expected
    assert found["seconds"] > 0
    assert not (tmp_path / "kept" / "blocks").exists()


def test_stopped_halfway_it_goes_on_and_gives_the_same_bytes(
    data: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = features._features, 0

    def counted(*arguments: Any) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(features, "_features", counted)
    with pytest.raises(KeyboardInterrupt):
        write(data, tmp_path / "stopped")
    with pytest.raises(UserError, match="no finished features"):
        kept(data, tmp_path / "stopped")
    write(data, tmp_path / "stopped")
    assert calls == 6 + 5  # two blocks of two items were there
    for name in ("image", "text", "captions"):
        assert (tmp_path / "stopped" / f"{name}.npy").read_bytes() == (folder / f"{name}.npy").read_bytes()


def _rank(rank: int, data: str, out: str, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    assert write(Path(data), Path(out))["num_images"] == TRAIN  # on every rank
    dist.destroy_process_group()


def test_two_ranks_write_the_same(data: Path, folder: Path, tmp_path: Path) -> None:
    run_ranks(_rank, (str(data), str(tmp_path / "two"), str(tmp_path / "store")), 2)
    for name in ("image", "text", "captions"):
        one, two = (np.load(where / f"{name}.npy") for where in (folder, tmp_path / "two"))
        assert two.shape == one.shape
        assert np.linalg.norm(two - one) <= 1e-5 * np.linalg.norm(one)


def test_a_sample_that_could_not_be_read_is_named(data: Path, folder: Path) -> None:
    image = np.lib.format.open_memmap(folder / "image.npy", mode="r+")
    image[11] = np.nan
    image.flush()
    sign(folder)
    looked_up, blank = kept(data, folder), torch.zeros(2, 3, 32, 32)
    assert looked_up(Inputs(blank, blank, samples=torch.tensor([[10, 0], [12, 2]])), nullcontext, ())["image_features"].isfinite().all()
    with pytest.raises(UserError, match="no features of sample 11"):
        looked_up(Inputs(blank, blank, samples=torch.tensor([[10, 0], [11, 2]])), nullcontext, ())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("image.npy", lambda array: array.astype(np.float64)),
        ("text.npy", lambda array: array[:, :-1]),
        ("captions.npy", lambda array: array[::-1].copy()),
        ("captions.npy", lambda array: array.astype(np.float32)),
        ("captions.npy", lambda array: np.concatenate([array[:1], array[:0:-1]])),
    ],
)
def test_arrays_that_do_not_go_together_are_refused(name: str, change: Any, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    np.save(tmp_path / "other" / name, change(np.load(folder / name)))
    with pytest.raises(UserError, match="do not go together"):
        open_features(tmp_path / "other")


def test_a_pipe_in_place_of_features_is_not_waited_for(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "image.npy").unlink()
    os.mkfifo(tmp_path / "other" / "image.npy")
    with pytest.raises(UserError, match=r"image\.npy is a pipe or a device"):
        open_features(tmp_path / "other")


def test_damaged_samples_are_left_out(data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "scenes"
    shutil.copytree(data, broken)
    image_zeroed(broken / "train", 0, 11)
    write(broken, tmp_path / "kept")
    whole = np.load(tmp_path / "kept" / "image.npy")
    assert np.flatnonzero(np.isnan(whole).any(axis=1)).tolist() == [11]
    assert np.diff(np.load(tmp_path / "kept" / "captions.npy")).tolist() == [3] * 11 + [0] + [3] * (TRAIN - 12)


@pytest.mark.parametrize(("other", "key"), [({"seed": 2}, "another ancestor"), ({"precision": "bf16"}, 'engine.precision was "fp32"')])
def test_features_of_something_else_are_refused(data: Path, folder: Path, other: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        kept(data, folder, **other)


def test_a_recipe_that_keeps_features_needs_them(data: Path, tmp_path: Path) -> None:
    settings = recipe.Recipe(engine=recipe.Engine(keep_features=True))
    with pytest.raises(UserError, match="needs --features"):
        teacher_of(settings, Context(open_pairs(data), Runtime(), CPU), ancestor(data), tmp_path, None, "extraction.loss")
