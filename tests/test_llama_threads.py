"""What is set, watched or counted while llama.cpp computes: each decode is of one setting, and its cache is
tagged so.

`during` runs something in another thread in the middle of a decode, which is where it can go wrong.
"""

from __future__ import annotations

import gc
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import llama_cpp.llama_cpp as api
import mien
import numpy as np
import pytest
from makers import DictRegistry, make_vector
from mien import engine
from tiny import N_VOCAB

PATHS = ["in-graph", "post-compute"]
VECTORS = [
    make_vector(name, (1, 2, 3), seed, fingerprint=None, n_embd=64, model_hint="llama")
    for seed, name in enumerate("abc")
]
REGISTRY = DictRegistry(*VECTORS)
TOKENS: list[int] = np.random.default_rng(0).integers(3, N_VOCAB, size=20).tolist()


@pytest.fixture
def load(load_tiny: Callable[..., Any]) -> Callable[..., Any]:
    """With micro-batches of 8."""
    return lambda **options: load_tiny(**{"n_ubatch": 8, **options})


def attach(llm: Any, recipe: Any = None, **options: Any) -> mien.Steering:
    steering = mien.attach(llm, registry=REGISTRY, **options)
    steering.set(recipe)
    return steering


def logits(llm: Any) -> np.ndarray:
    return np.ctypeslib.as_array(api.llama_get_logits(llm._ctx.ctx), shape=(llm.n_vocab(),)).copy()


def next_logits(llm: Any) -> np.ndarray:
    """Those from which `generate` draws a token after TOKENS."""
    stream = llm.generate(TOKENS, temp=0.0)
    next(stream)
    stream.close()
    return logits(llm)


@contextmanager
def during(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> Iterator[None]:
    """Run `act` in another thread once a decode has begun, before llama.cpp computes."""
    plain = api.llama_decode

    def decode(context: Any, batch: Any) -> int:
        thread = threading.Thread(target=act)
        thread.start()
        thread.join()
        return int(plain(context, batch))

    with monkeypatch.context() as patch:
        patch.setattr(api, "llama_decode", decode)
        yield


def test_a_recipe_set_by_on_token_does_not_tag_what_another_computed(load: Callable[..., Any]) -> None:
    llm, fresh = load(), load()
    attach(fresh, "b")
    expected = next_logits(fresh)
    steering = attach(llm, "a")
    with steering.watch("a", on_token=lambda token: steering.set("b")):
        next_logits(llm)
    assert set(llm._mien.tags) == {steering.compile("a").prompt.key}
    assert str(steering.recipe) == "b"
    assert np.array_equal(next_logits(llm), expected)
    assert set(llm._mien.tags) == {steering.compile("b").prompt.key}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "recipe", ["b", "", "b(start=0)", 'b(when="prompt")', "ablate(b) + 2*c(keep_norm=True)"]
)
def test_a_recipe_set_in_a_decode_acts_from_the_next(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, path: str, recipe: str
) -> None:
    llm, old, new = load(), load(), load()
    attach(old, "a", path=path)
    attach(new, recipe, path=path)
    steering = attach(llm, "a", path=path)
    with during(monkeypatch, lambda: steering.set(recipe)):
        found = next_logits(llm)
    assert np.array_equal(found, next_logits(old))
    assert llm._mien.tags == old._mien.tags
    assert str(steering.applied.recipe) == "a"  # what was done, not what is set
    assert steering.recipe == mien.parse(recipe)
    assert np.array_equal(next_logits(llm), next_logits(new))
    assert llm._mien.tags == new._mien.tags


def test_of_two_threads_that_set_the_last_one_wins_everywhere(load: Callable[..., Any]) -> None:
    """The second sets while the first is handing its recipe to the engine."""
    llm = load()
    steering = attach(llm)
    runtime, plain = llm._mien, llm._mien.hook.swap
    programs = {name: steering.compile(name) for name in "ab"}

    def swap(*arguments: Any) -> bool:
        done: bool = plain(*arguments)
        runtime.hook.swap = plain
        thread = threading.Thread(target=lambda: steering.set(programs["b"]))
        thread.start()
        thread.join()
        return done

    runtime.hook.swap = swap
    steering.set(programs["a"])
    assert str(steering.recipe) == "b"
    assert runtime.program is programs["b"]
    found = next_logits(llm)
    assert set(runtime.tags) == {programs["b"].prompt.key}
    fresh = load()
    attach(fresh, "b")
    assert np.array_equal(found, next_logits(fresh))


