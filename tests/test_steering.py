"""What holds for every runtime, and the surface of the package.

A new runtime joins with one function in RUNTIMES.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import mien
import numpy as np
import pytest
from makers import DictRegistry, make_vector, same_bits
from mien import reference
from mien.errors import (
    MienError,
    ModelMismatch,
    NameNotFound,
    RecipeError,
    RuntimeNotSupported,
    SiteNotFound,
    VectorError,
)
from mien.program import NOTHING
from mien.recipe import Recipe, Term, parse
from mien.runtimes.fake import NumpyModel, NumpyRuntime
from mien.steering import Applied, Steering
from mien.vector import Floats, Vector

TOKENS = [3, 14, 15, 9, 26, 5]
WINDOWED = 'joy(0.5, when="prompt") - fear(0.25, when="all") + joy(when="response")/2'


class Bench:
    """A model, its steering once attached, and three vectors that fit it (`alien` does not).

    logits: evaluates TOKENS from an empty context. size: of the vectors' floats.
    """

    def __init__(self, model: Any, logits: Callable[[Any], Floats], size: float, path: str = "auto") -> None:
        self.model, self._logits, self._path = model, logits, path
        with mien.attach(model) as steering:
            self.fingerprint = steering.model
        n_layer = self.fingerprint.n_layer
        shapes = {"joy": range(1, n_layer), "fear": range(1, n_layer), "one": [2]}
        found = [
            make_vector(name, list(layers), seed, self.fingerprint) * size
            for seed, (name, layers) in enumerate(shapes.items())
        ]
        self.joy, self.fear, self.one = (replace(v, name=name) for v, name in zip(found, shapes))
        self.alien = make_vector("alien")
        self.registry = DictRegistry(self.joy, self.fear, self.one, self.alien)
        self.plain = self.logits()

    def attach(self) -> Steering:
        return mien.attach(self.model, path=self._path, registry=self.registry)  # type: ignore[arg-type]

    def logits(self) -> Floats:
        return self._logits(self.model)

    def is_plain(self) -> bool:
        return same_bits(self.logits(), self.plain)


def numpy_bench(request: pytest.FixtureRequest, seed: int) -> Bench:
    return Bench(NumpyModel(seed=seed), lambda model: model.forward(TOKENS), size=0.5)


def llama_bench(path: str) -> Callable[[pytest.FixtureRequest, int], Bench]:
    def make(request: pytest.FixtureRequest, seed: int) -> Bench:
        from mien.runtimes.llama_text import load_llama

        def logits(llm: Any) -> Floats:
            llm.reset()
            llm.eval(TOKENS)
            return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).copy()

        llm = load_llama(request.getfixturevalue("model_path"), n_ctx=64, n_threads=1)
        bench = Bench(llm, logits, 0.05, path)
        request.addfinalizer(lambda: bench.model is None or bench.model.close())
        del llm
        return bench

    return make


def hf_bench(request: pytest.FixtureRequest, seed: int) -> Bench:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    @torch.no_grad()
    def logits(model: Any) -> Floats:
        found: Floats = model(torch.tensor([TOKENS])).logits[0].numpy()
        return found

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=24,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return Bench(LlamaForCausalLM(config).eval(), logits, size=0.5)


RUNTIMES = [
    pytest.param(numpy_bench, id="numpy"),
    pytest.param(hf_bench, id="transformers"),
    pytest.param(llama_bench("in-graph"), id="llama-in-graph", marks=pytest.mark.model),
    pytest.param(llama_bench("post-compute"), id="llama-post-compute", marks=pytest.mark.model),
]


@pytest.fixture(params=RUNTIMES)
def new_bench(request: pytest.FixtureRequest) -> Callable[..., Bench]:
    return lambda seed=0: request.param(request, seed)


@pytest.fixture
def bench(new_bench: Callable[..., Bench]) -> Bench:
    return new_bench()


@pytest.fixture
def attached(bench: Bench) -> Iterator[tuple[Bench, Steering]]:
    """The bench and the steering of its model."""
    with bench.attach() as steering:
        yield bench, steering


Attached = tuple[Bench, Steering]


@pytest.fixture(scope="module", params=RUNTIMES)
def shared(request: pytest.FixtureRequest) -> Bench:
    """A bench with vectors of other sites, a probe and a subspace that fit its model, too."""
    bench: Bench = request.param(request, 0)
    size = float(np.abs(bench.one.rows).max())

    def add(name: str, *args: Any, **options: Any) -> None:
        made = make_vector(name, *args, fingerprint=bench.fingerprint, **options)
        bench.registry.vectors[name] = replace(made, rows=made.rows * np.float32(size))

    add("probe", [2], 5, meta={"bias": [0.25]})
    add("centred", [2], 6, meta={"center": [0.5]})
    add("plane", [2], 7, rank=2)
    add("attended", [1, 2], 8, site="attention")
    add("thought", [0, 2], 9, site="mlp")
    return bench


@pytest.fixture
def placed(shared: Bench) -> Iterator[Attached]:
    """As `attached`, on a model that others of these tests attach to, too."""
    with shared.attach() as steering:
        yield shared, steering


# Bit-identical to a model never touched.


def test_attached_cleared_and_detached_are_bit_identical_to_never_attached(attached: Attached) -> None:
    bench, steering = attached
    assert bench.is_plain()
    steering.set("joy - 0.5*fear")
    assert not bench.is_plain()
    steering.clear()
    assert bench.is_plain()
    assert steering.recipe == Recipe()
    steering.set("joy")
    steering.detach()
    assert bench.is_plain()


@pytest.mark.parametrize(
    "nothing",
    [
        None,
        "",
        "joy - joy",
        "0*joy",
        "joy(0)",
        '(joy - joy)(keep_norm=True, when="prompt")',
        {},
        {"joy": 0},
        NOTHING,
    ],
)
def test_a_recipe_that_says_nothing_does_nothing(attached: Attached, nothing: Any) -> None:
    bench, steering = attached
    steering.set("joy")
    steering.set(nothing)
    assert bench.is_plain()
    assert not steering.applied.layers
    assert str(steering.applied) == "nothing was steered"


def test_the_same_recipe_gives_the_same_bits_however_it_is_written(attached: Attached) -> None:
    bench, steering = attached
    steering.set("0.5*joy - 0.25*fear")
    expected = bench.logits()
    for same in ("-fear/4 + joy/2", {"fear": -0.25, "joy": 0.5}, "joy - (fear + 2*joy)/4", WINDOWED):
        steering.set(same)
        assert same_bits(bench.logits(), expected)


def test_equal_programs_have_equal_keys(attached: Attached) -> None:
    bench, steering = attached
    bench.registry.vectors["happy"] = replace(bench.joy, name="happy")
    program = steering.compile("2*joy - fear")
    key = program.prompt.key
    assert program.response is program.prompt
    assert key == steering.compile("-fear + joy + happy").prompt.key
    assert dict(key) == {bench.joy.digest: 2.0, bench.fear.digest: -1.0}
    assert steering.compile("joy - happy").prompt.key == NOTHING.prompt.key
    assert key not in (steering.compile("2*joy").prompt.key, steering.compile("joy - fear").prompt.key)
    steering.set("joy + happy - 2*joy")
    assert bench.is_plain()


def test_a_key_tells_how_a_vector_is_added(attached: Attached) -> None:
    bench, steering = attached
    bench.registry.vectors["happy"] = replace(bench.joy, name="happy")
    texts = ["", "joy", "2*joy", "joy(keep_norm=True)", "joy + joy(keep_norm=True)", "2*joy(keep_norm=True)"]
    assert len({steering.compile(text).prompt.key for text in texts}) == len(texts)
    twice = steering.compile("(joy + happy)(keep_norm=True)")
    assert twice.prompt.key == steering.compile(texts[-1]).prompt.key
    assert hash(twice.prompt.key) == hash(steering.compile(texts[-1]).prompt.key)


@pytest.mark.parametrize(
    ("text", "prompt", "response"),
    [
        ('joy(when="prompt")', "joy", ""),
        ('joy(when="response")', "", "joy"),
        ('joy + fear(2, when="response")', "joy", "joy + 2*fear"),
        ('joy - joy(when="prompt")', "", "joy"),
        ('joy(when="prompt") + joy(when="response")', "joy", "joy"),
        ('joy(when="prompt", keep_norm=True) + joy', "joy + joy(keep_norm=True)", "joy"),
        ('one(when="prompt") - fear(when="response")', "one", "-fear"),
    ],
)
def test_windows_part_a_program(attached: Attached, text: str, prompt: str, response: str) -> None:
    _, steering = attached
    program, of_prompt, of_response = map(steering.compile, (text, prompt, response))
    assert program.prompt.key == of_prompt.prompt.key
    assert program.response.key == of_response.response.key
    assert program.prompt.layers == of_prompt.layers
    assert program.response.layers == of_response.layers
    assert program.layers == tuple(sorted({*of_prompt.layers, *of_response.layers}))
    assert program.recipe == parse(text)


# What a vector does.


def test_nothing_before_the_layer_and_exactly_the_vector_at_it(attached: Attached) -> None:
    bench, steering = attached
    plain = steering.capture(TOKENS, last=len(TOKENS))
    steering.set("one")
    steered = steering.capture(TOKENS, last=len(TOKENS))
    assert steered.shape == (bench.fingerprint.n_layer, len(TOKENS), bench.fingerprint.n_embd)
    assert same_bits(steered[:2], plain[:2])
    assert same_bits(steered[2], plain[2] + bench.one.directions[2])
    for layer in range(3, bench.fingerprint.n_layer):
        assert not same_bits(steered[layer], plain[layer])


@pytest.mark.parametrize("coefficient", [1.0, -3.0, 1e3])
def test_a_kept_norm_is_the_reference_and_the_row_as_long_as_it_was(
    attached: Attached, coefficient: float
) -> None:
    bench, steering = attached
    plain = steering.capture(TOKENS, [1, 2, 3], len(TOKENS))
    steering.set(f"{coefficient}*one(keep_norm=True)")
    steered = steering.capture(TOKENS, [1, 2, 3], len(TOKENS))
    direction = reference.combine([(coefficient, bench.one)], 2)
    assert same_bits(steered[0], plain[0])
    np.testing.assert_allclose(steered[1], reference.add_keep_norm(plain[1], direction), rtol=1e-6)
    np.testing.assert_allclose(
        np.linalg.norm(steered[1].astype(np.float64), axis=1),
        np.linalg.norm(plain[1].astype(np.float64), axis=1),
        rtol=1e-6,
    )
    assert not np.allclose(steered[1], plain[1], rtol=1e-3)
    assert not same_bits(steered[2], plain[2])
    moved = np.linalg.norm((steered - plain)[1].astype(np.float64), axis=1)
    applied = steering.applied
    assert list(applied.layers) == [2]
    assert applied.layers[2].rows == len(TOKENS)
    assert applied.layers[2].shift == pytest.approx(float(np.sqrt((moved**2).mean())), rel=1e-5)


def test_at_one_layer_what_is_added_comes_before_what_keeps_the_norm(attached: Attached) -> None:
    bench, steering = attached
    plain = steering.capture(TOKENS, [2], len(TOKENS))[0]
    added = reference.add(plain, bench.one.directions[2])
    expected = reference.add_keep_norm(added, reference.combine([(-3.0, bench.one)], 2))
    for text in ("one - 3*one(keep_norm=True)", "-3*one(keep_norm=True) + one"):
        steering.set(text)
        steered = steering.capture(TOKENS, [2], len(TOKENS))[0]
        np.testing.assert_allclose(steered, expected, rtol=1e-6)
        moved = np.linalg.norm((steered - plain).astype(np.float64), axis=1)
        shift = steering.applied.layers[2].shift  # of both together
        assert shift == pytest.approx(float(np.sqrt((moved**2).mean())), rel=1e-5)


def alike(found: Floats, expected: Floats, plain: Floats) -> None:
    """To what float32 sums of products leave: see SLACK in test_operators."""
    size = float(np.linalg.norm(plain.astype(np.float64), axis=-1).max())
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-5 * size)


@pytest.mark.parametrize(
    "text",
    [
        "ablate(one)",
        "0.5*ablate(one)",
        "ablate(plane)",
        "clamp(one, 1)",
        "clamp(centred, -2)",
        "clamp(plane, (1, -1))",
        "clamp(one, 1) + clamp(centred, 2)",
        "edit(probe, margin=1)",
        "edit(-probe)",
        "scale(one, 0.25)",
        "one + ablate(plane) - 2*one(keep_norm=True)",
        "gate(one, on=centred, above={middle})",
        "gate(one, on=centred, below={middle}) + ablate(plane)",
        "purify(one, centred)",
    ],
)
def test_an_operator_is_the_reference_at_its_layer(placed: Attached, text: str) -> None:
    bench, steering = placed
    plain = steering.capture(TOKENS, [1, 2, 3], len(TOKENS))
    readouts = reference.readout(plain[1], bench.registry.vectors["centred"], 2)
    text = text.format(middle=(np.sort(readouts)[2] + np.sort(readouts)[3]) / 2)
    steering.set(text)
    steered = steering.capture(TOKENS, [1, 2, 3], len(TOKENS))
    doses = steering.compile(text).prompt.doses
    expected = reference.apply(doses, "residual", 2, plain[1])
    assert same_bits(steered[0], plain[0])
    alike(steered[1], expected, plain[1])
    assert not np.allclose(steered[1], plain[1], rtol=1e-4)
    moved = np.linalg.norm((steered - plain)[1].astype(np.float64), axis=1)
    done = steering.applied.layers[2]
    assert done.rows == (moved > 0).sum()
    assert done.shift == pytest.approx(float(np.sqrt((moved**2).sum() / done.rows)), rel=1e-4)


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("thought", {"mlp": [0, 2]}),
        ("attended", {"attention": [1, 2]}),
        ("ablate(thought)", {"mlp": [0, 2]}),
        ("joy + attended - scale(thought)", {"residual": None, "attention": [1, 2], "mlp": [0, 2]}),
    ],
)
def test_a_site_is_steered_where_it_is(
    placed: Attached, text: str, places: dict[str, list[int] | None]
) -> None:
    bench, steering = placed
    steering.set(text)
    assert not bench.is_plain()
    expected = {site: layers or list(bench.joy.layers) for site, layers in places.items()}
    assert {site: list(done) for site, done in steering.applied.places.items()} == expected
    assert steering.compile(text).layers == tuple(sorted({n for layers in expected.values() for n in layers}))
    steering.clear()
    assert bench.is_plain()


def test_what_is_added_to_the_mlp_is_added_to_the_stream(placed: Attached) -> None:
    bench, steering = placed
    plain = steering.capture(TOKENS, [0, 1], len(TOKENS))
    thought = bench.registry.vectors["thought"]
    steering.set("thought")
    steered = steering.capture(TOKENS, [0, 1], len(TOKENS))
    alike(steered[0], plain[0] + thought.directions[0], plain[0])
    assert not np.allclose(steered[1], plain[1], rtol=1e-3)


@pytest.mark.parametrize(
    "text",
    ["joy(stop=9)", "ablate(one, start=1)", "thought(decay=4)", "clamp(one, 1, ramp=3)", "joy(turn=2)"],
)
def test_what_counts_tokens_of_a_reply_leaves_a_prompt_alone(placed: Attached, text: str) -> None:
    bench, steering = placed
    steering.set(text)
    assert bench.is_plain()
    assert not steering.applied.places


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("edit(one)", VectorError, "one is no probe: it has no bias"),
        ("plane", VectorError, "plane has 2 directions a layer, a subspace"),
        ("force(one)", VectorError, "force can't act at the site of one, residual"),
        (
            "gate(one, on=thought, above=1)",
            VectorError,
            "a gate reads one direction where its term acts, residual",
        ),
        ("clamp(one, (1, 2))", RecipeError, "expected a number, or 1, got 2"),
        ("3*ablate(one)", RecipeError, "ablate takes a strength from 0 to 1, got 3"),
    ],
)
def test_an_operator_that_is_refused_leaves_the_steering_as_it_was(
    placed: Attached, text: str, error: type[MienError], message: str
) -> None:
    bench, steering = placed
    steering.set("0.5*joy")
    before = bench.logits()
    with pytest.raises(error, match=message):
        steering.set(text)
    assert steering.recipe == parse("0.5*joy")
    assert same_bits(bench.logits(), before)


def test_a_site_that_the_model_does_not_have_is_refused() -> None:
    with mien.attach(NumpyModel()) as steering:
        heads = mien.of_heads("heads", {(1, 0): 1.0}, 2, 4)
        for recipe in (heads, Recipe((Term(-1.0, heads, operator="scale"),))):
            with pytest.raises(
                SiteNotFound, match=r"^no site 'heads' in layer 1: the NumPy model has no heads"
            ):
                steering.set(recipe)


# Watching.


def test_a_watch_reads_each_token_before_and_after(placed: Attached) -> None:
    bench, steering = placed
    steering.set("joy + 0.5*ablate(one)")
    rows = steering.capture(TOKENS, last=len(TOKENS))
    heard: list[Any] = []
    with steering.watch("joy", "one", "centred", on_token=heard.append) as watch:
        steering.capture(TOKENS)
    assert len(watch) == len(heard) == len(TOKENS)
    assert watch.names == ("joy", "one", "centred")
    assert watch.layers == bench.joy.layers
    for name in watch.names:
        vector = bench.registry.vectors[name]
        found = watch.by_layer(name, prompt=True)
        assert found.shape == (len(TOKENS), len(watch.layers))
        weights = np.zeros(found.shape)
        for column, layer in enumerate(watch.layers):
            if layer not in vector.layers:
                assert np.isnan(found[:, column]).all()
                continue
            known = ~np.isnan(found[:, column])
            # Llama.cpp computes the last block of those tokens alone whose logits were asked for.
            assert known.all() or (layer == bench.fingerprint.n_layer - 1 and known[-1])
            expected = reference.readout(rows[layer], vector, layer)[known]
            atol = 1e-4 * (np.abs(expected).max() + 1)
            np.testing.assert_allclose(found[known, column], expected, rtol=1e-4, atol=atol)
            weights[known, column] = np.square(vector.directions[layer], dtype=np.float64).sum()
        # Over all layers it is the readout of them together.
        over_all = (np.nan_to_num(found) * weights).sum(axis=1) / weights.sum(axis=1)
        np.testing.assert_allclose(watch.series(name, prompt=True), over_all, rtol=1e-5)
        assert [token.after[name] for token in heard] == pytest.approx(
            watch.series(name, prompt=True).tolist()
        )
    assert watch.last == heard[-1]
    assert {token.reply for token in heard} == {-1}
    assert watch.series("joy").shape == (0,)  # there was no reply


def test_before_is_what_was_there_and_after_what_was_made_of_it(placed: Attached) -> None:
    bench, steering = placed
    steering.set("clamp(centred, 3)")
    with steering.watch("centred") as watch:
        bench.logits()
    np.testing.assert_allclose(watch.series("centred", prompt=True), 3, atol=1e-4)
    steering.clear()
    with steering.watch("centred") as plain:
        bench.logits()
    before = plain.series("centred", after=False, prompt=True)
    np.testing.assert_allclose(watch.series("centred", after=False, prompt=True), before, rtol=1e-5)
    np.testing.assert_array_equal(plain.series("centred", prompt=True), before)
    assert not np.allclose(before, 3)


def test_watching_changes_nothing(placed: Attached) -> None:
    bench, steering = placed
    with steering.watch("joy"):
        assert bench.is_plain()
        steering.set("joy")
        steered = bench.logits()
    assert same_bits(bench.logits(), steered)


def test_a_watch_ends_when_it_is_stopped_or_another_begins(placed: Attached) -> None:
    bench, steering = placed
    first = steering.watch("joy")
    bench.logits()
    second = steering.watch("one")
    bench.logits()
    assert (len(first), len(second)) == (len(TOKENS), len(TOKENS))
    second.stop()
    second.stop()
    bench.logits()
    assert len(second) == len(TOKENS)
    second.clear()
    assert len(second) == 0
    with pytest.raises(IndexError):
        _ = second.last


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ((), VectorError, "watch: name at least one vector"),
        (("joy", "jooy"), NameNotFound, "no vector named 'jooy'. Did you mean joy"),
        (("alien",), ModelMismatch, "alien does not fit"),
        (("thought",), VectorError, "thought: one direction a layer of the residual stream can be watched"),
        (("joy", "plane"), VectorError, "plane: one direction a layer of the residual stream can be watched"),
    ],
)
def test_what_can_not_be_watched_is_refused(
    placed: Attached, names: tuple[str, ...], error: type[MienError], message: str
) -> None:
    bench, steering = placed
    with steering.watch("joy") as watch:
        with pytest.raises(error, match=message):
            steering.watch(*names)
        bench.logits()
        assert len(watch) == len(TOKENS)  # the one before goes on
    with pytest.raises(NameNotFound, match="no watched vector named 'fear'"):
        watch.series("fear")


def test_a_window_on_the_response_leaves_a_prompt_alone(attached: Attached) -> None:
    bench, steering = attached
    plain = steering.capture(TOKENS, last=len(TOKENS))
    steering.set('joy(when="response") - fear(keep_norm=True, when="response")')
    assert bench.is_plain()
    assert same_bits(steering.capture(TOKENS, last=len(TOKENS)), plain)
    assert not steering.applied.layers
    steering.set("fear")
    expected = bench.logits()
    steering.set('fear + joy(when="response")')
    assert same_bits(bench.logits(), expected)


def test_a_window_on_the_prompt_is_no_window_on_a_prompt(attached: Attached) -> None:
    bench, steering = attached
    for text in ("joy - 0.5*fear", "(joy - 0.5*fear)(keep_norm=True)"):
        steering.set(text)
        expected = bench.logits()
        rows = steering.capture(TOKENS, last=len(TOKENS))
        steering.set(f'({text})(when="prompt")')
        assert same_bits(bench.logits(), expected)
        assert same_bits(steering.capture(TOKENS, last=len(TOKENS)), rows)
        assert list(steering.applied.layers) == list(bench.joy.layers)
        assert not bench.is_plain()


def test_capture_takes_the_last_tokens_of_the_layers_asked_for(attached: Attached) -> None:
    _, steering = attached
    steering.set("joy")
    everything = steering.capture(TOKENS, last=len(TOKENS))
    assert same_bits(steering.capture(TOKENS, [2, 0], 3), everything[[2, 0], -3:])
    assert same_bits(steering.capture(TOKENS, [1]), everything[[1], -1:])


def test_what_is_said_to_be_applied_is_what_a_capture_sees(attached: Attached) -> None:
    bench, steering = attached
    plain = steering.capture(TOKENS, [2], len(TOKENS))
    steering.set("-0.5*one")
    steered = steering.capture(TOKENS, [2], len(TOKENS))
    moved = np.linalg.norm((steered.astype(np.float64) - plain)[0], axis=1)
    applied = steering.applied
    assert applied.recipe == parse("-0.5*one")
    assert list(applied.layers) == [2]
    assert applied.layers[2].rows == len(TOKENS)
    assert applied.layers[2].shift == pytest.approx(float(np.sqrt((moved**2).mean())), rel=4e-6)
    assert applied.layers[2].path == steering.describe()["path"]
    steering.set("joy")
    bench.logits()
    assert list(steering.applied.layers) == list(bench.joy.layers)


def test_applied_reads_as_a_table() -> None:
    assert str(Applied(Recipe(), {})) == "nothing was steered"
    with mien.attach(NumpyModel()) as steering:
        steering.set(Vector("joy", (1,), np.full((1, 8), 2, dtype=np.float32)))
        steering.capture(TOKENS)
        assert str(steering.applied) == "joy at 1 layers\n    1      6 rows  shift 5.657  numpy"


def test_two_models_do_not_see_each_other(new_bench: Callable[..., Bench]) -> None:
    one, two = new_bench(0), new_bench(1)
    with one.attach() as a, two.attach() as b:
        a.set("joy")
        alone = one.logits()
        assert two.is_plain()
        b.set("fear")
        assert same_bits(one.logits(), alone)
        a.detach()
        assert one.is_plain()
        assert not two.is_plain()


# Setting.


def test_every_form_of_a_recipe_is_taken(attached: Attached) -> None:
    bench, steering = attached
    steering.set("joy")
    expected = bench.logits()
    program = steering.compile("joy")
    assert steering.recipe == parse("joy")
    for form in (bench.joy, {"joy": 1}, parse("joy"), program):
        steering.clear()
        steering.set(form)
        assert same_bits(bench.logits(), expected)
        assert str(steering.recipe) == "joy"


def test_compiling_sets_nothing(attached: Attached) -> None:
    bench, steering = attached
    program = steering.compile("2*joy - fear")
    assert program.layers == bench.joy.layers
    assert bench.is_plain()
    assert steering.recipe == Recipe()


def test_a_name_is_looked_up_once_and_for_this_model(attached: Attached) -> None:
    bench, steering = attached
    steering.set("joy")
    steering.set("fear + 2*joy")
    assert bench.registry.asked == [("joy", bench.fingerprint), ("fear", bench.fingerprint)]


def huge(bench: Bench) -> Vector:
    return Vector(
        "huge", (1,), np.full((1, bench.fingerprint.n_embd), 3e38, dtype=np.float32), bench.fingerprint
    )


def foreign_program(_: Bench, when: str = "all") -> Any:
    wide = Vector("wide", (1,), np.ones((1, 16), dtype=np.float32))
    with mien.attach(NumpyModel(n_layer=3, n_embd=16)) as other:
        return other.compile(Recipe((Term(1.0, wide, when),)))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda _: "joy +", RecipeError, r"^recipe: the recipe ends"),
        (lambda _: "joyy", NameNotFound, r"^no vector named 'joyy'. Did you mean joy"),
        (lambda _: "joy + alien", ModelMismatch, r"^alien does not fit .*made for layers 6, the model has"),
        (lambda bench: bench.alien, ModelMismatch, r"^alien does not fit .*made for n_embd 5, the model has"),
        (foreign_program, ModelMismatch, r"^wide does not fit .*it has 16 values a layer, the model \d+"),
        (lambda _: 'joy - alien(when="response")', ModelMismatch, r"^alien does not fit "),
        (lambda _: foreign_program(_, "prompt"), ModelMismatch, r"^wide does not fit "),
        (lambda _: foreign_program(_, "response"), ModelMismatch, r"^wide does not fit "),
        (lambda bench: Recipe((Term(1.5, huge(bench)),)), RecipeError, "add up to NaN or infinity"),
        (lambda bench: Recipe((Term(1.5, huge(bench), "prompt"),)), RecipeError, "add up to NaN or infinity"),
        (lambda bench: Recipe((Term(-1.5, huge(bench), "response"),)), RecipeError, "add up to NaN or inf"),
        (lambda bench: Recipe((Term(1.5, huge(bench), "all", True),)), RecipeError, "add up to NaN or inf"),
        (lambda _: 'joy(when="later")', RecipeError, "^recipe: when: expected one of 'all', 'prompt', 'resp"),
        (lambda _: {"joy": float("nan")}, RecipeError, "expected a finite number, got nan"),
        (lambda _: 0.5, RecipeError, "expected text, a Vector or"),
    ],
)
def test_what_is_refused_leaves_the_steering_as_it_was(
    attached: Attached, wrong: Callable[[Bench], Any], error: type[MienError], message: str
) -> None:
    bench, steering = attached
    steering.set("0.5*joy")
    before = bench.logits()
    with pytest.raises(error, match=message):
        steering.set(wrong(bench))
    assert steering.recipe == parse("0.5*joy")
    assert same_bits(bench.logits(), before)
    with pytest.raises(error, match=message), steering(wrong(bench)):
        pytest.fail("the block must not be entered")
    assert same_bits(bench.logits(), before)


def test_a_swap_that_fails_leaves_the_recipe_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeNotSupported("this model is closed")

    with mien.attach(NumpyModel()) as steering:
        monkeypatch.setattr(NumpyRuntime, "swap", fail)
        with pytest.raises(RuntimeNotSupported, match="closed"):
            steering.set(Vector("joy", (1,), np.ones((1, 8), dtype=np.float32)))
        assert steering.recipe == Recipe()


# Scopes.


def test_a_scope_gives_back_what_was_set_before(attached: Attached) -> None:
    bench, steering = attached
    steering.set("joy")
    joy = bench.logits()
    with steering("fear") as inner:
        assert inner is steering
        fear = bench.logits()
        with steering(None):
            assert bench.is_plain()
        with steering("one"):
            steering.set("joy - one")
        assert same_bits(bench.logits(), fear)
    assert str(steering.recipe) == "joy"
    assert same_bits(bench.logits(), joy)
    assert not same_bits(joy, fear)


def test_scopes_that_overlap_leave_nothing_set(attached: Attached) -> None:
    """As those of tasks do, which wait in the middle of theirs: first in is first out."""
    bench, steering = attached
    steering.set("one")
    before = bench.logits()

    async def hold(recipe: str, entered: asyncio.Event, leave: asyncio.Event) -> None:
        with steering(recipe):
            entered.set()
            await leave.wait()

    async def overlap() -> list[str]:
        events = {name: (asyncio.Event(), asyncio.Event()) for name in ("joy", "fear", "joy - fear")}
        seen, tasks = [], {}
        for name, (entered, leave) in events.items():
            tasks[name] = asyncio.create_task(hold(name, entered, leave))
            await entered.wait()
            seen.append(str(steering.recipe))
        for name in ("fear", "joy", "joy - fear"):
            events[name][1].set()
            await tasks[name]
            seen.append(str(steering.recipe))
        return seen

    assert asyncio.run(overlap()) == ["joy", "fear", "joy - fear", "joy - fear", "joy - fear", "one"]
    assert same_bits(bench.logits(), before)


def test_a_scope_left_first_takes_its_own_recipe_away(attached: Attached) -> None:
    bench, steering = attached
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(steering("joy"))
        second.enter_context(steering("fear"))
        steering.set("one")  # of the scope entered last
        first.close()
        assert str(steering.recipe) == "one"
        second.close()
        assert steering.recipe == Recipe()
    assert bench.is_plain()


def test_a_scope_ends_with_an_exception_too(attached: Attached) -> None:
    bench, steering = attached
    with pytest.raises(ZeroDivisionError), steering("joy"), steering("fear"):
        raise ZeroDivisionError
    assert steering.recipe == Recipe()
    assert bench.is_plain()


def test_detaching_inside_a_scope_is_final(attached: Attached) -> None:
    bench, steering = attached
    with steering("joy"):
        steering.detach()
    assert bench.is_plain()
    assert repr(steering) == "<Steering: detached>"


# Attaching and detaching.


def test_detaching_twice_does_nothing_more(attached: Attached) -> None:
    bench, steering = attached
    steering.detach()
    with bench.attach() as second:
        second.set("joy")
        steered = bench.logits()
        steering.detach()
        assert same_bits(bench.logits(), steered)
    assert bench.is_plain()


@pytest.mark.parametrize(
    "use",
    [
        lambda steering: steering.set("joy"),
        lambda steering: steering.set(NOTHING),
        lambda steering: steering.clear(),
        lambda steering: steering.compile("joy"),
        lambda steering: steering("joy").__enter__(),
        lambda steering: steering.capture(TOKENS),
        lambda steering: steering.watch("joy"),
        lambda steering: steering.applied,
        lambda steering: steering.model,
        lambda steering: steering.describe(),
    ],
)
def test_a_detached_steering_says_so(use: Callable[[Steering], Any]) -> None:
    steering = mien.attach(NumpyModel())
    steering.set(Vector("joy", (1,), np.ones((1, 8), dtype=np.float32)))
    steering.detach()
    with pytest.raises(RuntimeNotSupported) as caught:
        use(steering)
    assert str(caught.value) == "this steering is detached; call mien.attach(model) again"
    assert steering.recipe == Recipe()


def test_attaching_twice_is_attaching_once(attached: Attached) -> None:
    bench, steering = attached
    steering.set("joy")
    steered = bench.logits()
    assert bench.attach() is steering
    assert str(steering.recipe) == "joy"
    assert same_bits(bench.logits(), steered)
    with pytest.raises(RuntimeNotSupported, match=r"another registry.* mien.detach\(model\)"):
        mien.attach(bench.model, path=bench._path)
    assert same_bits(bench.logits(), steered)


def test_a_handle_that_was_dropped_can_be_had_again(shared: Bench) -> None:
    assert mien.steering_of(shared.model) is None
    shared.attach().set("joy")
    gc.collect()
    found = mien.steering_of(shared.model)
    assert found is not None
    assert str(found.recipe) == "joy"
    mien.detach(shared.model)
    assert mien.steering_of(shared.model) is None
    assert shared.is_plain()
    mien.detach(shared.model)  # there is nothing to do


def test_what_is_no_model_has_no_steering() -> None:
    for thing in (None, "joy", 5.0, object()):
        assert mien.steering_of(thing) is None


def test_a_model_can_be_attached_again(bench: Bench) -> None:
    for _ in range(2):
        with bench.attach() as steering:
            assert bench.is_plain()
            steering.set("joy")
            assert not bench.is_plain()
        assert bench.is_plain()


def test_a_detached_steering_does_not_keep_the_model(attached: Attached) -> None:
    bench, steering = attached
    steering.set("joy")
    bench.logits()
    model = weakref.ref(bench.model)
    steering.detach()
    bench.model = None
    gc.collect()
    assert model() is None


def test_a_steering_says_what_it_steers(attached: Attached) -> None:
    bench, steering = attached
    assert steering.model == bench.fingerprint
    assert repr(steering) == f"<Steering of {bench.fingerprint}: nothing set>"
    steering.set("2*joy")
    assert repr(steering) == f"<Steering of {bench.fingerprint}: 2.0*joy>"
    assert {"runtime", "path"} <= steering.describe().keys()


@pytest.mark.parametrize(
    ("layers", "last", "message"),
    [
        (None, 0, f"last: expected 1 to {len(TOKENS)}, got 0"),
        (None, len(TOKENS) + 1, f"last: expected 1 to {len(TOKENS)}, got {len(TOKENS) + 1}"),
        ([0, -1], 1, "layers: the model has 0 to 3, got [-1]"),
        ([4, 1, 9], 1, "layers: the model has 0 to 3, got [4, 9]"),
    ],
)
def test_a_capture_of_what_there_is_not_is_refused(layers: list[int] | None, last: int, message: str) -> None:
    with mien.attach(NumpyModel()) as steering, pytest.raises(ValueError) as caught:
        steering.capture(TOKENS, layers, last)
    assert str(caught.value) == message


@pytest.mark.parametrize("model", [None, object(), "model.gguf", NumpyModel])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(
        RuntimeNotSupported, match=r"^expected a llama_cpp.Llama or a transformers model, got builtins\.\w+$"
    ):
        mien.attach(model)


def test_an_unknown_path_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^path: expected auto, in-graph or post-compute, got 'fast'$"):
        mien.attach(NumpyModel(), path="fast")


# The surface of the package.


def test_all_is_the_surface() -> None:
    assert len(mien.__all__) == len(set(mien.__all__))
    for name in mien.__all__:
        assert getattr(mien, name) is not None
    assert dir(mien) == sorted(mien.__all__)
    with pytest.raises(AttributeError, match="module 'mien' has no attribute 'nothing_like_it'"):
        _ = mien.nothing_like_it


def test_every_error_for_a_user_is_public() -> None:
    from mien import errors

    kinds = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, MienError)
    }
    assert kinds <= set(mien.__all__)


def test_importing_mien_loads_nothing_heavy() -> None:
    code = "import sys, mien; print(sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in ast.literal_eval(result.stdout)}
    assert "mien" in loaded
    assert not loaded & {"torch", "llama_cpp", "numpy", "gguf", "click", "cffi", "_cffi_backend"}
