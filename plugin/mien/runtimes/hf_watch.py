"""Readouts of the blocks' outputs during a forward pass, for a Watch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..vector import Floats
from ..watch import Watch
from .hf_rows import Rows


class Reader:
    """What a watch asks for, in the form in which torch reads it."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.place = {layer: i for i, layer in enumerate(watch.layers)}
        self.width = watch.vectors[0].width
        self._tables: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def read(self, layer: int, h: Tensor) -> Tensor:
        """The readouts of each row, float32 (rows, vectors); NaN where a vector has no direction there.

        h: (..., n_embd).
        """
        wide = torch.promote_types(h.dtype, torch.float32)
        rows, centers = self._table(layer, h.device, wide)
        return (h.detach().reshape(-1, self.width).to(wide) @ rows.mT - centers).float()

    def _table(self, layer: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What reads (vectors, n_embd), and what is taken off (vectors,), NaN for no direction."""
        key = layer, device, dtype
        if key not in self._tables:
            rows: Floats = np.zeros((len(self.watch.vectors), self.width), dtype=np.float32)
            centers: npt.NDArray[np.float64] = np.full(len(rows), np.nan)
            for i, vector in enumerate(self.watch.vectors):
                if layer in vector.layers and vector.directions[layer].any():
                    at = vector.layers.index(layer)
                    rows[i], centers[i] = vector.readouts[at, 0], vector.center[at, 0]
            placed = torch.from_numpy(rows).to(device, dtype), torch.from_numpy(centers).to(device, dtype)
            self._tables[key] = placed
        return self._tables[key]


class Readings:
    """What was read in one forward pass: by the engine of what lies in float32 on the CPU, else by torch."""

    def __init__(self, reader: Reader, rows: Rows) -> None:
        self.reader, self.rows = reader, rows
        self._count = rows.batch * rows.tokens
        vectors, layers = len(reader.watch.vectors), len(reader.place)
        self._found: Floats = np.full((2, layers, self._count, vectors), np.nan, dtype=np.float32)
        self._address, self._stride = self._found.ctypes.data, 4 * self._count * vectors
        self._later: list[tuple[int, int, Tensor]] = []  # by torch, which is not waited for
        self._taken: tuple[set[int], set[int]] = set(), set()  # layers, before and after

    def take(self, layer: int, h: Tensor, after: bool) -> None:
        """Read a block's output (batch, tokens, n_embd), before the program acted on it or after."""
        place, width = self.reader.place[layer], self.reader.width
        self._taken[after].add(place)
        if h.dtype is torch.float32 and h.is_cpu and h.is_contiguous() and h.numel() == self._count * width:
            address = self._address + self._stride * (after * len(self.reader.place) + place)
            self.reader.watch.probe.read_at(layer, h.data_ptr(), self._count, address)
        else:
            self._later.append((int(after), place, self.reader.read(layer, h)))

    @property
    def missing(self) -> list[int]:
        """The layers that did not come by."""
        return [layer for layer, place in self.reader.place.items() if place not in self._taken[0]]

    def deliver(self) -> None:
        """Give the watch all of them, without the padding."""
        found, rows = self._found, self.rows
        for side, place, read in self._later:
            found[side, place] = read.cpu().numpy()
        same = sorted(self._taken[0] - self._taken[1])
        found[1, same] = found[0, same]
        read = found.swapaxes(1, 2)
        of, replies = np.repeat(np.arange(rows.batch), rows.tokens), np.tile(rows.numbered, rows.batch)
        if rows.real is not None:
            real = rows.real.cpu().numpy().reshape(-1)
            of, replies, read = of[real], replies[real], read[:, real]
        self.reader.watch.note(of.tolist(), replies.tolist(), np.ascontiguousarray(read))
