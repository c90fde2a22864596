"""Tiny random models that llama.cpp and transformers run with the very same float32 weights.

Each is made in transformers from a config and a seed; its weights are then written, re-ordered where
llama.cpp wants that, to a GGUF. Nothing is downloaded and no converter is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np
import torch
import transformers
from gguf import MODEL_ARCH, GGMLQuantizationType
from numpy.typing import NDArray
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.pytorch_utils import Conv1D

Array: TypeAlias = NDArray[np.float32]

SEED = 20240229
WINDOW = 24  # of the models with sliding windows: a prompt that is longer tells that both slide alike
N_VOCAB = 128
# In products with matrices of this type llama.cpp computes a row the same whatever rows stand beside it. Of
# floats it does not: it has other code for a row alone than for several.
QUANTISED = GGMLQuantizationType.Q5_1


@dataclass(frozen=True)
class Tiny:
    """One model in both forms. model: float32, in eval mode, with eager attention."""

    model: Any
    gguf: Path
    n_layer: int
    n_embd: int
    n_vocab: int


def build(architecture: str, folder: Path, *, quantised: bool = False) -> Tiny:
    """Make the model of that name, and its GGUF in `folder`: the same bytes each time.

    quantised: the GGUF's matrices are QUANTISED, and so its floats no longer those of the model.
    """
    family = _FAMILIES[architecture]
    config = getattr(transformers, family.config)(**{**_COMMON, **family.settings})
    with torch.random.fork_rng(devices=[]):  # what transformers draws is replaced
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    _randomise(model, family.norm_offset)
    _halve_gelu(model)
    path = folder / (f"{architecture}-{QUANTISED.name}.gguf" if quantised else f"{architecture}.gguf")
    _write(path, model, family, quantised)
    return Tiny(model, path, config.num_hidden_layers, config.hidden_size, config.vocab_size)


def _randomise(model: Any, norm_offset: float) -> None:
    """Give every parameter values of which none is special, of a size that keeps activations near 1."""
    random = np.random.default_rng(SEED)
    embedding = model.get_input_embeddings().weight
    ends = ("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h")
    for name, parameter in model.named_parameters():
        mean, deviation = 0.0, 0.12
        if parameter is embedding:
            deviation = 0.5
        elif parameter.dim() == 1:
            deviation = 0.2
            mean = 1 - norm_offset if _is_norm(name) else 0.0
        elif name.removesuffix(".weight").endswith(ends):
            deviation = 0.03  # what one runtime rounds otherwise, as in _HalfGELU, is to grow little
        noise = random.standard_normal(parameter.shape, dtype=np.float32)
        parameter.data.copy_(torch.from_numpy(mean + deviation * noise))


def _is_norm(name: str) -> bool:
    return name.endswith("weight") and any(word in name for word in ("norm", "ln_"))


class _HalfGELU(torch.nn.Module):
    """GELU as llama.cpp has it on a processor: looked up in a table from half to half precision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x.half(), approximate="tanh").to(x.dtype)


def _halve_gelu(model: Any) -> None:
    """Without this, logits would differ by a thousandth of their spread, and hide that much."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, GELUTanh | NewGELUActivation):
                setattr(module, name, _HalfGELU())


# What llama.cpp wants otherwise than transformers has it: from a parameter's name and values.


def _interleaved(name: str, weight: Array, config: Any) -> Array:
    """Rows of queries and keys such that the two that RoPE turns together are neighbours, not halves."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    halves = weight.reshape(-1, 2, config.head_dim // 2, weight.shape[-1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _ungrouped(name: str, weight: Array, config: Any) -> Array:
    """Queries, then keys, then values, where each group of heads has its own of the three in a row."""
    if "query_key_value" not in name:
        return weight
    heads = config.num_attention_heads
    groups = getattr(config, "num_kv_heads", heads)
    parts = weight.reshape(groups, heads // groups + 2, config.hidden_size // heads, -1)
    ordered = parts[:, :-2], parts[:, -2], parts[:, -1]
    return np.concatenate([part.reshape(-1, *weight.shape[1:]) for part in ordered])


def _unchanged(name: str, weight: Array, config: Any) -> Array:
    return weight


@dataclass(frozen=True)
class _Family:
    """config: the class. settings: for it. norm_offset: what the runtime adds to a norm's weights."""

    config: str
    arch: MODEL_ARCH
    settings: Mapping[str, Any] = field(default_factory=dict)
    rewrite: Callable[[str, Array, Any], Array] = _unchanged
    norm_offset: float = 0.0


_COMMON: Mapping[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    # Nothing ends a text early, and no embedding is special.
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GATED: Mapping[str, Any] = {"num_key_value_heads": 2, "intermediate_size": 96}
_WIDE: Mapping[str, Any] = {**_GATED, "head_dim": 32}  # heads that together are wider than the model
_GEMMA: Mapping[str, Any] = {**_WIDE, "query_pre_attn_scalar": 32, "sliding_window": WINDOW}
# llama.cpp knows one GELU for these families, the approximate one.
_PLAIN: Mapping[str, Any] = {"intermediate_size": 96, "hidden_act": "gelu_pytorch_tanh"}
_EXPERTS: Mapping[str, Any] = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}

_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family("LlamaConfig", MODEL_ARCH.LLAMA, {**_WIDE}, _interleaved),
    "mixtral": _Family("MixtralConfig", MODEL_ARCH.LLAMA, {**_WIDE, "num_local_experts": 4}, _interleaved),
    "qwen2": _Family("Qwen2Config", MODEL_ARCH.QWEN2, {**_GATED}),
    "qwen2moe": _Family(
        "Qwen2MoeConfig",
        MODEL_ARCH.QWEN2MOE,
        {**_GATED, **_EXPERTS, "shared_expert_intermediate_size": 80},
    ),
    "qwen3": _Family("Qwen3Config", MODEL_ARCH.QWEN3, {**_WIDE}),
    "qwen3moe": _Family("Qwen3MoeConfig", MODEL_ARCH.QWEN3MOE, {**_WIDE, **_EXPERTS, "norm_topk_prob": True}),
    "gemma": _Family("GemmaConfig", MODEL_ARCH.GEMMA, {**_WIDE}, norm_offset=1),
    "gemma2": _Family(
        "Gemma2Config",
        MODEL_ARCH.GEMMA2,
        {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 8.0},  # low enough to bend
        norm_offset=1,
    ),
    # Every sixth block of Gemma 3 attends to everything.
    "gemma3": _Family(
        "Gemma3TextConfig", MODEL_ARCH.GEMMA3, {**_GEMMA, "num_hidden_layers": 6}, norm_offset=1
    ),
    "phi2": _Family("PhiConfig", MODEL_ARCH.PHI2, {**_PLAIN}),
    "phi3": _Family("Phi3Config", MODEL_ARCH.PHI3, {**_GATED}),
    "olmo2": _Family("Olmo2Config", MODEL_ARCH.OLMO2, {**_GATED}),
    "stablelm": _Family("StableLmConfig", MODEL_ARCH.STABLELM, {**_GATED, "use_qkv_bias": True}),
    "starcoder2": _Family("Starcoder2Config", MODEL_ARCH.STARCODER2, {**_PLAIN, "num_key_value_heads": 2}),
    "gpt2": _Family("GPT2Config", MODEL_ARCH.GPT2, {"n_inner": 96}),
    "gptneox": _Family("GPTNeoXConfig", MODEL_ARCH.GPTNEOX, {**_PLAIN}, _ungrouped),
    "falcon": _Family(
        "FalconConfig",
        MODEL_ARCH.FALCON,
        {
            "ffn_hidden_size": 96,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "activation": "gelu_pytorch_tanh",
        },
        _ungrouped,
    ),
}

