"""Where a llama.cpp model has its sites: found in the graph of one token, not by the architecture's name.

A node that is the product with a weight is known by the weight, whose name is the file's: the attention's
output by blk.N.attn_output.weight, an MLP's by blk.N.ffn_down.weight, a router's logits by
blk.N.ffn_gate_inp.weight. What goes into the first two are the heads and the neurons, and those nodes have
names. What no name or weight tells is missing, and why is kept.
"""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import llama_cpp.llama_cpp as api

from ..engine import Hook
from ..errors import SiteNotFound
from ..vector import SITES

_WEIGHT = re.compile(r"blk\.(\d+)\.(attn_output|ffn_down|ffn_gate_inp)\.weight")
_NAMED = re.compile(r"(.+)-(\d+)")
_CHOSEN = "ffn_moe_argsort"  # a row of it begins with the experts that were chosen
_TAIL = 2  # a product's bias, or scale, and no more


class Place(NamedTuple):
    """One site of one layer: see Hook.locate."""

    width: int
    stem: str = ""
    weight: int = 0
    tail: int = 0


@dataclass
class Located:
    """Where the sites are. places: {site: {layer: Place}}. missing: {site: why it was not found}.

    chosen: the stem of the nodes that say which experts were chosen, "" where there are none.
    """

    places: dict[str, dict[int, Place]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    chosen: str = ""

    def at(self, site: str, layer: int) -> Place:
        """Raises SiteNotFound."""
        place = self.places.get(site, {}).get(layer)
        if place is None:
            raise SiteNotFound(site, layer, self.missing.get(site, "the model has none there"))
        return place


class _Node(NamedTuple):
    address: int
    name: str
    operation: str
    sources: tuple[int, int]
    width: int


def address_of(name: str) -> int:
    """Of a function in the library that llama_cpp has loaded, 0 where it has none of that name."""
    try:
        return ctypes.cast(getattr(api._lib, name), ctypes.c_void_p).value or 0
    except AttributeError:
        return 0


def locate_sites(hook: Hook, context: Any, n_layer: int) -> Located:
    """Evaluate one token in `context`, which is empty and left so, and find the sites in its graph.

    The hook, which is the context's, is told of every one that is found.
    """
    found = Located()
    memory = api.llama_get_memory(context)
    if memory is None:
        found.missing = dict.fromkeys(SITES[1:], "the model makes embeddings only")
        return found
    hook.scout()
    nodes: list[_Node] = []
    try:
        if _evaluate_one(context) == 0:
            nodes = _read(hook)
    finally:
        hook.nodes()
        api.llama_memory_clear(memory, True)
        api.llama_perf_context_reset(context)
    _Search(nodes, n_layer, found).run()
    for site, places in found.places.items():
        for layer, place in places.items():
            hook.locate(site, layer, *place)
    return found


def _evaluate_one(context: Any) -> int:
    batch = api.llama_batch_init(1, 0, 1)
    try:
        batch.n_tokens = batch.n_seq_id[0] = batch.logits[0] = 1
        batch.token[0] = batch.pos[0] = batch.seq_id[0][0] = 0
        return int(api.llama_decode(context, batch))
    finally:
        api.llama_batch_free(batch)


def _read(hook: Hook) -> list[_Node]:
    text = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)
    number = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)
    name, operation = text(address_of("ggml_get_name")), text(address_of("ggml_op_desc"))
    elements, rows = number(address_of("ggml_nelements")), number(address_of("ggml_nrows"))
    return [
        _Node(
            node,
            name(node).decode(errors="replace"),
            operation(node).decode(),
            (hook.source(node, 0), hook.source(node, 1)),
            elements(node) // max(rows(node), 1),
        )
        for node in hook.nodes()
    ]


