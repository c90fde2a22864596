"""A program, or one for each row of a batch, in the form in which torch applies it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding

from ..engine import CompiledProgram
from ..errors import RecipeError, VectorError
from ..program import Part
from ..recipe import Recipe
from ..steering import Programs
from ..vector import Floats
from .hf_rows import Rows


class Directions(NamedTuple):
    """What one layer adds, on one device: (1 + number of parts, n_embd), row 0 being zero.

    add: in the dtype of the activations. keep_norm: float32. None where no part has such a term.
    """

    add: Tensor | None
    keep_norm: Tensor | None


class Loaded:
    """Programs as torch needs them. Part 0 is "nothing"; `parts[i - 1]` is part i.

    program: one for all rows, or a tuple of one for each.
    """

    def __init__(self, program: Programs, n_embd: int) -> None:
        self.by_row = isinstance(program, tuple)
        programs = program if isinstance(program, tuple) else (program,)
        self.programs = programs
        self.n_embd = n_embd
        self.parts: list[Part] = []
        self.prompt = [self._number(program.prompt) for program in programs]
        self.response = [self._number(program.response) for program in programs]
        self.alike = self.prompt == self.response
        self.layers = tuple(sorted({layer for part in self.parts for layer in part.layers}))
        self.acting = frozenset(self.layers)
        self.place = {layer: i for i, layer in enumerate(self.layers)}
        self._placed: dict[tuple[torch.device, torch.dtype], list[Directions]] = {}

    def _number(self, part: Part) -> int:
        if not part.doses:
            return 0
        for i, known in enumerate(self.parts):
            if known is part:
                return i + 1
        self.parts.append(part)
        return len(self.parts)

    @property
    def recipes(self) -> Recipe | tuple[Recipe, ...]:
        recipes = tuple(program.recipe for program in self.programs)
        return recipes if self.by_row else recipes[0]

    def directions(self, layer: int, device: torch.device, dtype: torch.dtype) -> Directions:
        """What `layer` adds. The first call for a device and dtype copies all layers there at once.

        Raises VectorError where a direction does not fit into the dtype.
        """
        placed = self._placed.get((device, dtype))
        if placed is None:
            placed = self._placed[device, dtype] = self._place(device, dtype)
        return placed[self.place[layer]]

    def _place(self, device: torch.device, dtype: torch.dtype) -> list[Directions]:
        add = self._table("add", device, dtype)
        keep_norm = self._table("add_keep_norm", device, torch.float32)
        return [
            Directions(None if add is None else add[i], None if keep_norm is None else keep_norm[i])
            for i in range(len(self.layers))
        ]

    def _table(self, operation: str, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        table: Floats = np.zeros((len(self.layers), 1 + len(self.parts), self.n_embd), dtype=np.float32)
        for number, part in enumerate(self.parts, 1):
            for layer in part.layers:
                direction = part.compiled.direction(layer, operation) if part.compiled else None
                if direction is not None:
                    table[self.place[layer], number] = direction
        if not table.any():
            return None
        placed = torch.from_numpy(table).to(device=device, dtype=dtype)
        if dtype == torch.float16 and np.abs(table).max() > torch.finfo(dtype).max:
            raise VectorError(f"a direction of the recipe does not fit into {dtype}; use a smaller dose")
        return placed

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
            torch.tensor(side, device=device).repeat_interleave(rows.fold)[:, None]
            for side in (self.prompt, self.response)
        )
        if one_side:
            numbers = prompt if all_prompt else response
        else:
            numbers = torch.where(torch.arange(rows.tokens, device=device) < rows.given, prompt, response)
        if rows.real is not None:
            numbers = numbers * rows.real.to(device)
        return numbers.expand(rows.batch, -1)


def runs(numbers: int | Tensor, rows: Rows, parts: list[Part]) -> list[tuple[CompiledProgram, int, int]]:
    """(program, first row, how many rows) for each stretch of neighbouring rows that it acts on.

    Rows are those of the activations seen as (batch * tokens, n_embd).
    """
    count = rows.batch * rows.tokens
    compiled = [None, *(part.compiled for part in parts)]
    if isinstance(numbers, int):
        program = compiled[numbers]
        return [(program, 0, count)] if program else []
    flat = numbers.expand(rows.batch, rows.tokens).reshape(-1).numpy()
    starts = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist()]
    found = []
    for start, end in zip(starts, [*starts[1:], count]):
        program = compiled[int(flat[start])]
        if program is not None:
            found.append((program, start, end - start))
    return found


def steer(
    h: Tensor, directions: Directions, numbers: int | Tensor, in_place: bool
) -> tuple[Tensor, Tensor | None]:
    """The steered activations, and where norms were kept the length that each row moved by.

    h: floating point (batch, tokens, n_embd). numbers: see Loaded.numbers. The formulas are those of
    mien.reference; norms and the scale are float32 at least.
    """
    add, keep_norm = (
        None if table is None else table[numbers] if isinstance(numbers, int) else embedding(numbers, table)
        for table in directions
    )
    if keep_norm is None:
        return (h if add is None else h.add_(add) if in_place else h + add), None
    before = h
    if add is not None:
        h = h + add
    wide = h + keep_norm  # float32 at least
    old = torch.linalg.vector_norm(h, dim=-1, keepdim=True, dtype=wide.dtype)
    new = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    steered = (wide * torch.where(new > 0, old / new, 0.0)).to(h.dtype)
    with torch.no_grad():
        moved = torch.linalg.vector_norm(steered - before, dim=-1, dtype=wide.dtype)
    return (before.copy_(steered) if in_place else steered), moved


def lengths(tables: Iterable[Tensor | None]) -> list[Tensor]:
    """The Euclidean length of each row of the tables that there are."""
    return [torch.linalg.vector_norm(table.float(), dim=-1) for table in tables if table is not None]
