"""Which forward pass a layer belongs to that runs again in a backward pass (activation checkpointing).

Such a layer must act as it did in its own forward pass, whatever is set by then. Torch does not say which
pass that was. The gradients tell: before those of a pass reach a layer, they go through the outputs of the
model and of that layer. Torch goes through one pass after another on each device, the newest first.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor

from ..errors import SteeringNotApplied
from .hf_pass import Pass


class Trace:
    """A pass that gradients may come back to. Only the graph of its outputs keeps it alive.

    task: the number of torch's backward pass that came to it last; None if none did. device: where it came
    to it.
    """

    __slots__ = ("__weakref__", "_replays", "device", "run", "task")

    def __init__(self, run: Pass, replays: Replays) -> None:
        self.run, self._replays = run, replays
        self.task: int | None = None
        self.device: torch.device | None = None

    def note(self, output: Any) -> None:
        """Have the gradients of a layer's or model's output say that they come to this pass."""
        if isinstance(output, Tensor):
            if output.grad_fn is not None:
                output.grad_fn.register_prehook(partial(self._enter, output.device))
        elif isinstance(output, dict):
            self.note(tuple(output.values()))
        elif isinstance(output, (tuple, list)):
            for each in output:
                self.note(each)

    def _enter(self, device: torch.device, gradients: Any) -> None:
        self.task, self.device = backward_task(), device
        self._replays.entered[self.task] = self


class Replays:
    """The passes that gradients may come back to.

    entered: by the number of a backward pass, the one that it came to last.
    """

    def __init__(self) -> None:
        self._traces: set[ref[Trace]] = set()
        self.entered: WeakValueDictionary[int, Trace] = WeakValueDictionary()

    def trace(self, run: Pass) -> Trace:
        trace = Trace(run, self)
        self._traces.add(ref(trace, self._traces.discard))
        return trace

    @property
    def _alive(self) -> list[Trace]:
        return [trace for known in list(self._traces) if (trace := known()) is not None]

    @property
    def runs(self) -> list[Pass]:
        return [trace.run for trace in self._alive]

    def find(self, device: torch.device | None = None) -> Pass | None:
        """The pass that what runs now is part of; None if this is no backward pass, or not of one.

        device: where it runs. Raises SteeringNotApplied if it may be of several.
        """
        task = backward_task()
        if task == -1:
            return None
        found, alive = self.entered.get(task), self._alive
        if found is None:
            passes = [trace for trace in alive if trace.task is None] or alive
        elif device in (None, found.device):
            return found.run
        else:  # on another device, gradients may have come to another pass already
            passes = [trace for trace in alive if trace.task in (None, task)]
        if len(passes) > 1:
            raise SteeringNotApplied(
                "a layer runs again in a backward pass (activation checkpointing), and it can't be told for "
                f"which of {len(passes)} forward passes: call backward after each forward pass, and drop the "
                "outputs of earlier ones"
            )
        return passes[0].run if passes else None


def backward_task() -> int:
    """The number of torch's backward pass that this thread is in; -1 outside of one."""
    return int(torch._C._current_graph_task_id())
