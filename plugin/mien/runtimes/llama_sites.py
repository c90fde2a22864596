"""Where a llama.cpp model has its sites: found in the graph of one token, not by the architecture's name.

A node that is the product with a weight is known by the weight, whose name is the file's: the attention's
output by blk.N.attn_output.weight, an MLP's by blk.N.ffn_down.weight, a router's logits by
blk.N.ffn_gate_inp.weight. What goes into the first two are the heads and the neurons, and those nodes have
names. A block's output is called l_out-N; in an architecture that names it otherwise it is the node that
block N + 1 begins with: the one that goes into that block's first weight. What no name or weight tells is
missing, and why is kept.
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
_BLOCK = re.compile(r"(?:\w+\.)?blk\.(\d+)\..+")
_NAMED = re.compile(r"(.+)-(\d+)")
_UNNAMED = re.compile(r"|node_\d+")  # ggml's own names; their numbers differ from graph to graph
# What stands between a block's output and the first weight that it meets.
_PASSING = {"NORM", "RMS_NORM", "L2_NORM", "RESHAPE", "VIEW", "CONT", "GET_ROWS"}
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

    chosen: the stem of the nodes that say which experts were chosen, "" where there are none. streams: how
    many residual streams a token has, which are all steered alike.
    """

    places: dict[str, dict[int, Place]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    chosen: str = ""
    streams: int = 1

    def at(self, site: str, layer: int) -> Place:
        """Raises SiteNotFound."""
        place = self.places.get(site, {}).get(layer)
        if place is None:
            raise SiteNotFound(site, layer, self.missing.get(site, "the model has none there"))
        return place


class Node(NamedTuple):
    address: int
    name: str
    operation: str
    sources: tuple[int, int]
    width: int
    rows: int


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
    nodes = scout(hook, context)
    if not nodes:
        found.missing = dict.fromkeys(SITES, "llama.cpp could not evaluate a token to look for it")
        return found
    Search(nodes, n_layer, found, _architecture(context)).run()
    for site, places in found.places.items():
        for layer, place in places.items():
            hook.locate(site, layer, *place)
    return found


def scout(hook: Hook, context: Any) -> list[Node]:
    """The nodes of the graph that evaluates one token in `context`, in order; none if llama.cpp can't.

    An encoder-decoder's are those of its decoder.
    """
    model, memory = api.llama_get_model(context), api.llama_get_memory(context)
    evaluate = api.llama_decode
    if api.llama_model_has_encoder(model):
        evaluate = api.llama_encode
        if api.llama_model_has_decoder(model):  # which llama.cpp ends the process without
            _evaluate_one(api.llama_encode, context)
            evaluate = api.llama_decode
    hook.scout()
    nodes: list[Node] = []
    try:
        if _evaluate_one(evaluate, context) == 0:
            nodes = _read(hook)
    finally:
        hook.nodes()
        if memory is not None:
            api.llama_memory_clear(memory, True)
        api.llama_perf_context_reset(context)
    return nodes


def _evaluate_one(evaluate: Callable[[Any, Any], int], context: Any) -> int:
    batch = api.llama_batch_init(1, 0, 1)
    try:
        batch.n_tokens = batch.n_seq_id[0] = batch.logits[0] = 1
        batch.token[0] = batch.pos[0] = batch.seq_id[0][0] = 0
        return int(evaluate(context, batch))
    finally:
        api.llama_batch_free(batch)


def _architecture(context: Any) -> str:
    text = ctypes.create_string_buffer(64)
    api.llama_model_meta_val_str(api.llama_get_model(context), b"general.architecture", text, len(text))
    return text.value.decode(errors="replace")


def _read(hook: Hook) -> list[Node]:
    text = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)
    number = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)
    name, operation = text(address_of("ggml_get_name")), text(address_of("ggml_op_desc"))
    elements, rows = number(address_of("ggml_nelements")), number(address_of("ggml_nrows"))
    return [
        Node(
            node,
            name(node).decode(errors="replace"),
            operation(node).decode(),
            (hook.source(node, 0), hook.source(node, 1)),
            elements(node) // max(rows(node), 1),
            rows(node),
        )
        for node in hook.nodes()
    ]


class Search:
    """Looks through the nodes of one graph."""

    def __init__(self, nodes: list[Node], n_layer: int, found: Located, architecture: str) -> None:
        self.nodes, self.n_layer, self.found = nodes, n_layer, found
        self.architecture = architecture
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

    def named(self, site: str, layer: int, stem: str) -> Node | None:
        """Take the one node of that name for the place, if there is one."""
        name = stem[1:] if stem.startswith("=") else f"{stem}-{layer}"
        node = next((node for node in self.nodes if node.name == name), None)
        if node is None or self.names[name] != 1:
            return None
        self.add(site, layer, Place(node.width, stem))
        return node

    def residual(self) -> None:
        """By name; or, in a family that names it otherwise, by the weights that it goes into."""
        if self.residual_is(dict.fromkeys(range(self.n_layer), "l_out")):
            return
        outputs = self.block_outputs()
        if not self.residual_is({layer: self.stem_of(node.name, layer) for layer, node in outputs.items()}):
            self.found.missing["residual"] = (
                f"where blocks put out their results is not known in {self.architecture} models: they are "
                "not named l_out-N, and what each block begins with has no name either"
            )

    def residual_is(self, stems: dict[int, str]) -> bool:
        """Take the nodes of those stems, one of each layer, for the residual stream if all are there."""
        nodes = [self.named("residual", layer, stem) for layer, stem in stems.items()]
        streams = {node.rows if node else 0 for node in nodes}  # of the one token; all blocks have as many
        if len(nodes) == self.n_layer and len(streams) == 1 and 0 not in streams:
            self.found.streams = streams.pop()
            return True
        self.found.places.pop("residual", None)
        return False

    def stem_of(self, name: str, layer: int) -> str:
        """What Hook.locate takes for a block's output of that name; it may be named by what it goes into."""
        number, stem = self.n_layer, name
        if match := _NAMED.fullmatch(name):
            stem, number = match[1], int(match[2])
        if number == layer:
            return stem
        return f"={name}" if number == layer + 1 and not _UNNAMED.fullmatch(name) else "="

    def block_outputs(self) -> dict[int, Node]:
        """What each block puts out, told by weights: the node that the next block's first weight meets.

        The next block of the last are the model's own weights, such as the output's norm.
        """
        found: dict[int, Node] = {}
        depths: dict[int, int] = {}  # the last block whose weights went into a node
        for node in self.nodes:
            weights = [self.block_of(source) for source in node.sources]
            inputs = [depths.get(source, -1) for source in node.sources]
            for weight, depth, source in zip(weights, reversed(inputs), reversed(node.sources)):
                if depth >= 0 and weight == depth + 1 and depth not in found:
                    found[depth] = self.passed(self.by_address[source])
            depths[node.address] = max(*inputs, *(weight for weight in weights if weight < self.n_layer))
        return found

    def block_of(self, address: int) -> int:
        """The block that a weight belongs to, n_layer for one of the model's own, -1 for anything else."""
        if not address or address in self.by_address:
            return -1
        name = self.name_of(address)
        if match := _BLOCK.fullmatch(name):
            return int(match[1])
        return self.n_layer if name.endswith(".weight") else -1

    def passed(self, node: Node) -> Node:
        """The node that a norm, or a selection of rows, was made of."""
        while node.operation in _PASSING and node.sources[0] in self.by_address:
            node = self.by_address[node.sources[0]]
        return node

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
