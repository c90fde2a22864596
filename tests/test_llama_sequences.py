"""Several sequences in one llama.cpp context, each steered by a program of its own.

The measure is the same sequence alone in a context of its own: bit for bit, which the models and contexts
here allow (see tiny.QUANTISED and llama_batches.parameters_for).
"""

from __future__ import annotations

import ctypes
import gc
import warnings
import weakref
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import llama_cpp.llama_cpp as api
import mien
import numpy as np
import pytest
from llama_batches import (
    Contexts,
    Logits,
    Row,
    clear,
    differing,
    evaluate,
    evaluate_all,
    logits_of,
    new_batch,
    parameters_for,
    pointer_of,
)
from llama_cpp._internals import LlamaBatch, LlamaContext, LlamaModel
from makers import DictRegistry
from mien.runtimes import llama_context
from mien.steering import Steering
from mien.vector import Vector
from tiny import N_VOCAB, build
from tiny_hybrids import build_lfm2

# Each has its own way of cutting batches: lfm2 is a hybrid, whose convolutions can't be cut back.
ARCHITECTURES = ["llama", "gemma2", "lfm2"]
of_attention = pytest.mark.parametrize("contexts", ["llama", "gemma2"], indirect=True)
PATHS = ["in-graph", "post-compute"]

# A sequence's prompt comes in the batch of that number, whole; in each batch after it one token of its reply.
# So some are given while others go on. The first and the last say the same at first.
BEGINS = {0: 0, 1: 1, 2: 0, 3: 2}
LENGTHS = {0: 5, 1: 14, 2: 1, 3: 21}
BATCHES = 8
TEXT = {s: np.random.default_rng(min(s, 3 - s)).integers(3, N_VOCAB, size=40).tolist() for s in BEGINS}
ORDERS = ["ascending", "descending", "interleaved"]

VECTORS = {
    name: (0.4 * np.random.default_rng(seed).standard_normal((3, 64))).astype(np.float32)
    for seed, name in enumerate("abcg")
}
REGISTRY = DictRegistry(*(Vector(name, (1, 2, 3), rows) for name, rows in VECTORS.items()))
RECIPES = [
    "a",
    None,
    'a(when="prompt") + b(start=1, stop=4) + 2*c(ramp=3, decay=2)',
    "gate(b(keep_norm=True), on=g, above=0.3, hysteresis=0.8) + ablate(c)"
    " + gate(a, on=b, below=-0.5, latch=True)",
]


def rows_of(step: int, sequence: int, name: int | None = None) -> list[Row]:
    """What batch `step` has of a sequence. name: what it is called there."""
    since = step - BEGINS[sequence]
    if since < 0:
        return []
    length = LENGTHS[sequence]
    positions = range(length) if since == 0 else [length + since - 1]
    return [
        Row(
            TEXT[sequence][position],
            position,
            (sequence if name is None else name,),
            position == positions[-1] or position in (1, 3),  # so that micro-batches are without any
        )
        for position in positions
    ]


def batches(order: str) -> list[list[Row]]:
    found = []
    for step in range(BATCHES):
        parts = [rows_of(step, sequence) for sequence in sorted(BEGINS, reverse=order == "descending")]
        if order == "interleaved":
            rounds = zip_longest(*parts)
            found.append([row for rows in rounds for row in rows if row is not None])
        else:
            found.append([row for part in parts for row in part])
    return found


def batches_alone(sequence: int) -> list[list[Row]]:
    return [rows for step in range(BATCHES) if (rows := rows_of(step, sequence, 0))]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def contexts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Contexts]:
    folder = tmp_path_factory.mktemp("tiny")
    if request.param == "lfm2":
        contexts = Contexts(build_lfm2(folder))
    else:
        contexts = Contexts(build(request.param, folder, quantised=True).gguf)
    yield contexts
    contexts.close()


@pytest.fixture(autouse=True)
def _free(contexts: Contexts) -> Iterator[None]:
    yield
    contexts.free_all()


