"""The judge of emotions, on replies that it was not taught by."""

from __future__ import annotations

import numpy as np
import pytest
from mien.corpus import Corpus
from tone import Judge, embed, judge, replies


def test_it_knows_the_emotion_of_new_replies() -> None:
    texts, emotions = replies(Corpus.read(), "train")
    found = np.array(judge()(texts)) == np.array(emotions)
    assert len(found) == 480
    assert found.mean() > 0.95
    for emotion in set(emotions):
        assert found[np.array(emotions) == emotion].mean() > 0.85, emotion


def test_it_is_no_better_than_chance_where_it_was_taught_at_random() -> None:
    texts, emotions = replies(Corpus.read(), "calibration", "test")
    shuffled = np.random.default_rng(0).permutation(emotions).tolist()
    new, expected = replies(Corpus.read(), "train")
    assert np.mean(np.array(Judge(texts, shuffled)(new)) == np.array(expected)) < 0.2


@pytest.mark.parametrize(
    ("text", "emotion"),
    [
        ("I am furious that they lied to my face.", "anger"),
        ("Yuck, the smell of it makes me sick.", "disgust"),
        ("I am scared of what might be behind that door.", "fear"),
        ("There is no hurry; breathe out and let the evening be quiet.", "calm"),
    ],
)
def test_plain_cases(text: str, emotion: str) -> None:
    assert judge()([text]) == [emotion]


def test_an_empty_text_has_no_direction() -> None:
    assert not embed([""]).any()
