"""Recipes compiled: which doses a part holds, in which order, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from makers import MODEL, N_EMBD, N_LAYER, DictRegistry, make_vector, same_bits
from mien import reference
from mien.errors import MienError, ModelMismatch, RecipeError, SiteNotFound, VectorError
from mien.fingerprint import Fingerprint
from mien.program import ALWAYS, NOTHING, OPERATIONS, Dose, Part, Program, Window, compile_recipe, doses_at
from mien.recipe import DEFAULT_MARGIN, Gate, Recipe, Term, as_recipe, parse
from mien.sites import of_experts, of_heads, of_neurons
from mien.vector import Floats, Vector, purified

CENTER = {"center": [0.5, -0.25]}


class Places:
    """A model's sites: 3 heads of 4, 40 neurons, 6 experts of which 2 are chosen."""

    def __init__(self, experts: int = 6) -> None:
        self.widths = {"heads": 12, "neurons": 40, "experts": experts}
        self.widths |= dict.fromkeys(("residual", "attention", "mlp"), N_EMBD)
        self.experts_used = 2 if experts else 0

    def width(self, site: str, layer: int) -> int:
        if not self.widths[site] or (site, layer) == ("neurons", 5):
            raise SiteNotFound(site, layer, "not in this model")
        return self.widths[site]


def vectors() -> DictRegistry:
    found = [
        make_vector("joy"),
        make_vector("fear", (2, 3), 1),
        make_vector("calm", (1, 2, 3), 2),
        make_vector("centred", seed=3, meta=CENTER),
        make_vector("probe", seed=4, meta={"bias": [0.5, -1.0]}),
        make_vector("plane", seed=5, rank=2),
        make_vector("attended", (0, 2), 6, site="attention"),
        make_vector("thought", (0, 2), 7, site="mlp"),
        of_heads("heads", {(0, 1): -1.0, (2, 0): [1, 2, 3, 4]}, 3, 4, fingerprint=MODEL),
        of_neurons("neurons", {1: {7: 2.5, 39: -1}}, 40, fingerprint=MODEL),
        of_experts("one", {1: [0]}, 6, fingerprint=MODEL),
        of_experts("two", {1: [1], 2: [1, 2]}, 6, fingerprint=MODEL),
        of_experts("four", {1: [2, 3, 4, 5]}, 6, fingerprint=MODEL),
    ]
    registry = DictRegistry(*found)
    registry.vectors["happy"] = replace(registry.vectors["joy"], name="happy")  # the same floats
    return registry


PLACES = Places()


def compiled(
    recipe: str | Recipe | Term, registry: DictRegistry | None = None, sites: Places | None = PLACES
) -> Program:
    registry = registry or vectors()
    if isinstance(recipe, Term):
        recipe = Recipe((recipe,))
    return compile_recipe(as_recipe(recipe), MODEL, registry.find, sites)


def steered(part: Part, rows: Floats, layer: int, site: str = "residual") -> Floats:
    """By the engine."""
    out = rows.copy()
    if part.compiled is not None:
        part.compiled.apply(layer, out, site)
    return out


def some_rows(width: int = N_EMBD, count: int = 3, seed: int = 9) -> Floats:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


# Windows.


@pytest.mark.parametrize(
    ("window", "shares"),
    [
        (ALWAYS, [1, 1, 1, 1, 1, 1]),
        (Window(2), [0, 0, 0, 1, 1, 1]),
        (Window(0, 2), [0, 1, 1, 0, 0, 0]),
        (Window(1, 3), [0, 0, 1, 1, 0, 0]),
        (Window(0, ramp=4), [0, 0.25, 0.5, 0.75, 1, 1]),
        (Window(2, ramp=2), [0, 0, 0, 0.5, 1, 1]),
        (Window(0, ramp=1), [0, 1, 1, 1, 1, 1]),
        (Window(0, decay=1), [0, 1, 0.5, 0.25, 0.125, 0.0625]),
        (Window(1, 4, 2, 1), [0, 0, 0.5, 0.5, 0.25, 0]),
        (Window(1, 4, 0, 2), [0, 0, 1, 2**-0.5, 0.5, 0]),
    ],
)
def test_a_window_has_this_share_of_the_dose(window: Window, shares: Sequence[float]) -> None:
    assert [window.at(reply) for reply in range(-1, 5)] == pytest.approx(shares, rel=1e-15)


