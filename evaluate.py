"""Measures quality against function evaluations: `python evaluate.py --model runs/a --model runs/b --steps 1,2,4,50`.

The models draw digits, or with `--data shapes` shapes; `data/examined.py` defines the prompts and the real pictures.
With `--by category` it measures the share of right pictures for each kind of prompt instead, and with `--likelihood`
it draws nothing and measures the bits per dimension of the real pictures.
"""

from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from cli import (
    MACHINE_FAULT,
    Parser,
    add_autoguidance_flag,
    add_gradient_flags,
    add_model_flags,
    add_overwrite_flag,
    add_sampling_flags,
    check_count,
    fail,
    load_options_of,
    natural,
    one_line_errors,
    output,
    plain_warnings,
    positive,
    positives,
    purpose_of,
    sampling_of,
)
from data.examined import DATA, Examined, Half
from pipeline import LoadOptions, Pipeline
from pipeline.gradients import pulled
from pipeline.likelihood import Autoencoder, refuse
from pipeline.steering import autoguided
from storage.files import hold
from storage.models import find_model
from storage.purpose import claim_folder
from studies.categories import ByCategory
from studies.likelihood import Likelihood
from studies.measure import AgainstReal, Setting, draw, short_names

STEPS, SAMPLES = [1, 2, 4, 5, 8, 10, 25, 50], 1000  # defaults
STEPS_BY_CATEGORY, PER_CATEGORY = [20], 200
NOT_FOR_LIKELIHOOD = (
    "by", "steps", "sampler", "spacing", "guider", "rescale", "interval", "skip_layers", "skip_scale", "skip_interval",
    "autoguidance", "classifier", "clip_guidance", "gradient_interval", "per_digit", "features", "clip", "batch_size",
)  # fmt: skip
NOT_BY_CATEGORY = ("samples", "per_digit", "reference", "features", "clip")  # flags that exclude --by category


def parser() -> Parser:
    p = Parser(description=__doc__)
    p.add_argument("--model", type=Path, action="append", required=True, help="a model or run folder; repeatable")
    p.add_argument("--data", choices=DATA, default="digits", help="what the models draw; default: digits")
    p.add_argument("--by", choices=["category"], help="measure the share of right pictures for each category instead")
    p.add_argument("--likelihood", action="store_true", help="measure the bits per dimension of real pictures instead")
    p.add_argument(
        "--steps",
        type=positives,
        help="sampling steps: 1,2,4; default: 1,2,4,5,8,10,25,50; by category 20; of codes their number",
    )
    add_sampling_flags(p, repeatable=True)
    add_autoguidance_flag(p)
    add_gradient_flags(p)
    count = p.add_mutually_exclusive_group()
    count.add_argument("--samples", type=positive, help=f"samples in all; default: {SAMPLES}")
    count.add_argument("--per-digit", type=positive, help="samples of each digit, instead of --samples")
    count.add_argument("--per-category", type=positive, help=f"samples of each category; default: {PER_CATEGORY}")
    p.add_argument("--seed", type=natural, default=0, help="seed of the first sample, and of the prompts by category")
    p.add_argument(
        "--reference", choices=["held_out", "train"], help="the real pictures to compare with; default: held_out"
    )
    p.add_argument(
        "--features", help="feature network: judge:DIR, shapes:DIR, inception:FILE or clip:DIR; default: judge"
    )
    p.add_argument("--clip", type=Path, help="folder of a CLIP model, for the CLIP score")
    p.add_argument("--batch-size", type=positive, help="pictures at a time; default: 4,096 tokens, or by category 64")
    add_model_flags(p)
    p.add_argument("--out", type=output, default=Path("evaluation"), help="folder of results, sheets and report")
    add_overwrite_flag(p)
    return p


def check_flags(args: Namespace) -> None:
    """ValueError in one line if two flags exclude each other."""
    if args.by is None and args.per_category is not None:
        raise ValueError("--per-category goes only with --by category: add that, or leave it out")
    for flag in NOT_BY_CATEGORY:
        if args.by and getattr(args, flag) is not None:
            raise ValueError(f"--{flag.replace('_', '-')} does not go with --by category: leave one of them out")
    if args.per_digit is not None and args.data != "digits":
        raise ValueError(f"--per-digit counts digits; with --data {args.data} give --samples")
    for flag in NOT_FOR_LIKELIHOOD:
        if args.likelihood and getattr(args, flag) is not None:
            raise ValueError(f"--{flag.replace('_', '-')} does not go with --likelihood: leave one of them out")
    if len(set(args.model)) < len(args.model):
        raise ValueError("the same --model was given twice: give each once")


def settings_of(args: Namespace, pipes: dict[str, Pipeline]) -> list[Setting]:
    """Every model with every sampler and number of steps. ValueError in one line if they do not fit together."""
    found = []
    for (name, pipe), folder in zip(pipes.items(), args.model, strict=True):
        for sampler in args.sampler or [pipe.sampling.sampler]:
            usual = STEPS_BY_CATEGORY if args.by else STEPS
            for steps in args.steps or ((pipe.sampling.steps,) if pipe.objective.discrete else usual):
                try:
                    sampling = sampling_of(args, pipe.sampling, sampler=sampler, steps=steps)
                    pipe.check_prompts(sampling, ["a caption"])
                    pipe.refuse_picture()
                    pipe.check_drawn(False)
                    pipe.plan(sampling)
                except ValueError as error:
                    raise ValueError(f"{name} cannot be sampled by {sampler} in {steps} steps: {error}") from None
                found.append(Setting(name, str(folder), pipe, sampling))
    return found


