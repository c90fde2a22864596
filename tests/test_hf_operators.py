"""Operators, sites, windows and gates in transformers, against the formulas in NumPy."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import mien
import numpy as np
import pytest
import torch
from hf_models import (
    IDS,
    N_EMBD,
    N_VOCAB,
    PAD,
    batch,
    cache_argument,
    logits,
    reply,
    state,
)
from hf_models import SIZES as ANY_SIZES
from hf_models import make_model as make_any_model
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from makers import DictRegistry, floats, make_vector
from mien import reference
from mien.errors import RuntimeNotSupported, SiteNotFound, SteeringNotApplied, VectorError
from mien.fingerprint import Fingerprint
from mien.program import Dose, Program, compile_recipe
from mien.recipe import Gate, Recipe, Term
from mien.runtimes.hf_pass import Pass
from mien.runtimes.hf_program import Loaded
from mien.runtimes.hf_rows import Rows
from mien.steering import Steering
from mien.vector import Floats, Vector
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

N_LAYER, N_FF, N_EXPERT = 2, 48, 4  # a block that nothing can be added to, and one more
SIZES = {**ANY_SIZES, "num_hidden_layers": N_LAYER}
WIDTHS = {
    "residual": N_EMBD,
    "attention": N_EMBD,
    "mlp": N_EMBD,
    "heads": N_EMBD,
    "neurons": N_FF,
    "experts": N_EXPERT,
}
LAYER = 1


def make_model(seed: int = 0, **changes: Any) -> Any:
    return make_any_model(seed, **{"num_hidden_layers": N_LAYER, **changes})


def make_mixture(family: str = "mixtral", **changes: Any) -> Any:
    torch.manual_seed(0)
    experts = {"num_local_experts": N_EXPERT, "num_experts": N_EXPERT, "num_experts_per_tok": 2}
    sizes = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "head_dim": 8}
    special = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None}
    config = AutoConfig.for_model(family, **{**SIZES, **experts, **sizes, **special, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def of(site: str, name: str = "v", seed: int = 0, scale: float = 1.0, **options: Any) -> Vector:
    vector = make_vector(name, [LAYER], seed, None, WIDTHS[site], site=site, **options)
    rows = np.float32(scale) * vector.rows
    return Vector(name, vector.layers, rows, meta=vector.meta, site=site)


def marked(*experts: int, layers: Sequence[int] = (LAYER,)) -> Vector:
    rows = np.zeros((len(layers), N_EXPERT), dtype=np.float32)
    rows[:, experts] = 1
    return Vector("marked", tuple(layers), rows, site="experts")


def tensor_of(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def keep_input(seen: list[Any], module: nn.Module, args: Any) -> None:
    seen.append(args[0].detach().clone())


def keep_output(seen: list[Any], module: nn.Module, args: Any, output: Any) -> None:
    seen.append(tensor_of(output).detach().clone())


@contextmanager
def fed(steering: Steering, site: str, activations: Sequence[Any], layer: int = LAYER) -> Iterator[list[Any]]:
    """In forward passes the activations there are these, one a pass; what became of them is appended.

    The hooks go before and after mien's, as it has them when this begins.
    """
    spot = steering._runtime._sites.spot(site, layer)  # type: ignore[union-attr]
    left: list[Any] = list(activations)
    seen: list[Any] = []

    def put(output: Any) -> Any:
        h = left.pop(0)
        h = h.reshape(tensor_of(output).shape) if site == "experts" else h
        return (h, *output[1:]) if isinstance(output, tuple) else h

    if spot.inward:
        handles = [
            spot.module.register_forward_pre_hook(lambda module, args: put(args), prepend=True),
            spot.module.register_forward_pre_hook(partial(keep_input, seen)),
        ]
    else:
        handles = [
            spot.module.register_forward_hook(lambda module, args, output: put(output), prepend=True),
            spot.module.register_forward_hook(partial(keep_output, seen)),
        ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def once(steering: Steering, site: str, h: Any, **options: Any) -> Any:
    """What becomes of activations (batch, tokens, width) in a pass over that many tokens."""
    model = steering._runtime._model  # type: ignore[union-attr]
    ids = options.pop("input_ids", torch.ones(h.shape[:2], dtype=torch.long))
    with fed(steering, site, [h]) as seen:
        model(input_ids=ids, use_cache=False, **options)
    return seen[0].reshape(h.shape)


def doses_of(steering: Steering, recipe: Any) -> tuple[Dose, ...]:
    return steering.compile(recipe).response.doses


# ---- every operator at every site ----

PLACES = {
    "ablate": {"operator": "ablate"},
    "half of it": {"operator": "ablate", "coefficient": 0.5},
    "a subspace": {"operator": "ablate", "rank": 3},
    "clamp": {"operator": "clamp", "value": (0.7,)},
    "edit": {"operator": "edit", "value": (1.5,), "meta": {"bias": [0.25]}},
    "scale": {"operator": "scale", "coefficient": -0.8},
    "add": {"coefficient": 0.6},
    "add, norm kept": {"keep_norm": True},
}
EXPERTS = {
    "forbid": {"operator": "forbid", "marks": (1,)},
    "force": {"operator": "force", "marks": (2,)},
    "scale": PLACES["scale"],
    "add": PLACES["add"],
}
CASES = [(site, case) for site in WIDTHS for case in (EXPERTS if site == "experts" else PLACES)]
# path: dtype, whether under autograd, and how near it has to come
PATHS = {
    "engine": (torch.float32, False, 1e-5),
    "autograd": (torch.float32, True, 1e-5),
    "float64": (torch.float64, False, 1e-6),
    "bfloat16": (torch.bfloat16, False, 2e-2),
}


class TinySites:
    """A model's sites for compile_recipe."""

    experts_used = 2

    def width(self, site: str, layer: int) -> int:
        return WIDTHS[site]


