"""The llama.cpp runtime on the real model: bit for bit against llama.cpp's own control vector."""

from __future__ import annotations

import ctypes
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import llama_cpp.llama_cpp as api
import mien
import numpy as np
import pytest
import tiny
from llama_batches import own_control_vector
from llama_cpp import LlamaDiskCache, LlamaRAMCache
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from mien import reference
from mien.fingerprint import Fingerprint
from mien.recipe import Recipe, Term
from mien.registry import shipped_packs
from mien.runtimes import llama_text
from mien.runtimes.llama import LlamaRuntime
from mien.runtimes.llama_context import fingerprint_of
from mien.runtimes.llama_text import in_float32
from mien.steering import Steering
from mien.vector import Vector

pytestmark = pytest.mark.model

N_LAYER, N_EMBD = 30, 576
PATHS = ["in-graph", "post-compute"]
TEXT = b"The harbour was quiet when the boats came in, and nobody on the pier said a word. " * 8


def make_vector(seed: int = 0, layers: Any = range(1, N_LAYER), size: float = 0.05) -> Vector:
    random = np.random.default_rng(seed)
    rows = (size * random.standard_normal((len(layers), N_EMBD))).astype(np.float32)
    return Vector(f"v{seed}", tuple(layers), rows, model_hint="llama")


def tokens_of(llm: Any, count: int = 80) -> list[int]:
    tokens: list[int] = llm.tokenize(TEXT)[:count]
    return tokens


def logits_of(llm: Any, rows: int = 1) -> np.ndarray:
    return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(rows, llm.n_vocab())).copy()


def prefill_and_decode(llm: Any, count: int = 80) -> list[np.ndarray]:
    """Logits after a prefill of several micro-batches, and after each of three decoded tokens."""
    tokens = tokens_of(llm, count)
    llm.reset()
    llm.eval(tokens)
    found = [llm.scores[:count].copy() if llm._logits_all else logits_of(llm)]
    for token in tokens[3:6]:
        llm.eval([token])
        found.append(logits_of(llm))
    return found


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def set_own_control_vector(llm: Any, vector: Vector) -> None:
    own_control_vector(llm._ctx.ctx, vector, N_LAYER)


def reply(llm: Any, prompt: str = "How was your day?", count: int = 12) -> str:
    answer = llm.create_chat_completion(
        [{"role": "user", "content": prompt}], max_tokens=count, temperature=0.0
    )
    return str(answer["choices"][0]["message"]["content"])


# ---- the same floats as llama.cpp itself ----


@pytest.mark.usefixtures("all_processors")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logits_all": True},
        {"n_threads": 1},
        {"n_threads": 4},
        {"n_ubatch": 64},
        {"n_ubatch": 7},
        {"flash_attn": True},
    ],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()) or "plain",
)
def test_logits_equal_those_of_llama_cpps_own_control_vector(
    load: Callable[..., Any], path: str, options: dict[str, Any]
) -> None:
    vector = make_vector()
    own, llm = load(**options), load(**options)
    plain = prefill_and_decode(own)
    set_own_control_vector(own, vector)
    steering = mien.attach(llm, path=path)
    steering.set(vector)
    steered = prefill_and_decode(llm)
    assert same(steered, prefill_and_decode(own))
    assert not same(steered, plain)
    assert {done.path for done in steering.applied.layers.values()} == {path}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layer", [1, 2, 15, N_LAYER - 1])
def test_a_single_layer_acts_where_llama_cpp_has_it(load: Callable[..., Any], path: str, layer: int) -> None:
    """An off-by-one in layers would show here and nowhere else."""
    vector = make_vector(layers=[layer], size=0.5)
    own, llm = load(), load()
    set_own_control_vector(own, vector)
    mien.attach(llm, path=path).set(vector)
    assert same(prefill_and_decode(llm), prefill_and_decode(own))


@pytest.mark.parametrize("path", PATHS)
def test_a_recipe_equals_the_same_sum_in_llama_cpp(load: Callable[..., Any], path: str) -> None:
    a, b = make_vector(1), make_vector(2, layers=range(5, 20))
    own, llm = load(), load()
    total = np.zeros((N_LAYER - 1, N_EMBD), dtype=np.float64)
    for digest_order in sorted([(a, 0.8), (b, -0.3)], key=lambda pair: pair[0].digest):
        for layer, row in digest_order[0].directions.items():
            total[layer - 1] += digest_order[1] * row.astype(np.float64)
    set_own_control_vector(own, Vector("sum", tuple(range(1, N_LAYER)), total.astype(np.float32)))
    mien.attach(llm, path=path, registry=Named(a=a, b=b)).set("0.8*a - 0.3*b")
    assert same(prefill_and_decode(llm), prefill_and_decode(own))


