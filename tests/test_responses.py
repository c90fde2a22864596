"""Replies that a model writes itself, and which of them are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from mien import responses
from mien.contrast import Sample
from mien.errors import MienError
from mien.evaluation import Evaluator, Text, evaluator
from mien.extraction import extract
from mien.responses import persona_replies
from mien.runtimes.fake import NumpyModel
from mien.runtimes.hf_text import chat_inputs
from mien.runtimes.llama_text import chat_tokens
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

ASKS = [f"event {k} of the {place}" for k, place in enumerate(("farm", "sea", "hill", "road", "mill"))]


@pytest.fixture
def many() -> Iterator[Evaluator]:
    with closing(evaluator(NumpyModel(n_layer=4, n_embd=16, n_vocab=64))) as many:
        yield many


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
