"""Tiny random hybrids of attention and something recurrent, for llama.cpp alone.

PLaMo 2 is an architecture for which llama.cpp has no control vectors: its graph (src/models/plamo2.cpp) has
no build_cvec, and its blocks end in ffn_residual-N, not in l_out-N. Every other block is a Mamba. llama.cpp
ends the process where a context of it has several sequences.

LFM2 has short convolutions in place of the Mambas, and is run with several.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

import gguf
import numpy as np
from tiny import N_VOCAB, QUANTISED, SEED, Array, finish, write_vocabulary

N_LAYER, N_EMBD, N_FF, HEAD_DIM = 4, 64, 96, 32
ATTENTION_LAYERS = (1, 3)
CONVOLVED, INNER, STATE, SSM_HEADS = 4, 128, 16, 4  # of PLaMo 2
STEP = 64  # max(64, N_EMBD / 16), as llama.cpp has it

# By llama.cpp's names; shapes are rows first.
Weights: TypeAlias = "Iterable[tuple[str, Array]]"


def build_plamo2(folder: Path) -> Path:
    """Write the GGUF in `folder`: the same bytes each time, all of them float32."""
    path = folder / "plamo2.gguf"
    writer = _new_writer(path, "plamo2", n_head=4, n_head_kv=2)
    writer.add_ssm_conv_kernel(CONVOLVED)
    writer.add_ssm_inner_size(INNER)
    writer.add_ssm_state_size(STATE)
    writer.add_ssm_time_step_rank(SSM_HEADS)
    writer.add_ssm_group_count(0)
    for name, weight in _Random().plamo2():
        writer.add_tensor(name, weight)
    finish(writer)
    return path


def build_lfm2(folder: Path) -> Path:
    """The same, with products QUANTISED."""
    path = folder / "lfm2.gguf"
    writer = _new_writer(path, "lfm2", n_head=2, n_head_kv=2)
    writer.add_shortconv_l_cache(CONVOLVED)
    for name, weight in _Random().lfm2():
        if weight.ndim == 1 or "shortconv.conv" in name:
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(name, gguf.quants.quantize(weight, QUANTISED), raw_dtype=QUANTISED)
    finish(writer)
    return path


def _new_writer(path: Path, architecture: str, n_head: int, n_head_kv: int) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(n_head)
    # A block without heads is the other kind.
    writer.add_head_count_kv([n_head_kv if layer in ATTENTION_LAYERS else 0 for layer in range(N_LAYER)])
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    write_vocabulary(writer, N_VOCAB)
    return writer


class _Random:
    """Draws weights of a size that keeps activations near 1."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(SEED)

    def noise(self, *shape: int, mean: float = 0.0, deviation: float = 0.12) -> Array:
        return (mean + deviation * self.random.standard_normal(shape)).astype(np.float32)

    def norm(self, *shape: int) -> Array:
        return self.noise(*shape, mean=1.0, deviation=0.2)

    def plamo2(self) -> Iterator[tuple[str, Array]]:
        noise, norm = self.noise, self.norm
        yield "token_embd.weight", noise(N_VOCAB, N_EMBD, deviation=0.5)
        yield "output_norm.weight", norm(N_EMBD)
        yield "output.weight", noise(N_VOCAB, N_EMBD)
        for layer in range(N_LAYER):
            block = f"blk.{layer}"
            yield f"{block}.attn_norm.weight", norm(N_EMBD)
            if layer in ATTENTION_LAYERS:
                yield f"{block}.attn_qkv.weight", noise((4 + 2 * 2) * HEAD_DIM, N_EMBD)
                yield f"{block}.attn_q_norm.weight", norm(4, HEAD_DIM)
                yield f"{block}.attn_k_norm.weight", norm(2, HEAD_DIM)
                yield f"{block}.attn_output.weight", noise(N_EMBD, 4 * HEAD_DIM)
            else:
                yield f"{block}.ssm_in.weight", noise(2 * INNER, N_EMBD)
                yield f"{block}.ssm_conv1d.weight", noise(INNER, CONVOLVED, deviation=0.5)
                yield f"{block}.ssm_x.weight", noise(STEP + 2 * STATE, INNER)
                yield f"{block}.ssm_dt.weight", noise(SSM_HEADS, STEP)
                yield f"{block}.ssm_dt.bias", noise(SSM_HEADS)
                yield f"{block}.ssm_a", -np.exp(noise(SSM_HEADS))
                yield f"{block}.ssm_d", norm(SSM_HEADS)
                yield f"{block}.ssm_dt_norm", norm(STEP)
                yield f"{block}.ssm_b_norm", norm(STATE)
                yield f"{block}.ssm_c_norm", norm(STATE)
                yield f"{block}.ssm_out.weight", noise(N_EMBD, INNER)
            yield f"{block}.post_attention_norm", norm(N_EMBD)
            yield f"{block}.ffn_norm.weight", norm(N_EMBD)
            yield f"{block}.ffn_up.weight", noise(2 * N_FF, N_EMBD)
            yield f"{block}.ffn_down.weight", noise(N_EMBD, N_FF, deviation=0.03)
            yield f"{block}.post_ffw_norm", norm(N_EMBD)

    def lfm2(self) -> Iterator[tuple[str, Array]]:
        noise, norm = self.noise, self.norm
        yield "token_embd.weight", noise(N_VOCAB, N_EMBD, deviation=0.5)
        yield "token_embd_norm.weight", norm(N_EMBD)
        yield "output.weight", noise(N_VOCAB, N_EMBD)
        for layer in range(N_LAYER):
            block = f"blk.{layer}"
            yield f"{block}.attn_norm.weight", norm(N_EMBD)
            if layer in ATTENTION_LAYERS:
                for part in ("q", "k", "v"):
                    yield f"{block}.attn_{part}.weight", noise(N_EMBD, N_EMBD)
                yield f"{block}.attn_q_norm.weight", norm(HEAD_DIM)
                yield f"{block}.attn_k_norm.weight", norm(HEAD_DIM)
                yield f"{block}.attn_output.weight", noise(N_EMBD, N_EMBD)
            else:
                yield f"{block}.shortconv.conv.weight", noise(N_EMBD, CONVOLVED, deviation=0.5)
                yield f"{block}.shortconv.in_proj.weight", noise(3 * N_EMBD, N_EMBD)
                yield f"{block}.shortconv.out_proj.weight", noise(N_EMBD, N_EMBD)
            yield f"{block}.ffn_norm.weight", norm(N_EMBD)
            yield f"{block}.ffn_gate.weight", noise(N_FF, N_EMBD)
            yield f"{block}.ffn_up.weight", noise(N_FF, N_EMBD)
            yield f"{block}.ffn_down.weight", noise(N_EMBD, N_FF)
