"""Replies of the steered model's own, chosen to be trained on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from mien import refining
from mien.contrast import Sample
from mien.evaluation import Evaluator, evaluator
from mien.extraction import Reading, States, extract_group, read_states
from mien.fingerprint import Fingerprint
from mien.judging import repetition
from mien.refining import Probe, own_replies
from mien.runtimes.fake import NumpyModel
from mien.vector import Vector

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
    monkeypatch.setattr(refining, "REPEATED", 0.7)  # the model has little to say
    monkeypatch.setattr(refining, "TOKENS", 12)
    given = vectors(many, 1.0)
    found = own_replies(many, given, samples(), ASKS)
    assert list(found) == list(MANNERS)
    assert sum(map(len, found.values())), "nothing was kept: the test shows nothing"
    layer = round(refining.PROBED * 3)
    probe = Probe(read_states(many, samples(), read="mean", layers=[layer]))
    for name, texts in found.items():
        prompts = [many.text([{"role": "user", "content": ask}]) for ask in ASKS]
        written = many.generate(prompts, refining.TOKENS, programs=[many.compile(given[name])] * len(ASKS))
        good = []
        for reply in written:
            if repetition(many.decode(reply.answer)) > 0.7:
                continue
            ((_, rows),) = many.capture([reply], [layer])
            if probe(rows.mean(axis=1).astype(np.float64)) == [name]:
                good.append(reply)
        good.sort(key=lambda reply: -many.log_probabilities([reply])[0].mean())
        assert texts == good[: round(refining.KEPT * len(good))]


def test_of_what_repeats_itself_nothing_is_kept(many: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refining, "REPEATED", -1.0)
    assert own_replies(many, vectors(many, 1.0), samples(), ASKS) == {name: [] for name in MANNERS}
