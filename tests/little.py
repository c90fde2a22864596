"""A tiny random model of llama.cpp's that reads and writes any text: a token for each byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

N_LAYER, N_EMBD, N_FF = 3, 32, 48
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}a:"
# Texts beside the bytes, which cp1252 and ASCII have no place for: replies hold many of them.
WORDS = [f"喜び😀{i}" for i in range(40)]


def write_model(path: Path, *, template: str = TEMPLATE, n_ctx: int = 512, seed: int = 0) -> Path:
    """Write the GGUF file: the same bytes each time. template: the chat template, "" for none."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("little")
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(N_EMBD // 2)
    if template:
        writer.add_chat_template(template)
    n_vocab = _write_vocabulary(writer)

    def weights(*shape: int, scale: float = 0.15) -> Any:
        return (scale * random.standard_normal(shape)).astype(np.float32)

    ones = np.ones(N_EMBD, dtype=np.float32)
    writer.add_tensor("token_embd.weight", weights(n_vocab, N_EMBD, scale=0.5))
    writer.add_tensor("output_norm.weight", ones)
    output = weights(n_vocab, N_EMBD)
    output[-len(WORDS) :] *= 3  # the words are probable
    writer.add_tensor("output.weight", output)
    for i in range(N_LAYER):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", ones)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            writer.add_tensor(f"blk.{i}.{name}.weight", weights(N_EMBD, N_EMBD))
        for name in ("ffn_gate", "ffn_up"):
            writer.add_tensor(f"blk.{i}.{name}.weight", weights(N_FF, N_EMBD))
        writer.add_tensor(f"blk.{i}.ffn_down.weight", weights(N_EMBD, N_FF))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_vocabulary(writer: gguf.GGUFWriter) -> int:
    kind = gguf.TokenType
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    types = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, *[kind.BYTE] * 256, *[kind.NORMAL] * len(WORDS)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores([0.0] * len(texts))
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    return len(texts)
