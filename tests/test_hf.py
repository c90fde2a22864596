"""The transformers runtime on small random models: what is steered, and that nothing else is."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mien
import numpy as np
import pytest
import torch
from hf_models import (
    IDS,
    N_EMBD,
    N_LAYER,
    N_VOCAB,
    PAD,
    SIZES,
    batch,
    cache_argument,
    keep_in,
    logits,
    make_model,
    reply,
    state,
)
from makers import DictRegistry, make_vector
from mien import reference
from mien.errors import ModelMismatch, RecipeError, RuntimeNotSupported, SteeringNotApplied, VectorError
from mien.fingerprint import Fingerprint
from mien.recipe import Recipe, Term, parse
from mien.runtimes.hf import HFRuntime
from mien.runtimes.hf_layers import find_layers
from mien.steering import Steering
from mien.vector import Vector
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)


@pytest.fixture
def model() -> Any:
    return make_model()


@pytest.fixture
def steering(model: Any) -> Iterator[Steering]:
    with attach(model) as steering:
        yield steering


def vectors(n_layer: int = N_LAYER, n_embd: int = N_EMBD) -> list[Vector]:
    layers = range(1, n_layer)
    shapes: dict[str, Any] = {"joy": layers, "anger": layers, "one": [2]}
    return [
        make_vector(name, layers, seed, None, n_embd) for seed, (name, layers) in enumerate(shapes.items())
    ]


def attach(model: Any, **options: Any) -> Steering:
    return mien.attach(model, registry=DictRegistry(*vectors()), **options)  # type: ignore[arg-type]


def direction_of_one() -> Any:
    return torch.tensor(vectors()[2].directions[2])


# ---- where it acts ----

# Sizes for families whose configuration has other names or more of them.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "mixtral": {"num_local_experts": 4},  # as many experts as layers: a list of them must not be taken
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "phi": {},
    "phi3": {"pad_token_id": 0},
    "gpt2": {"n_embd": N_EMBD, "n_layer": N_LAYER, "n_head": 4},
    "gpt_neo": {"num_layers": N_LAYER, "num_heads": 4, "attention_types": [[["global", "local"], 2]]},
    "gpt_neox": {},
    "gptj": {"n_embd": N_EMBD, "n_layer": N_LAYER, "n_head": 4, "rotary_dim": 4},
    "falcon": {"num_kv_heads": 4},
    "bloom": {"n_layer": N_LAYER, "n_head": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": N_EMBD},
    "olmo": {},
    "olmo2": {},
    "starcoder2": {},
    "stablelm": {},
    "cohere": {},
    "granite": {},
    "mpt": {"d_model": N_EMBD, "n_layers": N_LAYER, "n_heads": 4},
    "codegen": {"n_embd": N_EMBD, "n_layer": N_LAYER, "n_head": 4, "rotary_dim": 4},
    "smollm3": {},
    "glm": {"head_dim": 8},
}


def family(name: str) -> Any:
    torch.manual_seed(0)
    sizes = {} if "n_embd" in FAMILIES[name] or "d_model" in FAMILIES[name] else SIZES
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(name, **{**sizes, "vocab_size": N_VOCAB, **special, **FAMILIES[name]})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layers_of_a_family_are_found_and_steered_where_hidden_states_say(name: str) -> None:
    model = family(name)
    with attach(model) as steering, torch.no_grad():
        assert steering.model.n_layer == N_LAYER
        plain = model(input_ids=IDS, output_hidden_states=True).hidden_states
        steering.set("one")
        steered = model(input_ids=IDS, output_hidden_states=True).hidden_states
        direction = direction_of_one()
        for block in (0, 1):
            assert torch.equal(steered[block + 1], plain[block + 1])
        assert torch.equal(steered[3], plain[3] + direction)
        rows = steering.capture(IDS[0].tolist(), [2], IDS.shape[1])
        np.testing.assert_allclose(rows[0], steered[3][0].numpy(), rtol=1e-5, atol=1e-5)
        assert steering.applied.layers[2].rows == IDS.shape[1]


def test_an_unknown_model_is_asked_for_its_layers() -> None:
    model = make_model()
    model.model.extra = nn.ModuleList(nn.Identity() for _ in range(N_LAYER))
    with pytest.raises(RuntimeNotSupported, match=r"model\.layers and model\.extra both are lists"):
        mien.attach(model)
    for layers in ("model.layers", list(model.model.layers)):
        with attach(model, layers=layers) as steering:
            plain = logits(model)
            steering.set("joy")
            assert not torch.equal(logits(model), plain)
    with pytest.raises(RuntimeNotSupported, match=r"expected one of model\.layers, model\.extra"):
        mien.attach(model, layers="layers")
    with pytest.raises(RuntimeNotSupported, match="modules of the model"):
        mien.attach(model, layers=[nn.Identity()])
    model.config.num_hidden_layers = 7
    with pytest.raises(RuntimeNotSupported, match=r"no list of 7 modules.*one of model\.layers \(4\)"):
        mien.attach(model)


def test_what_can_not_be_steered_is_refused() -> None:
    with torch.device("meta"):
        model = make_model()
    with pytest.raises(RuntimeNotSupported, match="meta device"):
        mien.attach(model)
    small = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 8}
    with pytest.raises(RuntimeNotSupported, match="encoder-decoder"):
        mien.attach(T5ForConditionalGeneration(T5Config(**small)))


def test_the_wrong_pack_or_model_is_refused() -> None:
    other = Fingerprint("llama", N_LAYER + 1, N_EMBD)
    alien = make_vector("alien", fingerprint=other)
    model = make_model()
    with attach(model) as steering:
        with pytest.raises(ModelMismatch, match="made for layers 5, the model has 4"):
            steering.set(alien)
        with pytest.raises(ModelMismatch, match="7 values a layer, the model 32"):
            steering.set(make_vector("narrow", [1], fingerprint=None, n_embd=7))
        assert steering.recipe == Recipe()
    gpt2 = family("gpt2")
    with mien.attach(gpt2) as steering, pytest.raises(ModelMismatch, match="architecture llama"):
        steering.set(make_vector("alien", fingerprint=Fingerprint("llama", N_LAYER, N_EMBD)))


# ---- bit-identical, and nothing left ----


def test_detaching_leaves_no_hook_no_attribute_and_no_reference() -> None:
    model = make_model()
    plain, before = logits(model), state(model)
    steering = attach(model)
    assert state(model) != before
    steering.set("joy")
    assert not torch.equal(logits(model), plain)
    reply(model)
    steering.detach()
    assert state(model) == before
    assert torch.equal(logits(model), plain)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_model_dropped_while_attached_is_freed() -> None:
    model = make_model()
    steering = attach(model)
    steering.set("joy")
    reply(model)
    gone = weakref.ref(model)
    del model, steering
    gc.collect()
    assert gone() is None


def test_other_peoples_hooks_stay_and_see_the_block_as_steered(model: Any) -> None:
    seen = []
    layer = model.model.layers[2]
    layer.register_forward_hook(keep_in(seen))
    logits(model)
    with attach(model) as steering:
        layer.register_forward_hook(keep_in(seen))
        steering.set("one")
        logits(model)
    logits(model)
    plain, first, second, after, again = seen
    assert torch.equal(first, plain + direction_of_one())
    assert torch.equal(first, second)
    assert torch.equal(after, plain)
    assert torch.equal(again, plain)


def test_layers_are_never_attached_twice(model: Any) -> None:
    """Neither through the same model nor through one inside of it or around it: the dose would double."""
    before = state(model)
    for outer, inner in ((model, model), (model, model.model), (model.model, model)):
        with attach(outer), pytest.raises(RuntimeNotSupported, match="attached already"):
            HFRuntime(inner)
        assert state(model) == before


def test_a_copy_and_a_pickle_of_an_attached_model_are_plain(model: Any) -> None:
    plain, answer = logits(model), reply(model)
    with attach(model) as steering:
        steering.set("5*joy")
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(other), plain)
            assert reply(other) == answer
            with attach(other) as again:
                again.set("5*joy")
                assert torch.equal(logits(other), logits(model))
                again.clear()
                assert torch.equal(logits(other), plain)
        assert reply(model) != answer


def own_generate(*_: Any, **__: Any) -> str:
    return "own"


@pytest.mark.parametrize("own", ["function", "partial", "method"])
@pytest.mark.parametrize("change", ["detached", "moved", "copied", "pickled"])
def test_a_generate_of_the_models_own_is_kept(model: Any, own: str, change: str) -> None:
    kinds = {"function": own_generate, "partial": partial(own_generate, 1), "method": model.generate}
    model.generate = kinds[own]
    answer = model.generate(IDS, max_new_tokens=2)
    with attach(model) as steering:
        kept = model
        if change == "moved":  # to another owner of the layers
            model.model = make_model().model
            steering.set("joy")
        elif change != "detached":
            kept = copy.deepcopy(model) if change == "copied" else pickle.loads(pickle.dumps(model))
        steering.clear()
        assert own == "method" or model.generate(IDS, max_new_tokens=2) == answer
    assert model.generate is kinds[own]
    found = kept.generate
    assert type(found) is type(kinds[own])
    assert getattr(found, "__self__", kept) is kept
    assert own == "method" or found(IDS) == answer


def test_saving_an_attached_model_saves_the_plain_one(model: Any, tmp_path: Path) -> None:
    plain = logits(model)
    with attach(model) as steering:
        steering.set("joy")
        model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), plain)
    assert loaded.config.architectures == ["LlamaForCausalLM"]


# ---- the floats ----


def expected_at(model: Any, layer: int, operation: Callable[..., Any], direction: Any) -> Any:
    """What `operation` makes of the block's plain output."""
    plain = model(input_ids=IDS, output_hidden_states=True).hidden_states[layer + 1]
    return operation(plain.float().numpy(), direction)