@pytest.fixture(scope="module")
def alone(contexts: Contexts) -> dict[tuple[int, int], Logits]:
    """By (recipe, sequence): what a context of its own has, by the sequence's number in the others."""
    found = {}
    for i, recipe in enumerate(RECIPES):
        context = contexts.make()
        steering = mien.attach(context, registry=REGISTRY)
        for sequence in BEGINS:
            clear(context)
            steering.set(recipe)
            logits = evaluate_all(context, steering.decode, batches_alone(sequence))
            found[i, sequence] = {(sequence, position): row for (_, position), row in logits.items()}
        contexts.free(context)
    return found


def attach(context: Any) -> Steering:
    return mien.attach(context, registry=REGISTRY)


def expected(alone: dict[tuple[int, int], Logits], recipes: Sequence[int]) -> Logits:
    """recipes: the number of each sequence's."""
    return {key: row for s, i in enumerate(recipes) for key, row in alone[i, s].items()}


# ---- each as if it were alone ----


def test_the_recipes_do_something(alone: dict[tuple[int, int], Logits]) -> None:
    """Else the tests below would mean nothing: each recipe differs from each other in every sequence."""
    for sequence in BEGINS:
        for i in range(len(RECIPES)):
            for j in range(i):
                differ = differing(alone[i, sequence], alone[j, sequence])
                assert len(differ) >= BATCHES - BEGINS[sequence] - 1


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n_ubatch", [7, 256])
@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_each_sequence_is_as_if_alone(
    contexts: Contexts,
    alone: dict[tuple[int, int], Logits],
    path: str,
    unified: bool,
    n_ubatch: int,
    order: str,
) -> None:
    context = contexts.make(4, path=path, unified=unified, n_ubatch=n_ubatch)
    steering = attach(context)
    for first in (0, 2):  # so that each recipe is met by a long prompt and by a short one
        clear(context)
        recipes = [(first + s) % 4 for s in range(4)]
        steering.set([RECIPES[i] for i in recipes])
        found = evaluate_all(context, steering.decode, batches(order))
        assert differing(found, expected(alone, recipes)) == []
        assert {done.path for done in steering.applied.layers.values()} == {path}


@pytest.mark.usefixtures("all_processors")
@pytest.mark.parametrize("path", PATHS)
def test_threads_do_not_matter(contexts: Contexts, alone: dict[tuple[int, int], Logits], path: str) -> None:
    context = contexts.make(4, path=path, n_threads=2)
    steering = attach(context)
    steering.set(RECIPES)
    found = evaluate_all(context, steering.decode, batches("interleaved"))
    assert differing(found, expected(alone, range(4))) == []


# ---- one of them changes ----


def test_a_change_of_one_sequence_leaves_the_others_gates_as_they_were(
    contexts: Contexts, alone: dict[tuple[int, int], Logits]
) -> None:
    context = contexts.make(4)
    steering = attach(context)
    steering.set([RECIPES[3]] * 4)
    found: Logits = {}
    for step, rows in enumerate(batches("interleaved")):
        if step == BATCHES - 2:
            steering.set("2*a", sequence=1)
        found.update(evaluate(context, steering.decode, rows))
    changed = {(1, row.position) for rows in batches_alone(1)[-2:] for row in rows}
    assert set(differing(found, expected(alone, [3] * 4))) == changed
    assert [str(recipe) for recipe in steering.recipes] == [
        str(mien.parse(RECIPES[3] if s != 1 else "2*a")) for s in range(4)
    ]


def test_a_recipe_that_is_set_again_has_gates_that_begin_anew(contexts: Contexts) -> None:
    """So that the test above can tell."""
    latched = "gate(a, on=g, above=0.0, latch=True)"
    found = []
    for again in (None, 0, 1):
        context = contexts.make(2)
        steering = attach(context)
        steering.set([latched, latched])
        logits: Logits = {}
        for step, rows in enumerate(batches_alone(0)):
            if step == 4 and again is not None:
                steering.set(latched, sequence=again)
            logits.update(evaluate(context, steering.decode, rows))
        found.append(logits)
    assert differing(found[0], found[2]) == []
    assert differing(found[0], found[1]) != []


