"""A model as one object: configuration, weights, preprocessing, tokenizer. Loaded, checked and exported together.

Whoever reads or writes a model goes through here, so that a model never meets images or token ids that it was not trained on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mmlg_scale.bounds import MAX_TOKENIZER_BYTES
from mmlg_scale.digests import SEAL_FILE
from mmlg_scale.errors import UserError
from mmlg_scale.files import folder_atomic, require_space
from mmlg_scale.reading import read_bytes, read_json, read_text, shown
from mmlg_scale.records import read_record, record_text
from mmlg_scale.towers import hugging_face
from mmlg_scale.towers.config import context_length, first_difference, image_size, model_config, vocab_size, with_sizes
from mmlg_scale.towers.foreign import DIGEST, is_folder, read_tensors, require_folder, signed, stated_digest
from mmlg_scale.towers.preprocess import Preprocess
from mmlg_scale.towers.run import build_meta
from mmlg_scale.towers.tokenizer import (
    TOKENIZER_FILES,
    BytePairTokenizer,
    Tokenizer,
    tokenizer_from_files,
    told,
)
from mmlg_scale.towers.weights import OPEN_CLIP_CONFIG, check_kind, finite, fit_state, load_weights, read_state, say, warn_of_activation

if TYPE_CHECKING:
    from mmlg_scale.towers.library import TextTransformer, VisionTransformer

CONFIG_FILE, WEIGHTS_FILE = OPEN_CLIP_CONFIG, "open_clip_model.safetensors"
TOWER_FILE, TOWER_WEIGHTS_FILE = "tower.json", "open_clip_tower.safetensors"
MODALITIES = ("image", "text")
# open_clip's own order.
OPEN_CLIP_WEIGHTS = (
    WEIGHTS_FILE,
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
_SCALARS = ("logit_scale", "logit_bias")
_AGAIN = "Take the one that the model was published with."


@dataclass(frozen=True)
class ModelSpec:
    """All that belongs to a model besides its weights.

    Attributes:
        config: open_clip's model_cfg; the activation is in it (quick_gelu).
        preprocess: how images are resized and normalised.
        tokenizer: what turned captions into the ids that the model was trained on.
    """

    config: dict[str, Any]
    preprocess: Preprocess = field(default_factory=Preprocess)
    tokenizer: Tokenizer = field(default_factory=BytePairTokenizer)

    @property
    def image_size(self) -> int:
        """Side of the input images in pixels."""
        return image_size(self.config)

    @property
    def context_length(self) -> int:
        """Tokens per caption."""
        return context_length(self.config)

    def sized(self, **sizes: int | None) -> ModelSpec:
        """The same at other depths and widths, see `with_sizes`."""
        return replace(self, config=with_sizes(self.config, **sizes))

    def to_header(self) -> dict[str, Any]:
        """As plain JSON, for files that carry a model's spec (a learngene, a digest)."""
        return {"model_config": self.config, "preprocess": self.preprocess.to_config(), "tokenizer_files": self.tokenizer.files}

    @classmethod
    def from_header(cls, header: Mapping[str, Any], where: str) -> ModelSpec:
        """The inverse of `to_header`; `where` starts the message.

        Raises:
            UserError: something in it is not supported.
        """
        for key, kind in (("model_config", dict), ("preprocess", dict), ("tokenizer_files", dict)):
            if not isinstance(header.get(key), kind):
                raise UserError(f"{where}: {key} is missing or not an object. Write the file again.")
        return cls(
            model_config(header["model_config"], where=f"{where}: model_config"),
            Preprocess.from_config(header["preprocess"], where),
            tokenizer_from_files(header["tokenizer_files"], where),
        )

    def require_tokenizer(self, where: str) -> None:
        """Raise UserError where the tokenizer gives ids that the model has no embedding for; `where` starts the message."""
        embedded = vocab_size(self.config)
        if self.tokenizer.vocab_size > embedded:
            raise UserError(
                f"{where}: the tokenizer ({told(self.tokenizer)}) has ids up to {self.tokenizer.vocab_size - 1}, the model's vocabulary "
                f"ends at {embedded - 1}. Give the model folder with the tokenizer that the model was trained with."
            )

    def in_words(self) -> str:
        """What the model is fed, for the console."""
        images = f"images {self.image_size} px, resize {self.preprocess.resize_mode}, {self.preprocess.interpolation}"
        return f"tokenizer {told(self.tokenizer)}, {self.context_length} tokens a caption; {images}"

    def digest(self) -> str:
        """SHA-256 of the header."""
        return hashlib.sha256(json.dumps(self.to_header(), sort_keys=True).encode()).hexdigest()


