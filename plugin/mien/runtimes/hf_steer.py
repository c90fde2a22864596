"""What acts on activations by torch: the operators of one place, in order, on the rows of a forward pass.

numbers: which part acts on each row, see Loaded.numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.functional import embedding

from . import hf_operators as operators
from .hf_operators import Share
from .hf_rows import Rows
from .hf_tables import MARKS, Directions, Opening, Place, Step

_FORMULAS: dict[str, Callable[..., Tensor]] = {
    "ablate": lambda h, step, share: operators.project(h, step.direction, None, step.strength, share),
    "clamp": lambda h, step, share: operators.project(h, step.direction, step.target, step.strength, share),
    "edit": lambda h, step, share: operators.edit(
        h, step.direction, step.target, step.limit, step.strength, share
    ),
    "scale": lambda h, step, share: operators.scale(h, step.direction, share),
    "add": lambda h, step, share: operators.add(h, step.direction, share),
    "add_keep_norm": lambda h, step, share: operators.add_keep_norm(h, step.direction, share),
    "forbid": lambda h, step, share: operators.forbid(h, step.direction),
    "force": lambda h, step, share: operators.force(h, step.direction),
}


def add_plainly(
    h: Tensor, directions: Directions, numbers: int | Tensor, in_place: bool
) -> tuple[Tensor, Tensor | None]:
    """The steered activations, and where norms were kept the length that each row moved by.

    h: floating point (batch, tokens, width). Norms are float32 at least.
    """
    add, keep_norm = (
        None if table is None else table[numbers] if isinstance(numbers, int) else embedding(numbers, table)
        for table in directions
    )
    if keep_norm is None:
        return (h if add is None else h.add_(add) if in_place else h + add), None
    added = h if add is None else h + add
    steered = operators.add_keep_norm(added, keep_norm).to(h.dtype)
    moved = _moved(h, steered)
    return (h.copy_(steered) if in_place else steered), moved


def lengths(tables: Iterable[Tensor | None]) -> list[Tensor]:
    """The Euclidean length of each row of the tables that there are."""
    return [torch.linalg.vector_norm(table.float(), dim=-1) for table in tables if table is not None]


def act(
    h: Tensor, place: Place, numbers: int | Tensor, rows: Rows, memory: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The steered activations, and the length that each row moved by (batch, tokens); where router logits
    were set the root of how many.

    h: floating point (batch, tokens, width). memory: of this reply and place, by gate; changed. Computed in
    float32 at least and rounded once.
    """
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    opened = [_opened(gate, wide.detach(), rows, memory) for gate in place.gates]
    for step in place.steps:
        if step.operation not in MARKS:
            wide = _stepped(wide, step, numbers, rows, opened)
    steered = wide.to(h.dtype)
    moved = _moved(h, steered)
    for step in place.steps:  # what is above the greatest one is another in each dtype
        if step.operation in MARKS:
            before, steered = steered, _stepped(steered, step, numbers, rows, opened)
            moved = (moved**2 + (steered != before).sum(dim=-1)).sqrt()
    return steered, moved


def _stepped(h: Tensor, step: Step, numbers: int | Tensor, rows: Rows, opened: list[Tensor]) -> Tensor:
    chosen, share = _chosen(step, numbers, opened), _share(step, rows, h)
    if chosen is False or (isinstance(share, float) and share == 0.0):
        return h
    if isinstance(share, Tensor):
        chosen = (share != 0) & chosen
    changed = _FORMULAS[step.operation](h, step, share)
    return changed if chosen is True else torch.where(chosen, changed, h)


def _chosen(step: Step, numbers: int | Tensor, opened: list[Tensor]) -> bool | Tensor:
    """The rows that it is for and whose gates are open, (batch, tokens, 1), or all or none of them."""
    if isinstance(numbers, int) and numbers != step.part:
        return False
    masks = [opened[gate] for gate in step.gates]
    if isinstance(numbers, Tensor):
        masks.append(numbers == step.part)
    if not masks:
        return True
    chosen = masks[0]
    for mask in masks[1:]:
        chosen = chosen & mask
    return chosen[..., None]


def _share(step: Step, rows: Rows, like: Tensor) -> Share:
    """What its window leaves of the dose: a number where all tokens are alike, else (tokens, 1)."""
    if step.window is None:
        return 1.0
    if not rows.made:
        return 0.0
    shares = [step.window.at(reply) for reply in rows.numbered]
    return shares[0] if len(set(shares)) == 1 else like.new_tensor(shares)[:, None]


def _opened(gate: Opening, h: Tensor, rows: Rows, memory: dict[str, Tensor]) -> Tensor:
    """On which rows the gate is open, bool (batch, tokens).

    What it remembers is by row of the batch: whether it was open on each token of the reply, (batch, tokens
    of the reply).
    """
    read = h @ gate.row - gate.center
    found = (read > gate.above) & (read < gate.below)
    if not gate.remembers or not rows.made:
        return found
    slack = gate.hysteresis
    stays = ((read > gate.above - slack) & (read < gate.below + slack)) | gate.latch
    replies = rows.replies
    was = memory[gate.key] = _with_room(memory.get(gate.key), found, replies.stop)
    for column, reply in enumerate(replies, rows.given):
        if reply:
            found[:, column] |= was[:, reply - 1] & stays[:, column]
        was[:, reply] = found[:, column]
    return found


def _with_room(was: Tensor | None, like: Tensor, count: int) -> Tensor:
    """`was` with at least that many columns, all false at first; of another batch nothing is remembered."""
    if was is None or len(was) != len(like):
        was = like.new_zeros((len(like), 0))
    if was.shape[1] >= count:
        return was
    return torch.cat([was, was.new_zeros((len(was), max(count, 64)))], dim=1)


def _moved(before: Tensor, after: Tensor) -> Tensor:
    with torch.no_grad():
        wide = torch.promote_types(before.dtype, torch.float32)
        return operators.length(after.to(wide) - before.to(wide))[..., 0]
