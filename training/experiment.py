"""The YAML file of an experiment: its sections and its parser. `encode.py` and `train.py` read the same file."""

import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from inspect import isabstract
from itertools import pairwise
from os.path import isfile
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, get_loader, set_loader
from jsonargparse.util import import_object

from cli import checked, fail
from data.latents import Codec
from data.module import Data
from data.store.encoding import Encoding
from data.text.encoder import TextEncoder
from engine.ema import Averages
from engine.strategy import Strategy
from flow import meanflow, stepmap, variance  # noqa: F401  YAML files name their classes
from flow.objective import Objective
from mmdit.lora import LoRA
from mmdit.network import Network
from pipeline.sampling import Sampling
from storage.text import parse_yaml, read_yaml
from training.generator import Grid
from training.judged import Judgement
from training.optimization import Optimization
from training.reader import NewWords
from training.residual import Residuals
from training.run_folder import Run
from training.teacher import Teacher
from training.terms import LossTerm

RENAMED = {  # class_path of an earlier version → class_path of today
    "data.text.CLIPText": "data.text.clip.CLIPText",
    "data.sd3_text.SD3Text": "data.text.sd3.SD3Text",
    "data.sources.Pictures": "data.raw.sources.Pictures",
    "data.encoding.Encoding": "data.store.encoding.Encoding",
}


class Parser(ArgumentParser):
    """jsonargparse's parser, with errors in one line. It also reads YAML files of earlier versions."""

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **more: Any) -> Any:  # type: ignore[override]
        """Like jsonargparse's, but old names in a --config file are replaced by the new ones."""
        words = checked(args)
        for flag, value in pairwise([*words, "end"]):
            if flag.startswith("--") and (not value or flag.endswith("=")):
                self.error(f"{flag.rstrip('=')} is empty: give a value, or leave it out")
        given = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
        try:
            for i, (flag, value) in enumerate(pairwise(given)):
                if flag == "--config" and isfile(value):
                    tree = read_yaml(Path(value))
                    new = upgraded(tree)
                    if new != tree:
                        print(f"warning: {value} has names of an earlier version: see CHANGELOG.md", file=sys.stderr)
                        given[i + 1] = yaml.safe_dump(new, sort_keys=False)
            config = super().parse_args(given, *rest, **more)
            refuse_nulls(config)
            return config
        except ValueError as error:
            self.error(str(error))
        except RecursionError:
            self.error("a value of the config is nested too deeply")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        fail(short_cause(message))


def refuse_nulls(branch: Any, place: str = "") -> None:
    """ValueError if an argument of a class is null and its type does not allow that. jsonargparse lets it through."""
    if isinstance(branch, list):
        for number, part in enumerate(branch):
            refuse_nulls(part, f"{place}.{number}")
    if not isinstance(branch, Namespace):
        return
    if isinstance(name := branch.get("class_path"), str):
        types = get_type_hints(import_object(name).__init__)
        for key, value in vars(branch.get("init_args", Namespace())).items():
            if value is None and key in types and type(None) not in get_args(types[key]):
                raise ValueError(f"{place}.init_args.{key} is null: give a value, or leave it out")
    for key, value in vars(branch).items():
        refuse_nulls(value, f"{place}.{key}".lstrip("."))


def resolve(tree: Any) -> str:
    """A whole config as YAML, with the names and defaults of today. ValueError if this version cannot read it."""
    p = parser("", exit_on_error=False)
    try:
        return p.dump(p.parse_object(upgraded(tree)), skip_validation=True)
    except (ArgumentError, TypeError, KeyError) as error:
        cause = " ".join(short_cause(str(error)).split())
        raise ValueError(f"this version cannot read the run's config, choose another run.folder: {cause}") from None


def upgraded(tree: Any) -> Any:
    """A config, or a part of one, in which new names replace those of earlier versions."""
    if isinstance(tree, list):
        return [upgraded(branch) for branch in tree]
    if not isinstance(tree, dict):
        return tree
    new = {name: upgraded(branch) for name, branch in tree.items()}
    if new.get("class_path") in RENAMED:
        new["class_path"] = RENAMED[new["class_path"]]
    if isinstance(objective := new.get("objective"), dict) and "class_path" not in objective:
        new["objective"] = _objective(objective)
    return new


