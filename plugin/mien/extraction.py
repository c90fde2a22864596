"""Extraction, the plain kind: a difference of means over contrast texts, read from the model itself.

Each text is evaluated alone and the output of every block at its last token is kept. The direction of
block N is mean(positive) - mean(negative) there, and is added at the same block: captured at is added
at. In a group, each member's negative is the whole group, the member included. What lies in the middle
of the contrast is kept as `center`, the readout that counts as zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .contrast import Sample, digest
from .errors import MienError
from .fingerprint import Fingerprint
from .runtimes import attach
from .runtimes.llama_text import chat_tokens, raw_tokens
from .spans import coordinates
from .steering import Steering
from .vector import MetaValue, Vector

Progress = Callable[[Iterable[Sample], int], Iterable[Sample]]
Tokenizer = Callable[[Sample], list[int]]

NORM_SAMPLES = 16  # texts over which the stream's norm is taken: thousands of tokens, steady to 1%


def _silent(items: Iterable[Sample], _total: int) -> Iterable[Sample]:
    return items


@dataclass(frozen=True)
class _States:
    """Block outputs of one set of texts. mean: float64 (n_layer, n_embd). count: how many texts."""

    mean: npt.NDArray[np.float64]
    count: int


def extract(
    llm: Any,
    name: str,
    positive: Sequence[str | Sample],
    negative: Sequence[str | Sample],
    *,
    layers: Sequence[int] | None = None,
    raw: bool = False,
    meta: Mapping[str, MetaValue] | None = None,
    progress: Progress = _silent,
) -> Vector:
    """A vector that points from the negative texts to the positive.

    llm: a llama_cpp.Llama, not attached. positive, negative: texts; "USER TEXT => REPLY OPENING" is put
    into the model's chat template, with raw=True it is taken as it stands. layers: blocks to keep, all
    but block 0 by default. meta: more metadata for the file. progress: wraps the iteration over texts.

    Raises MienError for an empty side, a text longer than the context or a model without a template.
    """
    groups = {"positive": _as_samples(positive), "negative": _as_samples(negative)}
    states, norms, model, kept = _measure(llm, groups, layers, raw, progress)
    difference = states["positive"].mean - states["negative"].mean
    return _vector(
        name,
        difference,
        (states["positive"].mean + states["negative"].mean) / 2,
        norms,
        model,
        kept,
        {
            **(meta or {}),
            "method": "difference of means, last token",
            "data_digest": digest(groups["positive"], groups["negative"]),
            "samples": [states["positive"].count, states["negative"].count],
        },
    )


def extract_group(
    llm: Any,
    groups: Mapping[str, Sequence[str | Sample]],
    *,
    layers: Sequence[int] | None = None,
    raw: bool = False,
    meta: Mapping[str, Mapping[str, MetaValue]] | None = None,
    progress: Progress = _silent,
) -> dict[str, Vector]:
    """A vector for each member: its mean minus the mean of the members' means.

    Every text is evaluated once. Arguments and errors as for `extract`; meta: by member.
    """
    if len(groups) < 2:
        raise MienError("a group needs at least two members to differ from each other")
    samples = {name: _as_samples(texts) for name, texts in groups.items()}
    states, norms, model, kept = _measure(llm, samples, layers, raw, progress)
    centre = np.mean([s.mean for s in states.values()], axis=0)
    data = digest(*samples.values())
    return {
        name: _vector(
            name,
            state.mean - centre,
            centre,
            norms,
            model,
            kept,
            {
                **(meta or {}).get(name, {}),
                "method": f"difference of means, last token, from the mean of {', '.join(samples)}",
                "data_digest": data,
                "samples": [state.count, sum(s.count for s in states.values())],
            },
        )
        for name, state in states.items()
    }


def _as_samples(texts: Sequence[str | Sample]) -> list[Sample]:
    samples = [Sample.parse(text) if isinstance(text, str) else text for text in texts]
    if not samples:
        raise MienError("each side of a contrast needs at least one text")
    return samples


def _measure(
    llm: Any,
    groups: Mapping[str, list[Sample]],
    layers: Sequence[int] | None,
    raw: bool,
    progress: Progress,
) -> tuple[dict[str, _States], npt.NDArray[np.float64], Fingerprint, list[int]]:
    """({group: its states}, median norm of the stream a layer, the model, the layers to keep)."""
    every = [(name, sample) for name, samples in groups.items() for sample in samples]
    tokens = _tokenizer(llm, raw)
    sums: dict[str, npt.NDArray[np.float64]] = {}
    with attach(llm) as steering:
        model = steering.model
        kept = _layers_to_keep(layers, model)  # before minutes of reading, not after
        for (name, _), sample in zip(every, progress([s for _, s in every], len(every))):
            states = steering.capture(tokens(sample)).astype(np.float64)[:, 0]
            sums[name] = sums[name] + states if name in sums else states
        norms = stream_norms(steering, [tokens(s) for _, s in every[:: max(len(every) // NORM_SAMPLES, 1)]])
    counts = {name: len(samples) for name, samples in groups.items()}
    states_by_name = {name: _States(total / counts[name], counts[name]) for name, total in sums.items()}
    return states_by_name, norms, model, kept


def _layers_to_keep(layers: Sequence[int] | None, model: Fingerprint) -> list[int]:
    kept = list(layers) if layers is not None else list(range(1, model.n_layer))
    wrong = [layer for layer in kept if not 1 <= layer < model.n_layer]
    if wrong or not kept:
        raise MienError(f"layers: expected some of 1 to {model.n_layer - 1}, got {wrong or 'none'}")
    return kept


def stream_norms(steering: Steering, texts: Sequence[Sequence[int]]) -> npt.NDArray[np.float64]:
    """Median Euclidean norm of the residual stream at each block's output, float64 (n_layer,).

    texts: token lists. The first token of each is left out: it is an outlier by a factor of a hundred.
    """
    norms = [
        np.linalg.norm(steering.capture(tokens, last=len(tokens) - 1).astype(np.float64), axis=2)
        for tokens in texts
        if len(tokens) > 1
    ]
    median: npt.NDArray[np.float64] = np.median(np.concatenate(norms, axis=1), axis=1)
    return median


def _vector(
    name: str,
    difference: npt.NDArray[np.float64],
    middle: npt.NDArray[np.float64],
    norms: npt.NDArray[np.float64],
    model: Fingerprint,
    kept: list[int],
    meta: dict[str, MetaValue],
) -> Vector:
    rows = difference[kept].astype(np.float32)
    strength = np.linalg.norm(rows.astype(np.float64), axis=1) / norms[kept]
    center = coordinates(rows[:, None], (rows * middle[kept]).sum(axis=1, keepdims=True))
    meta.update(
        site="residual",
        captured_at="output of the same block",
        scale=1.0,
        strength=[float(s) for s in strength],
        stream_norm=[float(n) for n in norms[kept]],
        center=center.ravel().tolist(),
    )
    return Vector(name, tuple(kept), rows, model, meta=meta)


def _tokenizer(llm: Any, raw: bool) -> Tokenizer:
    def tokens(sample: Sample) -> list[int]:
        if raw:
            found = raw_tokens(llm, f"{sample.user} {sample.opening}".strip())
        else:
            found = chat_tokens(llm, [{"role": "user", "content": sample.user}], sample.opening)
        if len(found) > llm.n_ctx():
            raise MienError(f"expected at most {llm.n_ctx()} tokens, got {len(found)}: {sample.user[:60]!r}")
        return found

    return tokens
