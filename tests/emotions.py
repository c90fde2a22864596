"""Do the shipped emotions do what they say? Greedy replies to prompts that took no part in making them.

    python tests/emotions.py        prints the table of the pack's README (about three minutes)

Each prompt of data/heldout.txt is answered plainly and under each emotion at dose 1.0; `judge` counts
what share of a reply's words carries each emotion. The judge is a word list, not a model.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from judge import judge, strongest
from mien.judging import repetition

DATA = Path(__file__).parent / "data"
EMOTIONS = ("joy", "sadness", "anger", "fear", "calm")
PLAIN = ""
TOKENS = 48


@dataclass(frozen=True)
class Outcome:
    """What the judge finds in the replies under one recipe, averaged over the prompts.

    share: of words, by emotion. strongest: share of replies whose strongest emotion it is.
    """

    share: dict[str, float]
    strongest: dict[str, float]
    repetition: float
    perplexity: float


def prompts() -> list[str]:
    from mien.contrast import read_lines

    return read_lines(DATA / "heldout.txt")


def measure(llm: Any, steering: Any, questions: Sequence[str], recipe: str) -> Outcome:
    """Greedy replies under `recipe`, judged. perplexity is that under the plain model."""
    import math

    from mien.runtimes.llama_text import chat_tokens, greedy_reply, log_probabilities

    replies, total, count = [], 0.0, 0
    for question in questions:
        tokens = chat_tokens(llm, [{"role": "user", "content": question}])
        steering.set(recipe)
        reply = greedy_reply(llm, tokens, TOKENS)
        steering.clear()
        total += float(log_probabilities(llm, tokens, reply).sum())
        count += len(reply)
        replies.append(llm.detokenize(reply).decode(errors="replace"))
    judged = [judge(reply) for reply in replies]
    return Outcome(
        share={emotion: mean(one[emotion] for one in judged) for emotion in EMOTIONS},
        strongest={
            emotion: mean(float(strongest(reply) == emotion) for reply in replies) for emotion in EMOTIONS
        },
        repetition=mean(map(repetition, replies)),
        perplexity=math.exp(-total / max(count, 1)),
    )


def table(outcomes: dict[str, Outcome]) -> str:
    plain = outcomes[PLAIN]
    lines = [
        "| recipe | its words: plain | steered | strongest: plain | steered "
        "| repeated trigrams | perplexity |",
        "|---|---|---|---|---|---|---|",
        f"| none | | | | | {plain.repetition:.2f} | {plain.perplexity:.1f} |",
    ]
    for emotion in EMOTIONS:
        found = outcomes[emotion]
        lines.append(
            f"| {emotion} | {plain.share[emotion]:.1%} | {found.share[emotion]:.1%} "
            f"| {plain.strongest[emotion]:.0%} | {found.strongest[emotion]:.0%} "
            f"| {found.repetition:.2f} | {found.perplexity:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    import mien
    from mien.models import find_model
    from mien.runtimes.llama_text import load_llama

    llm = load_llama(find_model(), n_ctx=512, n_threads=os.cpu_count())
    steering = mien.attach(llm)
    outcomes = {recipe: measure(llm, steering, prompts(), recipe) for recipe in (PLAIN, *EMOTIONS)}
    print(table(outcomes))
    print("\nshare of words (row: steered to; column: judged as)")
    for recipe, outcome in outcomes.items():
        print(f"{recipe or 'plain':8}", *(f"{outcome.share[e]:8.1%}" for e in EMOTIONS))


if __name__ == "__main__":
    main()
