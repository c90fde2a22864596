"""Every architecture that llama.cpp steers, and a tiny model can be made of, is steered as llama.cpp does it.

The vectors of the other tests act in the families of tiny.py; here it is told, for all others, that the
residual stream is found where it is. Nothing is known of what transformers would compute.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as api
import mien
import numpy as np
import pytest
from families import ARCHITECTURES, N_EMBD, N_LAYER, build_family
from llama_batches import Contexts, Row, new_batch
from mien.modelfile import fingerprint_of
from mien.recipe import Recipe, Term
from mien.runtimes.llama_sites import Located, Search, scout
from mien.vector import Floats, Vector
from tiny import N_VOCAB

PATHS = ["in-graph", "post-compute"]
# Embedding models. llama.cpp's own control vector acts in the first, and does nothing in the others, whose
# graphs do not name what a block puts out.
STEERED_ENCODERS = ["gemma-embedding", "llama-embed"]
UNNAMED = ["bert", "eurobert", "jina-bert-v2", "jina-bert-v3", "modern-bert", "neo-bert", "nomic-bert"]
# llama.cpp has no control vectors for these, or, in Nemotron-H, for some of the blocks alone.
OWN_WAY = ["hy_v4", "qwen4exp"]
PARTLY = ["nemotron_h", "nemotron_h_moe"]
ENCODER_DECODERS = ["t5", "t5encoder"]
STEERED = sorted({*ARCHITECTURES} - {*UNNAMED, *OWN_WAY, *PARTLY, *ENCODER_DECODERS})
# Where the node is called otherwise than l_out-N.
RENAMED = {
    "deepseek4": [f"l_last-{layer}" for layer in range(N_LAYER)],
    # Its last block puts out four streams, and what follows takes their mean.
    "glm5-next": ["l_out-0", "l_out-1", "l_out-2", "hc_head"],
    "nemotron_h": [f"nemotron_h_block_out-{layer}" for layer in range(N_LAYER)],
    "nemotron_h_moe": [f"nemotron_h_block_out-{layer}" for layer in range(N_LAYER)],
    "qwen4exp": [f"l_last-{layer}" for layer in range(N_LAYER)],
    "step35": ["attn_norm_in-1", "attn_norm_in-2", "attn_norm_in-3", "h_nextn"],
}

STREAMS = {"deepseek4": 4, "gemma3n": 4, "glm5-next": 4, "hy_v4": 2, "qwen4exp": 2}
LOOPED = ["hrm_text"]  # the same blocks are run again and again, under new numbers

PROMPT = np.random.default_rng(0).integers(3, N_VOCAB, size=21).tolist()
ROWS = (0.4 * np.random.default_rng(1).standard_normal((N_LAYER - 1, N_EMBD))).astype(np.float32)
VECTOR = Vector("v", tuple(range(1, N_LAYER)), ROWS)


class Family:
    """A model of one architecture. embeds: what comes out of it is embeddings, else logits."""

    def __init__(self, architecture: str, folder: Path) -> None:
        self.architecture = architecture
        self.contexts = Contexts(build_family(architecture, folder))
        self.embeds = architecture in (*STEERED_ENCODERS, *UNNAMED, "t5encoder")

    def make(self, **options: Any) -> Any:
        """A context of micro-batches of 8 tokens; of an encoder it takes all tokens at once."""
        plain = {"type_k": api.GGML_TYPE_F16, "type_v": api.GGML_TYPE_F16, "flash_attn_type": 0}
        sizes = {"n_ctx": 64, "n_batch": 64, "n_ubatch": 8, "embeddings": self.embeds}
        context = self.contexts.make(**{**plain, **sizes, **options})
        if api.llama_get_memory(context) is None and "n_ubatch" not in options:
            self.contexts.free(context)
            return self.make(**options, n_ubatch=64)
        return context

    def outputs(self, context: Any, decode: Callable[[Any], int] | None = None) -> Floats:
        """A prompt, then two tokens one at a time where there is a cache. decode: a Steering's."""
        memory = api.llama_get_memory(context)
        batches = [[Row(token, i, wanted=i in (5, 20)) for i, token in enumerate(PROMPT)]]
        if memory is not None:
            api.llama_memory_clear(memory, True)
            batches += [[Row(40, 21)], [Row(41, 22)]]
        found = []
        for rows in batches:
            batch = new_batch(rows)
            assert (decode(batch) if decode else api.llama_decode(context, batch)) == 0
            api.llama_batch_free(batch)
            found += [self.output(context, i) for i, row in enumerate(rows) if row.wanted]
        return np.stack(found)

    def output(self, context: Any, i: int) -> Floats:
        get = api.llama_get_embeddings_ith if self.embeds else api.llama_get_logits_ith
        width = N_EMBD if self.embeds else N_VOCAB
        return np.ctypeslib.as_array(get(context, i), shape=(width,)).copy()

    def plain(self) -> Floats:
        return self.outputs(self.make(hooked=False))

    def own(self, first: int = 1, last: int = N_LAYER - 1) -> Floats:
        """Under llama.cpp's own control vector."""
        context = self.make(hooked=False)
        data = ROWS.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        assert api.llama_set_adapter_cvec(context, data, ROWS.size, N_EMBD, first, last) == 0
        return self.outputs(context)

    def steered(self, vector: Vector, path: str = "auto") -> Floats:
        context = self.make(path=path)
        steering = mien.attach(context)
        steering.set(vector)
        return self.outputs(context, steering.decode)


