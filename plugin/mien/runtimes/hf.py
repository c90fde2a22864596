"""Hugging Face transformers: attaching to a `transformers.PreTrainedModel`.

A hook on each decoder layer changes the layer's output, which is where llama.cpp names it l_out-N. On the
CPU in float32 the C engine does it in place; elsewhere, and wherever a gradient is asked for, torch does.
Hooks go before other people's, who see the block as steered. The model is not otherwise touched.

In a graph of torch.compile the same torch operations are traced without a break. The recipe may change
then as well: directions are inputs of the graph. Setting the first recipe, and one with row recipes or
operations where there were none, compiles once more. Nothing is counted there, see `applied`.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor, float32, nn
from torch.compiler import is_compiling

from ..engine import apply_at
from ..errors import SteeringNotApplied
from ..program import NOTHING
from ..steering import Applied, LayerApplied, Programs
from ..vector import Floats
from .hf_layers import find_layers, fingerprint_of, require_weights
from .hf_program import Directions, Loaded, lengths, runs, steer
from .hf_rows import Rows, tracker_of

_SPLIT = 1 << 20  # floats from which on a layer's rows are shared out among torch's number of threads
_KEPT = 16  # programs that stay placed on a device after another was swapped in


class HFRuntime:
    """Delivers the activations of one transformers model to programs."""

    takes_rows = True

    def __init__(
        self, model: Any, *, layers: str | Sequence[nn.Module] | None = None, tokenizer: Any = None
    ) -> None:
        found = find_layers(model, layers)
        require_weights(model, found)
        self.fingerprint = fingerprint_of(model, found, tokenizer)
        if "torch._dynamo" in sys.modules:  # a graph compiled before does not look for new hooks
            torch.compiler.reset()
        self.local = _Local()
        self._loaded = Loaded(NOTHING, self.fingerprint.n_embd)
        self.graph = _Graph(len(found.modules), self._loaded)
        self._model, self._layers = model, found
        self._kept: dict[tuple[int, ...], Loaded] = {}
        self._swapping = threading.Lock()
        self._last: _Pass | None = None
        self._tracker = tracker_of(found.owner)
        self._tracker.join(self, found.owner, model)
        self._handles = [
            module.register_forward_hook(partial(_on_layer, _Layer(self, layer)), prepend=True)
            for layer, module in enumerate(found.modules)
        ]

    def swap(self, program: Programs) -> None:
        key = (len(program), *map(id, program)) if isinstance(program, tuple) else (0, id(program))
        with self._swapping:
            loaded = self._kept.pop(key, None) or Loaded(program, self.fingerprint.n_embd)
            self.graph.take(loaded)
            self._kept[key] = loaded  # it keeps the programs alive, and so their ids
            if len(self._kept) > _KEPT:
                del self._kept[next(iter(self._kept))]
            self._loaded = loaded

    # For the tracker: around each forward pass.

    def begin(self, rows: Rows) -> None:
        if is_compiling():
            self.graph.rows, self._last = rows, None
        else:
            self.local.run = _Pass(self._loaded, rows, self.local.capture)

    def end(self, finished: bool) -> None:
        if is_compiling():
            self.graph.rows = None
            return
        run, self.local.run = self.local.run, None
        if run is None or not finished:
            return
        self._last = run
        if len(run.moved) == len(run.acting) or self._model.training:  # training may skip layers on purpose
            return
        missing = sorted(set(run.acting) - set(run.moved))
        raise SteeringNotApplied(
            f"layers {missing} were not run, or their modules were replaced after attaching: detach, and "
            "attach again",
            missing,
        )

    def bare(self, h: Tensor) -> _Pass:
        """For a layer called on its own. A backward pass does so to go through the last pass again."""
        last = self._last
        if last is not None and last.shape == h.shape and torch._C._current_graph_task_id() != -1:
            return last
        batch, tokens = h.shape[:2]
        return _Pass(self._loaded, Rows(batch, tokens, tokens if tokens > 1 else 0))

    def applied(self) -> Applied:
        if self._last is not None:
            return self._last.applied()
        nan = math.nan
        return Applied(
            self._loaded.recipes,
            {layer: LayerApplied(0, nan, "compiled, not counted") for layer in self.graph.layers},
        )

    def capture(self, tokens: Sequence[int], layers: Sequence[int], last: int) -> Floats:
        weight = self._model.get_input_embeddings().weight
        device = torch.device("cpu") if weight.is_meta else weight.device
        found: dict[int, Floats] = {}
        self.local.capture = _Capture(found, frozenset(layers), last)
        try:
            with torch.no_grad():
                self._layers.owner(input_ids=torch.tensor([list(tokens)], device=device), use_cache=False)
        finally:
            self.local.capture = None
        return np.stack([found[layer] for layer in layers])

    def describe(self) -> dict[str, str]:
        parameters = self._layers.modules[0].parameters()
        kinds = {(p.device.type, p.dtype) for p in parameters if p.is_floating_point() and not p.is_meta}
        fast = kinds == {("cpu", torch.float32)}
        return {
            "runtime": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "path": "engine" if fast else "torch",
            "why": "the layers are float32 on the CPU" if fast else "the layers are not float32 on the CPU",
            "layers": self._layers.path,
        }

    def release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._tracker.leave(self, self._layers.owner, self._model)


class _Local(threading.local):
    """A thread's own: two threads may run one model."""

    run: _Pass | None = None
    capture: _Capture | None = None