@pytest.mark.parametrize("path", PATHS)
def test_it_works_beside_a_control_vector_set_through_llama_cpp(load: Callable[..., Any], path: str) -> None:
    """Then l_out is an ADD with one broadcast row, which the in-graph path must not take.

    The two act at different layers, so that no rounding differs from their sum.
    """
    a, b = make_vector(1, layers=range(1, N_LAYER, 2)), make_vector(2, layers=range(2, N_LAYER, 2))
    llm, both = load(), load()
    steering = mien.attach(llm, path=path)
    set_own_control_vector(llm, a)
    steering.set(b)
    mien.attach(both).set(a + b)
    llm.eval(tokens_of(llm, 2))
    assert {done.path for done in steering.applied.layers.values()} == {"post-compute"}
    assert same(prefill_and_decode(llm), prefill_and_decode(both))


def read_as_llama_cpp_does(path: Path) -> np.ndarray:
    """The buffer that llama.cpp's loader fills: layer 1 first, and the whole file refused for what is not
    direction.N with N from 1, F32 and one-dimensional."""
    rows = np.zeros((N_LAYER - 1, N_EMBD), dtype=np.float32)
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "controlvector"
    for tensor in reader.tensors:
        prefix, _, number = tensor.name.rpartition(".")
        assert prefix == "direction"
        assert int(number) >= 1
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert list(tensor.shape) == [N_EMBD]
        rows[int(number) - 1] = tensor.data
    return rows


@pytest.mark.parametrize("path", PATHS)
def test_a_shipped_file_means_the_same_to_llama_cpps_own_loader(load: Callable[..., Any], path: str) -> None:
    own, llm = load(), load()
    rows = read_as_llama_cpp_does(shipped_packs() / "smollm2-135m-instruct" / "joy.gguf")
    data = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    assert api.llama_set_adapter_cvec(own._ctx.ctx, data, rows.size, N_EMBD, 1, N_LAYER - 1) == 0
    # llama.cpp knows nothing of mien.when.
    mien.attach(llm, path=path).set("joy(when='all')")
    assert same(prefill_and_decode(llm), prefill_and_decode(own))


# ---- nothing left behind ----


@pytest.mark.parametrize("path", PATHS)
def test_cleared_and_empty_are_bit_identical_to_untouched(load: Callable[..., Any], path: str) -> None:
    plain = prefill_and_decode(load())
    llm = load()
    steering = mien.attach(llm, path=path)
    assert same(prefill_and_decode(llm), plain)
    steering.set(make_vector())
    assert not same(prefill_and_decode(llm), plain)
    for nothing in ("", "0", {}, None, make_vector() * 0.0):
        steering.set(make_vector())
        steering.set(nothing)
        assert same(prefill_and_decode(llm), plain)
    steering.clear()
    assert same(prefill_and_decode(llm), plain)
    assert steering.applied.layers == {}


@pytest.mark.parametrize("path", PATHS)
def test_set_and_cleared_a_hundred_times_mid_generation(load: Callable[..., Any], path: str) -> None:
    """Set and cleared between tokens, nothing may show: each token is evaluated under no recipe."""
    plain, llm = load(), load()
    steering = mien.attach(llm, path=path)
    vector = make_vector()
    tokens = tokens_of(plain, 108)
    plain.eval(tokens[:8])
    llm.eval(tokens[:8])
    for token in tokens[8:]:
        steering.set(vector)
        steering.clear()
        plain.eval([token])
        llm.eval([token])
        assert np.array_equal(logits_of(llm), logits_of(plain))


@pytest.mark.parametrize("path", PATHS)
def test_alternating_tokens_equal_llama_cpps_own_alternation(load: Callable[..., Any], path: str) -> None:
    """Hot swap: every other token steered, against llama.cpp's own vector set and unset."""
    own, llm = load(), load()
    steering = mien.attach(llm, path=path)
    vector, nothing = make_vector(), make_vector() * 0.0
    tokens = tokens_of(own, 40)
    own.eval(tokens[:8])
    llm.eval(tokens[:8])
    for i, token in enumerate(tokens[8:]):
        set_own_control_vector(own, vector if i % 2 else nothing)
        steering.set(vector if i % 2 else None)
        own.eval([token])
        llm.eval([token])
        assert np.array_equal(logits_of(llm), logits_of(own))


def test_detach_leaves_the_object_as_it_was(load: Callable[..., Any]) -> None:
    llm = load()
    plain = prefill_and_decode(llm)
    llm.set_cache(cache := LlamaRAMCache())
    kinds, names = (type(llm), type(llm._ctx)), (set(vars(llm)), set(vars(llm._ctx)))
    wrapper, batch = llm._ctx, llm._batch
    steering = mien.attach(llm)
    assert isinstance(llm, llama_cpp.Llama)
    steering.set(make_vector())
    prefill_and_decode(llm)
    steering.detach()
    assert (type(llm), type(llm._ctx)) == kinds
    assert (set(vars(llm)), set(vars(llm._ctx))) == names
    assert llm._ctx is wrapper
    assert llm._batch is batch
    assert llm.cache is cache
    assert not ctypes.cast(llm._ctx.params.cb_eval, ctypes.c_void_p).value
    assert llm.n_tokens == 0  # what was cached was steered
    assert same(prefill_and_decode(llm), plain)
    steering.detach()
    with pytest.raises(mien.RuntimeNotSupported, match="detached"):
        steering.set("joy")


