"""The sites of llama.cpp models: that they are found, and that each is what its name says.

mien's sites are tried against each other and against the weights in the file. Blocks are looked at by
capturing what they put out; block n has what block n - 1 puts out and adds its attention and its MLP.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import gguf
import llama_cpp.llama_cpp as api
import mien
import numpy as np
import pytest
from llama_batches import Contexts, Row, evaluate_all
from makers import DictRegistry
from mien.recipe import Recipe, Term
from mien.runtimes.llama_text import load_llama
from mien.steering import Steering
from mien.vector import SITES, Floats, Vector
from mien.watch import Token
from tiny import ARCHITECTURES, N_VOCAB, build
from tiny_hybrids import ATTENTION_LAYERS, build_plamo2

N_EMBD, N_FF, N_EXPERT, USED = 64, 96, 4, 2
MIXTURES = ["mixtral", "qwen2moe", "qwen3moe"]
WIDE_HEADS = ["llama", "mixtral", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "plamo2"]
POST_NORMS = ["gemma2", "gemma3", "olmo2", "plamo2"]
PATHS = ["in-graph", "post-compute"]
TOKENS = np.random.default_rng(0).integers(3, N_VOCAB, size=12).tolist()


@dataclass
class Model:
    """One architecture, attached. weights: the file's, by name, rows first."""

    name: str
    path: Path
    steering: Steering
    weights: dict[str, Floats]

    def rows(self, *terms: Term, last: int = len(TOKENS)) -> Floats:
        """What blocks put out under those terms: float32 (n_layer, last, N_EMBD)."""
        self.steering.set(Recipe(terms))
        return self.steering.capture(TOKENS, last=last)

    @property
    def n_layer(self) -> int:
        return self.steering.model.n_layer

    def layers(self, site: str) -> list[int]:
        return [layer for layer in range(self.n_layer) if self.has(site, layer)]

    def has(self, site: str, layer: int) -> bool:
        try:
            return bool(self.width(site, layer))
        except mien.SiteNotFound:
            return False

    def width(self, site: str, layer: int) -> int:
        return int(self.steering._attached().width(site, layer))


def load(path: Path, **options: Any) -> Any:
    return load_llama(path, **{"n_ctx": 64, "n_batch": 64, "n_ubatch": 64, "n_threads": 1, **options})


