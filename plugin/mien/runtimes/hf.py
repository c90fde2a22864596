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
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..errors import ReplyWarning, RuntimeNotSupported, SiteNotFound, SteeringNotApplied, warn
from ..program import NOTHING
from ..steering import Applied, LayerApplied, Programs, Steering
from ..vector import Floats
from ..watch import Watch
from .hf_experts import Counts
from .hf_graph import Graph, alone, require_told
from .hf_hooks import Capture, Local, follow_traced, register, register_root, runtime_at, strip
from .hf_layers import Mounts, find_layers, fingerprint_of, follow_layers, require_weights, text_config
from .hf_pass import Pass
from .hf_program import Loaded
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
        self._programs: Programs = NOTHING
        self._turn = 1
        self._loaded = Loaded(NOTHING)
        self.graph = Graph(len(found.modules), self._loaded)
        self._kept: dict[tuple[int, ...], Loaded] = {}
        self._swapping = threading.RLock()
        self._reader: Reader | None = None
        self._last: Pass | None = None
        self._under_way: set[Pass] = set()  # passes that act at other sites than the residual stream
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
        self.graph.hooked = " ".join(f"{site}:{layer}" for site, layer in sorted(self._elsewhere))
        names = [self._sites.name(*place) for place in self._elsewhere]
        self._mounts = Mounts(self._model, [self._layers.owned, *self._layers.names, *names])

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

    @property
    def setting(self) -> Programs:
        return self._programs

    def swap(self, programs: Programs, expected: Programs | None = None) -> bool:
        with self._swapping:
            if expected is not None and self._programs is not expected:
                return False
            self._load(programs, self._turn)
        return True

    @property
    def turn(self) -> int:
        return self._turn

    @turn.setter
    def turn(self, turn: int) -> None:
        with self._swapping:
            self._load(self._programs, turn)

    def _load(self, given: Programs, turn: int) -> None:
        """Have what is given act, as it is in that turn. On error everything is as it was."""
        self.follow()
        by_row = isinstance(given, tuple)
        every = given if isinstance(given, tuple) else (given,)
        programs = tuple(program.at_turn(turn) for program in every)
        key = (len(programs) if by_row else 0, *map(id, programs))
        loaded = self._kept.get(key) or Loaded(programs if by_row else programs[0])
        self._hook(loaded)
        self.graph.take(loaded)
        loaded.begin_anew()
        self._programs, self._turn = given, turn
        self._kept.pop(key, None)
        self._kept[key] = loaded  # it keeps the programs alive, and so their ids
        if len(self._kept) > _KEPT:
            del self._kept[next(iter(self._kept))]
        self._loaded = loaded
        self._unhook()

    def _hook(self, loaded: Loaded) -> None:
        """Have hooks at every site where `loaded` acts, before a pass counts on them. Raises SiteNotFound."""
        new = self._wanted(loaded).difference(self._elsewhere)
        spots = {place: self._sites.spot(*place) for place in new}
        for place, spot in spots.items():
            self._elsewhere[place] = register(self, *place, spot)
        if new:
            self._note_hooks()

    def _unhook(self) -> None:
        """Take away the hooks that neither what is set nor a pass under way needs."""
        wanted = self._wanted(self._loaded).union(*(run.loaded.elsewhere for run in self._under_way))
        old = set(self._elsewhere).difference(wanted)
        for place in old:
            self._elsewhere.pop(place).remove()
        if old:
            self._note_hooks()

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
            self._hook(self._loaded)
            self._unhook()

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
        self.require(rows)
        if rows.resumed and not self._warned and (self._loaded.by_token or self._reader is not None):
            self._warned = True
            warn(
                ReplyWarning(
                    f"a reply continued with {rows.tokens} tokens at once: they count as the prompt of a new "
                    "turn. If they are of that reply (drafts), use generate(), or pass them one by one"
                )
            )
        loaded = self._loaded
        if loaded.elsewhere:
            with self._swapping:  # its hooks stay until the pass ends
                run = Pass(self._loaded, rows, self.fingerprint.n_embd)
                self._under_way.add(run)
        else:
            run = Pass(loaded, rows, self.fingerprint.n_embd)
        if self._reader is not None:
            run.watch(Readings(self._reader, rows))
        run.observed = self._reader is not None or self.local.capture is not None
        self.local.run = run

    def end(self, finished: bool) -> None:
        if is_compiling():
            self.graph.rows = None
            return
        run, self.local.run = self.local.run, None
        if run is None:
            return
        if run.loaded.elsewhere:
            with self._swapping:
                self._under_way.discard(run)
                if run.loaded is not self._loaded:
                    self._unhook()
        if finished:
            self._last = run
            self._require_all(run)
            if run.readings is not None:
                run.readings.deliver()

    def _require_all(self, run: Pass) -> None:
        """Raise SteeringNotApplied where layers did not come by."""
        missing = run.missing()
        if not missing or self._model.training:  # training may skip layers on purpose
            return
        count = text_config(self._model).num_hidden_layers  # lowered while the model drafts for itself
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

    def bare(self, h: Tensor) -> Pass:
        """For a module called on its own. A backward pass does so to go through the last pass again."""
        last, backward = self._last, torch._C._current_graph_task_id() != -1
        if backward and last is not None and h.shape[:-1] in (last.shape[:2], (last.count,)):
            return last
        return Pass(self._loaded, alone(h), self.fingerprint.n_embd)

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
        self._tracker.leave(self._model)