def test_detach_keeps_an_unsteered_context(load: Callable[..., Any]) -> None:
    llm, plain = load(), load()
    tokens = tokens_of(llm, 20)
    for each in (llm, plain):
        each.eval(tokens)
    steering = mien.attach(llm)
    assert llm.n_tokens == 20
    llm.eval(tokens[:1])
    plain.eval(tokens[:1])
    assert np.array_equal(logits_of(llm), logits_of(plain))
    steering.detach()
    assert llm.n_tokens == 21
    llm.eval(tokens[:1])
    plain.eval(tokens[:1])
    assert np.array_equal(logits_of(llm), logits_of(plain))


def test_a_model_keeps_being_steered_without_its_handle_and_dies_with_its_last_reference(
    load: Callable[..., Any], model_path: Path
) -> None:
    from mien.runtimes.llama_text import load_llama

    llm = load_llama(model_path, n_ctx=128, n_threads=2)
    plain = prefill_and_decode(llm, 20)
    mien.attach(llm).set(make_vector())
    gc.collect()
    assert not same(prefill_and_decode(llm, 20), plain)
    dead = weakref.ref(llm)
    llm.close()
    del llm
    gc.collect()
    assert dead() is None


def test_attach_carries_threads_and_context_over(load: Callable[..., Any]) -> None:
    llm = load(n_threads=1)
    api.llama_set_n_threads(llm._ctx.ctx, 3, 4)
    before = llm.n_ctx()
    mien.attach(llm)
    assert api.llama_n_threads(llm._ctx.ctx) == 3
    assert api.llama_n_threads_batch(llm._ctx.ctx) == 4
    assert llm.n_ctx() == before


# ---- the KV cache never mixes recipes ----


def fresh_reply(load: Callable[..., Any], recipe: Any, prompt: str = "How was your day?") -> str:
    llm = load()
    mien.attach(llm).set(recipe)
    return reply(llm, prompt)


@pytest.mark.parametrize("path", PATHS)
def test_the_same_prompt_under_another_recipe_equals_a_fresh_process(
    load: Callable[..., Any], path: str
) -> None:
    strong, other = make_vector(3, size=0.4), make_vector(4, size=0.4)
    llm = load()
    steering = mien.attach(llm, path=path)
    plain = reply(llm)
    expected = {"strong": fresh_reply(load, strong), "other": fresh_reply(load, other)}
    assert len({plain, *expected.values()}) == 3, "the vectors are too weak for this test to mean anything"
    steering.set(strong)
    assert reply(llm) == expected["strong"]
    steering.set(other)
    assert reply(llm) == expected["other"]
    steering.clear()
    assert reply(llm) == plain
    steering.set(strong)
    assert reply(llm, "How was your night?") == fresh_reply(load, strong, "How was your night?")


def first_logits(llm: Any, tokens: list[int]) -> np.ndarray:
    next(llm.generate(tokens, temp=0.0))
    return logits_of(llm)


def test_first_token_logits_follow_the_recipe_although_the_prefix_is_cached(
    load: Callable[..., Any],
) -> None:
    vector = make_vector(3, size=0.4)
    fresh, llm = load(), load()
    tokens = tokens_of(llm, 30)
    mien.attach(fresh).set(vector)
    expected = first_logits(fresh, tokens)
    steering = mien.attach(llm)
    first_logits(llm, tokens)
    steering.set(vector)
    assert np.array_equal(first_logits(llm, tokens), expected)


def test_the_same_recipe_reuses_its_prefix(load: Callable[..., Any]) -> None:
    llm = load()
    steering = mien.attach(llm)
    vector = make_vector()
    tokens = tokens_of(llm, 30)
    steering.set(vector)
    first_logits(llm, tokens)
    first_logits(llm, [*tokens, tokens[0], tokens[1]])
    rows = {done.rows for done in steering.applied.layers.values()}
    assert rows == {2, 1}  # only the new tokens; in the last block only the one with logits
    steering.set(2 * vector - vector)  # the same floats, written otherwise
    first_logits(llm, [*tokens, tokens[0], tokens[1], tokens[2]])
    assert {done.rows for done in steering.applied.layers.values()} == {1}


def test_mix_cache_reuses_what_another_recipe_computed(load: Callable[..., Any]) -> None:
    llm = load()
    steering = mien.attach(llm, mix_cache=True)
    tokens = tokens_of(llm, 30)
    first_logits(llm, tokens)
    steering.set(make_vector())
    first_logits(llm, [*tokens, tokens[0]])
    assert {done.rows for done in steering.applied.layers.values()} == {1}


def test_a_swap_between_tokens_of_a_stream_leaves_no_mixed_prefix(load: Callable[..., Any]) -> None:
    llm = load()
    steering = mien.attach(llm)
    vector = make_vector(3, size=0.4)
    expected = fresh_reply(load, vector)
    stream = llm.create_chat_completion(
        [{"role": "user", "content": "How was your day?"}], max_tokens=12, temperature=0.0, stream=True
    )
    for i, _ in enumerate(stream):
        steering.set(vector if i > 3 else None)
    assert reply(llm) == expected


