"""What operators, watching and many sequences cost in llama.cpp, and the kernels alone; see `bench`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .fingerprint import Fingerprint
from .program import Program, compile_recipe
from .recipe import parse
from .runtimes import attach, init_from_model
from .timing import Progress, Row, Tell, Times, interleaved, ratios, row, silent
from .vector import Vector

# One term of every operator, at every block but the first.
EVERY = (
    "v0 + v1(keep_norm=True) + ablate(v2) + clamp(v3, 0.1) + edit(probe, margin=0.5) + scale(v4, 0.1) + "
    "gate(v5, on=v6, above=-1000, hysteresis=1) + ablate(subspace)(decay=100) + 0.5*purify(v6, v7) + "
    "v7(decay=50, ramp=4)"
)
SEQUENCES = 8
WATCHED = [f"v{i}" for i in range(8)]

# One operator at one place of 512 rows of 4096: what is timed, and the recipes that take turns. One edit
# alone would find its rows moved already.
KERNELS = {
    "add": ("v0", "-v0"),
    "add, norm kept": ("v0(keep_norm=True)",),
    "ablate": ("ablate(v0)",),
    "clamp": ("clamp(v0, 0.5)", "clamp(v0, -0.5)"),
    "edit": ("edit(probe, margin=5)", "edit(-probe, margin=5)"),
    "scale": ("scale(v0)", "scale(v1)"),
    "gate, open": ("gate(v0, on=v1, above=-1000)", "gate(-v0, on=v1, above=-1000)"),
    "ablate, 4 directions": ("ablate(subspace)",),
}
ROWS, WIDTH = 512, 4096
THROUGHPUT = 0.6


def vectors(model: Fingerprint, layers: Sequence[int]) -> dict[str, Vector]:
    """Random ones: their cost does not depend on what they say. `probe` has a bias, `subspace` four
    directions."""
    random = np.random.default_rng(0)

    def rows(*shape: int) -> Any:
        return (0.02 * random.standard_normal((len(layers), *shape, model.n_embd))).astype(np.float32)

    found = {name: Vector(name, tuple(layers), rows(), model) for name in WATCHED}
    bias = {"bias": [0.0] * len(layers)}
    found["probe"] = Vector("probe", tuple(layers), rows(), model, meta=bias)
    found["subspace"] = Vector("subspace", tuple(layers), rows(4), model)
    return found


class OfVectors:
    """A registry of given vectors."""

    def __init__(self, found: dict[str, Vector]) -> None:
        self.found = found

    def find(self, name: str, model: object = None) -> Vector:
        return self.found[name]


def decoding(
    load: Callable[[], Any],
    decoder: Callable[[Any], Callable[[int], None]],
    rounds: int,
    tell: Tell = silent,
) -> list[Row]:
    """A token with every operator at every layer, and with eight vectors watched there, against none.

    load: a model that is not attached. decoder: a function that decodes one token of it.
    """
    plain, steered, watching = load(), load(), load()
    steering = attach(steered)
    found = vectors(steering.model, range(1, steering.model.n_layer))
    steering._registry = OfVectors(found)  # type: ignore[assignment]  # only find() is used
    steering.set(EVERY)
    attach(watching).watch(*(found[name] for name in WATCHED))
    cases = {
        "unsteered": decoder(plain),
        "every operator": decoder(steered),
        "eight vectors watched": decoder(watching),
    }
    reach = {"every operator": 1.03, "eight vectors watched": 1.03}
    return ratios("decode at every layer", cases, "unsteered", rounds, reach, tell)


class _Batch:
    """One token a call for each of some sequences of a context, all in one batch."""

    def __init__(self, context: Any, sequences: Sequence[int], decode: Callable[[Any], int]) -> None:
        import llama_cpp.llama_cpp as api

        self.context, self.sequences, self._decode = context, sequences, decode
        self._n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(api.llama_get_model(context)))
        self.batch = api.llama_batch_init(32 * len(sequences), 0, 1)
        self.begin()

    def begin(self) -> None:
        import llama_cpp.llama_cpp as api

        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        self.decode([(100 + 7 * at, at, sequence) for sequence in self.sequences for at in range(16)])
        self.position = 16

    def decode(self, rows: list[tuple[int, int, int]]) -> None:
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i] = token % self._n_vocab, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = 1
        if status := self._decode(batch):
            raise RuntimeError(f"llama_decode returned {status}")

    def step(self, i: int) -> None:
        if self.position > 80:
            self.begin()
        self.decode([(1000 + s + i % 7, self.position, s) for s in self.sequences])
        self.position += 1

    def close(self) -> None:
        import llama_cpp.llama_cpp as api

        api.llama_batch_free(self.batch)
        api.llama_free(self.context)


def sequences(path: Path, threads: int, rounds: int, tell: Tell = silent) -> list[Row]:
    """Eight sequences under eight recipes in one batch, against the unsteered batch; and the alternative,
    which is eight contexts."""
    import llama_cpp.llama_cpp as api

    from .runtimes.llama_text import load_llama

    llm = load_llama(path, n_ctx=64)
    model = llm._model.model

    def context(count: int, make: Callable[[Any, Any], Any]) -> Any:
        parameters = api.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_seq_max = 256 * count, 32 * count, count
        parameters.n_threads = parameters.n_threads_batch = threads
        return make(model, parameters)

    plain = context(SEQUENCES, api.llama_init_from_model)
    steered = context(SEQUENCES, init_from_model)
    steering = attach(steered)
    found = list(vectors(steering.model, range(1, steering.model.n_layer)).values())[:SEQUENCES]
    steering.set(found)
    numbers = range(SEQUENCES)
    batches = [
        _Batch(plain, numbers, lambda batch: int(api.llama_decode(plain, batch))),
        _Batch(steered, numbers, steering.decode),
    ]
    alone = []
    for vector in found:
        own = context(1, init_from_model)
        handle = attach(own)
        handle.set(vector)
        alone.append(_Batch(own, [0], handle.decode))

    def each(i: int) -> None:
        for batch in alone:
            batch.step(i)

    cases = {
        "unsteered": batches[0].step,
        "eight recipes": batches[1].step,
        "eight contexts, one recipe each": each,
    }
    try:
        return ratios("eight sequences", cases, "unsteered", rounds, {"eight recipes": 1 / 0.97}, tell)
    finally:
        for batch in [*batches, *alone]:
            batch.close()
        llm.close()


def kernels(rounds: int, tell: Tell = silent) -> list[Row]:
    """Memory throughput of each operator on float32 (ROWS, WIDTH) by one thread, over that of NumPy's x += y
    on arrays of that shape: an operator reads and writes x, the addition reads y as well."""
    model = Fingerprint("llama", 2, WIDTH)
    registry = OfVectors(vectors(model, [1]))
    programs = {
        name: [compile_recipe(parse(text), model, registry.find) for text in texts]
        for name, texts in KERNELS.items()
    }
    random = np.random.default_rng(0)
    x, y = (random.standard_normal((ROWS, WIDTH)).astype(np.float32) for _ in range(2))
    fresh = x.copy()

    def add(_: int) -> None:
        np.add(x, y, out=x)

    def apply(taking_turns: list[Program]) -> Callable[[int], object]:
        compiled = [program.prompt.compiled for program in taking_turns if program.prompt.compiled]
        return lambda i: compiled[i % len(compiled)].apply(1, x)

    cases = {"NumPy": add, **{name: apply(found) for name, found in programs.items()}}
    times: Times = {name: [] for name in cases}
    repeats = max(rounds // 10, 1)
    for done in range(1, repeats + 1):
        np.copyto(x, fresh)  # what is done to x again and again would leave its scale
        for name, found in interleaved(cases, 10).items():
            times[name] += found
        tell(Progress("kernels", 10 * done, 10 * repeats, lambda: _throughputs(times)))
    return _throughputs(times)


def _throughputs(times: Times) -> list[Row]:
    rows = []
    for name in KERNELS:
        shares = [(2 / mine) / (3 / numpy) for mine, numpy in zip(times[name], times["NumPy"])]
        at_least = None if name == "ablate, 4 directions" else THROUGHPUT
        what = f"kernel {name}, memory throughput over NumPy's x += y"
        rows.append(replace(row(what, shares, "x", "NumPy"), at_least=at_least))
    return rows
