"""A transformer in forty lines of NumPy that always runs.

It is the reference in tests, and the first thing to read about runtimes: `NumpyModel.forward` shows
where a program acts, and `NumpyRuntime` is everything that mien asks of a runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .. import reference
from ..errors import RuntimeNotSupported
from ..fingerprint import Fingerprint, vocabulary_digest
from ..program import NOTHING, Program
from ..steering import Applied, LayerApplied, Programs
from ..vector import Floats


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
        self.on_block: Callable[[int, Floats], Floats] | None = None

    def forward(self, tokens: Sequence[int]) -> Floats:
        """Logits, float32 (len(tokens), n_vocab)."""
        h = self.embeddings[list(tokens)]
        count = np.arange(1, len(h) + 1, dtype=np.float32)[:, None]
        for layer, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps)):
            h = h + np.cumsum(h, axis=0) / count @ mixer
            h = h + np.tanh(h @ mlp)
            if self.on_block is not None:
                h = self.on_block(layer, h)
        logits: Floats = h @ self.embeddings.T
        return logits


class NumpyRuntime:
    """Steers a NumpyModel by the reference formulas."""

    takes_rows = False

    def __init__(self, model: NumpyModel) -> None:
        if model.on_block is not None:
            raise RuntimeNotSupported("this model is attached already; detach() first")
        self.fingerprint = model.fingerprint
        self._model = model
        self._program = NOTHING
        self._applied = Applied(NOTHING.recipe, {})
        model.on_block = self._on_block

    def swap(self, program: Programs) -> None:
        assert isinstance(program, Program)
        self._program = program

    def _on_block(self, layer: int, h: Floats) -> Floats:
        if layer == 0:
            self._applied = Applied(self._program.recipe, {})
        part = self._program.prompt  # there is no cache here: every token is one that the model is given
        if layer not in part.layers:
            return h
        steered = h
        for keep_norm, operator in ((False, reference.add), (True, reference.add_keep_norm)):
            doses = [(dose.coefficient, dose.vector) for dose in part.doses if dose.keep_norm is keep_norm]
            direction = reference.combine(doses, layer)
            if direction is not None:
                steered = operator(steered, direction)
        lengths = np.linalg.norm((steered - h).astype(np.float64), axis=1)
        shift = float(np.sqrt((lengths**2).mean()))
        self._applied.layers[layer] = LayerApplied(len(h), shift, "numpy")
        return steered

    def applied(self) -> Applied:
        return self._applied

    def capture(self, tokens: Sequence[int], layers: Sequence[int], last: int) -> Floats:
        rows: dict[int, Floats] = {}

        def keep(layer: int, h: Floats) -> Floats:
            rows[layer] = self._on_block(layer, h)
            return rows[layer]

        self._model.on_block = keep
        try:
            self._model.forward(tokens)
        finally:
            self._model.on_block = self._on_block
        return np.stack([rows[layer][-last:] for layer in layers])

    def describe(self) -> dict[str, str]:
        return {"runtime": "numpy", "path": "numpy"}

    def release(self) -> None:
        self._model.on_block = None