def test_one_recipe_for_all_and_one_for_each_are_the_same_steering(
    contexts: Contexts, alone: dict[tuple[int, int], Logits]
) -> None:
    context = contexts.make(4)
    steering = attach(context)
    for setting in (RECIPES[2], [RECIPES[2]] * 4):
        clear(context)
        steering.set(setting)
        found = evaluate_all(context, steering.decode, batches("ascending"))
        assert differing(found, expected(alone, [2] * 4)) == []


def test_fewer_recipes_than_sequences_leave_the_rest_alone(
    contexts: Contexts, alone: dict[tuple[int, int], Logits]
) -> None:
    context = contexts.make(4)
    steering = attach(context)
    steering.set(RECIPES[0])
    steering.set([RECIPES[2]])
    found = evaluate_all(context, steering.decode, batches("ascending"))
    assert differing(found, expected(alone, [2, 1, 1, 1])) == []


# ---- where the reply begins ----


@pytest.mark.parametrize("options", [{"n_ubatch": 7}, {"n_threads": 2}, {"path": "post-compute"}], ids=str)
@pytest.mark.parametrize("recipe", [2, 3])
def test_a_reply_can_be_told(
    contexts: Contexts, alone: dict[tuple[int, int], Logits], recipe: int, options: dict[str, Any]
) -> None:
    """The whole text in one batch, or token by token, is steered as the prompt and the reply that it is.

    Of several tokens of a reply, each gate's memory is of the one before, whichever thread has that.
    """
    text = [rows._replace(wanted=True) for batch in batches_alone(2) for rows in batch]
    context = contexts.make(2, **options)
    steering = attach(context)
    steering.set(RECIPES[recipe])
    steering.reply_from(LENGTHS[2])
    for parts in ([text], [text[:3], text[3:]], [[row] for row in text]):
        clear(context)
        found = evaluate_all(context, steering.decode, parts)
        expected = alone[recipe, 2]
        assert all(np.array_equal(found[0, position], row) for (_, position), row in expected.items())
    other = [row._replace(sequences=(1,)) for row in text]  # whose reply was not told
    worked_out = evaluate_all(context, steering.decode, [other])
    assert not np.array_equal(worked_out[1, len(text) - 1], found[0, len(text) - 1])
    steering.reply_from(None)
    clear(context)
    found = evaluate_all(context, steering.decode, [text])
    assert all(np.array_equal(found[0, position], worked_out[1, position]) for _, position in found)


def test_a_new_prompt_is_no_reply_although_one_was_there(
    contexts: Contexts, alone: dict[tuple[int, int], Logits]
) -> None:
    """The long prompt takes positions that were the short one's reply, in one batch or in two."""
    context = contexts.make()
    steering = attach(context)
    steering.set(RECIPES[2])
    evaluate_all(context, steering.decode, batches_alone(0))
    clear(context)
    first, *rest = batches_alone(1)
    found = evaluate_all(context, steering.decode, [first[:9], first[9:], *rest])
    assert all(np.array_equal(found[0, position], row) for (_, position), row in alone[2, 1].items())


@of_attention
def test_batches_without_positions_count_on_from_the_cache(contexts: Contexts) -> None:
    """llama_batch_get_one: also where part of the cache was taken out again."""

    def logits(with_positions: bool) -> Iterator[np.ndarray]:
        context = contexts.make()
        steering = attach(context)
        steering.set("a(start=0, stop=2) + 2*b(start=3, stop=4)")
        # the prompt, a reply, the reply from its third token on again, and a prompt of a single token
        for first, last in [(0, 6), *((i, i + 1) for i in (6, 7, 8, 9, 8, 9, 10, 0, 1))]:
            if first == 8:
                api.llama_memory_seq_rm(api.llama_get_memory(context), 0, 8, -1)
            if last == 1:
                clear(context)
            batch = new_batch([Row(TEXT[1][i], i, (0,), i == last - 1) for i in range(first, last)])
            if not with_positions:
                array = (ctypes.c_int32 * (last - first))(*TEXT[1][first:last])
                batch = api.llama_batch_get_one(array, last - first)
            assert steering.decode(batch) == 0
            yield logits_of(context, -1)

    assert all(np.array_equal(a, b) for a, b in zip(logits(True), logits(False), strict=True))


