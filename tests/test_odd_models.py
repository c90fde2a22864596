"""Models for which llama.cpp ends the process if it is asked the wrong thing: mien asks nothing of the kind.

Encoders, encoder-decoders, diffusion models, and models without a vocabulary or without blocks are steered,
or refused with the cause. Which encoders are steered, and how, is in test_families.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp.llama_cpp as api
import mien
import numpy as np
import pytest
from families import N_EMBD, N_LAYER, build_family
from llama_batches import Contexts, Row, evaluate, new_batch
from mien.modelfile import fingerprint_of
from mien.runtimes.llama_text import load_llama
from mien.vector import SITES, Floats, Vector
from tiny import N_VOCAB, finish

ROWS = (0.4 * np.random.default_rng(1).standard_normal((N_LAYER - 1, N_EMBD))).astype(np.float32)
VECTOR = Vector("v", tuple(range(1, N_LAYER)), ROWS)
PROMPT = [Row(token, i) for i, token in enumerate(range(10, 19))]
EXACT = {"n_ctx": 64, "type_k": api.GGML_TYPE_F16, "type_v": api.GGML_TYPE_F16, "flash_attn_type": -1}


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Contexts]]:
    every = []

    def opened(architecture: str, **options: Any) -> Contexts:
        every.append(Contexts(build_family(architecture, tmp_path, **options)))
        return every[-1]

    yield opened
    for contexts in every:
        contexts.close()


def set_own(context: Any) -> None:
    """llama.cpp's own control vector."""
    data = ROWS.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    assert api.llama_set_adapter_cvec(context, data, ROWS.size, N_EMBD, 1, N_LAYER - 1) == 0


# ---- no vocabulary ----


def test_a_model_without_a_vocabulary_is_steered(opened: Callable[..., Contexts]) -> None:
    contexts = opened("llama", vocabulary=False)
    own = contexts.make(hooked=False, **EXACT)
    set_own(own)
    context = contexts.make(**EXACT)
    steering = mien.attach(context)
    assert steering.model == fingerprint_of(contexts.path)
    assert steering.model.vocabulary == ""
    steering.set(VECTOR)
    found, expected = (evaluate(c, decode, PROMPT) for c, decode in ((context, steering.decode), (own, None)))
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


# ---- no blocks ----


def test_a_model_of_which_only_the_vocabulary_is_loaded_is_refused(tmp_path: Path) -> None:
    path = build_family("llama", tmp_path)
    parameters = api.llama_model_default_params()
    parameters.vocab_only = True
    model = api.llama_model_load_from_file(str(path).encode(), parameters)
    with pytest.raises(mien.RuntimeNotSupported, match="vocab_only=True"):
        mien.init_from_model(model, api.llama_context_default_params())
    api.llama_model_free(model)
    llm = load_llama(path, vocab_only=True)
    kind = type(llm)
    with pytest.raises(mien.RuntimeNotSupported, match="vocab_only=True"):
        mien.attach(llm)
    assert type(llm) is kind
    llm.close()


# ---- files that are no whole model ----