def test_a_swap_from_a_logits_processor_acts_on_the_next_token(load: Callable[..., Any]) -> None:
    vector = make_vector(3, size=0.4)
    llm, by_hand = load(), load()
    steering, hand = mien.attach(llm), mien.attach(by_hand)
    prompt = tokens_of(llm, 10)
    calls = 0

    def swap_at_third(input_ids: Any, scores: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            steering.set(vector)
        return scores

    processors = llama_cpp.LogitsProcessorList([swap_at_third])
    stream = llm.generate(prompt, temp=0.0, logits_processor=processors)
    tokens = [next(stream) for _ in range(6)]
    by_hand.eval(prompt)
    expected = []
    for i in range(6):
        expected.append(int(logits_of(by_hand)[0].argmax()))
        if i == 2:
            hand.set(vector)
        by_hand.eval(expected[-1:])
    assert tokens == expected


def test_a_saved_state_remembers_its_recipe(load: Callable[..., Any]) -> None:
    llm = load()
    steering = mien.attach(llm)
    vector = make_vector(3, size=0.4)
    expected, plain = fresh_reply(load, vector), reply(load())
    steering.set(vector)
    assert reply(llm) == expected
    state = pickle.loads(pickle.dumps(llm.save_state()))
    steering.clear()
    assert reply(llm) == plain
    llm.load_state(state)
    assert reply(llm) == plain
    llm.load_state(state)
    steering.set(vector)
    assert reply(llm) == expected


def test_a_state_saved_before_attaching_counts_as_unsteered(load: Callable[..., Any]) -> None:
    llm = load()
    plain = reply(llm)
    state = llm.save_state()
    steering = mien.attach(llm)
    vector = make_vector(3, size=0.4)
    steering.set(vector)
    llm.load_state(state)
    assert reply(llm) == fresh_reply(load, vector)
    steering.clear()
    llm.load_state(state)
    assert reply(llm) == plain


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_a_cache_of_states_keeps_recipes_apart_also_after_detach(
    load: Callable[..., Any], kind: str, tmp_path: Any
) -> None:
    cache = LlamaRAMCache() if kind == "ram" else LlamaDiskCache(str(tmp_path))
    llm = load()
    plain = reply(load())
    vector = make_vector(3, size=0.4)
    expected = fresh_reply(load, vector)
    steering = mien.attach(llm)
    llm.set_cache(cache)
    for _ in range(2):
        steering.set(vector)
        assert reply(llm) == expected
        steering.clear()
        assert reply(llm) == plain
    steering.set(vector)
    assert reply(llm) == expected
    steering.detach()
    assert reply(llm) == plain
    if kind == "disk":
        cache.cache.close()


def test_a_cache_under_one_recipe_is_hit(load: Callable[..., Any]) -> None:
    llm = load()
    steering = mien.attach(llm)
    llm.set_cache(LlamaRAMCache())
    steering.set(make_vector())
    first = reply(llm)
    llm.reset()
    assert reply(llm) == first
    assert max(done.rows for done in steering.applied.layers.values()) == 1  # nothing was prefilled again


# ---- windows ----


def windowed(vector: Vector, when: str) -> Recipe:
    return Recipe((Term(1.0, vector, when),))


def steps(llm: Any, prompt: list[int], count: int, **options: Any) -> tuple[list[int], list[np.ndarray]]:
    """The next `count` tokens, and the logits that each was taken from."""
    stream = llm.generate(prompt, temp=0.0, **options)
    found = [(next(stream), logits_of(llm)) for _ in range(count)]
    stream.close()
    return [token for token, _ in found], [logits for _, logits in found]


def by_hand(
    steering: Steering, llm: Any, prompt: list[int], reply: list[int], *recipes: Any
) -> list[np.ndarray]:
    """The same logits from the same batches without windows: the first of `recipes` is set before the
    prompt is evaluated, the second before the tokens of the reply."""
    steering.set(recipes[0])
    llm.eval(prompt)
    found = [logits_of(llm)]
    steering.set(recipes[1])
    for token in reply[:-1]:
        llm.eval([token])
        found.append(logits_of(llm))
    return found


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("count", [1, 30, 129])  # of batches of 64: the last of them is a single token
def test_windows_act_on_the_prompt_and_on_the_reply(load: Callable[..., Any], path: str, count: int) -> None:
    a, b = make_vector(3, size=0.4), make_vector(4, size=0.4)
    both = Recipe((Term(1.0, a, "prompt"), Term(1.0, b, "response")))
    llm, hand, plain = load(), load(), load()
    steering, hands = mien.attach(llm, path=path), mien.attach(hand)
    tokens = tokens_of(llm, count)
    _, unsteered = steps(plain, tokens, 4)
    for recipe, prompt, response in (
        (windowed(a, "response"), None, a),
        (windowed(a, "prompt"), a, None),
        (both, a, b),
    ):
        llm.reset()
        hand.reset()
        steering.set(recipe)
        reply, found = steps(llm, tokens, 4)
        assert same(found, by_hand(hands, hand, tokens, reply, prompt, response))
        assert np.array_equal(found[0], unsteered[0]) == (prompt is None)
        assert not np.array_equal(found[1], unsteered[1])


def test_the_cache_knows_what_was_prompt_and_what_reply(load: Callable[..., Any]) -> None:
    vector = make_vector(3, size=0.4)
    llm = load()
    steering = mien.attach(llm)
    tokens = tokens_of(llm, 80)
    steered = steering.compile(vector).prompt.key
    for when, prompt, response in (("prompt", steered, ()), ("response", (), steered)):
        llm.reset()
        steering.set(windowed(vector, when))
        steps(llm, tokens, 4)
        assert llm._mien.tags == [prompt] * 80 + [response] * 3


@pytest.mark.parametrize("when", ["prompt", "response"])
def test_a_reply_that_is_given_back_is_evaluated_as_prompt(load: Callable[..., Any], when: str) -> None:
    """As a chat does with each turn. A fresh model that only ever sees prompts is the measure."""
    vector = make_vector(3, size=0.4)
    llm, fresh = load(), load()
    mien.attach(llm).set(windowed(vector, when))
    mien.attach(fresh).set(vector if when == "prompt" else None)
    prompt = tokens_of(llm, 30)
    reply, _ = steps(llm, prompt, 8)
    chat = [*prompt, *reply, *prompt[3:6]]
    fresh.eval(prompt)  # what is still valid of the first turn, and in the same batches
    assert np.array_equal(first_logits(llm, chat), first_logits(fresh, chat))
    assert llm._mien.tags == fresh._mien.tags
    steps(llm, chat, 4)
    steps(fresh, chat, 4)
    assert np.array_equal(first_logits(llm, chat), first_logits(fresh, chat))  # only its last token again


@pytest.mark.parametrize("when", ["prompt", "response"])
@pytest.mark.parametrize("count", [1, 5])
def test_tokens_given_without_a_reset_are_prompt(load: Callable[..., Any], when: str, count: int) -> None:
    vector = make_vector(3, size=0.4)
    llm, hand = load(), load()
    mien.attach(llm).set(windowed(vector, when))
    hands, recipes = mien.attach(hand), (vector, None) if when == "prompt" else (None, vector)
    first, second = tokens_of(llm, 20), tokens_of(llm, 30)[20 : 20 + count]
    reply, found = steps(llm, first, 4)
    assert same(found, by_hand(hands, hand, first, reply, *recipes))
    reply, found = steps(llm, second, 4, reset=False)
    assert same(found, by_hand(hands, hand, second, reply, *recipes))


def test_windows_in_chats_do_not_mix(load: Callable[..., Any]) -> None:
    vector = make_vector(3, size=0.4)
    recipes = [None, vector, windowed(vector, "prompt"), windowed(vector, "response")]
    expected = [fresh_reply(load, recipe) for recipe in recipes]
    assert len(set(expected)) == len(recipes), "the vector is too weak for this test to mean anything"
    llm = load()
    steering = mien.attach(llm)
    llm.set_cache(LlamaRAMCache())
    for i in (3, 2, 3, 0, 2, 2, 1, 3, 3):
        steering.set(recipes[i])
        assert reply(llm) == expected[i]
    steering.detach()
    assert reply(llm) == expected[0]


def test_drafted_tokens_are_the_models_own(load: Callable[..., Any]) -> None:
    llm = load(draft_model=LlamaPromptLookupDecoding(num_pred_tokens=4))
    steering = mien.attach(llm)
    vector = make_vector(size=0.01)
    steering.set(windowed(vector, "response"))
    tokens = tokens_of(llm, 40)  # a text that repeats itself, so that drafts are found
    sizes = []
    stream = llm.generate(tokens, temp=0.0)
    for _ in range(12):
        next(stream)
        sizes.append(len(llm._mien.tags))
    stream.close()
    assert max(np.diff(sizes)) > 1, "nothing was drafted"
    assert llm._mien.tags == [()] * 40 + [steering.compile(vector).prompt.key] * (sizes[-1] - 40)


def test_a_stream_ends_as_the_plain_one(load: Callable[..., Any]) -> None:
    llm, plain = load(), load()
    steering = mien.attach(llm)
    tokens, vector = tokens_of(llm, 20), make_vector(3, size=0.4)

    def run(model: Any) -> list[int]:
        return list(model.generate(tokens, temp=0.0, stopping_criteria=lambda ids, _: len(ids) >= 25))

    found = run(llm)
    assert found == run(plain)
    assert len(found) == 5
    steering.set(windowed(vector, "response"))
    run(llm)
    assert llm._mien.tags == [()] * 20 + [steering.compile(vector).prompt.key] * 5


def test_a_stream_left_standing_does_not_say_what_others_evaluate(load: Callable[..., Any]) -> None:
    llm, plain = load(), load()
    steering = mien.attach(llm)
    steering.set(windowed(make_vector(3, size=0.4), "response"))
    left = llm.generate(tokens_of(llm, 5), temp=0.0)
    next(left)
    assert same(prefill_and_decode(llm)[:1], prefill_and_decode(plain)[:1])
    left.close()


@pytest.mark.parametrize("count", [1, 2, 64, 65, 129])
def test_without_generate_many_tokens_are_prompt_and_one_more_is_reply(
    load: Callable[..., Any], count: int
) -> None:
    """Batches are of 64 tokens, so the last one may hold a single token."""
    vector = make_vector(3, size=0.4)
    llm, hand = load(), load()
    mien.attach(llm).set(windowed(vector, "response"))
    tokens = tokens_of(llm, count)
    llm.eval(tokens)
    found = [logits_of(llm)]
    llm.eval(tokens[:1])
    found.append(logits_of(llm))
    assert same(found, by_hand(mien.attach(hand), hand, tokens, tokens[:1] * 2, None, vector))


@pytest.mark.parametrize("when", ["prompt", "response"])
def test_what_is_captured_is_a_prompt(load: Callable[..., Any], when: str) -> None:
    llm = load()
    steering = mien.attach(llm)
    vector = make_vector(3, size=0.4)
    tokens = tokens_of(llm, 65)  # in two batches, the second a single token
    steering.set(vector if when == "prompt" else None)
    expected = steering.capture(tokens, layers=[0, 1, 15], last=3)
    steering.set(windowed(vector, when))
    assert np.array_equal(steering.capture(tokens, layers=[0, 1, 15], last=3), expected)


# ---- norms that are kept ----


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("n_ubatch", [32, 7])
def test_a_kept_norm_is_the_reference_on_captured_rows(
    load: Callable[..., Any], path: str, n_ubatch: int
) -> None:
    vector = make_vector(layers=[10], size=5.0)
    llm = load(n_ubatch=n_ubatch)
    steering = mien.attach(llm, path=path)
    tokens = tokens_of(llm, 50)
    before = steering.capture(tokens, layers=[9, 10, 11], last=50)
    steering.set(Recipe((Term(1.0, vector, keep_norm=True),)))
    after = steering.capture(tokens, layers=[9, 10, 11], last=50)
    assert np.array_equal(after[0], before[0])
    np.testing.assert_array_max_ulp(after[1], reference.add_keep_norm(before[1], vector.rows[0]), maxulp=4)
    norms = [np.linalg.norm(rows.astype(np.float64), axis=1) for rows in (before[1], after[1])]
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-6)
    assert not np.array_equal(after[2], before[2])
    moved = np.linalg.norm(after[1].astype(np.float64) - before[1], axis=1)
    applied = steering.applied.layers
    assert list(applied) == [10]
    assert (applied[10].rows, applied[10].path) == (50, path)
    assert applied[10].shift == pytest.approx(np.sqrt((moved**2).mean()), rel=4e-6)


