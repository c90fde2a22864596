"""Contrast data, and what is refused of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from mien.corpus import SPLITS, Corpus
from mien.errors import MienError

TRAIT = """
positive = "warm"
negative = "cold"
[[pair]]
split = "train"
ask = "How are you?"
high = "Come in, come in."
low = "Fine."
[[pair]]
split = "calibration"
ask = "What now?"
high = "Let us see together."
low = "Nothing."
[[pair]]
split = "test"
ask = "Who is there?"
high = "A friend of yours."
low = "A caller."
"""

GROUP = '[a]\npositive = "a"\n[b]\npositive = "b"\n'
EVENTS = """
[[event]]
split = "train"
scenario = "one"
text = "It rained."
a = "Good."
b = "Bad."
[[event]]
split = "calibration"
scenario = "two"
text = "It snowed."
a = "Fine."
b = "Grim."
[[event]]
split = "test"
scenario = "three"
text = "It hailed."
"""


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def test_a_corpus_is_read(tmp_path: Path) -> None:
    files = {"manner/warm.toml": TRAIT, "moods/group.toml": GROUP, "moods/weather.toml": EVENTS}
    found = Corpus.read(write(tmp_path, files))
    assert found.names == ["a", "b", "warm"]
    (trait,) = found.traits
    assert (trait.family, trait.of("test")[0].ask) == ("manner", "Who is there?")
    (group,) = found.groups
    assert [event.text for event in group.of("test")] == ["It hailed."]
    assert group.of("test", replied=True) == []


def test_the_digest_is_of_what_is_read(tmp_path: Path) -> None:
    files = {"manner/warm.toml": TRAIT, "moods/group.toml": GROUP, "moods/weather.toml": EVENTS}
    found = Corpus.read(write(tmp_path, files))
    layout = {name: f"# Of what?\n\n{text.replace(' = ', '   =  ')}" for name, text in files.items()}
    assert Corpus.read(write(tmp_path, layout)).digest == found.digest
    other = {**files, "moods/weather.toml": EVENTS.replace("Grim", "Dire")}
    changed = Corpus.read(write(tmp_path, other))
    assert changed.digest != found.digest
    assert changed.groups[0].digest != found.groups[0].digest
    assert changed.traits[0].digest == found.traits[0].digest


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('split = "test"', 'split = "exam"', "expected one of train, calibration, test"),
        ('split = "test"', 'split = "train"', "the split test is empty"),
        ("Who is there?", "How are you?", "in the splits train and test"),
        ('low = "A caller."', 'low = "A friend of yours."', "both poles answer"),
        ('low = "A caller."', 'low = "Come in, come in."', "said by both poles"),
        ('low = "A caller."', "", "low: expected text"),
        ('low = "A caller."', 'low = " "', "low: expected text"),
        ("[[pair]]", "[[other]]", r"expected \[\[pair\]\]"),
        ('positive = "warm"', "positive = 3", "expected text, got 3"),
        ('positive = "warm"', "positive = ", "TOML"),
    ],
)
def test_a_broken_trait_is_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    write(tmp_path, {"manner/warm.toml": TRAIT.replace(old, new)})
    with pytest.raises(MienError, match=words) as caught:
        Corpus.read(tmp_path)
    assert "warm.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('b = "Bad."\n', "", "a reply of every member or of none; missing b"),
        ('a = "Good."\nb = "Bad."\n', "", "needs replies"),
        ('b = "Bad."', 'b = "Good."', "reply the same"),
        ('scenario = "three"', 'scenario = "one"', "scenario 'weather/one' stands in the splits"),
        ("It hailed.", "It rained.", "stands in the splits"),
    ],
)
def test_a_broken_group_is_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    write(tmp_path, {"moods/group.toml": GROUP, "moods/weather.toml": EVENTS.replace(old, new)})
    with pytest.raises(MienError, match=words):
        Corpus.read(tmp_path)


def test_what_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(MienError, match="no contrast data"):
        Corpus.read(tmp_path)
    with pytest.raises(MienError, match="no such folder"):
        Corpus.read(tmp_path / "elsewhere")
    write(tmp_path, {"moods/group.toml": '[a]\npositive = "a"\n', "moods/weather.toml": EVENTS})
    with pytest.raises(MienError, match="at least two members"):
        Corpus.read(tmp_path)
    (tmp_path / "two").mkdir()
    write(tmp_path / "two", {"x/warm.toml": TRAIT, "y/warm.toml": TRAIT})
    with pytest.raises(MienError, match="warm is there twice"):
        Corpus.read(tmp_path / "two")


def test_the_data_that_ships_is_whole() -> None:
    """Splits are disjoint and complete by reading it; here is what it covers, and that poles are matched."""
    found = Corpus.read()
    (emotions,) = found.groups
    assert len(emotions.members) == 10
    assert Counter(event.split for event in emotions.events) == {"train": 48, "calibration": 24, "test": 120}
    assert len(found.traits) == 35
    families = Counter(trait.family for trait in found.traits)
    assert (families["big_five"], families["sixteen_factors"], families["dark_triad"]) == (5, 16, 3)
    for trait in found.traits:
        assert [len(trait.of(split)) for split in SPLITS] == [12, 4, 8]
        assert len(trait.high) == len(trait.low) == 4
        if trait.name != "verbose":
            for pair in trait.pairs:
                assert abs(len(pair.high.split()) - len(pair.low.split())) <= 4, pair