def compiled(recipe: Recipe) -> Program:
    return compile_recipe(recipe, Fingerprint("llama", N_LAYER, N_EMBD), DictRegistry().find, TinySites())


def term(site: str, case: str, scale: float) -> Term:
    options: dict[str, Any] = dict((EXPERTS if site == "experts" else PLACES)[case])
    made = {key: options.pop(key) for key in ("rank", "meta") if key in options}
    vector = marked(*options.pop("marks")) if "marks" in options else of(site, scale=scale, **made)
    return Term(**{"coefficient": 1.0, "vector": vector, **options})


@st.composite
def activations(draw: st.DrawFn, width: int) -> Floats:
    """(batch, tokens, width): zero rows, very long and very short ones among them."""
    shape = draw(st.sampled_from([(1, 1), (1, 3), (2, 2)]))
    rows = np.random.default_rng(draw(st.integers(0, 99))).standard_normal((*shape, width))
    sizes = draw(arrays(np.float64, shape, elements=st.sampled_from([0.0, 1e-40, 1e-3, 1.0, 1e20])))
    made = (rows * sizes[..., None]).astype(np.float32)
    if draw(st.booleans()):
        made[0, 0] = draw(arrays(np.float32, width, elements=floats(2.0**66)))
    return made


@pytest.mark.parametrize(("site", "case"), CASES)
@settings(deadline=None, max_examples=20)
@given(st.data())
def test_an_operator_is_the_reference_on_every_path(site: str, case: str, data: st.DataObject) -> None:
    rows = data.draw(activations(WIDTHS[site]))
    program = compiled(Recipe((term(site, case, data.draw(st.sampled_from([1.0, 0.0, 1e-3, 1e4]))),)))
    strided, flat = data.draw(st.booleans()), data.draw(st.booleans())
    for dtype, grad, near in PATHS.values():
        h = torch.from_numpy(rows).to(dtype)
        before = h.float().numpy().copy().reshape(-1, WIDTHS[site])
        h = h.transpose(0, 1).contiguous().transpose(0, 1) if strided else h
        h = h.reshape(before.shape) if flat else h
        run = Pass(Loaded(program), Rows(*rows.shape[:2], rows.shape[1]), N_EMBD)
        if run.places:
            with torch.set_grad_enabled(grad):
                h = run.steer(site, LAYER, h.requires_grad_(grad), own=True)
        got = h.detach().double().numpy().reshape(before.shape)
        expected = reference.apply(program.prompt.doses, site, LAYER, before).astype(np.float64)
        finite, least = np.isfinite(expected), max(2e-45, float(torch.finfo(dtype).tiny) * near)
        np.testing.assert_array_equal(np.isfinite(got), finite)
        size = np.abs(np.where(finite, [before, expected], 0)).max(axis=(0, 2), keepdims=True)[0]
        off = np.abs(np.where(finite, got, 0) - np.where(finite, expected, 0))
        assert (off <= near * size + least).all(), (dtype, grad, off.max(), size)


EVERYTHING = "ablate(a) + clamp(b, 0.5) + edit(p, margin=0.5) + 0.3*scale(c) + 0.5*a + 0.25*c(keep_norm=True)"


def everything(site: str) -> DictRegistry:
    return DictRegistry(
        *(of(site, name, seed) for seed, name in enumerate("abc")), of(site, "p", 3, meta={"bias": [0.1]})
    )


def attach(model: Any, site: str = "residual") -> Steering:
    return mien.attach(model, registry=everything(site))  # type: ignore[arg-type]


def rows_of(site: str, *shape: int, seed: int = 0) -> Any:
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.standard_normal((*shape, WIDTHS[site])).astype(np.float32))


@pytest.mark.parametrize("site", ["residual", "heads", "neurons"])
@pytest.mark.parametrize("path", PATHS)
def test_operators_act_in_their_order(site: str, path: str) -> None:
    dtype, grad, near = PATHS[path]
    h = rows_of(site, 2, 3).to(dtype)
    with attach(make_model().to(dtype), site) as steering:
        steering.set(EVERYTHING)
        doses = doses_of(steering, EVERYTHING)
        assert [dose.operation for dose in doses] == [
            "ablate",
            "clamp",
            "edit",
            "scale",
            "add",
            "add_keep_norm",
        ]
        before = h.float().numpy().copy().reshape(6, -1)
        with torch.set_grad_enabled(grad):
            got = once(steering, site, h.requires_grad_(grad)).float().numpy().reshape(6, -1)
        expected = reference.apply(doses, site, LAYER, before)
        np.testing.assert_allclose(got, expected, rtol=10 * near, atol=10 * near)
        done = steering.applied.places[site][LAYER]
        assert (done.rows, done.path) == (6, "engine" if path == "engine" else "torch")
        moved = np.linalg.norm(expected - before, axis=1)
        assert done.shift == pytest.approx(float(np.sqrt((moved**2).mean())), rel=10 * near)


def test_only_rows_that_were_changed_are_counted() -> None:
    """A probe leaves rows alone that are on its right side, a gate those that it is closed for."""
    probe = of("residual", "p", meta={"bias": [0.0]})
    recipe = Recipe((Term(1.0, probe, operator="edit", value=(0.0,)),))
    gated = Recipe((Term(1.0, of("residual"), gates=(Gate(of("residual"), above=0.0),)),))
    h = rows_of("residual", 2, 5)
    short = int((h.numpy() @ probe.rows[0] < 0).sum())
    with mien.attach(make_model()) as steering:
        for grad in (False, True):
            for what, rows in ((recipe, short), (gated, 10 - short)):
                steering.set(what)
                with torch.set_grad_enabled(grad):
                    once(steering, "residual", h.clone().requires_grad_(grad))
                done = steering.applied.layers[LAYER]
                assert (done.rows, done.path) == (rows, "torch" if grad else "engine")


