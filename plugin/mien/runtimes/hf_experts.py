"""Mixtures of experts: how a router chooses, and what it has chosen.

Transformers 5 has routers that give (logits, weights, indices): where logits were changed the choice is
made again, in the way that reproduces the router's own. In transformers 4 a router is a linear module and
its block chooses from what it gives.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..errors import SiteNotFound

_NAMES = ("gate", "router")
_TRIED = 5  # rows


class Router(NamedTuple):
    """How one router chooses. width: how many experts there are; used: how many are chosen for a token.
    chooses: whether it does so itself; normalised: whether the weights of those add up to 1."""

    module: nn.Module
    width: int
    used: int
    chooses: bool
    normalised: bool

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(weights, indices), both (rows, used), float32 and int64, from the greatest logit on."""
        top, indices = logits.topk(self.used, dim=-1)
        if self.normalised:
            return torch.softmax(top.float(), dim=-1), indices
        return torch.softmax(logits.float(), dim=-1).gather(-1, indices), indices

    def again(self, logits: Tensor, given: tuple[Tensor, ...], changed: Tensor) -> tuple[Tensor, ...]:
        """What the router would have given with these logits; other rows than `changed` (bool, (rows, 1))
        keep what it gave."""
        _, weights, indices = given
        new_weights, new_indices = self.choose(logits)
        new_indices = new_indices.to(indices.dtype)
        return (
            logits,
            torch.where(changed, new_weights.to(weights.dtype), weights),
            torch.where(changed, new_indices, indices),
        )


def is_mixture(mlp: nn.Module) -> bool:
    return "experts" in dict(mlp.named_children())


def find_router(mlp: nn.Module, n_embd: int, config: Any, layer: int) -> Router:
    """The router of a mixture of experts, tried out on a few rows. Raises SiteNotFound."""
    children = dict(mlp.named_children())
    found = [children[name] for name in _NAMES if name in children]
    if not is_mixture(mlp) or len(found) != 1:
        raise SiteNotFound(
            "experts",
            layer,
            f"expected a module named experts beside one named {' or '.join(_NAMES)} in its MLP, which has "
            f"{', '.join(children) or 'no modules'}",
        )
    (module,) = found
    given = _tried(module, n_embd)
    if isinstance(given, Tensor):
        used: int = getattr(mlp, "top_k", 0) or getattr(config, "num_experts_per_tok", 0)
        router = Router(module, given.shape[-1], used, chooses=False, normalised=False)
        known = given.shape == (_TRIED, router.width) and router.width > 1 and 0 < used <= router.width
    else:
        router, known = _as_given(module, given)
    if not known:
        raise SiteNotFound(
            "experts",
            layer,
            f"{type(module).__name__} chooses experts in a way that mien can't follow: expected the router's "
            "logits, or those with the weights and indices of the greatest of their softmax",
        )
    return router


def _tried(module: nn.Module, n_embd: int) -> Any:
    """What it gives for some rows that are no two alike."""
    weight = next(module.parameters())
    rows = 10 * torch.sin(torch.arange(_TRIED * n_embd) ** 1.5).reshape(_TRIED, n_embd)
    device = torch.device("cpu") if weight.is_meta else weight.device  # offloaded: it is brought by its hook
    with torch.no_grad():
        return module.forward(rows.to(device, weight.dtype))


def _as_given(module: nn.Module, given: Any) -> tuple[Router, bool]:
    """The router that gives this, and whether it does so as `choose`."""
    nothing = Router(module, 0, 0, True, False)
    if not isinstance(given, tuple) or len(given) != 3 or not all(isinstance(part, Tensor) for part in given):
        return nothing, False
    logits, weights, indices = given
    if logits.dim() != 2 or weights.shape != indices.shape or indices.is_floating_point():
        return nothing, False
    for normalised in (True, False):
        router = Router(module, logits.shape[-1], indices.shape[-1], True, normalised)
        if _agrees(router, logits, weights, indices):
            return router, True
    return nothing, False


def _agrees(router: Router, logits: Tensor, weights: Tensor, indices: Tensor) -> bool:
    if indices.min() < 0 or indices.max() >= router.width or router.used > router.width:
        return False
    chosen, _ = router.choose(logits)
    greatest = logits.topk(router.used, dim=-1).values
    rough = 1e-5 if weights.dtype in (torch.float32, torch.float64) else 2e-2
    return bool(
        torch.equal(logits.gather(-1, indices.long()), greatest)
        and torch.allclose(chosen, weights.float(), rtol=rough, atol=rough)
    )


class Counts:
    """How often each expert of a layer was chosen; threads may add at the same time."""

    def __init__(self) -> None:
        self._found: dict[int, Tensor] = {}
        self._adding = threading.Lock()

    def add(self, layer: int, count: int, indices: Tensor, real: Tensor | None) -> None:
        """count: experts. indices: (rows, used). real: bool, one a row, false for what is not counted."""
        each = torch.ones(indices.shape, dtype=torch.int64, device=indices.device)
        if real is not None:
            each = each * real.to(indices.device).reshape(-1, 1)
        counts = torch.zeros(count, dtype=torch.int64, device=indices.device)
        counts.index_add_(0, indices.reshape(-1).long(), each.reshape(-1))
        with self._adding:
            before = self._found.get(layer)
            self._found[layer] = counts if before is None else before + counts

    def read(self) -> dict[int, npt.NDArray[np.int64]]:
        """By layer, int64 (experts,)."""
        return {layer: found.cpu().numpy().copy() for layer, found in sorted(self._found.items())}
