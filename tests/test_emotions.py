"""The shipped pack on the real model, by a judge that is not a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mien
import pytest
from emotions import EMOTIONS, PLAIN, Outcome, measure, prompts
from mien.contrast import read_lines
from mien.pack import Pack
from mien.registry import shipped_packs
from mien.runtimes.llama_text import load_llama

pytestmark = pytest.mark.model

PACK = shipped_packs() / "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def outcomes(model_path: Path) -> Iterator[dict[str, Outcome]]:
    llm = load_llama(model_path, n_ctx=512, n_threads=2)
    steering = mien.attach(llm)
    yield {recipe: measure(llm, steering, prompts(), recipe) for recipe in (PLAIN, *EMOTIONS)}
    llm.close()


@pytest.mark.parametrize("emotion", EMOTIONS)
def test_an_emotion_shows_in_replies_to_new_prompts(outcomes: dict[str, Outcome], emotion: str) -> None:
    steered, plain = outcomes[emotion], outcomes[PLAIN]
    assert steered.share[emotion] > 2.5 * plain.share[emotion]
    assert steered.share[emotion] > 0.015
    # The judge files most angry words under other emotions too, so that anger is seldom the strongest.
    assert steered.strongest[emotion] > plain.strongest[emotion] + (0.05 if emotion == "anger" else 0.2)


@pytest.mark.parametrize("emotion", EMOTIONS)
def test_no_other_emotion_brings_it_out_as_much(outcomes: dict[str, Outcome], emotion: str) -> None:
    shares = {recipe: outcomes[recipe].share[emotion] for recipe in EMOTIONS}
    assert max(shares, key=lambda recipe: shares[recipe]) == emotion, shares


@pytest.mark.parametrize("emotion", EMOTIONS)
def test_full_dose_stays_fluent_on_new_prompts(outcomes: dict[str, Outcome], emotion: str) -> None:
    steered, plain = outcomes[emotion], outcomes[PLAIN]
    assert steered.repetition < plain.repetition + 0.2
    assert steered.perplexity < 3 * plain.perplexity


def test_the_prompts_took_no_part_in_making_the_vectors() -> None:
    made_with = {
        line for name in ("template", "calibration") for line in read_lines(PACK / "contrast" / f"{name}.txt")
    }
    held_out = prompts()
    assert len(held_out) >= 20
    assert not made_with.intersection(held_out)


def test_the_shipped_pack_verifies() -> None:
    assert Pack.read(PACK).verify() == []


def test_the_files_say_how_they_were_made() -> None:
    pack = Pack.read(PACK)
    digests = set()
    for name in pack.entries:
        meta = pack.load(name).meta
        digests.add(meta["data_digest"])
        assert meta["kind"] == "emotion"
        assert meta["captured_at"] == "output of the same block"
    assert len(digests) == 1

    from mien import contrast

    template = read_lines(PACK / "contrast" / "template.txt")
    groups = [
        contrast.samples(read_lines(PACK / "contrast" / f"{name}.txt"), template)
        for name in ("joy", "sadness", "anger", "fear", "calm")
    ]
    assert digests == {contrast.digest(*groups)}, "the texts changed since the vectors were made: make pack"