@pytest.mark.parametrize("case", ["ablate", "latch"])
def test_many_rows_are_shared_out_among_threads_and_stay_in_order(case: str) -> None:
    """More floats than go through in one piece."""
    recipe = (
        gated("residual", above=0.6, latch=True) if case == "latch" else Recipe((term("residual", case, 1),))
    )
    program, rows = compiled(recipe), Rows(2, 17_000, 0, reply=0, kept={})
    h = rows_of("residual", 2, 17_000)
    expected = [
        reference.apply(program.response.doses, "residual", LAYER, each, range(17_000)) for each in h.numpy()
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run = Pass(Loaded(program), rows, N_EMBD)
        got = run.steer("residual", LAYER, h.clone(), own=True)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(got, torch.from_numpy(np.stack(expected)), rtol=1e-4, atol=1e-5)
    changed = int((got != h).any(dim=2).sum())
    done = run.applied().layers[LAYER]
    assert (done.rows, done.path) == (changed, "engine")
    assert changed == 34_000 if case == "ablate" else 20_000 < changed < 34_000


def test_half_precision_is_rounded_once() -> None:
    h = rows_of("residual", 1, 6).half()
    with attach(make_model().half()) as steering:
        for recipe in ("ablate(a) + clamp(b, 0.5)", "edit(p)"):
            steering.set(recipe)
            got = once(steering, "residual", h.clone()).double().numpy()[0]
            exact = reference.apply(doses_of(steering, recipe), "residual", LAYER, h[0].float().numpy())
            half_a_step = np.spacing(np.abs(exact).astype(np.float16)).astype(np.float64) / 2
            assert (np.abs(got - exact) <= half_a_step + 1e-6).all()
        steering.set("clamp(a, 1e6)")
        with pytest.raises(VectorError, match=r"does not fit into torch\.float16"):
            once(steering, "residual", h)


def test_gradients_go_through_every_operator() -> None:
    for site, case in CASES:
        if case not in ("force", "forbid"):  # what is set has no gradient
            run = Pass(Loaded(compiled(Recipe((term(site, case, 1.0),)))), Rows(1, 2, 2), N_EMBD)
            h = rows_of(site, 1, 2).double().requires_grad_()
            assert torch.autograd.gradcheck(partial(run.steer, site, LAYER, own=False), (h,), fast_mode=True)


@pytest.mark.filterwarnings("ignore:.*use_cache.*")  # transformers says that it turns the cache off
def test_training_with_gradient_checkpointing_is_the_same_at_every_site() -> None:
    inputs = batch([IDS[0], IDS[0, :4]], "right")
    vectors = [of(site, f"{site}_{name}", seed) for site in WIDTHS for seed, name in enumerate("ab")]
    recipe = " + ".join(
        f"ablate({site}_a) + gate({site}_b, on={site}_a, above=0.0, latch=True)"
        for site in ("residual", "attention", "mlp", "heads", "neurons")
    )
    grads = []
    for checkpointing in (False, True):
        model = make_model()
        model.train()
        if checkpointing:
            named = "activation_checkpointing_enable"  # what transformers 5 calls it
            enable = getattr(model, named, None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        with mien.attach(model, registry=DictRegistry(*vectors)) as steering:  # type: ignore[arg-type]
            steering.set([recipe, "residual_b"])
            model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        grads.append(model.model.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(grads[0], grads[1])


# ---- sites ----

# Where the sites are in a layer: attention, heads, mlp, neurons.
MODULES = {
    "llama": "self_attn self_attn.o_proj mlp mlp.down_proj",
    "phi3": "self_attn self_attn.o_proj mlp mlp.down_proj",
    "phi": "self_attn self_attn.dense mlp mlp.fc2",
    "gpt2": "attn attn.c_proj mlp mlp.c_proj",
    "gpt_neo": "attn attn.attention.out_proj mlp mlp.c_proj",
    "gpt_neox": "attention attention.dense mlp mlp.dense_4h_to_h",
    "gptj": "attn attn.out_proj mlp mlp.fc_out",
    "codegen": "attn attn.out_proj mlp mlp.fc_out",
    "falcon": "self_attention self_attention.dense mlp mlp.dense_4h_to_h",
    "opt": "self_attn self_attn.out_proj fc2 fc2",
    "gemma2": "self_attn self_attn.o_proj mlp mlp.down_proj",
    # These add the residual stream to what they give.
    "bloom": "self_attention.dense self_attention.dense mlp.dense_4h_to_h mlp.dense_4h_to_h",
    "mpt": "attn attn.out_proj ffn.down_proj ffn.down_proj",
}
OTHER_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": N_EMBD, "n_layer": N_LAYER, "n_head": 4, "vocab_size": N_VOCAB},
    "gpt_neo": {
        **SIZES,
        "num_layers": N_LAYER,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
    },
    "gptj": {"n_embd": N_EMBD, "n_layer": N_LAYER, "n_head": 4, "rotary_dim": 4, "vocab_size": N_VOCAB},
    "codegen": {"n_embd": N_EMBD, "n_layer": N_LAYER, "n_head": 4, "rotary_dim": 4, "vocab_size": N_VOCAB},
    "bloom": {**SIZES, "n_layer": N_LAYER, "n_head": 4},
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": N_EMBD},
    "mpt": {"d_model": N_EMBD, "n_layers": N_LAYER, "n_heads": 4, "vocab_size": N_VOCAB},
    "gemma2": {**SIZES, "head_dim": 8},
}


@torch.no_grad()
@pytest.mark.parametrize("family", MODULES)
def test_the_sites_of_a_family_are_found_and_steered(family: str) -> None:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, **{**OTHER_SIZES.get(family, SIZES), **special})
    model = AutoModelForCausalLM.from_config(config).eval()
    with mien.attach(model) as steering:
        runtime: Any = steering._runtime
        layer = runtime._layers.modules[LAYER]
        for site, name in zip(("attention", "heads", "mlp", "neurons"), MODULES[family].split()):
            module = layer.get_submodule(name)
            width = runtime.width(site, LAYER)
            vector = make_vector(site, [LAYER], 0, None, width, site=site)
            seen: list[Any] = []
            for recipe in (None, vector):  # what sees the steered ones has to come after mien's
                steering.set(recipe)
                if site in ("heads", "neurons"):
                    handle = module.register_forward_pre_hook(partial(keep_input, seen))
                else:
                    handle = module.register_forward_hook(partial(keep_output, seen))
                model(input_ids=IDS)
                handle.remove()
            plain, steered = seen
            torch.testing.assert_close(steered, plain + torch.tensor(vector.rows[0]))
            assert {s: list(done) for s, done in steering.applied.sites.items()} == {site: [LAYER]}
            assert steering.applied.sites[site][LAYER].rows == IDS.shape[1]
            assert steering.applied.layers == {}
            assert width == plain.shape[-1]


def test_what_a_model_lacks_is_said() -> None:
    with mien.attach(make_model()) as steering:
        assert steering._runtime.experts_used == 0  # type: ignore[union-attr]
        with pytest.raises(SiteNotFound, match="no site 'experts' in layer 1: its MLP is dense") as error:
            steering.set(Recipe((Term(1.0, marked(0), operator="forbid"),)))
        assert (error.value.site, error.value.layer) == ("experts", 1)
        with pytest.raises(SiteNotFound, match="no mixture of experts"):
            steering.count_experts()
        assert steering.expert_counts == {}
    with mien.attach(make_mixture()) as steering, pytest.raises(SiteNotFound, match="mixture of experts"):
        steering.set(of("neurons"))
    model = make_model()
    for layer in model.model.layers:
        layer.mixer, layer.other_mlp = layer.self_attn, nn.Linear(2, 2)
        del layer.self_attn
    with mien.attach(model) as steering:
        with pytest.raises(SiteNotFound, match="a name like attn or attention, got mlp, mixer, other_mlp"):
            steering.set(of("heads"))
        with pytest.raises(SiteNotFound, match="got mlp and other_mlp"):
            steering.set(of("mlp"))
    model = make_model()
    model.model.layers[LAYER].self_attn.o_proj = nn.Identity()
    with (
        mien.attach(model) as steering,
        pytest.raises(
            SiteNotFound,
            match=r"one linear module to 32 floats in LlamaAttention, named o_proj, .* or from 32 floats",
        ),
    ):
        steering._runtime.width("heads", LAYER)  # type: ignore[union-attr]


class Sigmoid(nn.Module):
    """A router that chooses in its own way."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router

    def forward(self, h: Any) -> Any:
        scores, _, _ = self.router(h)
        weights, indices = scores.sigmoid().topk(2, dim=-1)
        return scores, weights, indices


def test_a_router_that_chooses_in_its_own_way_is_refused() -> None:
    model = make_mixture()
    block = model.model.layers[LAYER].mlp
    block.gate = Sigmoid(block.gate)
    with (
        mien.attach(model) as steering,
        pytest.raises(SiteNotFound, match="Sigmoid chooses experts in a way"),
    ):
        steering.set(Recipe((Term(1.0, marked(0), operator="forbid"),)))


@pytest.mark.parametrize("site", ["attention", "mlp", "heads", "neurons", "experts"])
def test_hooks_come_and_go_with_the_programs_that_need_them(site: str) -> None:
    model = make_mixture() if site == "experts" else make_model()
    plain, before = logits(model), state(model)
    steering = mien.attach(model)
    idle = state(model)
    steering.set(of(site))
    assert state(model) != idle
    steered = logits(model)
    assert not torch.equal(steered, plain)
    for other in (copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model))):
        assert torch.equal(logits(other), plain)
    hooks = dict(steering._runtime._elsewhere)  # type: ignore[union-attr]
    steering.set(of(site, seed=1))
    assert steering._runtime._elsewhere == hooks  # type: ignore[union-attr]
    steering.set(of("residual"))
    assert state(model) == idle
    with steering(of(site)):
        assert torch.equal(logits(model), steered)
    assert state(model) == idle
    steering.set(of(site))
    steering.detach()
    assert state(model) == before
    assert torch.equal(logits(model), plain)


def test_steering_that_did_not_happen_at_a_site_is_an_error() -> None:
    model = make_model()
    attention = model.model.layers[LAYER].self_attn
    with mien.attach(model) as steering:
        steering.set(of("heads"))
        kept = attention.o_proj
        hooks = dict(kept._forward_pre_hooks)
        kept._forward_pre_hooks.clear()
        with pytest.raises(SteeringNotApplied, match=r"layers \[1\] at heads were not run") as error:
            logits(model)
        assert error.value.layers == (LAYER,)
        kept._forward_pre_hooks.update(hooks)
        logits(model)
        kept.register_forward_pre_hook(lambda module, args: (args[0][..., :-1],), prepend=True)
        with pytest.raises(SteeringNotApplied, match=r"\(1, 7, 32\) .* got \(1, 7, 31\) .* at heads"):
            logits(model)


def test_what_goes_in_is_not_changed_under_its_feet() -> None:
    """An attention that gives its input back: the layer goes on with what it had."""

    class Nothing(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner  # what has the matrices

        def forward(self, hidden_states: Any, **_: Any) -> Any:
            return hidden_states, None

    model = make_model()
    layer = model.model.layers[LAYER]
    layer.self_attn = Nothing(layer.self_attn)
    seen: list[Any] = []
    layer.input_layernorm.register_forward_hook(lambda module, args, output: seen.append(output))
    with mien.attach(model) as steering:
        steering.set(of("attention"))
        logits(model)
        steering.clear()
        logits(model)
    assert torch.equal(*seen)


@pytest.mark.usefixtures("all_processors")
def test_swapping_sites_while_another_thread_runs_never_loses_a_hook() -> None:
    import threading

    model = make_model()
    with mien.attach(model) as steering:
        programs = [steering.compile(Recipe((Term(1.0, of(site)),))) for site in ("heads", "mlp", "residual")]
        failed: list[Exception] = []
        stop = threading.Event()

        def run() -> None:
            while not stop.is_set():
                try:
                    logits(model)
                except SteeringNotApplied as error:
                    failed.append(error)

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for i in range(300):
            steering.set(programs[i % 3])
        stop.set()
        for thread in threads:
            thread.join()
        assert failed == []
        steering.clear()
        assert steering._runtime._elsewhere == {}  # type: ignore[union-attr]


# ---- gates and windows: which tokens ----

GATES: dict[str, dict[str, Any]] = {
    "above": {"above": 0.05},
    "below": {"below": 0.0},
    "between": {"above": -0.1, "below": 0.1},
    "hysteresis": {"above": 0.2, "hysteresis": 0.25},
    "latch": {"above": 0.25, "latch": True},
}


def gated(site: str, **gate: Any) -> Recipe:
    """Adds one vector where the readout of another passes."""
    return Recipe((Term(1.0, of(site), gates=(Gate(of(site, "on", 1), **gate),)),))


class Talk:
    """Passes of somebody's own loop with one cache: activations that a site is given, and what comes out."""

    def __init__(self, steering: Steering, site: str, mask: Any) -> None:
        self.steering, self.site, self.mask = steering, site, mask
        self.model = steering._runtime._model  # type: ignore[union-attr]
        self.cache = cache_argument(DynamicCache())

    def say(self, h: Any) -> Any:
        """A pass over that many tokens."""
        count = h.shape[1]
        if self.mask.shape[1] < self.length + count:
            self.mask = torch.cat([self.mask, torch.ones(len(h), count, dtype=torch.long)], dim=1)
        mask = self.mask[:, : self.length + count]
        with fed(self.steering, self.site, [h.clone()]) as seen:
            self.model(input_ids=torch.ones(h.shape[:2], dtype=torch.long), attention_mask=mask, **self.cache)
        return seen[0].reshape(h.shape)

    @property
    def length(self) -> int:
        (cache,) = self.cache.values()
        return int(cache.get_seq_length())


class Row:
    """What the reference makes of one row of a Talk."""

    def __init__(self, program: Program, site: str) -> None:
        self.program, self.site, self.memory = program, site, {}

    def say(self, h: Any, real: Any, replies: Sequence[int]) -> Any:
        part = self.program.prompt if replies[0] < 0 else self.program.response
        found = h.clone()
        found[real] = torch.from_numpy(
            reference.apply(
                part.doses,
                self.site,
                LAYER,
                h[real].float().numpy(),
                np.array(replies)[real.numpy()].tolist(),
                self.memory,
            )
        ).to(h.dtype)
        return found


def talk(steering: Steering, site: str, recipes: Sequence[Any], mask: Any, dtype: Any = torch.float32) -> int:
    """A prompt, a reply, a prompt again and a reply again; how many rows were changed."""
    programs = [steering.compile(recipe) for recipe in recipes]
    rows = [Row(program, site) for program in programs]
    spoken = Talk(steering, site, mask)
    steps = [(mask.shape[1], None), *((1, i) for i in range(6)), (3, None), *((1, i) for i in range(4))]
    changed = 0
    for seed, (count, number) in enumerate(steps):
        h = rows_of(site, len(rows), count, seed=seed).to(dtype)
        got = spoken.say(h)
        for i, row in enumerate(rows):
            real = mask[i].bool() if seed == 0 else torch.ones(count, dtype=torch.bool)
            expected = row.say(h[i], real, [-1] * count if number is None else [number])
            torch.testing.assert_close(
                got[i], expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
            )
            assert torch.equal(got[i][~real], h[i][~real])
            changed += int((expected != h[i]).any(dim=1).sum())
    return changed


@pytest.mark.filterwarnings("ignore::mien.ReplyWarning")  # which they are
@torch.no_grad()
@pytest.mark.parametrize(
    ("gate", "site", "dtype"),
    [
        *((gate, "residual", dtype) for gate in GATES for dtype in (torch.float32, torch.float64)),
        ("hysteresis", "heads", torch.float32),
        ("latch", "mlp", torch.bfloat16),
    ],
)
def test_a_gate_is_open_on_exactly_the_tokens_that_the_reference_says(
    gate: str, site: str, dtype: Any
) -> None:
    mask = torch.ones(2, 5, dtype=torch.long)
    with mien.attach(make_model().to(dtype)) as steering:
        recipe = gated(site, **GATES[gate])
        steering.set(recipe)
        changed = talk(steering, site, [recipe] * 2, mask, dtype)
        assert 4 < changed < 30


@pytest.mark.filterwarnings("ignore::mien.ReplyWarning")  # which they are
@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row_recipes_have_gates_and_windows_of_their_own(side: str, dtype: Any) -> None:
    mask = batch([[1] * 5, [1] * 3, [1] * 2, [1]], side)["attention_mask"]
    recipes: list[Any] = [
        gated("residual", above=0.2, hysteresis=0.25),
        None,
        "ablate(a, start=1, stop=4) + 0.5*b(ramp=3) + gate(c, on=a, above=0.25, latch=True)",
        'edit(p, when="prompt") + clamp(a, 1, when="response") + b(decay=2)',
    ]
    with attach(make_model().to(dtype)) as steering:
        steering.set(recipes)
        assert talk(steering, "residual", recipes, mask, dtype) > 10


WINDOWS = ["v(start=1, stop=3)", "v(ramp=3)", "v(start=1, ramp=2, decay=4)"]


class Shares:
    """Which share of `v` each token of a generation got, by its number from where the reply begins."""

    def __init__(self, steering: Steering, given: int) -> None:
        model, self._given = steering._runtime._model, given  # type: ignore[union-attr]
        self.found: dict[int, set[float]] = {}
        self._before: Any = None
        layer = model.model.layers[LAYER]
        self._v = torch.tensor(of("residual").rows[0])
        self._handles = [
            model.model.register_forward_pre_hook(self._note_length, with_kwargs=True),
            layer.register_forward_hook(
                lambda m, a, out: setattr(self, "_before", out.clone()), prepend=True
            ),
            layer.register_forward_hook(self._compare),
        ]

    def _note_length(self, module: Any, args: Any, kwargs: Any) -> None:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        self._length = 0 if cache is None else int(cache.get_seq_length())

    def _compare(self, module: Any, args: Any, output: Any) -> None:
        shares = (output - self._before) @ self._v / (self._v @ self._v)
        for column, each in enumerate(shares.T):
            number = max(self._length + column - self._given, -1)
            self.found.setdefault(number, set()).update(round(share, 4) for share in each.tolist())

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "samples": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("way", [*WAYS, "assisted"])
def test_windows_open_on_exactly_their_tokens_of_a_generation(way: str) -> None:
    options = {"assistant_model": make_model(seed=1)} if way == "assisted" else WAYS[way]
    rows = [IDS[0]] if way == "assisted" else [IDS[0], IDS[0, :4]]
    inputs = batch(rows, "left")
    del inputs["position_ids"]
    with mien.attach(make_model(), registry=DictRegistry(of("residual"))) as steering:  # type: ignore[arg-type]
        for recipe in WINDOWS:
            steering.set(recipe)
            window = doses_of(steering, recipe)[0].window
            shares = Shares(steering, IDS.shape[1])
            reply(steering._runtime._model, inputs.pop("input_ids", IDS), **inputs, **options)  # type: ignore[union-attr]
            shares.stop()
            inputs = batch(rows, "left")
            del inputs["position_ids"]
            assert {number: round(window.at(number), 4) for number in shares.found} == {
                number: pytest.approx(found.pop(), abs=2e-4) for number, found in shares.found.items()
            }
            assert all(not found for found in shares.found.values())  # one share a token, in every row
            assert set(shares.found) >= set(range(-1, 5))


@pytest.mark.filterwarnings("ignore::mien.ReplyWarning")  # which they are
def test_windows_in_a_loop_with_a_static_cache_and_without_any() -> None:
    model = make_model()
    with mien.attach(model, registry=DictRegistry(of("residual"))) as steering, torch.no_grad():  # type: ignore[arg-type]
        steering.set("v(start=1, stop=3)")
        cache = cache_argument(StaticCache(model.config, max_cache_len=16))
        rows = []
        for count in (4, 1, 1, 1, 1, 2, 1, 1):
            model(input_ids=IDS[:, :count], **cache)
            done = steering.applied.layers
            rows.append(done[LAYER].rows if done else 0)
        assert rows == [0, 0, 1, 1, 0, 0, 0, 1]
        model(input_ids=IDS[:, :1], use_cache=False)  # a prompt
        assert steering.applied.layers == {}


def test_a_token_whose_number_can_not_be_told_is_refused() -> None:
    model = make_model()
    layer, h = model.model.layers[LAYER], torch.ones(1, 1, N_EMBD)
    arguments = {"position_embeddings": model.model.rotary_emb(h, torch.arange(1)[None])}
    with mien.attach(model) as steering, torch.no_grad():
        for options in ({"ramp": 3}, {"gates": (Gate(of("residual"), above=0.0, latch=True),)}):
            steering.set(Recipe((Term(1.0, of("residual"), **options),)))
            with pytest.raises(RuntimeNotSupported, match="which token of its reply this is can't be told"):
                layer(h, **arguments)


def test_a_gate_s_memory_is_of_one_reply_and_one_cache() -> None:
    """Two conversations, taken turns with: a latch that one has opened is closed in the other."""
    recipe = gated("residual", above=0.5, latch=True)
    on = torch.tensor(of("residual", "on", 1).rows[0])
    quiet = torch.zeros(1, 1, N_EMBD)
    with mien.attach(make_model()) as steering, torch.no_grad():
        steering.set(recipe)
        talks = [Talk(steering, "residual", torch.ones(1, 3, dtype=torch.long)) for _ in range(2)]
        for each in talks:
            each.say(rows_of("residual", 1, 3))
        assert not torch.equal(talks[0].say(on[None, None]), on[None, None])
        for _ in range(2):
            assert not torch.equal(talks[0].say(quiet), quiet)
            assert torch.equal(talks[1].say(quiet), quiet)
        program = steering.compile(recipe)
        for _ in range(2):  # set once more, it begins anew
            steering.set(program)
            assert torch.equal(talks[0].say(quiet), quiet)
            assert not torch.equal(talks[0].say(on[None, None]), on[None, None])
            assert not torch.equal(talks[0].say(quiet), quiet)


def test_windows_cost_nothing_outside_of_them() -> None:
    """The engine is not even asked."""
    with mien.attach(make_model()) as steering:
        steering.set(Recipe((Term(1.0, of("residual"), start=1000), Term(1.0, of("heads"), start=1000))))
        runtime: Any = steering._runtime
        rows = Rows(1, 1, 0, reply=0, kept={})
        assert runtime._loaded.acting(rows) == {}
        assert runtime._loaded.acting(rows._replace(reply=1000)) == {"residual": {LAYER}, "heads": {LAYER}}
        reply(runtime._model)
        assert str(steering.applied) == "nothing was steered"


def test_turns_pick_the_program() -> None:
    model = make_model()
    plain = logits(model)
    with mien.attach(model, registry=DictRegistry(of("residual"), of("heads", "w"))) as steering:  # type: ignore[arg-type]
        steering.set("v(turn=2) + w(turn=(2, 3))")
        recipe = steering.recipe
        found = []
        for turn in (1, 2, 3, 4, 2):
            steering.turn = turn
            found.append((sorted(steering.applied.places) if turn > 1 and found else [], logits(model)))
            places = sorted(steering.applied.places)
            assert places == {1: [], 2: ["heads", "residual"], 3: ["heads"], 4: []}[turn]
        assert torch.equal(found[0][1], plain)
        assert torch.equal(found[3][1], plain)
        assert torch.equal(found[1][1], found[4][1])
        assert steering.recipe == recipe
        steering.set(["v(turn=2)", None])
        both = logits(model, IDS.repeat(2, 1))
        torch.testing.assert_close(both[1:], plain)
        assert not torch.equal(both[:1], plain)


# ---- watching ----


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_watch_reads_what_the_reference_reads_before_and_after(dtype: Any) -> None:
    model = make_model(num_hidden_layers=4).to(dtype)
    inputs = batch([IDS[0], IDS[0, :4]], "left")
    vectors = [make_vector("a", [1, 2], 5, None, N_EMBD), make_vector("b", [2, 3], 6, None, N_EMBD)]
    vectors[1] = Vector("b", (2, 3), vectors[1].rows, meta={"center": [0.5, -0.25]})
    near = 2e-2 if dtype == torch.bfloat16 else 1e-4
    with attach(model) as steering:
        states = []
        for recipe in (None, "clamp(a, 1) + gate(b, on=a, above=0.0)"):
            steering.set(recipe)
            states.append(model(**inputs, output_hidden_states=True).hidden_states)
        watch = steering.watch(*vectors)
        model(**inputs)
        watch.stop()
        model(**inputs)  # nobody reads this
        applied = steering.applied.layers
    real = inputs["attention_mask"].bool()
    assert len(watch) == int(real.sum())
    assert watch.layers == (1, 2, 3)
    assert list(applied) == [LAYER]
    for row in range(2):
        for vector in vectors:
            for after in (False, True):
                got = watch.by_layer(vector.name, after=after, sequence=row, prompt=True)
                for column, layer in enumerate(watch.layers):
                    steered = after or layer > LAYER  # what comes after it was steered before
                    h = states[int(steered)][layer + 1][row][real[row]].float().numpy()
                    expected = (
                        reference.readout(h, vector, layer)
                        if layer in vector.layers
                        else np.full(len(h), np.nan)
                    )
                    if layer < 3:  # the last of hidden_states has been through the norm
                        np.testing.assert_allclose(got[:, column], expected, rtol=near, atol=near)
                    else:
                        assert np.isnan(got[:, column]).all() == (layer not in vector.layers)


def test_a_watch_is_told_each_token_of_a_reply_once() -> None:
    model = make_model()
    tokens = []
    vector = of("residual")
    with mien.attach(model) as steering:
        plain = reply(model)
        watch = steering.watch(vector, on_token=tokens.append)
        notes: list[int] = []
        note = watch.note
        watch.note = lambda sequences, *rest: (notes.append(len(sequences)), note(sequences, *rest))  # type: ignore[method-assign, assignment]
        assert reply(model) == plain
        assert notes == [7, 1, 1, 1, 1, 1]
        assert [token.reply for token in tokens] == [-1] * 7 + [0, 1, 2, 3, 4]
        assert watch.series("v").shape == (5,)
        steering.set(vector)
        watch.clear()
        with torch.enable_grad():
            model(input_ids=IDS)
        moved = watch.series("v", prompt=True) - watch.series("v", prompt=True, after=False)
        np.testing.assert_allclose(moved, 1.0, rtol=1e-4)
        assert steering.applied.layers[LAYER].rows == 7
        model.model.layers[LAYER]._forward_hooks.clear()
        steering.clear()
        with pytest.raises(SteeringNotApplied, match=r"layers \[1\] were not run"):
            logits(model)


# ---- experts ----


@contextmanager
def chosen(model: Any, layer: int = LAYER) -> Iterator[list[tuple[Any, Any]]]:
    """(indices, weights) that the experts of a layer were called with."""
    found: list[tuple[Any, Any]] = []
    handle = model.model.layers[layer].mlp.experts.register_forward_pre_hook(
        lambda module, args: found.append((args[1].clone(), args[2].detach().clone()))
    )
    try:
        yield found
    finally:
        handle.remove()


MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {"norm_topk_prob": False},
    "qwen3_moe": {"norm_topk_prob": True},
    "olmoe": {"norm_topk_prob": False},
}


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forced_experts_are_always_chosen_and_forbidden_ones_never(family: str, dtype: Any) -> None:
    model = make_mixture(family, **MIXTURES[family]).to(dtype)
    inputs = batch([IDS[0], IDS[0, :4]], "left")
    real = inputs["attention_mask"].bool().reshape(-1)
    router = model.model.layers[LAYER].mlp.gate
    normalised = MIXTURES[family].get("norm_topk_prob", True)
    with mien.attach(model) as steering, torch.no_grad():
        assert steering._runtime.experts_used == 2  # type: ignore[union-attr]
        with chosen(model) as plain:
            model(**inputs)
        recipe = Recipe((Term(1.0, marked(1), operator="forbid"), Term(1.0, marked(3), operator="force")))
        steering.set(recipe)
        seen: list[Any] = []
        handle = router.register_forward_hook(lambda module, args, output: seen.append(output[0].clone()))
        with chosen(model) as found:
            model(**inputs)
        handle.remove()
        (indices, weights), (own, own_weights) = found[0], plain[0]
        assert ((indices == 3).sum(dim=1) == 1)[real].all()
        assert not (indices == 1)[real].any()
        assert torch.equal(indices[~real], own[~real])
        assert torch.equal(weights[~real], own_weights[~real])
        probabilities = seen[0].float().softmax(dim=-1).gather(1, indices)
        if normalised:
            probabilities /= probabilities.sum(dim=1, keepdim=True)
        rough = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(weights.float()[real], probabilities[real], rtol=rough, atol=rough)
        done = steering.applied.sites["experts"][LAYER]
        assert done.rows == int(real.sum())
        assert done.shift == pytest.approx(2**0.5, rel=0.1)  # a forced one may have been the greatest
        steering.set(Recipe((Term(1.0, marked(0, 2), operator="force"),)))
        with chosen(model) as found:
            model(**inputs)
        assert (found[0][0].sort(dim=1).values == torch.tensor([0, 2]))[real].all()


