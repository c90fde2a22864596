"""What programs do at the places of a site, as tensors on one device.

The tensors are all that differs between two doses of one recipe, so a graph of torch.compile that has
them for inputs need not be compiled again for another dose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import reference
from ..errors import VectorError
from ..program import ALWAYS, Dose, OpenWhen, Part, Window, doses_at
from ..vector import Floats

FOLDING = ("scale", "add", "add_keep_norm", "forbid", "force")  # what doses of one manner do at once
MARKS = ("forbid", "force")


class Directions(NamedTuple):
    """What is plainly added at one place: (1 + number of parts, width), row 0 being zero.

    add: in the dtype of the activations. keep_norm: float32 at least. None where no part has such a term.
    """

    add: Tensor | None
    keep_norm: Tensor | None


class Step(NamedTuple):
    """What the doses of one manner, or of what does not fold one dose, do at one place.

    part: whose they are. window: None on every token. gates: into those of the place. direction: (width,),
    of force and forbid bool; of ablate and clamp the basis (rank, width). target: (width,), of clamp, and
    of edit what raises the probe's logit by one. limit: of edit, the margin less the bias (). strength: of
    ablate, clamp and edit ().
    """

    part: int
    operation: str
    window: Window | None
    gates: tuple[int, ...]
    direction: Tensor
    target: Tensor | None = None
    limit: Tensor | None = None
    strength: Tensor | None = None


class Opening(NamedTuple):
    """A gate at one place. row: (width,); center, above and below: ()."""

    key: str
    row: Tensor
    center: Tensor
    above: Tensor
    below: Tensor
    hysteresis: float
    latch: bool

    @property
    def remembers(self) -> bool:
        return self.latch or self.hysteresis > 0


class Place(NamedTuple):
    """Everything at one place, float32 at least, the steps in the order in which they act."""

    gates: tuple[Opening, ...]
    steps: tuple[Step, ...]


Table: TypeAlias = "Directions | Place"
Arrays: TypeAlias = "dict[int, dict[str, npt.NDArray[Any]]]"  # by layer, by the field of a Step
_Put: TypeAlias = "Callable[[Sequence[npt.NDArray[Any]]], Sequence[Tensor]]"  # on the device


def is_plain(dose: Dose) -> bool:
    """Whether it adds the same to every row."""
    return dose.operation in ("add", "add_keep_norm") and dose.window == ALWAYS and not dose.gates


def tables(parts: Sequence[Part], site: str, device: torch.device, dtype: torch.dtype) -> dict[int, Table]:
    """{layer: what `parts`, numbered from 1, do there}, only where they do something.

    dtype: of the activations. Raises VectorError where it can't hold what would be added.
    """
    doses = [dose for part in parts for dose in part.doses if dose.vector.site == site]
    layers = sorted({layer for part in parts for layer in part.places.get(site, ())})
    if all(map(is_plain, doses)):
        return dict(zip(layers, _directions(parts, site, layers, device, dtype)))
    put = partial(_placed, device=device, dtype=torch.promote_types(dtype, torch.float32))
    gates = {gate.key: gate for dose in doses for gate in dose.gates}
    openings = {key: _openings(gate, put) for key, gate in gates.items()}
    found: dict[int, Place] = {layer: Place((), ()) for layer in layers}
    for number, part in enumerate(parts, 1):
        for unit in _units(part, site):
            arrays = _arrays(unit, site, layers)
            if unit[0].operation in ("clamp", "add", "add_keep_norm"):
                _require_fit((array for each in arrays.values() for array in each.values()), dtype)
            for layer, step in _steps(number, unit[0], arrays, put).items():
                found[layer] = _joined(found[layer], step, [openings[g.key][layer] for g in unit[0].gates])
    return {layer: place for layer, place in found.items() if place.steps}


def _joined(place: Place, step: Step, openings: Sequence[Opening]) -> Place:
    """`place` with one more step, and those of its gates that are new there."""
    known = [gate.key for gate in place.gates]
    gates = (*place.gates, *(opening for opening in openings if opening.key not in known))
    numbers = {gate.key: number for number, gate in enumerate(gates)}
    step = step._replace(gates=tuple(numbers[opening.key] for opening in openings))
    return Place(gates, (*place.steps, step))


# ---- what is plainly added ----


def _directions(
    parts: Sequence[Part], site: str, layers: Sequence[int], device: torch.device, dtype: torch.dtype
) -> list[Directions]:
    add = _table(parts, "add", site, layers)
    _require_fit(add or (), dtype)
    keep_norm = _table(parts, "add_keep_norm", site, layers)
    wide = torch.promote_types(dtype, torch.float32)
    added = _placed(add, device, dtype) if add else [None] * len(layers)
    kept = _placed(keep_norm, device, wide) if keep_norm else [None] * len(layers)
    return [Directions(*both) for both in zip(added, kept)]


def _table(parts: Sequence[Part], operation: str, site: str, layers: Sequence[int]) -> list[Floats] | None:
    """For each layer (1 + number of parts, width); None where there is nothing of that."""
    found = []
    for layer in layers:
        width = max(part.compiled.width(site, layer) for part in parts if part.compiled)
        rows = [np.zeros(width, dtype=np.float32)] * (1 + len(parts))
        for number, part in enumerate(parts, 1):
            direction = _direction(part, operation, site, layer)
            if direction is not None:
                rows[number] = direction
        found.append(np.stack(rows))
    return found if any(table.any() for table in found) else None


def _direction(part: Part, operation: str, site: str, layer: int) -> Floats | None:
    """What the doses of a part that has only plain ones add there."""
    if site == "residual":  # the engine has it summed; at other sites it may keep only what is not zero
        return part.compiled.direction(layer, operation) if part.compiled else None
    doses = [dose for dose in doses_at(part.doses, site, layer) if dose.operation == operation]
    return reference.combine([(dose.coefficient, dose.vector) for dose in doses], layer)


# ---- everything else ----


def _units(part: Part, site: str) -> list[list[Dose]]:
    """The doses of a site in the order in which they act, those that fold together."""
    found = []
    for _, members in groupby((d for d in part.doses if d.vector.site == site), key=lambda dose: dose.manner):
        group = list(members)
        found += [group] if group[0].operation in FOLDING else [[dose] for dose in group]
    return found


def _arrays(unit: Sequence[Dose], site: str, layers: Iterable[int]) -> Arrays:
    """What a unit does at each of `layers` where it does something."""
    found = {}
    for layer in layers:
        doses = doses_at(unit, site, layer)
        fields = _fields(doses, layer) if doses else {}
        if fields and fields["direction"].any():
            found[layer] = fields
    return found


def _fields(doses: Sequence[Dose], layer: int) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a Step."""
    dose = doses[0]
    vector = dose.vector
    at = vector.layers.index(layer)
    if dose.operation in MARKS:
        return {
            "direction": np.any([d.vector.rows[d.vector.layers.index(layer)] != 0 for d in doses], axis=0)
        }
    if dose.operation in FOLDING:
        direction = reference.combine([(d.coefficient, d.vector) for d in doses], layer)
        return {} if direction is None else {"direction": direction}
    strength = np.array(dose.coefficient)
    if dose.operation == "edit":
        assert vector.bias is not None  # compile_recipe has looked
        probe = vector.rows[at].astype(np.float64)
        step = probe / (float(probe @ probe) or 1.0)
        limit = np.array(dose.values[0] - vector.bias[at])
        return {"direction": vector.rows[at], "target": step, "limit": limit, "strength": strength}
    fields = {"direction": vector.basis[at], "strength": strength}
    return fields if dose.operation == "ablate" else {**fields, "target": reference.target(dose, at)}


