"""What should be of any history of a llama.cpp context, for tests that make random ones.

The model of it is short on purpose: for each position of the KV cache what was evaluated there, and a recipe
without windows that acted on it. An empty context is given the same, position by position, and must have the
same logits, bit for bit, which these models and contexts allow (see tiny.QUANTISED and
llama_batches.parameters_for).
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp.llama_cpp as api
import mien
import numpy as np
from hypothesis import HealthCheck, settings
from llama_batches import Contexts, logits_of
from makers import DictRegistry, make_vector

PATHS = ["in-graph", "post-compute"]
N_EMBD, N_CTX = 64, 96
REGISTRY = DictRegistry(
    *(
        make_vector(name, (1, 2, 3), seed, fingerprint=None, n_embd=N_EMBD, model_hint="llama", site=site)
        for seed, (name, site) in enumerate(
            [("a", "residual"), ("b", "residual"), ("c", "residual"), ("m", "mlp")]
        )
    )
)


# Of their state machines. HISTORIES: how many to make, by hand some thousands.
SETTINGS = settings(
    max_examples=int(os.environ.get("HISTORIES", "40")),
    stateful_step_count=30,
    suppress_health_check=[HealthCheck.too_slow],
)


# ---- recipes, and what they come to ----


class Case(NamedTuple):
    """given: what is set. at: the recipe without windows that acts on token `reply` of a reply, -1 being a
    prompt's, in turn `turn`. remembers: on a reply it depends on the token before."""

    given: Any
    at: Callable[[int, int], str]
    remembers: bool = False


LATCHED = "gate(a, on=c, above=0.1, latch=True)"
STICKY = "gate(b, on=a, above=0.2, hysteresis=0.5) + gate(a, on=b, below=-0.2, latch=True)"
CASES = [
    Case(None, lambda reply, turn: ""),
    Case({}, lambda reply, turn: ""),
    Case("a", lambda reply, turn: "a"),
    Case({"a": 0.5, "b": -1}, lambda reply, turn: "0.5*a - b"),
    Case("a - 0.5*b(keep_norm=True)", lambda reply, turn: "a - 0.5*b(keep_norm=True)"),
    Case("ablate(b) + m", lambda reply, turn: "ablate(b) + m"),
    Case("clamp(b, 1.5)", lambda reply, turn: "clamp(b, 1.5)"),
    Case("gate(a, on=b, above=0.1)", lambda reply, turn: "gate(a, on=b, above=0.1)"),
    Case('a(when="response")', lambda reply, turn: "a" if reply >= 0 else ""),
    Case(
        'a(when="prompt") + b(start=1, stop=3)',
        lambda reply, turn: "a" if reply < 0 else "b" * (0 < reply < 3),
    ),
    Case("2*c(ramp=2)", lambda reply, turn: "" if reply < 0 else "c" if reply == 0 else "2*c"),
    Case("2*c(start=1, decay=1)", lambda reply, turn: "" if reply < 1 else f"{2.0 ** (2 - reply)!r}*c"),
    Case("a(turn=2) + b", lambda reply, turn: "a + b" if turn == 2 else "b"),
    Case(LATCHED, lambda reply, turn: LATCHED if reply >= 0 else "gate(a, on=c, above=0.1)", True),
    Case(
        STICKY,
        lambda reply, turn: STICKY if reply >= 0 else "gate(b, on=a, above=0.2) + gate(a, on=b, below=-0.2)",
        True,
    ),
    Case(
        'gate(a(when="response"), on=c, above=0.1, latch=True) + b',
        lambda reply, turn: f"{LATCHED} + b" if reply >= 0 else "b",
        True,
    ),
]
PLAIN = CASES[0]


class Cell(NamedTuple):
    """A position of the KV cache. what: a token, or the bytes of a row of embeddings. text: what acted on it.
    reply: its number in the reply, if it depends on the token before; else -1. epoch: then a number that
    changes whenever that is forgotten. wanted: whether its logits were asked for, without which the last
    block is not computed."""

    what: int | bytes
    text: str
    reply: int = -1
    epoch: int = 0
    wanted: bool = True


# ---- the measure ----


class Measure:
    """Contexts that are given a whole history at once."""

    def __init__(self, path: Path) -> None:
        self.contexts = Contexts(path)
        self.hooked, self.plain = self.contexts.make(), self.contexts.make(hooked=False)
        self.steering = mien.attach(self.hooked, registry=REGISTRY)
        self.watch = self.steering.watch("a", "b")

    def logits(self, cells: Sequence[Cell]) -> np.ndarray:
        """After the last of them, whose logits are wanted."""
        api.llama_memory_clear(api.llama_get_memory(self.hooked), True)
        position, acts = 0, None
        begins = [i - cell.reply if cell.reply >= 0 else -1 for i, cell in enumerate(cells)]
        for (text, epoch, row, begin), group in itertools.groupby(
            zip(cells, begins),
            lambda pair: (pair[0].text, pair[0].epoch, isinstance(pair[0].what, bytes), pair[1]),
        ):
            run = [cell for cell, _ in group]
            if (text, epoch) != acts:  # gates begin anew
                acts = text, epoch
                self.steering.set(text)
            self.steering.reply_from(begin if begin >= 0 else position + len(run))
            decode(self.steering.decode, run, position, row)
            position += len(run)
        found = logits_of(self.hooked, -1)
        if not any(cell.text for cell in cells):
            assert np.array_equal(found, self.plain_logits(cells))
        return found

    def plain_logits(self, cells: Sequence[Cell]) -> np.ndarray:
        api.llama_memory_clear(api.llama_get_memory(self.plain), True)
        position = 0
        for row, group in itertools.groupby(cells, lambda cell: isinstance(cell.what, bytes)):
            run = list(group)
            decode(lambda batch: api.llama_decode(self.plain, batch), run, position, row)
            position += len(run)
        return logits_of(self.plain, -1)

    def captured(self, tokens: Sequence[int], text: str) -> np.ndarray:
        self.steering.set(text)
        return self.steering.capture(tokens, last=len(tokens))


def decode(
    decode: Callable[[Any], int], cells: Sequence[Cell], position: int, rows: bool, sequence: int = 0
) -> None:
    """One batch of tokens, or of rows of embeddings."""
    batch = api.llama_batch_init(len(cells), N_EMBD if rows else 0, 1)
    batch.n_tokens = len(cells)
    for i, (what, *_, wanted) in enumerate(cells):
        if isinstance(what, bytes):
            ctypes.memmove(ctypes.addressof(batch.embd.contents) + i * len(what), what, len(what))
        else:
            batch.token[i] = what
        batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = position + i, 1, sequence
        batch.logits[i] = wanted
    try:
        assert decode(batch) == 0
    finally:
        api.llama_batch_free(batch)