ARCHITECTURES: tuple[str, ...] = tuple(_FAMILIES)


def _weights(model: Any, family: _Family) -> Iterator[tuple[str, Array]]:
    """Every weight once, by transformers' names but with what llama.cpp keeps apart split."""
    for name, parameter in model.named_parameters():
        weight = parameter.detach().numpy()
        if isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) and weight.ndim == 2:
            weight = weight.T
        if family.norm_offset and _is_norm(name):
            weight = weight + np.float32(family.norm_offset)
        if name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate_proj", "up_proj"), np.split(weight, 2, axis=1)):
                yield name.replace("gate_up_proj", part), half
        else:
            yield name, family.rewrite(name, weight, model.config)


def _write(path: Path, model: Any, family: _Family, quantised: bool) -> None:
    config = model.config
    names = gguf.get_tensor_name_map(family.arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[family.arch])
    _write_sizes(writer, config)
    write_vocabulary(writer, config.vocab_size)
    for name, weight in _weights(model, family):
        stem, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):  # experts are parameters without a module of their own
            stem, kind = name, "weight"
        found = names.get_name(stem)
        if found is None:
            raise KeyError(f"{name}: gguf knows no name for it")
        weight = np.ascontiguousarray(weight)
        if quantised and weight.ndim > 1:
            blocks = gguf.quants.quantize(weight, QUANTISED)
            writer.add_tensor(f"{found}.{kind}", blocks, raw_dtype=QUANTISED)
        else:
            writer.add_tensor(f"{found}.{kind}", weight)
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    """What llama.cpp must know of the config; what a family has no attribute for, it needs no key for."""

    def known(*attributes: str) -> Any:
        return next((value for name in attributes if (value := getattr(config, name, None))), None)

    heads = config.num_attention_heads
    head_dim = known("head_dim") or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(known("intermediate_size", "ffn_hidden_size", "n_inner"))
    writer.add_head_count(heads)
    writer.add_head_count_kv(known("num_key_value_heads", "num_kv_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if rope := known("rope_parameters"):
        rope = rope.get("full_attention", rope)
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    for attributes, add in (
        (("rms_norm_eps",), writer.add_layer_norm_rms_eps),
        (("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"), writer.add_layer_norm_eps),
        (("sliding_window",), writer.add_sliding_window),
        (("attn_logit_softcapping",), writer.add_attn_logit_softcapping),
        (("final_logit_softcapping",), writer.add_final_logit_softcapping),
        (("num_experts", "num_local_experts"), writer.add_expert_count),
        (("num_experts_per_tok",), writer.add_expert_used_count),
        (("moe_intermediate_size",), writer.add_expert_feed_forward_length),
        (("shared_expert_intermediate_size",), writer.add_expert_shared_feed_forward_length),
    ):
        if value := known(*attributes):
            add(value)
    if hasattr(config, "use_parallel_residual"):
        writer.add_parallel_residual(config.use_parallel_residual)


def write_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Texts for the ids, since llama.cpp ends the process when asked for those of a model without."""
    special = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(size)])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types(special + [gguf.TokenType.NORMAL] * (size - len(special)))