def _steps(number: int, dose: Dose, arrays: Arrays, put: _Put) -> dict[int, Step]:
    """By layer, the steps of part `number` whose arrays these are; their gates are not looked up yet."""
    window = None if dose.window == ALWAYS else dose.window
    fields = {name: put([each[name] for each in arrays.values()]) for name in next(iter(arrays.values()), {})}
    return {
        layer: Step(
            number, dose.operation, window, (), **{name: placed[i] for name, placed in fields.items()}
        )
        for i, layer in enumerate(arrays)
    }


def _openings(gate: OpenWhen, put: _Put) -> dict[int, Opening]:
    """By layer."""
    vector = gate.vector
    rows = put(list(vector.readouts[:, 0]))
    centers = put(list(vector.center[:, 0]))
    above, below = put([np.array(gate.above), np.array(gate.below)])
    return {
        layer: Opening(gate.key, row, center, above, below, gate.hysteresis, gate.latch)
        for layer, row, center in zip(vector.layers, rows, centers)
    }


def _placed(arrays: Sequence[npt.NDArray[Any]], device: torch.device, dtype: torch.dtype) -> Sequence[Tensor]:
    """The arrays on the device, in one copy where they are of one shape; booleans stay what they are."""
    if len({array.shape for array in arrays}) > 1:
        return [_placed([array], device, dtype)[0] for array in arrays]
    stacked = torch.from_numpy(np.stack(arrays)).to(device)
    placed: Sequence[Tensor] = (stacked if stacked.dtype == torch.bool else stacked.to(dtype)).unbind()
    return placed


def _require_fit(arrays: Iterable[npt.NDArray[Any]], dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    if dtype == torch.float16 and any(np.abs(array).max() > limit for array in arrays):
        raise VectorError(f"a direction of the recipe does not fit into {dtype}; use a smaller dose")
