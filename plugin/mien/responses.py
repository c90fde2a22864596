"""Replies that a model writes itself, to make directions from: under vectors, or under personas.

The replies of contrast data say what a manner is, in words that a model would hardly choose, and a direction
trained on them pays for these words with fluency. So the steered model answers (`own_replies`), and of its
replies those are kept that show the manner, do not repeat themselves, and are the most probable to the
unsteered model: expert iteration (Anthony et al., 2017), by rejection as in RAFT (Dong et al., 2023). Whether
a reply shows the manner is told by a probe of the unsteered model's states, which the given replies fit.

Where there are no given replies, the model answers under system prompts of both poles (`persona_replies`), as
for persona vectors (Chen et al., 2025). What is kept of them the model tells, too: a reply must be more
probable under its own persona than under those of the other poles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .contrast import Sample
from .errors import MienError
from .evaluation import Evaluator, Progress, Text, silent
from .extraction import Reading, read_states
from .judging import repetition
from .methods import Direction, States, lda
from .vector import Vector

KEPT = 0.6  # of the replies that show the manner, the most probable
ENOUGH = 6  # of them, which are kept in any case
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
    fluent = [(name, reply) for name, reply in zip(names, written) if _is_fluent(many, reply)]
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
    return {name: texts[: max(round(KEPT * len(texts)), ENOUGH)] for name, texts in found.items()}


def persona_replies(
    many: Evaluator,
    personas: Mapping[str, Sequence[str]],
    asks: Sequence[str],
    *,
    limit: int = TOKENS,
    progress: Progress = silent,
) -> dict[str, list[Sample]]:
    """{pole: what the model answers to `asks` under the system prompts of that pole}, greedily.

    personas: by pole, as many of each, at least two poles; number k of all poles are each other's opposites.
    limit: tokens of a reply. Kept is what does not repeat itself and is more probable, a token, under its own
    persona than under its opposites.

    Raises MienError for fewer than two poles or another number of personas in one, no question, a model
    whose template takes no system prompt, and a pole of which nothing is kept.
    """
    counts = {len(lines) for lines in personas.values()}
    if len(personas) < 2 or len(counts) != 1 or not asks or 0 in counts:
        raise MienError(
            "expected at least two poles with as many personas each, and a question; got "
            + ", ".join(f"{len(lines)} of {pole}" for pole, lines in personas.items())
            + f", {len(asks)} questions"
        )

    prompts = {
        (pole, k, ask): many.text([{"role": "system", "content": persona}, {"role": "user", "content": ask}])
        for pole, lines in personas.items()
        for k, persona in enumerate(lines)
        for ask in asks
    }
    written = many.generate(list(prompts.values()), limit, progress=progress)
    fluent = [(item, reply) for item, reply in zip(prompts, written) if _is_fluent(many, reply)]
    under = {
        pole: many.log_probabilities([reply.after(prompts[pole, k, ask]) for (_, k, ask), reply in fluent])
        for pole in personas
    }
    found: dict[str, list[Sample]] = {pole: [] for pole in personas}
    for i, ((pole, _, ask), reply) in enumerate(fluent):
        scores = {name: float(each[i].mean()) for name, each in under.items()}
        sample = Sample(ask, many.decode(reply.answer).strip())
        if all(scores[pole] > score for name, score in scores.items() if name != pole):
            found[pole].append(sample)
    for pole, kept in found.items():
        found[pole] = list(dict.fromkeys(kept))  # two personas may be answered alike
        if not kept:
            raise MienError(
                f"no reply under the personas of {pole} is fluent and fits them better than their opposites: "
                "the model does not follow them; write more, or plainer ones"
            )
    return found


def _is_fluent(many: Evaluator, reply: Text) -> bool:
    return bool(reply.answer) and repetition(many.decode(reply.answer)) <= REPEATED


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
