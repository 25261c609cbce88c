"""A remote data set's small files, copied to this machine: what says what the set is, and where its samples lie.

The copy is a folder laid out like the set, but without shards and their indexes, which come through the store when they are read. So
whatever reads manifests, tokenizers and records of checks need not know where a set is. The folder is named by the content of the files:
when the set changes, runs that have opened it keep what they opened.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from mmlg_scale.bounds import MAX_JSON_BYTES, MAX_MANIFEST_BYTES, MAX_TOKENIZER_BYTES
from mmlg_scale.data import SPLITS
from mmlg_scale.data.classes import CLASSES_FILE
from mmlg_scale.data.manifest import has_old_format
from mmlg_scale.data.store import OPTIONS, RECIPE_KEYS, CacheSettings, FileMissingError, Store
from mmlg_scale.data.transfer import check_url
from mmlg_scale.errors import UserError
from mmlg_scale.files import make_folder, remove_leftovers, temporary_name, writing

FOLDER = "sets"
"""In the cache's folder. Not counted as part of the cache: a manifest has about 200 bytes a shard."""
_LIMITS = {
    CLASSES_FILE: MAX_JSON_BYTES,
    "tokenizer/tokenizer.json": MAX_TOKENIZER_BYTES,
    "tokenizer/tokenizer_config.json": MAX_TOKENIZER_BYTES,
    **{f"{split}/{name}": MAX_MANIFEST_BYTES for split in SPLITS for name in ("manifest.json", "checked.json")},
}
"""Files that a set may have, and how large each is at most."""


def told_key(key: str) -> str:
    """A recipe's key, or a command's option, as messages begin."""
    return key if key.startswith("--") else f"recipe key {key}"


def copy_small_files(url: str, cache: CacheSettings | None, *, key: str = "data.path") -> tuple[Path, Store]:
    """Copy the files of the data set at `url` that say what it is; returns the folder of the copies, and the store of the shards.

    Each file contains its own digest, or dataset.json has it; whoever reads it compares.

    Raises:
        UserError: the store is unavailable (no such bucket or set, no credentials, no network), `cache` is None, or the set has the format
            of earlier versions.
    """
    check_url(url)
    if cache is None:
        keys = OPTIONS if key.startswith("--") else RECIPE_KEYS
        raise UserError(f"{told_key(key)}: {url} is remote. Give a folder on a disk of this node for copies of it: {keys.folder}.")
    store = Store(url, cache)
    files = {"dataset.json": store.read_bytes("dataset.json", MAX_JSON_BYTES)}
    for name, limit in _LIMITS.items():
        split, _, base = name.partition("/")
        if base == "checked.json" and f"{split}/manifest.json" not in files:
            continue
        try:
            files[name] = store.read_bytes(name, limit)
        except FileMissingError:
            continue
    folder = cache.folder / FOLDER / _name(store.root, files)
    if not folder.is_dir():
        _write(folder, files)
    old = [split for split in SPLITS if has_old_format(folder / split)]
    if old:
        raise UserError(f"{url}: the manifest of {old[0]} has the format of earlier versions. Index the set again, where it is.")
    return folder, store


def _name(url: str, files: dict[str, bytes]) -> str:
    found = hashlib.sha256(f"{url}\n".encode())
    for name, content in files.items():
        found.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    return found.hexdigest()[:32]


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """The folder appears as a whole; where another process has just made it, that one is as good."""
    make_folder(folder.parent)
    remove_leftovers(folder.parent.absolute())
    temporary = temporary_name(folder)
    try:
        for name, content in files.items():
            make_folder((temporary / name).parent)
            with writing(temporary / name):
                (temporary / name).write_bytes(content)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
