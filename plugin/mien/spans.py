"""Linear algebra of directions, in float64. A span is (rank, width): its rows may depend on each other."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Doubles: TypeAlias = npt.NDArray[np.float64]
Real: TypeAlias = npt.NDArray[np.floating[Any]]

# Below this share of the longest, what is left of a direction beside the others is rounding.
CUT = 1e-6


def orthonormal(span: Doubles) -> Doubles:
    """Rows that are orthonormal and span what the rows of `span` do; those left over are zero."""
    lengths = np.abs(span).max(axis=1, keepdims=True)
    scaled = np.divide(span, lengths, out=np.zeros_like(span), where=lengths > 0)
    _, sizes, basis = np.linalg.svd(scaled, full_matrices=False)
    basis = np.pad(basis, ((0, len(span) - len(basis)), (0, 0)))
    kept = np.pad(sizes > CUT * max(sizes[0], 1e-300), (0, len(span) - len(sizes)))
    return np.where(kept[:, None], basis, 0.0)


def reading(spans: Real) -> Doubles:
    """Rows r_j with h = sum_j <r_j, h> v_j for each h in the span of the rows v_j: the pseudo-inverse's.

    spans: (..., rank, width), and so is what is returned. Of zero it is zero.
    """
    lengths = np.linalg.norm(spans.astype(np.float64), axis=-1, keepdims=True)
    inverse = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    found: Doubles = np.linalg.pinv(spans * inverse, rcond=CUT).swapaxes(-1, -2) * inverse
    return found


def coordinates(spans: Real, products: Doubles) -> Doubles:
    """What `reading` reads of h, when all that is known of it are the products <h, v_j>, (..., rank)."""
    rows = reading(spans)
    with np.errstate(over="ignore", invalid="ignore"):  # of a direction next to nothing it may be infinite
        found: Doubles = (rows @ (rows.swapaxes(-1, -2) @ products[..., None]))[..., 0]
    return found
