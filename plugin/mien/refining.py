"""Replies of the steered model's own, to train directions on again.

The replies of contrast data say what a manner is, in words that a model would hardly choose, and a direction
trained on them pays for these words with fluency. So the steered model answers, and of its replies those are
kept that show the manner, do not repeat themselves, and are the most probable to the unsteered model: expert
iteration (Anthony et al., 2017), by rejection as in RAFT (Dong et al., 2023). Whether a reply shows the
manner is told by a probe of the unsteered model's states, which the contrast data's own replies fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .contrast import Sample
from .evaluation import Evaluator, Progress, Text, silent
from .extraction import Reading, read_states
from .judging import repetition
from .methods import Direction, States, lda
from .vector import Vector

KEPT = 0.6  # of the replies that show the manner, the most probable
REPEATED = 0.1  # trigrams, at most
TOKENS = 32
PROBED = 2 / 3  # the depth at which replies are read


def own_replies(
    many: Evaluator,
    manners: Mapping[str, Vector],
    samples: Mapping[str, Sequence[Sample]],
    asks: Sequence[str],
    *,
    progress: Progress = silent,
) -> dict[str, list[Text]]:
    """{manner: the best of the replies to `asks` under its vector}, the most probable first.

    manners: vectors at the dose to write with, at least two. samples: given replies of the same manners.
    Of a manner that no reply shows there are none.
    """
    layer = round(PROBED * (many.fingerprint.n_layer - 1))
    probe = Probe(read_states(many, samples, read="mean", layers=[layer]))
    prompts = [many.text([{"role": "user", "content": ask}]) for ask in asks]
    programs = [program for vector in manners.values() for program in [many.compile(vector)] * len(asks)]
    written = many.generate(prompts * len(manners), TOKENS, programs=programs, progress=progress)
    names = [name for name in manners for _ in asks]
    fluent = [
        (name, reply)
        for name, reply in zip(names, written)
        if reply.answer and repetition(many.decode(reply.answer)) <= REPEATED
    ]
    replies = [reply for _, reply in fluent]
    states = np.empty((len(replies), many.fingerprint.n_embd))
    for i, rows in many.capture(replies, [layer]):
        states[i] = rows[0].mean(axis=0, dtype=np.float64)
    shown = probe(states) if replies else []
    right = [(name, reply) for (name, reply), seen in zip(fluent, shown) if name == seen]
    scores = many.log_probabilities([reply for _, reply in right])
    best = sorted(range(len(right)), key=lambda i: (-float(scores[i].mean()), i))
    found: dict[str, list[Text]] = {name: [] for name in manners}
    for i in best:
        found[right[i][0]].append(right[i][1])
    return {name: texts[: round(KEPT * len(texts))] for name, texts in found.items()}


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