class _Search:
    """Looks through the nodes of one graph."""

    def __init__(self, nodes: list[_Node], n_layer: int, found: Located) -> None:
        self.nodes, self.n_layer, self.found = nodes, n_layer, found
        self.by_address = {node.address: node for node in nodes}
        self.names = Counter(node.name for node in nodes)
        self.products = {}  # (weight's kind, layer): number of the node
        name = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(address_of("ggml_get_name"))
        self.name_of: Callable[[int], str] = lambda at: name(at).decode(errors="replace") if at else ""
        for i, node in enumerate(nodes):
            if node.operation == "MUL_MAT" and (match := _WEIGHT.fullmatch(self.name_of(node.sources[0]))):
                self.products[match[2], int(match[1])] = i

    def run(self) -> None:
        self.residual()
        self.experts()
        self.product("attention", "attn_output")
        self.product("mlp", "ffn_down")
        self.moe_outputs()
        self.input_of("heads", "attn_output")
        self.input_of("neurons", "ffn_down")
        for site in SITES:
            if not self.found.places.get(site):
                self.found.missing.setdefault(site, "its nodes are not known in this architecture")

    def add(self, site: str, layer: int, place: Place) -> None:
        self.found.places.setdefault(site, {})[layer] = place

    def named(self, site: str, layer: int, stem: str) -> bool:
        """Take the one node of that name for the place."""
        node = next((node for node in self.nodes if node.name == f"{stem}-{layer}"), None)
        if node is None or self.names[node.name] != 1:
            return False
        self.add(site, layer, Place(node.width, stem))
        return True

    def residual(self) -> None:
        """l_out-N; in a family that calls it otherwise, the last sum of each block."""
        if all(self.named("residual", layer, "l_out") for layer in range(self.n_layer)):
            return
        self.found.places.pop("residual", None)
        last: dict[int, str] = {}
        for node in self.nodes:
            match = _NAMED.fullmatch(node.name)
            if match and node.operation == "ADD":
                last[int(match[2])] = match[1]
        stems = {last.get(layer, "") for layer in range(self.n_layer)}
        stem = stems.pop() if len(stems) == 1 else ""
        if not stem or not all(self.named("residual", layer, stem) for layer in range(self.n_layer)):
            self.found.places.pop("residual", None)
            self.found.missing["residual"] = "blocks end in no node l_out-N, nor in sums of one other name"

    def product(self, site: str, kind: str) -> None:
        for layer in range(self.n_layer):
            if (kind, layer) in self.products:
                self.add(site, layer, self.weighed(self.products[kind, layer], layer))

    def weighed(self, number: int, layer: int) -> Place:
        """The product, with the bias or scale of its layer that is put on it next."""
        node = self.nodes[number]
        weight, tail, here = node.sources[0], 0, node
        for after in self.nodes[number + 1 :]:
            if tail == _TAIL or after.sources[0] != here.address:
                if any(source == here.address for source in after.sources):
                    break
                continue
            own = re.fullmatch(rf"blk\.{layer}\..*\.(bias|scale)", self.name_of(after.sources[1]))
            if after.operation not in ("ADD", "MUL") or not own:
                break
            tail, here = tail + 1, after
        return Place(node.width, weight=weight, tail=tail)

    def input_of(self, site: str, kind: str) -> None:
        """The node that goes into the product, which must have a name of its own."""
        for layer in range(self.n_layer):
            if (kind, layer) not in self.products:
                continue
            node = self.by_address.get(self.nodes[self.products[kind, layer]].sources[1])
            match = _NAMED.fullmatch(node.name) if node else None
            if match is None or not self.named(site, layer, match[1]):
                what = node.name if node else "another graph's node"
                self.found.missing[site] = f"what goes into blk.{layer}.{kind}.weight has no name ({what})"

    def moe_outputs(self) -> None:
        """A mixture of experts' output: with the shared experts added where there are any."""
        for layer in self.found.places.get("experts", {}):
            if ("ffn_down", layer) in self.products:
                continue
            _ = self.named("mlp", layer, "ffn_out") or self.named("mlp", layer, "ffn_moe_out")
            self.found.missing["neurons"] = "its MLPs are mixtures of experts"

    def experts(self) -> None:
        for layer in range(self.n_layer):
            if self.names[f"ffn_moe_probs_biased-{layer}"]:
                self.found.missing["experts"] = (
                    "its router adds a bias after its logits, which could choose a forbidden expert again"
                )
            elif ("ffn_gate_inp", layer) in self.products:
                self.add("experts", layer, self.weighed(self.products["ffn_gate_inp", layer], layer))
            if self.names[f"{_CHOSEN}-{layer}"] == 1:
                self.found.chosen = _CHOSEN
        if not self.found.places.get("experts"):
            self.found.missing.setdefault("experts", "the model is no mixture of experts")
