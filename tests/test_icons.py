"""examples/icons on a small package made by hand: nothing is downloaded."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import sys
import tarfile
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image, ImageColor

from mmlg_scale.data.pack import PackSettings, pack_table
from mmlg_scale.data.reader import ShardReader
from mmlg_scale.errors import UserError

SCRIPT = Path(__file__).parents[1] / "examples" / "icons" / "make_images.py"
SQUARE, LEFT, TOP, DOT, BAR, FRAME = (
    f'<path fill="currentColor" d="{path}"/>'
    for path in ("M4 4h8v8H4z", "M0 0h8v16H0z", "M0 0h16v8H0z", "M7 7h2v2H7z", "M0 6h16v4H0z", "M0 0h16v2H0zM0 14h16v2H0z")
)
RED = '<path fill="#f00" d="M0 0h16v16H0z"/><path fill="#00f" d="M4 4h8v8H4z"/>'


@pytest.fixture(scope="module")
def icons() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_images_of_icons", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def icon_set(prefix: str, author: str, bodies: dict[str, str], licence: str = "MIT", **more: Any) -> dict[str, Any]:
    """A set's JSON as the package has it; `more` is for what a set says about itself, or its styles."""
    styles = {key: more.pop(key) for key in ("prefixes", "suffixes") if key in more}
    described = {"name": f"The {prefix}", "author": {"name": author, "url": f"https://example.org/{prefix}"}, "total": len(bodies)}
    info = {**described, "license": {"title": licence, "spdx": licence, "url": "https://example.org/licence"}, **more}
    return {"prefix": prefix, "info": info, "icons": {name: {"body": body} for name, body in bodies.items()}, **styles}