def test_experts_are_counted_without_the_padding() -> None:
    model = make_mixture()
    inputs = batch([IDS[0], IDS[0, :4]], "left")
    plain = logits(model)
    with mien.attach(model) as steering, torch.no_grad():
        idle = state(model)
        steering.count_experts()
        with chosen(model) as found:
            model(**inputs)
        counts = steering.expert_counts
        real = inputs["attention_mask"].bool().reshape(-1)
        assert list(counts) == list(range(N_LAYER))
        assert {layer: int(count.sum()) for layer, count in counts.items()} == dict.fromkeys(
            range(N_LAYER), 22
        )
        expected = np.bincount(found[0][0][real].reshape(-1).numpy(), minlength=N_EXPERT)
        np.testing.assert_array_equal(counts[LAYER], expected)
        assert counts[LAYER].dtype == np.int64
        steering.set(Recipe((Term(1.0, marked(1), operator="forbid"),)))
        steering.count_experts()  # anew
        assert torch.equal(logits(make_mixture()), plain)
        reply(model, count=3)
        assert steering.expert_counts[LAYER][1] == 0
        assert steering.expert_counts[LAYER].sum() == 2 * (7 + 2)
        steering.clear()
        assert torch.equal(logits(model), plain)
        steering.count_experts(False)
        assert steering.expert_counts == {}
        assert state(model) == idle