@pytest.mark.parametrize("window", ["start=1", "stop=9", "ramp=2", "decay=4"])
def test_what_counts_tokens_of_the_reply_acts_there_alone(window: str) -> None:
    program = compiled(f"joy({window}) + fear")
    assert [dose.vector.name for dose in program.prompt.doses] == ["fear"]
    assert {dose.vector.name for dose in program.response.doses} == {"joy", "fear"}
    assert program.response.counts
    assert not program.prompt.counts
    assert compiled(f"joy({window})").prompt is NOTHING.prompt


@pytest.mark.parametrize(
    ("text", "prompt", "response"),
    [
        ("spoken", "", "spoken"),
        ("0.5*spoken + fear", "fear", "0.5*spoken + fear"),
        ('spoken(when="all")', 'spoken(when="all")', 'spoken(when="all")'),
        ('spoken(when="prompt")', 'spoken(when="prompt")', ""),
        ("spoken(keep_norm=True)", "", "spoken(keep_norm=True)"),
        ("ablate(spoken)", "", "ablate(spoken)"),
        ("ablate(spoken - fear)", "ablate(spoken - fear)", "ablate(spoken - fear)"),
        ("purify(spoken, fear)", "", "purify(spoken, fear)"),
        ("gate(fear, on=spoken, above=1)",) * 3,
        ('fear(when="response")', "", "fear"),
    ],
)
def test_a_vector_says_where_it_acts_if_the_recipe_does_not(text: str, prompt: str, response: str) -> None:
    registry = vectors()
    registry.vectors["spoken"] = make_vector("spoken", seed=8, meta={"when": "response"})
    program, everywhere = compiled(text, registry), vectors()
    everywhere.vectors["spoken"] = make_vector("spoken", seed=8)
    for part, expected in ((program.prompt, prompt), (program.response, response)):
        whole = compiled(expected.replace('when="prompt"', 'when="all"'), everywhere)
        assert part.key == whole.response.key


def test_a_part_counts_where_a_window_or_a_memory_does() -> None:
    for text, counts in [
        ("joy", False),
        ("gate(joy, on=fear, above=1)", False),
        ("gate(joy, on=fear, above=1, hysteresis=0.5)", True),
        ("gate(joy, on=fear, above=1, latch=True)", True),
        ("joy(when='response')", False),
        ("ablate(joy, stop=3)", True),
    ]:
        assert compiled(text).response.counts is counts


# Turns.


def told(program: Program) -> list[str]:
    """What acts on a reply, by turn from 1 to 6."""
    parts = [program.at_turn(turn).response for turn in range(1, 7)]
    return ["+".join(sorted(dose.vector.name for dose in part.doses)) for part in parts]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("joy", ["joy"] * 6),
        ("joy(turn=1)", ["joy", "", "", "", "", ""]),
        ("joy(turn=2)", ["", "joy", "", "", "", ""]),
        ("joy(turn=(2, 4))", ["", "joy", "joy", "joy", "", ""]),
        ("joy(turn=(3, None))", ["", "", "joy", "joy", "joy", "joy"]),
        ("joy(turn=(1, None))", ["joy"] * 6),
        ("joy(turn=(1, 2)) + fear(turn=(2, 3))", ["joy", "fear+joy", "fear", "", "", ""]),
        ("joy + fear(turn=5)", ["joy"] * 4 + ["fear+joy", "joy"]),
        ("joy(turn=(2, 3)) - joy(turn=(3, 4))", ["", "joy", "", "joy", "", ""]),
    ],
)
def test_a_turn_says_in_which_replies(text: str, expected: list[str]) -> None:
    program = compiled(text)
    assert told(program) == expected
    assert program.recipe == parse(text)
    assert program.response is program.at_turn(1).response
    layers = {layer for turn in range(1, 7) for layer in program.at_turn(turn).layers}
    assert program.layers == tuple(sorted(layers))