@of_attention
def test_a_reply_goes_on_where_the_cache_was_shifted(contexts: Contexts) -> None:
    """As a context that is full is shifted: its prompt and a part of its reply are taken out of the cache."""
    windows = "a(start=2, stop=4) + 2*b(start=9, stop=11)"
    by_hand = {2: "a", 4: None, 9: "2*b", 11: None}
    found, f16 = [], api.GGML_TYPE_F16  # llama.cpp shifts no quantised cache
    for recipe in (windows, None):
        context = contexts.make(2, type_k=f16, type_v=f16)
        steering = attach(context)
        memory = api.llama_get_memory(context)
        steering.set(["c", recipe])
        evaluate(context, steering.decode, [Row(t, i, (1,)) for i, t in enumerate(TEXT[1][:10])])
        logits: Logits = {}
        for reply in range(14):
            if recipe is None and reply in by_hand:
                steering.set(by_hand[reply], sequence=1)
            if reply == 7:
                api.llama_memory_seq_rm(memory, 1, 4, 14)
                api.llama_memory_seq_add(memory, 1, 14, -1, -10)
                steering.shift(-10, sequence=1)
            position = 10 + reply - (10 if reply >= 7 else 0)
            rows = evaluate(context, steering.decode, [Row(TEXT[3][reply], position, (1,))])
            logits[1, reply] = rows[1, position]
        found.append(logits)
    assert differing(*found) == []


# ---- tokens that sequences share ----


def shared(positions: range, *sequences: int) -> list[Row]:
    return [Row(TEXT[1][position], position, sequences) for position in positions]


@pytest.mark.parametrize("n_ubatch", [7, 256])
@pytest.mark.parametrize("recipe", [0, 2, 3])
def test_a_prompt_can_be_shared_by_sequences_that_are_steered_alike(
    contexts: Contexts, alone: dict[tuple[int, int], Logits], recipe: int, n_ubatch: int
) -> None:
    context = contexts.make(4, unified=True, n_ubatch=n_ubatch)
    steering = attach(context)
    steering.set(["b", RECIPES[recipe], "b"])
    steering.set(steering.compile(RECIPES[recipe]), sequence=2)
    for again in range(2):  # the second time both had a reply, at positions that now are given
        clear(context)
        steering.set(program := steering.compile(RECIPES[recipe]), sequence=1)
        steering.set(program, sequence=2)
        if not again:
            replies = [[Row(5, i, (sequence,)) for sequence in (1, 2)] for i in range(4)]
            evaluate_all(context, steering.decode, replies)
            clear(context)
        found = evaluate(context, steering.decode, shared(range(LENGTHS[1]), 1, 2))
        for batch in batches_alone(1)[1:]:
            rows = [row._replace(sequences=(s,)) for s in (2, 1) for row in batch]
            found.update(evaluate(context, steering.decode, rows))
        for (_, position), row in alone[recipe, 1].items():
            assert np.array_equal(found[1, position], row)
            assert position < LENGTHS[1] or np.array_equal(found[2, position], row)


def test_a_token_shared_by_sequences_that_are_steered_otherwise_is_refused(contexts: Contexts) -> None:
    context = contexts.make(4, unified=True)
    steering = attach(context)
    steering.set(["a", "b"])
    batch = new_batch(shared(range(4), 0, 1))
    with pytest.raises(mien.SteeringNotApplied, match="shared by sequences that are steered differently"):
        steering.decode(batch)
    assert api.llama_memory_seq_pos_max(api.llama_get_memory(context), 0) == -1
    steering.set("a")
    assert steering.decode(batch) == 0
    api.llama_batch_free(batch)


