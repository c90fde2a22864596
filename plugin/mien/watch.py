"""Readouts while a model runs: how much of some vectors each token's activations hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .engine import Probe
from .errors import NameNotFound, VectorError
from .vector import Floats, Vector

KEPT = 8192  # tokens


class Token(NamedTuple):
    """What was read of one token, in calibrated units, over all layers; see Watch.

    sequence: which one of a batch. reply: its number in the reply, from 0; -1 is a token of the prompt.
    before, after: {name: readout} before the program acted on the token, and after.
    """

    sequence: int
    reply: int
    before: dict[str, float]
    after: dict[str, float]


class Watch:
    """The readouts of each token that was evaluated since `Steering.watch`, of the newest `KEPT` at least.

        with steering.watch("anger", "calm") as watch:
            for piece in llm.create_chat_completion(ask, stream=True):
                print(watch.last.after["anger"])
        watch.series("anger")

    A readout is <h, v> / <v, v> - center at the output of a block: 1 is what coefficient 1 adds there. Over
    layers it is the coordinate of all their rows together along the whole vector, sum <h, v> / sum <v, v>,
    so that a layer counts by its direction's squared length; a plain mean would be the noise of those with
    the shortest. names: as they were asked for. layers: the blocks that are read. Where a vector has no
    direction, and in rows that llama.cpp does not compute (the last block of tokens without logits), it is
    NaN.
    """

    def __init__(
        self,
        names: Sequence[str],
        vectors: Sequence[Vector],
        n_layer: int,
        on_token: Callable[[Token], None] | None = None,
    ) -> None:
        for vector in vectors:
            if vector.site != "residual" or vector.rank != 1:
                raise VectorError(
                    f"{vector.name}: one direction a layer of the residual stream can be watched"
                )
        self.names = tuple(names)
        self.vectors = tuple(vectors)
        self.layers = tuple(sorted({layer for vector in vectors for layer in vector.layers}))
        self.probe = Probe(n_layer, vectors)
        squares = [[_square(vector, layer) for vector in vectors] for layer in self.layers]
        self._weights = np.array(squares)  # float64 (layers, names)
        self._on_token = on_token
        self._stop: Callable[[], None] = lambda: None
        self._passes: list[_Pass] = []
        self._count = 0

    # For the runtime.

    def note(self, sequences: Sequence[int], replies: Sequence[int], read: Floats) -> None:
        """Take down the tokens of one pass. read: float32 (2, tokens, len(layers), len(names)), the readouts
        before and after; it is the watch's own from then on."""
        new = _Pass(sequences, replies, read)
        self._passes.append(new)
        self._count += len(sequences)
        while self._count > KEPT and len(self._passes) > 1:
            self._count -= len(self._passes.pop(0).replies)
        if self._on_token is not None:
            for i in range(len(sequences)):
                self._on_token(self._token(new, i))

    def when_stopped(self, stop: Callable[[], None]) -> None:
        """What `stop` has to do."""
        self._stop = stop

    # For the user.

    def __len__(self) -> int:
        """How many tokens there are."""
        return self._count

    @property
    def last(self) -> Token:
        """The newest token. Raises IndexError where there is none yet."""
        return self._token(self._passes[-1], -1)

    def series(
        self, name: str, *, after: bool = True, sequence: int | None = 0, prompt: bool = False
    ) -> npt.NDArray[np.float64]:
        """The readout of `name` for each token of a sequence, over all layers: float64 (tokens,).

        after: as steered, else before the program acted. sequence: None for all. prompt: its tokens, too.
        Raises NameNotFound for what is not watched.
        """
        found = self.by_layer(name, after=after, sequence=sequence, prompt=prompt)
        return _over_layers(found, self._weights[:, self.names.index(name)])

    def by_layer(
        self, name: str, *, after: bool = True, sequence: int | None = 0, prompt: bool = False
    ) -> Floats:
        """As `series`, layer by layer: float32 (tokens, len(layers))."""
        if name not in self.names:
            raise NameNotFound(name, self.names, what="watched vector")
        chosen = [
            one.read[int(after), i, :, self.names.index(name)]
            for one in self._passes
            for i, (of, reply) in enumerate(zip(one.sequences, one.replies))
            if (sequence is None or of == sequence) and (prompt or reply >= 0)
        ]
        return np.stack(chosen) if chosen else np.empty((0, len(self.layers)), dtype=np.float32)

    def clear(self) -> None:
        """Forget what was read."""
        self._passes, self._count = [], 0

    def stop(self) -> None:
        """Read no further; what was read stays. Doing it twice does nothing."""
        self._stop()
        self._stop = lambda: None

    def _token(self, one: _Pass, i: int) -> Token:
        before, after = (
            dict(zip(self.names, map(float, _over_layers(part[i].T, self._weights.T)))) for part in one.read
        )
        return Token(one.sequences[i], one.replies[i], before, after)

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


class _Pass(NamedTuple):
    """Tokens that were evaluated together. read: as in Watch.note."""

    sequences: Sequence[int]
    replies: Sequence[int]
    read: Floats


def _square(vector: Vector, layer: int) -> float:
    """The squared length of the direction there, 0 for none."""
    row = vector.directions.get(layer)
    return 0.0 if row is None else float(np.square(row, dtype=np.float64).sum())


def _over_layers(
    readouts: npt.NDArray[np.floating[Any]], weights: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The weighted mean over the last axis of what is there; NaN where nothing is."""
    there = np.isfinite(readouts) * weights
    total = (np.where(np.isfinite(readouts), readouts, 0.0) * weights).sum(axis=-1)
    count = there.sum(axis=-1)
    result: npt.NDArray[np.float64] = np.full(total.shape, np.nan)
    np.divide(total, count, out=result, where=count > 0)
    return result
