"""What a user has set on a context before attaching or while attached, and states saved with and without
mien."""

from __future__ import annotations

import ctypes
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import llama_cpp.llama_cpp as api
import mien
import numpy as np
import pytest
from families import build_family
from llama_batches import own_control_vector
from makers import DictRegistry, make_vector
from mien.runtimes.llama_text import load_llama
from tiny import N_VOCAB

N_LAYER, N_EMBD = 4, 64
VECTORS = [
    make_vector(name, (1, 2, 3), seed, fingerprint=None, n_embd=N_EMBD) for seed, name in enumerate("ab")
]
REGISTRY = DictRegistry(*VECTORS)
TOKENS: list[int] = np.random.default_rng(0).integers(3, N_VOCAB, size=25).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    path = tmp_path_factory.mktemp("lora")
    for seed in range(2):
        _write_lora(path / f"{seed}.lora.gguf", tiny_llama, seed)
    return path


def _write_lora(path: Path, base: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    shapes = {tensor.name: tensor.shape for tensor in gguf.GGUFReader(base).tensors}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for layer in range(N_LAYER):
        name = f"blk.{layer}.attn_q.weight"
        width, height = map(int, shapes[name])
        writer.add_tensor(f"{name}.lora_a", (0.3 * random.standard_normal((4, width))).astype(np.float32))
        writer.add_tensor(f"{name}.lora_b", (0.3 * random.standard_normal((height, 4))).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(llm: Any) -> np.ndarray:
    llm.reset()
    llm._ctx.kv_cache_clear()
    llm.eval(TOKENS)
    return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).copy()


def set_loras(llm: Any, *files: Path) -> None:
    adapters = [api.llama_adapter_lora_init(llm._model.model, str(file).encode()) for file in files]
    assert all(adapters)
    handles = (api.llama_adapter_lora_p_ctypes * len(adapters))(*adapters)
    scales = (ctypes.c_float * len(adapters))(*[1.0] * len(adapters))
    assert api.llama_set_adapters_lora(llm._ctx.ctx, handles, len(adapters), scales) == 0


def one_lora(llm: Any, folder: Path) -> None:
    set_loras(llm, folder / "1.lora.gguf")


def two_loras(llm: Any, folder: Path) -> None:
    set_loras(llm, folder / "0.lora.gguf", folder / "1.lora.gguf")


def not_causal(llm: Any, folder: Path) -> None:
    api.llama_set_causal_attn(llm._ctx.ctx, False)


def control_vector(llm: Any, folder: Path) -> None:
    own_control_vector(llm._ctx.ctx, VECTORS[0], N_LAYER)


HIDDEN = [one_lora, two_loras, not_causal, control_vector]


def test_the_lora_of_a_llama_is_kept(load_tiny: Callable[..., Any], folder: Path) -> None:
    lora = str(folder / "0.lora.gguf")
    llm, plain = load_tiny(lora_path=lora), load_tiny(lora_path=lora)
    expected = logits(plain)
    assert not np.array_equal(expected, logits(load_tiny()))
    steering = mien.attach(llm)
    assert np.array_equal(logits(llm), expected)
    steering.detach()
    assert np.array_equal(logits(llm), expected)


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora_path"])
@pytest.mark.parametrize("hide", HIDDEN)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_what_would_be_lost_is_refused_and_the_llama_stays_as_it_was(
    load_tiny: Callable[..., Any], folder: Path, hide: Callable[[Any, Path], None], lora: bool, used: bool
) -> None:
    options = {"lora_path": str(folder / "0.lora.gguf")} if lora else {}
    llm, twin = load_tiny(**options), load_tiny(**options)
    for each in (llm, twin):
        hide(each, folder)
        if used:
            each.eval(TOKENS[:9])
    with pytest.raises(mien.RuntimeNotSupported, match="would be lost"):
        mien.attach(llm)
    assert type(llm) is llama_cpp.Llama
    assert mien.steering_of(llm) is None
    rows = []
    for each in (llm, twin):  # what it held is there
        each.eval(TOKENS[9:12] if used else TOKENS[:5])
        rows.append(np.ctypeslib.as_array(each._ctx.get_logits(), shape=(each.n_vocab(),)).copy())
    assert np.array_equal(*rows)
    assert np.array_equal(logits(llm), logits(twin))


@pytest.mark.parametrize("hide", [one_lora, two_loras, not_causal])
def test_what_is_set_while_attached_stays_after_detach(
    load_tiny: Callable[..., Any], folder: Path, hide: Callable[[Any, Path], None]
) -> None:
    plain, llm = load_tiny(), load_tiny(lora_path=str(folder / "0.lora.gguf"))
    hide(plain, folder)
    expected = logits(plain)
    steering = mien.attach(llm, registry=REGISTRY)
    hide(llm, folder)
    if hide is not_causal:
        set_loras(plain, folder / "0.lora.gguf")
        expected = logits(plain)
    assert np.array_equal(logits(llm), expected)
    steering.set("a")
    assert not np.array_equal(logits(llm), expected)
    steering.detach()
    assert type(llm) is llama_cpp.Llama
    assert np.array_equal(logits(llm), expected)
    with pytest.raises(mien.RuntimeNotSupported, match="would be lost"):
        mien.attach(llm)
    assert np.array_equal(logits(llm), expected)


def test_a_context_whose_settings_are_undone_can_be_attached(
    load_tiny: Callable[..., Any], folder: Path
) -> None:
    llm, plain = load_tiny(), load_tiny()
    steering = mien.attach(llm, registry=REGISTRY)
    not_causal(llm, folder)
    steering.detach()
    api.llama_set_causal_attn(llm._ctx.ctx, True)
    steering = mien.attach(llm, registry=REGISTRY)
    assert np.array_equal(logits(llm), logits(plain))
    steering.detach()
    assert "_mien_hook" not in vars(llm._ctx)


def lost_by_detach(llm: Any, steering: mien.Steering) -> None:
    steering.detach()


def lost_by_capture(llm: Any, steering: mien.Steering) -> None:
    steering.capture([5, 6])


def lost_by_reset(llm: Any, steering: mien.Steering) -> None:
    llm.reset()


@pytest.mark.parametrize("lose", [lost_by_detach, lost_by_capture, lost_by_reset])
def test_a_reply_does_not_go_on_without_what_it_began_with(
    load_tiny: Callable[..., Any], lose: Callable[[Any, mien.Steering], None]
) -> None:
    llm = load_tiny()
    steering = mien.attach(llm, registry=REGISTRY)
    steering.set("a")
    stream = llm.generate(TOKENS, temp=0.0)
    assert len([next(stream), next(stream)]) == 2
    lose(llm, steering)
    with pytest.raises(mien.SteeringNotApplied, match="of the 26 tokens before it only 0 are left"):
        next(stream)
    assert replied(llm) == steered(load_tiny, "a" if lose is not lost_by_detach else "")[2]


def test_a_reply_that_nothing_touched_goes_on_after_detach(load_tiny: Callable[..., Any]) -> None:
    llm, plain = load_tiny(), load_tiny()
    steering = mien.attach(llm, registry=REGISTRY)
    stream = llm.generate(TOKENS, temp=0.0)
    found = [next(stream) for _ in range(3)]
    steering.detach()
    found += [next(stream) for _ in range(3)]
    assert found == replied(plain)


def drawn(llm: Any) -> int:
    return int(llm.sample(temp=0.0))


@pytest.mark.parametrize("options", [{}, {"logits_all": True}], ids=["", "logits_all"])
def test_the_next_token_is_drawn_from_the_same_logits(
    load_tiny: Callable[..., Any], options: dict[str, bool]
) -> None:
    llm, plain = load_tiny(**options), load_tiny(**options)
    for each in (llm, plain):
        each.eval(TOKENS)
    expected = np.ctypeslib.as_array(plain._ctx.get_logits_ith(-1), shape=(N_VOCAB,)).copy()
    steering = mien.attach(llm)
    for _ in range(2):
        assert np.array_equal(np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), shape=(N_VOCAB,)), expected)
        assert drawn(llm) == drawn(plain)
        steering.detach()


