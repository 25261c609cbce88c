"""The classes of a data set: its own classes.json, and the lists beside shards of others, as CLIP_benchmark writes its webdataset sets.

Of the latter ROOT/classnames.txt has a class a line, in the order of the numbers in the samples' .cls, and
ROOT/zeroshot_classification_templates.txt a caption template a line, in which {c} stands for the class.
"""

from __future__ import annotations

from pathlib import Path

from mmlg_scale.bounds import MAX_CAPTION, MAX_JSON_BYTES
from mmlg_scale.errors import UserError
from mmlg_scale.reading import read_text, shown
from mmlg_scale.records import read_record

Classes = dict[str, list[str]]
"""`classnames`, and caption `templates` with {} for the class."""
CLASSES_FILE = "classes.json"
CLASSNAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
DEFAULT_TEMPLATES = ["a photo of a {}."]
"""Where there is no file of templates."""


def load_classes(file: Path) -> Classes | None:
    """The classes of a set, None where it has none. Raises UserError where the file is damaged."""
    if not file.is_file():
        return None
    content = read_record(file, "list of classes", "Correct it, or remove it to leave classification out.")
    for key in ("classnames", "templates"):
        listed = content.get(key)
        if not isinstance(listed, list) or not listed or not all(isinstance(text, str) and text.strip() for text in listed):
            raise UserError(f"{file}: {key} is {_short(listed)}. Give a list of texts, none of them empty.")
        longest = max(map(len, listed))
        if longest > MAX_CAPTION:
            raise UserError(f"{file}: {key} has a text of {longest} characters; {MAX_CAPTION} are supported. Shorten it.")
    for template in content["templates"]:
        if "{}" not in template:
            raise UserError(f"{file}: the template {template!r} has no {{}} for the class name. Add it.")
    return {key: content[key] for key in ("classnames", "templates")}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def listed_classes(root: Path) -> Classes | None:
    """What classes.json is to hold by the lists in ROOT; None where there are none.

    Raises:
        UserError: an empty line among the classes, a template without a place for the class, a classes.json that says something else.
    """
    file = root / CLASSNAMES
    if not file.is_file():
        return None
    templates = _lines(root / TEMPLATES) if (root / TEMPLATES).is_file() else DEFAULT_TEMPLATES
    for number, template in enumerate(templates, 1):
        if "{c}" not in template and "{}" not in template:
            raise UserError(f"{root / TEMPLATES} line {number}: {shown(template)!r} has no {{c}} for the class name. Add it.")
    classes = {"classnames": _lines(file), "templates": [template.replace("{c}", "{}") for template in templates]}
    if load_classes(root / CLASSES_FILE) not in (None, classes):
        raise UserError(f"{root / CLASSES_FILE} says something else than {CLASSNAMES} and {TEMPLATES}. Remove what is wrong.")
    return classes


def repeated_classes(root: Path) -> list[str]:
    """Names of classes that are one to a tokenizer of byte pairs, which sees neither case nor the number of spaces: the second of each."""
    seen, repeated = set[str](), list[str]()
    for name in (load_classes(root / CLASSES_FILE) or {}).get("classnames", []):
        plain = " ".join(name.casefold().split())
        if plain in seen:
            repeated.append(name)
        seen.add(plain)
    return repeated


def _lines(file: Path) -> list[str]:
    lines = [line.strip() for line in read_text(file, "list", "Save it as UTF-8.", MAX_JSON_BYTES).rstrip().split("\n")]
    if "" in lines:  # left out, it would give the classes behind it other numbers
        raise UserError(f"{file} line {lines.index('') + 1} is empty. Give it a text, or remove it where no number is meant to have it.")
    longest = max(map(len, lines))
    if longest > MAX_CAPTION:
        raise UserError(f"{file} has a line of {longest} characters; {MAX_CAPTION} are supported. Shorten it.")
    return lines
