"""Replies that a model writes itself, and which of them are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from mien import responses
from mien.contrast import Sample
from mien.errors import MienError
from mien.evaluation import Evaluator, Text, evaluator
from mien.extraction import Reading, States, extract, extract_group, read_states
from mien.fingerprint import Fingerprint
from mien.judging import repetition
from mien.responses import Probe, own_replies, persona_replies
from mien.runtimes.fake import NumpyModel
from mien.runtimes.hf_text import chat_inputs
from mien.runtimes.llama_text import chat_tokens
from mien.vector import Vector
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

ASKS = [f"event {k} of the {place}" for k, place in enumerate(("farm", "sea", "hill", "road", "mill"))]
MANNERS = ("red", "blue", "tan")


@pytest.fixture
def many() -> Iterator[Evaluator]:
    with closing(evaluator(NumpyModel(n_layer=4, n_embd=16, n_vocab=64))) as many:
        yield many


def samples() -> dict[str, list[Sample]]:
    return {name: [Sample(ask, f"{name} so {name} {k}") for k, ask in enumerate(ASKS)] for name in MANNERS}


def vectors(many: Evaluator, dose: float) -> dict[str, Vector]:
    return {name: vector * dose for name, vector in extract_group(many, samples(), read="mean").items()}


def reading(rows: dict[str, np.ndarray]) -> Reading:
    width = next(iter(rows.values())).shape[1]
    sets = {
        name: States(each[:, None].astype(np.float32), tuple(str(i) for i in range(len(each))))
        for name, each in rows.items()
    }
    return Reading(sets, np.ones(1), (0,), Fingerprint("x", 1, width))


def test_a_probe_tells_planted_sets_apart_and_new_states_of_them() -> None:
    random = np.random.default_rng(0)
    middles = {name: random.standard_normal(32) for name in MANNERS}

    def drawn(count: int) -> dict[str, np.ndarray]:
        return {name: at + 0.8 * random.standard_normal((count, 32)) for name, at in middles.items()}

    probe = Probe(reading(drawn(30)))
    for name, states in drawn(50).items():
        assert np.mean([found == name for found in probe(states)]) > 0.9


def test_what_is_kept_shows_the_manner_and_is_the_most_probable(
    many: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "REPEATED", 0.7)  # the model has little to say
    monkeypatch.setattr(responses, "TOKENS", 12)
    monkeypatch.setattr(responses, "ENOUGH", 2)
    given = vectors(many, 1.0)
    found = own_replies(many, given, samples(), ASKS)
    assert list(found) == list(MANNERS)
    assert sum(map(len, found.values())), "nothing was kept: the test shows nothing"
    layer = round(responses.PROBED * 3)
    probe = Probe(read_states(many, samples(), read="mean", layers=[layer]))
    for name, texts in found.items():
        prompts = [many.text([{"role": "user", "content": ask}]) for ask in ASKS]
        written = many.generate(prompts, responses.TOKENS, programs=[many.compile(given[name])] * len(ASKS))
        good = []
        for reply in written:
            if repetition(many.decode(reply.answer)) > 0.7:
                continue
            ((_, rows),) = many.capture([reply], [layer])
            if probe(rows.mean(axis=1).astype(np.float64)) == [name]:
                good.append(reply)
        good.sort(key=lambda reply: -many.log_probabilities([reply])[0].mean())
        assert texts == good[: max(round(responses.KEPT * len(good)), 2)]


def test_of_what_repeats_itself_nothing_is_kept(many: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "REPEATED", -1.0)
    assert own_replies(many, vectors(many, 1.0), samples(), ASKS) == {name: [] for name in MANNERS}


PERSONAS = {"glad": ["You are glad now", "You laugh"], "grim": ["You are grim now", "You weep"]}


def test_of_persona_replies_those_are_kept_that_fit_their_own_persona_best(
    many: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "REPEATED", 1.0)
    found = persona_replies(many, PERSONAS, ASKS, limit=6)
    kept = 0
    for pole, other in (("glad", "grim"), ("grim", "glad")):
        expected = []
        for own, opposite in zip(PERSONAS[pole], PERSONAS[other]):
            for ask in ASKS:
                prompts = [
                    many.text([{"role": "system", "content": each}, {"role": "user", "content": ask}])
                    for each in (own, opposite)
                ]
                (reply,) = many.generate(prompts[:1], 6)
                fits = [
                    many.log_probabilities([Text((*p.tokens, *reply.answer), len(p.tokens))])[0].mean()
                    for p in prompts
                ]
                if fits[0] > fits[1]:
                    expected.append(Sample(ask, many.decode(reply.answer).strip()))
        assert found[pole] == list(dict.fromkeys(expected))
        kept += len(expected)
    assert 0 < kept < 20, "all or none were kept: the test shows nothing"


@pytest.mark.parametrize(
    ("personas", "asks", "words"),
    [
        ({"a": ["x"]}, ASKS, "at least two poles"),
        ({"a": ["x"], "b": ["y", "z"]}, ASKS, "got 1 of a, 2 of b"),
        ({"a": ["x"], "b": ["y"]}, [], "0 questions"),
        ({"a": ["same"], "b": ["same"]}, ASKS, "no reply under the personas of a"),
    ],
)
def test_personas_that_nothing_can_be_made_of(
    many: Evaluator, personas: dict[str, list[str]], asks: list[str], words: str
) -> None:
    with pytest.raises(MienError, match=words):
        persona_replies(many, personas, asks)


@pytest.mark.model
def test_a_direction_from_persona_replies_tells_given_replies_apart(load: Callable[..., Any]) -> None:
    personas = {
        "glad": [
            "You are overjoyed and cannot stop celebrating.",
            "You are happy and laugh about everything.",
        ],
        "grim": ["You are heartbroken and cannot stop crying.", "You are sad and grieve over everything."],
    }
    asks = ["How was your day?", "What is on your mind?", "Tell me about your morning."]
    with closing(evaluator(load())) as many:
        texts = persona_replies(many, personas, asks)
        vector = extract(many, "glad", *texts.values(), read="mean")
        given = ["What a wonderful day, I love it!", "I cried all night and feel so lonely."]
        (_, up), (_, down) = sorted(
            many.capture([many.text([{"role": "user", "content": "Hi"}], g) for g in given], [15])
        )
    row = vector.directions[15]
    assert up[0].mean(axis=0) @ row > down[0].mean(axis=0) @ row


def test_a_template_that_takes_no_system_prompt_says_so() -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    tokenizer.chat_template = refuses
    with pytest.raises(MienError, match="does not take these messages: no system role"):
        chat_inputs(tokenizer, [{"role": "system", "content": "a"}])


@pytest.mark.model
def test_so_does_llama_cpp(load: Callable[..., Any]) -> None:
    llm = load()
    llm.metadata["tokenizer.chat_template"] = "{{ raise_exception('no system role') }}"
    with pytest.raises(MienError, match="does not take these messages: no system role"):
        chat_tokens(llm, [{"role": "system", "content": "a"}])
