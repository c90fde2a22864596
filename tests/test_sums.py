"""Sums that differ from one before in their doses alone compile to the same programs as any recipe does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import mien
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from makers import DictRegistry, make_vector
from mien.program import Program, compile_recipe
from mien.recipe import parse
from mien.runtimes.fake import NumpyModel

MODEL = NumpyModel()
KEPT = {"model_hint": "numpy", "fingerprint": MODEL.fingerprint}
VECTORS = [
    make_vector("a", (1, 2), 1, **KEPT),
    make_vector("b", (1, 3), 2, **KEPT),
    make_vector("late", (2, 3), 3, meta={"when": "response"}, **KEPT),
    make_vector("early", (1,), 4, meta={"when": "prompt"}, **KEPT),
    make_vector("high", (1, 2, 3), 5, site="mlp", **KEPT),
]
REGISTRY = DictRegistry(*VECTORS, replace(VECTORS[0], name="twin"))
NAMES = sorted(REGISTRY.vectors)
# Also what cancels, what is not finite in float32, and what is too small for it.
DOSES = st.sampled_from([0.5, -0.25, 1.0, 1e-46, 3e38, 0.1])


def same(one: Program, other: Program) -> bool:
    for a, b in zip((one.prompt, one.response), (other.prompt, other.response)):
        if (a.key, a.places) != (b.key, b.places):
            return False
        for site, layers in a.places.items():
            assert a.compiled is not None
            assert b.compiled is not None
            for layer in layers:
                pair = (part.compiled.direction(layer, "add", site) for part in (a, b))
                if not np.array_equal(*pair):
                    return False
    return one.recipe == other.recipe and (one.prompt is one.response) == (other.prompt is other.response)


@given(names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True), data=st.data())
def test_a_sum_compiles_as_any_recipe_does(names: list[str], data: st.DataObject) -> None:
    with mien.attach(NumpyModel(), registry=REGISTRY) as steering:
        for _ in range(3):
            text = " + ".join(f"{data.draw(DOSES)!r}*{name}" for name in names)
            recipe = parse(text)
            try:
                expected = compile_recipe(
                    recipe, steering.model, REGISTRY.vectors.__getitem__, steering._runtime
                )
            except mien.MienError as error:
                with pytest.raises(type(error)):
                    steering.compile(text)
                continue
            assert same(steering.compile(text), expected)


def test_a_name_that_was_given_another_vector_is_the_other() -> None:
    with mien.attach(NumpyModel(), registry=REGISTRY) as steering:
        first = steering.compile("a + b")
        steering.define("a", VECTORS[4])
        second = steering.compile("a + b")
        assert set(first.prompt.places) == {"residual"}
        assert set(second.prompt.places) == {"residual", "mlp"}


def test_threads_compile_sums_of_the_same_vectors() -> None:
    with mien.attach(NumpyModel(), registry=REGISTRY) as steering:
        texts = [f"{0.001 * i + 0.1}*a + {1 - 0.001 * i}*b" for i in range(400)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(steering.compile, texts))
        for text, program in zip(texts, found):
            recipe = parse(text)
            assert same(program, compile_recipe(recipe, steering.model, REGISTRY.vectors.__getitem__, None))