def test_a_copied_sequence_goes_on_in_its_own_reply(
    contexts: Contexts, alone: dict[tuple[int, int], Logits]
) -> None:
    """llama_memory_seq_cp after one prompt for several; the copy's place had another reply before."""
    context = contexts.make(2, unified=True)
    steering = attach(context)
    memory = api.llama_get_memory(context)
    steering.set(RECIPES[2])
    evaluate_all(context, steering.decode, [[Row(5, i, (1,))] for i in range(4)])
    api.llama_memory_seq_rm(memory, 1, 0, -1)
    first, *rest = batches_alone(1)
    evaluate(context, steering.decode, first)
    api.llama_memory_seq_cp(memory, 0, 1, 0, -1)
    copies = [[row._replace(sequences=(1,)) for row in rows] for rows in rest]
    found = evaluate_all(context, steering.decode, copies)
    assert all(np.array_equal(found[key], alone[2, 1][key]) for key in found)


# ---- decodes that mien does not see ----


def test_a_direct_decode_is_steered_where_all_are_alike(contexts: Contexts) -> None:
    context, usual = contexts.make(4), contexts.make(4)
    steering, usually = attach(context), attach(usual)
    rows = batches("ascending")[0]
    for setting in ("a", ["b"] * 4, [steering.compile("c")] * 4):
        for each in (context, usual):
            clear(each)
        steering.set(setting)
        usually.set(setting)
        assert differing(evaluate(context, None, rows), evaluate(usual, usually.decode, rows)) == []
        assert sorted(steering.applied.layers) == [1, 2, 3]


def test_a_direct_decode_of_one_sequence_leaves_the_others_replies(contexts: Contexts) -> None:
    """Also one that asks for no logits, after which its next token would be given."""
    found = []
    for directly in (True, False):
        context = contexts.make(2)
        steering = attach(context)
        steering.set('a(when="response")')
        evaluate(context, steering.decode, [Row(t, i, (0,)) for i, t in enumerate(TEXT[1][:5])])
        if directly:
            evaluate(context, None, [Row(t, i, (1,), False) for i, t in enumerate(TEXT[1][:3])])
        found.append(evaluate(context, steering.decode, [Row(TEXT[1][5], 5, (0,))]))
    assert differing(*found) == []


def test_a_direct_decode_while_sequences_differ_is_said(contexts: Contexts) -> None:
    context, plain = contexts.make(4), contexts.make(4, hooked=False)
    steering = attach(context)
    steering.set(["a", "b"])
    rows = batches("ascending")[0]
    assert differing(evaluate(context, None, rows), evaluate(plain, None, rows)) == []
    with pytest.raises(mien.SteeringNotApplied, match=r"called directly .* call steering.decode"):
        _ = steering.applied
    clear(context)
    evaluate(context, steering.decode, rows)
    assert sorted(steering.applied.layers) == [1, 2, 3]  # once is enough
    steering.detach()
    assert attach(context).applied.layers == {}


def embedded(steering: Steering, context: Any, rows: np.ndarray, position: int) -> np.ndarray:
    """The logits after a batch of embeddings for sequence 1."""
    batch = api.llama_batch_init(len(rows), rows.shape[1], 1)
    batch.n_tokens = len(rows)
    ctypes.memmove(batch.embd, rows.ctypes.data, rows.nbytes)
    for i in range(len(rows)):
        batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = position + i, 1, 1
        batch.logits[i] = i == len(rows) - 1
    assert steering.decode(batch) == 0
    api.llama_batch_free(batch)
    return logits_of(context, len(rows) - 1)


@pytest.mark.parametrize("path", PATHS)
def test_embeddings_are_steered_as_tokens_are(contexts: Contexts, path: str) -> None:
    """Of one sequence: what is not a token can't tell in which order several were cut."""
    rows = (0.5 * np.random.default_rng(7).standard_normal((14, 64))).astype(np.float32)
    window, found = 'a(when="prompt") + b(start=1, stop=2)', []
    for recipes in ([window] * 4, ["a", None, "b", None], [None] * 4):
        context = contexts.make(2, path=path, n_ubatch=7)
        steering = attach(context)
        logits = []
        for i, recipe in enumerate(recipes):
            if i == 0 or recipe != recipes[i - 1]:
                steering.set(["c", recipe])
            first = i + 10 if i else 0
            logits.append(embedded(steering, context, rows[first : i + 11], first))
        found.append(logits)
    assert all(np.array_equal(a, b) for a, b in zip(found[0], found[1]))
    assert not any(np.array_equal(a, b) for a, b in zip(found[0], found[2]))


