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
from flow.objective import Objective
from metrics import study as write_up
from pipeline.sampling import Sampling

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
        steps: of Euler's method.
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


@dataclass(frozen=True)
class Job:
    """A command, and the file that is there once it has succeeded.

    The command is kept beside the result, so that a result of another command is not taken for this one's.
    """

    command: list[str]
    folder: Path
    done: Path

    @property
    def note(self) -> Path:
        return self.folder.with_name(self.folder.name + ".command.json")

    def is_done(self) -> bool:
        """ValueError if the result is there, but of another command."""
        if not self.done.is_file():
            return False
        if not self.note.is_file() or json.loads(self.note.read_text()) != self.command[1:]:
            raise ValueError(f"{self.folder} holds the result of another command; remove it, or choose another --out")
        return True

    def run(self, environment: dict[str, str]) -> None:
        """ValueError or, where the machine is at fault, OSError with its last line if it fails."""
        ended = subprocess.run(self.command, env=environment, capture_output=True, text=True, cwd=ROOT)
        if ended.returncode or not self.done.is_file():
            last = (ended.stderr.strip() or "no message").splitlines()[-1]
            fault = f"`{' '.join(self.command)}` ended with status {ended.returncode}: {last}"
            raise (OSError if ended.returncode == 1 else ValueError)(fault)
        self.note.write_text(json.dumps(self.command[1:]))


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


def check(study: Study) -> None:
    """ValueError in one line if a recipe cannot be built, or not be sampled as the study says."""
    p = ArgumentParser(exit_on_error=False)
    p.add_class_arguments(Objective, "objective")
    p.add_class_arguments(Sampling, "sampling")
    for name, recipe in study.recipes.items():
        config = None
        try:
            for file in (study.base, *recipe.overlays):
                content = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))
                parts = {key: content[key] for key in ("objective", "sampling") if key in content}
                config = p.parse_object(parts, namespace=config)
            built = p.instantiate(config)
            ways = [
                (m.steps, m.samplers, m.spacing) for m in study.measurements if name in (m.recipes or study.recipes)
            ]
            ways += [((study.tuning.steps,), ("euler",), None)]
            ways += [((w.steps,), (w.sampler,), None) for r, w in study.budgets.recipes.items() if r == name]
            for steps, samplers, spacing in ways:
                for sampler in samplers:
                    for count in steps:
                        own = replace(built.sampling, steps=count, sampler=sampler)
                        (replace(own, spacing=spacing) if spacing else own).walk(built.objective)
        except (ArgumentError, yaml.YAMLError, ValueError) as error:
            raise ValueError(f"recipe {name}: {error}") from None


def quickened(study: Study) -> Study:
    """300 training steps, the first seed only, one learning rate, few pictures."""

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


def run(jobs: Iterable[Job], title: str, at_once: int, forgiven: str | None = None) -> None:
    """Runs the commands that are not done yet; the first failure ends it unless `forgiven` is in its message."""
    jobs = list(jobs)
    todo = [job for job in jobs if not job.is_done()]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // at_once))}
    with ThreadPoolExecutor(at_once) as pool, tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc=title) as bar:
        for future in as_completed([pool.submit(job.run, environment) for job in todo]):
            fault = future.exception()
            if fault and not (forgiven and forgiven in str(fault)):
                pool.shutdown(cancel_futures=True)
                raise fault
            bar.update()


def training(study: Study, name: str, seed: int, folder: Path, lr: float, steps: int | None = None) -> Job:
    """A model of a recipe."""
    flags = study.flags | {"run.folder": folder, "run.seed": seed, "optimization.lr": lr}
    if steps:
        flags |= {"run.steps": steps, "run.validate_every": steps}
    configs = [part for file in (study.base, *study.recipes[name].overlays) for part in ("--config", file)]
    options = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    return Job([sys.executable, "train.py", "fit", *configs, *options], folder, folder / "model" / "model_index.json")