def _objective(old: dict[str, Any]) -> dict[str, Any]:
    """The class and arguments of an objective of an earlier version, when one class had the arguments of all four."""
    rest = {name: value for name, value in old.items() if name not in ("average", "variance")}
    shared = {name: rest[name] for name in ("shift", "shift_area", "penalty") if name in rest}
    density = rest.get("density")
    if average := old.get("average"):
        named = {name: rest[name] for name in ("density", "weight") if name in rest}
        return {"class_path": "flow.meanflow.MeanFlow", "init_args": named | shared | average}
    if old.get("variance"):
        return {
            "class_path": "flow.variance.LearnedVariance",
            "init_args": rest | {"vlb_weight": old["variance"]["weight"]},
        }
    if isinstance(density, dict) and str(density.get("class_path")).rpartition(".")[2] == "Steps":
        ends = {name: rest[name] for name in ("path", "target") if name in rest}
        return {"class_path": "flow.stepmap.StepMap", "init_args": ends | shared | density.get("init_args", {})}
    return rest


def _load(text: str) -> Any:
    """jsonargparse's value of a YAML text. Those that would take too much memory or time are refused before."""
    parse_yaml(text, "the text")
    return _load_unchecked(text)


_load_unchecked = get_loader("yaml")
set_loader("yaml", _load, (yaml.YAMLError, ValueError))


def short_cause(message: str) -> str:
    """jsonargparse's message in one line: the way to the first cause, without the types that would also do."""
    found: list[str] = []
    base, taken, dropped = "", set[int](), math.inf
    for line in message.splitlines():
        text = line.lstrip().removeprefix("- ")
        indent = len(line) - len(line.lstrip())
        if indent > dropped or not text:
            continue
        dropped = math.inf
        if text.startswith("Parser key"):
            base = ""
        if types := re.match(r"Subtypes: \[<class '([\w.]+)'>", text):
            base = types[1]
        if text.startswith(("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a path but")):
            continue
        if line.lstrip().startswith("- "):
            if indent in taken:
                dropped = indent
                continue
            taken.add(indent)
        found.append(text)
    cause = " ".join(found) or message
    if unknown := re.search(r"Expected a dot import path string: (.*)", cause):
        kinds = sorted(cls.__name__ for cls in concrete(import_object(base))) if base else []
        choice = f": take one of {', '.join(kinds)}" if kinds else ""
        cause = cause.replace(unknown[0], f"there is no {base.rpartition('.')[2] or 'class'} {unknown[1]}{choice}")
    cause = re.sub(r"Expected a <class 'float'>\. Got value: (nan|-?inf)$", r"must be finite, got \1", cause)
    return re.sub(r"Type collections\.abc\.Callable.*? callable class: (.*?) Got value: .*?class_path='([\w.]+)'.*",
                  r"Problem with given class_path '\2': \1", cause)  # fmt: skip


def concrete(base: Any) -> Iterator[type]:
    """A class and those that derive from it, unless they are abstract."""
    if not isabstract(base):
        yield base
    for derived in base.__subclasses__():
        yield from concrete(derived)


def parser(description: str, exit_on_error: bool = True) -> Parser:
    """The parser of the YAML file. Every key is an argument of a constructor and is documented there."""
    p = Parser(description=description, exit_on_error=exit_on_error)
    p.add_argument(
        "--config", action="config", required=exit_on_error, help="a YAML file; later ones and flags override it"
    )
    p.add_class_arguments(Run, "run")
    p.add_subclass_arguments(TextEncoder, "text", required=True)
    p.add_subclass_arguments(Codec, "codec", required=True)
    p.add_argument("--encode", type=Encoding | None, help="the pictures that encode.py encodes into a store")
    p.add_argument("--data", type=Callable[[TextEncoder, Codec, int], Data], required=True)
    p.add_subclass_arguments(Network, "network", required=True)
    p.add_argument("--lora", type=LoRA | None, help="train a LoRA of a network that is loaded from disk")
    p.add_argument("--new_words", type=NewWords | None, help="learn new words for the text encoders of such a network")
    p.add_argument("--teacher", type=Teacher | None, help="learn the output of this model (distillation)")
    p.add_argument("--residual", type=Residuals | None, help="learn what a regressor leaves of the pictures")
    p.add_argument("--judgement", type=Judgement | None, help="learn from rewards of the model's own pictures")
    p.add_subclass_arguments(Objective, "objective", default={"class_path": "flow.objective.Objective"})
    p.add_argument("--terms", type=list[LossTerm], default=[], help="losses on hidden states beside the objective")
    p.add_class_arguments(Optimization, "optimization")
    p.add_class_arguments(Averages, "ema")
    p.add_class_arguments(Strategy, "strategy")
    p.add_class_arguments(Sampling, "sampling")
    p.add_class_arguments(Grid, "grid")
    return p
