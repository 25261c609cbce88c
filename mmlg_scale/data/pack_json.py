"""COCO caption files and Karpathy's splits -> webdataset shards."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmlg_scale.bounds import MAX_TABLE_BYTES
from mmlg_scale.data import RESTVAL, SPLITS
from mmlg_scale.data.manifest import Progress
from mmlg_scale.data.pack import (
    DEFAULTS,
    Item,
    PackSettings,
    PairCheck,
    digest,
    draw,
    group,
    require_fractions,
    require_possible,
    write_groups,
)
from mmlg_scale.errors import UserError
from mmlg_scale.reading import read_json, shown

KNOWN_COUNTS: dict[tuple[str, str], list[tuple[int, int, int]]] = {
    ("flickr30k", "train"): [(29_000, 1_014, 1_000), (29_783, 1_000, 1_000)],
    ("flickr30k", "drop"): [(29_000, 1_014, 1_000), (29_783, 1_000, 1_000)],
    ("coco", "train"): [(113_287, 5_000, 5_000)],
    ("coco", "drop"): [(82_783, 5_000, 5_000)],
}
"""(dataset, restval) -> images for train, val, test: Karpathy's split first, then others that circulate."""


@dataclass(frozen=True)
class _Entry:
    """An image of a JSON file, before it is looked for."""

    name: str
    captions: list[str]
    split: str | None
    where: str


def pack_json(
    source: Path,
    out: Path,
    settings: PackSettings = DEFAULTS,
    *,
    images: Path,
    restval: str = "train",
    allow_other_counts: bool = False,
    progress: Progress = lambda items: items,
) -> None:
    """Pack a COCO captions file ("images" and "annotations") or a Karpathy file ("images" with "split" and "sentences").

    Image names are relative to `images`. A COCO file has no splits: they are drawn. In a Karpathy file
    `restval` (COCO's validation images that are neither val nor test) goes to train, as in the literature, or is dropped; the counts of
    data sets named coco and flickr30k must be those known of them.

    Raises:
        UserError: neither kind of file; other counts than the known ones, unless `allow_other_counts`; an image without captions; a missing
            or undecodable image, unless they are to be skipped. Each with its entry, and before anything is written.
    """
    if restval not in RESTVAL:
        raise UserError(f"restval {restval!r} is unknown. Use one of: {', '.join(RESTVAL)}.")
    require_possible(out, settings)
    content, check = _load(source), PairCheck(settings.skip_bad)
    if not images.is_dir():
        raise UserError(f"no folder of images {images}. Give the one that image names in {source} are relative to with --images.")
    if "annotations" in content:
        require_fractions(settings)
        entries = _coco_entries(source, content, check)
    else:
        entries = _karpathy_entries(source, content, restval, check)
        _check_counts(source, str(content.get("dataset", "")), entries, restval, allow_other_counts)
    kept = [entry for entry in progress(entries) if check.is_good(images / entry.name, entry.where)]
    items = {entry.name: Item(images / entry.name, entry.captions) for entry in kept}
    split_of = {entry.name: entry.split for entry in kept if entry.split is not None}
    groups = group(items, split_of, settings) if split_of else draw(items, settings)
    args = {"source": digest({"": source, **{name: item.path for name, item in items.items()}}), "restval": restval}
    write_groups(out, groups, args, settings, progress, skipped=check.skipped)


def _load(source: Path) -> dict[str, Any]:
    content = read_json(source, "COCO captions file or Karpathy file", "Download it again.", MAX_TABLE_BYTES)
    if not isinstance(content.get("images"), list) or not content["images"]:
        raise UserError(f"{source} has no list of images. Give a COCO captions file or a Karpathy file.")
    return content


def _coco_entries(source: Path, content: Mapping[str, Any], check: PairCheck) -> list[_Entry]:
    """Images in the order of their list, captions in the order of the annotations."""
    captions: dict[Any, list[str]] = defaultdict(list)
    try:
        for number, annotation in enumerate(content["annotations"]):
            text, own = annotation["caption"].strip(), captions[annotation["image_id"]]
            if check.is_caption(text, f"{source} annotations[{number}]: "):
                own.append(text)
        entries = [
            _Entry(image["file_name"], captions.pop(image["id"], []), None, f"{source} images[{number}]: ")
            for number, image in enumerate(content["images"])
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{source} is not a COCO captions file: {error!r} is missing. Give captions_*.json, not instances_*.json."
        ) from error
    if captions:
        raise UserError(f"{source}: {len(captions)} images have annotations but no entry, such as id {next(iter(captions))}. Add them.")
    return _checked(source, entries, check)


def _karpathy_entries(source: Path, content: Mapping[str, Any], restval: str, check: PairCheck) -> list[_Entry]:
    entries = []
    for number, image in enumerate(content["images"]):
        try:
            name = "/".join(part for part in (image.get("filepath", ""), image["filename"]) if part)
            split, captions = image["split"], [sentence["raw"].strip() for sentence in image["sentences"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{source} images[{number}] is not an entry of a Karpathy file: {error!r} is missing. Correct it.") from error
        if split == "restval":
            if restval == "drop":
                continue
            split = "train"
        if split not in SPLITS:
            raise UserError(f"{source} images[{number}]: split {split!r} is not one of {', '.join(SPLITS)}, restval. Correct it.")
        where = f"{source} images[{number}]: "
        entries.append(_Entry(name, [text for text in captions if check.is_caption(text, where)], split, where))
    return _checked(source, entries, check)


def _checked(source: Path, entries: list[_Entry], check: PairCheck) -> list[_Entry]:
    """The entries, each with captions and none twice."""
    kept = []
    for entry in entries:
        if not isinstance(entry.name, str):
            raise UserError(f"{entry.where}its file name is {shown(entry.name)}, not a text. Correct it.")
        if entry.captions:
            kept.append(entry)
        else:
            check.leave_out(f"{entry.where}{entry.name} has no captions. Add one, or remove the image.", "images")
    twice = [name for name, count in Counter(entry.name for entry in entries).items() if count > 1]
    if twice:
        raise UserError(f"{source}: {twice[0]} appears twice. Keep one entry per image.")
    return kept


def _check_counts(source: Path, dataset: str, entries: list[_Entry], restval: str, allow_other: bool) -> None:
    """Compare the images per split with what is known of the data set of this name; a name that is not known passes."""
    counted = Counter(entry.split for entry in entries)
    counts = tuple(counted[split] for split in SPLITS)
    known = KNOWN_COUNTS.get((dataset, restval), [])
    if not known or counts == known[0]:
        return
    told = " / ".join(f"{count:,}" for count in counts)
    wanted = " / ".join(f"{count:,}" for count in known[0])
    if counts in known:
        print(f"{source}: {dataset} in the split {told}; Karpathy's, which most results are on, is {wanted}.")
    elif allow_other:
        print(f"{source}: {dataset} with {told} images for train / val / test instead of {wanted}: not comparable with published results.")
    else:
        raise UserError(
            f"{source}: {dataset} should have {wanted} images for train / val / test, this file has {told}. "
            "Get the whole file, or pass --allow-other-counts."
        )
