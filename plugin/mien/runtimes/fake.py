"""A transformer in forty lines of NumPy that always runs.

It is the reference in tests, and the first thing to read about runtimes: `NumpyModel.forward` shows
where a program acts, and `NumpyRuntime` is everything that mien asks of a runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .. import reference
from ..errors import RuntimeNotSupported, SiteNotFound
from ..fingerprint import Fingerprint, vocabulary_digest
from ..program import NOTHING, Program
from ..steering import Applied, LayerApplied, Programs
from ..vector import Floats
from ..watch import Watch


class NumpyModel:
    """Random weights: causal mean-attention and a small MLP in each block, tied embeddings."""

    def __init__(self, n_layer: int = 4, n_embd: int = 8, n_vocab: int = 32, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.embeddings = random.standard_normal((n_vocab, n_embd)).astype(np.float32)
        self.mixers = (0.3 * random.standard_normal((n_layer, n_embd, n_embd))).astype(np.float32)
        self.mlps = (0.3 * random.standard_normal((n_layer, n_embd, n_embd))).astype(np.float32)
        self.fingerprint = Fingerprint(
            "numpy", n_layer, n_embd, vocabulary_digest(b"%d" % i for i in range(n_vocab)), "numpy model"
        )
        self.on_site: Callable[[str, int, Floats], Floats] | None = None

    def forward(self, tokens: Sequence[int]) -> Floats:
        """Logits, float32 (len(tokens), n_vocab)."""
        h = self.embeddings[list(tokens)]
        count = np.arange(1, len(h) + 1, dtype=np.float32)[:, None]
        for layer, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps)):
            h = h + self._at("attention", layer, np.cumsum(h, axis=0) / count @ mixer)
            h = h + self._at("mlp", layer, np.tanh(h @ mlp))
            h = self._at("residual", layer, h)
        logits: Floats = h @ self.embeddings.T
        return logits

    def _at(self, site: str, layer: int, rows: Floats) -> Floats:
        return rows if self.on_site is None else self.on_site(site, layer, rows)


class NumpyRuntime:
    """Steers a NumpyModel by the reference formulas."""

    takes_rows = False
    experts_used = 0
    turn = 1

    def __init__(self, model: NumpyModel) -> None:
        if model.on_site is not None:
            raise RuntimeNotSupported("this model is attached already; detach() first")
        self.fingerprint = model.fingerprint
        self._model = model
        self._program = NOTHING
        self._applied = Applied(NOTHING.recipe, {})
        self._watch: Watch | None = None
        self._read: dict[int, tuple[Floats, Floats]] = {}  # by layer, before and after
        model.on_site = self._on_site

    def width(self, site: str, layer: int) -> int:
        if site not in ("residual", "attention", "mlp"):
            raise SiteNotFound(site, layer, "the NumPy model has no heads, neurons and experts")
        return self.fingerprint.n_embd

    def swap(self, program: Programs) -> None:
        assert isinstance(program, Program)
        self._program = program

    def watch(self, watch: Watch | None) -> None:
        self._watch = watch

    def _on_site(self, site: str, layer: int, h: Floats) -> Floats:
        steered = self._steer(site, layer, h)
        if site == "residual" and self._watch is not None:
            probe, last = self._watch.probe, self.fingerprint.n_layer - 1
            self._read[layer] = probe.read(layer, np.ascontiguousarray(h)), probe.read(layer, steered)
            if layer == last:
                read = np.stack([np.stack(self._read[at]) for at in self._watch.layers], axis=2)
                self._watch.note([0] * len(h), [-1] * len(h), read)
        return steered

    def _steer(self, site: str, layer: int, h: Floats) -> Floats:
        if (site, layer) == ("attention", 0):
            self._applied = Applied(self._program.recipe, {})
        part = self._program.at_turn(
            self.turn
        ).prompt  # there is no cache here: every token is one that the model is given
        if layer not in part.places.get(site, ()):
            return h
        steered = reference.apply(part.doses, site, layer, h)
        moved = np.linalg.norm((steered - h).astype(np.float64), axis=1)
        if count := int((moved > 0).sum()):
            shift = float(np.sqrt((moved**2).sum() / count))
            self._applied.note(site, layer, LayerApplied(count, shift, "numpy"))
        return steered

    def applied(self) -> Applied:
        return self._applied

    def capture(self, tokens: Sequence[int], layers: Sequence[int], last: int) -> Floats:
        rows: dict[int, Floats] = {}

        def keep(site: str, layer: int, h: Floats) -> Floats:
            h = self._on_site(site, layer, h)
            if site == "residual":
                rows[layer] = h
            return h

        self._model.on_site = keep
        try:
            self._model.forward(tokens)
        finally:
            self._model.on_site = self._on_site
        return np.stack([rows[layer][-last:] for layer in layers])

    def describe(self) -> dict[str, str]:
        return {"runtime": "numpy", "path": "numpy"}

    def release(self) -> None:
        self._model.on_site = None
