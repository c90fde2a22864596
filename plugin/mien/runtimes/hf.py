"""Hugging Face transformers: attaching to a `transformers.PreTrainedModel`.

A hook on each decoder layer changes the layer's output, which is where llama.cpp names it l_out-N; at other
sites hooks come and go with the programs that act there. On the CPU in float32 the C engine does it in
place; elsewhere, and wherever a gradient is asked for, torch does. Hooks go before other people's, who see
the block as steered. The model is not otherwise touched. If modules are put in the place of others (by
adapters, merging, quantisation), the hooks move to them before the next pass.

In a graph of torch.compile the same torch operations are traced without a break. The recipe may change
then as well: directions are inputs of the graph. Setting the first recipe, and one with row recipes,
operations or sites where there were none, compiles once more. Nothing is counted there, see `applied`,
nothing is read for a watch, and what counts the tokens of a reply is refused.

What gates remember is kept for each row of the batch. Beam search moves its beams from row to row without
a word: a beam then goes on with what the gates remember of the row that it came into.
"""

from __future__ import annotations

import inspect
import math
import sys
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..errors import ReplyWarning, RuntimeNotSupported, SiteNotFound, warn
from ..program import NOTHING
from ..steering import Applied, LayerApplied, Programs, Steering
from ..vector import Floats
from ..watch import Watch
from .hf_experts import Counts
from .hf_graph import Graph, alone, require_told
from .hf_hooks import follow_traced, register, register_root, runtime_at, strip
from .hf_layers import Mounts, find_layers, fingerprint_of, follow_layers, require_weights
from .hf_local import Capture, Local
from .hf_pass import Pass
from .hf_program import Loaded
from .hf_replay import Replays
from .hf_rows import Rows
from .hf_sites import Sites
from .hf_tracker import tracker_of
from .hf_watch import Reader, Readings
from .wrappers import unwrap

_KEPT = 16  # programs that stay placed on a device after another was swapped in


def runtime_of(model: Any) -> HFRuntime | None:
    """The runtime that is attached to a transformers model, or to the one that `model` wraps; else None."""
    model = unwrap(model)
    return runtime_at(model) if isinstance(model, nn.Module) else None


class _Set(NamedTuple):
    """What is set: the programs as they were given, the turn, and what acts in that turn."""

    given: Programs
    turn: int
    loaded: Loaded


