"""How strongly texts show a trait, and whether they are fluent.

Strength is judged by likelihood: how much more probable the steered model holds the replies of one pole than
those of the other (`gap`), which is exact, cheap, and works where a small model's own text is too weak.
Fluency takes two measures, since text that repeats itself has a low perplexity: the perplexity of the replies
under the unsteered model, and the share of trigrams that repeat. Which of several manners a reply shows is
told by a probe of the unsteered model's states (`Probe`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .extraction import Reading
from .methods import Direction, States, lda

RESAMPLES = 1000


def words(text: str) -> list[str]:
    """Lower-case words; digits and punctuation part them, an inner apostrophe does not."""
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", text.lower().replace("\u2019", "'"))


def repetition(text: str) -> float:
    """The share of word trigrams that occurred before in the text; 0.0 for fewer than three words."""
    found = words(text)
    trigrams = list(zip(found, found[1:], found[2:]))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct-n (Li et al., 2016): different word n-grams of all texts over all of them; 0.0 for none."""
    grams: list[tuple[str, ...]] = []
    for text in texts:
        found = words(text)
        grams += zip(*(found[k:] for k in range(n)))
    return len(set(grams)) / len(grams) if grams else 0.0


def perplexity(log_probabilities: Sequence[npt.NDArray[np.float64]]) -> float:
    """exp of the mean negative log-probability over all tokens of all replies; NaN for no token."""
    every = np.concatenate([np.empty(0), *log_probabilities])
    return float(np.exp(-every.mean())) if len(every) else float("nan")


@dataclass(frozen=True)
class Gap:
    """By how much the replies of one pole are more probable than those of the other, in nats a token.

    low, high: the 95% interval of a bootstrap over items.
    """

    value: float
    low: float
    high: float
    items: int


def gap(
    high: Sequence[npt.NDArray[np.float64]], low: Sequence[npt.NDArray[np.float64]], seed: int = 0
) -> Gap:
    """GAP: the mean over items of mean log-probability a token of the one reply minus that of the other."""
    differences = np.array([a.mean() - b.mean() for a, b in zip(high, low)])
    random = np.random.default_rng(seed)
    drawn = differences[random.integers(0, len(differences), (RESAMPLES, len(differences)))].mean(axis=1)
    bottom, top = np.percentile(drawn, [2.5, 97.5])
    return Gap(float(differences.mean()), float(bottom), float(top), len(differences))


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation, ties sharing their mean rank; NaN where one side does not vary."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (a, b)]
    x, y = (rank - rank.mean() for rank in ranks)
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale else float("nan")


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray(((ends - counts + ends - 1) / 2)[inverse])


class Probe:
    """Tells which of several sets new states belong to: the one that LDA tells best from all others."""

    def __init__(self, reading: Reading) -> None:
        """Of the first layer of `reading`."""
        sets = {name: states.rows[:, 0].astype(np.float64) for name, states in reading.sets.items()}
        self.names = list(sets)
        self._sides: list[Direction] = [
            lda(rows, np.concatenate([other for name, other in sets.items() if name != one]))
            for one, rows in sets.items()
        ]

    def __call__(self, states: States) -> list[str]:
        """The set of each row of `states`, float64 (n, n_embd)."""
        odds = np.stack([states @ side.row + (side.bias or 0.0) for side in self._sides], axis=1)
        return [self.names[i] for i in odds.argmax(axis=1)]