def test_a_turn_that_holds_for_ever_is_no_turn() -> None:
    assert compiled("joy").turns == ()
    assert compiled("joy(turn=(1, None))").turns == ()
    assert [first for first, _ in compiled("joy(turn=(2, 4))").turns] == [1, 2, 5]


def test_the_parts_of_a_program_are_those_of_all_turns() -> None:
    program = compiled("joy(when='prompt') + fear(turn=2)")
    assert len(program.parts) == 5  # joy, and with fear; nothing, fear, and nothing again
    assert len(compiled("joy").parts) == 1


# Keys.

DIFFERENT = [
    "",
    "joy",
    "2*joy",
    "-joy",
    "fear",
    "joy + fear",
    "joy(keep_norm=True)",
    "joy(when='prompt')",
    "joy(when='response')",
    "joy(start=1)",
    "joy(start=2)",
    "joy(stop=1)",
    "joy(start=1, stop=2)",
    "joy(ramp=2)",
    "joy(decay=2)",
    "joy(decay=3)",
    "joy(decay=2, keep_norm=True)",
    "scale(joy)",
    "scale(joy, 2)",
    "ablate(joy)",
    "0.5*ablate(joy)",
    "ablate(joy, start=1)",
    "ablate(2*joy)",
    "ablate(plane)",
    "ablate(joy) + ablate(fear)",
    "ablate(joy) + 0.5*ablate(fear)",
    "clamp(joy, 1)",
    "clamp(joy, 2)",
    "clamp(joy, -1)",
    "clamp(centred, 1)",
    "clamp(uncentred, 1)",
    "clamp(plane, 1)",
    "clamp(plane, (1, 2))",
    "clamp(plane, (2, 1))",
    "edit(probe)",
    "edit(probe, margin=1)",
    "edit(biased)",
    "edit(-probe)",
    "0.5*edit(probe)",
    "gate(joy, on=fear, above=1)",
    "gate(joy, on=fear, above=2)",
    "gate(joy, on=fear, below=1)",
    "gate(joy, on=fear, above=1, below=2)",
    "gate(joy, on=fear, above=1, hysteresis=1)",
    "gate(joy, on=fear, above=1, latch=True)",
    "gate(joy, on=calm, above=1)",
    "gate(joy, on=-fear, above=1)",
    "gate(joy, on=centred, above=1)",
    "gate(joy, on=uncentred, above=1)",
    "gate(gate(joy, on=fear, above=1), on=calm, above=1)",
    "gate(ablate(joy), on=fear, above=1)",
    "purify(joy, fear)",
    "purify(joy, calm)",
    "attended",
    "thought",
    "heads",
    "scale(heads)",
    "neurons",
    "one",
    "force(one)",
    "forbid(one)",
    "force(two)",
]


def test_keys_differ_wherever_anything_differs() -> None:
    registry = vectors()
    registry.vectors["uncentred"] = replace(registry.vectors["centred"], meta={})
    registry.vectors["biased"] = replace(registry.vectors["probe"], meta={"bias": [0.5, -1.5]})
    found: dict[Any, str] = {}
    for text in DIFFERENT:
        program = compiled(text, registry)
        key = program.prompt.key, program.response.key
        assert key not in found, (found.get(key), text)
        assert hash(key) == hash(key)
        found[key] = text


