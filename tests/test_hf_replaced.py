"""Modules put in the place of others, and models inside of wrappers: steered once, where they run."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import mien
import numpy as np
import peft
import pytest
import torch
from hf_models import IDS, N_EMBD, N_LAYER, logits, make_model, reply, state
from mien import RuntimeNotSupported, SiteNotFound, Steering, Vector
from mien.runtimes.hf import runtime_of
from mien.runtimes.wrappers import unwrap
from torch import nn

LAYER = 2
# peft asks transformers 5 for an attribute that has another name there
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
SITES = {"residual": N_EMBD, "attention": N_EMBD, "mlp": N_EMBD, "heads": N_EMBD, "neurons": 48}


def direction(site: str) -> Any:
    return torch.from_numpy(np.random.default_rng(0).standard_normal(SITES[site]).astype(np.float32))


def attach(model: Any, site: str = "residual", **options: Any) -> Steering:
    """With `v`, which adds at that site of LAYER."""
    steering = mien.attach(model, **options)
    steering.define("v", Vector("v", (LAYER,), direction(site).numpy()[None], site=site))
    return steering


def hooked(model: Any, site: str = "residual", run: Callable[[Any], Any] = logits) -> Any:
    """The logits with a hook of torch's own on what runs there now."""
    model = unwrap(model)
    layer, add = model.model.layers[LAYER], direction(site)
    inside = getattr(layer, "inner", layer)
    places = {
        "residual": layer,
        "attention": inside.self_attn,
        "mlp": inside.mlp,
        "heads": inside.self_attn.o_proj,
        "neurons": inside.mlp.down_proj,
    }
    module = places[site]
    if site in ("heads", "neurons"):
        handle = module.register_forward_pre_hook(lambda module, args: (args[0] + add, *args[1:]))
    else:
        handle = module.register_forward_hook(
            lambda module, args, out: (out[0] + add, *out[1:]) if isinstance(out, tuple) else out + add
        )
    try:
        return run(model)
    finally:
        handle.remove()


