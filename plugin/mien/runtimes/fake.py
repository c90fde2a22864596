"""A transformer in forty lines of NumPy that always runs.

It is the reference in tests, and the first thing to read about runtimes: `NumpyModel.forward` shows
where a program acts, `NumpyRuntime` is everything that mien asks of a runtime, and `NumpyEvaluator` is what
making vectors asks.
"""

from __future__ import annotations

import re
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from .. import reference
from ..errors import RuntimeNotSupported, SiteNotFound
from ..evaluation import Progress, Text, programs_of, require_room, silent
from ..fingerprint import Fingerprint, vocabulary_digest
from ..program import NOTHING, Program
from ..recipe import RecipeLike
from ..steering import Applied, LayerApplied, Programs, Steering
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


def runtime_of(model: NumpyModel) -> NumpyRuntime | None:
    """What is attached to it."""
    found = getattr(model.on_site, "__self__", None)
    return found if isinstance(found, NumpyRuntime) else None


class NumpyRuntime:
    """Steers a NumpyModel by the reference formulas."""

    takes_rows = False
    experts_used = 0
    turn = 1

    steering: Steering | None = None

    def __init__(self, model: NumpyModel) -> None:
        if model.on_site is not None:
            raise RuntimeNotSupported("this model is attached already: mien.detach(model) first")
        self.fingerprint = model.fingerprint
        self._model = model
        self._program = NOTHING
        self._applied = Applied(NOTHING.recipe, {})
        self._watch: Watch | None = None
        self._read: dict[int, tuple[Floats, Floats]] = {}  # by layer, before and after
        self._swapping = threading.Lock()
        model.on_site = self._on_site

    def width(self, site: str, layer: int) -> int:
        if site not in ("residual", "attention", "mlp"):
            raise SiteNotFound(site, layer, "the NumPy model has no heads, neurons and experts")
        return self.fingerprint.n_embd

    @property
    def setting(self) -> Programs:
        return self._program

    def swap(self, programs: Programs, expected: Programs | None = None) -> bool:
        assert isinstance(programs, Program)
        with self._swapping:
            if expected is not None and self._program is not expected:
                return False
            self._program = programs
        return True

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


class NumpyEvaluator:
    """Puts texts to a NumpyModel one by one. A word is a token, told by its letters; token 0 ends a turn."""

    ROOM = 256

    def __init__(self, model: NumpyModel) -> None:
        self._model = model
        self._steering = Steering(NumpyRuntime(model))
        self._steering.warns = False
        self.fingerprint = model.fingerprint

    def close(self) -> None:
        self._steering.detach()

    def text(self, messages: Sequence[dict[str, str]], reply: str = "", *, raw: bool = False) -> Text:
        given = self._words(" ".join(message["content"] for message in messages))
        return Text(
            (*(given if raw else [1, *given, 2]), *self._words(reply)), len(given) + (0 if raw else 2)
        )

    def _words(self, text: str) -> list[int]:
        spare = len(self._model.embeddings) - 3
        return [3 + zlib.crc32(word.encode()) % spare for word in re.findall(r"\w+|[^\w\s]", text.lower())]

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join("abcdefghijklmnopqrstuvwxyz"[t % 26] + "x" * (t // 26) for t in tokens)

    def compile(self, recipe: RecipeLike) -> Program:
        return self._steering.compile(recipe)

    def capture(
        self,
        texts: Sequence[Text],
        layers: Sequence[int],
        *,
        last: bool = False,
        programs: Sequence[Program] = (),
        progress: Progress = silent,
    ) -> Iterator[tuple[int, Floats]]:
        require_room(texts, self.ROOM)
        for i, (text, program) in enumerate(zip(texts, programs_of(programs, len(texts)))):
            self._steering.set(program)
            count = 1 if last else len(text.answer)
            rows = self._steering.capture(text.tokens, layers, max(count, 1))
            self._steering.clear()
            yield i, rows[:, :count]
            progress(i + 1, len(texts))

    def log_probabilities(
        self, texts: Sequence[Text], *, programs: Sequence[Program] = (), progress: Progress = silent
    ) -> list[npt.NDArray[np.float64]]:
        require_room(texts, self.ROOM)
        found = []
        for i, (text, program) in enumerate(zip(texts, programs_of(programs, len(texts)))):
            logits = self._logits(text.tokens, program)
            logits -= logits.max(axis=1, keepdims=True)
            rows = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            found.append(rows[np.arange(text.reply, len(text.tokens)) - 1, list(text.answer)])
            progress(i + 1, len(texts))
        return found

    def generate(
        self,
        prompts: Sequence[Text],
        limit: int,
        *,
        programs: Sequence[Program] = (),
        progress: Progress = silent,
    ) -> list[Text]:
        found = []
        for i, (prompt, program) in enumerate(zip(prompts, programs_of(programs, len(prompts)))):
            tokens = list(prompt.tokens)
            for _ in range(limit):
                token = int(self._logits(tokens, program)[-1].argmax())
                if token == 0:
                    break
                tokens.append(token)
            found.append(Text(tuple(tokens), prompt.reply))
            progress(i + 1, len(prompts))
        return found

    def _logits(self, tokens: Sequence[int], program: Program) -> npt.NDArray[np.float64]:
        self._steering.set(program)
        logits = self._model.forward(tokens).astype(np.float64)
        self._steering.clear()
        return logits