def test_a_key_tells_parts_apart_by_site() -> None:
    sites = ("residual", "attention", "mlp")
    keys = {compiled(Term(1.0, make_vector("v", (2,), site=site))).prompt.key for site in sites}
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("joy + fear", "fear + joy"),
        ("joy + happy", "2*happy"),
        ("joy - happy", ""),
        ("ablate(joy)/4 + ablate(happy)/4", "0.5*ablate(joy)"),
        ("ablate(joy) + ablate(fear) + joy", "joy + ablate(fear) + ablate(joy)"),
        ("clamp(joy, 1) + clamp(fear, 2)", "clamp(fear, 2) + clamp(happy, 1)"),
        ("force(one) + force(two)", "force(two) + force(one)"),
        ("joy(start=1) + joy(start=1)", "2*joy(start=1)"),
        ("joy(turn=(1, None))", "joy"),
        ("gate(joy, on=fear, above=1) + gate(happy, on=fear, above=1)", "2*gate(joy, on=fear, above=1)"),
        ("edit(probe)", f"edit(probe, margin={DEFAULT_MARGIN!r})"),
    ],
)
def test_the_same_written_in_another_way_has_the_same_key(one: str, other: str) -> None:
    assert compiled(one).prompt.key == compiled(other).prompt.key
    assert compiled(one).response.key == compiled(other).response.key


def test_doses_act_in_the_order_of_their_operations() -> None:
    text = "joy(keep_norm=True) + fear + scale(joy, 0.5) + edit(probe) + clamp(calm, 1) + ablate(fear)"
    program = compiled(text)
    order = [OPERATIONS.index(dose.operation) for dose in program.prompt.doses]
    assert order == sorted(order)
    assert [dose.operation for dose in program.prompt.doses] == [
        "ablate",
        "clamp",
        "edit",
        "scale",
        "add",
        "add_keep_norm",
    ]


def test_terms_of_one_manner_fold_whatever_lies_between_them() -> None:
    """Vectors of other sites in the order of their digests, too."""
    names = ["joy", "fear", "calm", "centred", "attended", "thought"]
    program = compiled(" + ".join(names))
    residual = [v for v in vectors().vectors.values() if v.name in names and v.site == "residual"]
    terms = [(1.0, v) for v in sorted(residual, key=lambda v: v.digest)]
    assert program.prompt.compiled is not None
    for layer in (1, 2, 3):
        found = program.prompt.compiled.direction(layer, "add")
        expected = reference.combine(terms, layer)
        assert found is not None
        assert expected is not None
        assert same_bits(found, expected)


# Several ablations and clamps.


@pytest.mark.parametrize(
    "terms",
    [
        ["ablate(joy)", "ablate(fear)", "ablate(calm)"],
        ["ablate(joy, start=1)", "ablate(fear, start=1)", "ablate(calm)"],
        ["ablate(joy)", "ablate(plane)", "0.5*ablate(fear)"],
        ["clamp(joy, 1)", "clamp(fear, -2)", "clamp(centred, 0.5)"],
        ["clamp(joy, 1)", "ablate(fear)", "clamp(plane, (1, 2))"],
        ["gate(ablate(joy), on=calm, below=9)", "gate(ablate(fear), on=calm, below=9)", "joy"],
        ["edit(probe)", "joy", "scale(fear)"],
        ["joy", "fear", "calm(keep_norm=True)", "happy"],
    ],
)
def test_the_order_of_writing_never_changes_a_bit(terms: list[str]) -> None:
    rows = some_rows()
    first = compiled(" + ".join(terms))
    for order in itertools.permutations(terms):
        other = compiled(" + ".join(order))
        assert other.response.key == first.response.key
        for layer in (1, 2, 3):
            assert same_bits(steered(other.prompt, rows, layer), steered(first.prompt, rows, layer))


def left_of(vector: Vector, rows: Floats, layer: int) -> float:
    """The greatest part along the vector's span, over the length of the row."""
    q = vector.basis[vector.layers.index(layer)].astype(np.float64)
    wide = rows.astype(np.float64)
    return float((np.linalg.norm(wide @ q.T, axis=1) / np.linalg.norm(wide, axis=1)).max())