@pytest.mark.usefixtures("all_processors")
def test_recipes_of_many_threads_are_set_whole(load: Callable[..., Any]) -> None:
    """Threads set sequences of one context, one by one and all at once; none is lost, and none is mixed."""
    llm = load()
    context = mien.init_from_model(llm._model.model, _parameters(4))
    steering = mien.attach(context, registry=REGISTRY)
    programs = {name: steering.compile(name) for name in "abc"}
    programs[""] = steering.compile("")

    def one(sequence: int) -> None:
        for i in range(300):
            steering.set(programs["abc"[i % 3]], sequence=sequence)
        steering.set(programs["abc"[sequence % 3]], sequence=sequence)

    threads = [threading.Thread(target=one, args=(sequence,)) for sequence in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [str(recipe) for recipe in steering.recipes] == ["a", "b", "c", "a"]
    seen = set()

    def whole(names: str) -> None:
        for _ in range(300):
            steering.set([programs[name] for name in names])

    threads = [threading.Thread(target=whole, args=(names,)) for names in ("aaaa", "bbbb", "cccc")]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen.add("".join(map(str, steering.recipes)))
    for thread in threads:
        thread.join()
    assert seen <= {"abca", "aaaa", "bbbb", "cccc"}
    mien.free(context)


def _parameters(n_seq_max: int) -> Any:
    parameters = api.llama_context_default_params()
    parameters.n_ctx, parameters.n_seq_max, parameters.n_threads, parameters.n_threads_batch = (
        256,
        n_seq_max,
        1,
        1,
    )
    return parameters


@pytest.mark.parametrize("path", PATHS)
def test_a_watch_replaced_or_stopped_in_a_decode(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """What C writes into stays until the decode ends, whoever replaces it. A watch has whole tokens."""
    llm, other = load(), load()
    attach(other, "a", path=path)
    with other._mien.steering.watch("a", "b", "c") as expected:
        next_logits(other)
    steering = attach(llm, "a", path=path)
    first = steering.watch("a")
    second: list[Any] = []
    with during(monkeypatch, lambda: second.append(steering.watch("a", "b", "c"))):
        llm.eval(TOKENS[:8])
    assert len(first) == 0  # what began under one watch is not told to another
    assert len(second[0]) == 0
    llm.reset()
    next_logits(llm)
    for name in "abc":
        np.testing.assert_array_equal(second[0].series(name, prompt=True), expected.series(name, prompt=True))
    llm.reset()
    with during(monkeypatch, second[0].stop):
        next_logits(llm)
    assert len(second[0]) == len(TOKENS)
    assert np.array_equal(next_logits(llm), next_logits(other))


@pytest.mark.usefixtures("all_processors")
@pytest.mark.parametrize("path", PATHS)
def test_everything_is_changed_while_it_decodes(load: Callable[..., Any], path: str) -> None:
    """Recipes and watches come and go from another thread; each reply is that of one of the recipes."""
    llm = load(n_threads=2)
    steering = attach(llm, path=path)
    recipes = ["a", "2*b(keep_norm=True) + ablate(a)", ""]
    programs = [steering.compile(recipe) for recipe in recipes]
    alone = []
    for program in programs:
        steering.set(program)
        llm.reset()
        llm.eval(TOKENS[:6])  # one micro-batch: one setting
        alone.append(logits(llm))
    done = threading.Event()

    def change() -> None:
        i = 0
        while not done.is_set():
            steering.set(programs[i % 3])
            watch = steering.watch(*"abc"[: 1 + i % 3])
            if i % 2:
                watch.stop()
            i += 1

    thread = threading.Thread(target=change)
    thread.start()
    met = set()
    try:
        for _ in range(300):
            llm.reset()
            llm.eval(TOKENS[:6])
            found = logits(llm)
            which = [i for i, one in enumerate(alone) if np.array_equal(one, found)]
            assert len(which) == 1
            assert set(llm._mien.tags) == {programs[which[0]].prompt.key}
            met.add(which[0])
    finally:
        done.set()
        thread.join()
    assert len(met) > 1, "nothing was changed meanwhile"


@pytest.mark.usefixtures("all_processors")
def test_threads_that_attach_get_the_same_steering(load: Callable[..., Any]) -> None:
    for llm in [load() for _ in range(5)]:
        with _impatient(), ThreadPoolExecutor(4) as pool:
            found = list(pool.map(mien.attach, [llm] * 4))
        assert len(set(map(id, found))) == 1
        with _impatient(), ThreadPoolExecutor(4) as pool:
            list(pool.map(mien.detach, [llm] * 4))
        assert mien.steering_of(llm) is None


@contextmanager
def _impatient() -> Iterator[None]:
    """Threads take turns as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def test_a_decode_may_take_a_setting_at_once(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine has it before the call that hands it over returns."""
    llm = load()
    steering = attach(llm)
    b = steering.compile("b")
    plain = engine.lib.mien_hook_swap

    class Library:
        def __getattr__(self, name: str) -> Any:
            return swap if name == "mien_hook_swap" else getattr(library, name)

    def swap(*arguments: Any) -> int:
        status = int(plain(*arguments))
        llm.eval(TOKENS[:2])
        return status

    library = engine.lib
    monkeypatch.setattr(engine, "lib", Library())
    steering.set(b)
    assert llm._mien.tags == [b.prompt.key] * 2


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="signals interrupt Python code on POSIX alone")
def test_a_signal_handler_may_set(load: Callable[..., Any]) -> None:
    llm = load()
    steering = attach(llm)
    a, b = steering.compile("a"), steering.compile("b")
    handled = 0

    def handler(*_: Any) -> None:
        nonlocal handled
        handled += 1
        with steering(b):
            steering.set(a)
        steering.set(b)
        signal.setitimer(signal.ITIMER_REAL, 0.0002)

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0002)
    try:
        while handled < 300:
            with steering(a):
                steering.set(a)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    expected = {"a": a, "b": b}[str(steering.recipe)]
    llm.eval(TOKENS[:3])
    assert llm._mien.tags == [expected.prompt.key] * 3
    assert not steering._scopes


def test_the_garbage_collector_may_end_a_scope(load: Callable[..., Any]) -> None:
    """Of a generator that was left suspended in one, and in a cycle: in the middle of anything."""
    steering = attach(load())
    a = steering.compile("a")

    def agent() -> Iterator[Any]:
        me = yield
        with steering(a):
            yield me

    before = gc.get_threshold()
    gc.set_threshold(20)
    try:
        for _ in range(3000):
            left: Any = agent()
            next(left)
            left.send(left)
            del left
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert not steering._scopes
    assert steering.recipe == mien.Recipe()
