"""Small random transformers models for the tests, and ways to run them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

N_LAYER, N_EMBD, N_VOCAB, PAD = 4, 32, 64, 0
SIZES = {
    "vocab_size": N_VOCAB,
    "hidden_size": N_EMBD,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYER,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = torch.tensor([[5, 9, 2, 33, 60, 7, 11]])


def make_model(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(**{**SIZES, "pad_token_id": PAD, "eos_token_id": None, "bos_token_id": 1, **changes})
    return LlamaForCausalLM(config).eval()


def keep_in(states: list[Any]) -> Callable[..., None]:
    """A hook of somebody else's, that keeps what it sees."""
    return lambda module, args, output: states.append(output if output.requires_grad else output.clone())


def cache_argument(cache: Any) -> dict[str, Any]:
    """As the installed transformers names it."""
    parameters = inspect.signature(LlamaForCausalLM.forward).parameters
    return {"cache" if "cache" in parameters else "past_key_values": cache}


@torch.no_grad()
def logits(model: Any, ids: Any = IDS, **options: Any) -> Any:
    return model(input_ids=ids, **options).logits


@torch.no_grad()
def reply(model: Any, ids: Any = IDS, count: int = 6, **options: Any) -> list[list[int]]:
    options = {"do_sample": False, "max_new_tokens": count, "pad_token_id": PAD, **options}
    found: list[list[int]] = model.generate(ids, **options)[:, -count:].tolist()
    return found


def batch(rows: list[Any], side: str, length: int | None = None) -> dict[str, Any]:
    """Rows of ids padded to one length on one side, with their mask and positions."""
    length = length or max(map(len, rows))
    ids, mask = torch.full((len(rows), length), PAD), torch.zeros((len(rows), length), dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.as_tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def state(model: Any) -> tuple[Any, ...]:
    hooks = [
        (name, *(len(getattr(module, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks")))
        for name, module in model.named_modules()
    ]
    return hooks, {name: sorted(vars(module)) for name, module in model.named_modules()}