@pytest.fixture
def open_family(tmp_path: Path) -> Iterator[Callable[[str], Family]]:
    opened = []

    def open_family(architecture: str) -> Family:
        opened.append(Family(architecture, tmp_path))
        return opened[-1]

    yield open_family
    for family in opened:
        family.contexts.close()


def test_most_of_what_llama_cpp_builds_is_here() -> None:
    assert len(STEERED) >= 100
    assert {*RENAMED, *STEERED_ENCODERS, *UNNAMED, *ENCODER_DECODERS} <= {*ARCHITECTURES}


@pytest.mark.parametrize("architecture", STEERED)
def test_steering_is_bit_equal_to_llama_cpps_own_control_vector(
    architecture: str, open_family: Callable[[str], Family]
) -> None:
    family = open_family(architecture)
    plain, own = family.plain(), family.own()
    assert np.isfinite(plain).all()
    assert not np.isclose(own, plain).all()
    for path in PATHS:
        context = family.make(path=path)
        steering = mien.attach(context)
        assert steering.model == fingerprint_of(family.contexts.path)
        assert np.array_equal(family.outputs(context, steering.decode), plain)
        steering.set(VECTOR)
        assert np.array_equal(family.outputs(context, steering.decode), own)
        assert list(steering.applied.layers) == [1, 2, 3]
        steering.clear()
        assert np.array_equal(family.outputs(context, steering.decode), plain)


@pytest.mark.parametrize("architecture", sorted({*STEERED, *OWN_WAY, *PARTLY} - {*LOOPED}))
def test_weights_tell_where_a_block_ends_as_the_names_do(
    architecture: str, open_family: Callable[[str], Family]
) -> None:
    context = open_family(architecture).make()
    nodes = scout(mien.attach(context)._attached().hook, context)  # type: ignore[attr-defined]
    outputs = Search(nodes, N_LAYER, Located(), architecture).block_outputs()
    names = RENAMED.get(architecture, [f"l_out-{layer}" for layer in range(N_LAYER)])
    assert {layer: node.name for layer, node in outputs.items()} == dict(enumerate(names))
    assert {node.width for node in outputs.values()} == {N_EMBD}


@pytest.mark.parametrize("architecture", OWN_WAY)
def test_both_paths_agree_where_llama_cpp_has_no_control_vectors(
    architecture: str, open_family: Callable[[str], Family]
) -> None:
    family = open_family(architecture)
    plain = family.plain()
    assert np.array_equal(family.own(), plain)
    one, other = (family.steered(VECTOR, path) for path in PATHS)
    assert np.array_equal(one, other)
    assert not np.isclose(one, plain).all()


@pytest.mark.parametrize("architecture", PARTLY)
def test_every_block_is_steered_where_llama_cpp_steers_only_mlps(
    architecture: str, open_family: Callable[[str], Family]
) -> None:
    """There it adds the vector to what an MLP puts out, before that goes into the residual stream."""
    family = open_family(architecture)
    plain = family.plain()
    assert np.array_equal(family.own(1, 1), plain)
    attention, mlp = (Vector("v", (layer,), ROWS[layer - 1 : layer]) for layer in (1, 2))
    for path in PATHS:
        assert not np.isclose(family.steered(attention, path), plain).all()
        np.testing.assert_allclose(family.steered(mlp, path), family.own(2, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("architecture", "streams"), STREAMS.items())
def test_several_residual_streams_are_steered_alike_or_not_at_all(
    architecture: str, streams: int, open_family: Callable[[str], Family]
) -> None:
    family = open_family(architecture)
    context = family.make()
    steering = mien.attach(context)
    for ask in (lambda: steering.watch(VECTOR), lambda: steering.capture(PROMPT)):
        with pytest.raises(mien.SiteNotFound, match=f"{streams} residual streams in {architecture} models"):
            ask()
    plain = family.outputs(context, steering.decode)
    steering.set(Recipe((Term(1.0, VECTOR, start=1),)))
    with pytest.raises(mien.SteeringNotApplied, match=f"{streams} residual streams") as error:
        family.outputs(context, steering.decode)
    assert error.value.layers == (1, 2, 3)
    steering.clear()
    assert np.array_equal(family.outputs(context, steering.decode), plain)


@pytest.mark.parametrize("architecture", UNNAMED)
def test_an_encoder_whose_blocks_are_not_known_is_left_alone_and_said(
    architecture: str, open_family: Callable[[str], Family]
) -> None:
    family = open_family(architecture)
    plain = family.plain()
    context = family.make()
    steering = mien.attach(context)
    assert np.array_equal(family.outputs(context, steering.decode), plain)
    for ask in (
        lambda: steering.set(VECTOR),
        lambda: steering.watch(VECTOR),
        lambda: steering.capture(PROMPT),
    ):
        with pytest.raises(mien.SiteNotFound, match=f"not known in {architecture} models") as error:
            ask()
        assert error.value.site == "residual"
    assert not steering.recipe.terms
    assert np.array_equal(family.outputs(context, steering.decode), plain)
