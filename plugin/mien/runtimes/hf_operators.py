"""The formulas of mien.reference as torch operations: on any device and dtype, under autograd, in graphs.

Each takes activations and gives new ones of the same shape and dtype. `share` is what there is of the
dose: a number, or a tensor that goes with the activations' rows; 1.0 is all of it.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Share: TypeAlias = "float | Tensor"

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by an element's size


def length(h: Tensor) -> Tensor:
    """The Euclidean length of each row, (..., 1): also of rows whose squares no float of the dtype holds."""
    greatest = h.detach().abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(h.dtype).tiny)
    return greatest * torch.linalg.vector_norm(h / greatest, dim=-1, keepdim=True)


def add(h: Tensor, direction: Tensor, share: Share = 1.0) -> Tensor:
    """As reference.add."""
    return h + _part(direction, share)


def add_keep_norm(h: Tensor, direction: Tensor, share: Share = 1.0) -> Tensor:
    """As reference.add_keep_norm; lengths are of h's dtype, or of the direction's where that is wider."""
    moved = h + _part(direction, share)
    old, new = length(h.to(moved.dtype)), length(moved)
    return moved / torch.where(new > 0, new, 1.0) * old  # old / new may be less than a float can hold


def scale(h: Tensor, gains: Tensor, share: Share = 1.0) -> Tensor:
    """As reference.scale, of gains that hold the coefficient."""
    return h * (1 + _part(gains, share))


def project(h: Tensor, basis: Tensor, target: Tensor | None, strength: Tensor, share: Share = 1.0) -> Tensor:
    """As reference.clamp, and without a target reference.ablate. basis: (rank, width)."""
    away = (h @ basis.mT) @ basis
    return h + _part(strength, share) * (-away if target is None else target - away)


def edit(
    h: Tensor, probe: Tensor, step: Tensor, limit: Tensor, strength: Tensor, share: Share = 1.0
) -> Tensor:
    """As reference.edit. step: w / <w, w>; limit: margin - bias."""
    short = limit - (h @ probe)[..., None]
    return torch.where(short > 0, h + _part(strength, share) * short * step, h)


def forbid(h: Tensor, marked: Tensor) -> Tensor:
    """As reference.forbid."""
    return torch.where(marked, -torch.inf, h)


def force(h: Tensor, marked: Tensor) -> Tensor:
    """As reference.force, in the dtype of `h`. No gradient goes through what is set."""
    greatest = h.detach().amax(dim=-1, keepdim=True)
    return torch.where(marked, torch.maximum(next_up(greatest), greatest + 2**-10), h)


def next_up(h: Tensor) -> Tensor:
    """The next greater float of the dtype; torch.nextafter does not take every dtype on every device."""
    bits = h.view(_BITS[h.element_size()])
    up = torch.where(h == 0, torch.ones_like(bits), bits + torch.where(h > 0, 1, -1).to(bits.dtype))
    return torch.where(h == torch.inf, h, up.view(h.dtype))


def _part(dose: Tensor, share: Share) -> Tensor:
    return dose if isinstance(share, float) and share == 1.0 else dose * share