@pytest.mark.usefixtures("all_processors")
@pytest.mark.parametrize("options", [{}, {"n_threads": 4}, {"n_ubatch": 7}], ids=str)
def test_both_paths_keep_norms_alike(load: Callable[..., Any], options: dict[str, Any]) -> None:
    a, b = make_vector(1), make_vector(2, layers=range(5, 20), size=0.5)
    recipe = Recipe((Term(-1.0, b, keep_norm=True), Term(1.0, a)))
    found = []
    for path in PATHS:
        llm = load(**options)
        steering = mien.attach(llm, path=path)
        steering.set(a)
        added = prefill_and_decode(llm, 40)
        steering.set(recipe)
        found.append(prefill_and_decode(llm, 40))
        assert {done.path for done in steering.applied.layers.values()} == {path}
        assert not same(found[-1], added)
        steering.clear()
    assert same(*found)


# ---- what was really done ----


@pytest.mark.parametrize("path", PATHS)
def test_applied_agrees_with_an_independent_capture(load: Callable[..., Any], path: str) -> None:
    llm = load()
    steering = mien.attach(llm, path=path)
    tokens = tokens_of(llm, 50)
    before = steering.capture(tokens, layers=[9, 10], last=50)
    vector = make_vector(layers=[10], size=0.5)
    steering.set(vector)
    after = steering.capture(tokens, layers=[9, 10], last=50)
    assert np.array_equal(before[0], after[0])
    assert np.array_equal(before[1] + vector.rows[0], after[1])
    moved = np.linalg.norm(after[1].astype(np.float64) - before[1], axis=1)
    applied = steering.applied.layers
    assert list(applied) == [10]
    assert applied[10].rows == 50
    assert applied[10].path == path
    assert applied[10].shift == pytest.approx(np.sqrt((moved**2).mean()), rel=4e-6)


