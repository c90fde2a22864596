"""Directions between two sets of states: a planted one is found by each method."""

from __future__ import annotations

import numpy as np
import pytest
from mien import methods
from mien.errors import MienError
from mien.methods import METHODS, PAIRED, States

D = 24


def planted(n: int = 60, noise: float = 0.3, seed: int = 0) -> tuple[States, States, States]:
    """(direction, positive, negative): pairs of a common topic that differ along the direction by 2 +- 0.5,
    with one dimension along which everything varies much, whatever its side."""
    random = np.random.default_rng(seed)
    direction = random.standard_normal(D)
    nuisance = random.standard_normal(D)
    nuisance -= nuisance @ direction / (direction @ direction) * direction
    direction /= np.linalg.norm(direction)
    nuisance /= np.linalg.norm(nuisance)
    topic = 3 * random.standard_normal((n, 1)) * nuisance + 5
    sides = []
    for sign in (1, -1):
        amount = sign + 0.5 * random.standard_normal((n, 1))
        sides.append(topic + amount * direction + noise * random.standard_normal((n, D)))
    return direction, sides[0], sides[1]


def cosine(a: States, b: States) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(4))
def test_a_planted_direction_is_found(method: str, seed: int) -> None:
    direction, positive, negative = planted(n=150, noise=0.2, seed=seed)
    found = METHODS[method](positive, negative).row
    # Its sign, too: to the positive. A probe also leans away from the noise, and the differences' component
    # is found by how much they vary, not by how large they are.
    least = 0.95 if method in ("mean", "pca_center") else 0.75
    assert cosine(found, direction) > least


@pytest.mark.parametrize("method", METHODS)
def test_the_sides_exchanged_give_the_direction_turned_round(method: str) -> None:
    _, positive, negative = planted()
    there, back = METHODS[method](positive, negative), METHODS[method](negative, positive)
    np.testing.assert_allclose(there.row, -back.row, atol=1e-6)
    if there.bias is not None and back.bias is not None:
        assert there.bias == pytest.approx(-back.bias, abs=1e-5)


@pytest.mark.parametrize("method", ["logistic", "lda"])
def test_a_probe_tells_new_states_apart_where_a_mean_does_not(method: str) -> None:
    """Along the nuisance the classes lie apart by chance; a probe looks past it."""
    _, positive, negative = planted(n=200, seed=1)
    positive = positive + 0.8 * (positive - positive.mean(axis=0))[:, :1]
    probe = METHODS[method](positive[:150], negative[:150])
    assert probe.bias is not None
    right = [
        (positive[150:] @ probe.row + probe.bias > 0).mean(),
        (negative[150:] @ probe.row + probe.bias < 0).mean(),
    ]
    assert min(right) > 0.95


def test_logistic_is_at_the_minimum_of_its_loss() -> None:
    _, positive, negative = planted(n=40, noise=2.0)
    found = methods.logistic(positive, negative)
    x = np.concatenate([positive, negative])
    y = np.repeat([1.0, 0.0], 40)
    spread = methods._spread(x)

    def loss(row: States, bias: float) -> float:
        odds = x @ row + bias
        return float(np.logaddexp(0, -odds[y == 1]).sum() + np.logaddexp(0, odds[y == 0]).sum()) + float(
            methods.RIDGE / 2 * (row * spread) @ (row * spread)
        )

    least = loss(found.row, found.bias or 0.0)
    random = np.random.default_rng(0)
    for _ in range(50):
        step = 1e-2 * np.linalg.norm(found.row) * random.standard_normal(D)
        assert loss(found.row + step, (found.bias or 0.0) - float(step @ x.mean(axis=0))) > least


def test_lda_is_the_whitened_difference() -> None:
    _, positive, negative = planted(n=10)
    found = methods.lda(positive, negative)
    up, down = positive.mean(axis=0), negative.mean(axis=0)
    within = np.concatenate([positive - up, negative - down])
    covariance = within.T @ within / len(within)
    shrunk = (1 - methods.SHRINKAGE) * covariance + methods.SHRINKAGE * np.trace(covariance) / D * np.eye(D)
    np.testing.assert_allclose(found.row, np.linalg.solve(shrunk, up - down), rtol=1e-8)


def test_a_principal_component_is_as_long_as_the_means_are_apart() -> None:
    _, positive, negative = planted()
    found = methods.to_length(methods.pca_center(positive, negative), positive, negative)
    difference = positive.mean(axis=0) - negative.mean(axis=0)
    assert np.linalg.norm(found) == pytest.approx(abs(difference @ found) / np.linalg.norm(found))
    np.testing.assert_allclose(
        methods.to_length(methods.mean(positive, negative), positive, negative), difference
    )


@pytest.mark.parametrize("method", PAIRED)
@pytest.mark.parametrize(
    ("rows", "words"), [((3, 2), "as many positive"), ((1, 1), "two pairs"), ((2, 2), "do not differ")]
)
def test_pairs_are_needed(method: str, rows: tuple[int, int], words: str) -> None:
    with pytest.raises(MienError, match=words):
        METHODS[method](np.ones((rows[0], D)), np.ones((rows[1], D)))


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
@pytest.mark.parametrize("fall", [0.5, 0.95, 1.0], ids=["steep", "slow", "flat"])
def test_a_principal_component_of_many_texts_is_the_first_singular_vector(
    shape: tuple[int, int], fall: float
) -> None:
    random = np.random.default_rng(0)
    scales = fall ** np.arange(shape[1])
    difference = (
        random.standard_normal(shape) * scales @ np.linalg.qr(random.standard_normal((shape[1],) * 2))[0]
    )
    positive, negative = difference / 2 + 1, 1 - difference / 2
    found = methods.pca_diff(positive, negative).row
    right = np.linalg.svd(difference - difference.mean(axis=0), full_matrices=False)[2]
    assert abs(cosine(found, right[0])) == pytest.approx(1, abs=1e-9)


def test_many_pairs_that_differ_alike_have_no_principal_component() -> None:
    same = np.ones((200, 200))
    with pytest.raises(MienError, match="do not differ"):
        methods.pca_diff(same + 1, same)
