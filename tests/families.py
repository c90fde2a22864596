"""Tiny random models of every architecture that llama.cpp builds from little enough, for llama.cpp alone.

families.toml has what each needs. Their weights are random and of a size that keeps activations near 1; none
is a model of anything.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tiny import N_VOCAB, SEED, finish, write_vocabulary

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

N_LAYER, N_EMBD = 4, 64

_TABLES = tomllib.loads(Path(__file__).with_name("families.toml").read_text())
ARCHITECTURES: tuple[str, ...] = tuple(_TABLES["architectures"])

_SIZES: Mapping[str, Any] = {
    "context_length": 256,
    "embedding_length": N_EMBD,
    "block_count": N_LAYER,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 4,
    "attention.key_length": 16,
    "attention.value_length": 16,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.layer_norm_epsilon": 1e-5,
    "rope.dimension_count": 16,
    "vocab_size": N_VOCAB,
}
_TENSOR = re.compile(r"(?:(?P<prefix>\w+)/)?(?P<name>[\w.]+)(?P<bare>!?):(?P<shape>[\d,]+)")


def build_family(architecture: str, folder: Path, *, vocabulary: bool = True) -> Path:
    """Write the GGUF in `folder`: the same bytes each time, all of them float32.

    vocabulary: whether it says what its tokens are; else only how many there are.
    """
    path, family = folder / f"{architecture}.gguf", _TABLES["architectures"][architecture]
    writer = gguf.GGUFWriter(path, architecture)
    keys = dict(_SIZES)
    for name in family.get("with", ()):
        keys |= _TABLES["keys"][name]
    for key, value in {**keys, **family.get("keys", {})}.items():
        # Most keys are the architecture's; these belong to nobody.
        whole = key if key.startswith(("xielu.", "tokenizer.")) else f"{architecture}.{key}"
        _add(writer, whole, value)
    if vocabulary:
        write_vocabulary(writer, N_VOCAB)
    else:
        writer.add_tokenizer_model("no_vocab")
    random = np.random.default_rng(SEED)
    for name, shape in _tensors(family):
        writer.add_tensor(name, _weights(random, name, shape))
    finish(writer)
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_array(key, value)


def _tensors(family: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, rows first."""
    yield "token_embd.weight", (N_VOCAB, N_EMBD)
    for word, _ in _words(family.get("model", "head")):
        yield _tensor(word)
    for word, layers in _words(family["blocks"]):
        for layer in layers or range(N_LAYER):
            yield _tensor(word, f"blk.{layer}.")


def _words(text: str) -> Iterator[tuple[str, str]]:
    """Each tensor's word, and what follows its @."""
    for word in text.split():
        what, _, layers = word.partition("@")
        for part in _TABLES["sets"].get(what, what).split():
            yield part, layers


def _tensor(word: str, block: str = "") -> tuple[str, tuple[int, ...]]:
    match = _TENSOR.fullmatch(word)
    if match is None:
        raise ValueError(f"families.toml: {word!r} is neither a set nor a tensor")
    prefix = f"{match['prefix']}." if match["prefix"] else ""
    kind = "" if match["bare"] or match["name"].endswith(".bias") else ".weight"
    shape = tuple(int(size) for size in match["shape"].split(","))
    return f"{prefix}{block}{match['name']}{kind}", shape[::-1]


def _weights(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if "tid2eid" in name:  # the experts that a token has, by number
        return random.integers(4, size=shape, dtype=np.int32)
    noise = random.standard_normal(shape, dtype=np.float32)
    if "norm" in name and name.endswith("weight"):
        return 1 + np.float32(0.1) * noise
    if "ssm_a" in name:  # what a state keeps is exp of it
        return -np.abs(noise)
    ends = ("ffn_down", "attn_output")
    size = 0.5 if "token_embd" in name else 0.15 if any(end in name for end in ends) else 0.12
    return np.float32(size) * noise
