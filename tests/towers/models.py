"""Small CLIPs whose every number is random, in the forms in which people have them; tokenizers; and how open_clip itself computes."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from mmlg_scale import towers
from mmlg_scale.errors import UserError

# Widths that are multiples of 64: OpenAI's format says the number of heads by the width.
WIDE: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 128, "head_width": 64, "layers": 2},
    "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 64, "heads": 1, "layers": 3},
}
PLAIN: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 3},
    "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 3},
}
CAPTIONS = [
    "two small red squares above a circle",
    "a dog 🐕 runs &amp; a cat sleeps",
    "  white \t space\n of every kind ",
    "Ünïcödé “quotes” and a broken encoding â€” dash",
    "",
    "a [PAD] token and an <end_of_text> token inside a text",
    "unheard words: zyzzyva, qoph",
    "word " * 300,
    "a",
    "\ud83d lone surrogate",
]


def without(config: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def changed(config: Mapping[str, Any], tower: str, **fields: Any) -> dict[str, Any]:
    """A copy with other fields in one tower."""
    return {**config, tower: {**config[tower], **fields}}


def open_clips_own(config: Mapping[str, Any], seed: int) -> torch.nn.Module:
    """open_clip's CLIP of a configuration, with its own random start."""
    open_clip = towers.open_clip
    torch.manual_seed(seed)
    return open_clip.CLIP(
        config["embed_dim"],
        open_clip.CLIPVisionCfg(**config["vision_cfg"]),
        open_clip.CLIPTextCfg(**config["text_cfg"]),
        quick_gelu=config.get("quick_gelu", False),
        init_logit_scale=towers.run.SIGLIP_LOGIT_SCALE if "init_logit_bias" in config else towers.INITIAL_LOGIT_SCALE,
        init_logit_bias=config.get("init_logit_bias"),
        nonscalar_logit_scale=True,
    )


def clip_of(config: Mapping[str, Any]) -> towers.CLIP:
    """Every tensor random, so that a wrong place would show. The same object each time: not to be changed."""
    return _clip_of(json.dumps(config))


@functools.cache
def _clip_of(config: str) -> towers.CLIP:
    clip = towers.build_clip(towers.model_config(json.loads(config)), seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            if name != "logit_scale":
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return clip


def state_of(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict as open_clip has it: logit scale and bias without dimensions."""
    return {
        name: tensor.detach().clone().reshape(()) if name in ("logit_scale", "logit_bias") else tensor.detach().clone()
        for name, tensor in clip_of(config).state_dict().items()
    }


def batch(config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Images and token ids whose end token, the last of the vocabulary, comes at different places."""
    generator = torch.Generator().manual_seed(3)
    size, context, end = towers.image_size(config), towers.context_length(config), config["text_cfg"]["vocab_size"] - 1
    texts = torch.randint(3, end, (6, context), generator=generator)
    for row in range(6):
        texts[row, 3 + row % 4] = end
        texts[row, 4 + row % 4 :] = 0
    return torch.randn(6, 3, size, size, generator=generator), texts


def features(clip: Any, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    images, texts = batch(config)
    with torch.no_grad():
        return clip.encode_image(images), clip.encode_text(texts)


def loaded(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> towers.CLIP:
    clip = towers.build_clip(config, seed=7).eval()
    clip.load_state_dict(state, strict=True)
    return clip


def assert_close(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float) -> None:
    """Relative to the norm of what is wanted, which must not be small."""
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert other.norm() > 0.1
        assert (one - other).norm() <= tolerance * other.norm()


def assert_one_line(work: Callable[[], Any], names: str, *keywords: str) -> str:
    """`work` raises a UserError of one printable line that names a file and says why."""
    with pytest.raises(UserError) as caught:
        work()
    message = str(caught.value)
    assert message.isprintable(), ascii(message)
    assert names in message, message
    assert "Traceback" not in message, message
    assert len(message) < 600, message
    for keyword in keywords:
        assert keyword in message, message
    return message


def is_refused(work: Callable[[], Any]) -> bool:
    """Whether `work` raises a UserError, which then is of one printable line; any other exception passes through."""
    try:
        work()
    except UserError as error:
        message = str(error)
    else:
        return False
    assert message.isprintable(), ascii(message)
    return True


def word_tokenizer(words: str) -> dict[str, str]:
    """Files of a word tokenizer as transformers writes them; the end token has the highest id."""
    tokens = ["[PAD]", "<unk>", "<start_of_text>", *sorted(set(words.split())), "<end_of_text>"]
    ids = {token: index for index, token in enumerate(tokens)}
    fast = FastTokenizer(models.WordLevel(ids, unk_token="<unk>"))
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.add_special_tokens(["[PAD]", "<unk>", "<start_of_text>", "<end_of_text>"])
    return _saved(_ended(fast))


def small_bpe(**options: Any) -> dict[str, str]:
    """Files of byte pairs trained on a few captions."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["[PAD]", "<start_of_text>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(CAPTIONS[:4] * 3, trainer)
    fast.add_special_tokens(["<end_of_text>"])
    return _saved(_ended(fast), **options)


def _ended(fast: FastTokenizer) -> FastTokenizer:
    ends = [(token, fast.token_to_id(token)) for token in ("<start_of_text>", "<end_of_text>")]
    fast.post_processor = processors.TemplateProcessing(single="<start_of_text> $A <end_of_text>", special_tokens=ends)
    return fast


def _saved(fast: FastTokenizer, **options: Any) -> dict[str, str]:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "model_max_length": 77, **options}
    return {"tokenizer.json": fast.to_str(), "tokenizer_config.json": json.dumps(config)}


def pictures(folder: Path) -> list[Path]:
    """PNG files of several shapes, smooth enough that interpolations differ in a small degree only."""
    rng, paths = np.random.default_rng(0), []
    for index, (wide, high) in enumerate(((40, 36), (64, 20), (23, 51), (16, 16))):
        noise = Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).resize((wide, high), Image.Resampling.BICUBIC)
        paths.append(folder / f"{index}.png")
        noise.save(paths[-1])
    return paths


@contextlib.contextmanager
def open_clip_folder(folder: Path) -> Iterator[tuple[Any, Any, Any]]:
    """Model, transform and tokenizer as open_clip itself makes them of a folder."""
    name = f"local-dir:{folder}"
    with torch.random.fork_rng():
        model, _, transform = towers.open_clip.create_model_and_transforms(name)
    yield model.eval(), transform, towers.open_clip.get_tokenizer(name)
