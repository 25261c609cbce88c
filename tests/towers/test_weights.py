"""Files of weights in the forms in which people have them: the features that their own library gives, or one line with the right reason."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from mmlg_scale import towers
from mmlg_scale.errors import UserError
from mmlg_scale.towers.weights import say
from tests.towers.models import PLAIN, WIDE, assert_close, assert_one_line, changed, clip_of, features, is_refused, loaded, state_of

STATE = state_of(PLAIN)
CONFIG = {**towers.model_config(PLAIN), "quick_gelu": False}
OWN = ("visual.", "logit_scale")


def prefixed(*prefixes: str) -> dict[str, Tensor]:
    return {"".join(prefixes) + name: tensor for name, tensor in STATE.items()}


def in_text(prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}{name}" if name.startswith(OWN) else f"{prefix}text.{name}": tensor for name, tensor in STATE.items()}


OPTIMIZER = {"state": {}, "param_groups": [{"lr": 1e-3}]}
FORMS: dict[str, Any] = {
    "plain.pt": STATE,
    "plain.safetensors": STATE,
    "plain.ckpt": STATE,
    "plain.bin": STATE,
    "capital.PT": STATE,
    "ddp.pt": {"epoch": 3, "name": "x", "state_dict": prefixed("module."), "optimizer": OPTIMIZER},
    "compiled.pt": prefixed("_orig_mod."),
    "ddp of compiled.pt": {"state_dict": prefixed("module._orig_mod.")},
    "compiled ddp.safetensors": prefixed("_orig_mod.module."),
    "compiled inside.pt": {name.replace("visual.", "visual._orig_mod."): tensor for name, tensor in STATE.items()},
    "fsdp.pt": {name.replace("resblocks.1.", "resblocks.1._fsdp_wrapped_module."): tensor for name, tensor in STATE.items()},
    "model key.pt": {"epoch": 2, "model": STATE},
    "model_state_dict key.pth": {"epoch": 2, "model_state_dict": STATE, "loss": 0.3},
    "both keys.pt": {"model": {"state_dict": STATE}},
    "deepspeed.pt": {"module": STATE, "global_steps": 4},
    "lightning.ckpt": {"state_dict": prefixed("model."), "pytorch-lightning_version": "2"},
    "lightning of clip.ckpt": {"state_dict": prefixed("model.clip."), "pytorch-lightning_version": "2"},
    "every prefix.pt": {"state_dict": in_text("module.model._orig_mod.clip.")},
    "text apart.pt": in_text(),
    "mask.pt": {**STATE, "attn_mask": torch.zeros(8, 8), "visual.position_ids": torch.arange(5)},
    "double.pt": {name: tensor.double() for name, tensor in STATE.items()},
    "parameters.pt": {name: torch.nn.Parameter(tensor) for name, tensor in STATE.items()},
}


def write(content: Any, path: Path, **options: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path, **options)
    return path


@pytest.mark.parametrize(("form", "zipped"), [(form, zipped) for form in FORMS for zipped in (True, False) if zipped or "safe" not in form])
def test_forms_of_the_same_weights(form: str, zipped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bit for bit, in torch's present format and the former one, without a word."""
    path = write(FORMS[form], tmp_path / form, _use_new_zipfile_serialization=zipped)
    state = towers.load_weights(path, CONFIG)
    assert_close(features(loaded(state, CONFIG), CONFIG), features(clip_of(PLAIN), CONFIG), 0.0)
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert state["logit_scale"].shape == (1,)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_half_precision(dtype: torch.dtype, suffix: str, tmp_path: Path) -> None:
    """The numbers of the file, in fp32: exactly open_clip's features with them."""
    half = {name: tensor.to(dtype) for name, tensor in STATE.items()}
    state = towers.load_weights(write(half, tmp_path / f"half{suffix}"), CONFIG)
    own = loaded({name: tensor.float().reshape(1) if tensor.ndim == 0 else tensor.float() for name, tensor in half.items()}, CONFIG)
    assert_close(features(loaded(state, CONFIG), CONFIG), features(own, CONFIG), 0.0)


