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
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from ..engine import apply_at
from ..errors import SteeringNotApplied
from ..program import NOTHING
from ..steering import Applied, LayerApplied, Programs
from ..vector import Floats
from .hf_layers import find_layers, fingerprint_of, require_weights
from .hf_program import Directions, Loaded, lengths, runs, steer
from .hf_rows import NotPickled, Rows, tracker_of

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
        self.graph = _Graph(len(found.modules))
        self._loaded = Loaded(NOTHING, self.fingerprint.n_embd)
        self._model, self._layers = model, found
        self._kept: dict[tuple[int, ...], Loaded] = {}
        self._last: _Pass | None = None
        self._tracker = tracker_of(found.owner)
        self._tracker.join(self, found.owner, model)
        self._handles = [
            module.register_forward_hook(_LayerHook(self, layer), prepend=True)
            for layer, module in enumerate(found.modules)
        ]

    def swap(self, program: Programs) -> None:
        key = (len(program), *map(id, program)) if isinstance(program, tuple) else (0, id(program))
        loaded = self._kept.pop(key, None) or Loaded(program, self.fingerprint.n_embd)
        self.graph.take(loaded)
        self._kept[key] = loaded  # it keeps the programs alive, and so their ids
        if len(self._kept) > _KEPT:
            del self._kept[next(iter(self._kept))]
        self._loaded = loaded

    # For the tracker: around each forward pass.

    def begin(self, rows: Rows) -> None:
        if torch.compiler.is_compiling():
            self.graph.rows, self._last = rows, None
        else:
            self.local.run = _Pass(self._loaded, rows)

    def end(self, finished: bool) -> None:
        if torch.compiler.is_compiling():
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
        """For a layer called on its own. In a backward pass that is the last pass over again, if it fits."""
        last = self._last
        if last is not None and torch.is_grad_enabled() and last.shape == h.shape:
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
        self.local.capture = found, frozenset(layers), last
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
    capture: tuple[dict[int, Floats], frozenset[int], int] | None = None


class _Pass:
    """One forward pass: what acts on which rows, and what was done.

    moved: by layer; on the engine's path the sum of the squared lengths that rows moved by, on torch's
    (the directions, the length that each row moved by where norms were kept).
    """

    def __init__(self, loaded: Loaded, rows: Rows) -> None:
        if rows.real is not None and rows.real.device.type == "cpu" and bool(rows.real.all()):
            rows = rows._replace(real=None)
        self.loaded, self.rows = loaded, rows
        self.shape = (rows.batch, rows.tokens, loaded.n_embd)
        device = torch.device("cpu") if rows.real is None else rows.real.device
        self._numbers = loaded.numbers(rows, device)
        nothing = isinstance(self._numbers, int) and not self._numbers
        self.acting = () if nothing else loaded.layers
        self.runs = None if nothing or device.type != "cpu" else runs(self._numbers, rows, loaded.parts)
        self.moved: dict[int, float | tuple[Directions, Tensor | None]] = {}

    def numbers(self, device: torch.device) -> int | Tensor:
        if isinstance(self._numbers, Tensor) and self._numbers.device != device:
            self._numbers = self._numbers.to(device)
        return self._numbers

    def applied(self) -> Applied:
        layers = {}
        for layer, moved in sorted(self.moved.items()):
            if isinstance(moved, float):
                count = sum(n for program, _, n in self.runs or () if layer in program.layers)
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


class _Graph:
    """What graphs of torch.compile read: nothing else of a runtime may be looked at while one is traced.

    tables: by layer, what it adds; None where nothing does. rows: of the pass that is being traced.
    """

    def __init__(self, n_layer: int) -> None:
        self.tables: list[Directions | None] = [None] * n_layer
        self.rows: Rows | None = None
        self.loaded: Loaded | None = None
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
        assert self.loaded is not None
        for layer in range(len(self.tables)):
            acts = layer in self.loaded.place
            self.tables[layer] = self.loaded.directions(layer, device, dtype) if acts else None


class _LayerHook(NotPickled):
    """The hook on one decoder layer."""

    def __init__(self, runtime: HFRuntime, layer: int) -> None:
        self.runtime, self.layer = runtime, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        h = output if isinstance(output, Tensor) else output[0]
        if torch.compiler.is_compiling():
            steered = _traced(self.runtime.graph, self.layer, h)
            return None if steered is None else _replaced(output, steered)
        local, layer = self.runtime.local, self.layer
        run = local.run or self.runtime.bare(h)
        if layer in run.acting:
            if h.shape != run.shape or not h.is_floating_point():
                raise _not_rows(h, run.shape, layer)
            own = not h.requires_grad and not (args and args[0] is h)  # nobody else's: change it in place
            if (
                own
                and run.runs is not None
                and h.dtype is torch.float32
                and h.device.type == "cpu"
                and h.is_contiguous()
            ):
                start, row, moved = h.data_ptr(), 4 * run.shape[2], 0.0
                for program, first, count in run.runs:
                    moved += apply_at(program, layer, start + first * row, count)
                run.moved[layer] = moved
            else:
                directions = run.loaded.directions(layer, h.device, h.dtype)
                steered, moved_rows = steer(h, directions, run.numbers(h.device), own)
                run.moved[layer] = directions, moved_rows
                if steered is not h:
                    h, output = steered, _replaced(output, steered)
        if local.capture is not None:
            found, layers, last = local.capture
            if layer in layers:
                found[layer] = h[0, -last:].to("cpu", torch.float32, copy=True).numpy()
        return output


def _traced(graph: _Graph, layer: int, h: Tensor) -> Tensor | None:
    """The steered activations, as operations that torch.compile can follow; None for nothing."""
    _use(graph, h.device, h.dtype)
    directions, loaded = graph.tables[layer], graph.loaded
    if directions is None or loaded is None:
        return None
    rows = graph.rows or Rows(h.shape[0], h.shape[1], h.shape[1] if h.shape[1] > 1 else 0)
    return steer(h, directions, loaded.numbers(rows, h.device), False)[0]


def _use(graph: _Graph, device: torch.device, dtype: torch.dtype) -> bool:
    return graph.use(device, dtype)


# What torch.compiler.assume_constant_result does; that would import Dynamo, most of a second.
_use._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _replaced(output: Any, h: Tensor) -> Any:
    return h if isinstance(output, Tensor) else (h, *output[1:])


def _not_rows(h: Tensor, shape: tuple[int, ...], layer: int) -> SteeringNotApplied:
    return SteeringNotApplied(
        f"layer {layer}: expected activations {shape} in floating point, got {tuple(h.shape)} {h.dtype}",
        [layer],
    )
