"""The tiny models compute the same in llama.cpp and in transformers, before anything steers them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
from tiny import ARCHITECTURES, N_VOCAB, WINDOW, Tiny, build
from transformers import DynamicCache

# The greatest difference between two logits, in standard deviations of all. Where llama.cpp computes the
# activation in float32 it is 6e-6; where it looks GELU up in half precision it is up to 3e-4.
TOLERANCE = 1e-3
DECODED = 4
LENGTHS = [16, WINDOW + 16]  # the longer one takes two batches, and slides the windows of those that have any


@pytest.fixture(scope="module", params=ARCHITECTURES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build(request.param, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(tiny: Tiny) -> Iterator[Any]:
    exact = llama_cpp.GGML_TYPE_F32  # the cache is half precision unless told otherwise
    llm = llama_cpp.Llama(
        str(tiny.gguf),
        n_ctx=64,
        n_threads=1,
        n_batch=32,
        n_ubatch=32,
        logits_all=True,
        type_k=exact,
        type_v=exact,
        verbose=False,
    )
    yield llm
    llm.close()


def make_tokens(length: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(N_VOCAB, size=length + DECODED).tolist()
    return tokens


def llama_logits(llm: Any, tokens: list[int]) -> np.ndarray:
    """Of each position: a prompt, then the last few tokens one at a time."""
    llm.reset()
    llm.eval(tokens[:-DECODED])
    for token in tokens[-DECODED:]:
        llm.eval([token])
    scores: np.ndarray = llm.scores[: len(tokens)].copy()
    return scores


@torch.no_grad()
def torch_logits(model: Any, tokens: list[int]) -> np.ndarray:
    """As `llama_logits`."""
    cache = DynamicCache(config=model.config)
    parts = [tokens[:-DECODED], *([token] for token in tokens[-DECODED:])]
    logits = [model(torch.tensor([part]), cache=cache, use_cache=True).logits[0] for part in parts]
    found: np.ndarray = torch.cat(logits).numpy()
    return found


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / b.std())


@pytest.mark.parametrize("length", LENGTHS)
def test_both_runtimes_find_the_same_logits(tiny: Tiny, llm: Any, length: int) -> None:
    tokens = make_tokens(length)
    ours, theirs = llama_logits(llm, tokens), torch_logits(tiny.model, tokens)
    assert ours.shape == theirs.shape == (length + DECODED, tiny.n_vocab)
    assert difference(ours, theirs) <= TOLERANCE


def test_another_prompt_has_other_logits(tiny: Tiny, llm: Any) -> None:
    one, other = make_tokens(16, seed=1), make_tokens(16, seed=2)
    other[-1] = one[-1]  # what differs at the last position is what attention brought there
    ours, theirs = llama_logits(llm, one), torch_logits(tiny.model, other)
    assert difference(ours, theirs) > 1000 * TOLERANCE
    assert difference(ours[-1], theirs[-1]) > 100 * TOLERANCE


def test_sizes_are_those_of_both_models(tiny: Tiny, llm: Any) -> None:
    model = llm._model.model
    assert llama_cpp.llama_model_n_layer(model) == tiny.n_layer == tiny.model.config.num_hidden_layers
    assert (
        llama_cpp.llama_model_n_embd(model)
        == tiny.n_embd
        == tiny.model.get_input_embeddings().weight.shape[1]
    )
    assert llm.n_vocab() == tiny.n_vocab == tiny.model.config.vocab_size


@torch.no_grad()
def test_no_parameter_is_without_effect(tiny: Tiny) -> None:
    """So that equal logits mean that each was written where it belongs."""
    tokens = torch.tensor([make_tokens(16)])
    before = tiny.model(tokens).logits.numpy()
    for name, parameter in tiny.model.named_parameters():
        kept = parameter.clone()
        parameter.copy_(kept.roll(1))
        after = tiny.model(tokens).logits.numpy()
        parameter.copy_(kept)
        assert difference(after, before) > 10 * TOLERANCE, name


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_two_builds_are_the_same_bytes(architecture: str, tmp_path: Path) -> None:
    digests = set()
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        torch.rand(1)  # what the process drew before does not matter
        digests.add(hashlib.sha256(build(architecture, folder).gguf.read_bytes()).hexdigest())
    assert len(digests) == 1
