"""Extraction: directions from contrast texts, read from the model itself.

The texts' tokens are a tree that is walked once (`trie`), whatever runs the model (`evaluation`). Of a text
is read the output of every block at its last token, its mean over the reply, or at every token of the reply;
`methods` says how two sets of that make a direction. The direction of block N is read and added at the same
block. In a group, the negative of each member is all of the group.

How well a layer tells the two sides apart is measured on texts of scenarios that took no part in finding the
direction: `mien.accuracy`, a number a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from . import methods
from .contrast import Sample, digest
from .errors import MienError
from .evaluation import Evaluator, Progress, Text, evaluator, silent
from .fingerprint import Fingerprint
from .spans import coordinates
from .vector import Floats, MetaValue, Vector

READS = {"last": "last token", "mean": "mean of the reply", "every": "every token of the reply"}
NORM_SAMPLES = 16  # texts over which the stream's norm is taken: thousands of tokens, steady to 1%
FOLDS = 12  # scenarios are left out one by one, or, where there are more, in so many parts
SLOW_FOLDS = 4  # of methods that take longer than a mean


@dataclass(frozen=True)
class States:
    """What was read of one set of texts. rows: float32 (n, layers, n_embd). scenarios: by row."""

    rows: Floats
    scenarios: tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """What was read of a contrast: sets of states by name, and the stream's norm, at the kept layers."""

    sets: Mapping[str, States]
    norms: npt.NDArray[np.float64]
    layers: tuple[int, ...]
    model: Fingerprint


def extract(
    model: Any,
    name: str,
    positive: Sequence[str | Sample],
    negative: Sequence[str | Sample],
    *,
    method: str = "mean",
    read: str = "last",
    layers: Sequence[int] | None = None,
    raw: bool = False,
    meta: Mapping[str, MetaValue] | None = None,
    tokenizer: Any = None,
    progress: Progress = silent,
) -> Vector:
    """A vector that points from the negative texts to the positive.

    model: a llama_cpp.Llama, not attached, or a transformers model with its tokenizer. positive, negative:
    texts; "USER TEXT => REPLY" is put into the model's chat template, with raw=True it is taken as it stands.
    method: a key of methods.METHODS; of those in pairs, text i of each side are one. read: a key of READS.
    layers: blocks to keep, all but block 0 by default. meta: more metadata for the file. progress: called
    with the tokens that are done, and all.

    Raises MienError for an empty side, a text that stands twice or on both sides, one longer than the
    context, a model without a template, an unknown method.
    """
    sides = {"positive": as_samples(positive), "negative": as_samples(negative)}
    _require_contrast(sides)
    _require_known(method, read)
    with _evaluating(model, tokenizer) as many:
        reading = read_states(many, sides, read=read, layers=layers, raw=raw, progress=progress)
    counts = {side: len(samples) for side, samples in sides.items()}
    return vector_between(
        name,
        reading,
        "positive",
        method,
        {
            **(meta or {}),
            "method": f"{method}, {READS[read]}",
            "data_digest": digest(*sides.values()),
            "samples": list(counts.values()),
            "accuracy": held_out_accuracy(reading, "positive", method),
        },
    )


def extract_group(
    model: Any,
    groups: Mapping[str, Sequence[str | Sample]],
    *,
    method: str = "mean",
    read: str = "last",
    layers: Sequence[int] | None = None,
    raw: bool = False,
    meta: Mapping[str, Mapping[str, MetaValue]] | None = None,
    tokenizer: Any = None,
    progress: Progress = silent,
) -> dict[str, Vector]:
    """A vector for each member of a group, from the group to the member.

    By difference of means that is its mean minus the mean of the members' means; by another method, what
    tells it from all others. Arguments and errors as for `extract`; meta: by member.
    """
    if len(groups) < 2:
        raise MienError("a group needs at least two members to differ from each other")
    samples = {name: as_samples(texts) for name, texts in groups.items()}
    _require_contrast(samples)
    _require_known(method, read)
    if method in methods.PAIRED:
        raise MienError(f"{method} takes pairs of texts: a group has none")
    with _evaluating(model, tokenizer) as many:
        reading = read_states(many, samples, read=read, layers=layers, raw=raw, progress=progress)
    data, everything = digest(*samples.values()), sum(map(len, samples.values()))
    return {
        name: vector_between(
            name,
            reading,
            name,
            method,
            {
                **(meta or {}).get(name, {}),
                "method": f"{method}, {READS[read]}, from the mean of {', '.join(samples)}",
                "data_digest": data,
                "samples": [len(samples[name]), everything],
                "accuracy": held_out_accuracy(reading, name, method),
            },
        )
        for name in samples
    }


@contextmanager
def _evaluating(model: Any, tokenizer: Any) -> Iterator[Evaluator]:
    """An evaluator of a model; one that is passed as such is left open."""
    if hasattr(model, "log_probabilities"):
        yield model
        return
    with closing(evaluator(model, tokenizer)) as many:
        yield many