def package(path: Path, *sets: dict[str, Any]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for content in sets:
            payload = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/json/{content['prefix']}.json")
            member.size = len(payload)
            archive.addfile(member, io.BytesIO(payload))
    return path


def rows(out: Path) -> set[tuple[str, str, str]]:
    with (out / "pairs.csv").open(newline="") as file:
        found = [tuple(row.values()) for row in csv.DictReader(file)]
    assert len(set(found)) == len(found)
    return {(path, caption, split) for path, caption, split in found}


@pytest.mark.parametrize(
    ("name", "more", "caption"),
    [
        ("search-x-filled", {"suffixes": {"": "Basic", "filled": "Filled"}}, "search x, filled"),
        ("search-x", {"suffixes": {"": "Basic", "filled": "Filled"}}, "search x"),
        ("locked-with-key", {"palette": True}, "locked with key, colour"),
        ("heart-outline-rounded", {"suffixes": {"outline": "O", "rounded": "R", "outline-rounded": "OR"}}, "heart, outline rounded"),
        ("twotone-heart", {"prefixes": {"": "", "twotone": "Two-Tone"}}, "heart, twotone"),
        ("add-24-filled", {"suffixes": {"24-filled": "24 Filled"}}, "add, filled"),
        ("mark-16", {"suffixes": {"16": "16"}}, "mark"),
        ("heart-flat", {"suffixes": {"flat": "Flat"}, "palette": True}, "heart, flat colour"),
        # The style words of sets that list none: where the icon is there without it too.
        ("bell-outline", {"others": ["bell"]}, "bell, outline"),
        ("colour-fill", {}, "colour fill"),
    ],
)
def test_captions(icons: ModuleType, name: str, more: dict[str, Any], caption: str) -> None:
    others = dict.fromkeys(more.pop("others", ()), SQUARE) if "others" in more else {}
    content = icon_set("a", "A", {name: DOT, **others}, **more)
    assert next(icons.icons_of(content, Counter())).caption == caption


def test_skin_tones_are_one_subject(icons: ModuleType) -> None:
    names = ("waving-hand", "waving-hand-medium-light-skin-tone", "couple-dark-skin-tone-light-skin-tone")
    found = list(icons.icons_of(icon_set("a", "A", dict.fromkeys(names, DOT)), Counter()))
    assert [icon.subject for icon in found] == ["waving hand", "waving hand", "couple"]
    assert found[1].caption == "waving hand medium light skin tone"


def test_from_package_to_shards(icons: ModuleType, tmp_path: Path) -> None:
    """Which pairs there are, in which split, and what of the rest is counted."""
    source = package(
        tmp_path / "p.tgz",
        icon_set(
            "one", "A", {"left-half": LEFT, "square": SQUARE, "rod": BAR, "blank": "<g/>", "broken": "<g>", "spin": DOT + "<animate/>"}
        ),
        icon_set("two", "B", {"locked": RED}, licence="Apache-2.0", palette=True),
        icon_set("bi", "The Bootstrap Authors", {"point": DOT, "box": SQUARE}),
        icon_set("ph", "Phosphor Icons", {"frame": FRAME, "box": SQUARE}),
        icon_set("marketeq", "Marketeq", {"frame": TOP}),
        icon_set("free", "C", {"a": DOT}, licence="GPL-3.0"),
        icon_set("marks", "D", {"acme": DOT}, category="Logos"),
        icon_set("past", "E", {"a": DOT}, hidden=True),
    )
    out, page = tmp_path / "out", tmp_path / "SOURCES.md"
    icons.make(source, out, page, seed=0)
    found = rows(out)
    frame = next(path for path, caption, _ in found if caption == "frame")
    assert frame in ("ph/frame.png", "marketeq/frame.png")  # the caption is there once in a split; which one is drawn
    assert found == {
        ("one/left-half.png", "left half", "train"),
        ("one/rod.png", "rod", "train"),
        ("two/locked.png", "locked, colour", "train"),
        ("bi/point.png", "point", "val"),
        (frame, "frame", "test"),
        ("ph/box.png", "box", "test"),
    }
    told = page.read_text()
    assert "3 / 1 / 2 pairs for train / val / test" in told
    assert r"| two | The two | [B](https://example.org/two) | [Apache-2.0](https://example.org/licence) | 1 | 1 | train |" in told
    for reason in (
        "| animations | 1 |",
        "| pictures that are one flat colour, or cannot be rendered | 2 |",
        "| train: picture identical to one in test | 1 |",
        "| val: picture identical to one in test | 1 |",
        "| test: caption there already | 1 |",
        "| sets under other licences | 1 |",
        "| sets of the category Logos | 1 |",
        "| sets that the package hides: superseded | 1 |",
    ):
        assert reason in told
    assert not any(name in told for name in ("GPL", "acme", "https://example.org/past"))
    pack_table(out / "pairs.csv", tmp_path / "data", PackSettings(tokenizer="words"))
    assert [len(ShardReader(tmp_path / "data" / split)) for split in ("train", "val", "test")] == [3, 1, 2]


def test_pictures(icons: ModuleType, tmp_path: Path) -> None:
    """32 x 32, white where nothing is drawn; currentColor is one of the named colours, other colours stay."""
    names = [f"half-{number}" for number in "abcdefgh"]
    bodies = {name: f'<path fill="currentColor" d="M0 0h8v{8 + place}H0z"/>' for place, name in enumerate(names)}
    sets = (icon_set("one", "A", bodies), icon_set("two", "B", {"locked": RED}))
    icons.make(package(tmp_path / "p.tgz", *sets), tmp_path / "out", tmp_path / "s.md", seed=0)
    with Image.open(tmp_path / "out/two/locked.png", formats=["PNG"]) as image:
        assert (image.mode, image.size) == ("RGB", (32, 32))
        assert (image.getpixel((1, 1)), image.getpixel((16, 16))) == ((255, 0, 0), (0, 0, 255))
    colours = {ImageColor.getrgb(name) for name in icons.COLOURS}
    drawn = set()
    for name in names:
        with Image.open(tmp_path / f"out/one/{name}.png", formats=["PNG"]) as image:
            assert image.getpixel((24, 8)) == (255, 255, 255)
            drawn.add(image.getpixel((8, 8)))
    assert drawn <= colours
    assert len(drawn) > 1


@pytest.mark.parametrize(
    "attribute",
    [
        'href="{}"',
        "xlink:href = '{}'",
        'href="file://{}"',
        'href="http://127.0.0.1/a.png"',
        'href="data:image/svg+xml;base64,PHN2Zy8+"',
        'href="&#x2f;a.png"',
        'href="#a" xlink:href="{}"',
        'HREF="{}"',
    ],
)
def test_nothing_outside_an_icon_is_read(icons: ModuleType, tmp_path: Path, attribute: str) -> None:
    Image.new("RGB", (16, 16), (255, 0, 0)).save(tmp_path / "secret.png")
    body = f"<image width='16' height='16' {attribute.format(tmp_path / 'secret.png')}/>"
    left_out: Counter[str] = Counter()
    assert list(icons.icons_of(icon_set("a", "A", {"x": body}), left_out)) == []
    assert left_out == {"SVG that refers to something outside itself": 1}


def test_what_an_icon_refers_to_inside_itself_is_drawn(icons: ModuleType) -> None:
    body = '<defs><path id="a" d="M0 0h8v16H0z"/></defs><use href="#a" fill="currentColor"/>'
    [icon] = icons.icons_of(icon_set("a", "A", {"x": body}), Counter())
    image = icons.render(icon, "crimson")
    assert (image.getpixel((8, 16)), image.getpixel((24, 16))) == (ImageColor.getrgb("crimson"), (255, 255, 255))


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("../../up", {}, "names that are not lower-case words"),
        ("wide", {"width": '1" onload="'}, "no proper view box"),
        ("flat", {"height": 0}, "no proper view box"),
        ("long", {"body": "<g/>" * 30_000}, "SVG of more than 100,000 characters"),
        ("old", {"hidden": True}, "hidden icons: superseded"),
    ],
)
def test_what_is_refused(icons: ModuleType, name: str, change: dict[str, Any], reason: str) -> None:
    content, left_out = icon_set("a", "A", {name: DOT}), Counter[str]()
    content["icons"][name].update(change)
    assert list(icons.icons_of(content, left_out)) == []
    assert left_out == {reason: 1}


