"""The shipped pack on the real model: what its files claim, measured again, and emotions by a judge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mien.calibration import Poles, measure, raised, read_alone
from mien.corpus import Corpus, Group
from mien.evaluation import Evaluator, evaluator
from mien.judging import distinct, perplexity, repetition
from mien.making import ITEMS, REPLY_TOKENS, Maker, Settings
from mien.pack import Pack
from mien.program import NOTHING
from mien.registry import shipped_packs
from mien.runtimes.llama_text import in_float32, load_llama
from tone import judge

pytestmark = pytest.mark.model

PACK = Pack.read(shipped_packs() / "smollm2-135m-instruct")
CORPUS = Corpus.read()
BASIC = ("joy", "sadness", "anger", "fear", "disgust", "surprise")
PLAIN = "plain"
EVENTS, TOKENS = 10, 40
SAMPLE = ("agreeableness", "impatience", "formal")  # vectors whose claims are measured again


@contextmanager
def opened(path: Path) -> Iterator[Evaluator]:
    with (
        closing(load_llama(path, n_ctx=1024, n_threads=2, flash_attn=True)) as llm,
        closing(evaluator(llm)) as many,
    ):
        yield many


@pytest.fixture(scope="module")
def many(model_path: Path) -> Iterator[Evaluator]:
    with opened(model_path) as many:
        yield many


@pytest.fixture(scope="module")
def exact(model_path: Path) -> Iterator[Evaluator]:
    """As packs are made: with the same weights in float32."""
    with in_float32(model_path) as path, opened(path) as many:
        yield many


@dataclass(frozen=True)
class Outcome:
    """Of the replies to the events. hits: by emotion, the share of replies that the judge says it of."""

    hits: dict[str, float]
    repetition: float
    distinct: float
    perplexity: float
    perplexity_alone: float


def emotions() -> Group:
    (group,) = (group for group in CORPUS.groups if group.family == "emotions")
    return group


@pytest.fixture(scope="module")
def outcomes(many: Evaluator) -> dict[str, Outcome]:
    events = emotions().of("test")[:: 120 // EVENTS]
    prompts = [many.text([{"role": "user", "content": event.text}]) for event in events]
    programs = {PLAIN: NOTHING, **{name: many.compile(PACK.load(name)) for name in BASIC}}
    replies = many.generate(
        prompts * len(programs), TOKENS, programs=[p for p in programs.values() for _ in prompts]
    )
    found = {}
    for k, name in enumerate(programs):
        own = replies[k * len(prompts) : (k + 1) * len(prompts)]
        texts = [many.decode(reply.answer) for reply in own]
        verdicts = judge()(texts)
        found[name] = Outcome(
            {emotion: verdicts.count(emotion) / len(verdicts) for emotion in BASIC},
            sum(map(repetition, texts)) / len(texts),
            distinct(texts, 2),
            perplexity(many.log_probabilities(own)),
            perplexity(many.log_probabilities(read_alone(many, own))),
        )
    return found


@pytest.mark.parametrize("emotion", BASIC)
def test_an_emotion_is_what_replies_to_new_events_are_judged_as(
    outcomes: dict[str, Outcome], emotion: str
) -> None:
    steered = outcomes[emotion].hits
    assert steered[emotion] >= 0.4
    assert steered[emotion] >= outcomes[PLAIN].hits[emotion] + 0.3
    assert all(steered[emotion] > outcomes[other].hits[emotion] for other in BASIC if other != emotion)


def test_most_replies_are_judged_as_the_emotion_that_steers(outcomes: dict[str, Outcome]) -> None:
    assert sum(outcomes[emotion].hits[emotion] for emotion in BASIC) / len(BASIC) >= 0.85


@pytest.mark.parametrize("emotion", BASIC)
def test_full_dose_stays_fluent_on_new_events(outcomes: dict[str, Outcome], emotion: str) -> None:
    steered, plain = outcomes[emotion], outcomes[PLAIN]
    assert steered.repetition < plain.repetition + 0.15
    assert steered.distinct > plain.distinct / 2, "the same is said to everything"
    assert steered.perplexity_alone < 3.5 * plain.perplexity_alone
    assert steered.perplexity < 6 * plain.perplexity


def test_the_shipped_pack_verifies() -> None:
    assert PACK.verify() == []
    assert set(PACK.entries) == set(CORPUS.names)


def test_the_files_say_how_they_were_made() -> None:
    # Version 3.0.0 was made when the digest was over the bytes of all files. This is that of the same texts.
    texts = "5f028b82f9594780f31010789ea2d4c1595a6d0935c6934db276485e93afd0cb"
    assert texts == CORPUS.digest, "the data changed since the vectors were made: make pack"
    for name in PACK.entries:
        meta: Any = PACK.load(name).meta
        assert meta["data_digest"] == "2a2f070100d5b7ddf939e616ac41e4000f38164077cfc7ad957d68530af4712e"
        assert meta["captured_at"] == "output of the same block"
        assert len(meta["center"]) == len(PACK.load(name).layers)
        doses = meta["calibration.dose"]
        assert PACK.load(name).when == "response"
        assert doses[0] == 0
        assert any(abs(dose - 1) < 1e-9 for dose in doses), "full dose was never measured"


@pytest.mark.parametrize("name", SAMPLE)
def test_what_a_file_claims_is_what_is_measured_again(exact: Evaluator, name: str) -> None:
    vector = PACK.load(name)
    meta: Any = vector.meta
    trait = next(trait for trait in CORPUS.traits if trait.name == name)
    pairs = trait.of("test")[:ITEMS]
    poles = Poles(
        [exact.text([{"role": "user", "content": pair.ask}], pair.high) for pair in pairs],
        [exact.text([{"role": "user", "content": pair.ask}], pair.low) for pair in pairs],
    )
    plain, steered = poles.scores(exact, [NOTHING, exact.compile(vector)])
    effect = raised(plain, steered)
    assert effect.items == meta["test.items"]
    assert effect.value == pytest.approx(meta["test.effect"], abs=0.005)
    assert [effect.low, effect.high] == pytest.approx(meta["test.effect_interval"], abs=0.01)


def test_a_dose_curve_is_what_is_measured_again(exact: Evaluator) -> None:
    """The unsteered replies and those at full dose, to the events that joy's doses were measured on."""
    vector = PACK.load("joy")
    meta: Any = vector.meta
    maker = Maker(exact, CORPUS, Path("nowhere"), settings=Settings("mean"))
    full = next(i for i, dose in enumerate(meta["calibration.dose"]) if abs(dose - 1) < 1e-9)
    plain, steered = measure(
        exact, [NOTHING, exact.compile(vector)], maker.prompts("joy", "calibration"), REPLY_TOKENS
    )
    for found, i in ((plain, 0), (steered, full)):
        # A greedy reply that rounds to another token goes on otherwise.
        assert found.perplexity == pytest.approx(meta["calibration.perplexity"][i], rel=0.1)
        assert found.perplexity_alone == pytest.approx(meta["calibration.perplexity_alone"][i], rel=0.1)
        assert found.repetition == pytest.approx(meta["calibration.repetition"][i], abs=0.05)
        assert found.distinct == pytest.approx(meta["calibration.distinct"][i], abs=0.08)