def examined_of(args: Namespace) -> Examined:
    """The data set, with the number of prompts that the flags give."""
    data = DATA[args.data]
    if args.by:
        each = args.per_category or PER_CATEGORY
        check_count("--per-category", each * len(data.categories))
        return data.by_category(each, args.seed)
    samples = args.samples or 10 * (args.per_digit or 0) or SAMPLES
    check_count("--per-digit" if args.per_digit else "--samples", samples)
    return data.held_out(samples)


def prepare(args: Namespace) -> tuple[list[Setting], AgainstReal | ByCategory]:
    """What is drawn and how it is measured. Errors are those of bad input."""
    check_flags(args)
    examined = examined_of(args)
    options = LoadOptions(**load_options_of(args))
    names = short_names(args.model)
    if args.autoguidance:
        names = [f"{name} away from {args.autoguidance}" for name in names]
    if args.classifier or args.clip_guidance:
        guides = " and ".join(filter(None, (args.classifier, args.clip_guidance)))
        names = [f"{name} guided by {guides}" for name in names]
    loaded = (Pipeline.load(find_model(path), options) for path in args.model)
    pipes = {name: autoguided(pipe, args.autoguidance, options) for name, pipe in zip(names, loaded, strict=True)}
    for name, pipe in pipes.items():
        height, width = (side * pipe.codec.factor for side in pipe.latent_size(None, None))
        examined.check(name, (height, width), pipe.codec.pixel_channels)
        pipes[name] = pulled(
            pipe, args.classifier, args.clip_guidance, args.gradient_interval, list(dict.fromkeys(examined.prompts))
        )
    settings = settings_of(args, pipes)
    if args.by:
        return settings, ByCategory(examined, args.out, args.seed)
    half: Half = args.reference or "held_out"
    return settings, AgainstReal(examined, args.out, half, args.features, args.clip, args.seed, options.device)


def check_autoencoder(name: str, model: Autoencoder, levels: int, real: tuple[int, ...]) -> None:
    """ValueError in one line if an autoencoder was trained on other levels or cannot read the pictures."""
    if model.levels != levels:
        raise ValueError(f"{name} has learned pictures of {model.levels} levels, and these have {levels}")
    channels, *sides = real
    if model.vae.pixel_channels != channels or any(side % model.vae.factor for side in sides):
        read = f"{model.vae.pixel_channels} channels and sides that are multiples of {model.vae.factor}"
        raise ValueError(f"{name} reads pictures of {read}, not {real}")


def measure_likelihood(args: Namespace) -> None:
    """Measures the bits per dimension of real pictures under every model."""
    with ExitStack() as held:
        with one_line_errors(ValueError, FileNotFoundError):
            check_flags(args)
            options = LoadOptions(**load_options_of(args))
            models: dict[str, Pipeline | Autoencoder] = {
                name: Autoencoder.load(path, options.device)
                if Autoencoder.is_at(path)
                else Pipeline.load(find_model(path), options)
                for name, path in zip(short_names(args.model), args.model, strict=True)
            }
            examined = DATA[args.data].held_out(10)
            real = tuple(examined.real["train"].shape[1:])
            for name, model in models.items():
                if isinstance(model, Autoencoder):
                    check_autoencoder(name, model, examined.levels, real)
                    continue
                try:
                    refuse(model, model.sampling.guidance if args.guidance is None else args.guidance)
                except ValueError as error:
                    raise ValueError(f"{name} has no likelihood: {error}") from None
                drawn = (model.codec.pixel_channels, *model.latent_size(None, None))
                if drawn != real:
                    raise ValueError(f"{name} draws pictures of {drawn} numbers, not {real} as the {args.data}")
            measured = Likelihood(examined, args.reference or "held_out", args.samples, args.seed, args.out)
            held.enter_context(hold(args.out))
            claim_folder(args.out, purpose_of("evaluate.py", args), ["results.json"], args.overwrite)
        with tqdm(total=len(models) * len(measured.pictures), desc="evaluating", unit="picture") as bar:
            for (name, model), folder in zip(models.items(), args.model, strict=True):
                with one_line_errors(ValueError):
                    measured.add(name, str(folder), model, bar.update)
        with one_line_errors():
            print(measured.finish())


def main(argv: list[str] | None = None) -> None:
    plain_warnings()
    args = parser().parse_args(argv)
    if args.likelihood:
        measure_likelihood(args)
        return
    with ExitStack() as held:
        with one_line_errors(ValueError, FileNotFoundError):
            settings, measured = prepare(args)
            held.enter_context(hold(args.out))
            purpose = purpose_of("evaluate.py", args)
            claim_folder(args.out, purpose, measured.files(len(settings)), args.overwrite)
        examined = measured.examined
        with tqdm(total=len(settings) * len(examined.prompts), desc="evaluating", unit="picture") as bar:
            for setting in settings:
                with one_line_errors(ValueError):
                    batch_size = args.batch_size or measured.batch_size(setting.pipe)
                    drawn = draw(setting, examined, args.seed, batch_size, bar.update)
                if not drawn.pictures.isfinite().all():
                    way = f"{setting.name} by {setting.sampling.sampler} in {setting.sampling.steps} steps"
                    fail(f"{way} gives pixels that are not finite: try --dtype float32", MACHINE_FAULT)
                with one_line_errors():
                    measured.add(setting, drawn)
        with one_line_errors():
            print(measured.finish())


if __name__ == "__main__":
    main()