def test_there_is_nothing_to_draw_from_before_an_evaluation(load_tiny: Callable[..., Any]) -> None:
    llm = load_tiny()
    with mien.attach(llm):
        assert np.isnan(np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(N_VOCAB,))).all()


def test_embeddings_asked_for_later_are_kept(load_tiny: Callable[..., Any]) -> None:
    llm = load_tiny()
    api.llama_set_embeddings(llm._ctx.ctx, True)
    steering = mien.attach(llm)
    for _ in range(2):
        llm.reset()
        llm.eval(TOKENS[:5])
        assert api.llama_get_embeddings(llm._ctx.ctx)
        steering.detach()


def test_detaching_needs_no_memory(load_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    llm, plain = load_tiny(), load_tiny()
    steering = mien.attach(llm, registry=REGISTRY)
    steering.set("a")
    monkeypatch.setattr(api, "llama_init_from_model", lambda model, parameters: None)
    steering.detach()
    monkeypatch.undo()
    assert type(llm) is llama_cpp.Llama
    assert np.array_equal(logits(llm), logits(plain))
    mien.attach(llm).detach()
    assert np.array_equal(logits(llm), logits(plain))


def test_a_closed_model_is_told_from_an_attached_one(load_tiny: Callable[..., Any]) -> None:
    llm = load_tiny()
    steering = mien.attach(llm, registry=REGISTRY)
    with steering("a"):
        llm.close()
    assert mien.steering_of(llm) is None
    with pytest.raises(mien.RuntimeNotSupported, match="closed"):
        mien.attach(llm)


class OwnCache(dict[tuple[int, ...], Any]):
    """A user's, of what llama-cpp-python asks for and no more."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(tuple(key))

    def __setitem__(self, key: Any, state: Any) -> None:
        super().__setitem__(tuple(key), state)

    def __contains__(self, key: Any) -> bool:
        return super().__contains__(tuple(key))


def test_a_users_own_cache_is_seen_under_the_recipe(load_tiny: Callable[..., Any]) -> None:
    llm = load_tiny()
    llm.set_cache(cache := OwnCache())
    steering = mien.attach(llm, registry=REGISTRY)
    for recipe in ("a", ""):
        steering.set(recipe)
        llm.create_completion(TOKENS[:5], max_tokens=2)
    assert len(cache) == 2
    steering.detach()
    assert llm.cache is cache


@pytest.mark.parametrize("family", ["mamba", "jamba", "lfm2"])
def test_a_recurrent_memory_is_used_as_a_whole_or_not_at_all(family: str, tmp_path: Path) -> None:
    path, loaded = build_family(family, tmp_path), []

    def load() -> Any:
        loaded.append(load_llama(path, n_ctx=128, n_batch=32, n_threads=1))
        return loaded[-1]

    llm, plain = load(), load()
    steering = mien.attach(llm, registry=REGISTRY)
    llm.eval(TOKENS[:3])
    untouched = llm.save_state()
    steering.set('a(when="response")')
    llm.eval(TOKENS[3:4])
    state = llm.save_state()
    steering.detach()
    plain.load_state(state)
    for each in (llm, plain):
        assert each.n_tokens == 0
        each.eval(TOKENS[:4])
    plain.load_state(untouched)
    assert plain.n_tokens == 3
    plain.eval(TOKENS[3:4])
    for each in loaded:
        each.close()


# ---- saved states ----


def replied(llm: Any) -> list[int]:
    stream = llm.generate(TOKENS, temp=0.0)
    return [int(next(stream)) for _ in range(6)]


def steered(load_tiny: Callable[..., Any], recipe: str) -> tuple[Any, mien.Steering, list[int]]:
    llm = load_tiny()
    steering = mien.attach(llm, registry=REGISTRY)
    steering.set(recipe)
    return llm, steering, replied(llm)


@pytest.mark.parametrize("options", [{}, {"logits_all": True}], ids=["", "logits_all"])
@pytest.mark.parametrize("recipe", ["a", 'a(when="response")', "a(start=2)"])
def test_a_steered_state_is_not_used_by_a_plain_model(
    load_tiny: Callable[..., Any], recipe: str, options: dict[str, bool]
) -> None:
    plain = load_tiny(**options)
    expected = replied(plain)
    llm = load_tiny(**options)
    steering = mien.attach(llm, registry=REGISTRY)
    steering.set(recipe)
    found = replied(llm)
    assert found != expected
    state = llm.save_state()
    steering.detach()
    for other in (llm, load_tiny(**options)):  # the same model, and one that never was attached
        other.load_state(pickle.loads(pickle.dumps(state)))
        assert other.n_tokens == (0 if recipe == "a" else len(TOKENS))
        assert replied(other) == expected


@pytest.mark.parametrize("recipe", ["a", 'a(when="response")', 'a(when="prompt")'])
def test_a_state_is_used_under_its_recipe_and_no_other(load_tiny: Callable[..., Any], recipe: str) -> None:
    llm, _, expected = steered(load_tiny, recipe)
    state = pickle.loads(pickle.dumps(llm.save_state()))
    for other_recipe in (recipe, "b", ""):
        other, steering, wanted = steered(load_tiny, other_recipe)
        other.reset()
        other.load_state(state)
        other._mien.drop_other_recipes()
        kept = other.n_tokens
        prompt = steering.compile(recipe).prompt.key == steering.compile(other_recipe).prompt.key
        assert (kept >= len(TOKENS)) == prompt
        assert replied(other) == wanted
        assert other_recipe != recipe or wanted == expected


def test_a_plain_state_is_used_by_an_attached_model(load_tiny: Callable[..., Any]) -> None:
    plain = load_tiny()
    expected = replied(plain)
    state = plain.save_state()
    llm, steering, _ = steered(load_tiny, "a")
    steering.clear()
    llm.load_state(state)
    llm._mien.drop_other_recipes()
    assert llm.n_tokens == plain.n_tokens
    assert replied(llm) == expected
