"""Many texts at once: the same as each alone, in both runtimes and between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import llama_cpp
import mien
import numpy as np
import pytest
import tiny
import torch
from mien.errors import MienError, RuntimeNotSupported
from mien.evaluation import Evaluator, Text, evaluator
from mien.program import Program
from mien.recipe import Recipe, Term, as_recipe
from mien.vector import Vector
from numpy.typing import NDArray
from tiny_hybrids import build_plamo2

N_LAYER = 4


def texts() -> list[Text]:
    """Sixty that begin alike in many ways, one of them twice, and one that another begins with."""
    random = np.random.default_rng(3)
    starts = [random.integers(3, 120, 9).tolist() for _ in range(3)]
    found = []
    for start in starts:
        for _ in range(6):
            middle = start + random.integers(3, 120, 4).tolist()
            for _ in range(3):
                found.append(
                    Text(tuple(middle + random.integers(3, 120, random.integers(1, 9)).tolist()), 10)
                )
    shorter = Text(found[5].tokens[:-1], 10) if len(found[5].tokens) > 14 else Text(found[5].tokens[:13], 10)
    return [*found, found[7], shorter]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tiny.Tiny:
    return tiny.build("llama", tmp_path_factory.mktemp("tiny"))


def load(model: tiny.Tiny, **options: Any) -> Any:
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    return llama_cpp.Llama(str(model.gguf), n_ctx=128, n_threads=2, verbose=False, **exact, **options)


@pytest.fixture(params=["llama", "hf"])
def many(request: pytest.FixtureRequest, small: tiny.Tiny) -> Iterator[Evaluator]:
    found = evaluator(load(small) if request.param == "llama" else small.model)
    yield found
    found.close()


def alone(small: tiny.Tiny, text: Text) -> tuple[NDArray[Any], NDArray[Any]]:
    """(block outputs (layers, tokens, n_embd), log-probabilities (tokens, n_vocab)) by torch, one text."""
    with torch.no_grad():
        out = small.model(torch.tensor([text.tokens]), output_hidden_states=True, use_cache=False)
    states = [h[0].numpy() for h in out.hidden_states[1:-1]]  # the last has been through the final norm
    return np.stack(states), torch.log_softmax(out.logits[0].double(), dim=-1).numpy()


@pytest.mark.parametrize("last", [False, True])
def test_states_are_those_of_each_text_alone(many: Evaluator, small: tiny.Tiny, last: bool) -> None:
    given = texts()
    seen = set()
    layers = range(N_LAYER - 1)
    for i, states in many.capture(given, layers, last=last):
        seen.add(i)
        expected, _ = alone(small, given[i])
        first = len(given[i].tokens) - 1 if last else given[i].reply
        assert states.shape == (len(layers), len(given[i].tokens) - first, small.n_embd)
        np.testing.assert_allclose(states, expected[:, first:], atol=2e-5)
    assert seen == set(range(len(given)))


def test_the_last_block_can_be_read_too(many: Evaluator, small: tiny.Tiny) -> None:
    given = texts()[:5]
    for i, states in many.capture(given, [0, N_LAYER - 1], last=True):
        model = small.model.model
        with torch.no_grad():
            h = model(torch.tensor([given[i].tokens]), use_cache=False).last_hidden_state[0, -1]
            normed = model.norm(torch.from_numpy(states[1]))[0]
        np.testing.assert_allclose(normed.numpy(), h.numpy(), atol=2e-5)


def test_log_probabilities_are_those_of_each_text_alone(many: Evaluator, small: tiny.Tiny) -> None:
    given = texts()
    for text, found in zip(given, many.log_probabilities(given), strict=True):
        _, every = alone(small, text)
        positions = np.arange(text.reply, len(text.tokens))
        np.testing.assert_allclose(found, every[positions - 1, list(text.answer)], atol=2e-5)


def vector(small: tiny.Tiny, seed: int) -> Vector:
    random = np.random.default_rng(seed)
    rows = random.standard_normal((3, small.n_embd)).astype(np.float32)
    return Vector(f"v{seed}", (1, 2, 3), rows, model_hint="llama")


def replied(vector: Vector) -> Recipe:
    """That acts on the reply alone."""
    return Recipe((replace(as_recipe(vector).terms[0], when="response"),))


def programs(many: Evaluator, small: tiny.Tiny, count: int) -> list[Program]:
    """Of three kinds, so that texts that begin alike are steered differently."""
    kinds = [many.compile(recipe) for recipe in (None, vector(small, 1), vector(small, 2) * 0.5)]
    return [kinds[i % 3] for i in range(count)]


def test_each_text_is_steered_by_its_own_program(many: Evaluator, small: tiny.Tiny) -> None:
    given = texts()
    every = programs(many, small, len(given))
    found = many.log_probabilities(given, programs=every)
    states = dict(many.capture(given, [2], programs=every))
    many.close()
    steering = mien.attach(small.model)
    for i in range(0, len(given), 7):
        steering.set(every[i])
        _, expected = alone(small, given[i])
        positions = np.arange(given[i].reply, len(given[i].tokens))
        np.testing.assert_allclose(found[i], expected[positions - 1, list(given[i].answer)], atol=5e-5)
        captured = steering.capture(given[i].tokens, [2], last=len(given[i].answer))
        np.testing.assert_allclose(states[i], captured, atol=5e-5)
    steering.detach()


def test_replies_are_those_that_each_prompt_has_alone(many: Evaluator, small: tiny.Tiny) -> None:
    prompts = [Text(text.tokens[:10], 10) for text in texts()[:40]]
    every = programs(many, small, len(prompts))
    found = many.generate(prompts, 6, programs=every)
    for i in (0, 1, 2, 20, 39):
        (same,) = many.generate([prompts[i]], 6, programs=[every[i]])
        assert same == found[i]
    assert len({text.tokens for text in found}) > len({text.tokens for text in prompts}), (
        "nothing was steered"
    )


def test_a_window_over_the_reply_begins_where_the_text_says(many: Evaluator, small: tiny.Tiny) -> None:
    """A given reply is steered as the one that the model writes itself."""
    program = many.compile(replied(vector(small, 1)))
    prompts = [Text(text.tokens[: 10 - k % 3], 10 - k % 3) for k, text in enumerate(texts()[::7])]
    replies = many.generate(prompts, 5, programs=[program] * len(prompts))
    scores = many.log_probabilities(replies, programs=[program] * len(prompts))
    for reply, score in zip(replies, scores, strict=True):
        for k in range(len(reply.answer)):  # what was chosen is the most probable under the same steering
            prefix = reply.tokens[: reply.reply + k]
            others = [Text((*prefix, token), reply.reply) for token in range(3, 120, 13)]
            rivals = many.log_probabilities(others, programs=[program] * len(others))
            assert score[k] >= max(rival[-1] for rival in rivals) - 1e-4


def test_a_given_reply_under_windows_is_alike_in_both_runtimes(small: tiny.Tiny) -> None:
    every = {}
    for model in (load(small), small.model):
        with closing(evaluator(model)) as many:
            kinds = [
                many.compile(recipe)
                for recipe in (
                    replied(vector(small, 1)),
                    None,
                    Recipe((Term(1.0, vector(small, 2), when="prompt"),)),
                    Recipe((Term(1.0, vector(small, 2), start=1, stop=3),)),
                )
            ]
            given = [Text(text.tokens, 10 - k % 2) for k, text in enumerate(texts()[::3])]
            programs = [kinds[k % 4] for k in range(len(given))]
            states = dict(many.capture(given, [1, 2], programs=programs))
            every[type(model)] = many.log_probabilities(given, programs=programs), states
    (ours, our_states), (theirs, their_states) = every.values()
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        np.testing.assert_allclose(a, b, atol=5e-5)
        np.testing.assert_allclose(our_states[k], their_states[k], atol=5e-5)


def test_replies_under_several_windows_share_their_prompt(small: tiny.Tiny) -> None:
    with closing(evaluator(load(small))) as many:
        recipes = (replied(vector(small, 1)), None, replied(vector(small, 2)), vector(small, 1))
        kinds = [many.compile(recipe) for recipe in recipes]
        given = [Text((*range(5, 15), *reply), 10) for reply in ((20, 21, 22), (20, 30), (40, 41))]
        each = [(text, program) for program in kinds for text in given]
        counts: list[int] = []
        found = many.log_probabilities(
            [text for text, _ in each],
            programs=[program for _, program in each],
            progress=lambda _done, total: counts.append(total),
        )
        # The prompt that nothing acts on is one, and that which v1 acts on another.
        assert counts[-1] == 2 * 10 + len(kinds) * 6
        for scores, (text, program) in zip(found, each, strict=True):
            (expected,) = many.log_probabilities([text], programs=[program])
            np.testing.assert_allclose(scores, expected, atol=2e-5)
        assert len({tuple(scores.round(4)) for scores in found}) == len(found), "what was steered is alike"


def test_both_runtimes_agree(small: tiny.Tiny) -> None:
    given = texts()
    with closing(evaluator(load(small))) as one, closing(evaluator(small.model)) as other:
        for a, b in zip(one.log_probabilities(given), other.log_probabilities(given), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


def longer() -> list[Text]:
    """That outgrow the sliding windows of the models that have them, and begin alike for as long."""
    random = np.random.default_rng(4)
    start = random.integers(3, 120, tiny.WINDOW + 4).tolist()
    return [Text((*start, *random.integers(3, 120, 3 + k).tolist()), len(start) - 2) for k in range(5)]


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gemma3", "mixtral", "gpt2", "falcon"])
@pytest.mark.parametrize("runtime", ["llama", "hf"])
def test_other_families_share_what_they_can(family: str, runtime: str, tmp_path: Path) -> None:
    model = tiny.build(family, tmp_path)
    given = longer()
    with closing(evaluator(load(model) if runtime == "llama" else model.model)) as many:
        found = many.log_probabilities(given)
    for text, scores in zip(given, found, strict=True):
        with torch.no_grad():
            logits = model.model(torch.tensor([text.tokens]), use_cache=False).logits[0].double()
        every = torch.log_softmax(logits, dim=-1).numpy()
        positions = np.arange(text.reply, len(text.tokens))
        np.testing.assert_allclose(scores, every[positions - 1, list(text.answer)], atol=3e-4)


def test_a_model_with_recurrent_memory_evaluates_each_text_alone(tmp_path: Path) -> None:
    llm = llama_cpp.Llama(str(build_plamo2(tmp_path)), n_ctx=128, n_threads=2, verbose=False)
    given = texts()[:6]
    with closing(evaluator(llm)) as many:
        states = dict(many.capture(given, [1, 2]))
        replies = many.generate([Text(text.tokens[:10], 10) for text in given], 3)
    with mien.attach(llm) as steering:
        for i, text in enumerate(given):
            expected = steering.capture(text.tokens, [1, 2], last=len(text.answer))
            np.testing.assert_allclose(states[i], expected, atol=1e-4)
            reply = list(islice(llm.generate(text.tokens[:10], temp=0.0), 3))
            assert reply == list(replies[i].answer)


@pytest.mark.parametrize(
    ("given", "words"), [([Text((), 0)], "no token"), ([Text((5,) * 5000, 1)], "expected at most")]
)
def test_texts_that_do_not_fit(many: Evaluator, given: list[Text], words: str) -> None:
    with pytest.raises(MienError, match=words):
        many.log_probabilities(given)


def test_what_can_not_be_asked(small: tiny.Tiny, tmp_path: Path) -> None:
    with pytest.raises(RuntimeNotSupported, match="expected a llama_cpp"):
        evaluator(object())
    llm = load(small)
    for model in (llm, small.model):
        with mien.attach(model) as steering:
            with pytest.raises(MienError, match="not attached"):
                evaluator(model)
            assert mien.steering_of(model) is steering
    with closing(evaluator(llm)) as many, pytest.raises(ValueError, match="one for each of 2 texts"):
        many.log_probabilities(texts()[:2], programs=[many.compile(None)])