def write_gguf(path: Path, **keys: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in keys.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint16
        add(key.replace("__", "."), value)
    writer.add_tensor("blk.3.ffn_up.weight", np.zeros((4, 32), np.float32))
    finish(writer)
    return path


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"split__no": 1, "split__count": 3}, "part 2 of 3"),
        ({"general__type": "adapter"}, "LoRA adapter"),
        ({"general__type": "mmproj"}, "multimodal projector"),
        ({"general__type": "imatrix"}, "importance matrix"),
    ],
)
def test_a_file_that_is_no_whole_model_is_told(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(mien.ModelNotFound, match=said):
        fingerprint_of(write_gguf(tmp_path / "m-00002-of-00003.gguf", **keys))


def test_the_first_part_of_a_split_model_describes_it(tmp_path: Path) -> None:
    keys = {"split__no": 0, "split__count": 3, "llama__block_count": 4, "llama__embedding_length": 64}
    found = fingerprint_of(write_gguf(tmp_path / "m-00001-of-00003.gguf", **keys))
    assert (found.architecture, found.n_layer, found.n_embd) == ("llama", 4, 64)


# ---- encoders and decoders ----


def encode(context: Any) -> None:
    batch = new_batch(PROMPT)
    assert api.llama_encode(context, batch) == 0
    api.llama_batch_free(batch)


@pytest.mark.parametrize("path", ["in-graph", "post-compute"])
def test_an_encoder_decoder_is_steered_in_both_parts(opened: Callable[..., Contexts], path: str) -> None:
    """As llama.cpp's own control vector does it."""
    contexts = opened("t5")
    plain, own = (contexts.make(hooked=False, **EXACT) for _ in range(2))
    set_own(own)
    context = contexts.make(path=path, **EXACT)
    steering = mien.attach(context)
    answer = [Row(0, 0), Row(5, 1), Row(6, 2)]

    def logits(context: Any, decode: Any = None) -> Floats:
        api.llama_memory_clear(api.llama_get_memory(context), True)
        encode(context)
        return np.stack([*evaluate(context, decode, answer).values()])

    expected = logits(plain)
    assert np.array_equal(logits(context, steering.decode), expected)
    steering.set(VECTOR)
    assert np.array_equal(logits(context, steering.decode), logits(own))
    assert {done.rows for done in steering.applied.layers.values()} == {3}
    steering.clear()
    assert np.array_equal(logits(context, steering.decode), expected)
    assert not np.isclose(logits(own), expected).all()


def test_an_encoder_decoder_can_be_attached_as_a_llama(tmp_path: Path) -> None:
    llm = load_llama(build_family("t5", tmp_path), n_ctx=64)
    steering = mien.attach(llm)
    steering.set(VECTOR)
    assert steering.capture([5, 6, 7], last=3).shape == (N_LAYER, 3, N_EMBD)
    steering.detach()
    llm.close()


def embeddings(context: Any, texts: list[list[int]], decode: Any = None) -> list[Floats]:
    """Of each text's tokens; the texts are sequences of one batch."""
    api.llama_memory_clear(api.llama_get_memory(context), True)  # T5's encoder has one, without a use for it
    rows = [Row(t, i, (s,)) for s, tokens in enumerate(texts) for i, t in enumerate(tokens)]
    batch = new_batch(rows)
    assert (decode(batch) if decode else api.llama_decode(context, batch)) == 0
    api.llama_batch_free(batch)
    every = [
        np.ctypeslib.as_array(api.llama_get_embeddings_ith(context, i), shape=(N_EMBD,)).copy()
        for i in range(len(rows))
    ]
    return [np.stack([e for e, row in zip(every, rows) if row.sequences == (s,)]) for s in range(len(texts))]


def test_the_encoder_of_t5_alone_is_steered(opened: Callable[..., Contexts]) -> None:
    contexts = opened("t5encoder")
    own = contexts.make(hooked=False, embeddings=True, **EXACT)
    set_own(own)
    context = contexts.make(embeddings=True, **EXACT)
    steering = mien.attach(context)
    text = [[5, 6, 7, 8]]
    plain = embeddings(context, text, steering.decode)[0]
    steering.set(VECTOR)
    found = embeddings(context, text, steering.decode)[0]
    assert np.array_equal(found, embeddings(own, text)[0])
    assert not np.isclose(found, plain).all()


def test_texts_that_are_embedded_together_have_recipes_of_their_own(opened: Callable[..., Contexts]) -> None:
    contexts = opened("gemma-embedding")
    options = {**EXACT, "embeddings": True, "n_ubatch": 64}
    texts = [[5, 6, 7], [8, 9, 10, 11], [12, 13]]
    context = contexts.make(3, **options)
    steering = mien.attach(context)
    steering.set([VECTOR, None, -2.0 * VECTOR])
    found = embeddings(context, texts, steering.decode)
    assert {done.rows for done in steering.applied.layers.values()} == {5}
    alone = contexts.make(**options)
    one = mien.attach(alone)
    for text, recipe, ours in zip(texts, (VECTOR, None, -2.0 * VECTOR), found):
        one.set(recipe)
        np.testing.assert_allclose(ours, embeddings(alone, [text], one.decode)[0], rtol=0, atol=1e-5)


# ---- diffusion models, which have no cache and generate ----


def test_the_sites_of_a_model_without_a_cache_are_found(opened: Callable[..., Contexts]) -> None:
    contexts = opened("llada")
    options = {**EXACT, "n_ubatch": 64}
    context = contexts.make(**options)
    assert api.llama_get_memory(context) is None
    steering = mien.attach(context)
    assert {*steering.describe()["sites"].split(", ")} == {*SITES} - {"experts"}
    plain = evaluate(context, steering.decode, PROMPT)
    for site, width in (("attention", N_EMBD), ("neurons", 96)):
        steering.set(Vector("v", (1,), np.ones((1, width), np.float32), site=site))
        found = evaluate(context, steering.decode, PROMPT)
        assert all(not np.isclose(found[key], plain[key]).all() for key in plain)
        assert steering.applied.sites[site][1].rows == len(PROMPT)
    assert steering.capture([row.token for row in PROMPT], last=9).shape == (N_LAYER, 9, N_EMBD)
    assert all(logits.shape == (N_VOCAB,) for logits in plain.values())
