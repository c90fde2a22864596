"""One forward pass: what acts on which rows, and what was done."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..engine import CompiledProgram, apply_tokens_at
from ..errors import SteeringNotApplied
from ..steering import Applied, LayerApplied
from .hf_layers import text_config
from .hf_program import Loaded, runs
from .hf_rows import Rows
from .hf_steer import act, add_plainly, lengths
from .hf_tables import Directions
from .hf_watch import Readings

if TYPE_CHECKING:
    from .hf_replay import Trace

_SPLIT = 1 << 20  # floats from which on a layer's rows are shared out among torch's number of threads
_NOWHERE: frozenset[int] = frozenset()


class Added(NamedTuple):
    """What torch plainly added, measured once somebody asks."""

    directions: Directions
    moved: Tensor | None


# What was done at a place: by the engine on all rows the sum of the squared lengths that they moved by, on
# some the same and how many; by torch what was added, or the length that each row moved by.
Done: TypeAlias = "float | tuple[float, int] | Added | Tensor"


class Pass:
    """One forward pass.

    places: where something acts, layers by site; acting: those of the residual stream that its hooks look
    after, which is none where readings are taken. observed: whether readings or a capture are. whole: the
    one program that adds the same to all rows. fast: whether the engine may be asked at all. moved: what
    was done at the residual stream, by layer; elsewhere: by site and layer. trace: set while it runs, if
    gradients may come back to it.
    """

    __slots__ = (
        "_numbers",
        "_shapes",
        "_single",
        "_tokens",
        "acting",
        "count",
        "elsewhere",
        "expected",
        "fast",
        "loaded",
        "moved",
        "no_grad",
        "observed",
        "places",
        "readings",
        "rows",
        "runs",
        "shape",
        "trace",
        "whole",
    )

    def __init__(self, loaded: Loaded, rows: Rows, n_embd: int) -> None:
        if rows.real is not None and rows.real.device.type == "cpu" and bool(rows.real.all()):
            rows = rows._replace(real=None)
        self.loaded, self.rows = loaded, rows
        self.shape = (rows.batch, rows.tokens, n_embd)
        self.count = rows.batch * rows.tokens
        self._shapes = self.shape[:2], (self.count,)
        device = torch.device("cpu") if rows.real is None else rows.real.device
        self._numbers = loaded.numbers(rows, device)
        self.places = loaded.acting(rows)
        self.acting = self.places.get("residual", _NOWHERE)
        self.expected = sum(map(len, self.places.values()))
        self.fast = device.type == "cpu"  # else it is not known here which rows are real
        self.runs = runs(self._numbers, rows) if self.expected and self.fast else []
        self._tokens = loaded.tokens(rows) if self.runs else None
        self.whole: Any = None
        self._single: CompiledProgram | None = None
        if len(self.runs) == 1 and self.runs[0][2] == self.count:
            part = self.runs[0][0] - 1
            self._single = loaded.compiled[part]
            if loaded.plain[part] and self.count * n_embd < _SPLIT:
                self.whole = self._single.handle
        self.no_grad = not torch.is_grad_enabled()
        self.observed = False
        self.readings: Readings | None = None
        self.trace: Trace | None = None
        self.moved: dict[int, Done] = {}
        self.elsewhere: dict[tuple[str, int], Done] = {}

    def watch(self, readings: Readings) -> None:
        """Take readings; the blocks' hooks then act as they do so."""
        self.readings, self.acting = readings, _NOWHERE

    # ---- acting ----

    def steer(self, site: str, layer: int, h: Tensor, own: bool) -> Tensor:
        """The steered activations. h: (batch, tokens, width) or (batch * tokens, width); own: whether they
        may be changed in place.

        Raises SteeringNotApplied where they are of another shape.
        """
        if not isinstance(h, Tensor):
            raise SteeringNotApplied(
                f"layer {layer}: expected a tensor, alone or the first of a tuple or list, got "
                f"{type(h).__name__}" + ("" if site == "residual" else f" at {site}"),
                [layer],
            )
        width = self.loaded.widths[site, layer]
        if h.shape[-1] != width or h.shape[:-1] not in self._shapes or not h.is_floating_point():
            raise SteeringNotApplied(
                f"layer {layer}: expected activations {(*self.shape[:2], width)} in floating point, got "
                f"{tuple(h.shape)} {h.dtype}" + ("" if site == "residual" else f" at {site}"),
                [layer],
            )
        own = own and h.is_contiguous() and not h.requires_grad
        done: Done
        if self.fast and own and h.dtype is torch.float32 and h.is_cpu:
            if self._single is not None and self.count * width < _SPLIT:
                said = self._tokens.address() if self._tokens is not None else 0
                done = apply_tokens_at(self._single, site, layer, h.data_ptr(), self.count, said)
            else:
                done = self._by_engine(site, layer, h.data_ptr(), width)
        else:
            h, done = self._by_torch(site, layer, h, own)
        if site == "residual":
            self.moved[layer] = done
        else:
            self.elsewhere[site, layer] = done
        return h

    def _by_engine(self, site: str, layer: int, address: int, width: int) -> tuple[float, int]:
        """On each stretch of rows at `address`."""
        threads = torch.get_num_threads() if self.count * width >= _SPLIT else 1
        share = -(-self.count // threads)
        pieces = []
        for part, first, count in self.runs:
            program, tokens = self.loaded.compiled[part - 1], self._tokens
            size = count if self.loaded.remembers[part - 1] else share  # what remembers goes in order
            for start in range(first, first + count, size):
                said = tokens.address(start) if tokens is not None else 0
                rows = min(size, first + count - start)
                pieces.append((program, site, layer, address + 4 * width * start, rows, said))
        if threads == 1:
            found = [apply_tokens_at(*piece) for piece in pieces]
        else:
            found = list(_pool(threads).map(lambda piece: apply_tokens_at(*piece), pieces))
        return sum(squares for squares, _ in found), sum(rows for _, rows in found)

    def _by_torch(self, site: str, layer: int, h: Tensor, own: bool) -> tuple[Tensor, Done]:
        """Where the engine can't: on a device, in another dtype, under autograd."""
        table = self.loaded.table(site, layer, h.device, h.dtype)
        numbers = self.numbers(h.device)
        shaped = h.reshape(*self.shape[:2], -1)
        if isinstance(table, Directions):
            steered, moved = add_plainly(shaped, table, numbers, own)
            return (h if own else steered.reshape(h.shape)), Added(table, moved)
        assert table is not None  # the engine's program acts there
        memory = self.loaded.memory(self.rows, (site, layer))
        steered, moved = act(shaped, table, numbers, self.rows, memory)
        return steered.reshape(h.shape), moved

    def numbers(self, device: torch.device) -> int | Tensor:
        if isinstance(self._numbers, Tensor) and self._numbers.device != device:
            self._numbers = self._numbers.to(device)
        return self._numbers

    # ---- afterwards ----

    def missing(self) -> dict[str, list[int]]:
        """The layers, by site, where something should have acted or been read and nothing came by."""
        unread = self.readings.missing if self.readings is not None else []
        if len(self.moved) + len(self.elsewhere) == self.expected and not unread:
            return {}
        met = {("residual", layer) for layer in self.moved}.union(self.elsewhere)
        found = {
            site: [layer for layer in sorted(layers) if (site, layer) not in met]
            for site, layers in self.places.items()
        }
        if unread:
            found["residual"] = sorted({*unread, *found.get("residual", ())})
        return {site: layers for site, layers in found.items() if layers}

    def require(self, model: Any) -> None:
        """Raise SteeringNotApplied if layers of the model did not come by."""
        missing = self.missing()
        if not missing or model.training:  # training may skip layers on purpose
            return
        count = text_config(model).num_hidden_layers  # lowered while the model drafts for itself
        missing = {site: [layer for layer in layers if layer < count] for site, layers in missing.items()}
        missing = {site: layers for site, layers in missing.items() if layers}
        if not missing:
            return
        said = [
            f"layers {layers}" + ("" if site == "residual" else f" at {site}")
            for site, layers in missing.items()
        ]
        raise SteeringNotApplied(
            f"{' and '.join(said)} were not run: the model skipped them, or their hooks were taken away; "
            "detach and attach again",
            sorted({layer for layers in missing.values() for layer in layers}),
        )

    def applied(self) -> Applied:
        applied = Applied(self.loaded.recipes, {})
        here = {("residual", layer): done for layer, done in self.moved.items()}
        for (site, layer), done in sorted({**here, **self.elsewhere}.items()):
            rows, squares, path = self._measured(done)
            if rows:
                applied.note(site, layer, LayerApplied(rows, math.sqrt(squares / rows), path))
        return applied

    def _measured(self, done: Done) -> tuple[int, float, str]:
        """(rows that were changed, the sum of their squared shifts, how); waits for a device."""
        if isinstance(done, float):
            return self.count, done, "engine"
        if isinstance(done, Tensor):
            return int((done > 0).sum()), float((done.double() ** 2).sum()), "torch"
        if isinstance(done, Added):
            length = torch.stack(lengths(done.directions)).sum(dim=0)
            numbers = torch.as_tensor(self.numbers(length.device), device=length.device)
            of_rows = length[numbers.expand(*self.shape[:2])]
            moved = of_rows if done.moved is None else done.moved
            return int((of_rows > 0).sum()), float((moved.double() ** 2).sum()), "torch"
        squares, rows = done
        return rows, squares, "engine"


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads for the engine, which works without Python's lock."""
    return ThreadPoolExecutor(threads, "mien")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has the pool and no threads