# ---- attaching and detaching ----


@pytest.mark.parametrize("path", PATHS)
def test_nothing_set_cleared_or_detached_is_bit_identical_to_plain(contexts: Contexts, path: str) -> None:
    context, plain = contexts.make(4, path=path, n_ubatch=7), contexts.make(4, hooked=False, n_ubatch=7)
    expected = evaluate_all(plain, None, batches("interleaved"))

    def found(steering: Steering | None) -> Logits:
        clear(context)
        return evaluate_all(context, steering.decode if steering else None, batches("interleaved"))

    assert differing(found(None), expected) == []
    steering = attach(context)
    assert differing(found(steering), expected) == []
    steering.set(RECIPES)
    assert differing(found(steering), expected) != []
    for nothing in ([None] * 4, [], None):
        if nothing == []:
            steering.clear()
        else:
            steering.set(nothing)
        assert differing(found(steering), expected) == []
        steering.set(RECIPES)
    steering.detach()
    assert differing(found(None), expected) == []
    with pytest.raises(mien.RuntimeNotSupported, match="detached"):
        steering.set("a")


def test_a_context_is_attached_to_once_at_a_time(contexts: Contexts) -> None:
    context = contexts.make(2)
    steering = attach(context)
    steering.set("a")
    for again in (context, pointer_of(context), ctypes.c_void_p(pointer_of(context))):
        assert mien.steering_of(again) is steering
    assert attach(context) is steering
    steering.detach()
    assert mien.steering_of(context) is None
    assert str(attach(pointer_of(context)).recipe) == ""


def test_a_reply_that_continues_with_several_tokens_is_warned_of_once(contexts: Contexts) -> None:
    """A new turn, or drafts: only the caller knows, and can say so."""
    context = contexts.make(2)
    steering = attach(context)

    def decode(position: int, count: int, sequence: int = 0) -> None:
        evaluate(context, steering.decode, [Row(5 + i, position + i, (sequence,)) for i in range(count)])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(0, 4)
        decode(4, 1)
        decode(5, 3)  # nothing is set that goes by it
        steering.set('a(when="response")')
        decode(8, 1)
        decode(0, 4, sequence=1)  # of another sequence
        steering.reply_from(9)
        decode(9, 3)  # it was told
        assert steering.applied.layers[1].rows == 3
        steering.reply_from(None)
        decode(12, 1)
    with pytest.warns(mien.ReplyWarning, match=r"steering.reply_from"):
        decode(13, 2)
    assert steering.applied.layers == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(15, 1)
        decode(16, 2)


def test_a_prompts_last_piece_of_one_token_is_prompt(contexts: Contexts) -> None:
    context = contexts.make(2)
    steering = attach(context)
    steering.set('a(when="response")')
    for position, count, last in ((0, 5, False), (5, 5, False), (10, 1, True)):
        rows = [Row(5 + i, position + i, wanted=last and i == count - 1) for i in range(count)]
        evaluate(context, steering.decode, rows)
        assert steering.applied.layers == {}
    evaluate(context, steering.decode, [Row(5, 11)])
    assert steering.applied.layers[1].rows == 1


def test_a_freed_context_takes_its_hook_along(contexts: Contexts) -> None:
    context = contexts.make(2)
    steering = attach(context)
    steering.set("a")
    hook = weakref.ref(steering._runtime.hook)
    contexts.free(context)
    assert mien.steering_of(context) is None
    with pytest.raises(mien.RuntimeNotSupported, match="closed"):
        steering.set("a")
    del steering
    gc.collect()
    assert hook() is None