class _Capture(NamedTuple):
    """The last `last` rows of each of `layers`, put into `found`."""

    found: dict[int, Floats]
    layers: frozenset[int]
    last: int


class _Pass:
    """One forward pass: what acts on which rows, and what was done.

    runs: (engine's program, first row, how many) for the rows as (batch * tokens, n_embd); whole: the
    one program that acts on all of them. fast: whether the engine may be asked at all. moved: by layer; on
    the engine's path the sum of the squared lengths that rows moved by, on torch's (the directions, the
    length that each row moved by where norms were kept).
    """

    __slots__ = (
        "_numbers",
        "acting",
        "capture",
        "count",
        "fast",
        "large",
        "loaded",
        "moved",
        "no_grad",
        "rows",
        "runs",
        "shape",
        "whole",
    )

    def __init__(self, loaded: Loaded, rows: Rows, capture: _Capture | None = None) -> None:
        if rows.real is not None and rows.real.device.type == "cpu" and bool(rows.real.all()):
            rows = rows._replace(real=None)
        self.loaded, self.rows, self.capture = loaded, rows, capture
        self.shape = (rows.batch, rows.tokens, loaded.n_embd)
        self.count = rows.batch * rows.tokens
        device = torch.device("cpu") if rows.real is None else rows.real.device
        self._numbers = loaded.numbers(rows, device)
        nothing = isinstance(self._numbers, int) and not self._numbers
        self.acting: frozenset[int] = frozenset() if nothing else loaded.acting
        self.fast = device.type == "cpu"  # else it is not known here which rows are real
        self.runs = runs(self._numbers, rows, loaded.parts) if self.acting and self.fast else []
        only = self.runs[0] if len(self.runs) == 1 else None
        self.large = self.count * loaded.n_embd >= _SPLIT
        whole = only is not None and only[2] == self.count and not self.large
        self.whole = self.runs[0][0].handle if whole else None
        self.no_grad = not torch.is_grad_enabled()
        self.moved: dict[int, float | tuple[Directions, Tensor | None]] = {}

    def apply(self, layer: int, address: int) -> float:
        """The engine on each stretch of rows at `address`."""
        row = 4 * self.loaded.n_embd
        threads = torch.get_num_threads() if self.large else 1
        share = -(-self.count // threads)
        pieces = [
            (program.handle, layer, address + start * row, min(share, first + count - start))
            for program, first, count in self.runs
            for start in range(first, first + count, share)
        ]
        if threads == 1:
            return float(sum(apply_at(*piece) for piece in pieces))
        return float(sum(_pool(threads).map(lambda piece: apply_at(*piece), pieces)))

    def keep(self, layer: int, output: Any) -> None:
        """Copy the output's last rows where they are asked for."""
        assert self.capture is not None
        if layer in self.capture.layers:
            h = output[0] if type(output) is tuple else output
            rows = h[0, -self.capture.last :].to("cpu", torch.float32, copy=True)
            self.capture.found[layer] = rows.numpy()

    def numbers(self, device: torch.device) -> int | Tensor:
        if isinstance(self._numbers, Tensor) and self._numbers.device != device:
            self._numbers = self._numbers.to(device)
        return self._numbers

    def applied(self) -> Applied:
        layers = {}
        for layer, moved in sorted(self.moved.items()):
            if isinstance(moved, float):
                count = sum(n for program, _, n in self.runs if layer in program.layers)
                squares, path = moved, "engine"
            else:
                count, squares = self._measured(*moved)
                path = "torch"
            if count:
                layers[layer] = LayerApplied(count, math.sqrt(squares / count), path)
        return Applied(self.loaded.recipes, layers)

    def _measured(self, directions: Directions, moved: Tensor | None) -> tuple[int, float]:
        """(rows steered, sum of their squared shifts) on torch's path; waits for the device."""
        length = torch.stack(lengths(directions)).sum(dim=0)
        numbers = torch.as_tensor(self.numbers(length.device), device=length.device)
        of_rows = length[numbers.expand(self.rows.batch, self.rows.tokens)]
        shift = of_rows if moved is None else moved
        return int((of_rows > 0).sum()), float((shift.double() ** 2).sum())


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads for the engine, which works without Python's lock."""
    return ThreadPoolExecutor(threads, "mien")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has the pool and no threads


class _Graph:
    """What graphs of torch.compile read: nothing else of a runtime may be looked at while one is traced.

    tables: by layer, what it adds; None where nothing does. rows: of the pass that is being traced.
    """

    def __init__(self, n_layer: int, loaded: Loaded) -> None:
        self.tables: list[Directions | None] = [None] * n_layer
        self.rows: Rows | None = None
        self.loaded = loaded
        self._kind: tuple[torch.device, torch.dtype] | None = None

    @property
    def layers(self) -> list[int]:
        return [layer for layer, table in enumerate(self.tables) if table is not None]

    def take(self, loaded: Loaded) -> None:
        self.loaded = loaded
        if self._kind is not None:
            self._fill(*self._kind)

    def use(self, device: torch.device, dtype: torch.dtype) -> bool:
        """While tracing: have the tables at hand, from now on. True, for Dynamo to hold constant."""
        if self._kind != (device, dtype):
            self._kind = device, dtype
            self._fill(device, dtype)
        return True

    def _fill(self, device: torch.device, dtype: torch.dtype) -> None:
        for layer in range(len(self.tables)):
            acts = layer in self.loaded.place
            self.tables[layer] = self.loaded.directions(layer, device, dtype) if acts else None


class _Layer:
    """What the hook of one layer needs. Without a runtime, which is how it is copied and pickled with a
    model, the hook does nothing: a copy of the model is of the plain one.
    """

    __slots__ = ("local", "number", "runtime")

    def __init__(self, runtime: HFRuntime | None = None, number: int = 0) -> None:
        self.runtime, self.number = runtime, number
        self.local = runtime.local if runtime is not None else _Local()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Layer:
        return _Layer()

    def __reduce__(self) -> Any:
        return _Layer, ()


def _on_layer(layer: _Layer, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """The hook, with functools.partial for its first argument.

    It runs once a layer and token, when the layer's weights have driven everything else out of the
    caches: every attribute that is looked at costs, so the common case is short and comes first.
    """
    run = layer.local.run
    if run is None:
        return _outside(layer, output)
    number = layer.number
    h = output[0] if type(output) is tuple else output
    if number in run.acting:
        if (
            run.fast
            and h.dtype is float32
            and h.shape == run.shape
            and h.is_cpu
            and h.is_contiguous()
            and (run.no_grad or not h.requires_grad)
            and not (args and args[0] is h)
        ):
            whole = run.whole
            if whole is not None:
                run.moved[number] = apply_at(whole, number, h.data_ptr(), run.count)
            else:
                run.moved[number] = run.apply(number, h.data_ptr())
        else:
            output = _by_torch(run, number, args, output)
    if run.capture is not None:
        run.keep(number, output)
    return output


def _outside(layer: _Layer, output: Any) -> Any:
    """For a layer in a graph that is being compiled, and for one that is called on its own."""
    runtime = layer.runtime
    if runtime is None:
        return output
    h = output[0] if type(output) is tuple else output
    if is_compiling():
        steered = _traced(runtime.graph, layer.number, h)
        return output if steered is None else _replaced(output, steered)
    run = runtime.bare(h)
    return _by_torch(run, layer.number, (h,), output) if layer.number in run.acting else output


def _by_torch(run: _Pass, number: int, args: tuple[Any, ...], output: Any) -> Any:
    """Where the engine can't: on a device, in another dtype, under autograd."""
    h = output[0] if type(output) is tuple else output
    if h.shape != run.shape or not h.is_floating_point():
        raise SteeringNotApplied(
            f"layer {number}: expected activations {run.shape} in floating point, got {tuple(h.shape)} "
            f"{h.dtype}",
            [number],
        )
    own = not (h.requires_grad or (args and args[0] is h))  # nobody else's: change it in place
    directions = run.loaded.directions(number, h.device, h.dtype)
    steered, moved = steer(h, directions, run.numbers(h.device), own)
    run.moved[number] = directions, moved
    return output if steered is h else _replaced(output, steered)


def _traced(graph: _Graph, layer: int, h: Tensor) -> Tensor | None:
    """The steered activations, as operations that torch.compile can follow; None for nothing."""
    _use(graph, h.device, h.dtype)
    directions = graph.tables[layer]
    if directions is None:
        return None
    rows = graph.rows or Rows(h.shape[0], h.shape[1], h.shape[1] if h.shape[1] > 1 else 0)
    return steer(h, directions, graph.loaded.numbers(rows, h.device), False)[0]


def _use(graph: _Graph, device: torch.device, dtype: torch.dtype) -> bool:
    return graph.use(device, dtype)


# What torch.compiler.assume_constant_result does; that would import Dynamo, most of a second.
_use._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _replaced(output: Any, h: Tensor) -> Any:
    return (h, *output[1:]) if type(output) is tuple else h