class Bundle(NamedTuple):
    """A model: what it is, and its state dict (logit scale and bias with one element)."""

    spec: ModelSpec
    state: dict[str, Tensor]

    def digest(self) -> str:
        """SHA-256 over spec and weights: equal for models that compute the same."""
        found = hashlib.sha256(self.spec.digest().encode())
        for name in sorted(self.state):
            found.update(name.encode())
            found.update(self.state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()


def export(model: Bundle, out: Path, *, overwrite: bool = False) -> None:
    """Write the folder that ``open_clip.create_model_and_transforms("local-dir:OUT")`` loads; whole or not at all.

    Tokenizer files lie beside the weights, so that ``open_clip.get_tokenizer("local-dir:OUT")`` finds them. `overwrite` replaces the files
    of the export that is there, in one step (`folder_atomic`); whatever else lies in OUT stays.

    Raises:
        UserError: OUT contains files and is not an export, or `overwrite` is not given; the disk has too little space.
        OSError: it cannot be written, with the path.
    """
    spec = model.spec
    config = json.loads(json.dumps(spec.config))
    if spec.tokenizer.files:
        config["text_cfg"]["hf_tokenizer_name"] = "tokenizer"
    tensors = {name: tensor.reshape(()) if name in _SCALARS else tensor for name, tensor in model.state.items()}
    size = spec.image_size
    preprocess = {"size": [size, size], "mode": "RGB", **spec.preprocess.to_config()}
    files = {CONFIG_FILE: _as_json({"model_cfg": config, "preprocess_cfg": preprocess}), **spec.tokenizer.files}
    _write_folder(out, files, WEIGHTS_FILE, tensors, overwrite)


def export_tower(model: Bundle, modality: str, out: Path, *, overwrite: bool = False) -> None:
    """Write one tower: ``open_clip_tower.safetensors``, which loads strictly into open_clip's tower class, and ``tower.json``.

    Raises:
        UserError: as `export`; `modality` is neither image nor text.
    """
    if modality not in MODALITIES:
        raise UserError(f"modality {modality!r} is unknown. Use one of: {', '.join(MODALITIES)}.")
    spec, is_image = model.spec, modality == "image"
    tensors = {name: model.state[f"visual.{name}" if is_image else name] for name in _tower_shapes(spec.config, modality)}
    description: dict[str, Any] = {"modality": modality, "model_cfg": spec.config}
    if is_image:
        description["preprocess_cfg"] = spec.preprocess.to_config()
    files = {TOWER_FILE: _as_json(description), **({} if is_image else spec.tokenizer.files)}
    _write_folder(out, files, TOWER_WEIGHTS_FILE, tensors, overwrite)


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def _tower_shapes(config: Mapping[str, Any], modality: str) -> dict[str, tuple[int, ...]]:
    """Tensor name in open_clip's tower class -> shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in build_meta(config).state_dict().items() if name not in _SCALARS}
    images = {name.removeprefix("visual."): shape for name, shape in shapes.items() if name.startswith("visual.")}
    return images if modality == "image" else {name: shape for name, shape in shapes.items() if not name.startswith("visual.")}


def load_tower(folder: Path) -> VisionTransformer | TextTransformer:
    """The open_clip tower that `export_tower` wrote, in fp32.

    Raises:
        UserError: a file is missing or damaged, the architecture is not supported, or the weights are not those of the architecture.
    """
    require_folder(folder)
    where, path = folder / TOWER_FILE, folder / TOWER_WEIGHTS_FILE
    description = read_json(where, "description of a tower", "Give a folder that mmlg descend wrote for one tower.")
    modality = description.get("modality")
    if modality not in MODALITIES:
        raise UserError(f"{where}: modality is {shown(modality)!r}. Use one of: {', '.join(MODALITIES)}.")
    config = model_config(description.get("model_cfg"), where=f"{where}: model_cfg")
    _check_seal(folder, path)
    found, _ = read_tensors(path)
    for name, value in found.items():
        check_kind(name, value, path)
    expected = _tower_shapes(config, modality)
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    for name in sorted({*expected, *shapes}):
        if expected.get(name) != shapes.get(name):
            raise UserError(
                f"{path}: {shown(name)} has shape {shapes.get(name, 'none')}, {TOWER_FILE} asks for {expected.get(name, 'none')}. "
                "Write the tower again."
            )
    state = {name: finite(name, tensor, path) for name, tensor in found.items()}
    from mmlg_scale.towers.library import build_tower

    tower = build_tower(config, modality)
    tower.load_state_dict(state, strict=True)
    return tower


def _write_folder(out: Path, files: Mapping[str, str], weights_name: str, tensors: Mapping[str, Tensor], overwrite: bool) -> None:
    from safetensors.torch import save_file

    replaced = _replaced(out, {*files, weights_name, SEAL_FILE}, overwrite)
    require_space(out.absolute().parent, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()), "an export")
    with folder_atomic(out, replaced) as temporary:
        dense, metadata = signed(tensors)
        for name, content in {**files, SEAL_FILE: _seal(files, metadata)}.items():
            (temporary / name).write_text(content, encoding="utf-8", newline="")
        save_file(dense, temporary / weights_name, metadata=metadata)


def _seal(files: Mapping[str, str], metadata: Mapping[str, str]) -> str:
    digests = {name: hashlib.sha256(content.encode()).hexdigest() for name, content in files.items()}
    return record_text({"files": digests, "weights": metadata})


def _check_seal(folder: Path, weights: Path) -> None:
    """Compare an export's files with their digests. Other folders pass.

    People edit configurations, and a person can read what one says: a changed one is used, and said to be changed. Of weights and
    tokenizer files nobody can tell an edit from damage.

    Raises:
        UserError: weights or tokenizer are not those that were written with the others; or the list of digests is damaged.
    """
    path = folder / SEAL_FILE
    if not os.path.lexists(path):
        return
    remedy = f"Export it again or copy it again; if you changed it on purpose, remove {path}."
    content = read_record(path, "list of an export's files", remedy)
    digests, stated = content.get("files"), content.get("weights")
    if not isinstance(digests, dict) or not isinstance(stated, dict):
        raise UserError(f"{path} is not a list of an export's files. {remedy}")
    edited = []
    for name, wanted in digests.items():
        if name not in (CONFIG_FILE, TOWER_FILE, *TOKENIZER_FILES):
            raise UserError(f"{path} names {shown(name)!r}, which no export has. {remedy}")
        found = hashlib.sha256(read_bytes(folder / name, "file of the export", remedy, MAX_TOKENIZER_BYTES)).hexdigest()
        if found != wanted and name in TOKENIZER_FILES:
            raise UserError(f"{folder / name} is not the file that was exported with the weights (SHA-256). {remedy}")
        if found != wanted:
            edited.append(f"{folder / name} has changed since it was exported (SHA-256 now {found[:8]})")
    if stated_digest(weights) != stated.get(DIGEST):
        raise UserError(f"{weights} is not the file that was exported with {', '.join(digests)} (SHA-256). {remedy}")
    for what in edited:
        say(f"{what}. What it says now is used. If you did not change it, export or copy it again; else remove {path} to silence this.")


def _replaced(out: Path, written: set[str], overwrite: bool) -> set[str]:
    """The files in `out` that an earlier export wrote, and which the new one replaces.

    Raises:
        UserError: `out` is no folder or holds something that may not be replaced.
    """
    if not os.path.lexists(out):
        return set()
    if not out.is_dir():
        raise UserError(f"{out} exists and is not a folder. Give another --out.")
    present = {path.name for path in out.iterdir()}
    is_export = bool(present & {CONFIG_FILE, TOWER_FILE})
    if present and not is_export:
        raise UserError(f"{out} exists and is not an exported model: it contains {min(present)}. Give another --out, or an empty folder.")
    if present and not overwrite:
        raise UserError(f"{out} exists. Give another --out, or --overwrite to replace the export.")
    own = {CONFIG_FILE, WEIGHTS_FILE, TOWER_FILE, TOWER_WEIGHTS_FILE, SEAL_FILE}
    if _has_own_tokenizer(out):
        own |= {"tokenizer.json", "tokenizer_config.json"}
    foreign = sorted(present & written - own)
    if foreign:
        raise UserError(f"{out / foreign[0]} was not written with the export that is there. Move it away, or give another --out.")
    return own


def _has_own_tokenizer(out: Path) -> bool:
    """Whether the export in `out` came with tokenizer files: a tokenizer.json beside one that did not is a person's own."""
    for name in (CONFIG_FILE, TOWER_FILE):
        try:
            content = read_json(out / name, "model configuration", _AGAIN)
            if name == TOWER_FILE:
                return bool(content["modality"] == "text")
            return bool(content["model_cfg"]["text_cfg"].get("hf_tokenizer_name"))
        except (UserError, KeyError, TypeError, AttributeError):
            continue
    return False


def load_ancestor(path: Path, config: Mapping[str, Any]) -> Bundle:
    """An ancestor: a model folder (`load_clip`), or a file of weights for the architecture `config`, which has byte pairs.

    Of a Hugging Face folder whose config.json does not describe a model, the architecture is `config`.

    Raises:
        UserError: as `load_clip` and `load_weights`; the folder's architecture is not that of `config`.
    """
    if not is_folder(path):
        return Bundle(ModelSpec(dict(config)), load_weights(path, config))
    model = _load_folder(path, config)
    difference = first_difference(model.spec.config, config)
    if difference is not None:
        key, theirs, ours = difference
        raise UserError(f"{path} has {key} {theirs}, recipe key model.config.{key} is {ours}. Name the architecture of the folder.")
    return model


def load_clip(folder: Path) -> Bundle:
    """The model in a folder that `export`, open_clip or Hugging Face's transformers wrote.

    Raises:
        UserError: no folder; a file is missing or damaged; the architecture, preprocessing or tokenizer is not supported; or the weights
            are not those of the architecture.
    """
    require_folder(folder)
    return _load_folder(folder, None)


def _load_folder(folder: Path, config: Mapping[str, Any] | None) -> Bundle:
    for name in (CONFIG_FILE, hugging_face.CONFIG_FILE):
        path = folder / name
        if os.path.lexists(path):
            content = read_json(path, "model configuration", "Take the one that the model was published with.")
            return _load_open_clip(folder, content) if name == CONFIG_FILE else _load_hugging_face(folder, content, config)
    if os.path.lexists(folder / TOWER_FILE):
        raise UserError(f"{folder} is one tower ({TOWER_FILE}). Give a folder with both: write one with --modality both.")
    raise UserError(f"{folder} has no {CONFIG_FILE} and no config.json: not a model folder. Give one that mmlg train or open_clip wrote.")


def _load_open_clip(folder: Path, content: Mapping[str, Any]) -> Bundle:
    where = str(folder / CONFIG_FILE)
    given = content.get("model_cfg")
    if not isinstance(given, dict):
        raise UserError(f"{where} has no object model_cfg. Take the one that the model was published with.")
    given = {**given, "text_cfg": given.get("text_cfg")}
    names_tokenizer = False
    if isinstance(given["text_cfg"], dict):
        text = given["text_cfg"] = dict(given["text_cfg"])
        names_tokenizer = bool(text.pop("hf_tokenizer_name", None))
        _check_tokenizer_options(text.pop("tokenizer_mode", None), text.pop("tokenizer_kwargs", None), where)
    config = model_config(given, where=f"{where}: model_cfg")
    preprocess = Preprocess.from_config(content.get("preprocess_cfg"), where)
    tokenizer = _own_tokenizer(folder) if names_tokenizer else BytePairTokenizer()
    path = _weights_in(folder, OPEN_CLIP_WEIGHTS)
    _check_seal(folder, path)
    state = fit_state(read_state(path)[0], config, path, asker=CONFIG_FILE)
    return _checked(Bundle(ModelSpec(config, preprocess, tokenizer), state), folder)


def _check_tokenizer_options(mode: Any, options: Any, where: str) -> None:
    """open_clip hands these to transformers, where they can name code to run; only its defaults are supported."""
    if mode:
        raise UserError(f"{where}: text_cfg.tokenizer_mode {shown(mode)!r} is not supported. Leave it out.")
    if options is not None and not (isinstance(options, dict) and all(_is_default(*option) for option in options.items())):
        raise UserError(f"{where}: text_cfg.tokenizer_kwargs {shown(options)} is not supported. Leave it out.")


def _is_default(key: str, value: Any) -> bool:
    return (key == "clean" and value == "whitespace") or (key == "strip_sep_token" and value is False)


def _load_hugging_face(folder: Path, content: Mapping[str, Any], config: Mapping[str, Any] | None) -> Bundle:
    where = str(folder / hugging_face.CONFIG_FILE)
    path = _weights_in(folder, hugging_face.WEIGHT_FILES)
    if hugging_face.describes_clip(content):
        own, asker = hugging_face.config_of(content, where), hugging_face.CONFIG_FILE
        state = read_state(path)[0]
    elif config is not None:
        own, asker = dict(config), "the recipe"
        state = read_state(path)[0]
        if "quick_gelu" not in config:
            warn_of_activation(state, path)
    else:
        raise UserError(
            f"{where} does not describe a model (no model_type, no text_config). Take the one that the model was published with."
        )
    state = fit_state(state, own, path, asker=asker)
    preprocess = hugging_face.preprocess_of(folder, image_size(own))
    files = _tokenizer_files(folder)
    tokenizer: Tokenizer = BytePairTokenizer()
    if files and not hugging_face.has_byte_pairs(files):
        tokenizer = tokenizer_from_files(files, str(folder))
    return _checked(Bundle(ModelSpec(own, preprocess, tokenizer), state), folder)


def _checked(model: Bundle, folder: Path) -> Bundle:
    """A folder's own tokenizer must fit its model. Byte pairs are what a folder has that names none: checked where they are used."""
    if model.spec.tokenizer.files:
        model.spec.require_tokenizer(str(folder))
    return model


def _own_tokenizer(folder: Path) -> Tokenizer:
    if not os.path.lexists(folder / "tokenizer.json"):
        raise UserError(
            f"{folder}: {CONFIG_FILE} names a tokenizer (text_cfg.hf_tokenizer_name), but there is no tokenizer.json. Take the folder as "
            "it was published."
        )
    return tokenizer_from_files(_tokenizer_files(folder), str(folder))


def _tokenizer_files(folder: Path) -> dict[str, str]:
    present = [name for name in TOKENIZER_FILES if os.path.lexists(folder / name)]
    return {name: read_text(folder / name, "tokenizer file", _AGAIN, MAX_TOKENIZER_BYTES) for name in present}


def _weights_in(folder: Path, names: Sequence[str]) -> Path:
    """The file that open_clip takes: the first of these names that is there, otherwise the only file of weights."""
    for name in names:
        if os.path.lexists(folder / name):
            return folder / name
    if sharded := sorted(path.name for path in folder.glob("*.index.json")):
        raise UserError(f"{folder} has its weights in several files ({shown(sharded[0])}). Save them as one {names[0]}.")
    others = sorted(path for suffix in (".safetensors", ".bin", ".pth") for path in folder.glob(f"*{suffix}"))
    if len(others) == 1:
        return others[0]
    held = f"several files of weights, none of them {names[0]}" if others else f"no {names[0]}"
    raise UserError(f"{folder} has {held}. Take the folder as it was published.")