class HFRuntime:
    """Delivers the activations of one transformers model to programs.

    turn: the number of the reply in a chat that evaluations are of, from 1; for terms with turn=.
    """

    takes_rows = True
    steering: Steering | None = None

    def __init__(
        self, model: Any, *, layers: str | Sequence[nn.Module] | None = None, tokenizer: Any = None
    ) -> None:
        found = find_layers(model, layers)
        require_weights(model, found)
        self._tracker = tracker_of(found.owner)
        if self._tracker.listeners:
            raise RuntimeNotSupported(
                f"the layers of {type(model).__name__} are attached already, here or in a model around them: "
                "use that Steering, or detach it"
            )
        self.fingerprint = fingerprint_of(model, found, tokenizer)
        self.local = Local()
        self.counts: Counts | None = None
        self._model, self._layers, self._named = model, found, layers
        self._sites = Sites(model, found)
        self._set = _Set(NOTHING, 1, Loaded(NOTHING))
        self.graph = Graph(len(found.modules), self._loaded)
        self._kept: dict[tuple[int, ...], Loaded] = {}
        self._swapping = threading.RLock()
        self._reader: Reader | None = None
        self._last: Pass | None = None
        self._under_way: set[Pass] = set()
        self._replays = Replays()
        self._warned = False
        self._elsewhere: dict[tuple[str, int], Any] = {}  # hooks at other sites, by site and layer
        self._tracker.join(self, found.owner, model)
        self._put_hooks()

    # ---- where it acts ----

    def _put_hooks(self, tracing: bool = False) -> None:
        """Put hooks on the model and its layers, and note which modules they are on."""
        if "torch._dynamo" in sys.modules and not tracing:  # older graphs do not look for new hooks
            torch.compiler.reset()
        layers = range(len(self._layers.modules))
        residual = [
            register(self, "residual", layer, self._sites.spot("residual", layer)) for layer in layers
        ]
        self._handles = [register_root(self, self._model), *residual]
        self._note_hooks()

    def _note_hooks(self) -> None:
        places = sorted(self._elsewhere)
        names = [self._sites.name(*place) for place in places]
        mounts = Mounts(self._model, [self._layers.owned, *self._layers.names, *names])
        hooked = " ".join(f"{site}:{layer}" for site, layer in places)
        self._noted = frozenset(places)
        self._mounts, self.graph.hooked = mounts, hooked

    def follow(self, *, tracing: bool = False) -> None:
        """Move to the modules that are now where the hooked ones were. tracing: while a graph is compiled.

        Raises RuntimeNotSupported or SiteNotFound if there is no going on; all is then as before.
        """
        if self._mounts.intact():
            return
        with self._swapping:
            layers = follow_layers(self._model, self._layers, self._named)
            sites = Sites(self._model, layers)
            spots = {place: sites.spot(*place) for place in self._elsewhere}
            for place, spot in spots.items():
                if spot.width != self.width(*place):
                    raise RuntimeNotSupported(
                        f"layer {place[1]}: {place[0]} had {self.width(*place)} values when the model was "
                        f"attached and has {spot.width} now: detach it and attach it again"
                    )
            self._take_hooks()
            if layers.owner is not self._layers.owner:
                self._tracker.leave(self._model)
                self._tracker.join(self, layers.owner, self._model)
            self._layers, self._sites = layers, sites
            self._elsewhere = {place: register(self, *place, spot) for place, spot in spots.items()}
            self._put_hooks(tracing)

    def _take_hooks(self) -> None:
        for handle in (*self._handles, *self._elsewhere.values()):
            handle.remove()
        strip(self, self._model)

    # ---- what is set ----

    # A signal handler may set something too, between any two steps of the thread that it interrupts, which
    # holds the lock. So `_set` is changed by one assignment, right after a look at what it was (Python runs
    # handlers after calls), and what follows from it is brought into line until it is.

    @property
    def setting(self) -> Programs:
        return self._set.given

    def swap(self, programs: Programs, expected: Programs | None = None) -> bool:
        with self._swapping:
            while True:
                before = self._set
                if expected is not None and before.given is not expected:
                    return False
                if self._load(programs, before.turn, before):
                    return True

    @property
    def turn(self) -> int:
        return self._set.turn

    @turn.setter
    def turn(self, turn: int) -> None:
        with self._swapping:
            while True:
                before = self._set
                if self._load(before.given, turn, before):
                    return

    @property
    def _loaded(self) -> Loaded:
        return self._set.loaded

    def _load(self, given: Programs, turn: int, before: _Set) -> bool:
        """Have what is given act, as it is in that turn, in place of `before`; whether that was still set.

        On error everything is as it was.
        """
        self.follow()
        self._drop_interrupted()
        by_row = isinstance(given, tuple)
        every = given if isinstance(given, tuple) else (given,)
        programs = tuple(program.at_turn(turn) for program in every)
        key = (len(programs) if by_row else 0, *map(id, programs))
        loaded = self._kept.get(key) or Loaded(programs if by_row else programs[0])
        self.graph.prepare(loaded)
        self._hook(self._wanted(loaded))  # before a pass counts on them
        loaded.begin_anew()
        new = _Set(given, turn, loaded)
        if self._set is not before:
            self._settle()
            return False
        self._set = new
        self._keep(key, loaded)
        self._settle()
        return True

    def _keep(self, key: tuple[int, ...], loaded: Loaded) -> None:
        self._kept.pop(key, None)
        self._kept[key] = loaded  # it keeps the programs alive, and so their ids
        for old in list(self._kept)[:-_KEPT]:
            self._kept.pop(old, None)

    def _settle(self) -> None:
        """Bring graphs and hooks into line with what is set; hooks also with what passes need."""
        while True:
            now = self._set
            self.graph.take(now.loaded)
            running = [*self._under_way, *self._replays.runs]
            wanted = self._wanted(now.loaded).union(*(run.loaded.elsewhere for run in running))
            self._hook(wanted)
            self._unhook(wanted)
            if self._noted != self._elsewhere.keys():
                self._note_hooks()
            if self._set is now:
                return

    def _hook(self, wanted: frozenset[tuple[str, int]]) -> None:
        """Have hooks at these sites. Raises SiteNotFound, and has none then that was not there."""
        new = wanted.difference(self._elsewhere)
        spots = {place: self._sites.spot(*place) for place in new}
        for place, spot in spots.items():
            handle = register(self, *place, spot)
            if self._elsewhere.setdefault(place, handle) is not handle:
                handle.remove()

    def _unhook(self, wanted: frozenset[tuple[str, int]]) -> None:
        """Take away the hooks at other sites than these."""
        for place in set(self._elsewhere).difference(wanted):
            if (handle := self._elsewhere.pop(place, None)) is not None:
                handle.remove()

    def _wanted(self, loaded: Loaded) -> frozenset[tuple[str, int]]:
        if self.counts is None:
            return loaded.elsewhere
        return loaded.elsewhere.union(("experts", layer) for layer in self._sites.routed)

    # ---- sites ----

    def width(self, site: str, layer: int) -> int:
        return self._sites.spot(site, layer).width

    @property
    def experts_used(self) -> int:
        return self._sites.experts_used

    def count_experts(self, on: bool) -> None:
        """Count from now on, anew, which experts are chosen for each token that is no padding; or stop.

        In a compiled graph nothing is counted. Raises SiteNotFound where there are none, or their router
        is one that mien does not know.
        """
        if on and not self._sites.routed:
            raise SiteNotFound("experts", None, "the model is no mixture of experts")
        for layer in self._sites.routed if on else ():
            self._sites.spot("experts", layer)
        with self._swapping:
            self.counts = Counts() if on else None
            self._settle()

    def expert_counts(self) -> dict[int, npt.NDArray[np.int64]]:
        """How often each expert was chosen, by layer (experts,); empty where nothing is counted."""
        return self.counts.read() if self.counts is not None else {}

    # ---- for the tracker: around each forward pass ----

    def require(self, rows: Rows) -> None:
        if rows.untold and self._reader is not None:
            raise RuntimeNotSupported(f"{rows.untold}: a watch can't tell its tokens apart; stop it")
        if rows.untold:
            require_told(self._loaded, rows.untold)

    def begin(self, rows: Rows) -> None:
        if is_compiling():
            follow_traced(self)
            self.graph.rows, self._last = rows, None
            return
        self.follow()
        if rows.resumed and not self._warned and (self._loaded.by_token or self._reader is not None):
            self._warned = True
            warn(
                ReplyWarning(
                    f"a reply continued with {rows.tokens} tokens at once: they count as the prompt of a new "
                    "turn. If they are of that reply (drafts), use generate(), or pass them one by one"
                )
            )
        run = self._begun(rows)
        if self._reader is not None:
            run.watch(Readings(self._reader, rows))
        run.observed = self._reader is not None or self.local.capture is not None

    def _begun(self, rows: Rows) -> Pass:
        """A pass that is open in this thread, and whose hooks stay until it ends."""
        with self._swapping:
            self._drop_interrupted()
            self.require(rows)
            replayed = self._replays.find()
            loaded = self._loaded if replayed is None else replayed.loaded
            run = Pass(loaded, rows, self.fingerprint.n_embd)
            if not run.no_grad:
                run.trace = self._replays.trace(run)
            self.local.open(run)
            self._under_way.add(run)
            if loaded is not self._loaded:  # a signal handler may have set another, or this is a replay
                self._settle()
        return run

    def _drop_interrupted(self) -> None:
        """Close the passes of this thread that torch did not end."""
        if runs := self.local.interrupted:
            self._close(runs)

    def _close(self, runs: list[Pass]) -> None:
        self._under_way.difference_update(runs)
        self.local.close(runs)
        for run in runs:
            run.trace = None

    def end(self, output: Any) -> None:
        if is_compiling():
            self.graph.rows = None
            return
        runs = self.local.ending
        if not runs:
            return
        run, trace = runs[0], runs[0].trace
        if trace is not None:
            trace.note(output)
        with self._swapping:
            self._close(runs)
            if any(each.loaded is not self._loaded for each in runs):
                self._settle()
        if output is not None:
            self._last = run
            run.require(self._model)
            if run.readings is not None:
                run.readings.deliver()

    def bare(self, h: Tensor) -> Pass:
        """For a module called on its own. A backward pass does so to run a part of a pass again."""
        run = self._replays.find(h.device)
        return run if run is not None else Pass(self._loaded, alone(h), self.fingerprint.n_embd)

    # ---- for the user ----

    def watch(self, watch: Watch | None) -> None:
        self._reader = Reader(watch) if watch is not None else None

    def applied(self) -> Applied:
        if self._last is not None:
            return self._last.applied()
        applied = Applied(self._loaded.recipes, {})
        for site, layer in self.graph.places:
            applied.note(site, layer, LayerApplied(0, math.nan, "compiled, not counted"))
        return applied

    def capture(self, tokens: Sequence[int], layers: Sequence[int], last: int) -> Floats:
        weight = self._model.get_input_embeddings().weight
        device = torch.device("cpu") if weight.is_meta else weight.device
        found: dict[int, Floats] = {}
        self.follow()
        owner = self._layers.owner
        cached = "use_cache" in inspect.signature(owner.forward).parameters
        options = {"use_cache": False} if cached else {}
        self.local.capture = Capture(found, frozenset(layers), last)
        try:
            with torch.no_grad():
                owner(input_ids=torch.tensor([list(tokens)], device=device), **options)
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
        self._take_hooks()
        self._elsewhere.clear()
        self._close([*self._under_way])
        self._tracker.leave(self._model)