def as_samples(texts: Sequence[str | Sample]) -> list[Sample]:
    samples = [Sample.parse(text) if isinstance(text, str) else text for text in texts]
    if not samples:
        raise MienError("each side of a contrast needs at least one text")
    return samples


def _require_contrast(sides: Mapping[str, Sequence[Sample]]) -> None:
    """No text twice on a side, which would count double, and none on two sides, which says nothing."""
    owners: dict[Sample, str] = {}
    for side, samples in sides.items():
        for sample in samples:
            shown = f"{sample.user} => {sample.opening}".strip(" =>")
            owner = owners.setdefault(sample, side)
            if owner != side:
                raise MienError(f"{shown!r} is said both by {owner} and by {side}")
        if len(set(samples)) < len(samples):
            twice = next(s for i, s in enumerate(samples) if s in samples[:i])
            raise MienError(f"{side}: {twice.user!r} => {twice.opening!r} stands there twice")


def _require_known(method: str, read: str) -> None:
    if method not in methods.METHODS:
        raise MienError(f"method: expected one of {', '.join(methods.METHODS)}, got {method!r}")
    if read not in READS:
        raise MienError(f"read: expected one of {', '.join(READS)}, got {read!r}")


def text_of(many: Evaluator, sample: Sample, raw: bool = False) -> Text:
    """A sample as tokens, of which the opening is the reply."""
    if raw:
        joined = f"{sample.user} " if sample.opening else sample.user
        return many.text([{"role": "user", "content": joined}], sample.opening, raw=True)
    return many.text([{"role": "user", "content": sample.user}], sample.opening)


