"""Judges which emotion a text is in, by a classifier over word embeddings.

The embeddings are those of the PyPI package `wordllama` (static, 256 values a token, trained on other text
by other people); the classifier is a multinomial logistic regression on the mean embedding of a text. It is
taught by the replies of the calibration and the test split of mien's contrast data, of which no direction is
made, and so knows ten emotions; tests/test_tone.py says how well it does on the replies of the train split.
It never sees the model, nor what it is steered by.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
from mien.corpus import Corpus

RIDGE, STEPS, RATE, MOMENTUM = 2.0, 600, 0.05, 0.9


class Judge:
    """Taught by (text, emotion) pairs."""

    def __init__(self, texts: Sequence[str], emotions: Sequence[str]) -> None:
        self.emotions = sorted(set(emotions))
        x = embed(texts)
        self._middle, self._spread = x.mean(axis=0), float(x.std())
        x = (x - self._middle) / self._spread
        y = np.eye(len(self.emotions))[[self.emotions.index(emotion) for emotion in emotions]]
        self._weights, self._bias = np.zeros((x.shape[1], y.shape[1])), np.zeros(y.shape[1])
        moved: tuple[float | npt.NDArray[np.float64], ...] = 0.0, 0.0
        for _ in range(STEPS):
            logits = x @ self._weights + self._bias
            chances = np.exp(logits - logits.max(axis=1, keepdims=True))
            wrong = chances / chances.sum(axis=1, keepdims=True) - y
            gradients = (x.T @ wrong + RIDGE * self._weights) / len(y), wrong.mean(axis=0)
            moved = tuple(MOMENTUM * m - RATE * g for m, g in zip(moved, gradients))
            self._weights, self._bias = self._weights + moved[0], self._bias + moved[1]

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """The emotion of each text: one is always chosen, of a neutral text any."""
        logits = (embed(texts) - self._middle) / self._spread @ self._weights + self._bias
        return [self.emotions[i] for i in logits.argmax(axis=1)]


def replies(corpus: Corpus, *splits: str) -> tuple[list[str], list[str]]:
    """(texts, emotions) of all replies in the splits."""
    (group,) = (group for group in corpus.groups if group.family == "emotions")
    events = [event for event in group.events if event.split in splits]
    pairs = [(reply, name) for event in events for name, reply in event.replies.items()]
    return [text for text, _ in pairs], [name for _, name in pairs]


@cache
def judge() -> Judge:
    return Judge(*replies(Corpus.read(), "calibration", "test"))


def embed(texts: Sequence[str]) -> npt.NDArray[np.float64]:
    """The mean embedding of each text's tokens, of length 1; zeros for an empty text. (n, 256)."""
    tokenizer, table = _embeddings()
    rows = np.zeros((len(texts), table.shape[1]))
    for row, text in zip(rows, texts):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if ids:
            mean = table[ids].mean(axis=0)
            row[:] = mean / np.linalg.norm(mean)
    return rows


@cache
def _embeddings():  # type: ignore[no-untyped-def]
    """(tokenizer, table) out of wordllama's folder: the package itself would look for them on a network."""
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    spec = find_spec("wordllama")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the judge reads the embeddings of wordllama; run: pip install 'mien[dev]'")
    folder = Path(spec.submodule_search_locations[0])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizers" / "l2_supercat_tokenizer_config.json"))
    (table,) = load_file(folder / "weights" / "l2_supercat_256.safetensors").values()
    return tokenizer, table.astype(np.float64)