def measuring(models: Sequence[Path], out: Path, m: Measurement, *flags: str) -> Job:
    """Measures models."""
    named = [part for model in models for part in ("--model", str(model))]
    ways = [part for sampler in m.samplers for part in ("--sampler", sampler)]
    ways += ["--steps", ",".join(map(str, m.steps)), "--per-digit", str(m.per_digit), "--out", str(out)]
    ways += ["--spacing", m.spacing] if m.spacing else []
    return Job([sys.executable, "evaluate.py", *named, *ways, *flags], out, out / "sheet.png")  # written last but one


def results(job: Job) -> dict[str, Any]:
    """What evaluate.py wrote."""
    return json.loads((job.folder / "results.json").read_text())


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
    trained = {key: training(s, key[0], s.tuning.seed, place, key[1]) for key, place in places.items()}
    run(trained.values(), "tuning", at_once, forgiven="try a lower lr")
    by = Measurement((s.tuning.steps,), ("euler",))
    flags = ("--reference", "train", "--seed", "1000000")  # seeds of its own
    jobs = {
        key: measuring([place], place / "evaluation", by, *flags)
        for key, place in places.items()
        if trained[key].is_done()
    }
    run(jobs.values(), "measuring the tuning", at_once)
    found: dict[str, dict[float, float]] = {}
    for name, lr in places:
        distance = results(jobs[name, lr])["rows"][0]["distance"] if (name, lr) in jobs else None
        found.setdefault(name, {})[lr] = math.inf if distance is None else distance  # diverged, or all alike
    return found


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError):
        study = quickened(read(args.study)) if args.quick else read(args.study)
        check(study)
        out = (args.out or ROOT / "runs" / "studies" / (args.study.stem + "-quick" * args.quick)).resolve()
        docs = args.docs or (out if args.quick else Path("docs"))
        tuned = tune(study, out, args.jobs)
        lr = {name: min(found, key=lambda rate: found[rate]) for name, found in tuned.items()}
        lr |= {name: lr[recipe.tuned_as] for name, recipe in study.recipes.items() if recipe.tuned_as}
        places = {(name, seed): out / name / f"seed-{seed}" for seed in study.seeds for name in study.recipes}
        run((training(study, *key, place, lr[key[0]]) for key, place in places.items()), "training", args.jobs)
        measured = {
            (name, i): measuring([places[name, seed] for seed in study.seeds], out / name / f"evaluation-{i}", m)
            for i, m in enumerate(study.measurements)
            for name in m.recipes or study.recipes
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
        sheet = measuring([places[name, study.seeds[0]] for name in study.recipes], out / "sheet", shown)
        run([sheet], "drawing the sheet", 1)
        found = [
            row | {"recipe": name, "seed": int(Path(row["folder"]).name.removeprefix("seed-"))}
            for (name, _), job in measured.items()
            for row in results(job)["rows"]
        ]
        more = [
            row | {"recipe": name, "budget": steps}
            for (name, steps), (_, job) in longer.items()
            for row in results(job)["rows"]
        ]
        with_what = results(next(iter(measured.values())))
        facts = {
            name: (
                f"{parameters(places[name, study.seeds[0]]):,}",
                f"{lr[name]:g}" + (f", as {recipe.tuned_as}" if recipe.tuned_as else ""),
            )
            for name, recipe in study.recipes.items()
        }
        text = write_up.document(
            found,
            more,
            tuned,
            facts,
            f"python compare.py {args.study}{' --quick' * args.quick}",
            with_what["settings"] | {"floor": with_what["floor"]},
            others=[name for name, r in study.recipes.items() if any("configs/network/" in f for f in r.overlays)],
        )
    with one_line_errors():
        docs.mkdir(parents=True, exist_ok=True)
        write_up.curves(write_up.first_order(found), with_what["floor"], docs / "compare.png")
        shutil.copyfile(sheet.done, docs / "compare-sheet.png")
        (docs / "compare.md").write_text(text, encoding="utf-8")
    print(f"Look at {docs / 'compare.md'}")


if __name__ == "__main__":
    main()
