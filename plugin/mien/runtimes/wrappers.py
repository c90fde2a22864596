"""Models inside of other people's wrappers, which run them as they are: what is attached is the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# By the names of their classes, so that nothing is imported for a model of another kind.
_INSIDE: dict[str, Callable[[Any], Any]] = {
    "peft.PeftModel": lambda wrapper: wrapper.get_base_model(),
    "peft.PeftMixedModel": lambda wrapper: wrapper.base_model.model,
    "torch.DataParallel": lambda wrapper: wrapper.module,
    "torch.DistributedDataParallel": lambda wrapper: wrapper.module,
    "torch.OptimizedModule": lambda wrapper: wrapper._orig_mod,
}


def unwrap(model: Any) -> Any:
    """The model that PEFT, DataParallel or torch.compile has wrapped, however often; else `model` itself."""
    while True:
        inside = next((_INSIDE[name] for name in homes_of(model) if name in _INSIDE), None)
        if inside is None:
            return model
        model = inside(model)


def homes_of(model: Any) -> list[str]:
    """Its classes, each as its package and its name."""
    return [f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(model).__mro__]
