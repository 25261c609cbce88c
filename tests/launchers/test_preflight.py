"""Which nodes are found bad, and why."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from mmlg_launchers.preflight import Report, judge, rounds, table

NAMES = ["n1", "n2", "n3", "n4"]


def healthy() -> list[Report]:
    return [Report(name, 8, 500.0, 900.0, 1e9, {other: 10.0 for other in range(4) if other != rank}) for rank, name in enumerate(NAMES)]


@pytest.mark.parametrize("number", range(1, 10))
def test_every_pair_meets_once_and_nobody_twice_in_a_round(number: int) -> None:
    found = rounds(number)
    assert sorted(itertools.chain(*found)) == list(itertools.combinations(range(number), 2))
    for pairs in found:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(set(ranks)) == len(ranks)


def test_nothing_is_wrong_with_nodes_alike() -> None:
    assert judge(healthy(), NAMES, 8) == {}
    assert table(healthy(), NAMES)[1].split() == ["n1", "8", "500.0", "900", "10.00", "10.00"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpus": 7}, "has 7 GPUs instead of 8"),
        ({"memory_gib": 200.0}, "has 200 GiB of memory, others 500"),
        ({"disk": 30.0}, "has 30 MB/s to its disk, others 900"),
        ({"clock": 1e9 - 2.5}, "its clock is off by -2.5 s"),
        ({"error": "OSError: no space"}, "OSError: no space"),
    ],
)
def test_what_is_wrong_with_a_node_itself(changes: dict[str, object], said: str) -> None:
    reports = healthy()
    reports[1] = dataclasses.replace(reports[1], **changes)  # type: ignore[arg-type]
    assert judge(reports, NAMES, 8) == {"n2": [said]}


@pytest.mark.parametrize("rate", [3.0, 0.0])
def test_of_slow_pairs_the_node_in_all_of_them_is_named(rate: float) -> None:
    reports = healthy()
    for other in (0, 1, 3):
        reports[2].rates[other] = reports[other].rates[2] = rate
    assert judge(reports, NAMES, 8) == {"n3": ["fails or is slow with n1, n2, n4 (expected: 10.00 GB/s)"]}


def test_all_are_slow_against_what_is_expected() -> None:
    assert list(judge(healthy(), NAMES, 8, gigabytes_per_second=25.0)) == NAMES
    assert judge(healthy(), NAMES, 8, gigabytes_per_second=19.0) == {}


def test_a_node_without_an_answer_is_the_one_to_leave_out() -> None:
    """The others then fail because of it."""
    failed = [dataclasses.replace(report, error="DistStoreError: timed out", rates={}) for report in healthy()]
    assert judge([failed[0], None, *failed[2:]], NAMES, 8) == {"n2": ["gave no answer"]}
    assert judge([None] * 4, NAMES, 8) == {name: ["gave no answer"] for name in NAMES}
    assert table([failed[0], None, *failed[2:]], NAMES)[2].split() == ["n2", "-", "-", "-", "-"]
