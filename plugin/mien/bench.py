"""What steering costs in llama.cpp, measured as `timing` says. Memory is in a process of its own."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from . import bench_operators
from .runtimes import attach
from .steering import Steering
from .timing import Row, Tell, ratios, row, silent
from .vector import Vector

STATUS = Path("/proc/self/status")  # of Linux
PROMPT = "The harbour was quiet when the boats came in, and nobody on the pier said a word. "
RECIPE = "{a:.4f}*v0 + {b:.4f}*v1 - 0.3*v2 + 0.2*v3 - 0.1*v4"


def run(
    model: Path,
    threads: int,
    rounds: int = 200,
    say: Callable[[str], None] = lambda _: None,
    tell: Tell = silent,
) -> Iterator[Row]:
    """All measurements on the GGUF file `model`, each as soon as it is made; minutes, even on a small one.

    threads: for decoding and prefill. rounds: decoded tokens a case; prefill takes a tenth of it. say: is
    told what is measured next. tell: is told how far that is.
    """
    from .runtimes.llama_text import load_llama

    def load() -> Any:
        return load_llama(model, n_ctx=1024, n_threads=threads)

    say("decode")
    plain, cvec = load(), load()
    prompt = plain.tokenize((PROMPT * 40).encode())[:400]
    vectors = _vectors(plain)
    registry = _FixedRegistry(vectors)
    summed = vectors["v0"] * 0.5 + vectors["v1"] * 0.5
    steered: dict[str, tuple[Any, Steering]] = {}
    for path in ("in-graph", "post-compute"):
        llm = load()
        steering = attach(llm, path=path, registry=registry)  # type: ignore[arg-type]  # only find() is used
        steering.set(summed)
        steered[path] = llm, steering
    idle = load()
    attach(idle)
    set_cvec = _own_control_vector(cvec, summed)
    set_cvec()

    contenders = {
        "unsteered": plain,
        "attached, no recipe": idle,
        "in-graph": steered["in-graph"][0],
        "post-compute": steered["post-compute"][0],
        "llama_set_adapter_cvec": cvec,
    }
    reach = {"in-graph": 1.01, "post-compute": 1.03}
    cases = {name: _decoder(llm, prompt[:32]) for name, llm in contenders.items()}
    yield from ratios("decode", cases, "unsteered", rounds, reach, tell)
    say("prefill")
    cases = {name: _prefiller(llm, prompt) for name, llm in contenders.items()}
    few = max(rounds // 10, 4)
    yield from ratios("prefill of 400", cases, "unsteered", few, dict.fromkeys(reach, 1.01), tell)
    say("swap")
    yield from _swaps(steered["in-graph"], cvec, set_cvec, prompt[:32], rounds, tell)
    yield from _compile(steered["in-graph"][1])
    say("operators and watching")
    yield from bench_operators.decoding(load, lambda llm: _decoder(llm, prompt[:32]), rounds, tell)
    say("sequences")
    yield from bench_operators.sequences(model, threads, max(rounds // 2, 4), tell)
    say("kernels")
    yield from bench_operators.kernels(rounds, tell)
    say("memory")
    yield from _memory(model, threads)


class _FixedRegistry:
    def __init__(self, vectors: dict[str, Vector]) -> None:
        self.vectors = vectors

    def find(self, name: str, model: object) -> Vector:
        return self.vectors[name]


def _vectors(llm: Any) -> dict[str, Vector]:
    """Five random vectors at every block but the first: their cost does not depend on what they say."""
    from .runtimes.llama_context import fingerprint_of

    model = fingerprint_of(llm._model.model)
    random = np.random.default_rng(0)
    layers = tuple(range(1, model.n_layer))
    return {
        f"v{i}": Vector(
            f"v{i}",
            layers,
            (0.02 * random.standard_normal((len(layers), model.n_embd))).astype(np.float32),
            model,
        )
        for i in range(5)
    }


def _own_control_vector(llm: Any, vector: Vector) -> Callable[[], None]:
    """A function that sets `vector` through llama.cpp's own call."""
    import llama_cpp.llama_cpp as api

    rows = np.ascontiguousarray(vector.rows)
    data = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    def set_it() -> None:
        api.llama_set_adapter_cvec(llm._ctx.ctx, data, rows.size, vector.width, 1, len(rows))

    set_it.rows = rows  # type: ignore[attr-defined]  # keeps the floats alive
    return set_it