def test_of_what_is_ablated_together_nothing_is_left() -> None:
    found = vectors().vectors
    program = compiled("ablate(joy) + ablate(calm) + ablate(plane)")
    assert len(program.prompt.doses) == 1
    rows = some_rows()
    for layer in (1, 2):
        after = steered(program.prompt, rows, layer)
        for name in ("joy", "calm", "plane"):
            assert left_of(found[name], after, layer) < 2e-6
    assert left_of(found["calm"], steered(program.prompt, rows, 3), 3) < 2e-6  # alone there


def test_of_what_is_clamped_together_each_readout_is_reached() -> None:
    """Though the vectors are not orthogonal, and one has a center."""
    found = vectors().vectors
    program = compiled("clamp(joy, 1) + clamp(calm, -2) + clamp(centred, 0.5)")
    assert len(program.prompt.doses) == 1
    for layer in (1, 2):
        after = steered(program.prompt, some_rows(), layer)
        for name, aim in (("joy", 1), ("calm", -2), ("centred", 0.5)):
            np.testing.assert_allclose(reference.readout(after, found[name], layer), aim, atol=3e-6)
    np.testing.assert_allclose(
        reference.readout(steered(program.prompt, some_rows(), 3), found["calm"], 3), -2, atol=3e-6
    )


def test_a_subspace_and_a_vector_are_clamped_together() -> None:
    found = vectors().vectors
    program = compiled("clamp(plane, (1, -1)) + clamp(joy, 2)")
    after = steered(program.prompt, some_rows(), 2)
    coordinates = after.astype(np.float64) @ found["plane"].readouts[1].T.astype(np.float64)
    np.testing.assert_allclose(coordinates, [[1, -1]] * 3, atol=5e-6)
    np.testing.assert_allclose(reference.readout(after, found["joy"], 2), 2, atol=5e-6)


def test_half_of_each_is_half_the_way() -> None:
    found = vectors().vectors
    rows = some_rows()
    after = steered(compiled("clamp(joy, 1)/2 + clamp(calm, 3)/2").prompt, rows, 1)
    for name, aim in (("joy", 1), ("calm", 3)):
        before = reference.readout(rows, found[name], 1)
        np.testing.assert_allclose(reference.readout(after, found[name], 1), (before + aim) / 2, atol=3e-6)


