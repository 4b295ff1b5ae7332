"""A study of recipes × seeds, such as configs/studies/digits.yaml. All are tuned, trained and measured alike."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from flow.objective import Objective
from pipeline.sampling import Sampling
from storage.text import read_yaml
from studies.results import Result, read
from studies.runner import ROOT, Step, result_of, run


@dataclass(frozen=True)
class Recipe:
    """The settings of one model.

    Args:
        overlays: YAML files on top of the study's base.
        tuned_as: the recipe whose learning rate is used; None means that this recipe is tuned itself.
        learning_rates: its candidates; empty means those of the tuning.
        steps: training steps; None means those of the study.
    """

    overlays: tuple[str, ...] = ()
    tuned_as: str | None = None
    learning_rates: tuple[float, ...] = ()
    steps: int | None = None


@dataclass(frozen=True)
class Tuning:
    """The search for each recipe's learning rate, by the distance to the training pictures.

    Args:
        learning_rates: the candidates.
        seed: seed of the trainings; it must not be one of the study's seeds.
        steps: steps of Euler's method.
    """

    learning_rates: tuple[float, ...]
    seed: int = 0
    steps: int = 50


@dataclass(frozen=True)
class Measurement:
    """One call of evaluate.py.

    Args:
        steps: numbers of sampling steps.
        samplers: samplers; each is measured with all steps.
        recipes: the recipes that are measured; empty means all.
        spacing: spacing of the times; None means the models' own.
        per_digit: samples of each digit.
    """

    steps: tuple[int, ...]
    samplers: tuple[str, ...]
    recipes: tuple[str, ...] = ()
    spacing: str | None = None
    per_digit: int = 100


@dataclass(frozen=True)
class SamplerSteps:
    """A sampler and its number of steps."""

    sampler: str
    steps: int


@dataclass(frozen=True)
class Budgets:
    """Longer trainings of some recipes.

    Args:
        steps: training steps, besides the study's own.
        recipes: the recipes, and how they are sampled.
        seed: seed of the trainings; it must be one of the study's seeds.
    """

    steps: tuple[int, ...] = ()
    recipes: dict[str, SamplerSteps] = field(default_factory=dict)
    seed: int = 1


class Plan(NamedTuple):
    """The steps after the tuning.

    Attributes:
        trained: (recipe, seed) → the training of a model.
        measured: (recipe, seed, index of the measurement) → the measurement of its model. One seed is one step, so
            that a study goes on with more seeds.
        longer: (recipe, training steps) → the measurement of a model with this budget.
        sheet: the measurement that draws pictures of all recipes.
    """

    trained: dict[tuple[str, int], Step]
    measured: dict[tuple[str, int, int], Step]
    longer: dict[tuple[str, int], Step]
    sheet: Step

    def results(self) -> list[Result]:
        """The rows of all measurements. FileNotFoundError if one is missing."""
        return [
            row | {"recipe": name, "seed": seed}
            for (name, seed, _), step in self.measured.items()
            for row in read(step.folder)["rows"]
        ]


@dataclass(frozen=True)
class Recipes:
    """A study: the models that are trained, and how they are measured.

    Args:
        base: the YAML file that all recipes share.
        recipes: name → recipe.
        seeds: each recipe is trained with each seed.
        measurements: how the trained models are measured.
        tuning: the search for learning rates.
        budgets: longer trainings.
        flags: settings of train.py on top of the base.
        document: the document that is written from the results.
    """

    base: str
    recipes: dict[str, Recipe]
    seeds: tuple[int, ...]
    measurements: tuple[Measurement, ...]
    tuning: Tuning
    budgets: Budgets = field(default_factory=Budgets)
    flags: dict[str, Any] = field(default_factory=dict)
    document: Literal["compare", "speed"] = "compare"

    def __post_init__(self) -> None:
        named = {r.tuned_as for r in self.recipes.values() if r.tuned_as} | self.budgets.recipes.keys()
        named |= {name for m in self.measurements for name in m.recipes}
        if unknown := sorted(named - self.recipes.keys()):
            raise ValueError(f"there is no recipe {unknown[0]}: choose one of {', '.join(self.recipes)}")
        for name, recipe in self.recipes.items():
            if recipe.tuned_as and self.recipes[recipe.tuned_as].tuned_as:
                raise ValueError(f"{name} is tuned as {recipe.tuned_as}, which must be tuned itself")
        for file in (self.base, *(file for r in self.recipes.values() for file in r.overlays)):
            if not (ROOT / file).is_file():
                raise FileNotFoundError(f"the study names {file}, which does not exist")
        if not (self.seeds and self.tuning.learning_rates and self.recipes and self.measurements):
            raise ValueError("a study needs recipes, seeds, learning rates and measurements")
        if self.measurements[0].recipes or "euler" not in self.measurements[0].samplers:
            raise ValueError("the first measurement must be of all recipes, with euler among its samplers")
        if not all(m.steps and m.samplers for m in self.measurements):
            raise ValueError("each measurement needs steps and samplers")
        if self.tuning.seed in self.seeds or (self.budgets.steps and self.budgets.seed not in self.seeds):
            raise ValueError("tuning.seed must not be one of the seeds, and budgets.seed must be")
        if len(set(self.seeds)) < len(self.seeds) or {"tuning", "budgets", "sheet"} & self.recipes.keys():
            raise ValueError("seeds must differ, and no recipe may be called tuning, budgets or sheet")
        if "run.steps" not in self.flags or self.flags["run.steps"] != self.flags.get("run.validate_every"):
            raise ValueError(
                "flags need run.steps and an equal run.validate_every: the last model counts, not the best"
            )

    def check(self) -> None:
        """ValueError in one line if a recipe cannot be built, or its samplers do not fit it."""
        p = ArgumentParser(exit_on_error=False)
        p.add_class_arguments(Objective, "objective")
        p.add_class_arguments(Sampling, "sampling")
        for name, recipe in self.recipes.items():
            config = None
            try:
                for file in (self.base, *recipe.overlays):
                    content = read_yaml(ROOT / file)
                    parts = {key: content[key] for key in ("objective", "sampling") if key in content}
                    config = p.parse_object(parts, namespace=config)
                built = p.instantiate(config)
                ways = [
                    (m.steps, m.samplers, m.spacing) for m in self.measurements if name in (m.recipes or self.recipes)
                ]
                ways += [((self.tuning.steps,), ("euler",), None)]
                ways += [((w.steps,), (w.sampler,), None) for r, w in self.budgets.recipes.items() if r == name]
                for steps, samplers, spacing in ways:
                    for sampler in samplers:
                        for count in steps:
                            own = replace(built.sampling, steps=count, sampler=sampler)
                            (replace(own, spacing=spacing) if spacing else own).walk(built.objective)
            except (ArgumentError, yaml.YAMLError, ValueError) as error:
                raise ValueError(f"recipe {name}: {error}") from None

    def quick(self) -> "Recipes":
        """A short version: 300 training steps, the first seed, one learning rate, few pictures."""

        def middle(rates: tuple[float, ...]) -> tuple[float, ...]:
            return rates[len(rates) // 2 :][:1]

        return replace(
            self,
            recipes={
                name: replace(
                    r,
                    learning_rates=middle(r.learning_rates),
                    steps=r.steps and 300 * r.steps // self.flags["run.steps"],
                )
                for name, r in self.recipes.items()
            },
            seeds=self.seeds[:1],
            measurements=(replace(self.measurements[0], steps=(1, 4, 50), per_digit=10),),
            tuning=replace(self.tuning, learning_rates=middle(self.tuning.learning_rates)),
            budgets=Budgets(),
            flags=self.flags | {"run.steps": 300, "run.validate_every": 300},
        )

    def run(self, out: Path, at_once: int) -> None:
        """Tunes, then trains and measures what is not done yet, with `at_once` commands at a time.

        Errors are those of `runner.run`.
        """
        run(self.tuning_steps(out).values(), "tuning", at_once)
        plan = self.plan(out)
        run([*plan.trained.values(), *plan.measured.values(), *plan.longer.values(), plan.sheet], "study", at_once)

    def tuning_steps(self, out: Path) -> dict[tuple[str, float], Step]:
        """(recipe, learning rate) → the measurement of such a model; empty if no recipe has several learning rates."""
        candidates = [
            (name, rate)
            for name, recipe in self.recipes.items()
            if not recipe.tuned_as
            for rate in recipe.learning_rates or self.tuning.learning_rates
        ]
        if len(candidates) == len({name for name, _ in candidates}):
            return {}
        by = Measurement((self.tuning.steps,), ("euler",))
        flags = ("--reference", "train", "--seed", "1000000")  # other samples than those of the results
        steps = {}
        for name, rate in candidates:
            place = out / "tuning" / name / f"lr-{rate:g}"
            model = replace(self.training(name, self.tuning.seed, place, rate), failure="try a lower lr")
            steps[name, rate] = measurement([model], place / "evaluation", by, *flags)
        return steps

    def distances(self, out: Path) -> dict[str, dict[float, float]]:
        """Recipe → learning rate → distance to the training pictures: ∞ after divergence, NaN without tuning."""
        steps = self.tuning_steps(out)
        found: dict[str, dict[float, float]] = {}
        for name, recipe in self.recipes.items():
            for rate in () if recipe.tuned_as else recipe.learning_rates or self.tuning.learning_rates:
                found.setdefault(name, {})[rate] = distance(steps[name, rate]) if steps else math.nan
        return found

    def chosen_rates(self, out: Path) -> dict[str, float]:
        """Recipe → the learning rate with the least distance."""
        found = {name: min(rates, key=lambda rate: rates[rate]) for name, rates in self.distances(out).items()}
        return {name: found[recipe.tuned_as or name] for name, recipe in self.recipes.items()}

    def plan(self, out: Path) -> Plan:
        """The steps after the tuning, with the chosen learning rates."""
        rates = self.chosen_rates(out)
        trained = {
            (name, seed): self.training(name, seed, out / name / f"seed-{seed}", rates[name])
            for seed in self.seeds
            for name in self.recipes
        }
        measured = {
            (name, seed, i): measurement([trained[name, seed]], out / name / f"seed-{seed}-evaluation-{i}", m)
            for i, m in enumerate(self.measurements)
            for name in m.recipes or self.recipes
            for seed in self.seeds
        }
        longer = {}
        for name, way in self.budgets.recipes.items():
            for steps in self.budgets.steps:
                place = out / "budgets" / name / f"steps-{steps}"
                model = self.training(name, self.budgets.seed, place, rates[name], steps)
                by = replace(self.measurements[0], steps=(way.steps,), samplers=(way.sampler,))
                longer[name, steps] = measurement([model], place / "evaluation", by)
        shown = Measurement((1, 2, 4, 8, 50), ("euler",), per_digit=10)
        sheet = measurement([trained[name, self.seeds[0]] for name in self.recipes], out / "sheet", shown)
        return Plan(trained, measured, longer, sheet)

    def training(self, name: str, seed: int, folder: Path, lr: float, steps: int | None = None) -> Step:
        """The step that trains a model of a recipe."""
        flags = self.flags | {"run.folder": folder, "run.seed": seed, "optimization.lr": lr}
        if steps := steps or self.recipes[name].steps:
            flags |= {"run.steps": steps, "run.validate_every": steps}
        configs = [part for file in (self.base, *self.recipes[name].overlays) for part in ("--config", file)]
        options = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
        return step_of(["train.py", "fit", *configs, *options], folder)


def measurement(models: Sequence[Step], out: Path, m: Measurement, *flags: str) -> Step:
    """The step that measures trained models."""
    named = [part for model in models for part in ("--model", str(model.folder))]
    ways = [part for sampler in m.samplers for part in ("--sampler", sampler)]
    ways += ["--steps", ",".join(map(str, m.steps)), "--per-digit", str(m.per_digit), "--out", str(out)]
    ways += ["--spacing", m.spacing] if m.spacing else []
    return step_of(["evaluate.py", *named, *ways, *flags], out, tuple(models))


def step_of(command: Sequence[str], folder: Path, needs: tuple[Step, ...] = ()) -> Step:
    """A command of this project as a step."""
    return Step(tuple(command), folder, result_of(command), needs)


def distance(tuned: Step) -> float:
    """The distance that the tuning measured; ∞ if the training diverged or too many pictures are duplicates."""
    found = read(tuned.folder)["rows"][0]["distance"] if tuned.is_done() else None
    return math.inf if found is None else found