def test_a_state_dict_of_averages_beside_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
    path = write({"state_dict_ema": other, "state_dict": STATE}, tmp_path / "ema.pt")
    assert torch.equal(towers.load_weights(path, CONFIG)["visual.proj"], STATE["visual.proj"])
    assert "ema.pt also contains weights under state_dict_ema, which are not read" in capsys.readouterr().err


def test_openai_weights(tmp_path: Path) -> None:
    """fp16 as OpenAI ships them, read by open_clip's own builder and by ours; a plain GELU architecture is refused."""
    state = {name: tensor.half() for name, tensor in state_of(WIDE).items()}
    sizes = {"input_resolution": 16, "context_length": 8, "vocab_size": 20}
    torch.save({**state, **{name: torch.tensor(value) for name, value in sizes.items()}}, tmp_path / "openai.pt")
    theirs = towers.open_clip.model.build_model_from_openai_state_dict(dict(state), cast_dtype=torch.float32).float().eval()
    config = towers.model_config(WIDE)
    own = loaded(towers.load_weights(tmp_path / "openai.pt", config), config)
    assert_close(features(own, config), features(theirs, config), 1e-6)
    gelu = {**config, "quick_gelu": False}
    assert_one_line(lambda: towers.load_weights(tmp_path / "openai.pt", gelu), "openai.pt", "use QuickGELU; recipe key model does not")


def test_weights_of_openais_sizes_without_a_statement_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """fp16, or the sizes of a published model; nothing is said where the recipe says which activation it is, or of other sizes."""
    path = write({name: tensor.half() for name, tensor in STATE.items()}, tmp_path / "half.pt")
    towers.load_weights(path, {**CONFIG, "quick_gelu": True})
    towers.load_weights(path, CONFIG)
    towers.load_weights(write(STATE, tmp_path / "float.pt"), towers.model_config(PLAIN))
    assert capsys.readouterr().err == ""
    towers.load_weights(path, towers.model_config(PLAIN))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(word in said for word in ("half.pt", "QuickGELU", "GELU (quick_gelu: false"))
    shapes = {
        "visual.conv1.weight": (768, 3, 32, 32),
        "visual.positional_embedding": (50, 768),
        "ln_final.weight": (512,),
        "visual.proj": (768, 512),
    }
    for width, is_told in ((768, True), (640, False)):
        sizes = {name: tuple(width if size == 768 else size for size in shape) for name, shape in shapes.items()}
        towers.weights.warn_of_activation({name: torch.empty(shape) for name, shape in sizes.items()}, tmp_path / f"{width}.pt")
        assert ("nothing says which activation" in capsys.readouterr().err) is is_told


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_a_configuration_beside_the_file_that_disagrees(quick_gelu: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write({name: tensor.half() for name, tensor in STATE.items()}, tmp_path / "model.safetensors")
    act = {"hidden_act": "quick_gelu" if quick_gelu else "gelu"}
    beside = tmp_path / "config.json"
    beside.write_text(json.dumps({"model_type": "clip", "text_config": act, "vision_config": act}))
    towers.load_weights(path, {**CONFIG, "quick_gelu": quick_gelu})
    other = {**CONFIG, "quick_gelu": not quick_gelu}
    names = ("GELU", "QuickGELU")
    message = assert_one_line(lambda: towers.load_weights(path, other), str(beside), f"says {names[quick_gelu]}", "model.config.quick_gelu")
    assert f"is {str(not quick_gelu).lower()} ({names[not quick_gelu]})" in message
    assert f"Set it to {str(quick_gelu).lower()}" in message
    assert capsys.readouterr().err == ""
    # A file that says nothing of a CLIP is no statement, and one of open_clip's is.
    beside.write_text("{}")
    towers.load_weights(path, other)
    beside.write_text("not JSON")
    towers.load_weights(path, other)
    assert "config.json is damaged: it is not JSON" in capsys.readouterr().err
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**PLAIN, "quick_gelu": quick_gelu}}))
    assert_one_line(lambda: towers.load_weights(path, other), "open_clip_config.json", f"says {names[quick_gelu]}")
    assert "give the folder to use them" in capsys.readouterr().err


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def written(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def saved(content: Any, **options: Any) -> Callable[[Path], object]:
    return lambda path: write(content, path, **options)


def cut(content: Any, keep: float) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        write(content, path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])

    return make