def lora(targets: list[str], rank: int = 4) -> Any:
    return peft.LoraConfig(r=rank, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")


class Wrapped(nn.Module):
    """As wrappers of blocks are: the other is inside, and runs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def put(path: str) -> Callable[[Any], None]:
    """Put another model's module there."""
    return lambda model: model.set_submodule(path, make_model(seed=7).get_submodule(path))


def wrap_layer(model: Any) -> None:
    model.model.layers[LAYER] = Wrapped(model.model.layers[LAYER])


def swap_layers(model: Any) -> None:
    layers = model.model.layers
    layers[1], layers[2] = layers[2], layers[1]


def new_list(model: Any) -> None:
    model.model.layers = make_model(seed=7).model.layers


def adapters(model: Any) -> None:
    peft.inject_adapter_in_model(lora(["q_proj", "o_proj", "down_proj"]), model)


def merged(model: Any) -> None:
    """Adapters are added, run, and merged into the weights, which puts the plain modules back."""
    wrapped = peft.get_peft_model(model, lora(["o_proj", "down_proj"]))
    logits(wrapped)
    assert wrapped.merge_and_unload() is model


def quantised(model: Any) -> None:
    torch.ao.quantization.quantize_dynamic(model.model, {nn.Linear}, dtype=torch.qint8, inplace=True)


CHANGES: dict[str, Callable[[Any], None]] = {
    "layer": put(f"model.layers.{LAYER}"),
    "layer wrapped": wrap_layer,
    "layers swapped": swap_layers,
    "list of layers": new_list,
    "decoder": put("model"),
    "attention": put(f"model.layers.{LAYER}.self_attn"),
    "mlp": put(f"model.layers.{LAYER}.mlp"),
    "output projection": put(f"model.layers.{LAYER}.self_attn.o_proj"),
    "down projection": put(f"model.layers.{LAYER}.mlp.down_proj"),
    "adapters": adapters,
    "merged adapters": merged,
    "quantised": quantised,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.ao's own
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("change", CHANGES)
def test_what_runs_is_steered_after_modules_were_replaced(change: str, site: str) -> None:
    model = make_model()
    with attach(model, site) as steering:
        steering.set("v")
        before = logits(model)
        CHANGES[change](model)
        now, answer = logits(model), reply(model)
        assert not torch.equal(now, before) or change == "layer wrapped"
        steering.clear()
        plain = logits(model)
        torch.testing.assert_close(now, hooked(model, site), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(now, plain, atol=1e-3)
        assert answer == hooked(model, site, reply)
        steering.set("v")
        assert torch.equal(logits(model), now)
    assert torch.equal(logits(model), plain)
    hooks, _ = state(model)
    assert {count for _, *counts in hooks for count in counts} == {0}


def test_layers_that_are_gone_are_said_and_nothing_runs_unsteered() -> None:
    model = make_model()
    kept = model.model.layers
    with attach(model) as steering:
        steering.set("v")
        steered = logits(model)
        for layers in (kept[:3], nn.ModuleList([*kept, make_model().model.layers[0]])):
            model.model.layers = layers
            with pytest.raises(RuntimeNotSupported, match=f"{len(layers)} now|no list of 4"):
                logits(model)
        model.model.layers = kept
        assert torch.equal(logits(model), steered)
        del kept[3]
        with pytest.raises(RuntimeNotSupported):
            logits(model)


def test_named_layers_are_followed_too() -> None:
    for named in (lambda model: "model.layers", lambda model: list(model.model.layers)):
        model = make_model()
        with attach(model, layers=named(model)) as steering:
            steering.set("v")
            put(f"model.layers.{LAYER}")(model)
            steered = logits(model)
            steering.clear()
            assert torch.equal(steered, hooked(model))


def test_a_site_that_is_gone_is_said() -> None:
    model = make_model()
    with attach(model, "heads") as steering:
        steering.set("v")
        before = logits(model)
        attention = model.model.layers[LAYER].self_attn
        kept = attention.o_proj
        attention.o_proj = Wrapped(nn.Identity())
        with pytest.raises(SiteNotFound) as error:
            logits(model)
        assert (error.value.site, error.value.layer) == ("heads", LAYER)
        attention.o_proj = kept
        assert torch.equal(logits(model), before)


def test_a_replaced_router_chooses_as_it_is_steered() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": N_EMBD, "intermediate_size": 48, "num_hidden_layers": N_LAYER}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}

    def make() -> Any:
        return MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()

    model = make()
    mask = np.zeros((1, 4), dtype=np.float32)
    mask[0, 1] = 1
    with mien.attach(model) as steering:
        steering.define("e", Vector("e", (LAYER,), mask, site="experts"))
        steering.set("forbid(e)")
        steering.count_experts()
        logits(model)
        name = next(
            name for name, _ in model.named_modules() if f".{LAYER}." in name and name.endswith(".gate")
        )
        model.set_submodule(name, make().get_submodule(name))
        steering.count_experts()
        logits(model)
        counts = steering.expert_counts[LAYER]
        assert counts[1] == 0
        assert counts.sum() == 2 * IDS.numel()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's own, while it traces
@torch.no_grad()
@pytest.mark.parametrize("site", ["residual", "heads"])
def test_a_module_replaced_in_a_compiled_model_is_steered(site: str) -> None:
    torch.compiler.reset()
    model = make_model(num_hidden_layers=LAYER + 1)
    compiled = torch.compile(model, backend="eager")
    with attach(model, site) as steering:
        steering.set("v")
        compiled(input_ids=IDS)
        put(f"model.layers.{LAYER}" + (".self_attn.o_proj" if site == "heads" else ""))(model)
        steered = compiled(input_ids=IDS).logits
        steering.clear()
        torch.testing.assert_close(steered, hooked(model, site))
    torch.compiler.reset()


# ---- wrappers ----


class _Group:
    """torch.distributed for one process."""

    def __init__(self, path: Any) -> None:
        self.address = f"file://{path}"

    def __enter__(self) -> None:
        torch.distributed.init_process_group("gloo", init_method=self.address, rank=0, world_size=1)

    def __exit__(self, *_: Any) -> None:
        torch.distributed.destroy_process_group()


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "LoRA": lambda model: peft.get_peft_model(model, lora(["q_proj", "o_proj", "down_proj"])).eval(),
    "IA3": lambda model: peft.get_peft_model(
        model, peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    ).eval(),
    "mixed": lambda model: peft.get_peft_model(model, lora(["o_proj"]), mixed=True).eval(),
    "prompt tuning": lambda model: peft.get_peft_model(
        model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).eval(),
    "DataParallel": nn.DataParallel,
}


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # with virtual tokens
@pytest.mark.parametrize("first", ["wrapped", "attached"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_model_is_steered_inside(name: str, first: str) -> None:
    model = make_model()
    if first == "wrapped":
        wrapped = WRAPPERS[name](model)
        plain = logits(wrapped)
        steering = attach(wrapped)
    else:
        steering = attach(model)
        wrapped = WRAPPERS[name](model)
        plain = logits(wrapped)
    assert runtime_of(wrapped) is runtime_of(model) is steering._runtime
    expected = hooked(model, run=lambda _: logits(wrapped))
    assert torch.equal(logits(wrapped), plain)
    steering.set("v")
    steered = logits(wrapped)
    torch.testing.assert_close(steered, expected)
    assert not torch.allclose(steered, plain, atol=1e-3)
    if name == "prompt tuning":  # the virtual tokens are prompt
        steering.set('v(when="response")')
        wrapped.generate(input_ids=IDS, max_new_tokens=1, do_sample=False, pad_token_id=0)
        assert not steering.applied.layers
    steering.detach()
    assert torch.equal(logits(wrapped), plain)
    assert runtime_of(wrapped) is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's own, while it traces
def test_a_compiled_model_is_steered_inside() -> None:
    torch.compiler.reset()
    model = make_model(num_hidden_layers=LAYER + 1)
    compiled = torch.compile(model, backend="eager")
    plain = logits(compiled)
    with attach(compiled) as steering:
        assert runtime_of(compiled) is runtime_of(model) is steering._runtime
        steering.set("v")
        steered = logits(compiled)
        steering.clear()
        torch.testing.assert_close(steered, hooked(model))
    assert torch.equal(logits(compiled), plain)
    assert unwrap(torch.compile(nn.DataParallel(WRAPPERS["LoRA"](model)))) is model
    torch.compiler.reset()


def test_a_distributed_model_is_steered_inside(tmp_path: Any) -> None:
    from torch.nn.parallel import DistributedDataParallel

    with _Group(tmp_path / "group"):
        model = make_model()
        wrapped = DistributedDataParallel(model)
        with attach(wrapped) as steering:
            steering.set("v")
            steered = logits(wrapped)
            steering.clear()
            assert torch.equal(steered, hooked(model))


def test_generate_through_peft_is_counted() -> None:
    wrapped = WRAPPERS["LoRA"](make_model())
    with attach(wrapped) as steering:
        for recipe in ('v(when="prompt")', 'v(when="response")', "v(start=2)"):
            steering.set(recipe)
            assert reply(wrapped) == reply(unwrap(wrapped))


@pytest.mark.parametrize("first", ["offloaded", "attached"])
def test_offloaded_layers_are_steered(first: str) -> None:
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    model, expected = make_model(), hooked(make_model())
    if first == "offloaded":
        cpu_offload(model, execution_device="cpu")
    steering = attach(model)
    if first == "attached":
        cpu_offload(model, execution_device="cpu")
    assert next(model.model.layers[1].parameters()).is_meta
    steering.set("v")
    assert torch.equal(logits(model), expected)
    remove_hook_from_submodules(model)
    assert torch.equal(logits(model), expected)
    steering.detach()


# ---- what is attached ----


def test_the_runtime_of_a_model_is_found_and_keeps_nothing_alive() -> None:
    model = make_model()
    assert runtime_of(model) is None
    assert runtime_of(object()) is None
    steering = attach(model)
    runtime = runtime_of(model)
    assert runtime is steering._runtime
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert runtime_of(other) is None
        with attach(other) as fresh:  # a copy can be attached, and the original does not notice
            fresh.set("v")
            assert torch.equal(logits(other), hooked(make_model()))
        assert torch.equal(logits(model), logits(make_model()))
    gone = weakref.ref(runtime), weakref.ref(model)  # type: ignore[type-var]
    del runtime, steering, model, fresh, other
    gc.collect()
    assert [found() for found in gone] == [None, None]


def test_a_dropped_handle_can_be_reached() -> None:
    model = make_model()
    attach(model).set("v")
    assert torch.equal(logits(model), hooked(make_model()))
    runtime = runtime_of(model)
    assert runtime is not None
    runtime.release()
    assert runtime_of(model) is None
    assert torch.equal(logits(model), logits(make_model()))
