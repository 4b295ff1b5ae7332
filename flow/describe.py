"""Paths and targets to JSON objects and back, as a model folder stores them."""

import inspect
from typing import Any

from flow.path import Path


def describe(thing: Any) -> dict[str, Any]:
    """The class and constructor arguments of a path or target. Each argument must be an attribute of the same name."""
    values = {name: getattr(thing, name) for name in inspect.signature(type(thing)).parameters}
    nested = {name: describe(value) if isinstance(value, Path) else value for name, value in values.items()}
    return {"class": type(thing).__name__} | nested


def restore(base: type, description: Any) -> Any:
    """Builds the object that `describe` described. ValueError or TypeError if it is not a `base`."""
    queue, classes = [base], {}
    while queue:
        classes[queue[0].__name__] = queue[0]
        queue = [*queue[1:], *queue[0].__subclasses__()]
    if not isinstance(description, dict) or description.get("class") not in classes:
        raise ValueError(f"there is no {base.__name__} {description}: its class must be one of {', '.join(classes)}")
    values = {k: restore(Path, v) if isinstance(v, dict) else v for k, v in description.items() if k != "class"}
    return classes[description["class"]](**values)
