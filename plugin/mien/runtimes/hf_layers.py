"""What mien must know of a transformers model: its decoder layers, and the fingerprint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from torch import nn

from ..architectures import gguf_architecture
from ..errors import RuntimeNotSupported
from ..fingerprint import Fingerprint, vocabulary_digest


class Layers(NamedTuple):
    """A model's decoder layers. owner: the module whose forward runs them in order."""

    owner: nn.Module
    modules: tuple[nn.Module, ...]
    path: str


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

    Raises RuntimeNotSupported where there is no such list, or more than one.
    """
    config = text_config(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise RuntimeNotSupported(f"{type(model).__name__} is an encoder-decoder model; mien steers decoders")
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if named is not None and not isinstance(named, str):
        return _owned(model, tuple(named))
    if named is not None:
        if named not in lists:
            raise RuntimeNotSupported(
                f"layers: expected one of {', '.join(lists) or 'no list'}, got {named!r}"
            )
        path = named
    else:
        path = _nearest(model, lists, config.num_hidden_layers)
    return Layers(model.get_submodule(path.rpartition(".")[0]), tuple(lists[path]), path)


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


def _owned(model: Any, modules: tuple[nn.Module, ...]) -> Layers:
    names = {id(module): name for name, module in model.named_modules()}
    missing = [type(module).__name__ for module in modules if id(module) not in names]
    if missing or not modules:
        raise RuntimeNotSupported(f"layers: expected modules of the model, got {missing or 'none'}")
    path = names[id(modules[0])].rpartition(".")[0]
    owner = path.rpartition(".")[0] if isinstance(model.get_submodule(path), nn.ModuleList) else path
    return Layers(model.get_submodule(owner), modules, path)


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
