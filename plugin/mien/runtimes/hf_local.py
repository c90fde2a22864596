"""What a thread has of its own: the passes that it runs, since two threads may run one model."""

from __future__ import annotations

import sys
import threading
from collections.abc import Collection
from types import FrameType
from typing import NamedTuple

from ..vector import Floats
from .hf_pass import Pass


class Capture(NamedTuple):
    """The last `last` rows of each of `layers`, put into `found`."""

    found: dict[int, Floats]
    layers: frozenset[int]
    last: int


class Local(threading.local):
    """A thread's own. run: the innermost pass that is open.

    Torch runs no hook after a forward pass that KeyboardInterrupt or SystemExit ends. A pass is therefore
    open together with the frame of the module call that it belongs to, which tells whether it still runs.
    """

    run: Pass | None = None
    capture: Capture | None = None

    def __init__(self) -> None:
        self._open: list[tuple[FrameType, Pass]] = []  # outermost first

    def open(self, run: Pass) -> None:
        """Begin a pass of the module call whose hook is running."""
        call = _module_call()
        self._open.append((call, run))
        self.run = run

    @property
    def ending(self) -> list[Pass]:
        """The pass of the module call whose hook is running, and those inside of it that were interrupted."""
        call = _module_call()
        found = [i for i, (frame, _) in enumerate(self._open) if frame is call]
        return [run for _, run in self._open[found[0] :]] if found else []

    @property
    def interrupted(self) -> list[Pass]:
        """The passes whose module call does not run any more."""
        if not self._open:
            return []
        running, frame = set(), sys._getframe()
        while frame is not None:
            running.add(id(frame))
            frame = frame.f_back  # type: ignore[assignment]  # None after the outermost
        return [run for frame, run in self._open if id(frame) not in running]

    def close(self, runs: Collection[Pass]) -> None:
        self._open[:] = [(frame, run) for frame, run in self._open if run not in runs]
        self.run = self._open[-1][1] if self._open else None


def _module_call() -> FrameType:
    """The frame of torch's Module._call_impl whose hook is running, the nearest one."""
    frame = sys._getframe(2)
    while frame.f_code.co_name != "_call_impl" and frame.f_back is not None:
        frame = frame.f_back
    return frame
