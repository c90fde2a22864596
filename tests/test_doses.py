"""Which doses a vector is good for, and the warning about others."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import mien
import numpy as np
import pytest
from mien.calibration import calibrate
from mien.errors import DoseWarning, MienWarning
from mien.program import compile_recipe, excessive_doses
from mien.recipe import parse
from mien.runtimes.fake import NumpyEvaluator, NumpyModel, NumpyRuntime
from mien.steering import Steering
from mien.vector import Vector

MODEL = NumpyModel().fingerprint


def make(name: str = "joy", **meta: Any) -> Vector:
    rows = np.random.default_rng(len(name)).standard_normal((2, MODEL.n_embd)).astype(np.float32)
    return Vector(name, (1, 2), rows, MODEL, meta=meta)


CURVE = {"calibration.dose": [0.0, 0.5, 1.0, 1.75]}
JOY = make("joy", kind="emotion", **CURVE)
FORMAL = make("formal", kind="trait", **CURVE)
BOTH = make("bothways", kind="emotion", **{"calibration.dose": [-2.0, 0.0, 1.0]})
RAW = make("unmeasured")


@pytest.fixture
def steering() -> Iterator[Steering]:
    with Steering(NumpyRuntime(NumpyModel())) as steering:
        for vector in (JOY, FORMAL, BOTH, RAW):
            steering.define(vector.name, vector)
        yield steering


def doses_warned_of(recipe: str) -> dict[str, float]:
    found = {vector.name: vector for vector in (JOY, FORMAL, BOTH, RAW)}
    program = compile_recipe(parse(recipe), MODEL, found.__getitem__)
    return {warning.name: warning.dose for warning in excessive_doses(program)}


def test_a_file_says_which_doses_were_measured() -> None:
    assert JOY.calibrated == FORMAL.calibrated == (0.0, 1.75)
    assert BOTH.calibrated == BOTH.limits == (-2.0, 1.0)
    assert (JOY.limits, FORMAL.limits) == ((-0.5, 1.75), (-1.0, 1.75))
    assert RAW.calibrated is RAW.limits is None
    for curve in ([], "all", 1.0, ["a"], [float("nan")]):
        assert make(**{"calibration.dose": curve}).calibrated is None


def test_the_result_of_arithmetic_is_not_calibrated_and_keeps_to_the_limits_of_its_parts() -> None:
    assert all(vector.calibrated is None for vector in (2 * JOY, JOY + FORMAL, -JOY))
    assert (2 * JOY).limits == (-0.25, 0.875)
    assert (-JOY).limits == (-1.75, 0.5)
    assert (JOY / 4).limits == (-2.0, 7.0)
    assert (JOY + FORMAL).limits == (-0.5, 1.75)
    assert (0.5 * JOY - FORMAL).limits == (-1.0, 1.0)
    assert (JOY + RAW).limits == JOY.limits
    assert (RAW + RAW).limits is (0 * JOY).limits is None
    assert (JOY - 4 * JOY).limits == (-0.4375, 0.125)


@pytest.mark.parametrize(
    ("vector", "dose"), [(100 * JOY, 1), (-JOY, 1), (0.5 * JOY - 3 * FORMAL, 1), (2 * JOY, -1), (JOY / 2, 4)]
)
def test_a_vector_that_was_made_longer_is_warned_of(steering: Steering, vector: Vector, dose: float) -> None:
    with pytest.warns(DoseWarning) as caught:
        steering.set(dose * vector if dose != 1 else vector)
    assert len(caught) == 1


@pytest.mark.parametrize("vector", [0.5 * JOY, JOY, -0.5 * JOY, 0.5 * JOY - 0.5 * FORMAL, RAW * 100])
def test_a_vector_within_its_limits_is_not(steering: Steering, vector: Vector) -> None:
    steering.set(vector)


@pytest.mark.parametrize(
    ("recipe", "warned"),
    [
        ("1.75*joy - formal - 2*bothways + 100*unmeasured", {}),
        ("-0.5*joy", {}),
        ("1.76*joy", {"joy": 1.76}),
        ("100*joy - 2*formal", {"joy": 100.0, "formal": -2.0}),
        ("-joy", {"joy": -1.0}),
        ("1.5*bothways", {"bothways": 1.5}),
        ("joy + joy", {"joy": 2.0}),
        ("3*joy(keep_norm=True)", {"joy": 3.0}),
        ("3*joy(when='prompt')", {"joy": 3.0}),
        ("3*joy(start=2)", {"joy": 3.0}),
        ("3*joy(turn=2)", {"joy": 3.0}),
        ("gate(3*joy, on=formal, above=9)", {"joy": 3.0}),
        ("joy(when='prompt') + joy(when='response')", {}),
        ("ablate(joy) + clamp(formal, 5)", {}),
        ("", {}),
    ],
)
def test_doses_outside_of_the_limits_are_found(recipe: str, warned: dict[str, float]) -> None:
    assert doses_warned_of(recipe) == warned


def test_a_vector_is_warned_of_once_where_the_user_wrote_it(steering: Steering) -> None:
    def use() -> None:
        steering.set("100*joy")
        steering.set("90*joy - 3*formal")
        with steering("80*joy - 4*formal"):
            pass

    with pytest.warns(MienWarning) as caught:
        use()
    found = [each.message for each in caught]
    assert [(w.name, w.dose, w.limits) for w in found if isinstance(w, DoseWarning)] == [
        ("joy", 100.0, JOY.limits),
        ("formal", -3.0, FORMAL.limits),
    ]
    assert {each.filename for each in caught} == {__file__}
    assert mien.DoseWarning is DoseWarning
    assert str(steering.recipe) == "90.0*joy - 3.0*formal"


def test_a_warning_inside_with_is_the_users_too(steering: Steering) -> None:
    with pytest.warns(DoseWarning) as caught, steering("7*joy"):
        pass
    assert caught[0].filename == __file__


def test_a_warning_made_an_error_leaves_the_steering_as_it_was(steering: Steering) -> None:
    steering.set("joy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DoseWarning):
            steering.set("100*joy")
    assert str(steering.recipe) == "joy"


def test_a_defined_vector_has_the_name_that_it_was_given(steering: Steering) -> None:
    steering.define("bliss", JOY)
    with pytest.warns(DoseWarning, match=r"^9\*bliss is outside "):
        steering.set("9*bliss")


def test_measuring_a_calibrated_vector_again_warns_of_nothing() -> None:
    many = NumpyEvaluator(NumpyModel())
    prompts = [many.text([{"role": "user", "content": "how was your day"}])]
    found = calibrate(many, JOY, prompts, coefficients=(0.5, 4.0), reply_tokens=4, strict=False)
    many.close()
    assert found.curve[-1].coefficient in (0.5, 4.0)


@pytest.mark.parametrize("name", ["gate", "lambda", "my-joy", "", "a.b", "None"])
def test_a_name_that_a_recipe_can_not_say_is_not_defined(steering: Steering, name: str) -> None:
    with pytest.raises(mien.RecipeError):
        steering.define(name, JOY)


def test_a_name_is_defined_in_the_form_in_which_recipes_are_read(steering: Steering) -> None:
    steering.define("gro\u0308ße", JOY)  # decomposed, as file names are on macOS
    steering.set("größe")
    assert str(steering.recipe) == "größe"
