"""What mien must know of a transformers model: its decoder layers, and the fingerprint."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from torch import nn

from ..architectures import gguf_architecture
from ..errors import RuntimeNotSupported
from ..fingerprint import Fingerprint, vocabulary_digest

# Families whose blocks pass on something else than (batch, tokens, hidden_size), by model type.
_OTHER_STREAMS = {
    "gemma3n_text": "several streams, (altup_num_inputs, batch, tokens, hidden_size)",
    "xlnet": "(tokens, batch, d_model)",
}


class Layers(NamedTuple):
    """A model's decoder layers. owner: the nearest module around them that is given the tokens. names:
    those of the layers in the model; owned: the owner's. path: the list of the layers, for people."""

    owner: nn.Module
    modules: tuple[nn.Module, ...]
    path: str
    names: tuple[str, ...]
    owned: str


def text_config(model: Any) -> Any:
    """The configuration of the part that makes text; of a model of several kinds, too."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise RuntimeNotSupported(f"{type(model).__name__} has no transformers configuration")
    return config.get_text_config()


def find_layers(model: Any, named: str | Sequence[nn.Module] | None = None) -> Layers:
    """The decoder layers of `model`, block 0 first.

    named: where they are, as a path such as "model.layers" or as the modules themselves. Without it the
    model is asked: its configuration has the number of layers, and they are the one list of that many
    modules that lies nearest to the top of its decoder.

    Raises RuntimeNotSupported if there is no such list, or more than one, if no module around them is
    given tokens, or if what they pass on has another shape than (batch, tokens, hidden_size).
    """
    config = text_config(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise RuntimeNotSupported(f"{type(model).__name__} is an encoder-decoder model; mien steers decoders")
    if config.model_type in _OTHER_STREAMS:
        raise RuntimeNotSupported(
            f"the layers of {type(model).__name__} pass on {_OTHER_STREAMS[config.model_type]}; mien steers "
            "a residual stream of (batch, tokens, hidden_size)"
        )
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if named is not None and not isinstance(named, str):
        return _owned(model, _names_of(model, tuple(named)))
    if named is not None and named not in lists:
        raise RuntimeNotSupported(f"layers: expected one of {', '.join(lists) or 'no list'}, got {named!r}")
    path = named if named is not None else _nearest(model, lists, config.num_hidden_layers)
    return _owned(model, [f"{path}.{name}" for name in lists[path]._modules])


def follow_layers(model: Any, layers: Layers, named: str | Sequence[nn.Module] | None) -> Layers:
    """The layers that are now where `layers` were found. named: as it was then.

    Raises RuntimeNotSupported if they can't be found, or are not as many.
    """
    if named is None or isinstance(named, str):
        found = find_layers(model, named)
    else:
        found = _owned(model, [name for name in layers.names if _at(model, name) is not None] or layers.names)
    if len(found.modules) != len(layers.modules):
        raise RuntimeNotSupported(
            f"the model was attached with {len(layers.modules)} layers and has {len(found.modules)} now: "
            "detach it and attach it again"
        )
    return found


def _nearest(model: Any, lists: dict[str, nn.ModuleList], count: int) -> str:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    inside = {id(module) for module in decoder.modules()} if isinstance(decoder, nn.Module) else set()
    fitting = [path for path, found in lists.items() if len(found) == count]
    fitting = [path for path in fitting if id(lists[path]) in inside] or fitting
    depth = min((path.count(".") for path in fitting), default=0)
    nearest = [path for path in fitting if path.count(".") == depth]
    if len(nearest) == 1:
        return nearest[0]
    what = f"{' and '.join(nearest)} both are lists" if nearest else "there is no list"
    others = [f"{path} ({len(found)})" for path, found in lists.items()]
    raise RuntimeNotSupported(
        f"can't tell the decoder layers of {type(model).__name__}: {what} of {count} modules, as its "
        f"configuration says. Name them: mien.attach(model, layers=...), one of {', '.join(others) or 'none'}"
    )


def _names_of(model: Any, modules: tuple[nn.Module, ...]) -> list[str]:
    names = {id(module): name for name, module in model.named_modules()}
    missing = [type(module).__name__ for module in modules if id(module) not in names]
    if missing or not modules:
        raise RuntimeNotSupported(f"layers: expected modules of the model, got {missing or 'none'}")
    return [names[id(module)] for module in modules]


def _owned(model: Any, names: Iterable[str]) -> Layers:
    """The layers of those names, with the nearest module around the first that is given tokens."""
    names = tuple(names)
    modules = tuple(model.get_submodule(name) for name in names)
    if len(set(modules)) < len(modules):
        raise RuntimeNotSupported(
            f"some of the layers of {type(model).__name__} are the same module, which would be steered twice"
        )
    path = above = names[0].rpartition(".")[0]
    while not _takes_tokens(model.get_submodule(above)):
        if not above:
            raise RuntimeNotSupported(
                f"no module around {path} of {type(model).__name__} takes input_ids or inputs_embeds; mien "
                "steers models of text"
            )
        above = above.rpartition(".")[0]
    return Layers(model.get_submodule(above), modules, path, names, above)


def _takes_tokens(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters
    return "input_ids" in parameters or "inputs_embeds" in parameters


def _at(model: nn.Module, name: str) -> nn.Module | None:
    """The module of that name, if there is one."""
    module: nn.Module | None = model
    for part in name.split("."):
        module = module._modules.get(part) if module is not None else None
    return module


class Mounts:
    """Where modules of a model are mounted, to tell whether other modules have been put there since."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        found: dict[tuple[int, str], tuple[dict[str, nn.Module | None], str, nn.Module]] = {}
        self._lists: dict[nn.ModuleList, int] = {}
        for name in names:
            module = model
            for part in name.split(".") if name else ():
                inside = module.get_submodule(part)
                found[id(module), part] = module._modules, part, inside
                if isinstance(module, nn.ModuleList):
                    self._lists[module] = len(module)
                module = inside
        self._links = list(found.values())

    def intact(self) -> bool:
        """Whether all are as they were."""
        for modules, name, module in self._links:
            if modules.get(name) is not module:
                return False
        return all(len(modules) == count for modules, count in self._lists.items())


