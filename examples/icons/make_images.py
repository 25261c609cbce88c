"""Render icons out of the npm package @iconify/json as PNG files, and write the table of their designers' names for `mmlg data pack`.

Images lie in OUT/SET/NAME.png. OUT/pairs.csv, which is written last, has the columns filepath, caption and split.

    npm pack @iconify/json@2.2.535 --pack-destination runs/icons-package
    python examples/icons/make_images.py --package runs/icons-package/iconify-json-2.2.535.tgz --out runs/icons-images
    mmlg data pack runs/icons-images/pairs.csv --out runs/icons-data --tokenizer words
    mmlg family icons --data.path runs/icons-data --out runs/icons

Every random choice is a hash of the seed and the icon's name, so it depends neither on the order of the icons nor on other icons.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from resvg_py import svg_to_bytes

from mmlg_scale.cli.parsing import progress
from mmlg_scale.data import SPLITS
from mmlg_scale.data.manifest import Progress
from mmlg_scale.errors import UserError, in_words
from mmlg_scale.files import write_text_atomic
from mmlg_scale.reading import one_line, shown

SIDE = 32
"""Pixels."""
LICENCES = (
    "Apache-2.0", "BSD-3-Clause", "CC-BY-3.0", "CC-BY-4.0", "CC0-1.0", "ISC", "MIT", "MPL-2.0", "OFL-1.1", "Unlicense",
)  # fmt: skip
"""SPDX identifiers of the licences whose sets are used: none that asks for the same licence or forbids commerce."""
LEFT_OUT = ("Flags / Maps", "Logos", "Programming")
"""Categories whose names say who owns a mark or which country it is, not what is drawn."""
JOINED_NAMES = ("fxemoji",)
"""Sets whose names are words without separators (housebuilding)."""
HELD_OUT = {"test": ("Phosphor Icons", "Marketeq"), "val": ("The Bootstrap Authors", "MageIcons")}
"""Designers all of whose sets are held out."""
COLOURS = ("black", "crimson", "darkorange", "forestgreen", "royalblue", "purple", "saddlebrown", "teal")
"""What currentColor is drawn in. Captions do not say which."""
STYLES = ("duotone", "fill", "filled", "outline", "outlined", "rounded", "sharp", "solid", "twotone")
"""Last words that are a style in sets that do not list theirs, where the icon is also there without it."""
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
SIZE = re.compile(r"[0-9]+(px)?")
SKIN = re.compile(r"(-(medium-)?(light|medium|dark)-skin-tone)+")
REFERENCE = re.compile(r"href\s*=\s*[\"']#", re.IGNORECASE)
MOVING = re.compile(r"<(animate|set\b)")
MAX_BODY = 100_000
"""Characters of an icon's SVG."""
MAX_MEMBER = 200 * 2**20
"""Bytes of a file in the package; the largest has 104 MB."""


@dataclass(frozen=True)
class Icon:
    """An icon of the package.

    Attributes:
        prefix, name: of the set, and of the icon in it.
        designer: the set's author.
        subject: the name without style, size and skin tone, as words.
        caption: what the image is paired with.
        body: the inside of its SVG.
        box: the SVG's viewBox: left, top, width, height.
    """

    prefix: str
    name: str
    designer: str
    subject: str
    caption: str
    body: str
    box: tuple[float, float, float, float]

    def draw(self, seed: int, purpose: str) -> int:
        """A number of 64 bits, drawn for this icon and purpose."""
        return int.from_bytes(hashlib.sha256(f"{seed} {purpose} {self.prefix}:{self.name}".encode()).digest()[:8], "big")


@dataclass(frozen=True)
class Pair:
    """An image and its caption."""

    icon: Icon
    split: str
    image: Image.Image


