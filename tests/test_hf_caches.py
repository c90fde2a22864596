"""Which tokens are a reply's in transformers, whatever the cache: of keys, of states, quantised, packed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import mien
import numpy as np
import pytest
import torch
import transformers
from hf_models import IDS, N_EMBD, PAD, SIZES, cache_argument, logits, make_model, reply
from mien import RuntimeNotSupported, Steering, Vector
from transformers import AutoModelForCausalLM, cache_utils

BASE = {**SIZES, "num_hidden_layers": 3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 16,
    "mamba_n_groups": 2,
}
# Models whose cache is not, or not only, of keys and values.
RECURRENT: dict[str, dict[str, Any]] = {
    "Mamba": {"state_size": 8},
    "FalconMamba": {"state_size": 8},
    "Mamba2": {"state_size": 16, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "Rwkv": {"attention_hidden_size": 32},
    "RecurrentGemma": {"lru_width": 32, "attention_window_size": 16, "head_dim": 8},
    "Jamba": {
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "Bamba": {"attn_layer_indices": [1], **MAMBA},
    "FalconH1": {"mamba_d_ssm": 64, "head_dim": 8, **MAMBA},
    "GraniteMoeHybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "shared_intermediate_size": 48,
        "num_local_experts": 2,
        **MAMBA,
    },
    "Lfm2": {"full_attn_idxs": [1]},
    "NemotronH": {
        "head_dim": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 16,
        "n_groups": 2,
        "hybrid_override_pattern": "M*-",
        "chunk_size": 8,
    },
    "Qwen3Next": {
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "MiniMax": {
        "head_dim": 8,
        "num_local_experts": 2,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "block_size": 8,
    },
}

RECURRENT = {name: sizes for name, sizes in RECURRENT.items() if hasattr(transformers, f"{name}Config")}
NEWER = int(transformers.__version__.partition(".")[0]) >= 5  # what 4.57 does not have, or can't do


def make(name: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**BASE, **RECURRENT[name]})
    return AutoModelForCausalLM.from_config(config).eval()


def attach(model: Any) -> Steering:
    """With `v`, which adds 3 to everything in layer 1."""
    steering = mien.attach(model)
    n_layer, width = steering.model.n_layer, steering.model.n_embd
    assert n_layer > 1
    steering.define("v", Vector("v", (1,), np.full((1, width), 3.0, dtype=np.float32)))
    return steering


def rows_of(model: Any, steering: Steering, recipe: str, run: Callable[[], Any]) -> list[int]:
    """How many rows of layer 1 were steered in each pass of `run`."""
    steering.set(recipe)
    found: list[int] = []

    def note(*_: Any) -> None:
        layers = steering.applied.layers
        found.append(layers[1].rows if layers else 0)

    handle = model.register_forward_hook(note)
    run()
    handle.remove()
    return found


def windows(model: Any, steering: Steering, run: Callable[[], Any]) -> list[list[int]]:
    recipes = ("v", 'v(when="prompt")', 'v(when="response")', "v(start=1, stop=2)")
    return [rows_of(model, steering, recipe, run) for recipe in recipes]


COUNTED = [[7, 1, 1, 1], [7, 0, 0, 0], [0, 1, 1, 1], [0, 0, 1, 0]]


@pytest.mark.parametrize("name", RECURRENT)
def test_a_model_with_states_is_left_alone_and_its_reply_is_counted(name: str) -> None:
    model = make(name)
    plain, answer = logits(model), reply(model, count=4)
    with attach(model) as steering:
        assert torch.equal(logits(model), plain)
        assert reply(model, count=4) == answer
        assert windows(model, steering, lambda: reply(model, count=4)) == COUNTED
        if name == "Rwkv":  # whose own states do not follow the rows of a batch
            return
        batch = torch.cat([IDS, IDS.flip(1)])
        alone = [reply(model, row[None], count=4)[0] for row in batch]
        assert reply(model, batch, count=4) == alone


# 4.57 makes a cache for these only inside of generate(), or one that does not say whether it is empty.
OWN = ["Rwkv", "MiniMax", *(["Mamba", "Mamba2", "Bamba", "Lfm2"] if NEWER else [])]


@torch.no_grad()
@pytest.mark.parametrize("name", OWN)
def test_a_state_in_somebodys_own_loop(name: str) -> None:
    model = make(name)
    model.generation_config.use_cache = True

    def loop() -> None:
        found = model(input_ids=IDS, use_cache=True)
        kept = next(key for key in ("state", "cache", "past_key_values") if key in found)
        for token in (3, 4, 5):
            more = torch.tensor([[token]])
            found = model(input_ids=more, use_cache=True, **{kept: found[kept]})

    with attach(model) as steering:
        counted = COUNTED[:3] if name == "Rwkv" else COUNTED
        recipes = ("v", 'v(when="prompt")', 'v(when="response")', "v(start=1, stop=2)")
        for recipe, rows in zip(recipes, counted):
            assert rows_of(model, steering, recipe, loop) == rows
        if name == "Rwkv":  # its states are a list, which does not say which reply it is of
            steering.set("v(start=1)")
            with pytest.raises(RuntimeNotSupported, match="which token of its reply"):
                loop()


# ---- every cache class of the installed transformers ----


CACHES: dict[str, Callable[[Any], Any]] = {
    "DynamicCache": lambda model: cache_utils.DynamicCache(config=model.config),
    "DynamicCache of layers to come": lambda model: cache_utils.DynamicCache(),
    "StaticCache": lambda model: cache_utils.StaticCache(config=model.config, max_cache_len=32),
    "EncoderDecoderCache": lambda model: cache_utils.EncoderDecoderCache(
        cache_utils.DynamicCache(), cache_utils.DynamicCache()
    ),
}
# Those that can't be tried with a model of random weights, and why.
UNTRIED = {
    "Cache": "the base of the others",
    "QuantizedCache": "its backends (optimum-quanto, HQQ) are not installed",
    "MtpCache": "of the layers that draft, which are not steered",
    "DFlashCache": "of the layers that draft, which are not steered",
}


# Names of transformers 4 for the above with other options.
OLDER = {
    "HQQQuantizedCache",
    "HybridCache",
    "HybridChunkedCache",
    "OffloadedCache",
    "OffloadedHybridCache",
    "OffloadedStaticCache",
    "QuantoQuantizedCache",
    "SinkCache",
    "SlidingWindowCache",
}


def test_every_cache_class_is_known() -> None:
    found = {
        name
        for name, each in vars(cache_utils).items()
        if inspect.isclass(each) and issubclass(each, cache_utils.Cache) and each.__name__ == name
    }
    assert found <= {name.partition(" ")[0] for name in CACHES} | set(UNTRIED) | OLDER


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 4], ids=["full", "sliding"])
@pytest.mark.parametrize("name", CACHES)
def test_a_cache_of_each_class_in_generate_and_in_a_loop(name: str, window: int | None) -> None:
    config: Any = transformers.MistralConfig(**{**BASE, "sliding_window": window})
    if name == "EncoderDecoderCache":  # which decoders of the BERT kind use alone
        config = transformers.BertConfig(**BASE, is_decoder=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    fresh = CACHES[name]

    def generate() -> Any:
        return reply(model, count=4, **cache_argument(fresh(model)))

    def loop() -> list[Any]:
        cache, found = cache_argument(fresh(model)), []
        for tokens in (IDS, *(torch.tensor([[token]]) for token in (3, 4, 5))):
            found.append(model(input_ids=tokens, **cache).logits)
        return found

    plain, looped = generate(), loop()
    with attach(model) as steering:
        assert generate() == plain
        assert all(torch.equal(*both) for both in zip(loop(), looped))
        assert windows(model, steering, generate) == COUNTED
        assert windows(model, steering, loop) == COUNTED


def test_keys_and_values_as_tuples_and_a_cache_that_says_nothing() -> None:
    from mien.runtimes.hf_caches import held, is_empty

    keys = torch.zeros(2, 4, 5, 8)
    assert held(((keys, keys),)) == 5
    assert held(()) == held(None) == 0
    states = [torch.zeros(2, 8)] * 5
    assert held(states) is None
    assert is_empty(states) is False
    assert held(object()) is None
    assert is_empty(object()) is None
    hybrid = type("Hybrid", (), {"key_cache": [torch.zeros(4, 0), torch.zeros(4, 0)]})()
    assert held(hybrid) == 0  # a batch of 4, and nothing in it
    hybrid.key_cache[1] = keys
    assert held(hybrid) == 5


class _Silent:
    """A cache that tells nothing of what it holds."""


@torch.no_grad()
def test_an_unknown_length_breaks_nothing_and_is_refused_only_if_it_matters() -> None:
    from mien.runtimes.hf_rows import Replies

    cache, replies = _Silent(), Replies()
    first = replies.rows(1, 1, cache, None)
    assert first.untold
    assert replies.rows(1, 1, cache, None).untold  # it may have been the prompt, and may not
    assert replies.rows(1, 3, cache, None).given == 3
    following = [replies.rows(1, 1, cache, None) for _ in range(2)]
    assert [(rows.given, rows.reply, rows.untold) for rows in following] == [(0, 0, ""), (0, 1, "")]
    model = make_model()
    with attach(model) as steering:
        runtime: Any = steering._runtime
        for recipe, refused in (("v", False), ('v(when="response")', True), (["v", None], True)):
            steering.set(recipe)
            if refused:
                with pytest.raises(RuntimeNotSupported, match="_Silent"):
                    runtime.require(first)
            else:
                runtime.require(first)


# ---- generate ----


@pytest.mark.skipif(not NEWER, reason="transformers 4.57 can't: it drops all of the new tokens")
def test_a_cache_of_the_users_with_the_new_tokens_only() -> None:
    """The mask has all columns; what is passed in is prompt, however much the cache holds."""
    model = make_model()
    with attach(model) as steering:
        cache = cache_utils.DynamicCache()
        logits(model, IDS, **cache_argument(cache))
        more = torch.tensor([[17, 18]])
        run = lambda: reply(  # noqa: E731
            model,
            more,
            count=3,
            attention_mask=torch.ones(1, cache.get_seq_length() + 2, dtype=torch.long),
            **cache_argument(cache),
        )
        assert rows_of(model, steering, 'v(when="prompt")', run) == [2, 0, 0]


def test_drafts_are_counted_by_the_cache() -> None:
    """Whatever is drafted, and taken back, each token of the reply is steered as it is without drafts."""
    model, small = make_model(), make_model(seed=1)
    text = torch.cat([IDS, IDS, IDS], dim=1)
    ways = [{"assistant_model": small}, {"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 2}]
    with attach(model) as steering:
        for recipe in ('v(when="prompt")', 'v(when="response")', "v(start=2, stop=5)", "v(decay=3)"):
            steering.set(recipe)
            expected = reply(model, text, count=9, eos_token_id=-1)
            for way in ways:
                assert reply(model, text, count=9, eos_token_id=-1, **way) == expected, (recipe, way)


def test_guidance_is_a_sequence_beside_the_reply() -> None:
    """Its passes are not counted among those of the reply."""
    model = make_model()
    with attach(model) as steering:
        negative = {"guidance_scale": 1.5, "negative_prompt_ids": torch.tensor([[3, 4, 5]])}
        rows = rows_of(model, steering, 'v(when="prompt")', lambda: reply(model, count=3, **negative))
        assert rows == [7, 3, 0, 0, 0, 0]
        rows = rows_of(model, steering, "v(start=1, stop=2)", lambda: reply(model, count=4, **negative))
        assert rows == [0, 0, 0, 0, 1, 1, 0, 0]


def test_a_prompt_in_chunks_is_all_prompt() -> None:
    model = make_model()
    with attach(model) as steering:
        run = lambda: reply(model, count=3, prefill_chunk_size=3)  # noqa: E731
        assert rows_of(model, steering, 'v(when="prompt")', run)[-2:] == [0, 0]
        steering.set('v(when="response")')
        assert run() == reply(model, count=3)


# ---- somebody's own loop ----


@torch.no_grad()
def test_a_reply_that_goes_on_with_several_tokens_is_warned_of_once() -> None:
    model = make_model()
    with attach(model) as steering:

        def loop(*sizes: int) -> None:
            cache = cache_argument(cache_utils.DynamicCache())
            for size in sizes:
                model(input_ids=IDS[:, :size], **cache)

        steering.set("v")
        loop(5, 1, 3)  # to what acts alike on all tokens it is the same
        steering.set('v(when="response")')
        loop(5, 3, 1, 1)  # a prompt in two parts
        with pytest.warns(mien.ReplyWarning, match="3 tokens at once"):
            loop(5, 1, 3)
        loop(5, 1, 3)


# ---- continuous batching ----

PROMPTS = [[5, 6, 7, 8], [11, 12, 13, 14, 15, 16, 17], [20, 21]]


def packed(model: Any) -> list[list[int]]:
    """What generate_batch makes of PROMPTS."""
    found = model.generate_batch(
        inputs=PROMPTS,
        generation_config=transformers.GenerationConfig(
            max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=PAD
        ),
        progress_bar=False,
        warmup=False,
        continuous_batching_config=transformers.generation.ContinuousBatchingConfig(
            page_size=16, num_blocks=8, max_batch_tokens=32
        ),
    )
    assert [result.error for result in found.values()] == [None] * len(PROMPTS)
    return [list(result.generated_tokens) for result in found.values()]


@pytest.mark.skipif(not NEWER, reason="transformers 4.57 can't do it on the CPU")
def test_continuous_batching_acts_alike_on_all_tokens_or_is_refused() -> None:
    model = make_model(attn_implementation="sdpa")
    with attach(model) as steering:
        for recipe in ("0*v", "v", "ablate(v)"):
            steering.set(recipe)
            assert packed(model) == [reply(model, torch.tensor([ids]), count=4)[0] for ids in PROMPTS]
        for setting in ('v(when="response")', "v(start=2)", "v(decay=2)", ["v", None, "v"]):
            steering.set(setting)
            with pytest.raises(RuntimeNotSupported, match="packed"):
                packed(model)
        steering.set("v")
        steering.watch(Vector("w", (1,), np.ones((1, N_EMBD), dtype=np.float32)))
        with pytest.raises(RuntimeNotSupported, match="watch"):
            packed(model)


@torch.no_grad()
def test_sequences_packed_without_padding_are_steered_but_for_what_fills_them_up() -> None:
    model = make_model()
    inputs = {
        "input_ids": IDS,
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 0]]),
        "cu_seq_lens_q": torch.tensor([0, 3, 5]),
    }
    with attach(model) as steering:
        steering.set("v")
        model(**inputs)
        assert steering.applied.layers[1].rows == 5
        steering.set('v(when="prompt")')
        with pytest.raises(RuntimeNotSupported, match="packed"):
            model(**inputs)
