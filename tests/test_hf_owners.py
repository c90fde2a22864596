"""Models whose layers are run by an inner module that is not given tokens, or that pass on something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mien
import numpy as np
import pytest
import torch
import transformers
from hf_models import N_EMBD, PAD, SIZES
from mien import RuntimeNotSupported, SteeringNotApplied, Vector
from torch import nn
from transformers import AutoModelForCausalLM

BASE = {
    **{name: value for name, value in SIZES.items() if name != "num_key_value_heads"},
    "num_hidden_layers": 3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": PAD,
}
DECODER = {**BASE, "is_decoder": True}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
OPENAI = {"vocab_size": 64, "n_embd": N_EMBD, "n_layer": 3, "n_head": 4, "n_positions": 64}
CAUSAL: dict[str, dict[str, Any]] = {
    "Bert": DECODER,
    "Roberta": {**DECODER, "pad_token_id": 1},
    "XLMRobertaXL": {**DECODER, "pad_token_id": 1},
    "Electra": {**DECODER, "embedding_size": N_EMBD},
    "RoFormer": {**DECODER, "embedding_size": N_EMBD},
    "RemBert": {**DECODER, "input_embedding_size": N_EMBD, "output_embedding_size": N_EMBD},
    "MegatronBert": DECODER,
    "Git": {**BASE, "vision_config": VISION},
    "OpenAIGPT": OPENAI,  # whose blocks return lists, and which has no cache
    "CTRL": {"vocab_size": 64, "n_embd": N_EMBD, "dff": 48, "n_layer": 3, "n_head": 4, "n_positions": 64},
}
IDS = torch.tensor([[1 + PAD] * 3 + [9, 2, 33, 60], [8, 3, 40, 41, 42, 43, 44]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])


def causal(name: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**CAUSAL[name])
    return AutoModelForCausalLM.from_config(config).eval()


def encoder(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**BASE, **settings})
    return getattr(transformers, f"{name}Model")(config).eval()


MODELS: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: causal(name) for name in CAUSAL},
    "BertModel": lambda: encoder("Bert"),
    "ElectraModel": lambda: encoder("Electra", embedding_size=N_EMBD),
    "RobertaModel": lambda: encoder("Roberta", pad_token_id=1),
}
RNG = np.random.default_rng(0)
ADDED = torch.from_numpy(2 * RNG.standard_normal(N_EMBD).astype(np.float32))


@torch.no_grad()
def run(model: Any) -> Any:
    """What comes out for the tokens that are no padding."""
    found = model(input_ids=IDS, attention_mask=MASK)
    return found[0][MASK.bool()]


def add(module: nn.Module, args: Any, output: Any) -> Any:
    """A hook of torch's own, which leaves padding alone."""
    h = output[0] if isinstance(output, (tuple, list)) else output
    h = h + ADDED * MASK[..., None]
    return type(output)([h, *output[1:]]) if isinstance(output, (tuple, list)) else h


def attach(model: Any) -> mien.Steering:
    steering = mien.attach(model)
    steering.define("v", Vector("v", (1,), ADDED.numpy()[None]))
    return steering


@pytest.mark.parametrize("name", MODELS)
def test_it_is_steered_counted_and_read(name: str) -> None:
    model = MODELS[name]()
    plain = run(model)
    with attach(model) as steering:
        runtime: Any = steering._runtime
        layer = runtime._layers.modules[1]
        assert torch.equal(run(model), plain)
        read: list[Any] = []
        watch = steering.watch("v", on_token=read.append)
        steering.set("v")
        steered = run(model)
        assert steering.applied.layers[1].rows == int(MASK.sum())
        assert len(read) == int(MASK.sum())
        watch.stop()
        assert steering.capture([5, 6, 7], [1], 3).shape == (1, 3, N_EMBD)
        steering.clear()
        handle = layer.register_forward_hook(add)
        expected = run(model)
        handle.remove()
        torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(steered, plain, atol=1e-2)
    assert torch.equal(run(model), plain)


@pytest.mark.parametrize("name", CAUSAL)
def test_its_reply_is_counted(name: str) -> None:
    model = causal(name)
    cached = name != "OpenAIGPT"  # all is evaluated again for each token, and steered again
    with attach(model) as steering:
        found: list[int] = []
        model.register_forward_hook(
            lambda *_: found.append(sum(done.rows for done in steering.applied.layers.values()))
        )
        expected = {
            'v(when="prompt")': [7, 0, 0] if cached else [7, 7, 7],
            'v(when="response")': [0, 1, 1] if cached else [0, 1, 2],
            "v(start=1)": [0, 0, 1],
        }
        for recipe, rows in expected.items():
            steering.set(recipe)
            found.clear()
            model.generate(IDS[1:], max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=PAD)
            assert found == rows


XLNET = {"vocab_size": 64, "d_model": N_EMBD, "n_layer": 3, "n_head": 4, "d_inner": 48}
GEMMA3N = {
    **BASE,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "altup_num_inputs": 2,
    "laurel_rank": 4,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 1,
    "activation_sparsity_pattern": [0.0] * 3,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (lambda: transformers.XLNetConfig(**XLNET), "tokens, batch"),
        (lambda: transformers.Gemma3nTextConfig(**GEMMA3N), "altup_num_inputs, batch"),
    ],
    ids=["XLNet", "Gemma3n"],
)
def test_a_stream_of_another_shape_is_refused_at_once(config: Callable[[], Any], shape: str) -> None:
    model = AutoModelForCausalLM.from_config(config())
    with pytest.raises(RuntimeNotSupported, match=shape):
        mien.attach(model)


def test_a_model_that_takes_no_tokens_is_refused() -> None:
    model = transformers.ViTModel(transformers.ViTConfig(**{**VISION, "num_hidden_layers": 3}))
    with pytest.raises(RuntimeNotSupported, match="input_ids"):
        mien.attach(model)


def test_a_layer_that_runs_in_two_places_is_refused() -> None:
    model = causal("Bert")
    layers = model.bert.encoder.layer
    layers[2] = layers[0]
    with pytest.raises(RuntimeNotSupported, match="same module"):
        mien.attach(model)


@pytest.mark.parametrize("output", [{}, [], "text"], ids=["dict", "empty list", "text"])
def test_a_block_that_returns_no_tensor_is_said(output: Any) -> None:
    model = causal("Bert")
    with attach(model) as steering:
        steering.set("v")
        layer = steering._runtime._layers.modules[1]  # type: ignore[union-attr]
        layer.register_forward_hook(lambda *_: output, prepend=True)
        with pytest.raises(SteeringNotApplied, match=type(output).__name__) as error:
            run(model)
        assert error.value.layers == (1,)
