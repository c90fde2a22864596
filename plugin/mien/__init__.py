"""mien steers a running language model's tone and personality.

    steering = mien.attach(llm)            # a llama_cpp.Llama
    steering.set("0.8*joy - 0.3*anger")    # any time, also between two tokens

Importing mien loads no runtime and patches nothing; each name below is loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import (
        ContextNotMade,
        DoseWarning,
        InputNotFound,
        MienError,
        MienWarning,
        MissingExtra,
        ModelFileError,
        ModelMismatch,
        ModelNotFound,
        NameNotFound,
        PackError,
        PromptTooLong,
        RecipeError,
        ReplyWarning,
        RuntimeNotSupported,
        SiteNotFound,
        SteeringNotApplied,
        VectorError,
        VectorFileError,
        VectorFileNotFound,
    )
    from .extraction import extract
    from .fingerprint import Fingerprint
    from .models import default_model
    from .pack import Pack
    from .recipe import Recipe, parse
    from .registry import Registry, load, packs
    from .runtimes import attach, detach, free, init_from_model, steering_of
    from .sites import of_experts, of_heads, of_neurons
    from .steering import Applied, Steering
    from .vector import Vector

__version__ = "0.1.0"

_HOME = {
    "attach": "runtimes",
    "detach": "runtimes",
    "free": "runtimes",
    "init_from_model": "runtimes",
    "steering_of": "runtimes",
    "extract": "extraction",
    "Fingerprint": "fingerprint",
    "default_model": "models",
    "Pack": "pack",
    "Recipe": "recipe",
    "parse": "recipe",
    "Registry": "registry",
    "load": "registry",
    "packs": "registry",
    "of_experts": "sites",
    "of_heads": "sites",
    "of_neurons": "sites",
    "Applied": "steering",
    "Steering": "steering",
    "Vector": "vector",
    "DoseWarning": "errors",
    "ContextNotMade": "errors",
    "InputNotFound": "errors",
    "MienError": "errors",
    "MienWarning": "errors",
    "MissingExtra": "errors",
    "ModelFileError": "errors",
    "ModelMismatch": "errors",
    "ModelNotFound": "errors",
    "NameNotFound": "errors",
    "PackError": "errors",
    "PromptTooLong": "errors",
    "RecipeError": "errors",
    "ReplyWarning": "errors",
    "RuntimeNotSupported": "errors",
    "SiteNotFound": "errors",
    "SteeringNotApplied": "errors",
    "VectorError": "errors",
    "VectorFileError": "errors",
    "VectorFileNotFound": "errors",
}

__all__ = [
    "Applied",
    "ContextNotMade",
    "DoseWarning",
    "Fingerprint",
    "InputNotFound",
    "MienError",
    "MienWarning",
    "MissingExtra",
    "ModelFileError",
    "ModelMismatch",
    "ModelNotFound",
    "NameNotFound",
    "Pack",
    "PackError",
    "PromptTooLong",
    "Recipe",
    "RecipeError",
    "Registry",
    "ReplyWarning",
    "RuntimeNotSupported",
    "SiteNotFound",
    "Steering",
    "SteeringNotApplied",
    "Vector",
    "VectorError",
    "VectorFileError",
    "VectorFileNotFound",
    "__version__",
    "attach",
    "default_model",
    "detach",
    "extract",
    "free",
    "init_from_model",
    "load",
    "of_experts",
    "of_heads",
    "of_neurons",
    "packs",
    "parse",
    "steering_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mien' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
