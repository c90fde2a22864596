"""What transformers and GGUF call the same architecture: `mistral` and `llama`, `gpt_neox` and `gptneox`."""

from __future__ import annotations

import re
from functools import cache

# Where the names differ in more than punctuation: transformers' `model_type` -> GGUF's
# `general.architecture`, as llama.cpp's converter takes them. Of several that become one
# architecture the first is the one that `transformers_model_type` gives.
_NAMES = {
    "mistral": "llama",
    "mixtral": "llama",
    "internlm3": "llama",
    "bamba": "granitehybrid",
    "cohere": "command-r",
    "deepseek_v3": "deepseek2",
    "deepseek_v2": "deepseek2",
    "kimi_k2": "deepseek2",
    "glm4_moe_lite": "deepseek2",
    "falcon_mamba": "mamba",
    "gemma3_text": "gemma3",
    "gemma3n_text": "gemma3n",
    "gemma4_text": "gemma4",
    "glm": "chatglm",
    "glm_moe_dsa": "glm-dsa",
    "gpt_bigcode": "starcoder",
    "granitemoehybrid": "granitehybrid",
    "granitemoeshared": "granitemoe",
    "hunyuan_v1_dense": "hunyuan-dense",
    "hunyuan_v1_moe": "hunyuan-moe",
    "llama4_text": "llama4",
    "mimo_v2_flash": "mimo2",
    "ministral3": "mistral3",
    "olmo3": "olmo2",
    "phi": "phi2",
    "qwen2_5_vl": "qwen2vl",
    "qwen2_5_vl_text": "qwen2vl",
    "qwen2_vl_text": "qwen2vl",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe_text": "qwen35moe",
    "qwen3_vl_text": "qwen3vl",
    "qwen3_vl_moe_text": "qwen3vlmoe",
}

# The way back, where neither the same name nor the first of the table is right.
_BACK = {
    "ernie4_5-moe": "ernie4_5_moe",
    "exaone-moe": "exaone_moe",
    "falcon-h1": "falcon_h1",
    "glm4moe": "glm4_moe",
    "gpt-oss": "gpt_oss",
    "gptneox": "gpt_neox",
    "granitehybrid": "granitemoehybrid",
    "granitemoe": "granitemoe",
    "kimi-linear": "kimi_linear",
    "lfm2moe": "lfm2_moe",
    "llama": "llama",
    "mamba": "mamba",
    "minimax-m2": "minimax_m2",
    "olmo2": "olmo2",
    "qwen2moe": "qwen2_moe",
    "qwen35": "qwen3_5",
    "qwen35moe": "qwen3_5_moe",
    "qwen3moe": "qwen3_moe",
    "qwen3next": "qwen3_next",
    "qwen3vl": "qwen3_vl",
    "qwen3vlmoe": "qwen3_vl_moe",
}


def gguf_architecture(model_type: str) -> str:
    """GGUF's name of what transformers calls `model_type`; a name that neither knows as it is."""
    if model_type in _NAMES:
        return _NAMES[model_type]
    return _by_letters().get(_letters(model_type), model_type)


def transformers_model_type(architecture: str) -> str:
    """The `model_type` of a GGUF architecture; a name that is not known as it is.

    Several types can have become one architecture (`mistral` is `llama` in GGUF): the one that gave it
    its name is the answer.
    """
    if architecture in _BACK:
        return _BACK[architecture]
    return next((ours for ours, theirs in _NAMES.items() if theirs == architecture), architecture)


def is_gguf_architecture(name: str) -> bool:
    """Whether GGUF has an architecture of that name."""
    return _by_letters().get(_letters(name)) == name


@cache
def _by_letters() -> dict[str, str]:
    from gguf.constants import MODEL_ARCH_NAMES

    return {_letters(name): name for name in MODEL_ARCH_NAMES.values()}


def _letters(name: str) -> str:
    """Without what the two sides punctuate differently: gpt_neox and gptneox, qwen2_moe and qwen2moe."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