@pytest.fixture(scope="module", params=[*ARCHITECTURES, "plamo2"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = tmp_path_factory.mktemp("tiny")
    path = build_plamo2(folder) if request.param == "plamo2" else build(request.param, folder).gguf
    llm = load(path)
    weights = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    yield Model(request.param, path, mien.attach(llm), weights)
    llm.close()


@pytest.fixture
def model(loaded: Model) -> Iterator[Model]:
    yield loaded
    loaded.steering.clear()


def silenced(model: Model, site: str, layer: int) -> Term:
    """Every float there times zero."""
    width = model.width(site, layer)
    return Term(-1.0, Vector("ones", (layer,), np.ones((1, width), np.float32), site=site), operator="scale")


def added(site: str, layer: int, row: Any) -> Term:
    return Term(1.0, Vector("added", (layer,), np.asarray(row, np.float32)[None], site=site))


def noise(width: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(width).astype(np.float32)


# ---- what is found ----


def test_all_sites_are_found_or_why_not_is_said(model: Model) -> None:
    every = range(model.n_layer)
    heads = 128 if model.name in WIDE_HEADS else 64
    expected = {site: dict.fromkeys(every, N_EMBD) for site in ("residual", "attention", "mlp")}
    expected["heads"] = dict.fromkeys(every, heads)
    missing = {}
    if model.name in MIXTURES:
        expected["experts"] = dict.fromkeys(every, N_EXPERT)
        missing["neurons"] = "its MLPs are mixtures of experts"
    else:
        expected["neurons"] = dict.fromkeys(every, N_FF)
        missing["experts"] = "the model is no mixture of experts"
    if model.name == "plamo2":  # whose other blocks are Mambas
        for site in ("attention", "heads"):
            expected[site] = {layer: expected[site][layer] for layer in ATTENTION_LAYERS}
    found = {site: {n: model.width(site, n) for n in model.layers(site)} for site in SITES}
    assert {site: widths for site, widths in found.items() if widths} == expected
    said = model.steering.describe()
    assert {site for site in SITES if site in said["sites"].split(", ")} == set(expected)
    reasons = {key.removeprefix("site "): why for key, why in said.items() if key.startswith("site ")}
    assert reasons == {site: f"not found: {why}" for site, why in missing.items()}


def test_a_site_that_the_model_lacks_is_said_before_anything_changes(model: Model) -> None:
    lacking = "neurons" if model.name in MIXTURES else "experts"
    width = N_FF if lacking == "neurons" else N_EXPERT
    before = model.rows(kept := added("residual", 1, noise(N_EMBD)))
    recipe = model.steering.recipe
    with pytest.raises(mien.SiteNotFound, match=f"no site {lacking!r} in layer 2: .*mixture") as error:
        model.steering.set(Recipe((kept, added(lacking, 2, noise(width)))))
    assert (error.value.site, error.value.layer) == (lacking, 2)
    if model.name == "plamo2":
        with pytest.raises(mien.SiteNotFound, match="no site 'heads' in layer 2: the model has none there"):
            model.steering.set(Recipe((kept, added("heads", 2, noise(128)))))
    assert model.steering.recipe is recipe
    assert np.array_equal(model.steering.capture(TOKENS, last=len(TOKENS)), before)


def test_widths_are_checked_before_anything_changes(model: Model) -> None:
    before = model.rows(added("residual", 1, noise(N_EMBD)))
    recipe = model.steering.recipe
    for site in SITES:
        for layer in model.layers(site)[-1:]:
            width = model.width(site, layer)
            for wrong in (width - 1, width + 1):
                with pytest.raises(mien.ModelMismatch, match=f"it has {wrong} values.*model {width}"):
                    model.steering.set(Recipe((added(site, layer, noise(wrong)),)))
    assert model.steering.recipe is recipe
    assert np.array_equal(model.steering.capture(TOKENS, last=len(TOKENS)), before)


# ---- each is what its name says ----


def test_a_block_adds_its_attention_and_its_mlp_and_nothing_else(model: Model) -> None:
    for layer in set(model.layers("attention")) - {0}:
        silent = [silenced(model, site, layer) for site in ("attention", "mlp")]
        rows = model.rows(*silent)
        assert np.array_equal(rows[layer], rows[layer - 1])
        for site in silent:
            rows = model.rows(site)
            assert not np.isclose(rows[layer], rows[layer - 1]).all(axis=1).any()
        # the rows that the last block computes, where not all are asked for
        rows = model.rows(*silent, last=1)
        assert np.array_equal(rows[layer], rows[layer - 1])


def test_a_change_shows_in_its_layer_and_in_later_ones_alone(model: Model) -> None:
    plain = model.rows()
    for site in SITES:
        for layer in model.layers(site):
            if layer == 0 and site == "residual":
                continue
            size = 100 if site == "experts" else 3
            rows = model.rows(added(site, layer, size * noise(model.width(site, layer), layer)))
            assert np.array_equal(rows[:layer], plain[:layer])
            assert not np.isclose(rows[layer], plain[layer]).all()
            places = {"residual": model.steering.applied.layers, **model.steering.applied.sites}
            assert {name: list(done) for name, done in places.items() if done} == {site: [layer]}
            assert places[site][layer].rows == len(TOKENS)


def bias_of(model: Model, name: str) -> Floats | None:
    return model.weights.get(f"{name}.bias")


@pytest.mark.parametrize(
    ("inner", "outer", "weight"), [("heads", "attention", "attn_output"), ("neurons", "mlp", "ffn_down")]
)
def test_silent_heads_and_neurons_leave_the_bias_of_what_they_go_into(
    model: Model, inner: str, outer: str, weight: str
) -> None:
    for layer in model.layers(inner):
        bias = bias_of(model, f"blk.{layer}.{weight}")
        terms = [silenced(model, outer, layer), *([added(outer, layer, bias)] if bias is not None else [])]
        assert np.array_equal(model.rows(silenced(model, inner, layer)), model.rows(*terms))


@pytest.mark.parametrize(
    ("inner", "outer", "weight"), [("heads", "attention", "attn_output"), ("neurons", "mlp", "ffn_down")]
)
def test_heads_and_neurons_are_the_columns_of_the_weight_that_they_go_into(
    model: Model, inner: str, outer: str, weight: str
) -> None:
    for layer in model.layers(inner)[-2:]:
        matrix = model.weights[f"blk.{layer}.{weight}.weight"]
        assert matrix.shape == (N_EMBD, model.width(inner, layer))
        for column in (0, matrix.shape[1] // 2 + 1, matrix.shape[1] - 1):
            row = np.zeros(matrix.shape[1])
            row[column] = 2.0
            ours = model.rows(added(inner, layer, row))
            theirs = model.rows(added(outer, layer, 2.0 * matrix[:, column]))
            np.testing.assert_allclose(ours[layer], theirs[layer], rtol=0, atol=1e-4)
            assert np.abs(ours[layer] - model.rows()[layer]).max() > 1e-2


@pytest.mark.parametrize(("site", "norm"), [("attention", "post_attention_norm"), ("mlp", "post_ffw_norm")])
def test_what_is_put_out_goes_into_the_residual_stream(model: Model, site: str, norm: str) -> None:
    """As it is; or through the norm that a block of some families has after it."""
    given = noise(N_EMBD, 1)
    for layer in set(model.layers(site)) - {0}:
        other = {"attention": "mlp", "mlp": "attention"}[site]
        silent = [silenced(model, name, layer) for name in (site, other) if model.has(name, layer)]
        if len(silent) < 2:
            continue
        rows = model.rows(*silent, added(site, layer, given))
        expected = given.astype(np.float64)
        if model.name in POST_NORMS:
            key = f"blk.{layer}.{norm}"
            expected /= np.sqrt((expected**2).mean() + 1e-6)
            expected *= model.weights[key if model.name == "plamo2" else f"{key}.weight"]
        else:  # and where it is added to what is there
            moved = model.rows(silent[1], added(site, layer, given))[layer] - model.rows(silent[1])[layer]
            np.testing.assert_allclose(moved, np.tile(given, (len(TOKENS), 1)), rtol=0, atol=2e-5)
        found = rows[layer] - rows[layer - 1]
        np.testing.assert_allclose(found, np.tile(expected, (len(TOKENS), 1)), rtol=2e-5, atol=2e-5)


def test_the_residual_stream_moves_by_the_vector(model: Model) -> None:
    given = noise(N_EMBD, 2)
    plain = model.rows()
    for layer in range(1, model.n_layer):
        rows = model.rows(added("residual", layer, given))
        assert np.array_equal(rows[layer], plain[layer] + given)
        assert np.array_equal(rows[:layer], plain[:layer])


# ---- both paths, and llama.cpp's own control vector ----


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "plamo2"])
def test_both_paths_do_the_same_at_every_site(architecture: str, tmp_path: Path) -> None:
    """Only the residual stream is steered in the graph; on the other path nothing is."""
    path = build_plamo2(tmp_path) if architecture == "plamo2" else build(architecture, tmp_path).gguf
    found = []
    for name in PATHS:
        llm = load(path, n_ubatch=5)
        model = Model(architecture, path, mien.attach(llm, path=name), {})
        terms = [
            added(site, layer, noise(model.width(site, layer), layer))
            for site in SITES
            for layer in model.layers(site)
            if layer
        ]
        found.append(model.rows(*terms))
        done = model.steering.applied
        assert {place.path for place in done.layers.values()} == {name}
        assert {place.path for layers in done.sites.values() for place in layers.values()} == {"post-compute"}
        llm.close()
    assert np.array_equal(*found)


def test_where_llama_cpp_has_no_control_vectors_mien_steers(tmp_path: Path) -> None:
    llm = load(build_plamo2(tmp_path), n_ubatch=5)

    def logits() -> Floats:
        llm.reset()
        llm._ctx.kv_cache_clear()
        llm.eval(TOKENS)
        return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).copy()

    plain, rows = logits(), np.stack([noise(N_EMBD, layer) for layer in range(1, 4)])
    data = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    assert api.llama_set_adapter_cvec(llm._ctx.ctx, data, rows.size, N_EMBD, 1, 3) == 0
    assert np.array_equal(logits(), plain)
    steering = mien.attach(llm)
    assert np.array_equal(logits(), plain)
    steering.set(Vector("v", (1, 2, 3), rows))
    assert not np.isclose(logits(), plain).all()
    assert {layer: done.rows for layer, done in steering.applied.layers.items()} == {1: 12, 2: 12, 3: 1}
    assert {done.path for done in steering.applied.layers.values()} == {"in-graph"}
    steering.clear()
    assert np.array_equal(logits(), plain)
    llm.close()


def test_a_memory_that_takes_nothing_out_is_computed_again(tmp_path: Path) -> None:
    """A Mamba's state can't be cut back to a prefix, so a prompt is evaluated as a whole."""
    llm = load(build_plamo2(tmp_path))
    v = Vector("v", (1,), noise(N_EMBD)[None])
    steering = mien.attach(llm, registry=DictRegistry(v))
    steering.set("v(start=1)")
    seen: list[Token] = []
    steering.watch("v", on_token=seen.append)
    for _ in range(2):
        stream = llm.generate(TOKENS, temp=0.0)
        for _ in range(4):
            next(stream)
        stream.close()
    assert [token.reply for token in seen] == ([-1] * 12 + [0, 1, 2]) * 2
    shares = [token.after["v"] - token.before["v"] for token in seen]
    np.testing.assert_allclose(shares, [float(token.reply >= 1) for token in seen], rtol=0, atol=1e-5)
    llm.close()


# ---- experts ----


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(request.param, tmp_path_factory.mktemp("tiny")).gguf


def marked(operator: str, experts: list[int], layers: Any = range(4), **window: Any) -> Term:
    vector = mien.of_experts("marked", {layer: experts for layer in layers}, N_EXPERT)
    return Term(1.0, vector, operator=operator, **window)


def counted(llm: Any, steering: Steering, *terms: Term) -> dict[int, list[int]]:
    """How often each expert was chosen, for a prompt in several micro-batches and five tokens of a reply."""
    llm.reset()
    steering.set(Recipe(terms))
    steering.count_experts()
    llm.eval(TOKENS)
    for token in TOKENS[:5]:
        llm.eval([token])
    return {layer: counts.tolist() for layer, counts in steering.expert_counts.items()}


EVERY = len(TOKENS) + 5
IN_LAST = 1 + 5  # the last block computes tokens that have logits alone


def test_forced_experts_are_always_chosen_and_forbidden_ones_never(mixture: Path) -> None:
    llm = load(mixture, n_ubatch=5)
    steering = mien.attach(llm)
    plain = counted(llm, steering)
    assert {layer: sum(counts) for layer, counts in plain.items()} == {
        layer: USED * (IN_LAST if layer == 3 else EVERY) for layer in range(4)
    }
    for expert in range(N_EXPERT):
        forced = counted(llm, steering, marked("force", [expert]))
        forbidden = counted(llm, steering, marked("forbid", [expert]))
        for layer in range(4):
            every = IN_LAST if layer == 3 else EVERY
            assert forced[layer][expert] == every
            assert forbidden[layer][expert] == 0
            assert sum(forced[layer]) == sum(forbidden[layer]) == USED * every
        assert forced != plain
        assert forbidden != plain
    assert counted(llm, steering, marked("forbid", [0, 3]))[2] == [0, EVERY, EVERY, 0]
    one = counted(llm, steering, marked("force", [1], [2]))
    assert one[2][1] == EVERY
    assert {layer: one[layer] for layer in (0, 1)} == {layer: plain[layer] for layer in (0, 1)}
    both = counted(llm, steering, marked("force", [2]), marked("forbid", [1]))
    assert (both[0][2], both[0][1]) == (EVERY, 0)
    assert counted(llm, steering) == plain
    llm.close()


def test_as_many_experts_can_be_forced_as_are_chosen(tmp_path: Path) -> None:
    llm = load(build("qwen3moe", tmp_path).gguf)
    steering = mien.attach(llm)
    found = {
        pair: counted(llm, steering, marked("force", [*pair])) for pair in combinations(range(N_EXPERT), 2)
    }
    llm.close()
    for pair, counts in found.items():
        assert [counts[1][expert] for expert in pair] == [EVERY, EVERY]


def test_experts_can_be_forced_in_the_prompt_or_in_the_reply(mixture: Path) -> None:
    llm = load(mixture, n_ubatch=5)
    steering = mien.attach(llm)
    plain = counted(llm, steering)
    steering.count_experts()
    llm.reset()
    llm.eval(TOKENS)
    prompt = steering.expert_counts
    for expert in range(N_EXPERT):
        given, made = int(prompt[0][expert]), plain[0][expert] - int(prompt[0][expert])
        in_reply = counted(llm, steering, marked("force", [expert], when="response"))
        in_prompt = counted(llm, steering, marked("force", [expert], when="prompt"))
        later = counted(llm, steering, marked("force", [expert], start=3))
        assert in_reply[0][expert] == given + 5
        assert in_prompt[0][expert] == len(TOKENS) + made
        assert given + 2 <= later[0][expert] <= given + 5
        assert later[0][expert] >= plain[0][expert]
    llm.close()


def test_forced_experts_weigh_the_same_whatever_the_router_says(mixture: Path) -> None:
    llm = load(mixture)
    model = Model(mixture.stem, mixture, mien.attach(llm), {})
    forced = marked("force", [1, 2], [1])
    rows = model.rows(forced)
    other = model.rows(forced, added("experts", 1, [3.0, -5.0, 0.5, 1.0]))
    assert np.array_equal(rows[0], other[0])
    if mixture.stem == "qwen2moe":  # whose weights are not made to add up to 1
        assert not np.isclose(rows[1], other[1]).all()
    else:
        np.testing.assert_allclose(rows[1], other[1], rtol=0, atol=1e-5)
    llm.close()


def test_each_sequence_has_its_own_experts(mixture: Path) -> None:
    contexts = Contexts(mixture)
    exact = {"type_k": api.GGML_TYPE_F32, "type_v": api.GGML_TYPE_F32, "flash_attn_type": 0}
    context = contexts.make(3, n_ubatch=5, **exact)
    steering = mien.attach(context)
    steering.set([Recipe((marked("force", [1]),)), Recipe((marked("forbid", [1]),)), None])
    texts = [np.random.default_rng(s).integers(3, N_VOCAB, size=9).tolist() for s in range(3)]
    batches = [[Row(texts[s][i], i, (s,)) for i in range(6) for s in (2, 0, 1)]]
    batches += [[Row(texts[s][i], i, (s,)) for s in range(3)] for i in range(6, 9)]
    steering.count_experts()
    evaluate_all(context, steering.decode, batches)
    together = steering.expert_counts
    assert all(counts.sum() == USED * 3 * 9 for counts in together.values())
    alone = contexts.make(**exact)
    plain = mien.attach(alone)
    plain.count_experts()
    evaluate_all(alone, plain.decode, [[Row(t, i) for i, t in enumerate(texts[2])]])
    for layer in range(4):
        assert together[layer][1] == 9 + plain.expert_counts[layer][1]
    contexts.close()


def test_counting_begins_from_zero_and_stops(mixture: Path) -> None:
    llm = load(mixture)
    steering = mien.attach(llm)
    assert steering.expert_counts == {}
    llm.eval(TOKENS)
    steering.count_experts()
    assert steering.expert_counts == {}
    llm.eval(TOKENS[:1])
    first = steering.expert_counts
    assert [counts.sum() for counts in first.values()] == [USED] * 4
    first[0][:] = 99  # a copy
    steering.count_experts()
    llm.eval(TOKENS[:1])
    assert [counts.sum() for counts in steering.expert_counts.values()] == [USED] * 4
    steering.count_experts(False)
    llm.eval(TOKENS[:1])
    assert [counts.sum() for counts in steering.expert_counts.values()] == [USED] * 4
    steering.count_experts()
    steering.detach()
    llm.eval(TOKENS[:1])
    llm.close()


def test_more_experts_than_are_chosen_can_not_be_forced(mixture: Path) -> None:
    llm = load(mixture)
    steering = mien.attach(llm)
    steering.set(Recipe((kept := marked("force", [0]),)))
    for wrong, message in (
        ((marked("force", [0, 1, 2]),), "2 of 4 experts are chosen for a token; 3 can't be forced"),
        ((marked("forbid", [0, 1, 2]),), "0 can't be forced and 3 forbidden"),
        ((kept, marked("forbid", [0], [1])), r"layer 1: experts \[0\] are forced and forbidden"),
    ):
        with pytest.raises(mien.RecipeError, match=message):
            steering.set(Recipe(wrong))
        assert steering.recipe.terms == (kept,)
    llm.close()


def test_experts_of_a_model_without_them_are_not_counted(tmp_path: Path) -> None:
    llm = load(build("llama", tmp_path).gguf)
    steering = mien.attach(llm)
    with pytest.raises(mien.SiteNotFound, match="no site 'experts': the model is no mixture of experts"):
        steering.count_experts()
    steering.count_experts(False)
    assert steering.expert_counts == {}
    llm.eval(TOKENS)
    llm.close()