def read_states(
    many: Evaluator,
    groups: Mapping[str, Sequence[Sample]],
    *,
    read: str = "last",
    layers: Sequence[int] | None = None,
    raw: bool = False,
    progress: Progress = silent,
) -> Reading:
    """Read every text once. Arguments and errors as for `extract`."""
    kept = layers_to_keep(layers, many.fingerprint)  # before minutes of reading, not after
    every = [(name, sample) for name, samples in groups.items() for sample in samples]
    texts = [text_of(many, sample, raw) for _, sample in every]
    for text, (_, sample) in zip(texts, every):
        if read != "last" and not text.answer:
            raise MienError(
                f"read={read!r} needs a reply to read: {sample.user[:60]!r} has none (TEXT => REPLY)"
            )
    found: dict[str, list[tuple[int, Floats]]] = {name: [] for name in groups}
    for i, states in many.capture(texts, kept, last=read == "last", progress=progress):
        rows = states.mean(axis=1, keepdims=True) if read == "mean" else states
        found[every[i][0]].append((i, rows.transpose(1, 0, 2)))
    sets = {}
    for name, parts in found.items():
        parts.sort(key=lambda part: part[0])
        scenarios = tuple(every[i][1].user for i, rows in parts for _ in rows)
        sets[name] = States(np.concatenate([rows for _, rows in parts]), scenarios)
    norms = stream_norms(many, texts[:: max(len(texts) // NORM_SAMPLES, 1)], kept)
    return Reading(sets, norms, tuple(kept), many.fingerprint)


def layers_to_keep(layers: Sequence[int] | None, model: Fingerprint) -> list[int]:
    kept = list(layers) if layers is not None else list(range(1, model.n_layer))
    wrong = [layer for layer in kept if not 1 <= layer < model.n_layer]
    if wrong or not kept:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        got = ", ".join(map(str, wrong[:3])) + more if wrong else "none"
        raise MienError(f"layers: expected some of 1 to {model.n_layer - 1}, got {got}")
    return kept


def stream_norms(many: Evaluator, texts: Sequence[Text], layers: Sequence[int]) -> npt.NDArray[np.float64]:
    """Median Euclidean norm of the residual stream at the outputs of `layers`, float64 (len(layers),).

    The first token of each text is left out: it is an outlier by a factor of a hundred.
    """
    whole = [Text(text.tokens, 1) for text in texts if len(text.tokens) > 1]
    norms = [np.linalg.norm(states.astype(np.float64), axis=2) for _, states in many.capture(whole, layers)]
    if not norms:
        raise MienError("every text is a single token: there is no stream to measure")
    median: npt.NDArray[np.float64] = np.median(np.concatenate(norms, axis=1), axis=1)
    return median


def vector_between(
    name: str, reading: Reading, positive: str, method: str, meta: Mapping[str, MetaValue]
) -> Vector:
    """The vector from the other sets of `reading` to the set `positive`, with what is known of it."""
    found = [_direction(reading, positive, i, method) for i in range(len(reading.layers))]
    rows = np.stack([direction.row for direction in found])
    bias = [direction.bias for direction in found if direction.bias is not None]
    if not bias and not _is_group(reading):
        rows = np.stack([_lengthened(reading, positive, i, row) for i, row in enumerate(rows)])
    return vector_of(name, rows, middle(reading), reading, meta, bias or None)


def vector_of(
    name: str,
    rows: npt.NDArray[Any],
    middle: npt.NDArray[np.float64],
    reading: Reading,
    meta: Mapping[str, MetaValue],
    bias: Sequence[float] | None = None,
) -> Vector:
    """A vector of the residual stream. rows, middle: (layers, n_embd); middle: what reads as zero."""
    rows = rows.astype(np.float32)
    strength = np.linalg.norm(rows.astype(np.float64), axis=1) / reading.norms
    center = coordinates(rows[:, None], (rows * middle).sum(axis=1, keepdims=True))
    known: dict[str, MetaValue] = {
        **meta,
        "site": "residual",
        "captured_at": "output of the same block",
        "scale": 1.0,
        "strength": [float(s) for s in strength],
        "stream_norm": [float(n) for n in reading.norms],
        "center": center.ravel().tolist(),
        **({"bias": list(bias)} if bias is not None else {}),
    }
    return Vector(name, reading.layers, rows, reading.model, meta=known)


def _others(reading: Reading, positive: str) -> list[States]:
    return [states for name, states in reading.sets.items() if name != positive]


def _is_group(reading: Reading) -> bool:
    return len(reading.sets) > 2 or "negative" not in reading.sets


def middle(reading: Reading) -> npt.NDArray[np.float64]:
    """The mean of the sets' means, (layers, n_embd)."""
    means = [states.rows.mean(axis=0, dtype=np.float64) for states in reading.sets.values()]
    return np.asarray(np.mean(means, axis=0))


def _direction(
    reading: Reading, positive: str, layer: int, method: str, without: frozenset[str] = frozenset()
) -> methods.Direction:
    """What `method` finds at the layer of that place, from texts of scenarios that are not left out."""
    up, downs = _split(reading, positive, layer, without)
    if method == "mean" and _is_group(reading):
        middle = np.mean([up.mean(axis=0), *(down.mean(axis=0) for down in downs)], axis=0)
        return methods.Direction(up.mean(axis=0) - middle)
    return methods.METHODS[method](up, np.concatenate(downs))


def _split(
    reading: Reading, positive: str, layer: int, without: frozenset[str], inside: bool = False
) -> tuple[methods.States, list[methods.States]]:
    """(the positive states, those of each other set) at a layer; inside: those of the scenarios instead."""

    def chosen(states: States) -> methods.States:
        rows = states.rows[:, layer]
        if without or inside:
            rows = rows[[(scenario in without) == inside for scenario in states.scenarios]]
        return rows.astype(np.float64)

    return chosen(reading.sets[positive]), [chosen(states) for states in _others(reading, positive)]


def _lengthened(reading: Reading, positive: str, layer: int, row: methods.States) -> methods.States:
    up, downs = _split(reading, positive, layer, frozenset())
    try:
        return methods.to_length(methods.Direction(row), up, np.concatenate(downs))
    except MienError as error:
        raise MienError(f"block {reading.layers[layer]}: {error}; are both sides the same texts?") from None


def held_out_accuracy(reading: Reading, positive: str, method: str) -> list[float]:
    """By layer, the share of states of left-out scenarios that lie on the right side of the middle.

    Both sides count the same. The direction and the middle are found without them. NaN is no answer: with
    scenarios on one side only, or a single one, there is nothing to leave out, and the list is empty.
    """
    mine = set(reading.sets[positive].scenarios)
    others = {scenario for states in _others(reading, positive) for scenario in states.scenarios}
    scenarios = sorted(mine | others)
    count = min(len(scenarios), FOLDS if method == "mean" else SLOW_FOLDS)
    if count < 2:
        return []
    folds = [frozenset(scenarios[k::count]) for k in range(count)]
    if not (mine & others):  # texts of no common scenario: both sides must be in every fold
        folds = [
            frozenset(sorted(mine)[k::count]) | frozenset(sorted(others)[k::count]) for k in range(count)
        ]
    result = []
    for layer in range(len(reading.layers)):
        right: list[list[bool]] = [[], []]
        for fold in folds:
            up, downs = _split(reading, positive, layer, fold, inside=True)
            rest, rests = _split(reading, positive, layer, fold)
            if not len(rest) or not all(map(len, rests)):
                continue
            row = _direction(reading, positive, layer, method, fold).row
            middle = (float(rest.mean(axis=0) @ row) + float(np.concatenate(rests).mean(axis=0) @ row)) / 2
            right[0] += (up @ row > middle).tolist()
            right[1] += (np.concatenate(downs) @ row < middle).tolist()
        if not right[0] or not right[1]:
            return []
        result.append(float((np.mean(right[0]) + np.mean(right[1])) / 2))
    return result
