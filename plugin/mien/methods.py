"""How a direction is found between two sets of activations at one layer.

Each method takes float64 (n, d) and (m, d), the states of the positive and the negative texts, and gives a
direction that points to the positive. A difference is as long as the two sets are apart; a principal
component, which has no length of its own, is given that of the difference along it (`to_length`). `logistic`
and `lda` are probes: they give the hyperplane that `edit` needs, and a length at which readings are log-odds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import MienError

States: TypeAlias = npt.NDArray[np.float64]

RIDGE = 1.0  # on weights of standardised states, in units of one text
SHRINKAGE = 0.1  # of the covariance towards a multiple of the identity
NEWTON_STEPS = 25
SMALL = 128  # rows or columns up to which all components are found as quickly as the first
SUBSPACE, TURNS, PRECISION = 8, 40, 1e-9  # of the iteration that finds it


@dataclass(frozen=True)
class Direction:
    """row: float64 (d,). bias: of a probe, the log-odds of the positive are <h, row> + bias; else None."""

    row: States
    bias: float | None = None


def mean(positive: States, negative: States) -> Direction:
    """Difference of means."""
    return Direction(positive.mean(axis=0) - negative.mean(axis=0))


def pca_diff(positive: States, negative: States) -> Direction:
    """First principal component of the pairs' differences, which are centred as repeng does."""
    _require_pairs(positive, negative)
    differences = positive - negative
    return _oriented(_first_component(differences - differences.mean(axis=0)), positive, negative)


def pca_center(positive: States, negative: States) -> Direction:
    """First principal component of both members of each pair, from the middle between them (repeng)."""
    _require_pairs(positive, negative)
    half = (positive - negative) / 2
    return _oriented(_first_component(np.concatenate([half, -half])), positive, negative)


def logistic(positive: States, negative: States) -> Direction:
    """Logistic regression with a ridge penalty, by Newton's method in the span of the texts."""
    x = np.concatenate([positive, negative])
    y = np.concatenate([np.ones(len(positive)), np.zeros(len(negative))])
    middle, spread = x.mean(axis=0), _spread(x)
    u, s, vt = np.linalg.svd((x - middle) / spread, full_matrices=False)
    z = u * s  # the states in coordinates of their own span: as many as there are texts
    weights, bias = np.zeros(z.shape[1]), 0.0
    penalty = np.diag([RIDGE] * z.shape[1] + [0.0])
    design = np.concatenate([z, np.ones((len(z), 1))], axis=1)
    theta = np.zeros(design.shape[1])
    for _ in range(NEWTON_STEPS):
        odds = 1 / (1 + np.exp(-np.clip(design @ theta, -30, 30)))
        gradient = design.T @ (odds - y) + penalty @ theta
        hessian = (design * (odds * (1 - odds) + 1e-9)[:, None]).T @ design + penalty
        step = np.linalg.solve(hessian, gradient)
        theta -= step
        if np.abs(step).max() < 1e-8:
            break
    weights, bias = theta[:-1], float(theta[-1])
    row = weights @ vt / spread
    return Direction(row, bias - float(row @ middle))


def lda(positive: States, negative: States) -> Direction:
    """Whitened difference of means: linear discriminant analysis with a shrunk covariance.

    Sigma^-1 (mu+ - mu-), Sigma = (1 - s) S + s tr(S)/d I, S within the two sets. It is a probe, of sets
    taken for equally frequent.
    """
    up, down = positive.mean(axis=0), negative.mean(axis=0)
    within = np.concatenate([positive - up, negative - down])
    d, n = within.shape[1], len(within)
    total = float((within**2).sum()) / n
    if total == 0:
        return Direction(up - down, -float((up - down) @ (up + down)) / 2)
    ridge = SHRINKAGE * total / d
    # (ridge I + (1-s)/n W'W)^-1 b by Woodbury: there are fewer texts than dimensions.
    kernel = within @ within.T * ((1 - SHRINKAGE) / n) + ridge * np.eye(n)
    difference = up - down
    row = (difference - within.T @ np.linalg.solve(kernel, within @ difference) * (1 - SHRINKAGE) / n) / ridge
    return Direction(row, -float(row @ (up + down)) / 2)


METHODS: dict[str, Callable[[States, States], Direction]] = {
    "mean": mean,
    "pca_diff": pca_diff,
    "pca_center": pca_center,
    "logistic": logistic,
    "lda": lda,
}
PAIRED = ("pca_diff", "pca_center")


def to_length(direction: Direction, positive: States, negative: States) -> States:
    """The row, as long as the means are apart along it: adding it moves the negative mean as far as the
    positive one, seen from that direction. A difference of means is returned as it is."""
    row = direction.row
    norm = float(np.linalg.norm(row))
    if norm == 0:
        raise MienError("the two sides do not differ there")
    unit = row / norm
    return np.asarray(unit * abs(float((positive.mean(axis=0) - negative.mean(axis=0)) @ unit)))


def _require_pairs(positive: States, negative: States) -> None:
    if len(positive) != len(negative):
        raise MienError(
            f"this method takes pairs: expected as many positive texts as negative, got {len(positive)} and "
            f"{len(negative)}"
        )
    if len(positive) < 2:
        raise MienError("this method needs at least two pairs")


def _first_component(centred: States) -> States:
    """The unit vector along which the rows vary most."""
    component = _by_iteration(centred) if min(centred.shape) > SMALL else None
    if component is None:
        component = _by_gram_matrix(centred)
    norm = float(np.linalg.norm(component))
    if norm == 0:
        raise MienError("the pairs do not differ from each other there")
    return np.asarray(component / norm)


def _by_gram_matrix(centred: States) -> States:
    """All components, by the smaller of the two Gram matrices; the first."""
    n, d = centred.shape
    if n <= d:
        _, vectors = np.linalg.eigh(centred @ centred.T)
        return np.asarray(centred.T @ vectors[:, -1])
    _, vectors = np.linalg.eigh(centred.T @ centred)
    return np.asarray(vectors[:, -1])


def _by_iteration(centred: States) -> States | None:
    """The first few components alone, by subspace iteration; None where they do not come apart soon.

    A subspace is turned towards the rows' largest components until the first of it (Rayleigh, Ritz) is a
    singular vector up to PRECISION (Halko, Martinsson and Tropp, 2011, algorithm 4.4).
    """
    random = np.random.default_rng(0)
    basis, _ = np.linalg.qr(random.standard_normal((centred.shape[1], SUBSPACE)))
    for _ in range(TURNS):
        left, values, right = np.linalg.svd(centred @ basis, full_matrices=False)
        first, back = basis @ right[0], centred.T @ left
        if np.linalg.norm(back[:, 0] - values[0] * first) <= PRECISION * values[0]:
            return np.asarray(first if values[0] else 0 * first)
        basis, _ = np.linalg.qr(back)
    return None


def _oriented(component: States, positive: States, negative: States) -> Direction:
    """Turned so that in most pairs the positive text lies further along it."""
    larger = float(np.sign((positive - negative) @ component).sum())
    if larger == 0:
        larger = float((positive.mean(axis=0) - negative.mean(axis=0)) @ component)
    return Direction(component if larger >= 0 else -component)


def _spread(x: States) -> float:
    """One scale for all dimensions: the root mean square of the centred states."""
    spread = float(np.sqrt(((x - x.mean(axis=0)) ** 2).mean()))
    return spread or 1.0
