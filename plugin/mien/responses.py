"""Replies that a model writes itself under personas, to make directions from where none are given.

The model answers under system prompts of both poles, as for persona vectors (Chen et al., 2025). What is kept
of its replies the model tells, too: a reply must be more probable under its own persona than under those of
the other poles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .contrast import Sample
from .errors import MienError
from .evaluation import Evaluator, Progress, Text, silent
from .judging import repetition

REPEATED = 0.1  # trigrams, at most
TOKENS = 32


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
