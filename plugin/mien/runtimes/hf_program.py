"""A program, or one for each row of a batch, in the form in which passes apply it."""

from __future__ import annotations

from itertools import compress
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..engine import CompiledProgram, Memory, Tokens
from ..errors import RecipeError
from ..program import ALWAYS, Dose, Part
from ..recipe import Recipe
from ..steering import Programs
from .hf_rows import Rows
from .hf_tables import Table, is_plain, tables

Places: TypeAlias = "dict[str, frozenset[int]]"  # by site, layers
_REMEMBERED = 16  # programs of which something is kept in one reply


class Loaded:
    """Programs as they are applied. Part 0 is "nothing"; `parts[i - 1]` is part i.

    program: one for all rows, or a tuple of one for each; of one turn.
    """

    def __init__(self, program: Programs) -> None:
        self.by_row = isinstance(program, tuple)
        programs = program if isinstance(program, tuple) else (program,)
        self.programs = programs
        self.parts: list[Part] = []
        self.compiled: list[CompiledProgram] = []
        self.prompt = [self._number(program.prompt) for program in programs]
        self.response = [self._number(program.response) for program in programs]
        self.alike = self.prompt == self.response
        self.counts = any(self.parts[number - 1].counts for number in self.response if number)
        self.by_token = (
            not self.alike or self.counts
        )  # whether it matters which tokens are a reply's, and which
        self.remembers = [any(g.remembers for dose in part.doses for g in dose.gates) for part in self.parts]
        # Whether a part does nothing at the residual stream but add the same to every row.
        self.plain = [
            all(is_plain(dose) for dose in part.doses if dose.vector.site == "residual")
            for part in self.parts
        ]
        self.widths = {
            (site, layer): compiled.width(site, layer)
            for compiled in self.compiled
            for site, layers in compiled.places.items()
            for layer in layers
        }
        self.elsewhere = frozenset(place for place in self.widths if place[0] != "residual")
        self._prompt_doses, self._response_doses = self._doses(self.prompt), self._doses(self.response)
        self._since = object()  # what is kept of replies is under this key
        self._acting: dict[tuple[bool, tuple[bool, ...]], Places] = {}
        self._tables: dict[tuple[str, torch.device, torch.dtype], dict[int, Table]] = {}

    def _number(self, part: Part) -> int:
        if part.compiled is None:
            return 0
        for i, known in enumerate(self.parts):
            if known is part:
                return i + 1
        self.parts.append(part)
        self.compiled.append(part.compiled)
        return len(self.parts)

    @property
    def recipes(self) -> Recipe | tuple[Recipe, ...]:
        recipes = tuple(program.recipe for program in self.programs)
        return recipes if self.by_row else recipes[0]

    def table(self, site: str, layer: int, device: torch.device, dtype: torch.dtype) -> Table | None:
        """What torch does there. The first call for a site, device and dtype copies all layers at once.

        Raises VectorError where a direction does not fit into the dtype.
        """
        key = site, device, dtype
        if key not in self._tables:
            self._tables[key] = tables(self.parts, site, device, dtype)
        return self._tables[key].get(layer)

    # ---- by pass ----

    def acting(self, rows: Rows) -> Places:
        """Where something may happen in a pass over `rows`: not where all windows are closed."""
        response: tuple[bool, ...] = ()
        if rows.made and self.counts:
            response = tuple(_may_act(dose, rows.replies) for _, dose in self._response_doses)
        elif rows.made:
            response = (True,) * len(self._response_doses)
        key = rows.given > 0, response
        if key not in self._acting:
            doses = list(self._prompt_doses) if rows.given else []
            self._acting[key] = self._places([*doses, *compress(self._response_doses, response)])
        return self._acting[key]

    def _doses(self, numbers: list[int]) -> list[tuple[int, Dose]]:
        return [
            (number, dose) for number in sorted({*numbers} - {0}) for dose in self.parts[number - 1].doses
        ]

    def _places(self, doses: list[tuple[int, Dose]]) -> Places:
        found: dict[str, set[int]] = {}
        for number, dose in doses:
            site = dose.vector.site
            layers = set(dose.vector.layers).intersection(self.parts[number - 1].places.get(site, ()))
            found.setdefault(site, set()).update(layers)
        return {site: frozenset(layers) for site, layers in found.items() if layers}

    def numbers(self, rows: Rows, device: torch.device) -> int | Tensor:
        """Which part acts on each row: one number for all, else int64 (batch, tokens) or (batch, 1).

        Raises RecipeError where there is a recipe for each row and the batch has another number of rows.
        """
        all_prompt = rows.given == rows.tokens
        one_side = all_prompt or rows.given == 0 or self.alike
        if not self.by_row and rows.real is None and one_side:
            return self.prompt[0] if all_prompt else self.response[0]
        count = len(self.programs)
        if self.by_row and rows.batch != count * rows.fold:
            raise RecipeError(
                f"expected a batch of {count} rows, since {count} row recipes are set; got "
                f"{rows.batch // rows.fold}"
            )
        prompt, response = (
            torch.tensor(side, device=device).repeat_interleave(rows.fold if self.by_row else 1)[:, None]
            for side in (self.prompt, self.response)
        )
        if one_side:
            numbers = prompt if all_prompt else response
        else:
            numbers = torch.where(torch.arange(rows.tokens, device=device) < rows.given, prompt, response)
        if rows.real is not None:
            numbers = numbers * rows.real.to(device)
        return numbers.expand(rows.batch, -1)

    def tokens(self, rows: Rows) -> Tokens | None:
        """What the engine has to know of the rows, seen as (batch * tokens, width); None for nothing."""
        if not self.counts or not rows.made:
            return None
        times = rows.fold if self.by_row else rows.batch
        numbers = [number for number in self.response for _ in range(times)]
        memories = [self._engine_memory(rows, row, number) for row, number in enumerate(numbers)]
        each = [memory for memory in memories for _ in range(rows.tokens)]
        return Tokens(rows.numbered * rows.batch, each)

    def _engine_memory(self, rows: Rows, row: int, number: int) -> Memory | None:
        if number == 0 or not self.remembers[number - 1]:
            return None
        memory = self.memory(rows, "engine")
        if (number, row) not in memory:
            memory[number, row] = Memory(self.compiled[number - 1])
        found: Memory = memory[number, row]
        return found

    def memory(self, rows: Rows, of: object) -> dict[Any, Any]:
        """What is kept of this reply under these programs, by whatever it is `of`; to be changed."""
        kept = {} if rows.kept is None else rows.kept
        if self._since not in kept:
            if len(kept) >= _REMEMBERED:  # recipes that change before every token
                del kept[next(iter(kept))]
            kept[self._since] = {}
        found: dict[Any, Any] = kept[self._since].setdefault(of, {})
        return found

    def begin_anew(self) -> None:
        """Forget what is kept of replies: the programs are set once more."""
        self._since = object()


def _may_act(dose: Dose, replies: range) -> bool:
    """Whether it could do something on these tokens of a reply, or has to remember something of them."""
    window = dose.window
    if window == ALWAYS:
        return True
    if any(gate.remembers for gate in dose.gates):
        return replies.start < window.stop
    return replies.start < window.stop and replies.stop > window.start


def runs(numbers: int | Tensor, rows: Rows) -> list[tuple[int, int, int]]:
    """(part, first row, how many rows) for each stretch of neighbouring rows that it acts on.

    Rows are those of the activations seen as (batch * tokens, width).
    """
    count = rows.batch * rows.tokens
    if isinstance(numbers, int):
        return [(numbers, 0, count)] if numbers else []
    flat = numbers.expand(rows.batch, rows.tokens).reshape(-1).numpy()
    starts = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist()]
    ends = [*starts[1:], count]
    return [(int(flat[start]), start, end - start) for start, end in zip(starts, ends) if flat[start]]