def _decoder(
    llm: Any, prompt: list[int], before: Callable[[int], None] = lambda _: None
) -> Callable[[int], None]:
    """One token a call; starts over before the context gets long."""
    llm.reset()
    llm.eval(prompt)

    def step(i: int) -> None:
        before(i)
        if llm.n_tokens > len(prompt) + 64:
            llm.n_tokens = len(prompt)
        llm.eval([prompt[i % len(prompt)]])

    return step


def _prefiller(llm: Any, prompt: list[int]) -> Callable[[int], None]:
    def step(_: int) -> None:
        llm.reset()
        llm.eval(prompt)

    return step


def _swaps(
    steered: tuple[Any, Steering],
    cvec: Any,
    set_cvec: Callable[[], None],
    prompt: list[int],
    rounds: int,
    tell: Tell,
) -> Iterator[Row]:
    """A change before every token, against none, for mien and for llama.cpp's own call."""
    llm, steering = steered

    def set_recipe(i: int) -> None:
        steering.set(RECIPE.format(a=0.5 + 0.0001 * (i % 997), b=0.4))

    yield from ratios(
        "swap before every token",
        {
            "no change": _decoder(llm, prompt),
            "mien, five vectors": _decoder(llm, prompt, set_recipe),
        },
        "no change",
        rounds,
        {"mien, five vectors": 1.02},
        tell,
    )
    own = ratios(
        "swap before every token",
        {
            "cvec, no change": _decoder(cvec, prompt),
            "llama_set_adapter_cvec": _decoder(cvec, prompt, lambda _: set_cvec()),
        },
        "cvec, no change",
        max(rounds // 2, 4),
        {},
        tell,
    )
    yield own[1]


def _compile(steering: Steering) -> list[Row]:
    compiled, swapped = [], []
    programs = []
    for i in range(200):
        start = time.perf_counter()
        programs.append(steering.compile(RECIPE.format(a=0.3 + 0.001 * i, b=0.7)))
        compiled.append(1e6 * (time.perf_counter() - start))
    for program in programs:
        start = time.perf_counter()
        steering.set(program)
        swapped.append(1e6 * (time.perf_counter() - start))
    return [
        row("compile a recipe of five vectors", compiled, "us", reach=2000),
        row("swap a compiled program", swapped, "us", reach=20),
    ]


def _memory(model: Path, threads: int) -> list[Row]:
    """Resident memory, in a fresh process: see `measure_memory`. Nothing where the system does not say."""
    if not STATUS.exists():
        return []
    code = f"from mien import bench; bench.measure_memory({str(model)!r}, {threads})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added, grown = json.loads(result.stdout)
    return [
        Row("memory added by attaching and steering", added, added, added, "MB", reach=2.0, samples=1),
        Row("memory added by 10,000 swaps", grown, grown, grown, "MB", reach=0.2, samples=1),
    ]


def measure_memory(model: str, threads: int) -> None:
    """Print [MB added by attaching and steering, MB added by 10,000 swaps] as JSON."""
    from .runtimes.llama_text import load_llama

    llm = load_llama(Path(model), n_ctx=1024, n_threads=threads)
    prompt = llm.tokenize(PROMPT.encode())
    vectors = _vectors(llm)
    other = load_llama(Path(model), n_ctx=1024, n_threads=threads)
    with attach(other) as warm:  # what Python imports and caches is not the model's cost
        warm.set(vectors["v0"])
        other.eval(prompt)
    other.close()
    attach(llm).detach()  # a replaced context gives back more than a new one takes: compare like with like
    for _ in range(3):
        llm.reset()
        llm.eval(prompt)
    before = _resident()
    steering = attach(llm, registry=_FixedRegistry(vectors))  # type: ignore[arg-type]  # only find() is used
    steering.set(RECIPE.format(a=0.5, b=0.5))
    llm.reset()
    llm.eval(prompt)
    steered = _resident()
    for i in range(10_000):
        steering.set(RECIPE.format(a=0.5 + 1e-4 * (i % 500), b=0.5))
        if i % 100 == 0:
            llm.n_tokens = len(prompt)
            llm.eval(prompt[:1])
    print(json.dumps([(steered - before) / 1e6, (_resident() - steered) / 1e6]))


def _resident() -> int:
    """Bytes of anonymous resident memory; the mapped model file is not the process's own."""
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def as_json(rows: Iterable[Row], model: Path, threads: int) -> dict[str, Any]:
    return {
        "model": model.name,
        "threads": threads,
        "cpus": os.cpu_count(),
        "rows": [asdict(row) for row in rows],
    }
