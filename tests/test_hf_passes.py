"""Forward passes that are interrupted, nested or run again, and recipes that are set at any moment of one."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mien
import pytest
import torch
from hf_models import IDS, N_EMBD, batch, logits, make_model, state
from makers import DictRegistry, make_vector
from mien import SteeringNotApplied
from torch.utils.checkpoint import checkpoint

SITES = {"a": "residual", "b": "residual", "m": "mlp", "t": "attention"}
REGISTRY: Any = DictRegistry(
    *(
        make_vector(name, (1, 2), seed, fingerprint=None, n_embd=N_EMBD, site=site)
        for seed, (name, site) in enumerate(SITES.items())
    )
)
OTHER_IDS = IDS.roll(2, 1)


@pytest.fixture
def model() -> Any:
    return make_model()


def attach(model: Any) -> mien.Steering:
    return mien.attach(model, registry=REGISTRY)


def alone(model: Any) -> Any:
    """What a layer makes of something when it is called on its own."""
    h = torch.linspace(-1, 1, 7 * N_EMBD).reshape(1, 7, N_EMBD)
    with torch.no_grad():
        return model.model.layers[1](h, position_embeddings=model.model.rotary_emb(h, torch.arange(7)[None]))


# ---- a recipe that is set at any moment, as by a signal handler ----


@contextmanager
def interrupted(number: int, handler: Callable[[], None], inside: str) -> Iterator[list[int]]:
    """Call `handler` at one of the moments at which Python runs signal handlers: when a function is called or
    returns. inside: moments count while a function of mien of that name runs. Yields [moments until then]."""
    moments = [0]

    def profile(frame: Any, event: str, argument: Any) -> None:
        above = frame if event != "c_call" else None
        while above is not None and above.f_code.co_name != inside:
            above = above.f_back
        if above is None or "mien" not in above.f_code.co_filename:
            return
        moments[0] += 1
        if moments[0] == number:
            sys.setprofile(None)
            handler()

    sys.setprofile(profile)
    try:
        yield moments
    finally:
        sys.setprofile(None)


def require_one(model: Any, steering: mien.Steering, expected: dict[str, Any]) -> None:
    """What is set is what acts, wherever it acts, and hooks are where it acts and nowhere else."""
    runtime: Any = steering._runtime
    assert torch.equal(logits(model), expected[str(steering.recipe)])
    assert set(runtime._elsewhere) == runtime._set.loaded.elsewhere
    assert runtime.graph.hooked == " ".join(f"{site}:{layer}" for site, layer in sorted(runtime._elsewhere))
    assert runtime.graph.loaded is runtime._set.loaded
    assert runtime._set.loaded.programs == (runtime.setting,)
    assert runtime._under_way == set()


def by_recipe(model: Any, steering: mien.Steering, *recipes: str) -> dict[str, Any]:
    expected = {}
    for recipe in recipes:
        steering.set(recipe)
        expected[str(steering.recipe)] = logits(model)
    return expected


@pytest.mark.parametrize(("first", "second"), [("a", "m"), ("m", "a"), ("", "t")])
def test_a_recipe_set_while_another_is_set_leaves_no_mixture(model: Any, first: str, second: str) -> None:
    with attach(model) as steering:
        expected = by_recipe(model, steering, first, second, "b")
        outer, inner, before = (steering.compile(recipe) for recipe in (first, second, "b"))
        number, moments = 0, [0]
        while moments[0] == number:  # the handler was called
            number += 1
            steering.set(before)
            with interrupted(number, lambda: steering.set(inner), "swap") as moments:
                steering.set(outer)
            assert steering.recipe in (outer.recipe, inner.recipe)
            require_one(model, steering, expected)
        assert number > 10


def test_no_change_of_a_signal_handler_is_lost(model: Any) -> None:
    with attach(model) as steering:
        runtime: Any = steering._runtime
        before, outer, inner = (steering.compile(recipe) for recipe in ("b", "m", "t"))
        number, moments = 0, [0]
        while moments[0] == number:  # the handler was called
            number += 1
            steering.set(before)
            steering.turn = 1
            done = []

            def handler() -> None:
                steering.turn = 2
                done.append(runtime.swap(inner, before))  # noqa: B023  # called in this round

            with interrupted(number, handler, "swap") as moments:
                done.append(runtime.swap(outer, before))
            assert sum(done) == 1  # one of both found what it expected
            assert steering.turn == (2 if len(done) == 2 else 1)
        assert number > 10


@pytest.mark.parametrize(("first", "second"), [("m", "t"), ("t", ""), ("a", "m")])
def test_a_recipe_set_while_a_pass_begins_or_ends(model: Any, first: str, second: str) -> None:
    with attach(model) as steering:
        expected = by_recipe(model, steering, first, second)
        outer, inner = (steering.compile(recipe) for recipe in (first, second))
        either = [*expected.values()]
        for inside in ("begin", "end"):
            number, moments = 0, [0]
            while moments[0] == number:  # the handler was called
                number += 1
                steering.set(outer)
                with interrupted(number, lambda: steering.set(inner), inside) as moments:
                    found = logits(model)
                assert any(torch.equal(found, one) for one in either)
                require_one(model, steering, expected)
            assert number > 5


def test_threads_leave_no_pass_and_no_hook_behind(model: Any) -> None:
    with attach(model) as steering:
        runtime: Any = steering._runtime
        programs = [steering.compile(recipe) for recipe in ("a", "m", "m + t", "")]
        interval, stop = sys.getswitchinterval(), threading.Event()
        failed: list[Exception] = []

        def run() -> None:
            while not stop.is_set():
                try:
                    logits(model)
                except SteeringNotApplied as error:
                    failed.append(error)

        threads = [threading.Thread(target=run) for _ in range(2)]
        sys.setswitchinterval(1e-5)
        try:
            for thread in threads:
                thread.start()
            for i in range(1000):
                steering.set(programs[i % 4])
        finally:
            stop.set()
            for thread in threads:
                thread.join()
            sys.setswitchinterval(interval)
        steering.clear()
        assert failed == []
        assert runtime._under_way == set()
        assert runtime._elsewhere == {}


# ---- interrupted and nested passes ----


def interrupt(model: Any, error: type[BaseException], path: str) -> None:
    """Run a pass that `error` ends in the module at `path`."""

    def stop(*_: Any) -> None:
        raise error

    hook = model.get_submodule(path).register_forward_hook(stop)
    with pytest.raises(error):
        logits(model)
    hook.remove()


@pytest.mark.parametrize("path", ["model.layers.2.self_attn", "model.layers.0", "model.norm", "lm_head"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_interrupted_pass_is_over_once_something_is_set(
    model: Any, error: type[BaseException], path: str
) -> None:
    plain = alone(model)
    with attach(model) as steering:
        idle = state(model)
        steering.set("5*a + m")
        interrupt(model, error, path)
        steering.clear()
        assert torch.equal(alone(model), plain)
        assert state(model) == idle
        assert steering._runtime._under_way == set()  # type: ignore[union-attr]


def test_an_interrupted_pass_is_over_once_another_begins_or_the_model_is_detached(model: Any) -> None:
    plain = alone(model)
    with attach(model) as steering:
        runtime: Any = steering._runtime
        steering.set("5*a + m")
        steered = logits(model), alone(model)
        for _ in range(2):
            interrupt(model, KeyboardInterrupt, "model.layers.2")
        assert torch.equal(logits(model), steered[0])
        assert torch.equal(alone(model), steered[1])
        assert runtime._under_way == set()
        interrupt(model, KeyboardInterrupt, "model.layers.2")
    assert torch.equal(alone(model), plain)
    assert runtime._under_way == set()
    assert runtime.local.run is None


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("inner", ["", "m", "5*a"])
def test_a_pass_inside_of_another_leaves_that_as_it_was(model: Any, inner: str, error: Any) -> None:
    with attach(model) as steering:
        outer = "5*a + t"
        expected = by_recipe(model, steering, inner, outer)
        nested: list[Any] = []

        def another(*_: Any) -> None:
            if not nested:
                nested.append(None)
                steering.set(inner)
                if error is not None:
                    interrupt(model, error, "model.layers.0.mlp")
                nested.append(logits(model))
                assert steering.applied.recipe == steering.recipe

        model.model.layers[1].self_attn.q_proj.register_forward_hook(another)
        assert torch.equal(logits(model), expected[str(mien.parse(outer))])
        assert torch.equal(nested[1], expected[str(mien.parse(inner))])
        require_one(model, steering, expected)


# ---- layers that run again in a backward pass ----

LONG, SHORT = IDS[0].tolist(), [5, 6, 7]
RIGHT, SWAPPED = batch([LONG, SHORT], "right"), batch([SHORT, LONG], "right")
PASSES: dict[str, list[tuple[Any, dict[str, Any]]]] = {
    "one": [("5*t + a", RIGHT)],
    "other padding": [("9*t + a", RIGHT), ("9*t + a", SWAPPED)],
    "other recipes": [("9*t", {"input_ids": IDS}), ("", {"input_ids": OTHER_IDS}), ("m", {"input_ids": IDS})],
    "rows": [(["9*m", "-4*a"], RIGHT), (['3*a(when="prompt")', "5*t + m"], SWAPPED)],
}
LOSSES: dict[str, Callable[[list[Any]], None]] = {
    "sum": lambda outs: sum(out.loss for out in outs).backward(),
    "preference": lambda outs: torch.nn.functional.logsigmoid(
        outs[0].loss - 2 * sum(o.loss for o in outs[1:])
    ).backward(),
    "one by one": lambda outs: [out.loss.backward() for out in outs] and None,
    "a layer's output": lambda outs: sum(out.hidden_states[2].square().sum() for out in outs).backward(),
}


def gradients(passes: list[tuple[Any, Any]], loss: Callable[[list[Any]], None], reentrant: Any = None) -> Any:
    """reentrant: how activations are checkpointed; None if they are not."""
    model = make_model()
    model.train()
    if reentrant is not None:
        named = "activation_checkpointing_enable"  # what transformers 5 calls it
        enable = getattr(model, named, None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    outs = []
    with attach(model) as steering:
        for recipe, inputs in passes:
            steering.set(recipe)
            outs.append(
                model(**inputs, labels=inputs["input_ids"], use_cache=False, output_hidden_states=True)
            )
        steering.clear()
        loss(outs)
        outs.clear()
        steering.clear()
        assert steering._runtime._elsewhere == {}  # type: ignore[union-attr]
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.filterwarnings("ignore:.*use_cache.*")  # transformers says that it turns the cache off
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
def test_a_layer_that_runs_again_acts_as_in_its_own_pass(
    passes: list[tuple[Any, Any]], loss: Callable[[list[Any]], None]
) -> None:
    expected = gradients(passes, loss)
    assert not torch.allclose(expected, gradients([("", inputs) for _, inputs in passes], loss))
    for reentrant in (False, True):
        torch.testing.assert_close(gradients(passes, loss, reentrant), expected)


def whole(model: Any, ids: Any) -> Any:
    """The loss, of a model that runs again as a whole."""
    start = torch.ones((), requires_grad=True)
    return checkpoint(lambda _: model(ids, labels=ids, use_cache=False).loss, start, use_reentrant=False)


def test_a_model_that_runs_again_as_a_whole_acts_as_it_did(model: Any) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    with attach(model) as steering:
        steering.set("5*a + m")
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        expected, weight.grad = weight.grad, None
        loss = whole(model, IDS)
        steering.set("t")
        loss.backward()
    torch.testing.assert_close(weight.grad, expected)


def test_a_pass_of_several_that_can_not_be_told_is_an_error(model: Any) -> None:
    with attach(model) as steering:
        losses = []
        for recipe in ("a", "m"):
            steering.set(recipe)
            losses.append(whole(model, IDS))
        with pytest.raises(SteeringNotApplied):
            sum(losses).backward()