def test_capture_takes_the_last_block_too(load: Callable[..., Any]) -> None:
    """There only the rows whose logits are asked for are computed."""
    llm = load()
    steering = mien.attach(llm)
    tokens = tokens_of(llm, 100)
    many = steering.capture(tokens, last=70)
    assert many.shape == (N_LAYER, 70, N_EMBD)
    assert np.isfinite(many).all()
    last = steering.capture(tokens)
    assert np.array_equal(last[:-1, 0], many[:-1, -1])
    np.testing.assert_allclose(last[-1, 0], many[-1, -1], rtol=1e-3, atol=1e-2)


def test_blocks_whose_outputs_are_not_found_are_said_before_anything_changes(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for an architecture whose blocks are not all named l_out-N."""
    llm = load()
    more = replace(fingerprint_of(llm._model.model), n_layer=N_LAYER + 2)
    monkeypatch.setattr("mien.runtimes.llama.fingerprint_of", lambda model: more)
    steering = mien.attach(llm)
    with pytest.raises(mien.SiteNotFound, match="not known in llama models") as error:
        steering.set(make_vector(layers=[5, N_LAYER]))
    assert (error.value.site, error.value.layer) in {("residual", 5), ("residual", N_LAYER)}
    assert not steering.recipe.terms


def test_a_program_whose_layers_were_never_met_raises(load: Callable[..., Any]) -> None:
    llm = load()
    steering = mien.attach(llm)
    llm._mien.hook.locate("residual", 7, N_EMBD, "elsewhere")
    steering.set(make_vector(layers=[5, 7]))
    with pytest.raises(mien.SteeringNotApplied, match=r"never evaluated: \[7\] \(residual\)") as error:
        llm.eval(tokens_of(llm, 4))
    assert error.value.layers == (7,)
    assert llm._mien.tags == []


def test_two_models_stay_apart(load: Callable[..., Any]) -> None:
    plain = prefill_and_decode(load())
    a, b = load(), load()
    first, second = mien.attach(a), mien.attach(b)
    first.set(make_vector(1))
    second.set(make_vector(2))
    alone = load()
    mien.attach(alone).set(make_vector(2))
    steered = prefill_and_decode(a)
    assert same(prefill_and_decode(b), prefill_and_decode(alone))
    first.clear()
    assert same(prefill_and_decode(a), plain)
    first.set(make_vector(1))
    assert same(prefill_and_decode(a), steered)


@pytest.mark.usefixtures("all_processors")
def test_swapping_from_another_thread_while_decoding(load: Callable[..., Any]) -> None:
    """Every decode is under one of the two programs, never a mixture of both."""
    llm = load()
    vector = make_vector(size=0.2)
    steering = mien.attach(llm)
    tokens = tokens_of(llm, 8)

    def decoded() -> bytes:
        llm.reset()
        llm.eval(tokens)
        return logits_of(llm).tobytes()

    off = decoded()
    steering.set(vector)
    on = decoded()
    programs = [steering.compile(vector), steering.compile("")]
    stop = threading.Event()

    def swap() -> None:
        i = 0
        while not stop.is_set():
            steering.set(programs[i % 2])
            i += 1

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        seen = {decoded() for _ in range(40)}
    finally:
        stop.set()
        thread.join()
    assert seen <= {on, off}


def test_a_decode_behind_miens_back_is_steered_too(load: Callable[..., Any]) -> None:
    """llama_decode called directly, as multimodal handlers do."""
    llm, usual = load(), load()
    vector = make_vector()
    mien.attach(llm).set(vector)
    mien.attach(usual).set(vector)
    tokens = tokens_of(llm, 10)
    usual.eval(tokens)
    llm._batch.set_batch(batch=tokens, n_past=0, logits_all=False)
    assert api.llama_decode(llm._ctx.ctx, llm._batch.batch) == 0
    assert np.array_equal(logits_of(llm), logits_of(usual))


# ---- what can't be attached ----


class Named:
    """A registry of given vectors."""

    def __init__(self, **vectors: Vector) -> None:
        self.vectors = vectors

    def find(self, name: str, model: Fingerprint) -> Vector:
        return self.vectors[name]


def test_attaching_twice_is_attaching_once(load: Callable[..., Any]) -> None:
    """As when a notebook's cell runs twice: the dose is the same, and the handle is."""
    llm = load()
    steering = mien.attach(llm)
    steering.set(make_vector())
    once = prefill_and_decode(llm)
    assert mien.attach(llm) is steering
    llm.reset()
    assert same(prefill_and_decode(llm), once)
    for options in ({"path": "post-compute"}, {"mix_cache": True}, {"registry": mien.Registry()}):
        with pytest.raises(
            mien.RuntimeNotSupported, match=f"attached already, with another {next(iter(options))}"
        ):
            mien.attach(llm, **options)
    assert steering.recipe != mien.Recipe()
    steering.detach()
    assert mien.attach(llm) is not steering


def test_a_handle_that_was_dropped_can_be_had_again(load: Callable[..., Any]) -> None:
    llm = load()
    plain = prefill_and_decode(llm)
    assert mien.steering_of(llm) is None
    mien.attach(llm).set(make_vector())
    gc.collect()
    found = mien.steering_of(llm)
    assert found is not None
    assert found is mien.steering_of(llm._ctx)
    assert found.recipe != mien.Recipe()
    mien.detach(llm)
    assert mien.steering_of(llm) is None
    assert type(llm) is llama_cpp.Llama
    assert same(prefill_and_decode(llm), plain)
    mien.detach(llm)  # nothing to do


def test_a_llama_and_its_context_are_not_attached_both(load: Callable[..., Any]) -> None:
    llm = load()
    mien.attach(llm._ctx)
    with pytest.raises(mien.RuntimeNotSupported, match="attached already, with another type"):
        mien.attach(llm)
    mien.detach(llm)
    steering = mien.attach(llm)
    with pytest.raises(mien.RuntimeNotSupported, match="attached already, with another type"):
        mien.attach(llm._ctx)
    steering.detach()


def test_a_closed_model_is_refused(load: Callable[..., Any]) -> None:
    llm = load()
    attached = load()
    steering = mien.attach(attached)
    llm.close()
    attached.close()
    with pytest.raises(mien.RuntimeNotSupported, match="closed"):
        mien.attach(llm)
    with pytest.raises(mien.RuntimeNotSupported, match="closed"):
        steering.set(make_vector())
    steering.detach()


def test_somebody_elses_callback_is_not_replaced(load: Callable[..., Any]) -> None:
    llm = load()
    callback = type(llm.context_params.cb_eval)(lambda tensor, ask, data: False)
    llm.context_params.cb_eval = callback
    with pytest.raises(mien.RuntimeNotSupported, match="cb_eval"):
        mien.attach(llm)


def test_a_failing_attachment_leaves_the_model_as_it_was(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = load()
    plain = prefill_and_decode(llm)
    monkeypatch.setattr(api, "llama_init_from_model", lambda model, parameters: None)
    with pytest.raises(mien.RuntimeNotSupported, match="second context"):
        mien.attach(llm)
    monkeypatch.undo()
    assert type(llm) is llama_cpp.Llama
    assert same(prefill_and_decode(llm), plain)


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (Vector("w", (1,), np.ones((1, 8), np.float32)), "8 values a layer, the model 576"),
        (Vector("w", (30,), np.ones((1, N_EMBD), np.float32)), "up to layer 30, the model to 29"),
        (Vector("w", (1,), np.ones((1, N_EMBD), np.float32), model_hint="gemma"), "for gemma"),
        (
            Vector("w", (1,), np.ones((1, N_EMBD), np.float32), Fingerprint("llama", 30, N_EMBD, "ab" * 32)),
            "vocabulary",
        ),
    ],
)
def test_a_vector_for_another_model_is_refused_and_the_recipe_stays(
    load: Callable[..., Any], vector: Vector, message: str
) -> None:
    steering = mien.attach(load())
    steering.set(make_vector())
    before = steering.recipe
    with pytest.raises(mien.ModelMismatch, match=message):
        steering.set(vector)
    assert steering.recipe is before


