"""The judge, on sentences whose emotion no reader would doubt.

They were written with the lexicon at hand, so they check the counting; they do not measure how well the
judge does on other text (see its docstring for the limits).
"""

import sys

import numpy as np
import pytest
from judge import EMOTIONS, emotions_of, judge, strongest
from mien.extraction import Reading, States
from mien.fingerprint import Fingerprint
from mien.judging import Probe, distinct, gap, perplexity, repetition, spearman

SENTENCES = [
    ("joy", "I am so happy that I could dance and sing in the sunshine!"),
    ("joy", "We laughed and smiled all evening, thrilled by the wonderful party."),
    ("joy", "What a delightful, beautiful morning, everyone is celebrating with joy."),
    ("sadness", "I wept at the funeral and I still mourn her every night."),
    ("sadness", "The house is empty, I feel sad, and all that is left is regret and sorrow."),
    ("sadness", "She sobbed quite alone, heartbroken and full of grief."),
    ("anger", "I am furious, and I shouted at him because his rude argument was an outrage."),
    ("anger", "He slapped the table in a rage and cursed that selfish, arrogant man."),
    ("anger", "Your excuses annoy me, I am angry and I resent every one of them."),
    ("fear", "I was terrified, trembling in the corner, afraid that the ghost would find me."),
    ("fear", "My heart raced with dread and panic as something crept up the stairs."),
    ("fear", "I am nervous and anxious, frightened by every step behind the door."),
    ("calm", "I sit in peaceful stillness and breathe slowly, relaxed and serene."),
    ("calm", "The quiet lake soothes me, gently, and my mind is calm."),
    ("calm", "There is no hurry, I feel tranquil and at ease, unhurried as the evening settles."),
]


@pytest.mark.parametrize(("emotion", "sentence"), SENTENCES)
def test_clear_sentence_is_judged_right(emotion: str, sentence: str) -> None:
    assert strongest(sentence) == emotion, judge(sentence)


@pytest.mark.parametrize("text", ["", "12, 34!", "The table has four legs and stands near the window."])
def test_neutral_text_carries_no_emotion(text: str) -> None:
    assert judge(text) == dict.fromkeys(EMOTIONS, 0.0)
    assert strongest(text) is None


def test_a_tie_for_first_is_no_judgement() -> None:
    assert judge("joy grief") == {"joy": 0.5, "sadness": 0.5, "anger": 0.0, "fear": 0.0, "calm": 0.0}
    assert strongest("joy grief") is None


def test_a_word_of_several_emotions_is_shared_among_them() -> None:
    assert emotions_of("hate") == ("sadness", "anger", "fear")
    shares = judge("They hate it")
    assert shares["sadness"] == shares["anger"] == shares["fear"] == pytest.approx(1 / 9)


@pytest.mark.parametrize(
    ("word", "base"),
    [
        ("thrilled", "thrill"),
        ("happier", "happy"),
        ("joyfully", "joyful"),
        ("sobbed", "sob"),
        ("sad", "sadness"),
        ("aches", "ache"),
        ("angrily", "angry"),
        ("enraged", "rage"),
        ("arguing", "argue"),
        ("scares", "scare"),
        ("panicked", "panic"),
        ("terrifying", "terror"),
    ],
)
def test_an_inflected_word_carries_what_its_base_does(word: str, base: str) -> None:
    assert emotions_of(word) == emotions_of(base) != ()


@pytest.mark.parametrize("word", ["thing", "this", "number", "corner", "stared", "rated", "bus"])
def test_a_likeness_of_letters_is_not_an_inflection(word: str) -> None:
    assert emotions_of(word) == ()


def test_a_calm_word_counts_for_calm_alone() -> None:
    assert emotions_of("peaceful") == ("calm",)  # the lexicon says joy


def test_the_lexicon_is_read_without_importing_its_package() -> None:
    judge("happy")
    assert "nrclex" not in sys.modules


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("so so", 0.0),
        ("one two three", 0.0),
        ("no no no no", 0.5),  # 2 trigrams, 1 distinct
        ("I am here. I am here!", 0.25),  # i-am-here, am-here-i, here-i-am, i-am-here
        ("a b c d e f", 0.0),
    ],
)
def test_repetition(text: str, share: float) -> None:
    assert repetition(text) == share


# mien.judging: what is measured without a lexicon.


def test_distinct_counts_n_grams_of_all_texts() -> None:
    assert distinct(["a b c", "a b"], 2) == 2 / 3
    assert distinct(["a b", "A, b!"], 1) == 0.5
    assert distinct([""], 2) == 0.0


def test_perplexity_is_over_all_tokens() -> None:
    scores = [np.log([0.5, 0.5]), np.log([0.125])]
    assert perplexity(scores) == pytest.approx((2 * 2 * 8) ** (1 / 3))
    assert np.isnan(perplexity([]))


def test_gap_is_a_mean_over_items_of_means_over_tokens() -> None:
    high = [np.array([-1.0, -3.0]), np.array([-1.0])]
    low = [np.array([-4.0]), np.array([-2.0, -2.0, -2.0])]
    found = gap(high, low)
    assert found.value == pytest.approx((2 + 1) / 2)
    assert (found.low, found.high, found.items) == (1.0, 2.0, 2)
    assert gap(high, low) == found


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3], [10, 20, 90], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 1, 2, 2], 0.8944271909999159),  # ties share their mean rank
    ],
)
def test_spearman_is_of_ranks(a: list[float], b: list[float], expected: float) -> None:
    assert spearman(a, b) == pytest.approx(expected)
    assert np.isnan(spearman(a, [5.0] * len(a)))


def test_a_probe_tells_planted_sets_apart_and_new_states_of_them() -> None:
    random = np.random.default_rng(0)
    middles = {name: random.standard_normal(32) for name in ("red", "blue", "tan")}

    def drawn(count: int) -> dict[str, np.ndarray]:
        return {name: at + 0.8 * random.standard_normal((count, 32)) for name, at in middles.items()}

    sets = {name: States(rows[:, None].astype(np.float32), ("",) * 30) for name, rows in drawn(30).items()}
    probe = Probe(Reading(sets, np.ones(1), (0,), Fingerprint("x", 1, 32)))
    for name, states in drawn(50).items():
        assert np.mean([found == name for found in probe(states)]) > 0.9
