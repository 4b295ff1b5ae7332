"""Trains and measures every recipe of a study: `python compare.py configs/studies/digits.yaml`. It resumes.

Every training and measurement is a command of its own, run only if its result is not there yet; the document is written
from the results alone.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from safetensors import safe_open
from tqdm import tqdm

from cli import Parser, one_line_errors, positive
from metrics import study as write_up
from sampling import Sampling

ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """What is special about one model.

    Args:
        overlays: YAML files on top of the study's base.
        tuned_as: the recipe whose learning rate it takes; none: it has its own.
        learning_rates: candidates of its own; none: those of the tuning.
    """

    overlays: tuple[str, ...] = ()
    tuned_as: str | None = None
    learning_rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Tuning:
    """The search for each recipe's learning rate, by the distance to the training pictures.

    Args:
        learning_rates: the candidates.
        seed: of the trainings, not one of the study's.
        steps: of the model's own sampler.
    """

    learning_rates: tuple[float, ...]
    seed: int = 0
    steps: int = 50


@dataclass(frozen=True)
class Measurement:
    """One call of evaluate.py.

    Args:
        steps: numbers of sampling steps.
        samplers: each of them.
        recipes: whose models; none: all.
        spacing: of the times; none: the models' own.
        per_digit: samples of each digit.
    """

    steps: tuple[int, ...]
    samplers: tuple[str, ...]
    recipes: tuple[str, ...] = ()
    spacing: str | None = None
    per_digit: int = 100


@dataclass(frozen=True)
class Way:
    """A sampler and its number of steps."""

    sampler: str
    steps: int


@dataclass(frozen=True)
class Budgets:
    """Longer trainings of some recipes.

    Args:
        steps: of the trainings, besides the study's own.
        recipes: which, and how they are sampled.
        seed: of the trainings, one of the study's.
    """

    steps: tuple[int, ...] = ()
    recipes: dict[str, Way] = field(default_factory=dict)
    seed: int = 1


@dataclass(frozen=True)
class Study:
    """What is trained and measured.

    Args:
        base: the YAML file that all recipes share.
        recipes: the models, by name.
        seeds: each recipe is trained with each.
        measurements: how the trained models are measured.
        tuning: the search for learning rates.
        budgets: longer trainings.
        flags: settings of train.py on top of the base.
    """

    base: str
    recipes: dict[str, Recipe]
    seeds: tuple[int, ...]
    measurements: tuple[Measurement, ...]
    tuning: Tuning
    budgets: Budgets = field(default_factory=Budgets)
    flags: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = {r.tuned_as for r in self.recipes.values() if r.tuned_as} | self.budgets.recipes.keys()
        named |= {name for m in self.measurements for name in m.recipes}
        if unknown := sorted(named - self.recipes.keys()):
            raise ValueError(f"there is no recipe {unknown[0]}: the study has {', '.join(self.recipes)}")
        for name, recipe in self.recipes.items():
            if recipe.tuned_as and self.recipes[recipe.tuned_as].tuned_as:
                raise ValueError(f"{name} is tuned as {recipe.tuned_as}, which must be tuned itself")
        for file in (self.base, *(file for r in self.recipes.values() for file in r.overlays)):
            if not (ROOT / file).is_file():
                raise FileNotFoundError(f"the study names {file}, which does not exist")
        if not (self.seeds and self.tuning.learning_rates and self.measurements and self.measurements[0].recipes == ()):
            raise ValueError("a study needs seeds, learning rates, and a first measurement that is of all recipes")
        if self.tuning.seed in self.seeds or (self.budgets.steps and self.budgets.seed not in self.seeds):
            raise ValueError("tuning.seed must not be one of the seeds, and budgets.seed must be")
        for m in self.measurements:
            for sampler in m.samplers:
                for steps in m.steps:
                    Sampling(steps, sampler=sampler)  # what cannot be should fail before hours of work


@dataclass(frozen=True)
class Job:
    """A command, and the file that is there once it has succeeded."""

    command: list[str]
    done: Path


def parser() -> Parser:
    p = Parser(description=__doc__)
    p.add_argument("study", type=Path, help="a YAML file, such as configs/studies/digits.yaml")
    p.add_argument("--out", type=Path, help="folder of models and results; default: runs/studies/NAME")
    p.add_argument("--docs", type=Path, help="where compare.md and its pictures go; default: docs, with --quick: --out")
    p.add_argument("--jobs", type=positive, default=1, help="commands at a time, which share the cores")
    p.add_argument("--quick", action="store_true", help="ten minutes that show the way, not the result")
    return p


def read(file: Path) -> Study:
    """The study in a YAML file; ValueError or FileNotFoundError in one line if it is none."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no study file {file}")
    p = ArgumentParser(exit_on_error=False)
    p.add_argument("--study", type=Study, required=True)
    try:
        return p.instantiate(p.parse_object({"study": yaml.safe_load(file.read_text(encoding="utf-8"))})).study
    except (ArgumentError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: {error}") from None


def quickened(study: Study) -> Study:
    """A tenth of the training, the first seed only, one learning rate, few pictures."""

    def middle(rates: tuple[float, ...]) -> tuple[float, ...]:
        return rates[len(rates) // 2 :][:1]

    recipes = {name: replace(r, learning_rates=middle(r.learning_rates)) for name, r in study.recipes.items()}
    return replace(
        study,
        recipes=recipes,
        seeds=study.seeds[:1],
        measurements=(replace(study.measurements[0], steps=(1, 4, 50), per_digit=10),),
        tuning=replace(study.tuning, learning_rates=middle(study.tuning.learning_rates)),
        budgets=Budgets(),
        flags=study.flags | {"run.steps": 300, "run.validate_every": 300},
    )


def run(jobs: Iterable[Job], title: str, at_once: int) -> None:
    """Runs the commands that are not done yet; ValueError with the last line of the first that fails."""
    jobs = list(jobs)
    todo = [job for job in jobs if not job.done.is_file()]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // at_once))}

    def call(job: Job) -> str | None:
        ended = subprocess.run(job.command, env=environment, capture_output=True, text=True, cwd=ROOT)
        if ended.returncode == 0 and job.done.is_file():
            return None
        last = (ended.stderr.strip() or "no message").splitlines()[-1]
        return f"`{' '.join(job.command)}` ended with status {ended.returncode}: {last}"

    with ThreadPoolExecutor(at_once) as pool, tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc=title) as bar:
        for future in as_completed([pool.submit(call, job) for job in todo]):
            if fault := future.result():
                pool.shutdown(cancel_futures=True)
                raise ValueError(fault)
            bar.update()


def training(study: Study, name: str, seed: int, folder: Path, lr: float, steps: int | None = None) -> Job:
    """A model of a recipe."""
    flags = study.flags | {"run.folder": folder, "run.seed": seed, "optimization.lr": lr}
    if steps:
        flags |= {"run.steps": steps, "run.validate_every": steps}
    configs = [part for file in (study.base, *study.recipes[name].overlays) for part in ("--config", file)]
    options = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    return Job([sys.executable, "train.py", "fit", *configs, *options], folder / "model" / "model_index.json")


def measuring(models: Sequence[Path], out: Path, m: Measurement, *flags: str) -> Job:
    """Measures models."""
    named = [part for model in models for part in ("--model", str(model))]
    ways = [part for sampler in m.samplers for part in ("--sampler", sampler)]
    ways += ["--steps", ",".join(map(str, m.steps)), "--per-digit", str(m.per_digit), "--out", str(out)]
    ways += ["--spacing", m.spacing] if m.spacing else []
    return Job([sys.executable, "evaluate.py", *named, *ways, *flags], out / "results.json")


def rows(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text())["rows"]


def parameters(run_folder: Path) -> int:
    """Learned numbers of a run's network."""
    with safe_open(next((run_folder / "model").glob("*/diffusion_pytorch_model.safetensors")), "pt") as file:
        names = set(file.keys()) - {"pos_embed.pos_embed"}  # a fixed table
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


def tune(s: Study, out: Path, at_once: int) -> dict[str, dict[float, float]]:
    """Distance to the training pictures for each recipe that is tuned and each learning rate."""
    places = {
        (name, lr): out / "tuning" / name / f"lr-{lr:g}"
        for name, recipe in s.recipes.items()
        if not recipe.tuned_as
        for lr in recipe.learning_rates or s.tuning.learning_rates
    }
    if len(places) == len({name for name, _ in places}):  # nothing to choose
        return {name: {lr: float("nan")} for name, lr in places}
    run([training(s, name, s.tuning.seed, place, lr) for (name, lr), place in places.items()], "tuning", at_once)
    by = Measurement((s.tuning.steps,), ("euler",))
    flags = ("--reference", "train", "--seed", "1000000")  # seeds of its own
    jobs = {key: measuring([place], place / "evaluation", by, *flags) for key, place in places.items()}
    run(jobs.values(), "measuring the tuning", at_once)
    found: dict[str, dict[float, float]] = {}
    for (name, lr), job in jobs.items():
        found.setdefault(name, {})[lr] = rows(job.done)[0]["distance"]
    return found


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError):
        study = quickened(read(args.study)) if args.quick else read(args.study)
        out = args.out or Path("runs") / "studies" / (args.study.stem + "-quick" * args.quick)
        docs = args.docs or (out if args.quick else Path("docs"))
        tuned = tune(study, out, args.jobs)
        lr = {name: min(found, key=lambda rate: found[rate]) for name, found in tuned.items()}
        lr |= {name: lr[recipe.tuned_as] for name, recipe in study.recipes.items() if recipe.tuned_as}
        places = {(name, seed): out / name / f"seed-{seed}" for seed in study.seeds for name in study.recipes}
        run((training(study, *key, place, lr[key[0]]) for key, place in places.items()), "training", args.jobs)
        measured = {
            (*key, i): measuring([place], place / f"evaluation-{i}", m)
            for i, m in enumerate(study.measurements)
            for key, place in places.items()
            if not m.recipes or key[0] in m.recipes
        }
        run(measured.values(), "measuring", args.jobs)
        longer = {}
        for name, way in study.budgets.recipes.items():
            for steps in study.budgets.steps:
                place = out / "budgets" / name / f"steps-{steps}"
                model = training(study, name, study.budgets.seed, place, lr[name], steps)
                by = replace(study.measurements[0], steps=(way.steps,), samplers=(way.sampler,))
                longer[name, steps] = model, measuring([place], place / "evaluation", by)
        run((model for model, _ in longer.values()), "training longer", args.jobs)
        run((job for _, job in longer.values()), "measuring the longer", args.jobs)
        shown = Measurement((1, 2, 4, 8, 50), ("euler",), per_digit=10)
        first = [places[name, study.seeds[0]] for name in study.recipes]
        sheet = measuring(first, out / "sheet", shown)
        run([sheet], "drawing the sheet", 1)
        results = [row | {"recipe": key[0], "seed": key[1]} for key, job in measured.items() for row in rows(job.done)]
        more = [
            row | {"recipe": key[0], "budget": key[1]} for key, (_, job) in longer.items() for row in rows(job.done)
        ]
        settings = json.loads(next(iter(measured.values())).done.read_text())
        facts = {name: (f"{parameters(places[name, study.seeds[0]]):,}", f"{lr[name]:g}") for name in study.recipes}
        command = f"python compare.py {args.study}{' --quick' * args.quick}"
        others = [name for name, r in study.recipes.items() if any("configs/network/" in file for file in r.overlays)]
        measured_with = settings["settings"] | {"floor": settings["floor"]}
        text = write_up.document(results, more, tuned, facts, command, measured_with, others=others)
    with one_line_errors():
        docs.mkdir(parents=True, exist_ok=True)
        write_up.curves(write_up.first_order(results), settings["floor"], docs / "compare.png")
        shutil.copyfile(out / "sheet" / "sheet.png", docs / "compare-sheet.png")
        (docs / "compare.md").write_text(text, encoding="utf-8")
    print(f"Look at {docs / 'compare.md'}")


if __name__ == "__main__":
    main()
