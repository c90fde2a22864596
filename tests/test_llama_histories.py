"""Random histories of a Llama: whatever was done before, logits are those of a model that did nothing else.

What should be is worked out in histories.py.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as api
import mien
import numpy as np
import pytest
from histories import CASES, N_CTX, N_EMBD, PATHS, PLAIN, REGISTRY, SETTINGS, Case, Cell, Measure, decode
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from llama_batches import logits_of
from llama_cpp import LlamaRAMCache
from mien.runtimes.llama_text import load_llama
from tiny import N_VOCAB, build

# ---- a Llama, and what is known of it ----


@dataclass
class Saved:
    state: Any
    cells: list[Cell]
    reply_from: int
    silent: bool
    outside: int
    clean: int  # how many of its first positions no recipe touched: all that a plain Llama may use


@dataclass
class Known:
    """What should be of one Llama. scopes: what acts, below it the open scopes that were entered before."""

    llm: Any
    cells: list[Cell] = field(default_factory=list)
    steering: Any = None
    base: Case = PLAIN
    scopes: list[list[Any]] = field(default_factory=list)  # [context manager, Case], by entry
    epoch: int = 0
    turn: int = 1
    reply_from: int = 1 << 30
    silent: bool = False  # the last token asked for no logits: the next one can't be drawn
    outside: int = 0
    stream: Iterator[int] | None = None
    drawn: int | None = None
    watch: Any = None

    @property
    def acts(self) -> Case:
        if self.steering is None:
            return PLAIN
        return self.scopes[-1][1] if self.scopes else self.base

    @property
    def n(self) -> int:
        return len(self.cells)

    @property
    def pictured(self) -> int:
        """Positions before this one hold a picture."""
        return max((i + 1 for i, cell in enumerate(self.cells) if isinstance(cell.what, bytes)), default=0)

    def cell(self, what: int | bytes, reply: int) -> Cell:
        case = self.acts
        epoch = self.epoch if case.remembers and reply >= 0 else 0
        return Cell(what, case.at(reply, self.turn), reply if epoch else -1, epoch)

    def give(self, what: Sequence[int | bytes]) -> None:
        """As a prompt."""
        self.cells += [self.cell(one, -1) for one in what]
        self.reply_from = self.n

    def reply(self, token: int) -> int:
        """One more token. Returns its number in the reply."""
        if self.n == 0 or self.silent:
            self.give([token])
            return -1
        self.reply_from = min(self.reply_from, self.n)
        number = self.n - self.reply_from
        self.cells.append(self.cell(token, number))
        return number

    def cut(self, n: int) -> None:
        if n < self.n:
            self.silent = False
        del self.cells[n:]
        self.outside = min(self.outside, n)


def words(count: int, seed: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, N_VOCAB, size=count)]


def picture(count: int, seed: int) -> list[bytes]:
    rows = 0.5 * np.random.default_rng(1000 + seed).standard_normal((count, N_EMBD))
    return [row.astype(np.float32).tobytes() for row in rows]


TOKENS = st.builds(words, st.integers(2, 9), st.integers(0, 5))
TOKEN = st.builds(lambda seed: words(1, seed), st.integers(0, 20))
RECIPES = st.sampled_from(CASES)


class Histories(RuleBasedStateMachine):
    measure: Measure
    path: Path

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[Saved] = []

    @initialize(way=st.sampled_from(PATHS), logits_all=st.booleans(), case=RECIPES)
    def begin(self, way: str, logits_all: bool, case: Case) -> None:
        self.way, self.logits_all = way, logits_all
        self.now, self.other = self.load(), self.load()
        self.attach()
        self.set(case)

    def load(self) -> Known:
        q8 = api.GGML_TYPE_Q8_0
        options = {"n_batch": 16, "n_ubatch": 5, "seed": 1, "flash_attn": True, "type_k": q8, "type_v": q8}
        return Known(load_llama(self.path, n_ctx=N_CTX, n_threads=1, logits_all=self.logits_all, **options))

    def teardown(self) -> None:
        if hasattr(self, "now"):
            for known in (self.now, self.other):
                known.stream = None
                if known.steering is not None:
                    known.steering.detach()
                known.llm.close()

    def check(self, logits: bool = True) -> None:
        now = self.now
        assert now.llm.n_tokens == now.n
        if logits:
            expected = self.measure.logits(now.cells)
            assert np.array_equal(logits_of(now.llm._ctx.ctx, -1), expected)

    def check_watch(self, reply: int) -> None:
        """After an evaluation through the Llama whose last token has that number."""
        watch, measured = self.now.watch, self.measure.watch.last
        if watch is None:
            return
        last = watch.last
        assert last.sequence == 0
        assert last.reply == reply
        for found, expected in ((last.before, measured.before), (last.after, measured.after)):
            np.testing.assert_equal(found, expected)
        watch.clear()

    def room(self, count: int) -> None:
        """Begin anew where the context is full."""
        self.now.stream = None
        if self.now.n + count > N_CTX - 8:
            self.reset()

    attached = precondition(lambda self: self.now.steering is not None)
    detached = precondition(lambda self: self.now.steering is None)

    # ---- what is set ----

    @attached
    @rule(case=RECIPES, compiled=st.booleans())
    def set(self, case: Case, compiled: bool = False) -> None:
        now = self.now
        now.steering.set(now.steering.compile(case.given) if compiled else case.given)
        if now.scopes:
            now.scopes[-1][1] = case
        else:
            now.base = case
        now.epoch += 1

    @attached
    @rule()
    def clear(self) -> None:
        self.now.steering.clear()
        if self.now.scopes:
            self.now.scopes[-1][1] = PLAIN
        else:
            self.now.base = PLAIN
        self.now.epoch += 1

    @attached
    @rule(case=RECIPES)
    def enter(self, case: Case) -> None:
        scope = self.now.steering(case.given)
        scope.__enter__()
        self.now.scopes.append([scope, case])
        self.now.epoch += 1

    @precondition(lambda self: self.now.scopes)
    @rule(which=st.integers(0, 3))
    def leave(self, which: int) -> None:
        scopes = self.now.scopes
        which %= len(scopes)
        if which == len(scopes) - 1:
            self.now.epoch += 1
        scope, _ = scopes.pop(which)
        scope.__exit__(None, None, None)

    @attached
    @rule(turn=st.integers(1, 2))
    def take_turn(self, turn: int) -> None:
        self.now.steering.turn = turn
        if self.now.acts.given == "a(turn=2) + b" and turn != self.now.turn:
            self.now.epoch += 1
        self.now.turn = turn

    # ---- attached and not ----

    @detached
    @rule()
    def attach(self) -> None:
        now = self.now
        now.steering = mien.attach(now.llm, path=self.way, registry=REGISTRY)
        now.base, now.turn, now.epoch, now.reply_from, now.silent = PLAIN, 1, now.epoch + 1, now.n, False
        now.outside = 0
        self.check(logits=False)

    @attached
    @rule()
    def attach_again(self) -> None:
        assert mien.attach(self.now.llm, path=self.way, registry=REGISTRY) is self.now.steering
        with pytest.raises(mien.RuntimeNotSupported):
            mien.attach(self.now.llm, path="auto", registry=REGISTRY)

    @attached
    @rule()
    def detach(self) -> None:
        now = self.now
        now.stream = None
        open_scopes, now.scopes = now.scopes, []
        now.steering.detach()
        now.steering = now.watch = None
        for scope, _ in open_scopes:
            scope.__exit__(None, None, None)
        assert mien.steering_of(now.llm) is None
        now.cut(now.llm.n_tokens)
        assert not any(cell.text for cell in now.cells)
        self.check(logits=False)

    @rule()
    def switch(self) -> None:
        self.now, self.other = self.other, self.now

    # ---- evaluations ----

    @rule(tokens=TOKENS)
    def evaluate(self, tokens: list[int]) -> None:
        self.room(len(tokens))
        self.now.llm.eval(tokens)
        self.now.give(tokens)
        self.now.silent = False
        self.check()
        self.check_watch(-1)

    @rule(token=TOKEN)
    def evaluate_one(self, token: list[int]) -> None:
        self.room(1)
        self.now.llm.eval(token)
        reply = self.now.reply(token[0])
        self.now.silent = False
        self.check()
        self.check_watch(reply)

    @rule(what=st.one_of(TOKENS, TOKEN), last=st.booleans())
    def decode_tokens(self, what: list[int], last: bool) -> None:
        self.decode_directly(what, last)

    @rule(count=st.integers(1, 7), seed=st.integers(0, 3), last=st.booleans())
    def decode_picture(self, count: int, seed: int, last: bool) -> None:
        self.decode_directly(picture(count, seed), last)

    def decode_directly(self, what: Sequence[int | bytes], last: bool) -> None:
        """Past the Llama, as helpers for pictures do."""
        self.room(len(what))
        now = self.now
        rows = isinstance(what[0], bytes)
        now.llm._ctx.kv_cache_seq_rm(-1, now.n, -1)
        cells = [Cell(one, "", wanted=last and i == len(what) - 1) for i, one in enumerate(what)]
        decode(lambda batch: api.llama_decode(now.llm._ctx.ctx, batch), cells, now.n, rows)
        now.llm.input_ids[now.n : now.n + len(what)] = 0 if rows else what
        now.llm.n_tokens += len(what)
        now.llm._requires_eval = not last
        if rows or len(what) > 1:
            now.give(what)
        else:
            now.reply(int(what[0]))
        now.silent, now.outside = not last, now.n
        self.check(logits=last)
        if now.watch is not None:
            assert len(now.watch) == 0

    @rule(share=st.integers(0, N_CTX), tokens=st.one_of(TOKENS, TOKEN), count=st.integers(1, 4))
    def generate(self, share: int, tokens: list[int], count: int) -> None:
        """A prompt that begins with some of what is cached."""
        self.room(len(tokens) + 12)
        now = self.now
        if now.pictured > now.outside:  # it came before mien, which does not know of it
            self.reset()
        share %= now.n + 1
        if now.outside:  # what is not a token can't be asked for but as a whole
            share = now.n
        prompt = [int(token) for token in now.llm.input_ids[:share]] + tokens
        if not self.start(prompt, now.cells[: max(share, now.outside)]):
            return
        self.go_on(count - 1)

    @precondition(lambda self: self.now.n)
    @rule(count=st.integers(1, 4))
    def generate_from_all(self, count: int) -> None:
        """The prompt is what is cached, and nothing more."""
        self.room(12)
        now = self.now
        if now.pictured == now.n or now.pictured > now.outside:
            return  # its last row would be evaluated as a token; or it came before mien, as above
        prompt = [int(token) for token in now.llm.input_ids[: now.n]]
        if self.start(prompt, list(now.cells)):
            self.go_on(count - 1)

    @rule(tokens=st.one_of(TOKENS, TOKEN), count=st.integers(1, 4))
    def generate_on(self, tokens: list[int], count: int) -> None:
        """After all that is there, whatever it is."""
        self.room(len(tokens) + 12)
        now = self.now
        now.stream = now.llm.generate(tokens, temp=0.0, reset=False)
        now.drawn = next(now.stream)
        now.give(tokens)
        now.silent = False
        self.checked_draw(-1)
        self.go_on(count - 1)

    def start(self, prompt: list[int], cached: list[Cell]) -> bool:
        """Whether it generates. cached: what the prompt begins with."""
        now = self.now
        now.stream = now.llm.generate(prompt, temp=0.0)
        rows = [cell.what for cell in cached[: now.outside]]
        try:
            now.drawn = next(now.stream)
        except mien.SteeringNotApplied:
            assert rows  # they can't be evaluated again, and are of another recipe
            now.stream = None
            return False
        outside = now.outside
        now.cut(0)
        now.outside = outside
        now.give([*rows, *prompt[len(rows) :]])
        now.silent = False
        self.checked_draw(-1, watched=False)
        return True

    def checked_draw(self, reply: int, watched: bool = True) -> None:
        """After the evaluation of the last position, from which a token was drawn."""
        self.check()
        assert self.now.drawn == int(logits_of(self.now.llm._ctx.ctx, -1).argmax())
        if watched:
            self.check_watch(reply)
        elif self.now.watch is not None:
            self.now.watch.clear()

    @precondition(lambda self: self.now.stream is not None)
    @rule(count=st.integers(1, 3))
    def go_on(self, count: int) -> None:
        now = self.now
        for _ in range(count):
            if now.n >= N_CTX - 1:
                now.stream = None
                return
            assert now.stream is not None
            token, now.drawn = now.drawn, next(now.stream)
            assert token is not None
            self.checked_draw(now.reply(token))

    @rule(share=st.integers(0, N_CTX), tokens=TOKENS, count=st.integers(1, 4))
    def complete(self, share: int, tokens: list[int], count: int) -> None:
        """As `generate` does, with a cache of states where one is set."""
        self.room(len(tokens) + 12)
        now = self.now
        if now.outside or now.pictured:
            self.reset()
        prompt = [int(token) for token in now.llm.input_ids[: share % (now.n + 1)]] + tokens
        now.llm.create_completion(prompt, max_tokens=count, temperature=0.0)
        found = [int(token) for token in now.llm.input_ids[: now.llm.n_tokens]]
        assert found[: len(prompt)] == prompt
        now.epoch += 1  # a state may have been loaded
        now.cut(0)
        now.give(prompt)
        now.silent = False
        for token in found[len(prompt) :]:
            assert int(self.measure.logits(now.cells).argmax()) == token
            now.reply(token)
        self.check()
        if now.watch is not None:
            now.watch.clear()

    # ---- what else happens to a context ----

    @rule(kind=st.sampled_from([None, LlamaRAMCache]))
    def set_cache(self, kind: Any) -> None:
        self.now.llm.set_cache(kind and kind())

    @rule()
    def reset(self) -> None:
        self.now.stream = None
        self.now.llm.reset()
        self.now.cut(0)

    @precondition(lambda self: self.now.n)
    @rule(count=st.integers(1, 5))
    def take_back(self, count: int) -> None:
        """As a rejected draft is."""
        now = self.now
        now.stream = None
        now.cut(max(now.n - count, 0))
        now.llm.n_tokens, now.llm._requires_eval = now.n, True

    @precondition(lambda self: len(self.saved) < 4)
    @rule()
    def save_state(self) -> None:
        now = self.now
        clean = len(list(itertools.takewhile(lambda cell: not cell.text, now.cells)))
        saved = Saved(now.llm.save_state(), list(now.cells), now.reply_from, now.silent, now.outside, clean)
        self.saved.append(saved)
        self.check(logits=False)

    @precondition(lambda self: self.saved)
    @rule(which=st.integers(0, 3))
    def load_state(self, which: int) -> None:
        now, saved = self.now, self.saved[which % len(self.saved)]
        now.stream = None
        now.llm.load_state(copy.copy(saved.state))
        now.cells, now.reply_from = list(saved.cells), saved.reply_from
        now.silent, now.outside = saved.silent, saved.outside
        now.epoch += 1
        if now.steering is None:
            assert now.llm.n_tokens <= saved.clean
            now.cut(now.llm.n_tokens)
        self.check(logits=False)

    @attached
    @rule(tokens=TOKENS)
    def capture(self, tokens: list[int]) -> None:
        now = self.now
        now.stream = None
        found = now.steering.capture(tokens, last=len(tokens))
        now.cut(0)
        expected = self.measure.captured(tokens, now.acts.at(-1, now.turn))
        assert np.array_equal(found, expected, equal_nan=True)
        if now.watch is not None:
            now.watch.clear()
        self.check(logits=False)

    @attached
    @rule()
    def start_watching(self) -> None:
        self.now.watch = self.now.steering.watch("a", "b")

    @precondition(lambda self: self.now.watch is not None)
    @rule()
    def stop_watching(self) -> None:
        self.now.watch.stop()
        self.now.watch = None


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[type[Histories]]:
    model = build("llama", tmp_path_factory.mktemp("tiny"), quantised=True).gguf
    measure = Measure(model)
    yield type("Histories", (Histories,), {"measure": measure, "path": model})
    measure.contexts.close()


def test_logits_do_not_depend_on_what_was_done_before(machine: type[Histories]) -> None:
    run_state_machine_as_test(machine, settings=SETTINGS)
