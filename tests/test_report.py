"""The report's numbers against sums done by hand, read back from the page itself."""

from __future__ import annotations

import base64
import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from mmlg_scale.accounting import summarise
from mmlg_scale.errors import UserError
from mmlg_scale.report import (
    console_table,
    percent,
    plot_curves,
    plot_frontier,
    plot_quality,
    ratio,
    retrieval_samples,
    rows_by_size,
    seconds,
    si,
    write_report,
)
from mmlg_scale.results import DescendantEntry, FamilyResult

METRIC = "mean_recall@1"
# name of an init -> validation metric at each evaluation, FLOPs between two, seconds between two
CURVES = {
    "scratch": ((0.1, 0.3, 0.4), 2e12, 50.0),
    "mmlg": ((0.38, 0.42, 0.43), 1e11, 3.0),
    "even": ((0.2, 0.3, 0.35), 1e12, 25.0),
    "distil": ((0.3, 0.4, 0.45), 1.5e12, 40.0),
}
SIZES = (2, 4, 8)


def _entry(init: str, layers: int, **changes: Any) -> dict[str, Any]:
    values, flops, spent = CURVES[init]
    start = 0 if init in ("mmlg", "even") else 1
    points = enumerate(values, start=start)
    return {
        "name": f"i{layers}-t{layers}-{init}",
        "image_layers": layers,
        "text_layers": layers,
        "image_width": 64,
        "text_width": 64,
        "modality": "both",
        "params": 100_000 * layers,
        "init": init,
        "seed": 0,
        "metrics_at_0": {METRIC: values[0] - 0.01} if start == 0 else None,
        "metrics_final": {METRIC: values[-1] - 0.01, "image_retrieval_recall@1": 0.25},
        "metric": METRIC,
        "curve": [{"step": 50 * n, "samples": 800 * n, "flops": flops * n, "seconds": spent * n, METRIC: q} for n, q in points],
        **changes,
    }


def raw_family(**changes: Any) -> dict[str, Any]:
    """A family before it is summarised: three sizes, four ways each, and an image tower."""
    entries = [_entry(init, layers) for layers in SIZES for init in CURVES]
    tower = _entry("mmlg", 4, name="i4-mmlg", modality="image", text_layers=None, params=123_456)
    return {
        "metric": METRIC,
        "ancestor": {"params": 1_000_000, "flops": 6e12, "seconds": 100.0, "metrics": {METRIC: 0.5}, "image_layers": 8, "text_layers": 8},
        "learngene": {
            "params": 200_000,
            "bytes": 801_000,
            "block_params": 150_000,
            "stem_params": 50_000,
            "flops": 2e12,
            "teacher_flops": 1e12,
            "seconds": 41.0,
        },
        "descendants": [*entries, tower],
        "environment": {"device": "x86_64", "cores": 2},
        "recipe": {"seed": 0, "data": {"path": None}},
        **changes,
    }


def _summarised(**changes: Any) -> FamilyResult:
    return summarise(FamilyResult.from_json(raw_family(**changes), "family.json"))


