"""Paths and targets as JSON objects, and back: what a model folder keeps of a process."""

import inspect
from typing import Any

from flow.path import Path


def describe(thing: Any) -> dict[str, Any]:
    """A path or target as its class and its constructor's arguments, which it must keep under their own names."""
    values = {name: getattr(thing, name) for name in inspect.signature(type(thing)).parameters}
    nested = {name: describe(value) if isinstance(value, Path) else value for name, value in values.items()}
    return {"class": type(thing).__name__} | nested


def restore(base: type, described: Any) -> Any:
    """What `describe` described, if it is a `base`; ValueError or TypeError otherwise."""
    known, found = [base], {}
    while known:
        found[known[0].__name__] = known[0]
        known = [*known[1:], *known[0].__subclasses__()]
    if not isinstance(described, dict) or described.get("class") not in found:
        raise ValueError(f"there is no {base.__name__} {described}")
    values = {k: restore(Path, v) if isinstance(v, dict) else v for k, v in described.items() if k != "class"}
    return found[described["class"]](**values)