@pytest.mark.parametrize(
    "text",
    [
        "ablate(joy) + 0.5*ablate(fear)",  # as strong as each other
        "ablate(joy) + ablate(fear, start=1)",  # on the same tokens
        "ablate(joy) + gate(ablate(fear), on=calm, above=0)",
        "ablate(joy) + clamp(fear, 0)",  # in the same manner
    ],
)
def test_only_what_acts_alike_is_made_one(text: str) -> None:
    assert len(compiled(text).response.doses) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "ablate(joy) + ablate(happy)",
            "ablate of joy is applied twice .* with a total strength of 2; the maximum",
        ),
        ("ablate(joy) + ablate(joy, when='response')", "ablate of joy is applied twice to the same tokens"),
        (
            "clamp(joy, 1) + clamp(happy, 1)/2",
            "clamp of joy is applied .* total strength of 1.5",
        ),
        ("edit(probe) + edit(probe, when='prompt')", "edit of probe is applied twice"),
    ],
)
def test_no_more_than_all_can_be_taken_away(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        compiled(text)


def test_a_part_may_be_taken_away_by_two_terms() -> None:
    program = compiled("0.5*ablate(joy) + 0.5*ablate(joy, when='response')")
    assert program.prompt.doses[0].coefficient == 0.5
    assert program.response.doses[0].coefficient == 1.0


# Purified vectors and sums.


def test_a_purified_vector_adds_nothing_of_the_others() -> None:
    found = vectors().vectors
    rows = some_rows()
    program = compiled("purify(calm, joy, fear)")
    for layer, others in ((1, ["joy"]), (2, ["joy", "fear"]), (3, ["fear"])):
        moved = (steered(program.prompt, rows, layer) - rows).astype(np.float64)
        for name in others:
            v = found[name].directions[layer].astype(np.float64)
            assert np.abs(moved @ v).max() < 3e-6 * np.linalg.norm(v)
        assert np.abs(moved).max() > 0.1
    assert (
        program.prompt.key
        == compiled(Term(1.0, purified(found["calm"], [found["joy"], found["fear"]]))).prompt.key
    )


def test_where_the_others_have_no_direction_a_purified_vector_is_itself() -> None:
    found = vectors().vectors
    direction = compiled("purify(calm, joy)").prompt.compiled
    assert direction is not None
    assert same_bits(direction.direction(3, "add"), found["calm"].directions[3])
    assert compiled("purify(calm, joy)").layers == (1, 2, 3)
    assert compiled("purify(joy, joy)").layers == ()


def test_an_operator_takes_a_sum_of_vectors() -> None:
    found = vectors().vectors
    total = found["joy"] - 0.5 * found["calm"]
    rows = some_rows()
    for layer in (1, 2, 3):
        after = steered(compiled("ablate(joy - 0.5*calm)").prompt, rows, layer)
        assert left_of(total, after, layer) < 1e-6


def test_the_other_side_of_a_probe_has_the_other_bias() -> None:
    probe = vectors().vectors["probe"]
    rows = some_rows() * 3
    for text, sign in (("edit(probe, margin=2)", 1), ("edit(-probe, margin=2)", -1)):
        for i, layer in enumerate(probe.layers):
            assert probe.bias is not None
            after = steered(compiled(text).prompt, rows, layer)
            logits = sign * (after.astype(np.float64) @ probe.rows[i].astype(np.float64) + probe.bias[i])
            assert (logits > 2 - 1e-5).all()


def test_a_gate_on_a_sum_reads_from_the_middle_of_both() -> None:
    middle = np.random.default_rng(1).standard_normal(N_EMBD) * 9
    registry = vectors()
    for name in ("joy", "calm"):
        vector = registry.vectors[name]
        center = [float(row @ middle / (row @ row)) for row in vector.rows.astype(np.float64)]
        registry.vectors[name] = replace(vector, meta={"center": center})
    program = compiled("gate(fear, on=joy - calm, above=-0.01, below=0.01)", registry)
    rows = np.stack([middle, middle + 1]).astype(np.float32)
    after = steered(program.prompt, rows, 2)
    assert same_bits(after[0], rows[0] + registry.vectors["fear"].directions[2])
    assert same_bits(after[1], rows[1])


# Sites.


def test_places_are_where_it_acts() -> None:
    program = compiled("joy + attended + scale(heads, 2) + neurons(when='response') + force(one)")
    assert program.prompt.places == {
        "residual": (1, 2),
        "attention": (0, 2),
        "heads": (0, 2),
        "experts": (1,),
    }
    assert program.response.places == {**program.prompt.places, "neurons": (1,)}
    assert program.layers == program.response.layers == (0, 1, 2)
    assert NOTHING.prompt.places == {}


@pytest.mark.parametrize(
    ("vector", "error", "message"),
    [
        (
            make_vector("v", n_embd=13, site="heads"),
            ModelMismatch,
            "v does not fit .*13 values for heads of layer 1, the model 12",
        ),
        (
            make_vector("v", n_embd=6, site="neurons"),
            ModelMismatch,
            "6 values for neurons of layer 1, the model 40",
        ),
        (make_vector("v", (1, 5), n_embd=40, site="neurons"), SiteNotFound, "no site 'neurons' in layer 5"),
        (
            make_vector("v", (1,), n_embd=9, site="mlp", fingerprint=None),
            ModelMismatch,
            "v does not fit .*it has 9 values a layer, the model 5",
        ),
        (
            make_vector("v", (6,), site="attention", fingerprint=None),
            ModelMismatch,
            "v does not fit .*it goes up to layer 6, the model to 5",
        ),
        (
            make_vector("v", n_embd=12, site="heads", fingerprint=Fingerprint("gemma3", N_LAYER, N_EMBD)),
            ModelMismatch,
            "made for architecture gemma3, the model has llama",
        ),
    ],
)
def test_a_vector_of_other_places_than_the_models_is_refused(
    vector: Vector, error: type[MienError], message: str
) -> None:
    for term in (Term(1.0, vector), Term(1.0, vector, operator="scale")):
        with pytest.raises(error, match=message):
            compiled(Recipe((term,)))


def test_a_gate_is_looked_at_as_its_term_is() -> None:
    wide = make_vector("wide", n_embd=13, site="heads")
    heads = vectors().vectors["heads"]
    with pytest.raises(ModelMismatch, match=r"wide does not fit .*13 values for heads"):
        compiled(Term(1.0, heads, gates=(Gate(wide, 0.0),)))


def test_without_a_model_only_the_residual_stream_is_known() -> None:
    assert compiled("joy + ablate(fear)", sites=None).layers == (1, 2, 3)
    with pytest.raises(VectorError, match=r"^attended: the site attention is not known without a model$"):
        compiled("attended", sites=None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plane", r"^plane: plane has 2 directions a layer, a subspace; it can be ablated or clamped$"),
        ("plane(keep_norm=True)", r"plane\(keep_norm=True\): plane has 2 directions a layer"),
        ("scale(plane)", r"scale\(plane\): plane has 2 directions a layer"),
        ("edit(plane)", r"edit\(plane\): plane has 2 directions a layer"),
        ("edit(joy)", r"^edit\(joy\): joy is no probe: it has no bias \(mien.bias\), which edit needs$"),
        ("edit(probe*0 + joy)", r"joy is no probe"),
        ("force(joy)", r"^force\(joy\): force can't act at the site of joy, residual$"),
        ("forbid(heads)", r"forbid\(heads\): forbid can't act at the site of heads, heads$"),
        ("ablate(one)", r"^ablate\(one\): ablate can't act at the site of one, experts$"),
        ("clamp(one, 1)", r"clamp\(one, 1.0\): clamp can't act at the site of one, experts$"),
        ("one(keep_norm=True)", r"add_keep_norm can't act at the site of one, experts$"),
        (
            "gate(joy, on=attended, above=1)",
            "a gate reads one direction where its term acts, residual; attended has 1 at attention",
        ),
        (
            "gate(joy, on=plane, above=1)",
            "a gate reads one direction where its term acts, residual; plane has 2 at residual",
        ),
        (
            "ablate(joy + attended)",
            r"1\*joy and 1\*attended are of different sites: residual, attention",
        ),
        ("purify(joy, thought)", "joy and thought are of different sites: residual, mlp"),
    ],
)
def test_a_vector_that_can_not_be_used_so_is_refused(text: str, message: str) -> None:
    with pytest.raises(VectorError, match=message):
        compiled(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clamp(joy, (1, 2))", r"expected a number, or 1, got 2"),
        ("clamp(plane, (1, 2, 3))", r"expected a number, or 2, got 3"),
    ],
)
def test_a_clamp_takes_a_number_or_one_a_direction(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        compiled(text)


def test_a_clamp_of_one_number_is_that_for_each_direction() -> None:
    assert compiled("clamp(plane, 2)").prompt.doses[0].values == (2.0, 2.0)


def test_an_edit_made_by_hand_has_the_usual_margin() -> None:
    term = Term(1.0, vectors().vectors["probe"], operator="edit")
    assert compiled(Recipe((term,))).prompt.doses[0].values == (DEFAULT_MARGIN,)


def test_what_is_not_finite_is_refused() -> None:
    huge = Vector("huge", (1,), np.full((1, N_EMBD), 3e38), MODEL)
    probe = replace(huge, meta={"bias": [0.0]})
    for term in (
        Term(1.0, huge, operator="clamp", value=(1e9,)),
        Term(1.0, huge, operator="clamp", value=(float("nan"),)),
        Term(2.0, huge),
        Term(2.0, huge, operator="scale"),
        Term(1.0, probe, operator="edit", value=(float("inf"),)),
    ):
        with pytest.raises(RecipeError, match="add up to NaN or infinity"):
            compiled(Recipe((term,)))


# Experts.


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("force(one)", (1,)),
        ("force(one) + force(one, when='response')", (1,)),
        ("force(one) + force(two)", (1, 2)),
        ("force(one, when='prompt') + forbid(one, when='response')", (1,)),
        ("forbid(four)", (1,)),
        ("force(one) + forbid(four)", (1,)),
        ("force(two) + forbid(four)", (1, 2)),
    ],
)
def test_experts_within_what_a_router_chooses(text: str, layers: tuple[int, ...]) -> None:
    assert compiled(text).prompt.places == {"experts": layers}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("force(four)", r"layer 1: 2 of 6 experts are chosen for a token; 4 can't be forced and 0 forbidden"),
        ("force(one) + force(two) + force(four)", r"layer 1: 2 of 6 .* can't be forced and 0 forbidden"),
        ("forbid(four) + forbid(one)", r"layer 1: 2 of 6 .*; 0 can't be forced and 5 forbidden"),
        ("forbid(four) + forbid(one, when='response')", r"0 can't be forced and 5 forbidden"),
        ("force(one) + forbid(one)", r"layer 1: experts \[0\] are forced and forbidden"),
    ],
)
def test_experts_beyond_what_a_router_chooses(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        compiled(text)


def test_experts_of_a_model_without_any_are_refused() -> None:
    with pytest.raises(SiteNotFound, match="no site 'experts'"):
        compiled("force(one)", sites=Places(experts=0))


def test_experts_of_each_turn_are_counted_on_their_own() -> None:
    program = compiled("force(two, turn=1) + force(one, turn=2) + forbid(four, turn=2)")
    assert program.at_turn(1).layers == (1, 2)
    assert program.at_turn(2).layers == (1,)


# Gates.


def test_a_gate_without_a_direction_at_a_layer_is_closed_there() -> None:
    program = compiled("gate(calm, on=joy, above=-1e9)")
    assert program.layers == (1, 2)
    doses = program.prompt.doses
    assert [len(doses_at(doses, "residual", layer)) for layer in range(5)] == [0, 1, 1, 0, 0]
    assert doses_at(doses, "mlp", 1) == []
    blank = Vector("blank", (1, 2), np.array([[0.0] * N_EMBD, [1.0] * N_EMBD]), MODEL)
    gated = compiled(Term(1.0, "calm", gates=(Gate(blank, -1e9),)))
    assert gated.layers == (2,)


def test_a_gate_too_short_to_be_read_is_refused() -> None:
    short = Vector("short", (1,), np.full((1, N_EMBD), 1e-45), MODEL)
    with pytest.raises(VectorError, match="short: a direction is too short to be read"):
        compiled(Term(1.0, "joy", gates=(Gate(short, 0.0),)))


def test_more_gates_than_there_is_room_for_at_a_place_are_refused() -> None:
    def text(count: int) -> str:
        return " + ".join(f"gate(joy, on=calm, above={i})" for i in range(count))

    assert compiled(text(32)).layers == (1, 2)
    with pytest.raises(RecipeError, match="too many gates at one place: expected at most 32"):
        compiled(text(33))


@pytest.mark.parametrize("gate", [Gate("fear", 1.0, None, -1.0), Gate("fear", float("nan"))])
def test_a_gate_made_by_hand_must_have_a_meaning(gate: Gate) -> None:
    with pytest.raises(RecipeError, match="NaN or infinity"):
        compiled(Term(1.0, "joy", gates=(gate,)))


def test_a_dose_says_in_one_text_how_it_is_used() -> None:
    make: Callable[..., Dose] = lambda *rest: Dose(1.0, make_vector(), *rest)  # noqa: E731
    assert make().manner == "add"
    assert make("clamp", (1.0, 2.0)).manner == "clamp 1.0 2.0"
    assert make("add", (), Window(1)).manner == "add (1, inf, 0, inf)"