class LinearGate(nn.Module):
    """A block as transformers 4 has it: the router is linear, and the block chooses."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.gate = nn.Linear(N_EMBD, N_EXPERT, bias=False)
        self.gate.weight = block.gate.weight  # type: ignore[union-attr, assignment]
        self.experts, self.top_k = block.experts, 2

    def forward(self, h: Any) -> Any:
        rows = h.reshape(-1, h.shape[-1])
        weights, indices = self.gate(rows).softmax(dim=-1).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return self.experts(rows, indices, weights).reshape(h.shape)  # type: ignore[operator]


def test_a_router_that_only_gives_logits() -> None:
    recipe = Recipe((Term(1.0, marked(1), operator="forbid"),))
    found = []
    for linear in (False, True):
        model = make_mixture()
        for layer in model.model.layers if linear else ():
            layer.mlp = LinearGate(layer.mlp)
        with mien.attach(model) as steering:
            plain = logits(model)
            steering.set(recipe)
            steering.count_experts()
            found.append((plain, logits(model), steering.expert_counts))
            assert not torch.equal(found[-1][1], plain)
    torch.testing.assert_close(found[0][:2], found[1][:2])
    for layer in range(N_LAYER):
        np.testing.assert_array_equal(found[0][2][layer], found[1][2][layer])


# ---- torch.compile ----


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's own, while it traces
def test_operators_compiled_without_a_break(fresh_compiler: None) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model = make_model()
    inputs = batch([IDS[0], IDS[0, :4]], "left")
    real = inputs["attention_mask"].bool()
    names = {site: DictRegistry(*everything(site).vectors.values()) for site in ("residual", "heads", "mlp")}
    registry = DictRegistry()
    for site, known in names.items():
        for name, vector in known.vectors.items():
            registry.vectors[name if site == "residual" else f"{site}_{name}"] = vector
    recipes: list[Any] = [
        "ablate(a) + clamp(b, 0.5) + edit(p) + 0.3*scale(c) + gate(0.5*a, on=b, above=0.0)",
        ["ablate(heads_a) + 0.5*mlp_b(keep_norm=True)", "gate(a, on=c, below=0.1, latch=True) + b(ramp=3)"],
    ]
    with mien.attach(model, registry=registry) as steering:  # type: ignore[arg-type]
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        plain = compiled(**inputs, use_cache=False).logits
        for recipe in recipes:
            steering.set(recipe)
            expected = model(**inputs, use_cache=False).logits
            assert not torch.equal(expected[real], plain[real])
            got = compiled(**inputs, use_cache=False).logits
            torch.testing.assert_close(got[real], expected[real])
            paths = {done.path for place in steering.applied.places.values() for done in place.values()}
            assert paths == {"compiled, not counted"}
        count = counter.frame_count
        steering.set(recipes[0].replace("0.5", "0.75"))
        expected = model(**inputs, use_cache=False).logits
        torch.testing.assert_close(compiled(**inputs, use_cache=False).logits[real], expected[real])
        assert counter.frame_count == count
        steering.set("a(ramp=3)")
        with pytest.raises(RuntimeError, match="RuntimeNotSupported: start, stop, ramp, decay and gates"):
            compiled(input_ids=IDS[:, :1], use_cache=False)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's own, while it traces
def test_experts_compiled(fresh_compiler: None) -> None:
    model = make_mixture()
    model.set_experts_implementation("batched_mm")
    with mien.attach(model) as steering:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        compiled(input_ids=IDS, use_cache=False)
        steering.set(
            Recipe((Term(1.0, marked(1), operator="forbid"), Term(1.0, marked(3), operator="force")))
        )
        expected = model(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(compiled(input_ids=IDS, use_cache=False).logits, expected)