@torch.no_grad()
@pytest.mark.parametrize("keep_norm", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_each_operation_is_the_reference_in_every_dtype(
    keep_norm: bool, dtype: Any, tolerance: float
) -> None:
    operation = reference.add_keep_norm if keep_norm else reference.add
    model = make_model().to(dtype)
    one = vectors()[2]
    expected = expected_at(model, 2, operation, one.directions[2])
    with attach(model) as steering:
        steering.set(Recipe((Term(1.0, "one", keep_norm=keep_norm),)))
        got = model(input_ids=IDS, output_hidden_states=True).hidden_states[3]
        assert got.dtype == dtype
        np.testing.assert_allclose(got.float().numpy(), expected, rtol=tolerance, atol=tolerance)
        done = steering.applied.layers[2]
        plain = make_model().to(dtype)(input_ids=IDS, output_hidden_states=True).hidden_states[3]
        moved = (got.double() - plain.double())[0].norm(dim=1)
        assert done.rows == IDS.shape[1]
        assert done.shift == pytest.approx(float((moved**2).mean().sqrt()), rel=10 * tolerance)
        assert done.path == ("engine" if dtype == torch.float32 else "torch")


@torch.no_grad()
def test_the_engine_and_torch_do_the_same(model: Any) -> None:
    """Autograd takes torch's path in float32, so the two can be put side by side."""
    recipe = "joy - 0.5*anger(keep_norm=True)"
    ids = batch([IDS[0], IDS[0, :3]], "left")
    with attach(model) as steering:
        steering.set(recipe)
        engine = model(**ids).logits
        paths = {done.path for done in steering.applied.layers.values()}
        shifts = [done.shift for done in steering.applied.layers.values()]
        with torch.enable_grad():
            through_torch = model(**ids).logits.detach()
        assert paths == {"engine"}
        assert {done.path for done in steering.applied.layers.values()} == {"torch"}
        assert [done.shift for done in steering.applied.layers.values()] == pytest.approx(shifts, rel=1e-4)
        assert {done.rows for done in steering.applied.layers.values()} == {10}
    real = ids["attention_mask"].bool()
    torch.testing.assert_close(through_torch[real], engine[real])


@pytest.mark.parametrize("threads", [1, 3])
def test_large_batches_are_shared_out_among_threads(threads: int) -> None:
    """More floats in a layer's output than go through in one piece, with rows that are not steered."""
    model = make_model(hidden_size=512, num_hidden_layers=3)
    joy = make_vector("joy", [1, 2], 0, None, 512) * 0.1
    ids = torch.arange(3 * 700).reshape(3, 700) % N_VOCAB
    mask = torch.ones_like(ids)
    mask[2, :100] = 0
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with mien.attach(model) as steering:
            steering.set([joy, None, Recipe((Term(1.0, joy, keep_norm=True),))])
            together = logits(model, ids, attention_mask=mask)
            applied = steering.applied.layers[1]
            steering.set(joy)
            torch.testing.assert_close(together[0], logits(model, ids[:1])[0], rtol=1e-4, atol=1e-4)
            steering.clear()
            torch.testing.assert_close(together[1], logits(model, ids[1:2])[0], rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(before)
    assert (applied.rows, applied.path) == (700 + 600, "engine")


def test_a_dose_that_half_precision_can_not_hold_is_refused() -> None:
    model = make_model().half()
    with attach(model) as steering:
        steering.set("1e5*joy")
        with pytest.raises(VectorError, match=r"does not fit into torch\.float16"):
            logits(model)
        steering.clear()
        logits(model)


def test_a_layer_with_another_dtype_of_output_is_steered_in_that_dtype(model: Any) -> None:
    """As layers of quantised models do, which compute in half precision between float32 ones."""

    class Half(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.layer(*args, **kwargs).to(torch.bfloat16)

    model.model.layers[2] = Half(model.model.layers[2])
    model.model.layers[3].register_forward_pre_hook(lambda module, args: (args[0].float(), *args[1:]))
    with attach(model) as steering:
        steering.set("joy")
        seen = []
        model.model.layers[2].register_forward_hook(lambda module, args, output: seen.append(output))
        logits(model)
        assert seen[0].dtype == torch.bfloat16
        paths = {layer: done.path for layer, done in steering.applied.layers.items()}
        assert paths == {1: "engine", 2: "torch", 3: "engine"}


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("keyword", [False, True])
def test_a_layer_that_gives_its_input_back_is_not_changed_under_its_feet(
    model: Any, keyword: bool, watched: bool
) -> None:
    class Nothing(nn.Module):
        def forward(self, hidden_states: Any, **_: Any) -> Any:
            return hidden_states

    class ByName(nn.Module):
        """Gives a layer its input by name."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = Nothing()

        def forward(self, hidden_states: Any, **_: Any) -> Any:
            return self.inner(hidden_states=hidden_states)

    model.model.layers[2] = ByName() if keyword else Nothing()
    layers = [*model.model.layers]
    if keyword:
        layers[2] = layers[2].inner
    with attach(model, layers=layers) as steering:
        if watched:
            steering.watch("one")
        states = []
        model.model.layers[1].register_forward_hook(lambda module, args, output: states.append(output))
        steering.set("one")
        logits(model)
        kept = states[0].clone()
        steering.clear()
        states.clear()
        logits(model)
        assert torch.equal(kept, states[0])


def test_steering_that_did_not_happen_is_an_error(model: Any) -> None:
    with attach(model) as steering:
        steering.set("joy")
        kept = model.model.layers[2]
        hooks = dict(kept._forward_hooks)
        kept._forward_hooks.clear()
        with pytest.raises(SteeringNotApplied, match=r"layers \[2\] were not run"):
            logits(model)
        kept._forward_hooks.update(hooks)
        logits(model)
        kept.register_forward_hook(lambda module, args, output: output[..., :-1], prepend=True)
        with pytest.raises(SteeringNotApplied, match=r"layer 2: expected activations \(1, 7, 32\)"):
            logits(model)


# ---- rows and padding ----

ROWS = [[5, 9, 2, 33, 60, 7, 11], [8, 3], [40, 41, 42, 43]]
RECIPES = ["joy", None, "-0.5*anger(keep_norm=True)"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("recipes", [None, "joy", RECIPES], ids=["plain", "one", "rows"])
def test_padding_never_changes_a_result(side: str, recipes: Any, dtype: Any) -> None:
    model = make_model().to(dtype)
    with attach(model) as steering:
        alone = []
        for i, row in enumerate(ROWS):
            steering.set(recipes[i] if isinstance(recipes, list) else recipes)
            alone.append(logits(model, torch.tensor([row]))[0])
        steering.set(recipes)
        inputs = batch(ROWS, side, 9)
        together = logits(model, inputs["input_ids"], **{k: v for k, v in inputs.items() if k != "input_ids"})
        for i, expected in enumerate(alone):
            real = inputs["attention_mask"][i].bool()
            torch.testing.assert_close(together[i, real], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_never_steered(dtype: Any) -> None:
    model = make_model().to(dtype)
    inputs = batch(ROWS, "left")
    padding = inputs["attention_mask"] == 0
    states: list[Any] = []
    with attach(model) as steering:
        model.model.layers[1].register_forward_hook(
            lambda module, args, output: states.append(output.clone())
        )
        for recipe in (None, "joy"):
            steering.set(recipe)
            with torch.no_grad():
                model(**inputs)
        plain, steered = states
        assert torch.equal(plain[padding], steered[padding])
        assert not (plain == steered).all(dim=2)[~padding].any()
        assert {done.rows for done in steering.applied.layers.values()} == {int((~padding).sum())}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_each_row_of_a_generation_has_its_recipe(model: Any, side: str, cache: str | None) -> None:
    if side == "right":  # generate() appends to the row: only rows of one length can be padded so
        rows, padded = [row[:2] for row in ROWS], [row[:2] for row in ROWS]
    else:
        rows, padded = ROWS, ROWS
    with attach(model) as steering:
        alone = []
        for row, recipe in zip(rows, RECIPES):
            steering.set(recipe)
            alone += reply(model, torch.tensor([row]))
        steering.set(RECIPES)
        inputs = batch(padded, side)
        options = {"cache_implementation": cache} if cache == "static" else {"use_cache": cache is not None}
        assert reply(model, inputs["input_ids"], attention_mask=inputs["attention_mask"], **options) == alone
        assert len({tuple(answer) for answer in alone}) == 3


def test_beams_and_samples_keep_the_recipe_of_their_row(model: Any) -> None:
    rows = batch([ROWS[0], ROWS[0]], "left")
    ids, mask = rows["input_ids"], rows["attention_mask"]
    with attach(model) as steering:
        alone = []
        for recipe in ("2*joy", None):
            steering.set(recipe)
            alone += reply(model, ids[:1], num_beams=3)
        steering.set(["2*joy", None])
        assert reply(model, ids, attention_mask=mask, num_beams=3) == alone
        assert alone[0] != alone[1]
        torch.manual_seed(0)
        many = reply(model, ids, attention_mask=mask, do_sample=True, num_return_sequences=4, top_k=1)
        assert many[:4] == [reply(make_model_steered("2*joy"), ids[:1])[0]] * 4
        assert many[4:] == [reply(make_model(), ids[:1])[0]] * 4


def make_model_steered(recipe: str) -> Any:
    model = make_model()
    attach(model).set(recipe)
    return model


def test_a_wrong_number_of_row_recipes_is_refused_before_anything_runs(model: Any) -> None:
    with attach(model) as steering:
        steering.set(["joy", None])
        with pytest.raises(RecipeError, match="since 2 row recipes are set; got 1"):
            logits(model)
        with pytest.raises(RecipeError, match="expected a batch of 2 rows"):
            reply(model, num_beams=2)
        steering.set(["joy"])
        with pytest.raises(RecipeError, match="expected a batch of 1 rows"):
            logits(model, IDS.repeat(3, 1))
        with pytest.raises(RecipeError, match="empty list"):
            steering.set([])
        assert [str(recipe) for recipe in steering.recipes] == ["joy"]
        with pytest.raises(RecipeError, match="ask for `recipes`"):
            _ = steering.recipe
        with steering("anger"):
            assert steering.recipe == parse("anger")
        assert len(steering.recipes) == 1
        logits(model)
        assert str(steering.applied).startswith("joy at 3 layers")


def test_rows_of_which_none_is_steered_now(model: Any) -> None:
    ids = IDS.repeat(2, 1)
    with attach(model) as steering:
        plain = logits(model, ids)
        steering.set(["joy(when='response')", None])
        assert torch.equal(logits(model, ids), plain)
        assert str(steering.applied) == "nothing was steered"


def test_a_layer_called_on_its_own_is_steered(model: Any) -> None:
    layer, h = model.model.layers[2], torch.ones(1, 3, N_EMBD)
    arguments = {"position_embeddings": model.model.rotary_emb(h, torch.arange(3)[None])}
    with attach(model) as steering:
        plain = layer(h, **arguments)
        logits(model, IDS[:, :3])
        for recipe, factor in (("one", 1), ("2*one", 2)):
            steering.set(recipe)
            torch.testing.assert_close(layer(h, **arguments), plain + factor * direction_of_one())


def test_a_static_cache_in_somebodys_own_loop(model: Any) -> None:
    """Prompt with padding, then token by token, against the same without a cache."""
    inputs = batch(ROWS[:2], "left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with attach(model) as steering:
        steering.set(["joy(when='response')", "anger(when='prompt') + joy"])
        whole = reply(model, ids, attention_mask=mask, count=3)
        cache = cache_argument(StaticCache(model.config, max_cache_len=16))
        with torch.no_grad():
            found = model(**inputs, **cache)
            answer = []
            positions = inputs["position_ids"][:, -1:]
            for _ in range(3):
                more = found.logits[:, -1].argmax(-1, keepdim=True)
                answer.append(more)
                mask = torch.cat([mask, torch.ones_like(more)], dim=1)
                positions = positions + 1
                found = model(input_ids=more, attention_mask=mask, position_ids=positions, **cache)
        assert torch.cat(answer, dim=1).tolist() == whole


# ---- prompt and response ----


class _Counted:
    """How many rows were steered in each pass of a generation."""

    def __init__(self, model: Any, steering: Steering) -> None:
        self.rows: list[int] = []
        self._steering = steering
        model.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        layers = self._steering.applied.layers
        self.rows.append(layers[1].rows if layers else 0)


@pytest.mark.parametrize(
    ("recipe", "rows"),
    [("joy", [7, 1, 1]), ('joy(when="prompt")', [7, 0, 0]), ('joy(when="response")', [0, 1, 1])],
)
def test_the_prompt_is_what_generate_is_given(model: Any, recipe: str, rows: list[int]) -> None:
    with attach(model) as steering:
        steering.set(recipe)
        counted = _Counted(model, steering)
        reply(model, count=3)
        assert counted.rows == rows
        counted.rows.clear()
        reply(model, count=3, use_cache=False)
        given, made = rows[0], rows[1]
        assert counted.rows == [given, given + made, given + 2 * made]
        # Chunks, which some versions compile, so that they are not counted.
        assert reply(model, count=3, prefill_chunk_size=4) == reply(model, count=3)


def test_a_continued_cache_counts_from_where_it_was(model: Any) -> None:
    """The second call is given one more token of prompt: a pass over one token, and still prompt."""
    with attach(model) as steering:
        steering.set('joy(when="prompt")')
        counted = _Counted(model, steering)
        found = model.generate(
            IDS, do_sample=False, max_new_tokens=3, pad_token_id=PAD, return_dict_in_generate=True
        )
        (named,) = cache_argument(None)
        cache = {named: found[named]}
        longer = torch.cat([found.sequences, torch.tensor([[17]])], dim=1)
        counted.rows.clear()
        model.generate(longer, do_sample=False, max_new_tokens=3, pad_token_id=PAD, **cache)
        assert counted.rows == [2, 0, 0]  # the last token of the reply was never evaluated, and the new one


def test_embeddings_in_place_of_tokens_are_a_prompt_too(model: Any) -> None:
    with attach(model) as steering:
        steering.set('joy(when="prompt")')
        counted = _Counted(model, steering)
        model.generate(
            inputs_embeds=model.get_input_embeddings()(IDS),
            do_sample=False,
            max_new_tokens=3,
            pad_token_id=PAD,
        )
        assert counted.rows == [7, 0, 0]


def test_an_assistants_drafts_are_response(model: Any) -> None:
    small = make_model(seed=1)
    with attach(model) as steering:
        steering.set("joy")
        steered = reply(model, count=8)
        steering.set('0.5*joy(when="prompt") + joy(when="response")')
        expected = reply(model, count=8)
        assert reply(model, count=8, assistant_model=small) == expected
        assert steered != expected or reply(make_model(), count=8) != expected


def test_the_recipe_may_change_between_two_tokens(model: Any) -> None:
    class Change:
        """A streamer is called after each token."""

        def __init__(self, steering: Steering) -> None:
            self.steering, self.count = steering, 0

        def put(self, _: Any) -> None:
            self.count += 1
            if self.count == 4:  # the prompt comes first
                self.steering.set("3*anger")

        def end(self) -> None:
            pass

    with attach(model) as steering:
        steering.set("joy")
        before = reply(model, count=8)[0]
        changed = reply(model, count=8, streamer=Change(steering))[0]
    assert changed[:3] == before[:3]
    assert changed != before


# ---- ways to run a model ----


def test_a_pipeline_is_steered(model: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    words = {f"w{i}": i for i in range(N_VOCAB)}
    words["<pad>"] = words.pop("w0")
    inner = Tokenizer(models.WordLevel(words, unk_token="w1"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", padding_side="left")
    run = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = ["w5 w9 w2 w33", "w8"]

    def answers(texts: list[str], size: int) -> list[str]:
        found = run(texts, max_new_tokens=5, do_sample=False, return_full_text=False, batch_size=size)
        return [answer[0]["generated_text"] for answer in found]

    plain = answers(texts, 1)
    with attach(model) as steering:
        steering.set("joy")
        first = answers(texts[:1], 1)
        steering.set(["joy", None])
        assert answers(texts, 2) == [first[0], plain[1]]
        assert first[0] != plain[0]
    assert answers(texts, 2) == plain


@pytest.mark.usefixtures("all_processors")
def test_inference_mode_and_threads(model: Any) -> None:
    """Four threads run one model, each batch having another shape."""
    with attach(model) as steering:
        steering.set("joy")
        alone = [logits(model, IDS[:, : i + 2]) for i in range(4)]
        found: list[Any] = [None] * 4

        def work(i: int) -> None:
            with torch.inference_mode():
                for _ in range(20):
                    steering.set("joy")  # swapping goes on at the same time
                    found[i] = model(input_ids=IDS[:, : i + 2]).logits

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for expected, got in zip(alone, found):
            torch.testing.assert_close(got, expected)


def test_layers_offloaded_to_the_cpu_and_the_disk_are_steered(tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload

    expected = logits(make_model_steered("joy"))
    for offload in (
        lambda model: disk_offload(model, tmp_path, execution_device="cpu"),
        lambda model: cpu_offload(model, execution_device="cpu"),
    ):
        model = make_model()
        offload(model)
        assert next(model.model.layers[1].parameters()).is_meta
        with attach(model) as steering:
            steering.set("joy")
            assert torch.equal(logits(model), expected)
            assert steering.capture([1, 2, 3]).shape == (N_LAYER, 1, N_EMBD)


def test_a_model_that_moves_or_changes_dtype_after_attaching(model: Any) -> None:
    with attach(model) as steering:
        steering.set("joy")
        expected = logits(model)
        model.to(torch.float64)
        torch.testing.assert_close(logits(model).float(), expected)
        model.to(torch.float32)
        assert torch.equal(logits(model), expected)


# ---- torch.compile ----


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's own, while it traces
def test_compiled_without_a_break_and_changed_without_compiling_again(
    model: Any, fresh_compiler: None
) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    inputs = batch(ROWS[:2], "left")
    real = inputs["attention_mask"].bool()
    steering = attach(model)
    expected = {}
    recipes: list[Any] = [
        "joy",
        "anger - 0.2*joy",
        "0.3*joy(keep_norm=True)",
        ["joy", None],
        'joy(when="prompt")',
    ]
    for recipe in recipes:
        steering.set(recipe)
        expected[str(recipe)] = model(**inputs).logits
    steering.clear()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    plain = compiled(**inputs).logits
    torch.testing.assert_close(plain[real], model(**inputs).logits[real])
    for recipe in recipes:
        steering.set(recipe)
        torch.testing.assert_close(compiled(**inputs).logits[real], expected[str(recipe)][real])
        assert {done.path for done in steering.applied.layers.values()} == {"compiled, not counted"}
    count = counter.frame_count
    for dose in (0.1, 0.2, 0.3):
        steering.set(f"{dose}*joy")
        compiled(**inputs)
    steering.clear()
    assert torch.equal(compiled(**inputs).logits, plain)
    assert counter.frame_count == count
    steering.detach()
    assert torch.equal(compiled(**inputs).logits, plain)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's own, while it traces
def test_attaching_to_a_model_compiled_before_is_seen(model: Any, fresh_compiler: None) -> None:
    """Dynamo does not look whether a module that had no hooks has some now."""
    compiled = torch.compile(model, backend="eager")
    plain = compiled(input_ids=IDS).logits
    with attach(model) as steering:
        assert torch.equal(compiled(input_ids=IDS).logits, plain)
        steering.set("joy")
        torch.testing.assert_close(compiled(input_ids=IDS).logits, logits(model))
        assert not torch.equal(compiled(input_ids=IDS).logits, plain)
    assert torch.equal(compiled(input_ids=IDS).logits, plain)


# ---- gradients ----


@pytest.mark.parametrize("keep_norm", [False, True])
def test_gradients_go_through_a_steered_layer(model: Any, keep_norm: bool) -> None:
    """The gradient of the embeddings, against finite differences in float64."""
    model = model.double()
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()

    def loss(embeddings: Any) -> Any:
        return model(inputs_embeds=embeddings).logits[0, -1].logsumexp(0)

    with attach(model) as steering:
        steering.set(Recipe((Term(0.5, "joy", keep_norm=keep_norm),)))
        loss(embedded).backward()
        direction = torch.randn_like(embedded)
        with torch.no_grad():
            rise = (loss(embedded + 1e-4 * direction) - loss(embedded - 1e-4 * direction)) / 2e-4
        assert float((embedded.grad * direction).sum()) == pytest.approx(float(rise), rel=1e-3, abs=1e-6)


def test_an_addition_passes_gradients_through_unchanged() -> None:
    """At the last block the derivative of h + v is that of h, bit for bit."""
    grads = []
    for recipe in (None, Recipe((Term(1.0, make_vector("last", [N_LAYER - 1], 3, None, N_EMBD)),))):
        model = make_model()
        with attach(model) as steering:
            steering.set(recipe)
            states: list[Any] = []
            model.model.layers[-1].register_forward_hook(keep_in(states))
            found = model.model.embed_tokens(IDS).detach().requires_grad_()
            model.model(inputs_embeds=found)
            states[0].sum().backward()
            grads.append(found.grad)
    assert torch.equal(grads[0], grads[1])


@pytest.mark.filterwarnings("ignore:.*use_cache.*")  # transformers says that it turns the cache off
def test_training_with_gradient_checkpointing_is_the_same(model: Any) -> None:
    inputs = batch(ROWS, "right")
    grads = []
    for checkpointing in (False, True):
        model = make_model()
        model.train()
        if checkpointing:
            named = "activation_checkpointing_enable"  # what transformers 5 calls it
            enable = getattr(model, named, None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        with attach(model) as steering:
            steering.set(RECIPES)
            model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        grads.append(model.model.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_mixtral_experts_are_not_taken_for_layers() -> None:
    config = MixtralConfig(**SIZES, num_local_experts=N_LAYER)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert find_layers(model).path == "model.layers"
