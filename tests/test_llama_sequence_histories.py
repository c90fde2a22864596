"""Random histories of several sequences in one context: each has the logits that it has alone.

What should be is worked out in histories.py.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import llama_cpp.llama_cpp as api
import mien
import numpy as np
import pytest
from histories import CASES, N_EMBD, PATHS, PLAIN, REGISTRY, SETTINGS, Case, Cell, Measure, decode
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from llama_batches import Row, clear, evaluate, logits_of
from mien.watch import Token
from tiny import N_VOCAB, build

SEQUENCES, MOST = 3, 60  # tokens of a sequence


@dataclass
class Known:
    """What should be of one sequence. given: by which number of all that was set, what acts on it."""

    cells: list[Cell] = field(default_factory=list)
    case: Case = PLAIN
    given: int = 0
    reply_from: int = 1 << 30
    told: bool = False
    silent: bool = False  # the last token asked for no logits: the next one can't be drawn
    seen: int = 0  # the position after the last token that mien saw

    def take(self, whats: list[int | bytes], wanted: list[bool]) -> list[int]:
        """Tokens of one batch. Returns their numbers in the reply."""
        first, count = len(self.cells), len(whats)
        if not self.told:
            if count > 1 or first == 0 or (self.silent and first == self.seen):
                self.reply_from = first + count
            elif first > self.seen:  # what is there was given
                self.reply_from = first
            else:
                self.reply_from = min(self.reply_from, first)
        numbers = []
        for i, what in enumerate(whats):
            number = max(first + i - self.reply_from, -1)
            numbers.append(number)
            epoch = self.given if self.case.remembers and number >= 0 else 0
            text = self.case.at(number, 1)
            self.cells.append(Cell(what, text, number if epoch else -1, epoch, wanted[i]))
        self.silent, self.seen = not wanted[-1], len(self.cells)
        return numbers


SEQUENCE = st.integers(0, SEQUENCES - 1)
RECIPE = st.sampled_from(CASES)


class Histories(RuleBasedStateMachine):
    measure: Measure

    @initialize(way=st.sampled_from(PATHS), unified=st.booleans(), n_ubatch=st.sampled_from([4, 7, 256]))
    def begin(self, way: str, unified: bool, n_ubatch: int) -> None:
        contexts = self.measure.contexts
        self.unified = unified
        self.context = contexts.make(SEQUENCES, path=way, unified=unified, n_ubatch=n_ubatch)
        self.memory = api.llama_get_memory(self.context)
        self.known = [Known() for _ in range(SEQUENCES)]
        self.numbers = itertools.count(1)
        self.scopes: list[tuple[Any, list[tuple[Case, int]], bool]] = []
        self.one = True  # one recipe is set for all
        self.tokens: list[Token] = []
        self.watch: Any = None
        self.attach()

    def attach(self) -> None:
        self.steering = mien.attach(self.context, registry=REGISTRY)
        self.now_acts([PLAIN] * SEQUENCES)

    def teardown(self) -> None:
        if hasattr(self, "context"):
            self.steering.detach()
            self.measure.contexts.free(self.context)

    def now_acts(self, cases: list[Case]) -> None:
        for known, case in zip(self.known, cases):
            known.case, known.given = case, next(self.numbers)

    # ---- what is set ----

    @rule(case=RECIPE)
    def set(self, case: Case) -> None:
        self.steering.set(case.given)
        self.now_acts([case] * SEQUENCES)
        self.one = True

    @rule(case=RECIPE, sequence=SEQUENCE)
    def set_one(self, case: Case, sequence: int) -> None:
        self.steering.set(case.given, sequence=sequence)
        known = self.known[sequence]
        known.case, known.given = case, next(self.numbers)
        self.one = False

    @rule(cases=st.lists(RECIPE, min_size=1, max_size=SEQUENCES))
    def set_many(self, cases: list[Case]) -> None:
        self.steering.set([case.given for case in cases])
        self.now_acts(cases + [PLAIN] * (SEQUENCES - len(cases)))
        self.one = False

    @precondition(lambda self: len(self.scopes) < 3)
    @rule(cases=st.lists(RECIPE, min_size=1, max_size=SEQUENCES))
    def enter(self, cases: list[Case]) -> None:
        before = [(known.case, known.given) for known in self.known]
        scope = self.steering([case.given for case in cases])
        scope.__enter__()
        self.scopes.append((scope, before, self.one))
        self.now_acts(cases + [PLAIN] * (SEQUENCES - len(cases)))
        self.one = False

    @precondition(lambda self: self.scopes)
    @rule()
    def leave(self) -> None:
        scope, before, self.one = self.scopes.pop()
        scope.__exit__(None, None, None)
        for known, (case, given) in zip(self.known, before):
            if self.one or given != known.given:  # else the same program acts on
                known.case, known.given = case, next(self.numbers)

    # ---- where replies begin ----

    @rule(sequence=SEQUENCE, ahead=st.integers(0, 5))
    def tell_reply(self, sequence: int, ahead: int) -> None:
        known = self.known[sequence]
        known.told, known.reply_from = True, len(known.cells) + ahead
        self.steering.reply_from(known.reply_from, sequence)

    @rule(sequence=SEQUENCE)
    def tell_nothing(self, sequence: int) -> None:
        self.known[sequence].told = False
        self.steering.reply_from(None, sequence)

    # ---- evaluations ----

    @rule(counts=st.tuples(*[st.integers(0, 6)] * SEQUENCES), seed=st.integers(0, 9))
    def decode_some(self, counts: tuple[int, ...], seed: int) -> None:
        self.batch(counts, seed)

    @rule(which=st.frozensets(SEQUENCE, min_size=1), seed=st.integers(0, 9))
    def decode_one_each(self, which: frozenset[int], seed: int) -> None:
        self.batch(tuple(int(s in which) for s in range(SEQUENCES)), seed)

    def batch(self, counts: tuple[int, ...], seed: int) -> None:
        """So many tokens of each sequence, in any order."""
        random = np.random.default_rng(seed)
        order = random.permutation(np.repeat(np.arange(SEQUENCES), counts)).tolist()
        if not order:
            return
        for sequence, count in enumerate(counts):
            if len(self.known[sequence].cells) + count > MOST:
                self.remove(sequence, 0)
        ends = [len(known.cells) for known in self.known]
        rows: list[Row] = []
        for sequence in order:
            token = int(random.integers(3, N_VOCAB))
            rows.append(Row(token, ends[sequence], (sequence,), bool(random.integers(0, 4))))
            ends[sequence] += 1
        self.tokens.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", mien.MienWarning)  # of replies that continue with several tokens
            found = evaluate(self.context, self.steering.decode, rows)
        numbers: dict[tuple[int, int], int] = {}
        for sequence, known in enumerate(self.known):
            own = [row for row in rows if row.sequences[0] == sequence]
            if own:
                taken = known.take([row.token for row in own], [row.wanted for row in own])
                numbers |= {(sequence, row.position): number for row, number in zip(own, taken)}
        for row in rows:
            if row.wanted:
                (sequence,) = row.sequences
                expected = self.measure.logits(self.known[sequence].cells[: row.position + 1])
                assert np.array_equal(found[sequence, row.position], expected), (sequence, row.position)
                if self.watch is not None:
                    token = self.tokens[rows.index(row)]
                    np.testing.assert_equal(token[2:], self.measure.watch.last[2:])
        if self.watch is not None:
            assert [(token.sequence, token.reply) for token in self.tokens] == [
                (row.sequences[0], numbers[row.sequences[0], row.position]) for row in rows
            ]

    @rule(sequence=SEQUENCE, count=st.integers(1, 6), seed=st.integers(0, 3), last=st.booleans())
    def decode_picture(self, sequence: int, count: int, seed: int, last: bool) -> None:
        known = self.known[sequence]
        if len(known.cells) + count > MOST:
            self.remove(sequence, 0)
        rows = (0.5 * np.random.default_rng(seed).standard_normal((count, N_EMBD))).astype(np.float32)
        whats: list[int | bytes] = [row.tobytes() for row in rows]
        wanted = [False] * (count - 1) + [last]
        cells = [Cell(what, "", -1, 0, want) for what, want in zip(whats, wanted)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", mien.MienWarning)
            decode(self.steering.decode, cells, len(known.cells), True, sequence)
        known.take(whats, wanted)
        if last:
            assert np.array_equal(logits_of(self.context, -1), self.measure.logits(known.cells))

    @rule(sequence=SEQUENCE, count=st.integers(1, 4), seed=st.integers(0, 9), last=st.booleans())
    def decode_directly(self, sequence: int, count: int, seed: int, last: bool) -> None:
        """llama_decode itself: it is steered only where it does not matter whose tokens these are."""
        known = self.known[sequence]
        if len(known.cells) + count > MOST:
            self.remove(sequence, 0)
        text = known.case.at(0, 1) if self.one else ""
        if known.case.remembers or any(known.case.at(i, 1) != text for i in range(-1, 4)):
            text = ""
        if not self.one and len({str(other.case.given) for other in self.known}) == 1:
            return
        words = np.random.default_rng(seed).integers(3, N_VOCAB, size=count).tolist()
        cells = [Cell(word, text, -1, 0, last and i == count - 1) for i, word in enumerate(words)]
        decode(lambda batch: api.llama_decode(self.context, batch), cells, len(known.cells), False, sequence)
        known.cells += cells
        if last:
            assert np.array_equal(logits_of(self.context, -1), self.measure.logits(known.cells))

    # ---- the cache ----

    @precondition(lambda self: not self.unified)
    @rule(sequence=SEQUENCE, keep=st.integers(0, MOST))
    def take_back(self, sequence: int, keep: int) -> None:
        self.remove(sequence, keep)

    def remove(self, sequence: int, keep: int) -> None:
        known = self.known[sequence]
        if self.unified and known.cells:
            # Tokens would be put into the cells of others that are gone, and summed up in another order.
            self.clear()
        elif keep < len(known.cells):
            assert api.llama_memory_seq_rm(self.memory, sequence, keep, -1)
            del known.cells[keep:]

    @rule(source=SEQUENCE, to=SEQUENCE, told=st.booleans())
    def copy(self, source: int, to: int, told: bool) -> None:
        if source == to or not self.known[source].cells or (self.unified and self.known[to].cells):
            return
        self.remove(to, 0)
        api.llama_memory_seq_cp(self.memory, source, to, -1, -1)
        known = self.known[to]
        known.cells = list(self.known[source].cells)
        if known.seen >= len(known.cells) or told:  # it can't be seen that these are others
            known.told, known.reply_from = True, len(known.cells)
            self.steering.reply_from(known.reply_from, to)
            if not told:
                self.tell_nothing(to)

    @rule()
    def clear(self) -> None:
        clear(self.context)
        for known in self.known:
            known.cells.clear()

    @rule(count=st.integers(1, 9), seed=st.integers(0, 3))
    def capture(self, count: int, seed: int) -> None:
        tokens = np.random.default_rng(seed).integers(3, N_VOCAB, size=count).tolist()
        found = self.steering.capture(tokens, last=count)
        first = self.known[0]
        for known in self.known:
            known.cells.clear()
        expected = self.measure.captured(tokens, first.case.at(-1, 1))
        assert np.array_equal(found, expected, equal_nan=True)
        first.told, first.seen, first.silent, first.reply_from = False, count, False, count

    @rule()
    def start_watching(self) -> None:
        self.watch = self.steering.watch("a", "b", on_token=self.tokens.append)

    @precondition(lambda self: self.watch is not None)
    @rule()
    def stop_watching(self) -> None:
        self.watch.stop()
        self.watch = None

    @rule()
    def detach_and_attach(self) -> None:
        self.scopes.clear()
        self.steering.detach()
        self.watch = None
        for known in self.known:
            known.told = False
        self.one = True
        self.attach()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[type[Histories]]:
    measure = Measure(build("llama", tmp_path_factory.mktemp("tiny"), quantised=True).gguf)
    yield type("Histories", (Histories,), {"measure": measure})
    measure.contexts.close()


def test_each_sequence_is_as_if_alone_whatever_was_done(machine: type[Histories]) -> None:
    run_state_machine_as_test(machine, settings=SETTINGS)