def test_nothing_of_a_steering_that_was_detached_is_left_for_the_next(contexts: Contexts) -> None:
    """Its program, the reply it told and its strays must not be found again."""
    context, plain = contexts.make(2), contexts.make(2, hooked=False)
    steering = attach(context)
    steering.reply_from(1)
    steering.set(["a", "b"])
    rows = batches_alone(1)[0]
    evaluate(context, None, rows)
    clear(context)
    mien.detach(context)
    steering = attach(context)
    assert steering.applied.layers == {}
    assert differing(evaluate(context, steering.decode, rows), evaluate(plain, None, rows)) == []
    clear(context)
    steering.set('a(when="response")')
    evaluate(context, steering.decode, rows)
    assert steering.applied.layers == {}


def test_a_pointer_that_mien_has_not_made_is_refused_with_what_to_do(
    contexts: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_context, "_made", {})  # one that is freed may have had this address
    with pytest.raises(mien.RuntimeNotSupported, match=r"mien.init_from_model\(model, params\)"):
        attach(contexts.make(hooked=False))


def test_a_context_made_anew_at_the_same_address_is_another(
    contexts: Contexts, alone: dict[tuple[int, int], Logits]
) -> None:
    addresses = []
    for i in range(6):
        context = contexts.make()
        addresses.append(pointer_of(context))
        steering = attach(context)
        assert str(steering.recipe) == ""
        steering.set(RECIPES[i % 2 * 2])
        found = evaluate_all(context, steering.decode, batches_alone(0))
        assert differing(found, alone[i % 2 * 2, 0]) == []
        contexts.made.remove(context)
        api.llama_free(context)  # and the Steering stays attached to what is no more
    assert len(set(addresses)) < len(addresses)