def read_sets(package: Path, progress: Progress = lambda items: items) -> Iterator[dict[str, Any]]:
    """The JSON of each set in the package, one at a time, in the package's order. Nothing is unpacked onto the disk.

    Raises:
        UserError: the file cannot be read as what `npm pack` writes.
    """
    hint = "Remove it and run make icons again."
    try:
        with tarfile.open(package, "r|gz") as archive:
            for member in progress(archive):
                if member.isfile() and re.fullmatch(r"package/json/[a-z0-9-]+\.json", member.name):
                    if member.size > MAX_MEMBER:
                        raise UserError(f"{package}: {member.name} has {member.size} bytes; at most {MAX_MEMBER} are read. {hint}")
                    content = archive.extractfile(member)
                    assert content is not None
                    yield _checked(json.load(content), f"{package}: {member.name}")
    except (tarfile.TarError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{package} is not a whole npm package ({one_line(error)}). {hint}") from error


def _checked(content: Any, where: str) -> dict[str, Any]:
    """A set's JSON that says who drew it under which licence. Raises UserError where it is something else."""
    info = content.get("info") if isinstance(content, dict) else None
    known = isinstance(info, dict) and all(isinstance(info.get(key), dict) for key in ("author", "license"))
    if not (known and isinstance(content.get("prefix"), str) and isinstance(content.get("icons"), dict)):
        raise UserError(f"{where} is no set of icons with author and licence. Give the package @iconify/json as npm pack writes it.")
    return content


def refusal(content: Mapping[str, Any]) -> str | None:
    """Why a set (its JSON) is not used; None where it is."""
    info = content["info"]
    if info["license"].get("spdx") not in LICENCES:
        return "sets under other licences"
    if info.get("hidden"):
        return "sets that the package hides: superseded"
    if content["prefix"] in JOINED_NAMES:
        return "sets whose names are words without separators"
    return f"sets of the category {info['category']}" if info.get("category") in LEFT_OUT else None


def icons_of(content: Mapping[str, Any], left_out: Counter[str]) -> Iterator[Icon]:
    """The icons of a set that may be rendered; what is refused is counted in `left_out` by its reason.

    resvg reads local files that an image refers to. So a body may refer to nothing but its own parts (href="#...").
    """
    prefix, info, icons = content["prefix"], content["info"], content["icons"]
    for name, icon in icons.items():
        body = icon["body"]
        box = tuple(icon.get(key, content.get(key, default)) for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16)))
        if icon.get("hidden"):
            left_out["hidden icons: superseded"] += 1
        elif not (NAME.fullmatch(prefix) and NAME.fullmatch(name)):
            left_out["names that are not lower-case words"] += 1
        elif not all(isinstance(number, (int, float)) for number in box) or min(box[2:]) <= 0:
            left_out["no proper view box"] += 1
        elif len(body) > MAX_BODY:
            left_out[f"SVG of more than {MAX_BODY:,} characters"] += 1
        elif len(REFERENCE.findall(body)) < body.lower().count("href"):
            left_out["SVG that refers to something outside itself"] += 1
        elif MOVING.search(body):
            left_out["animations"] += 1
        else:
            plain, style = split_name(name, content, icons)
            style = [*style, *["colour"] * bool(info.get("palette"))]
            caption = ", ".join(filter(None, (plain.replace("-", " "), " ".join(style))))
            subject = SKIN.sub("", plain).replace("-", " ")
            yield Icon(prefix, name, info["author"]["name"], subject, caption, body, box)


def split_name(name: str, content: Mapping[str, Any], names: Container[str]) -> tuple[str, list[str]]:
    """(name without style, words of the style) of an icon; sizes, which sets list as styles too, are left out of both.

    Args:
        content: the set's JSON, whose `prefixes` and `suffixes` list its styles.
        names: of all icons in the set.
    """
    style: list[str] = []
    for prefix in sorted(filter(None, content.get("prefixes") or ()), key=len, reverse=True):
        if name.startswith(f"{prefix}-"):
            name, style = name.removeprefix(f"{prefix}-"), prefix.split("-")
            break
    listed = [suffix for suffix in content.get("suffixes") or () if suffix]
    for suffix in sorted(listed or STYLES, key=len, reverse=True):
        rest = name.removesuffix(f"-{suffix}")
        if rest != name and (listed or rest in names):
            name, style = rest, style + suffix.split("-")
            break
    return name, [word for word in style if not SIZE.fullmatch(word)]


def choose(icons: Iterable[Icon], seed: int, left_out: Counter[str]) -> list[Icon]:
    """One icon, drawn, for each designer and subject, in drawn order: sets of many styles would outweigh all others."""
    best: dict[tuple[str, str], tuple[int, Icon]] = {}
    for icon in icons:
        drawn, key = icon.draw(seed, "choice"), (icon.designer, icon.subject)
        left_out["other styles, sizes and skin tones of a designer's subject"] += key in best
        if key not in best or drawn < best[key][0]:
            best[key] = drawn, icon
    return [icon for _, icon in sorted(best.values(), key=lambda found: (found[0], found[1].prefix, found[1].name))]


def render(icon: Icon, colour: str) -> Image.Image | None:
    """The icon on white, [SIDE, SIDE] RGB, `currentColor` being `colour`; None where resvg cannot read it."""
    left, top, width, height = icon.box
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{SIDE}" height="{SIDE}" '
        f'viewBox="{left} {top} {width} {height}" color="{colour}">{icon.body}</svg>'
    )
    try:
        png = svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, background="white", skip_system_fonts=True)
    except ValueError:
        return None
    return Image.open(io.BytesIO(png), formats=("PNG",)).convert("RGB")