class Page(HTMLParser):
    """Rows of all tables as lists of cell texts, all text, and the addresses that the page refers to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.text, self.tags = "", []
        self.references: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self._cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        attributes = dict(attrs)
        self.references += [value for key, value in attrs if key in ("src", "href", "xlink:href") and value]
        if tag == "img":
            self.images.append(attributes)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self.rows[-1][-1] += data


def _write(folder: Path, family: Any, samples: Any = None) -> Page:
    (folder / "family.json").write_text(json.dumps(family))
    if samples is not None:
        (folder / "retrieval_samples.json").write_text(json.dumps(samples))
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_cost_table_and_totals_by_hand(tmp_path: Path) -> None:
    page = _write(tmp_path, raw_family())
    # Target 0.4 = scratch's last; ours gets there at its second evaluation (1e11), even never (2e12), distil at its second (3e12).
    size_2 = [
        ["2 + 2", "learngene", "200 k", "37.0 %", "42.0 %", "40.0 %", "yes", "100 G", "3.0 s"],
        ["", "scratch", "200 k", "–", "39.0 %", "40.0 %", "yes", "6 T", "2 min 30 s"],
        ["", "separate distillation", "200 k", "–", "44.0 %", "40.0 %", "yes", "3 T", "80 s"],
        ["", "uniform layer selection", "200 k", "19.0 %", "34.0 %", "40.0 %", "no", "2 T", "50 s"],
    ]
    start = page.rows.index(size_2[0])
    assert page.rows[start : start + 4] == size_2
    assert [row[0] for row in page.rows[start : start + 12] if row[0]] == ["2 + 2", "4 + 4", "8 + 8"]
    # Scratch 18e12; ours 3e12 + 3 * 1e11 = 3.3e12; even 6e12 and distil 9e12; the ancestor 6e12; stored: 1.4 M, all trained.
    ours = ["learngene", "3 of 3", "3.3 T", "1.00 ×", "9.3 T", "1.00 ×", "50 s", "5.6 MB", "37.0 %", "42.0 %"]
    assert ours in page.rows
    scratch = ["scratch", "3 of 3", "18 T", "5.45 ×", "18 T", "1.94 ×", "7 min 30 s", "5.6 MB", "–", "39.0 %"]
    assert scratch in page.rows
    assert ["uniform layer selection", "0 of 3", "6 T", "1.82 ×", "12 T", "1.29 ×", "2 min 30 s", "5.6 MB", "19.0 %", "34.0 %"] in page.rows
    assert ["separate distillation", "3 of 3", "9 T", "2.73 ×", "15 T", "1.61 ×", "4 min 0 s", "5.6 MB", "–", "44.0 %"] in page.rows
    # (6e12 + 3e12) / (6e12 - 1e11) = 1.53: two descendants.
    assert "costs less than scratch from 2 descendants" in " ".join(page.text.split())


def test_storage_and_single_towers_by_hand(tmp_path: Path) -> None:
    page = _write(tmp_path, raw_family())
    assert ["learngene", "200 k", "800 kB (file: 801 kB)", "20.0 %"] in page.rows
    assert ["– its blocks, coefficients, norms and biases", "150 k", "600 kB", "15.0 %"] in page.rows
    assert ["– its stems", "50 k", "200 kB", "5.0 %"] in page.rows
    assert "blocks are 15.8 % of the ancestor's blocks" in page.text  # 150 / 950
    assert "13.1 % of all descendants together" in page.text  # 200 / (1400 + 123.456)
    assert ["name", "tower", "initialised by", "layers", "parameters", "image retrieval R@1"] in page.rows  # what was measured, no more
    assert ["i4-mmlg", "image", "learngene", "4", "123 k", "25.0 %"] in page.rows


def test_the_page_needs_nothing_else_and_says_what_is_not_claimed(tmp_path: Path) -> None:
    page = _write(tmp_path, raw_family())
    assert [reference for reference in page.references if not reference.startswith(("#", "data:image/png;base64,"))] == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert page.tags.count("svg") == 3
    assert "What is not claimed" in page.text
    assert "2506.16673" in page.text


def test_whatever_the_run_holds_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    family = raw_family(environment={evil: evil}, recipe={"seed": 0, "note": evil})
    family["descendants"][-1]["name"] = evil
    samples = [{"caption": evil, "results": [{"png_base64": '"><script>', "correct": True, "score": 0.5}]}]
    samples += [{"png_base64": "AA", "results": [{"caption": evil, "correct": False, "score": 0.5}]}]
    page = _write(tmp_path, family, samples)
    assert "script" not in page.tags
    assert page.text.count(evil) == 6


def test_the_same_family_gives_the_same_bytes_and_summarised_input_too(tmp_path: Path) -> None:
    (tmp_path / "family.json").write_text(json.dumps(raw_family()))
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first
    (tmp_path / "family.json").write_text(json.dumps(_summarised().to_json()))
    assert write_report(tmp_path).read_bytes() == first


def test_a_family_without_anything_to_compare_is_drawn(tmp_path: Path) -> None:
    mine = [_entry("mmlg", 2), _entry("mmlg", 4)]
    page = _write(tmp_path, raw_family(descendants=mine))
    assert "no size has both a scratch and an mmlg entry" in page.text
    assert ["2 + 2", "learngene", "200 k", "37.0 %", "42.0 %", "–", "–", "–", "–"] in page.rows
    assert _write(tmp_path, raw_family(descendants=[])).tags.count("svg") == 2


def test_sizes_differ_by_width_and_seeds_stand_side_by_side() -> None:
    entries = [_entry("mmlg", 2), _entry("mmlg", 2, seed=1), _entry("mmlg", 2, image_width=32, params=1000)]
    groups = rows_by_size([DescendantEntry.from_json(entry, "entry") for entry in entries])
    assert [group.label for group in groups] == ["2 + 2 (width 32 + 64)", "2 + 2 (width 64 + 64)"]
    assert [entry.seed for entry in groups[1].entries] == [0, 1]


def test_plots_draw_the_entries_values() -> None:
    family = _summarised()
    panels = [axis for axis in plot_curves(family).axes if axis.get_visible()]
    assert [axis.get_title() for axis in panels] == ["2 + 2 layers", "4 + 4 layers", "8 + 8 layers"]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in panels[1].get_lines()}
    assert drawn["scratch"] == [[2.0, pytest.approx(10)], [4.0, pytest.approx(30)], [6.0, pytest.approx(40)]]
    assert drawn["learngene"] == [
        [0.0, pytest.approx(38)],
        [pytest.approx(0.1), pytest.approx(42)],
        [pytest.approx(0.2), pytest.approx(43)],
    ]
    lines = {line.get_label(): line.get_xydata().tolist() for line in plot_quality(family).axes[0].get_lines()}
    assert lines["learngene, no training"] == [[100_000 * layers, pytest.approx(37)] for layers in SIZES]
    assert lines["uniform layer selection"] == [[100_000 * layers, pytest.approx(34)] for layers in SIZES]
    assert lines["ancestor"] == [[1_000_000, 50.0]]


def test_the_frontier_draws_totals_and_a_dearer_learngene_is_not_praised(tmp_path: Path) -> None:
    family = _summarised()
    left, right = plot_frontier(family).axes
    marks = {marks.get_label(): (marks.get_offsets()[0].tolist(), marks.get_sizes()[0]) for marks in left.collections}
    assert marks["learngene"] == ([3.3e12, pytest.approx(42)], pytest.approx(25 + 90 * 1.4))
    assert marks["scratch"] == ([18e12, pytest.approx(39)], pytest.approx(25 + 90 * 1.4))
    assert [marks.get_offsets()[0].tolist()[0] for marks in right.collections] == [9.3e12, 18e12, 15e12, 12e12]
    # Extraction at ten times the cost: 30 + 0.3 against scratch's 18.
    gene = {**raw_family()["learngene"], "flops": 20e12, "teacher_flops": 10e12}
    (tmp_path / "family.json").write_text(json.dumps(raw_family(learngene=gene)))
    html = write_report(tmp_path).read_text()
    assert '<div class="card dear"><b>0.59 ×</b>' in html
    assert '<td class="no">0.59 ×</td>' in html
    assert html.count("the learngene costs more") == 4  # against each of the three, and against scratch with the ancestor


def test_recalls_have_their_candidates_and_standard_errors(tmp_path: Path) -> None:
    recalls = {f"{kind}_retrieval_recall@{k}": 0.1 * k**0.5 for kind in ("image", "text") for k in (1, 5, 10)}
    entry = _entry("mmlg", 2)
    entry["metrics_final"] |= recalls
    ancestor = {**raw_family()["ancestor"], "metrics": {METRIC: 0.5, **recalls}}
    splits = {"val": {"images": 100, "captions": 200}, "test": {"images": 100, "captions": 400}}
    page = _write(tmp_path, raw_family(descendants=[entry], ancestor=ancestor, splits=splits))
    # sqrt(0.1 * 0.9 / 400) = 1.5 points for captions as queries, 3.0 for images.
    figures = ["10.0 % ± 1.5", "22.4 % ± 2.1", "31.6 % ± 2.3", "10.0 % ± 3.0", "22.4 % ± 4.2", "31.6 % ± 4.7"]
    assert ["ancestor", "", *figures] in page.rows
    assert ["2 + 2", "learngene", *figures] in page.rows
    assert "100 images and 400 captions; guessing gives 1.0 % mean_recall@1" in " ".join(page.text.split())


def _png(index: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (index, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def _red(png_base64: str) -> int:
    return Image.open(io.BytesIO(base64.b64decode(png_base64))).getpixel((0, 0))[0]  # type: ignore[index]


def test_retrieval_samples_by_hand(tmp_path: Path) -> None:
    image_ND = torch.tensor([[2.0, 0.0], [0.0, 5.0], [3.0, 3.0]])  # scales do not matter
    text_MD = torch.tensor([[1.0, 0.1], [0.2, 1.0], [0.1, 1.0], [1.0, 0.9]])
    owner_M = torch.tensor([0, 1, 2, 2])  # caption 2 is nearest to image 1, but describes image 2
    captions = ["zero", "one", "two", "two again"]
    samples = retrieval_samples(image_ND, text_MD, owner_M, captions, _png, num_queries=4, num_image_queries=2, num_results=2)
    found = [(s["caption"], [(_red(r["png_base64"]), r["correct"]) for r in s["results"]]) for s in samples[:4]]
    assert found == [
        ("zero", [(0, True), (2, False)]),
        ("one", [(1, True), (2, False)]),
        ("two", [(1, False), (2, True)]),
        ("two again", [(2, True), (0, False)]),
    ]
    assert samples[0]["results"][0]["score"] == round(1 / math.hypot(1, 0.1), 4)
    texts = [(_red(s["png_base64"]), [(r["caption"], r["correct"]) for r in s["results"]]) for s in samples[4:]]
    assert [sample["rank"] for sample in samples] == [1, 1, 2, 1, 1, 1]
    assert texts == [(0, [("zero", True), ("two again", False)]), (2, [("two again", True), ("one", False)])]

    page = _write(tmp_path, raw_family(), samples)
    assert len(page.images) == 4 * 2 + 2
    assert [image["class"] for image in page.images[:8]] == ["right", "", "right", "", "", "right", "right", ""]


def test_few_captions_are_asked_once_each() -> None:
    samples = retrieval_samples(torch.eye(2), torch.eye(2), torch.arange(2), ["a", "b"], _png, num_queries=6)
    assert [sample["caption"] for sample in samples] == ["a", "b"]
    assert [len(sample["results"]) for sample in samples] == [2, 2]


def _without(*path: str | int) -> dict[str, Any]:
    family = raw_family()
    holder: Any = family
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    return family


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ([], "not an object"),
        (_without("learngene"), "learngene is missing"),
        (_without("ancestor", "params"), r"ancestor\.params is missing"),
        (_without("ancestor", "metrics", METRIC), r"ancestor\.metrics\.mean_recall@1 is missing"),
        (_without("descendants", 3, "curve"), r"descendants\[3\]\.curve is missing"),
        (_without("descendants", 5, "curve", 1, METRIC), r"descendants\[5\]\.curve\[1\]\.mean_recall@1 is missing"),
        (_without("descendants", 0, "metrics_final", METRIC), r"descendants\[0\]\.metrics_final\.mean_recall@1 is missing"),
        (raw_family(descendants=[_entry("mmlg", 2, curve=[])]), r"descendants\[0\]\.curve has no points"),
        (raw_family(descendants=[_entry("mmlg", 2, params="many")]), r"descendants\[0\]\.params is not a whole number"),
        (raw_family(descendants=[_entry("mmlg", 2, metrics_at_0={"acc1": 0.5})]), r"descendants\[0\]\.metrics_at_0\.mean_recall@1 is"),
        (raw_family(descendants=[{**_entry("mmlg", 2), "init": "magic"}]), r"descendants\[0\]\.init: 'magic' is not one of mmlg"),
        (raw_family(descendants=[_entry("mmlg", 2, params=10**400)]), r"descendants\[0\]\.params is larger than 1e\+30"),
        (raw_family(descendants=[_entry("mmlg", 2, flops=10**400)]), r"descendants\[0\]\.flops is larger than 1e\+30"),
        (raw_family(descendants=[{**_entry("mmlg", 2), "init": "tleg"}]), r"rival_learngenes\.tleg is missing"),
        (raw_family(ancestor=raw_family()["ancestor"] | {"params": 0}), r"ancestor\.params is not a number of parameters"),
        (raw_family(splits={"val": {"images": 0, "captions": 3}}), r"splits\.val has 0 images and 3 captions"),
        (raw_family(splits={"test": {"images": 2, "captions": 10**13}}), r"splits\.test has 2 images and"),
    ],
)
def test_a_damaged_family_is_one_clear_line(tmp_path: Path, family: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        _write(tmp_path, family)
    assert "family.json" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "report.html").exists()


def test_missing_and_broken_files_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no family\.json"):
        write_report(tmp_path)
    (tmp_path / "family.json").write_text('{"metric": ')
    with pytest.raises(UserError, match="it is not JSON"):
        write_report(tmp_path)
    with pytest.raises(UserError, match=r"retrieval_samples\.json is damaged"):
        _write(tmp_path, raw_family(), {"caption": "no list"})


def test_console_table_by_hand() -> None:
    console = Console(file=io.StringIO(), width=160)
    console.print(console_table(_summarised()))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in text.splitlines() if line.startswith("│")]
    assert ["2 + 2", "learngene", "200 k", "37.0 %", "42.0 %", "100 G", "yes"] in rows
    assert ["8 + 8", "uniform layer selection", "800 k", "19.0 %", "34.0 %", "2 T", "no"] in rows
    caption = " ".join(text.split())
    assert "extraction 3 TFLOP" in caption
    assert "against scratch 5.45 ×, against uniform layer selection 1.82 ×, against separate distillation 2.73 ×" in caption
    assert "with the ancestor counted 1.94 ×; storage 20.0 % of the ancestor" in caption


def test_an_ancestor_of_unknown_cost_is_drawn_with_dashes(tmp_path: Path) -> None:
    ancestor = {**raw_family()["ancestor"], "flops": None, "seconds": None}
    page = _write(tmp_path, raw_family(ancestor=ancestor))
    assert ["training of the ancestor, once", "–", "–"] in page.rows
    assert ["learngene", "3 of 3", "3.3 T", "1.00 ×", "–", "–", "50 s", "5.6 MB", "37.0 %", "42.0 %"] in page.rows
    assert ["scratch", "3 of 3", "18 T", "5.45 ×", "18 T", "–", "7 min 30 s", "5.6 MB", "–", "39.0 %"] in page.rows
    text = " ".join(page.text.split())
    assert "Note: the ancestor's own training cost is unknown" in text
    assert "there is no break-even" in text
    assert "no number of descendants" not in text
    console = Console(file=io.StringIO(), width=160)
    console.print(console_table(_summarised(ancestor=ancestor)))
    words = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "against scratch 5.45 ×" in words
    assert "with the ancestor counted –; storage 20.0 % of the ancestor" in words


def test_numbers_in_words() -> None:
    assert [si(value) for value in (None, 0, 12, 999, 1234, 1.5e6, 2e9, 3.25e12, 4e15, 5e18)] == [
        "–", "0", "12", "999", "1.23 k", "1.5 M", "2 G", "3.25 T", "4 P", "5 E",
    ]  # fmt: skip
    assert [seconds(value) for value in (None, 0.04, 9.94, 87.2, 119.0, 200.0, 239.9, 8000.0)] == [
        "–", "0.0 s", "9.9 s", "87 s", "119 s", "3 min 20 s", "4 min 0 s", "2 h 13 min",
    ]  # fmt: skip
    assert (percent(0.4731), percent(None), ratio(4.8123), ratio(None)) == ("47.3 %", "–", "4.81 ×", "–")


@pytest.mark.parametrize("metric", ["recall@x", "accx", "acc5", "acc" + "9" * 5000, "mean_recall@10000000"])
def test_a_metric_without_a_chance_level_is_reported_all_the_same(metric: str, tmp_path: Path) -> None:
    ancestor = raw_family()["ancestor"] | {"block_params": 10**9}
    family = json.loads(
        json.dumps(raw_family(ancestor=ancestor, splits={"val": {"images": 9, "captions": 0}, "test": {"images": 9, "captions": 10**12}}))
    )
    text = json.dumps(family).replace(METRIC, metric)
    _write(tmp_path, json.loads(text) | {"recipe": {"baselines": [], "extraction": 3}})
    assert (tmp_path / "report.html").exists()