def require_weights(model: Any, layers: Layers) -> None:
    """Raise RuntimeNotSupported where the weights are nowhere: on `meta`, and no offloading brings them."""
    brought = any(hasattr(module, "_hf_hook") for module in model.modules())
    for layer in layers.modules:
        if not brought and any(parameter.is_meta for parameter in layer.parameters()):
            raise RuntimeNotSupported(
                "the model is on the meta device: it has shapes and no weights. Load it first, "
                "with from_pretrained(...)"
            )


def fingerprint_of(model: Any, layers: Layers, tokenizer: Any = None) -> Fingerprint:
    """What of a transformers model must agree with a vector.

    A model does not hold its vocabulary; without `tokenizer` the digest is empty, and not compared.
    """
    config = text_config(model)
    return Fingerprint(
        architecture=gguf_architecture(config.model_type),
        n_layer=len(layers.modules),
        n_embd=config.hidden_size,
        vocabulary=_vocabulary(tokenizer, config.vocab_size) if tokenizer is not None else "",
        name=PurePath(getattr(model, "name_or_path", "") or "").name,
    )


def _vocabulary(tokenizer: Any, size: int) -> str:
    """The digest over token texts as a GGUF file of the model stores them.

    Where the embedding has more rows than the tokenizer has tokens, converters name the rest [PADn].
    """
    known = {index: text for text, index in tokenizer.get_vocab().items()}
    count = max(size, len(known))
    return vocabulary_digest(known.get(i, f"[PAD{i}]").encode() for i in range(count))
