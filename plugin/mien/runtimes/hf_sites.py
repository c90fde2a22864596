"""Where the sites of a transformers model are: the modules whose input or output a program acts on.

They are found by what modules are, with the names that families use as a help; each site of a layer is
looked for when it is first needed.
"""

from __future__ import annotations

import inspect
import re
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import SiteNotFound
from .hf_experts import Router, find_router, is_mixture
from .hf_layers import Layers, text_config

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|moe|experts", re.IGNORECASE)
_INWARD = re.compile(r"w?[qkv]", re.IGNORECASE)
_ADAPTER = re.compile(r"lora|base_layer")  # inside of a module that PEFT has put in a linear one's place
_FROM_HEADS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
_FROM_NEURONS = ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "fc_out", "w2")


class Spot(NamedTuple):
    """One site of one layer. width: of its rows. inward: the module's input, not its output. router: of
    the experts, how they are chosen."""

    module: nn.Module
    width: int
    inward: bool = False
    router: Router | None = None


class Sites:
    """The sites of one model."""

    def __init__(self, model: Any, layers: Layers) -> None:
        self._config = text_config(model)
        self._layers, self._names = layers.modules, layers.names
        self._blocks = [_block(layer) for layer in layers.modules]
        self._found: dict[tuple[str, int], Spot] = {}

    def spot(self, site: str, layer: int) -> Spot:
        """Where it is. Raises SiteNotFound, which says what was looked for."""
        place = site, layer
        if place not in self._found:
            self._found[place] = _FINDERS[site](self, layer)
        return self._found[place]

    def name(self, site: str, layer: int) -> str:
        """The name in the model of the module where it is."""
        module = self.spot(site, layer).module
        inner = next(name for name, each in self._layers[layer].named_modules() if each is module)
        return f"{self._names[layer]}.{inner}".rstrip(".")

    @cached_property
    def routed(self) -> tuple[int, ...]:
        """The layers that are mixtures of experts."""
        return tuple(layer for layer in range(len(self._layers)) if self._is_mixture(layer))

    @cached_property
    def experts_used(self) -> int:
        """How many experts a router chooses for a token; 0 without experts. Raises SiteNotFound."""
        router = self.spot("experts", self.routed[0]).router if self.routed else None
        return router.used if router is not None else 0

    # ---- by site ----

    def _residual(self, layer: int) -> Spot:
        return Spot(self._layers[layer], self._config.hidden_size)

    def _attention(self, layer: int) -> Spot:
        module = self._child("attention", layer)
        if _adds_residual(module):  # what comes out of it is the stream already
            module = self._from_heads("attention", layer)
        return Spot(module, self._config.hidden_size)

    def _mlp(self, layer: int) -> Spot:
        module = self._mlp_child(layer)
        if module is None or _adds_residual(module):
            module = self._from_neurons("mlp", layer)
        return Spot(module, self._config.hidden_size)

    def _heads(self, layer: int) -> Spot:
        module = self._from_heads("heads", layer)
        return Spot(module, _shape(module)[0], inward=True)

    def _neurons(self, layer: int) -> Spot:
        if self._is_mixture(layer):
            raise SiteNotFound(
                "neurons",
                layer,
                "its MLP is a mixture of experts, each of which has neurons of its own; the sites experts "
                "and mlp are there",
            )
        module = self._from_neurons("neurons", layer)
        return Spot(module, _shape(module)[0], inward=True)

    def _experts(self, layer: int) -> Spot:
        mlp = self._mlp_child(layer)
        if mlp is None or not is_mixture(mlp):
            raise SiteNotFound(
                "experts", layer, "its MLP is dense: there is no module named experts, and no router"
            )
        router = find_router(mlp, self._config.hidden_size, self._config, layer)
        return Spot(router.module, router.width, router=router)

    # ---- by module ----

    def _is_mixture(self, layer: int) -> bool:
        try:
            mlp = self._mlp_child(layer)
        except SiteNotFound:
            return False
        return mlp is not None and is_mixture(mlp)

    def _mlp_child(self, layer: int) -> nn.Module | None:
        """None where its linear modules lie in the layer itself, as in OPT."""
        if any(name in _FROM_NEURONS for name, _ in self._blocks[layer].named_children()):
            return None
        return self._child("mlp", layer)

    def _child(self, site: str, layer: int) -> nn.Module:
        """The layer's module of that kind, which has weights that are matrices."""
        kind = _ATTENTION if site == "attention" else _MLP
        children = {name: m for name, m in self._blocks[layer].named_children() if _has_matrices(m)}
        found = [name for name in children if kind.search(name)]
        if len(found) != 1:
            raise SiteNotFound(
                site,
                layer,
                f"expected one module with a name like {' or '.join(kind.pattern.split('|'))}, got "
                f"{' and '.join(found) or ', '.join(children) or 'a layer without modules'}",
            )
        return children[found[0]]

    def _from_heads(self, site: str, layer: int) -> nn.Module:
        """The output projection of the attention."""
        config = self._config
        attention = self._child("attention", layer)
        size = getattr(attention, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = config.num_attention_heads * size
        return self._projection(site, layer, attention, _FROM_HEADS, width)

    def _from_neurons(self, site: str, layer: int) -> nn.Module:
        """The down projection of a dense MLP."""
        mlp = self._mlp_child(layer)
        return self._projection(site, layer, self._blocks[layer] if mlp is None else mlp, _FROM_NEURONS)

    def _projection(
        self, site: str, layer: int, inside: nn.Module, names: tuple[str, ...], width: int | None = None
    ) -> nn.Module:
        """The module that comes last before the residual stream: by its name, else the one that is linear
        from `width` floats to n_embd, and no projection to queries, keys or values."""
        n_embd = self._config.hidden_size
        found = {
            name.rpartition(".")[2]: module
            for name, module in inside.named_modules()
            if _shape(module)[1] == n_embd and not _ADAPTER.search(name)
        }
        for name in names:
            if name in found:
                return found[name]
        fitting = [
            module
            for name, module in found.items()
            if width in (None, _shape(module)[0]) and not _INWARD.match(name)
        ]
        if len(fitting) != 1:
            raise SiteNotFound(
                site,
                layer,
                f"expected one linear module to {n_embd} floats in {type(inside).__name__}, named "
                f"{', '.join(names)}" + ("" if width is None else f" or from {width} floats"),
            )
        return fitting[0]


_FINDERS = {
    "residual": Sites._residual,
    "attention": Sites._attention,
    "mlp": Sites._mlp,
    "heads": Sites._heads,
    "neurons": Sites._neurons,
    "experts": Sites._experts,
}


def _block(layer: nn.Module) -> nn.Module:
    """The block itself of a layer that may be wrapped (checkpointing, sharding, compilation)."""
    while True:
        children = list(layer.named_children())
        if len(children) != 1:
            return layer
        ((name, inside),) = children
        if _ATTENTION.search(name) or _MLP.search(name) or _shape(inside)[1]:
            return layer
        layer = inside


def _shape(module: nn.Module) -> tuple[int, int]:
    """(floats in, floats out) of a linear module, also of one that holds them in another form; else 0."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return getattr(module, "in_features", 0), getattr(module, "out_features", 0)


def _has_matrices(module: nn.Module) -> bool:
    """Quantised modules may hold them as what is no tensor of the module."""
    tensors = chain(module.parameters(), module.buffers())
    return any(tensor.dim() > 1 for tensor in tensors) or any(_shape(each)[1] for each in module.modules())


def _adds_residual(module: nn.Module) -> bool:
    """Whether it is given the residual stream besides its input, to add it, as in BLOOM."""
    return "residual" in inspect.signature(module.forward).parameters
