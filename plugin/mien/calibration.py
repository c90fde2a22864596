"""Calibration: how large a dose a vector bears before the model's text falls apart.

For growing coefficients the model answers each prompt greedily. Two measures are taken of the replies:
their perplexity under the plain model, and the share of word trigrams that repeat an earlier one in the
same reply. Both have a say, since text that repeats itself has a low perplexity. The dose is the
largest coefficient up to which neither leaves its budget; it is baked in as 1.0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .errors import MienError
from .runtimes.llama_text import chat_tokens, greedy_reply, log_probabilities
from .steering import Steering
from .vector import MetaValue, Vector

COEFFICIENTS = tuple(k / 20 for k in range(4, 25))  # 0.2, 0.25, ... 1.2
# Greedy replies are the model's own most probable ones, so that any other manner costs perplexity: a
# budget much below this one leaves joy hardly visible. Repetition is what gives out first.
PERPLEXITY_BUDGET = 2.5  # times the plain replies' perplexity
REPETITION_BUDGET = 0.10  # on top of the plain replies' share
REPLY_TOKENS = 48

Progress = Callable[[Iterable[float], int], Iterable[float]]


@dataclass(frozen=True)
class Dose:
    """The replies at one coefficient. perplexity: under the plain model. repetition: 0 to 1."""

    coefficient: float
    perplexity: float
    repetition: float


@dataclass(frozen=True)
class Calibration:
    """A dose curve, ascending, the plain replies first. chosen: the coefficient that becomes 1.0."""

    curve: tuple[Dose, ...]
    chosen: float


def calibrate(
    llm: Any,
    steering: Steering,
    vector: Vector,
    prompts: Sequence[str],
    *,
    coefficients: Sequence[float] = COEFFICIENTS,
    progress: Progress = lambda items, _total: items,
) -> Calibration:
    """Measure `vector` at growing coefficients until a budget is left.

    llm, steering: the model and its handle; what is set there is cleared. prompts: user turns.
    Raises MienError where even the smallest coefficient leaves the budget.
    """
    plain = _measure(llm, steering, vector, 0.0, prompts)
    curve = [plain]
    for coefficient in progress(coefficients, len(coefficients)):
        dose = _measure(llm, steering, vector, coefficient, prompts)
        curve.append(dose)
        if not within_budget(dose, plain):
            break
    fluent = [dose.coefficient for dose in curve[1:] if within_budget(dose, plain)]
    if not fluent:
        raise MienError(
            f"{vector.name}: already at {coefficients[0]:g} of the raw difference the replies have "
            f"perplexity {curve[1].perplexity:.1f} (plain {plain.perplexity:.1f}) and repetition "
            f"{curve[1].repetition:.2f} (plain {plain.repetition:.2f}); use fewer layers or other texts"
        )
    return Calibration(tuple(curve), max(fluent))


def within_budget(dose: Dose, plain: Dose) -> bool:
    return (
        dose.perplexity <= PERPLEXITY_BUDGET * plain.perplexity
        and dose.repetition <= plain.repetition + REPETITION_BUDGET
    )


def bake(vector: Vector, calibration: Calibration) -> Vector:
    """`vector` scaled so that 1.0 is the chosen dose, with the curve in its metadata."""
    scale = calibration.chosen
    curve: dict[str, MetaValue] = {
        "calibration.dose": [dose.coefficient / scale for dose in calibration.curve],
        "calibration.perplexity": [dose.perplexity for dose in calibration.curve],
        "calibration.repetition": [dose.repetition for dose in calibration.curve],
        "calibration.perplexity_budget": PERPLEXITY_BUDGET,
        "calibration.repetition_budget": REPETITION_BUDGET,
    }
    return bake_scale(vector, scale, curve)


def bake_scale(vector: Vector, scale: float, meta: Mapping[str, MetaValue] | None = None) -> Vector:
    """`vector` times `scale`, keeping its metadata; what depends on its length follows. `meta` is added."""
    scaled = vector * scale
    kept = {key: value for key, value in vector.meta.items() if key not in ("bias", "center")}
    kept |= {**scaled.meta, "scale": scale, **(meta or {})}
    strength = vector.meta.get("strength")
    if isinstance(strength, list):
        kept["strength"] = [float(s) * abs(scale) for s in strength]
    return replace(scaled, name=vector.name, meta=kept)


def repetition(text: str) -> float:
    """Share of the word trigrams that occurred before in the same text; 0 for under three words."""
    words = text.lower().split()
    trigrams = list(zip(words, words[1:], words[2:]))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def _measure(
    llm: Any, steering: Steering, vector: Vector, coefficient: float, prompts: Sequence[str]
) -> Dose:
    log_probability, tokens, repeated = 0.0, 0, 0.0
    for prompt in prompts:
        question = chat_tokens(llm, [{"role": "user", "content": prompt}])
        with steering(vector * coefficient):
            reply = greedy_reply(llm, question, REPLY_TOKENS)
        repeated += repetition(llm.detokenize(reply).decode(errors="replace"))
        steering.clear()
        log_probability += float(log_probabilities(llm, question, reply).sum())
        tokens += len(reply)
    return Dose(coefficient, math.exp(-log_probability / max(tokens, 1)), repeated / len(prompts))