def test_the_fingerprint_is_that_of_the_shipped_pack(load: Callable[..., Any]) -> None:
    found = fingerprint_of(load()._model.model)
    assert (found.architecture, found.n_layer, found.n_embd) == ("llama", N_LAYER, N_EMBD)
    assert len(found.vocabulary) == 64


def test_a_pickle_is_of_the_plain_model(load: Callable[..., Any]) -> None:
    llm = load()
    mien.attach(llm)
    copy = pickle.loads(pickle.dumps(llm))
    assert type(copy) is llama_cpp.Llama
    copy.close()


def test_a_failed_decode_leaves_no_tags(load: Callable[..., Any]) -> None:
    llm = load()
    steering: Steering = mien.attach(llm)
    runtime: LlamaRuntime = llm._mien
    llm.eval(tokens_of(llm, 40))
    assert runtime.tags == [()] * 40
    llm._batch.set_batch(batch=tokens_of(llm, 4), n_past=3, logits_all=False)  # not consecutive
    with pytest.raises(RuntimeError, match="llama_decode returned"):
        llm._ctx.decode(llm._batch)
    assert len(runtime.tags) == 3
    steering.detach()


def test_a_copy_in_float32_has_the_same_weights(model_path: Path) -> None:
    with in_float32(model_path) as copy:
        assert copy != model_path
        given, found = (
            {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors} for path in (model_path, copy)
        )
        assert set(given) == set(found)
        assert any(tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1 for tensor in given.values())
        for name in list(given)[:: len(given) // 8]:
            tensor, other = given[name], found[name]
            assert other.tensor_type == gguf.GGMLQuantizationType.F32
            np.testing.assert_array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), other.data)
    assert not copy.exists()


def test_a_model_that_would_take_too_much_memory_in_float32_is_used_as_it_is(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_text, "FLOAT32_SHARE", 1e-6)
    with in_float32(model_path) as copy:
        assert copy == model_path


def test_a_model_in_float32_is_used_as_it_is(tmp_path: Path) -> None:
    path = tiny.build("llama", tmp_path).gguf
    with in_float32(path) as copy:
        assert copy == path