def test_one_style_of_each_subject_is_drawn(icons: ModuleType) -> None:
    """By the seed; the order of the icons and other icons do not matter."""
    styles = {"": "Basic", "bold": "Bold", "filled": "Filled"}
    names = [f"{subject}{style}" for subject in ("ox", "fox", "hen", "cat") for style in ("", "-bold", "-filled")]
    found = list(icons.icons_of(icon_set("a", "A", dict.fromkeys(names, DOT), suffixes=styles), Counter()))
    left_out: Counter[str] = Counter()
    chosen = icons.choose(found, 0, left_out)
    assert sorted(icon.subject for icon in chosen) == ["cat", "fox", "hen", "ox"]
    assert sum(left_out.values()) == 8
    assert icons.choose(found[::-1], 0, Counter()) == chosen
    assert {icon.name for icon in icons.choose(found[3:], 0, Counter())} == {icon.name for icon in chosen if icon.subject != "ox"}
    assert any(icons.choose(found, seed, Counter()) != chosen for seed in (1, 2, 3))


def test_a_package_that_is_cut_is_one_line(icons: ModuleType, tmp_path: Path) -> None:
    path = package(tmp_path / "p.tgz", icon_set("one", "A", {"x": DOT}))
    path.write_bytes(path.read_bytes()[:150])
    with pytest.raises(UserError, match=r"p\.tgz is not a whole npm package .*Remove it and run make icons again"):
        list(icons.read_sets(path))


@pytest.mark.parametrize("content", [{"prefix": "a"}, {"prefix": "a", "icons": {}, "info": {"author": "A"}}])
def test_a_file_that_is_no_set_is_one_line(icons: ModuleType, tmp_path: Path, content: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"package/json/a\.json is no set of icons with author and licence"):
        list(icons.read_sets(package(tmp_path / "p.tgz", content)))


def test_a_package_that_is_not_there_is_one_line(
    icons: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["make_images.py", "--package", str(tmp_path / "none.tgz"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        icons.main()
    assert "none.tgz: no such file or folder. Check the path." in capsys.readouterr().err.splitlines()[-1]