def make_pairs(icons: Sequence[Icon], seed: int, left_out: Counter[str], progress: Progress = lambda items: items) -> Iterator[Pair]:
    """Pairs in which no picture is there twice and, in val and test, no caption; test first, then val, then train.

    Pictures are compared as drawn in black, so that a shape counts as the same whatever its colour. So a picture that is held out is never
    trained on.
    """
    split_of = {designer: split for split, designers in HELD_OUT.items() for designer in designers}
    order = sorted(icons, key=lambda icon: ("test", "val", "train").index(split_of.get(icon.designer, "train")))  # stable
    seen: dict[bytes, str] = {}
    captions = {"test": set[str](), "val": set[str]()}
    for icon in progress(order):
        split = split_of.get(icon.designer, "train")
        if icon.caption in captions.get(split, ()):
            left_out[f"{split}: caption there already"] += 1
            continue
        black = render(icon, "black")
        if black is None or all(low == high for low, high in black.getextrema()):
            left_out["pictures that are one flat colour, or cannot be rendered"] += 1
            continue
        pixels = hashlib.sha256(black.tobytes()).digest()
        if pixels in seen:
            left_out[f"{split}: picture identical to one in {seen[pixels]}"] += 1
            continue
        seen[pixels] = split
        if split in captions:
            captions[split].add(icon.caption)
        image = render(icon, COLOURS[icon.draw(seed, "colour") % len(COLOURS)]) if "currentColor" in icon.body else black
        assert image is not None
        yield Pair(icon, split, image)


def save(pairs: Iterable[Pair], out: Path) -> list[tuple[str, str, str]]:
    """Write the images; returns the rows of the table: path relative to `out`, caption, split."""
    rows = []
    for pair in pairs:
        name = f"{pair.icon.prefix}/{pair.icon.name}.png"
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        pair.image.save(out / name)
        rows.append((name, pair.icon.caption, pair.split))
    return rows


def sources(sets: Mapping[str, Mapping[str, Any]], counts: Mapping[tuple[str, str], int], left_out: Mapping[str, int], package: str) -> str:
    """The page that names what the pairs were made of, and counts what was left out.

    Args:
        sets: prefix -> what the set says about itself, of all sets that are used.
        counts: (prefix, split) -> pairs.
        package: the file that was read.
    """
    told = _totals(counts)
    lines = [
        "# Sources of the icons",
        "",
        f"Written by `make_images.py` from what `{package}` says about its sets; not edited by hand. {told} pairs for train / val / test.",
        "",
        "| set | name | author | licence | icons in the set | pairs used | split |",
        "|---|---|---|---|---|---|---|",
    ]
    for (prefix, split), count in sorted(counts.items()):
        info = sets[prefix]
        author, licence = info["author"], info["license"]
        cells = (prefix, _cell(info["name"]), _link(author["name"], author.get("url")), _link(licence["spdx"], licence.get("url")))
        lines.append(f"| {' | '.join(cells)} | {info['total']:,} | {count:,} | {split} |")
    lines += ["", "What the pairs do not hold:", "", "| left out | icons |", "|---|---|"]
    lines += [f"| {_cell(reason)} | {count:,} |" for reason, count in sorted(left_out.items()) if count]
    return "\n".join(lines) + "\n"


def _totals(counts: Mapping[tuple[str, str], int]) -> str:
    return " / ".join(f"{sum(count for (_, where), count in counts.items() if where == split):,}" for split in SPLITS)


def _cell(text: str) -> str:
    return re.sub(r"([\\|\[\]<>`*_])", r"\\\1", shown(text))


def _link(text: str, url: str | None) -> str:
    return f"[{_cell(text)}]({url})" if url and re.fullmatch(r"https?://[\w.~:/?#@!$&'*+,;=%-]+", url) else _cell(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True, help="what npm pack wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--sources", type=Path, default=None, help="file to write the sources and licences to; default: OUT/SOURCES.md")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of icons and of colours; default: 0")
    args = parser.parse_args()
    try:
        make(args.package, args.out, args.sources or args.out / "SOURCES.md", args.seed)
    except (UserError, OSError) as error:
        parser.error(in_words(error) or str(error))


def make(package: Path, out: Path, sources_file: Path, seed: int) -> None:
    """Everything: package -> images, pairs.csv and the page of sources; the console is told the counts."""
    left_out: Counter[str] = Counter()
    sets: dict[str, Mapping[str, Any]] = {}

    def usable() -> Iterator[Icon]:
        for content in read_sets(package, progress("read")):
            reason = refusal(content)
            if reason is None:
                sets[content["prefix"]] = content["info"]
                yield from icons_of(content, left_out)
            else:
                left_out[reason] += len(content["icons"])

    chosen = choose(usable(), seed, left_out)
    rows = save(make_pairs(chosen, seed, left_out, progress("render")), out)
    counts = Counter((name.partition("/")[0], split) for name, _, split in rows)
    write_text_atomic(sources_file, sources(sets, counts, left_out, package.name))
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("filepath", "caption", "split"), *rows])
    write_text_atomic(out / "pairs.csv", table.getvalue())
    for reason, count in sorted(left_out.items()):
        print(f"left out {count:7,}  {reason}")
    print(f"{_totals(counts)} pairs for {' / '.join(SPLITS)} of {len(sets)} sets in {out}; their sources are in {sources_file}")


if __name__ == "__main__":
    main()
