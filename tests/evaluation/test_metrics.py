"""Retrieval and zero-shot metrics against brute force, hand-computed cases and scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mmlg_scale.data.evaluation import TensorChunks
from mmlg_scale.errors import UserError
from mmlg_scale.evaluation import retrieval
from mmlg_scale.evaluation.evaluate import encode_in_chunks
from mmlg_scale.evaluation.retrieval import recall_at_k, retrieval_ranks
from mmlg_scale.evaluation.zeroshot import class_embeddings, zero_shot_metrics
from mmlg_scale.metric_names import METRICS, RETRIEVAL, ZERO_SHOT, check_metric
from tests.forks import run_ranks


def test_several_captions_by_brute_force() -> None:
    generator = np.random.default_rng(0)
    owners = np.sort(np.concatenate([np.arange(23), generator.integers(0, 23, size=40)]))
    image, text = generator.normal(size=(23, 7)), generator.normal(size=(len(owners), 7))
    found = recall_at_k(torch.tensor(image), torch.tensor(text), torch.tensor(owners), chunk_size=5)
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    for k in (1, 5, 10):
        hits = [owners[m] in np.argsort(-(image @ text[m]))[:k] for m in range(len(text))]
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx(np.mean(hits))
        hits = [n in owners[np.argsort(-(text @ image[n]))[:k]] for n in range(len(image))]
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(np.mean(hits))
        both = (found[f"image_retrieval_recall@{k}"] + found[f"text_retrieval_recall@{k}"]) / 2
        assert found[f"mean_recall@{k}"] == pytest.approx(both)
    assert set(found) == set(RETRIEVAL)


def test_ties_count_against_the_model_and_nan_is_no_hit() -> None:
    image = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    image_ranks, text_ranks = retrieval_ranks(image, image, torch.arange(3))
    assert image_ranks.tolist() == [2, 2, 1]
    assert text_ranks.tolist() == [2, 2, 1]
    broken = torch.full((3, 2), torch.nan)
    assert recall_at_k(broken, broken, torch.arange(3))["mean_recall@1"] == 0


def test_images_without_captions_are_refused() -> None:
    with pytest.raises(UserError, match="1 images have no caption"):
        recall_at_k(torch.eye(3), torch.eye(3)[:2], torch.tensor([0, 1]))


def test_class_embeddings_by_hand() -> None:
    """Two templates; the 'encoder' looks tokens up in a table."""
    table = torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 5.0], [0.0, 1.0]])
    known = {"a x": 0, "b x": 1, "a y": 2, "b y": 3}
    found = class_embeddings(lambda ids: table[ids], lambda texts: torch.tensor([known[t] for t in texts]), ["x", "y"], ["a {}", "b {}"])
    half = 2**-0.5
    assert torch.allclose(found, torch.tensor([[half, half], [0.0, 1.0]]))


def test_zero_shot_equals_scikit_learn() -> None:
    from sklearn.metrics import balanced_accuracy_score  # here, since every rank of the test below imports this module

    generator = torch.Generator().manual_seed(0)
    image, classes = torch.randn(200, 6, generator=generator), torch.nn.functional.normalize(torch.randn(8, 6, generator=generator), dim=1)
    labels = torch.randint(0, 8, (200,), generator=generator)
    found = zero_shot_metrics(image, classes, labels)
    scores = image @ classes.T
    predicted = scores.argmax(dim=1)
    assert found["acc1"] == pytest.approx((predicted == labels).double().mean().item())
    assert found["acc5"] == pytest.approx(np.mean([label in row.topk(5).indices for label, row in zip(labels, scores, strict=True)]))
    assert found["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(labels, predicted))


def _encode_on_rank(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    calls = 0

    def encode(chunk: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.stack([chunk.sum(dim=1), chunk[:, 0] * 7], dim=1)

    inputs = torch.arange(46.0).reshape(23, 2)
    found = encode_in_chunks(encode, TensorChunks(inputs, 4), torch.device("cpu"))
    torch.save((found, calls), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_share_the_encoding(tmp_path: Path) -> None:
    """23 rows in chunks of 4 on 3 ranks: every rank gets every feature in order, after two calls each."""
    run_ranks(_encode_on_rank, (str(tmp_path / "store"), str(tmp_path)), 3)
    inputs = torch.arange(46.0).reshape(23, 2)
    for rank in range(3):
        found, calls = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(found, torch.stack([inputs.sum(dim=1), inputs[:, 0] * 7], dim=1))
        assert calls == 2


@pytest.mark.parametrize(
    ("name", "near"), [("recall@5", "mean_recall@5"), ("mean_recal@10", "mean_recall@10"), ("acc_1", "acc1"), ("recall@1", "mean_recall@1")]
)
def test_an_unknown_metric_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UserError, match=rf"^recipe key evaluation\.metric: '{name}' is unknown\. Did you mean {near}\? Known: ") as raised:
        check_metric(name, has_classes=True)
    assert all(known in str(raised.value) for known in METRICS)


def test_zero_shot_metrics_need_classes() -> None:
    for name in METRICS:
        check_metric(name, has_classes=True)
    for name in RETRIEVAL:
        check_metric(name, has_classes=False)
    for name in ZERO_SHOT:
        with pytest.raises(
            UserError, match=rf"{name} needs classes, the data set has none \(no classes\.json\)\. Use mean_recall@1\. Shards with a \.cls"
        ):
            check_metric(name, has_classes=False)


def _ranks_on_rank(rank: int, store: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    torch.save(retrieval_ranks(*_made(), chunk_size=4), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def _made() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """11 images with one to three captions; some captions of other images are the same."""
    generator = torch.Generator().manual_seed(0)
    owner_M = torch.arange(11).repeat_interleave(torch.tensor([1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2]))
    return torch.randn(11, 3, generator=generator), torch.randn(21, 3, generator=generator).round(), owner_M


def test_each_rank_ranks_its_share_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = retrieval_ranks(*_made())
    monkeypatch.setattr(retrieval, "SCORES", 40)  # chunks of 3 captions, and of a single image
    for one, other in zip(retrieval_ranks(*_made()), expected, strict=True):
        assert torch.equal(one, other)
    run_ranks(_ranks_on_rank, (str(tmp_path / "store"), str(tmp_path)), 3)
    for rank in range(3):
        for one, other in zip(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected, strict=True):
            assert torch.equal(one, other)