def test_a_plain_context_at_the_address_of_one_that_was_freed_is_said(
    contexts: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, plain = contexts.make(), contexts.make(hooked=False)
    monkeypatch.setitem(llama_context._made, pointer_of(plain), llama_context._made[pointer_of(made)])
    steering = attach(plain)
    steering.set("a")
    batch = new_batch([Row(5, 0)])
    with pytest.raises(mien.SteeringNotApplied, match="did not call mien"):
        steering.decode(batch)
    api.llama_batch_free(batch)


def test_a_callback_of_somebody_elses_is_not_replaced(contexts: Contexts) -> None:
    parameters = parameters_for()
    parameters.cb_eval = type(parameters.cb_eval)(lambda tensor, ask, data: False)
    with pytest.raises(mien.RuntimeNotSupported, match="cb_eval"):
        mien.init_from_model(contexts.model, parameters)


def test_a_context_that_llama_cpp_can_not_make_is_none(contexts: Contexts) -> None:
    assert mien.init_from_model(contexts.model, parameters_for(n_seq_max=10_000)) is None


def test_more_recipes_than_sequences_are_refused_and_change_nothing(contexts: Contexts) -> None:
    context = contexts.make(2)
    steering = attach(context)
    steering.set(["a", "b"])
    with pytest.raises(mien.RecipeError, match=r"at most 2 recipes.*got 3"):
        steering.set(["a", "b", "c"])
    assert [str(recipe) for recipe in steering.recipes] == ["a", "b"]
    one = attach(contexts.make(1))
    with pytest.raises(mien.RuntimeNotSupported, match="n_seq_max above 1"):
        one.set(["a"])
    one.set("a", sequence=0)
    assert str(one.recipe) == "a"


def test_a_sequence_that_there_is_not_is_refused(contexts: Contexts) -> None:
    context = contexts.make(2)
    steering = attach(context)
    steering.set("a")
    for sequence in (-1, 2):
        with pytest.raises(mien.RecipeError, match=f"expected 0 to 1, got {sequence}"):
            steering.set("b", sequence=sequence)
        with pytest.raises(mien.MienError, match=f"expected 0 to 1, got {sequence}"):
            steering.reply_from(3, sequence)
        with pytest.raises(mien.MienError, match=f"expected 0 to 1, got {sequence}"):
            steering.shift(3, sequence)
        batch = new_batch([Row(5, 0, (sequence,))])
        with pytest.raises(mien.SteeringNotApplied, match="no room for"):
            steering.decode(batch)
        api.llama_batch_free(batch)
    with pytest.raises(ValueError, match="expected 0 or more, or None, got -1"):
        steering.reply_from(-1)
    assert str(steering.recipe) == "a"


def test_a_decode_that_fails_says_its_status_and_the_next_one_is_steered(
    contexts: Contexts, alone: dict[tuple[int, int], Logits]
) -> None:
    context = contexts.make()
    steering = attach(context)
    steering.set(RECIPES[2])
    first, *rest = batches_alone(1)
    batch = new_batch([Row(5, 7)])  # not where it can begin
    found = evaluate(context, steering.decode, first)
    assert steering.decode(batch) != 0
    api.llama_batch_free(batch)
    found.update(evaluate_all(context, steering.decode, rest))
    assert all(np.array_equal(found[0, position], row) for (_, position), row in alone[2, 1].items())


# ---- llama-cpp-python's own low-level classes ----


@pytest.fixture
def wrapper(contexts: Contexts) -> Iterator[LlamaContext]:
    model = LlamaModel(path_model=str(contexts.path), params=api.llama_model_default_params(), verbose=False)
    context = LlamaContext(model=model, params=parameters_for(4, n_ubatch=7), verbose=False)
    yield context
    context.close()
    model.close()


def test_a_llama_context_is_attached_to_and_left_as_it_was(
    contexts: Contexts, alone: dict[tuple[int, int], Logits], wrapper: LlamaContext
) -> None:
    names, before = set(vars(wrapper)), wrapper.params
    evaluate(wrapper.ctx, None, [Row(t, i, (3,)) for i, t in enumerate(TEXT[3][:6])])
    steering = mien.attach(wrapper, registry=REGISTRY)
    assert api.llama_memory_seq_pos_max(api.llama_get_memory(wrapper.ctx), 3) == 5  # what it held is there
    assert mien.attach(wrapper, registry=REGISTRY) is steering
    wrapper.kv_cache_clear()
    steering.set(RECIPES)
    found = evaluate_all(wrapper.ctx, steering.decode, batches("descending"))
    assert differing(found, expected(alone, range(4))) == []
    steering.detach()
    assert type(wrapper) is LlamaContext
    assert set(vars(wrapper)) == names
    assert wrapper.params is before
    assert api.llama_memory_seq_pos_max(api.llama_get_memory(wrapper.ctx), 1) == LENGTHS[1] + BATCHES - 3
    wrapper.kv_cache_clear()
    plain = evaluate_all(wrapper.ctx, None, batches("descending"))
    assert differing(plain, expected(alone, [1] * 4)) == []


def test_a_llama_contexts_own_decode_is_steered(
    contexts: Contexts, alone: dict[tuple[int, int], Logits], wrapper: LlamaContext
) -> None:
    steering = mien.attach(wrapper, registry=REGISTRY)
    steering.set(RECIPES)
    batch = LlamaBatch(n_tokens=64, embd=0, n_seq_max=1, verbose=False)
    for sequence in (0, 1):
        batch.add_sequence(TEXT[sequence][: LENGTHS[sequence]], sequence, logits_all=False)
    wrapper.decode(batch)
    for sequence, i in ((0, LENGTHS[0] - 1), (1, LENGTHS[0] + LENGTHS[1] - 1)):
        last = alone[sequence, sequence][sequence, LENGTHS[sequence] - 1]
        assert np.array_equal(logits_of(wrapper.ctx, i), last)
    batch.reset()
    batch.add_sequence([N_VOCAB], 0, logits_all=False)
    with pytest.raises(RuntimeError, match="llama_decode returned"):
        wrapper.decode(batch)
    batch.close()


def test_a_closed_llama_context_is_refused(contexts: Contexts, wrapper: LlamaContext) -> None:
    wrapper.close()
    wrapper.ctx = None
    with pytest.raises(mien.RuntimeNotSupported, match="closed"):
        mien.attach(wrapper)
