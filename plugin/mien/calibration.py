"""Calibration: how large a dose a vector bears before the model's text falls apart, and what it does.

At growing coefficients the model answers prompts greedily, several coefficients at once. The dose is the
largest measured coefficient up to which the replies keep to the budget (`Budget`); it is baked in as 1.0.
Perplexity is that under the unsteered model, of the reply as an answer to its prompt and of the reply read
alone: the first tells how far it is from what the model would say, the second whether it is good text. And
repetition has a say beside both, since text that repeats itself has a low perplexity. What a dose achieves is
the GAP between the replies of both poles (`judging.gap`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import MienError
from .evaluation import Evaluator, Progress, Text, silent
from .judging import Gap, distinct, gap, perplexity, repetition
from .program import NOTHING, Program
from .vector import MetaValue, Vector

COEFFICIENTS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)
REPLY_TOKENS = 40
AT_ONCE = 4  # coefficients that are measured in one go


# Log-probabilities of the tokens of each reply: of the high pole, and of the low.
Scores: TypeAlias = "tuple[Sequence[npt.NDArray[np.float64]], Sequence[npt.NDArray[np.float64]]]"


@dataclass(frozen=True)
class Budget:
    """What full dose may cost.

    perplexity: of the replies to their prompts, times that of the unsteered ones. Those are the model's own
    most probable replies, so that any other manner costs much. perplexity_alone: the same of the replies read
    without their prompts, where manner costs little and broken text does. repetition: the share of trigrams,
    on top of that of the unsteered replies.
    distinct: distinct-2 of all replies together, as a share of that of the unsteered ones, at least: a model
    that says the same to everything may say it well.
    """

    perplexity: float = 3.0
    perplexity_alone: float = 1.75
    repetition: float = 0.10
    distinct: float = 0.6

    def broken(self, dose: Dose, plain: Dose) -> bool:
        """Whether the perplexity of the replies to their prompts, which grows with the dose, is over it."""
        return dose.perplexity > self.perplexity * plain.perplexity

    def holds(self, dose: Dose, plain: Dose) -> bool:
        return (
            not self.broken(dose, plain)
            and dose.perplexity_alone <= self.perplexity_alone * plain.perplexity_alone
            and dose.repetition <= self.repetition + plain.repetition
            and dose.distinct >= self.distinct * plain.distinct
        )


# By kind. In an emotion a model says what it would not say else; below four times the perplexity few replies
# of a small one are told from none. A trait says the same in another manner, and is incoherent there.
BUDGETS = {"trait": Budget(), "emotion": Budget(perplexity=5.0, perplexity_alone=2.5)}


@dataclass(frozen=True)
class Dose:
    """The replies at one coefficient.

    perplexity: under the unsteered model, after the prompt; perplexity_alone: without it, from the second
    token on. repetition: the share of word trigrams. distinct: distinct-2. effect: the GAP, in nats a token,
    over the unsteered model's; NaN where it was not measured.
    """

    coefficient: float
    perplexity: float
    perplexity_alone: float
    repetition: float
    distinct: float
    effect: float = float("nan")


@dataclass(frozen=True)
class Calibration:
    """A dose curve, ascending, the unsteered replies first. chosen: the coefficient that becomes 1.0."""

    curve: tuple[Dose, ...]
    chosen: float
    budget: Budget

    @property
    def holds(self) -> bool:
        """Whether the chosen dose keeps to the budget."""
        dose = next(dose for dose in self.curve if dose.coefficient == self.chosen)
        return self.budget.holds(dose, self.curve[0])


@dataclass(frozen=True)
class Poles:
    """Given replies whose likelihood tells the effect: item i of both is about the same matter."""

    high: Sequence[Text]
    low: Sequence[Text]

    def scores(self, many: Evaluator, programs: Sequence[Program]) -> list[Scores]:
        """(log-probabilities of the high replies, of the low) under each program, all evaluated together."""
        items = len(self.high)
        texts = [*self.high, *self.low] * len(programs)
        each = [program for program in programs for _ in range(2 * items)]
        found = many.log_probabilities(texts, programs=each)
        starts = range(0, len(found), 2 * items)
        return [(found[i : i + items], found[i + items : i + 2 * items]) for i in starts]

    def effect(self, many: Evaluator, programs: Sequence[Program]) -> list[float]:
        """The GAP under each program."""
        return [gap(high, low).value for high, low in self.scores(many, programs)]


def raised(before: Scores, after: Scores) -> Gap:
    """By how much the GAP of `after` is above that of `before`, item by item."""
    high, low = ([b - a for a, b in zip(before[k], after[k])] for k in (0, 1))
    return gap(high, low)


def calibrate(
    many: Evaluator,
    vector: Vector,
    prompts: Sequence[Text],
    *,
    poles: Poles | None = None,
    coefficients: Sequence[float] = COEFFICIENTS,
    budget: Budget | None = None,
    reply_tokens: int = REPLY_TOKENS,
    plain: Dose | None = None,
    strict: bool = True,
    progress: Progress = silent,
) -> Calibration:
    """Measure `vector` at growing coefficients until the budget of perplexity is left.

    prompts: what the model replies to. poles: to measure the effect, too. plain: the measure of the
    unsteered replies, if it is known. strict: raise MienError where no coefficient keeps to the budget; else
    the one below the budget of perplexity that repeats least is chosen, and `holds` says that it does not.

    Chosen is the largest that keeps to the budget before the perplexity of the answers first leaves it. The
    other three do not grow steadily with the dose, so that they have a say at each dose alone. Every dose of
    the curve, the chosen one with them, was measured.
    """
    budget = budget or Budget()
    plain = plain or measure(many, [NOTHING], prompts, reply_tokens)[0]
    curve = [replace(plain, coefficient=0.0)]
    ascending = sorted(coefficients)
    for start in range(0, len(ascending), AT_ONCE):
        part = ascending[start : start + AT_ONCE]
        found = measure(many, [many.compile(vector * c) for c in part], prompts, reply_tokens)
        curve += (replace(dose, coefficient=c) for dose, c in zip(found, part))
        progress(len(curve) - 1, len(ascending))
        if any(budget.broken(dose, plain) for dose in curve):
            break
    progress(len(ascending), len(ascending))
    # Up to the first that leaves it: a larger dose that keeps to it again does so by chance.
    end = next((i for i, dose in enumerate(curve) if budget.broken(dose, plain)), len(curve))
    fluent = [dose for dose in curve[1:end] if budget.holds(dose, plain)]
    if not fluent and strict:
        first = curve[1]
        raise MienError(
            f"{vector.name}: no dose keeps to the budget; already at {ascending[0]:g} times its length the "
            f"replies have perplexity {first.perplexity:.1f} (unsteered {plain.perplexity:.1f}), read alone "
            f"{first.perplexity_alone:.1f} ({plain.perplexity_alone:.1f}), repetition "
            f"{first.repetition:.2f} ({plain.repetition:.2f}) and distinct-2 {first.distinct:.2f} "
            f"({plain.distinct:.2f}); use fewer layers or other texts"
        )
    if poles is not None:
        effects = poles.effect(many, [many.compile(vector * d.coefficient) for d in curve])
        curve = [replace(d, effect=effect - effects[0]) for d, effect in zip(curve, effects)]
    chosen = fluent[-1] if fluent else min(curve[1 : max(end, 2)], key=lambda dose: dose.repetition)
    return Calibration(tuple(curve), chosen.coefficient, budget)


def measure(
    many: Evaluator, programs: Sequence[Program], prompts: Sequence[Text], reply_tokens: int = REPLY_TOKENS
) -> list[Dose]:
    """The replies under each program, all evaluated together; of coefficient 1."""
    replies = many.generate(
        list(prompts) * len(programs), reply_tokens, programs=[p for p in programs for _ in prompts]
    )
    given = many.log_probabilities(replies)
    alone = many.log_probabilities(read_alone(many, replies))
    texts = [many.decode(reply.answer) for reply in replies]
    parts = [slice(i, i + len(prompts)) for i in range(0, len(replies), len(prompts))]
    return [
        Dose(
            1.0,
            perplexity(given[part]),
            perplexity(alone[part]),
            float(np.mean([repetition(text) for text in texts[part]])),
            distinct(texts[part], 2),
        )
        for part in parts
    ]


def read_alone(many: Evaluator, replies: Sequence[Text]) -> list[Text]:
    """The replies without their prompts; of each the first token is given, and not scored."""
    start = many.text([{"role": "user", "content": ""}], raw=True).tokens
    return [Text((*start, *reply.answer), len(start) + 1) if reply.answer else reply for reply in replies]


def bake(vector: Vector, calibration: Calibration) -> Vector:
    """`vector` scaled so that 1.0 is the chosen dose, with the curve in its metadata."""
    scale, curve = calibration.chosen, calibration.curve
    words: dict[str, MetaValue] = {
        "calibration.dose": [dose.coefficient / scale for dose in curve],
        "calibration.perplexity": [dose.perplexity for dose in curve],
        "calibration.perplexity_alone": [dose.perplexity_alone for dose in curve],
        "calibration.repetition": [dose.repetition for dose in curve],
        "calibration.distinct": [dose.distinct for dose in curve],
        "calibration.perplexity_budget": calibration.budget.perplexity,
        "calibration.perplexity_alone_budget": calibration.budget.perplexity_alone,
        "calibration.repetition_budget": calibration.budget.repetition,
        "calibration.distinct_budget": calibration.budget.distinct,
    }
    if not np.isnan(curve[-1].effect):
        words["calibration.effect"] = [dose.effect for dose in curve]
    return bake_scale(vector, scale, words)


def bake_scale(vector: Vector, scale: float, meta: Mapping[str, MetaValue] | None = None) -> Vector:
    """`vector` times `scale`, keeping its metadata; what depends on its length follows. `meta` is added."""
    scaled = vector * scale
    kept = {key: value for key, value in vector.meta.items() if key not in ("bias", "center")}
    kept |= {**scaled.meta, "scale": scale, **(meta or {})}
    strength = vector.meta.get("strength")
    if isinstance(strength, list):
        kept["strength"] = [float(s) * abs(scale) for s in strength]
    return replace(scaled, name=vector.name, meta=kept)
