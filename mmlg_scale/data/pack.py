"""A user's images and captions -> webdataset shards: a CSV/TSV table, or a folder per class (`pack_json.py`: COCO and Karpathy JSON).

Every image is decoded before anything is written, because one that is cut looks whole until then.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mmlg_scale.bounds import MAX_CAPTION, MAX_IMAGE_BYTES, MAX_TABLE_BYTES
from mmlg_scale.data import SPLITS
from mmlg_scale.data.images import as_shown, check_decodes, decode
from mmlg_scale.data.manifest import Progress
from mmlg_scale.data.publish import Sample, new_dataset, require_target, write_split
from mmlg_scale.data.tokens import NONE, read_offer
from mmlg_scale.digests import file_digest
from mmlg_scale.errors import UserError
from mmlg_scale.files import write_json_atomic
from mmlg_scale.reading import one_line, read_bytes, read_text, shown
from mmlg_scale.records import write_record

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SAMPLES_PER_SHARD = 2000
MAX_PATH = 4096
"""PATH_MAX of Linux."""


@dataclass(frozen=True)
class PackSettings:
    """How a data set is packed, whatever its source.

    Attributes:
        val, test: fractions of the images that are drawn for these splits where the source has none of its own.
        seed: of that draw.
        tokenizer: what the set offers to models trained from scratch: none, words (of the training captions), bpe (byte pairs), or the path
            of a model folder or a tokenizer.json.
        resize: pixels of the shorter side to which images are resized, with a centre crop; None: they are packed as they are.
        as_shown: pack an image that viewers show otherwise than it is stored (on its side, transparent, 16 bits, a palette) as a PNG of
            what they show, and say how many these are; otherwise the bytes of every image are packed as they are. Both are read alike.
        skip_bad: leave out images that are missing or do not decode, and captions that are empty, too long or no Unicode, and list them in
            OUT/skipped.json; otherwise they are errors.
    """

    val: float = 0.05
    test: float = 0.1
    seed: int = 0
    tokenizer: str = NONE
    resize: int | None = None
    skip_bad: bool = False
    as_shown: bool = True


DEFAULTS = PackSettings()


@dataclass(frozen=True)
class Item:
    """An image on disk with its captions."""

    path: Path
    captions: list[str]
    label: int | None = None


class PairCheck:
    """Checks images and captions before they are packed; what is bad is an error, or with `skip_bad` left out and listed.

    Attributes:
        skipped: what was said of each image and caption that is left out.
    """

    def __init__(self, skip_bad: bool) -> None:
        self.skip_bad, self.skipped = skip_bad, list[str]()

    def is_good(self, path: Path, where: str = "") -> bool:
        """Whether the image decodes; `where` (file and row) starts the message.

        Raises:
            UserError: it does not, and is not to be skipped.
        """
        try:
            _check_image(path, where)
        except UserError as error:
            self.leave_out(str(error), "images")
            return False
        return True

    def is_caption(self, text: str, where: str) -> bool:
        """Whether a caption has a text, of Unicode, and no more of it than is supported; as `is_good`."""
        if not text:
            self.leave_out(f"{where}empty caption. Give one, or remove it.", "captions")
        elif len(text) > MAX_CAPTION:
            self.leave_out(f"{where}a caption of {len(text)} characters; at most {MAX_CAPTION} are supported. Shorten it.", "captions")
        elif any("\ud800" <= letter <= "\udfff" for letter in text):
            self.leave_out(f"{where}a caption is not valid Unicode: {shown(text)!r}. Correct it.", "captions")
        else:
            return True
        return False

    def leave_out(self, problem: str, what: str) -> None:
        """List what is bad. Raises UserError where it is not to be skipped."""
        if not self.skip_bad:
            raise UserError(f"{problem} Or leave such {what} out with --skip-bad.")
        self.skipped.append(problem)


def pack_table(
    table: Path,
    out: Path,
    settings: PackSettings = DEFAULTS,
    *,
    image_column: str = "filepath",
    caption_column: str = "caption",
    progress: Progress = lambda items: items,
) -> None:
    """Pack a table whose rows are (image path, caption); rows of one image are its captions.

    Image paths are relative to the table's folder. A column `split` (train, val, test) is obeyed where it is there. Rows are counted as
    lines of the file, the header being the first; a caption in quotes that runs over lines counts where it ends.

    Raises:
        UserError: no such table or column, a row with other fields than the header, without path or without caption, a quote that swallows
            rows, a missing or undecodable image, an image in two splits. Each with its row, and before anything is written.
    """
    if not table.is_file():
        raise UserError(f"no table {table}. Give a CSV or TSV file, or a folder with one folder of images per class.")
    require_possible(out, settings)
    check = PairCheck(settings.skip_bad)
    captions, split_of, row_of = _captions(table, (image_column, caption_column), check)
    if not split_of:
        require_fractions(settings)
    items = {
        name: Item(table.parent / name, texts)
        for name, texts in progress(list(captions.items()))
        if check.is_good(table.parent / name, f"{table} row {row_of[name]}: ")
    }
    if not items:
        told = (
            f": all {len(check.skipped)} are bad. First: {check.skipped[0]}" if check.skipped else ". Give one row per image and caption."
        )
        raise UserError(f"{table} has no rows{told}")
    groups = group(items, split_of, settings) if split_of else draw(items, settings)
    source = digest({"": table, **{name: item.path for name, item in items.items()}})
    write_groups(out, groups, {"source": source}, settings, progress, skipped=check.skipped)


def _captions(table: Path, columns: tuple[str, str], check: PairCheck) -> tuple[dict[str, list[str]], dict[str, str], dict[str, int]]:
    """Of each image of a table its captions, its split where the table has them, and its first row."""
    captions: dict[str, list[str]] = defaultdict(list)
    split_of, row_of = dict[str, str](), dict[str, int]()
    for number, row in _rows(table, columns):
        name, caption = (row[column].strip() for column in columns)
        if len(name) > MAX_PATH:
            check.leave_out(f"{table} row {number}: {columns[0]} has {len(name)} characters, more than any path.", "rows")
            continue
        if not name:
            raise UserError(f"{table} row {number}: empty {columns[0]}. Give the image's path, or remove the row.")
        name = os.path.normpath(name)  # a.png and ./a.png are one image, which must not land in two splits
        if not check.is_caption(caption, f"{table} row {number}: "):
            continue
        captions[name].append(caption)
        row_of.setdefault(name, number)
        if row.get("split"):
            if row["split"] not in SPLITS:
                raise UserError(f"{table} row {number}: split {row['split']!r} is not one of {', '.join(SPLITS)}. Correct it.")
            if split_of.setdefault(name, row["split"]) != row["split"]:
                raise UserError(f"{table} row {number}: {name} is in split {split_of[name]} and in {row['split']}. Keep it in one.")
    if split_of and len(split_of) < len(captions):
        without = len(captions) - len(split_of)
        raise UserError(f"{table}: some images have a split and {without} have none. Fill the column, or leave it out.")
    return captions, split_of, row_of


def _rows(table: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, row) of a CSV or TSV file with a header."""
    text = read_text(table, "table", "Save it as UTF-8.", MAX_TABLE_BYTES).removeprefix("\ufeff")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    delimiter = "\t" if table.suffix.lower() in (".tsv", ".tab") or "\t" in text.partition("\n")[0] else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    last, limit = 0, csv.field_size_limit(len(text) + 1)  # a long field is a bad row, not the end of the table
    try:
        names = next(reader, [])
        if not names:
            raise UserError(f"{table} is empty. Give a table whose first line names its columns, as filepath and caption.")
        for column in columns:
            if column not in names:
                hint = (
                    "Separate its columns by commas or tabs"
                    if len(names) == 1 and ";" in names[0]
                    else "Use --image-column and --caption-column"
                )
                raise UserError(f"{table} has no column {column!r}; it has: {', '.join(names)}. {hint}.")
        twice = next((name for name in columns if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{table} has the column {twice!r} {names.count(twice)} times. Rename or remove the others.")
        last = reader.line_num
        for fields in reader:
            first, last = last + 1, reader.line_num
            if not fields:
                continue
            if len(fields) > len(names):
                raise UserError(
                    f"{table} row {last}: {len(fields)} fields, the header has {len(names)}. "
                    f"Put a caption with {'tabs' if delimiter != ',' else 'commas'} in quotes."
                )
            swallowed = _swallowed(fields, delimiter, len(names), names.index(columns[0]))
            if swallowed is not None:
                raise UserError(
                    f"{table} rows {first} to {last}: a quote is open over the row of {swallowed}. "
                    f'Close it, or write a quote at the start of a caption as three (""") with one at its end.'
                )
            yield last, dict(zip(names, fields + [""] * (len(names) - len(fields)), strict=True))
    except csv.Error as error:
        raise UserError(
            f"{table} row {last + 1}: the quotes are wrong, read up to line {reader.line_num} ({error}). "
            "A field that begins with a quote ends with one, and quotes inside it are doubled."
        ) from error
    finally:
        csv.field_size_limit(limit)


def _swallowed(fields: Sequence[str], delimiter: str, num_columns: int, image_column: int) -> str | None:
    """The image of a line inside a field that looks like a row of its own: an open quote has taken it in."""
    for field in fields:
        for line in field.splitlines()[1:]:
            parts = line.split(delimiter)
            if len(parts) >= num_columns and parts[image_column].strip().lower().endswith(EXTENSIONS):
                return parts[image_column].strip()
    return None


def pack_folders(
    folder: Path,
    out: Path,
    settings: PackSettings = DEFAULTS,
    *,
    templates: Sequence[str],
    progress: Progress = lambda items: items,
) -> None:
    """Pack a folder that holds one folder of images per class; captions are the templates with `{}` replaced by the folder's name.

    Where `folder` holds train/, val/ and test/ with class folders inside, those splits are obeyed. Files of other kinds and folders inside
    class folders are left out and listed in OUT/skipped.json.

    Raises:
        UserError: no such folder, only some of train/, val/ and test/, no class folders, a class without images, a template without `{}`,
            an undecodable image; before anything is written.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}. Give one with a folder of images per class.")
    if not templates:
        raise UserError("no caption templates. Give at least one, such as 'a photo of {}.'.")
    for template in templates:
        if "{}" not in template:
            raise UserError(f"caption template {template!r} has no {{}} for the class name. Add it.")
    require_possible(out, settings)
    # A folder of images that is called train is a class (the vehicle); one of folders is a split.
    missing = [split for split in SPLITS if not any(path.is_dir() for path in (folder / split).glob("*"))]
    if 0 < len(missing) < len(SPLITS):
        raise UserError(f"{folder} has folders of some splits, but none named {' or '.join(missing)}. Add it, or take the others apart.")
    own_splits = not missing
    roots = {split: folder / split for split in SPLITS} if own_splits else {"": folder}
    names = sorted({path.name for root in roots.values() for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")})
    if len(names) < 2:
        raise UserError(f"{folder} has {len(names)} class folders. Give a folder with one folder of images per class.")
    _require_distinct(folder, names)
    if not own_splits:
        require_fractions(settings)
    items, split_of, check = {}, {}, PairCheck(settings.skip_bad)
    for split, root in roots.items():
        for label, name in enumerate(names):
            inside = sorted(path for path in (root / name).glob("*") if not path.name.startswith("."))
            paths = [path for path in inside if path.suffix.lower() in EXTENSIONS and not path.is_dir()]
            check.skipped += [_left_out(path) for path in inside if path not in set(paths)]
            if not paths:
                raise UserError(f"{root / name} has no images ({', '.join(EXTENSIONS)}). Add some, or remove the class.")
            for path in paths:
                if not check.is_good(path):
                    continue
                key = str(path.relative_to(folder))
                items[key] = Item(path, [template.replace("{}", _class_name(name)) for template in templates], label)
                split_of[key] = split
    groups = group(items, split_of, settings) if own_splits else draw(items, settings)
    classes = {"classnames": [_class_name(name) for name in names], "templates": list(templates)}
    args = {"source": digest({key: item.path for key, item in items.items()}), **classes}
    write_groups(out, groups, args, settings, progress, classes, skipped=check.skipped)


def _class_name(folder: str) -> str:
    return folder.replace("_", " ")


def _require_distinct(folder: Path, names: Sequence[str]) -> None:
    """Raise UserError where two folders give the same class to a text tower: byte pairs see neither case nor the number of spaces."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(" ".join(_class_name(name).casefold().split()), name)
        if other != name:
            told = f"the folders {shown(other)!r} and {shown(name)!r} are one class to a tokenizer"
            raise UserError(f"{folder}: {told}. Put their images together, or rename one.")


def _left_out(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder inside the folder of a class. Move its images there."
    return f"{path} does not end in {', '.join(EXTENSIONS)}. Convert it."


def _check_image(path: Path, where: str) -> None:
    try:
        is_there = path.is_file()
    except OSError:  # a name that no file can have
        is_there = False
    if not is_there:
        raise UserError(f"{where}no image {path}. Correct the path (it is relative to the table's folder), or remove the row.")
    if path.suffix.lower() not in EXTENSIONS:
        raise UserError(f"{where}{path} does not end in {', '.join(EXTENSIONS)}. Convert it, or remove it.")
    try:
        check_decodes(read_image(path))
    except Exception as error:  # of damaged bytes PIL's plugins raise nearly anything
        raise UserError(f"{where}{path} cannot be read as an image ({one_line(error)}). Replace it, or remove it.") from error


def read_image(path: Path) -> bytes:
    """The bytes of an image file. Raises UserError where it is no regular file, or larger than any image."""
    return read_bytes(path, "image", "Replace it.", MAX_IMAGE_BYTES)


def digest(files: Mapping[str, Path]) -> str:
    """SHA-256 of the files' names and contents: what tells one source from another."""
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(f"{name}\0{file_digest(path, 'source')}\n".encode())
    return digest.hexdigest()


def group(items: Mapping[str, Item], split_of: Mapping[str, str], settings: PackSettings) -> dict[str, list[Item]]:
    """The items of each split that the source has; says so where others were asked for."""
    if (settings.val, settings.test, settings.seed) != (DEFAULTS.val, DEFAULTS.test, DEFAULTS.seed):
        print("the source has its own splits: --val, --test and --seed are not used")
    groups: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for name, item in items.items():
        groups[split_of[name]].append(item)
    return groups


def require_possible(out: Path, settings: PackSettings) -> None:
    """Raise UserError where nothing can be written to `out`, or there is no such tokenizer: before images are decoded for hours."""
    require_target(out)
    read_offer(settings.tokenizer)


def require_fractions(settings: PackSettings) -> None:
    """Raise UserError where no split can be drawn by these fractions."""
    fractions = settings.val, settings.test
    if min(fractions) <= 0 or sum(fractions) >= 1:
        raise UserError(f"the fractions of val and test are {settings.val} and {settings.test}. Use positive ones with a sum below 1.")


def draw(items: Mapping[str, Item], settings: PackSettings) -> dict[str, list[Item]]:
    """A random split with at least one image in each part."""
    require_fractions(settings)
    fractions = {"val": settings.val, "test": settings.test}
    order = np.random.default_rng(settings.seed).permutation(len(items))
    listed = list(items.values())
    counts = {split: max(1, round(fractions[split] * len(listed))) for split in ("val", "test")}
    if sum(counts.values()) >= len(listed):
        raise UserError(f"{len(listed)} images are too few for three splits. Give more, or a column named split.")
    edges = np.cumsum([counts["val"], counts["test"]])
    parts = dict(zip(("val", "test", "train"), np.split(order, edges), strict=True))
    # Training keeps the drawn order, so that a class per folder is not a class per shard.
    return {split: [listed[index] for index in parts[split]] for split in SPLITS}


def write_groups(
    out: Path,
    groups: Mapping[str, list[Item]],
    args: Mapping[str, object],
    settings: PackSettings,
    progress: Progress,
    classes: Mapping[str, object] | None = None,
    skipped: Sequence[str] = (),
) -> None:
    """Write the groups of each split as a data set at `out`, and say what was left out.

    Args:
        args: what else the set is a function of, for dataset.json.

    Raises:
        UserError: an unknown tokenizer, a split without images, or what `new_dataset` raises.
    """
    offer, converted = read_offer(settings.tokenizer), Counter[str]()
    for split, items in groups.items():
        if not items:
            raise UserError(f"split {split} has no images. Every data set needs train, val and test.")
    drawn = {"seed": settings.seed, "shares": {"val": settings.val, "test": settings.test}}
    kept = {} if settings.as_shown else {"as_shown": False}  # sets of earlier versions have no such key
    with new_dataset(out, "packed", {**args, **drawn, **kept, "tokenizer": offer.name, "resize": settings.resize}) as root:
        if root is None:
            return
        for split, items in groups.items():
            samples = (_sample(position, item, settings, converted) for position, item in enumerate(progress(items)))
            write_split(root, split, samples, samples_per_shard=SAMPLES_PER_SHARD)
        offer.write(root, lambda: (text for item in groups["train"] for text in item.captions))
        if classes is not None:
            write_record(root / "classes.json", classes)
        if skipped:
            write_json_atomic(root / "skipped.json", list(skipped))
    if skipped:
        print(f"left out {len(skipped)} files, folders and captions, listed in {out / 'skipped.json'}. First: {skipped[0]}")
    if converted:
        told = ", ".join(f"{what} {count}" for what, count in sorted(converted.items()))
        print(f"images packed as viewers show them, not as they are stored: {told}")


def _sample(position: int, item: Item, settings: PackSettings, converted: Counter[str]) -> Sample:
    """The sample, and in `converted` what was done to its image."""
    payload, extension = read_image(item.path), item.path.suffix.lower().removeprefix(".")
    shown = as_shown(payload) if settings.as_shown else None
    if shown is not None:
        payload, extension = shown[0], "png"
        converted.update(shown[1])
    if settings.resize is not None:
        buffer = io.BytesIO()
        Image.fromarray(decode(payload, settings.resize)).save(buffer, "PNG")
        payload, extension = buffer.getvalue(), "png"
    return Sample(f"{position:08d}", payload, extension, item.captions, item.label)