def flipped(path: Path) -> None:
    """Noise over the pickle of a zipped file."""
    write(STATE, path)
    content = bytearray(path.read_bytes())
    start = content.index(b"data.pkl") + 100
    content[start : start + 400] = np.random.default_rng(0).bytes(400)
    path.write_bytes(content)


def other_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("keras/metadata.json", "{}")


def compressed(path: Path) -> None:
    """An archive as torch.save writes it, but compressed: a few bytes that fill the memory."""
    torch.save(STATE, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def header(entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def of(config: dict[str, Any]) -> Callable[[Path], object]:
    return saved(state_of(config))


RENAMED = {name.replace("visual.transformer", "visual.trunk"): tensor for name, tensor in STATE.items()}
RESNET = {name.replace("visual.transformer.resblocks.0", "visual.layer1.0"): tensor for name, tensor in STATE.items()}
NAN, INFINITE = torch.full((16, 16), float("nan")), STATE["visual.proj"].clone()
INFINITE[3, 4] = float("inf")
REFUSED: list[tuple[str, Callable[[Path], object], str]] = [
    ("none.pt", lambda path: None, "no file of weights"),
    ("none", lambda path: None, "or of a model folder"),
    ("weights.onnx", written(b"x"), "does not have the name of a weights file"),
    ("folder.pt", lambda path: path.mkdir(), "is a folder"),
    ("link.pt", lambda path: path.symlink_to(path.parent / "gone"), "is a broken link to"),
    ("loop.pt", lambda path: path.symlink_to(path), "is a broken link to"),
    ("pipe.pt", fifo, "is a pipe or a device"),
    ("empty.pt", written(b""), "is empty (0 bytes)"),
    ("empty.safetensors", written(b""), "is empty (0 bytes)"),
    ("pointer.safetensors", written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 6\n"), "run git lfs pull"),
    ("pointer.bin", written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 6\n"), "run git lfs pull"),
    ("page.bin", written(b"\n<!DOCTYPE html><html><body>Sign in</body></html>"), "is a web page (HTML)"),
    ("error.safetensors", written(b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"), "is a web page (HTML)"),
    ("index.bin", written(b'{"weight_map": {}}'), "is text (JSON), not weights"),
    ("packed.pt", written(b"\x1f\x8b\x08\x00 and more"), "is a compressed file"),
    ("noise.pt", written(np.random.default_rng(1).bytes(4000)), "neither a torch nor a safetensors file"),
    ("noise.safetensors", written(np.random.default_rng(1).bytes(4000)), "not a safetensors file"),
    ("byte.safetensors", written(b"\x08"), "not a safetensors file"),
    ("huge header.safetensors", written(struct.pack("<Q", 2**62) + b"{}"), "not a safetensors file"),
    ("bad header.safetensors", written(struct.pack("<Q", 4) + b"{abc" + bytes(8)), "is not JSON"),
    ("odd header.safetensors", written(header({"visual.proj": {"shape": 3}})), "does not say where each tensor is"),
    ("deep header.safetensors", written(struct.pack("<Q", 200_000) + b'{"a":' + b"[" * 199_995), "nested too deeply"),
    ("no offsets.safetensors", written(header({"visual.proj": {"dtype": "F32", "shape": [0]}})), "does not say where each tensor is"),
    ("odd offsets.safetensors", written(header({"visual.proj": {"data_offsets": [0, "x"]}})), "does not say where each tensor is"),
    ("bomb.pt", compressed, "is a compressed ZIP archive"),
    ("cut.safetensors", cut(STATE, 0.5), "is cut off"),
    ("cut header.safetensors", cut(STATE, 0.01), "is cut off"),
    ("cut.pt", cut(STATE, 0.5), "is cut off or damaged"),
    ("flipped.pt", flipped, "is damaged, cut off, or not a state dict"),
    ("archive.pt", other_archive, "not one that torch.save wrote"),
    ("script.pt", lambda path: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path), "is a TorchScript archive"),
    ("model.pt", saved(torch.nn.Linear(2, 2)), "contains a pickled torch.nn.modules.linear.Linear"),
    ("numpy.pt", saved({"state_dict": STATE, "best": np.float64(0.3)}), "contains a pickled numpy"),
    ("array.pt", saved({name: tensor.numpy() for name, tensor in STATE.items()}), "contains a pickled numpy"),
    ("list.pt", saved([1, 2]), "contains a list, not a state dict"),
    ("tensor.pt", saved(torch.zeros(3)), "contains one tensor, not a state dict"),
    ("nothing.pt", saved({}), "its keys are nothing"),
    ("keys.pt", saved({"epoch": 3, "network": STATE}), "its keys are epoch, network"),
    ("line.pt", saved({"a\nb\x1b[31m": 1}), "its keys are a?b?[31m"),
    ("string.pt", saved({**STATE, "visual.proj": "gone"}), "visual.proj is a str, not a tensor"),
    ("int8.pt", saved({**STATE, "visual.proj": torch.zeros(16, 16, dtype=torch.int8)}), "visual.proj has int8 numbers"),
    ("complex.pt", saved({**STATE, "visual.proj": torch.zeros(16, 16, dtype=torch.complex64)}), "visual.proj has complex64 numbers"),
    ("sparse.pt", saved({**STATE, "visual.proj": STATE["visual.proj"].to_sparse()}), "visual.proj is a sparse tensor"),
    ("meta.pt", saved({**STATE, "visual.proj": torch.empty(16, 16, device="meta")}), "or one without numbers"),
    ("twice.pt", saved({**STATE, "module.visual.proj": STATE["visual.proj"]}), "has visual.proj twice"),
    ("nan.pt", saved({**STATE, "visual.proj": NAN}), "visual.proj has 256 of 256 numbers that are NaN"),
    ("infinite.safetensors", saved({**STATE, "visual.proj": INFINITE}), "visual.proj has 1 of 256 numbers"),
    ("too large.pt", saved({**STATE, "visual.proj": STATE["visual.proj"].double() * 1e300}), "visual.proj has 256 of 256"),
    ("no scale.pt", saved({name: tensor for name, tensor in STATE.items() if name != "logit_scale"}), "has no logit_scale"),
    ("scales.pt", saved({**STATE, "logit_scale": torch.zeros(3)}), "logit_scale has shape (3,), the recipe asks for (1,)"),
    ("less.pt", saved({name: tensor for name, tensor in STATE.items() if name != "visual.proj"}), "has no visual.proj of shape (16, 16)"),
    ("other.pt", saved({**STATE, "ln_final.bias": torch.zeros(5)}), "ln_final.bias has shape (5,), the recipe asks for (16,)"),
    ("more.pt", saved({**STATE, "extra": torch.zeros(1)}), "has extra, which the recipe does not have"),
    ("no text.pt", saved({name: tensor for name, tensor in STATE.items() if "visual" in name}), "has no text tower"),
    ("image layers.pt", of(changed(PLAIN, "vision_cfg", layers=2)), "has 2 image layers, the recipe asks for 3"),
    ("text layers.pt", of(changed(PLAIN, "text_cfg", layers=4)), "has 4 text layers, the recipe asks for 3"),
    ("image width.pt", of(changed(PLAIN, "vision_cfg", width=24)), "has image width 24, the recipe asks for 16"),
    ("text width.pt", of(changed(PLAIN, "text_cfg", width=24)), "has text width 24, the recipe asks for 16"),
    ("vocabulary.pt", of(changed(PLAIN, "text_cfg", vocab_size=21)), "has a vocabulary of 21 tokens, the recipe asks for 20"),
    ("context.pt", of(changed(PLAIN, "text_cfg", context_length=9)), "has a context of 9 tokens, the recipe asks for 8"),
    (
        "image.pt",
        of(changed(PLAIN, "vision_cfg", image_size=24)),
        "has 10 image positions (patches and class token), the",
    ),
    ("patch.pt", of(changed(PLAIN, "vision_cfg", patch_size=4, image_size=8)), "has patches of 4 pixels, the recipe asks for 8"),
    ("joint.pt", of({**PLAIN, "embed_dim": 12}), "has a joint embedding of width 12, the recipe asks for 16"),
    ("mlp.pt", of(changed(PLAIN, "text_cfg", mlp_ratio=2.0)), "has text MLPs of width 32, the recipe asks for 64"),
    ("timm.pt", saved(RENAMED), "contains an image tower of timm"),
    ("resnet.pt", saved(RESNET), "contains a ResNet image tower"),
]


@pytest.mark.parametrize(("name", "make", "said"), REFUSED, ids=[row[0] for row in REFUSED])
def test_files_that_are_refused(name: str, make: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    assert_one_line(lambda: towers.load_weights(tmp_path / name, CONFIG), name, said)
    if not (tmp_path / name).is_dir():
        assert_one_line(lambda: towers.load_ancestor(tmp_path / name, CONFIG), name, said)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_unpickled(protocol: int, zipped: bool, tmp_path: Path) -> None:
    content = {"visual.proj": Payload(tmp_path / "created")}
    torch.save(content, tmp_path / "pickle.pt", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    with pytest.raises(UserError):
        towers.load_weights(tmp_path / "pickle.pt", CONFIG)
    assert not (tmp_path / "created").exists()


def test_what_a_disk_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(STATE, tmp_path / "weights.pt")
    real = open

    def refuse(file: Any, *rest: Any, **options: Any) -> Any:
        if str(file) == str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(file, *rest, **options)

    monkeypatch.setattr("builtins.open", refuse)
    assert_one_line(lambda: towers.load_weights(path, CONFIG), "weights.pt", "Permission denied")


@pytest.mark.parametrize("seed", range(2))
def test_any_damage_is_one_line_or_other_numbers(seed: int, tmp_path: Path) -> None:
    """Random bytes changed, cut out and put in, in every format: never another exception."""
    rng = np.random.default_rng(seed)
    small = {**PLAIN, "vision_cfg": {**PLAIN["vision_cfg"], "layers": 1}, "text_cfg": {**PLAIN["text_cfg"], "layers": 1}}
    state, config = state_of(small), towers.model_config(small)
    torch.save(state, tmp_path / "zip.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.safetensors").write_bytes(save(state))
    refused = 0
    for name in ("zip.pt", "old.pt", "plain.safetensors"):
        whole = (tmp_path / name).read_bytes()
        for _ in range(25):
            content = bytearray(whole)
            for _ in range(rng.integers(1, 6)):
                place = int(rng.integers(0, min(len(content), 4000) if rng.random() < 0.7 else len(content)))
                kind = rng.integers(3)
                if kind == 0:
                    content[place] = int(rng.integers(256))
                elif kind == 1:
                    del content[place : place + int(rng.integers(1, 50))]
                else:
                    content[place:place] = rng.bytes(int(rng.integers(1, 50)))
            (tmp_path / name).write_bytes(content)
            refused += is_refused(lambda name=name: towers.load_weights(tmp_path / name, config))
    assert refused > 20


def test_what_is_said_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    say("only once")
    say("only once")
    assert capsys.readouterr().err == "mmlg: only once\n"
