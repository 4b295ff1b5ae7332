"""Draws pictures: `python sample.py --model runs/digits --prompt "a handwritten seven"`.

`python sample.py pairs --model runs/digits --prompts FILE --num 12800 --out stores/pairs` writes pairs of noise and
picture to train from. `python sample.py grid --model runs/digits --prompts FILE --steps 4` searches the best times for
a few steps of Euler's method. `python sample.py prefer samples --rewards '[{class_path: RightShapes}]'` judges drawn
pictures and writes choices between them to learn from.
"""

import sys
import warnings
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import (
    Parser,
    add_autoguidance_flag,
    add_model_flags,
    add_overwrite_flag,
    add_sampling_flags,
    check_count,
    device_of_rank,
    fail,
    finite,
    load_options_of,
    natural,
    one_line_errors,
    output,
    own_ranks,
    plain_warnings,
    positive,
    purpose_of,
    sampling_of,
)
from data.drawn import recorded
from data.latents import VAE
from data.prompts import prompts_or_store, read_prompts, weighted
from data.raw.pictures import load_picture
from storage.files import commit_json
from storage.models import find_model, fingerprint
from storage.purpose import KEY, check_result

if TYPE_CHECKING:  # slow to import; wrong flags are reported before
    from torch import Tensor

    from pipeline import Pipeline, Refiner
    from pipeline.sampling import Sampling

USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError)
HANDOVER = 0.2  # SDXL's refiner learned the lowest 200 of 1,000 noise levels
RECORDED = ("parts", "text_dtype", "max_sequence_length", "image", "mask", "picture")  # if not left at their defaults
OPTIONAL = ("lora", "control", "control_interval", "autoguidance")  # recorded as they were given
PROMPTS = "a text file with one prompt a line, or a store: its captions are the prompts"


def parser() -> Parser:
    p = Parser(description=__doc__)
    p.add_argument("--model", type=Path,
                   help="a model folder (ours or Stable Diffusion 3's), a single file, or a run's folder")  # fmt: skip
    p.add_argument("--like", type=Path, help="a PNG of sample.py: the defaults of all flags are those that drew it")
    p.add_argument("--prompt", type=str, action="append", default=[], help='repeatable; "" is unconditional')
    p.add_argument("--prompts", type=Path, help="a text file with one prompt a line")
    p.add_argument("--negative", type=str, default="", help="negative prompt: guidance moves away from it")
    p.add_argument("--num-images", type=positive, default=1, help="pictures per prompt")
    p.add_argument("--steps", type=positive, help="sampling steps; default: the model's")
    add_sampling_flags(p)
    add_autoguidance_flag(p)
    p.add_argument("--shift", type=finite, help="shift of the time grid; default: the model's")
    p.add_argument("--height", type=positive, help="in pixels; default: the image's, or without one the model's")
    p.add_argument("--width", type=positive, help="in pixels; default: the image's, or without one the model's")
    p.add_argument("--image", type=Path, help="a picture to start from")
    p.add_argument(
        "--strength", type=finite, help="share of the steps that change --image; default: 0.6, with --mask 1"
    )
    p.add_argument("--mask", type=Path, help="a picture of the shape of --image that is white where --image is drawn "
                   "anew; if it has an alpha channel, transparent where it is drawn anew")  # fmt: skip
    p.add_argument("--picture", type=Path, help="input picture of a network that needs one, such as super-resolution")
    p.add_argument("--level", type=finite, default=0.0, help="noise level added to --picture, 0 to 1; default: 0")
    p.add_argument("--control", type=str, action="append", metavar="MODEL:IMAGE[:SCALE]",
                   help="a ControlNet and the picture that it follows; repeatable")  # fmt: skip
    p.add_argument("--control-interval", type=finite, nargs=2, metavar=("FROM", "TO"),
                   help="use ControlNets only between these shares of the steps")  # fmt: skip
    p.add_argument("--refiner", type=Path, help="a second model in the same latents, which takes over at --handover")
    p.add_argument("--handover", type=finite, help="time below which the refiner takes over; default: 0.2")
    p.add_argument("--seed", type=natural, default=0, help="picture i starts from seed + i")
    p.add_argument("--batch-size", type=positive, help="pictures at a time; default: as many as make 4,096 tokens")
    p.add_argument("--vae-tiling", action="store_true", help="decode large pictures in tiles: less memory")
    p.add_argument("--vae-slicing", action="store_true", help="decode one picture at a time: less memory")
    add_model_flags(p)
    p.add_argument("--out", type=output, default=Path("samples"), help="folder for the pictures; none is replaced")
    return p


def pairs_parser() -> Parser:
    p = Parser(prog="sample.py pairs", description="Writes pairs of noise and the picture that a model makes from it.")
    p.add_argument("--model", type=Path, required=True, help="the teacher: a model folder or a run's folder")
    p.add_argument("--prompts", type=Path, required=True, help=PROMPTS)
    p.add_argument("--num", type=positive, required=True, help="number of pairs")
    p.add_argument("--invert", type=natural, default=0,
                   help="how many of the pairs are real samples of the store with their inverted noise")  # fmt: skip
    p.add_argument("--held-out", type=natural, default=500,
                   help="held-out samples of the store, which are not used; as data.held_out")  # fmt: skip
    p.add_argument("--steps", type=positive, help="sampling steps; default: the model's")
    add_sampling_flags(p)
    p.add_argument("--seed", type=natural, default=0, help="seed of the noise and of the order of the prompts")
    p.add_argument("--batch-size", type=positive, help="pairs at a time; default: as many as make 4,096 tokens")
    add_model_flags(p)
    p.add_argument("--out", type=output, required=True, help="folder of the store; the same command resumes")
    return p


def write_pairs(argv: list[str]) -> None:
    """The command `pairs`. Under torchrun or srun every process makes its share."""
    args = pairs_parser().parse_args(argv)
    with one_line_errors(*USER_ERRORS):
        path = find_model(args.model)
        if args.lora or (path / "adapter_config.json").is_file():
            raise ValueError("pairs need a whole model: merge the LoRA first, with `python -m pipeline export --lora`")
        check_count("--num", args.num)
        rank, world, local_rank = own_ranks()
        source = prompts_or_store(args.prompts)
        from pipeline import LoadOptions, Pipeline
        from pipeline.pairs import Captions, Coupling, PairMaker

        args.device = device_of_rank(args.device, local_rank)
        pipe = Pipeline.load(path, LoadOptions(**load_options_of(args)))
        pipe.refuse_picture()
        sampling = sampling_of(args, pipe.sampling, steps=args.steps, sampler=args.sampler)
        coupling = Coupling(args.num, args.invert, args.seed, args.batch_size or pipe.batch_size(), sampling)
        captions = Captions(source, args.seed, args.held_out)
        sampling.check_prompts([captions[0]])
        report = PairMaker(pipe, fingerprint(path), captions, coupling, args.out).run(rank, world)
    if report is None:
        print(f"rank {rank} is done; the last one to finish completes {args.out}")
    else:
        print(f"{report['kept']} pairs are in {args.out}")


def grid_parser() -> Parser:
    p = Parser(prog="sample.py grid", description="Searches the best times for a few steps of Euler's method.")
    p.add_argument("--model", type=Path, required=True, help="a model folder or a run's folder")
    p.add_argument("--prompts", type=Path, required=True, help=PROMPTS)
    p.add_argument("--steps", type=positive, nargs="+", default=[4], help="numbers of steps, one search for each")
    p.add_argument("--num", type=positive, default=256, help="pictures: half for the search, half for the test")
    p.add_argument("--fine", type=positive, default=64, help="steps of the reference trajectories")
    add_sampling_flags(p)
    p.add_argument("--seed", type=natural, default=0, help="picture i starts from seed + i; also orders the prompts")
    p.add_argument("--batch-size", type=positive, help="pictures at a time; default: as many as make 4,096 tokens")
    add_model_flags(p)
    p.add_argument("--out", type=output, help="a JSON file for the times and distances")
    add_overwrite_flag(p)
    return p


def search_grid(argv: list[str]) -> None:
    """The command `grid`."""
    args = grid_parser().parse_args(argv)
    with one_line_errors(*USER_ERRORS):
        path = find_model(args.model)
        check_count("--num", args.num)
        source = prompts_or_store(args.prompts)
        purpose = purpose_of("sample.py grid", args)
        if args.out:
            check_result(args.out, purpose, args.overwrite)
        from pipeline import LoadOptions, Pipeline
        from pipeline.pairs import Captions
        from pipeline.times import GridSearch, Request, table

        pipe = Pipeline.load(path, LoadOptions(**load_options_of(args)))
        pipe.refuse_picture()
        sampling = sampling_of(args, replace(pipe.sampling, sampler="euler"), sampler=args.sampler)
        request = Request(tuple(args.steps), args.num, args.fine, args.seed, args.batch_size, sampling)
        captions = Captions(source, args.seed)
        sampling.check_prompts([captions[0]])
        found = GridSearch(pipe, captions, request).run()
        print(table(found))
        if args.out:
            settings = {"model": str(path), "prompts": str(args.prompts), **asdict(request)}
            commit_json(args.out, {KEY: purpose, **settings, "found": found})


def input_pictures(args: Namespace, pipe: "Pipeline") -> dict[str, Any]:
    """The arguments of `Pipeline` that come from picture files. ValueError or FileNotFoundError if they do not fit."""
    from mmdit.control import Controlled
    from pipeline.drawing import read_image

    given: dict[str, Any] = {}
    if args.picture:
        size: tuple[int | None, int | None] = (None, None)
        if isinstance(pipe.network, Controlled):  # as --control and the data do it
            height, width = (side * pipe.codec.factor for side in pipe.latent_size(args.height, args.width))
            size = height, width
        given = {"picture": load_picture(args.picture, pipe.codec.pixel_channels, *size, 1), "level": args.level}
        if args.level and not pipe.network.level_embeds:
            raise ValueError("--level is for a network with level_embeds, and this one has none: leave it out")
    elif args.level:
        raise ValueError("--level needs a --picture: give one, or leave --level out")
    elif pipe.network.picture_channels and not args.control:
        raise ValueError("this model works from a picture: give --picture")
    if args.image:
        return given | read_image(pipe, args.image, args.mask, args.strength, args.height, args.width)
    if args.mask or args.strength is not None:
        raise ValueError(f"{'--mask' if args.mask else '--strength'} needs an --image: give one, or leave it out")
    return given


def refiner_of(args: Namespace) -> "Refiner | None":
    """The model of `--refiner` with its handover. ValueError or FileNotFoundError if there is none."""
    from pipeline import LoadOptions, Pipeline, Refiner

    if args.refiner is None:
        if args.handover is not None:
            raise ValueError("--handover needs a --refiner: give one, or leave it out")
        return None
    options = replace(LoadOptions(**load_options_of(args)), lora=(), parts=None)
    return Refiner(
        Pipeline.load(find_model(args.refiner), options), HANDOVER if args.handover is None else args.handover
    )


def steered(
    args: Namespace, pipe: "Pipeline", times: "Tensor", height: int | None, width: int | None
) -> tuple["Pipeline", dict[str, Any]]:
    """The pipeline with the ControlNets of `--control`, and its argument `picture`. ValueError if they do not fit."""
    from pipeline.steering import Steering, interval_of, steer

    if not args.control:
        if args.control_interval:
            raise ValueError("--control-interval needs a --control: give one, or leave it out")
        return pipe, {}
    if args.picture and not pipe.network.picture_channels:
        raise ValueError("--picture is for a model that works from a picture, and --control has its own: leave one out")
    interval = interval_of(args.control_interval, times) if args.control_interval else (0.0, 1.0)
    pipe, picture = steer(pipe, [Steering.parse(text) for text in args.control], interval, height, width)
    return pipe, {"picture": picture}


def warn_of_learned(args: Namespace, path: Path, sampling: "Sampling") -> None:
    """Warns if a LoRA learned other steps or another guidance than those with which it is sampled."""
    from mmdit.adapters import Adapter
    from pipeline.folder import INDEX, learned

    updates = [Adapter.parse(text).path for text in args.lora or ()]
    for update in updates if path.is_file() or (path / INDEX).is_file() else [path, *updates]:
        told = learned(update)
        if told and (told[1].steps, told[1].guidance) != (sampling.steps, sampling.guidance):
            asked, own = (f"{how.steps} steps with guidance {how.guidance:g}" for how in (sampling, told[1]))
            warnings.warn(f"{update} learned {own}, not {asked}: pictures may be worse", stacklevel=2)


def prefer_pictures(argv: list[str]) -> None:
    """The command `prefer`."""
    from training.experiment import short_cause
    from training.prefer import prefer

    with one_line_errors(*USER_ERRORS):
        try:
            prefer(argv)
        except ValueError as error:
            raise ValueError(short_cause(str(error))) from None


def parse(argv: list[str]) -> Namespace:
    """The flags of the command without a name, with the defaults of `--like`."""
    args = parser().parse_args(argv)
    if args.like:
        with one_line_errors(*USER_ERRORS):
            flags = recorded(args.like)
        texts = {name: value for name, value in flags.items() if name not in ("prompt", "lora", "control")}
        p = parser()
        p.set_defaults(**texts)
        args = p.parse_args(argv)
        args.prompt = args.prompt or ([] if args.prompts else [flags["prompt"]])
        for name in ("lora", "control"):
            setattr(args, name, getattr(args, name) or flags.get(name))
    if args.model is None:
        fail("the following arguments are required: --model, or --like PICTURE")
    return args


def draw(argv: list[str]) -> None:
    """The command without a name."""
    args = parse(argv)
    with one_line_errors(*USER_ERRORS):
        path = find_model(args.model)
        given_prompts = read_prompts(args.prompt, args.prompts)
        check_count("--num-images", len(given_prompts) * args.num_images)
        prompts = [prompt for prompt in given_prompts for _ in range(args.num_images)]
        if found := weighted([*given_prompts, args.negative]):
            warnings.warn(f"weights as in {found!r} are text like any other: no word is stressed", stacklevel=1)
        from pipeline import LoadOptions, Pipeline
        from pipeline.drawing import draw_files, entries_in
        from pipeline.steering import autoguided

        entries_in(args.out)
        pipe = Pipeline.load(path, LoadOptions(**load_options_of(args)))
        given = input_pictures(args, pipe)
        sampling = sampling_of(args, pipe.sampling, steps=args.steps, sampler=args.sampler)
        sampling.check_prompts(given_prompts)
        height, width = given["image"].shape[-2:] if "image" in given else (args.height, args.width)
        warn_of_learned(args, path, sampling)
        pipe = autoguided(pipe, args.autoguidance, LoadOptions(**load_options_of(args)))
        refiner = refiner_of(args)
        _, _, times = pipe.plan(sampling, args.shift, height, width, given.get("strength", 1.0))
        pipe, hints = steered(args, pipe, times, height, width)
        given |= hints
        if refiner:
            pipe.check_refiner(refiner, sampling, times, height, width)
        models = (pipe, refiner.pipe) if refiner else (pipe,)
        if args.negative and any(model.network.guidance_embeds for model in models):
            raise ValueError("--negative has no effect on a network that has learned its guidance: leave it out")
        if args.negative and sampling.guidance == 1:
            raise ValueError("--negative needs guidance, which is 1 (off): give another --guidance")
        if args.vae_tiling or args.vae_slicing:
            if not isinstance(pipe.codec, VAE):
                raise ValueError("--vae-tiling and --vae-slicing need a model with a VAE: leave them out")
            pipe.codec.save_memory(args.vae_tiling, args.vae_slicing)
        args.out.mkdir(parents=True, exist_ok=True)
    notes: dict[str, Any] = {
        "negative": args.negative,
        **asdict(sampling),
        "shift": pipe.shift(height, width) if args.shift is None else args.shift,
        "dtype": str(next(pipe.network.parameters()).dtype).removeprefix("torch."),
        "model": str(path),
        **{name: found for name in OPTIONAL if (found := getattr(args, name))},
        **{name: str(value) for name in RECORDED if (value := getattr(args, name)) != parser().get_default(name)},
        **{name: given[name] for name in ("strength", "level") if name in given},
        **({"refiner": str(args.refiner), "handover": refiner.handover} if refiner else {}),
    }
    given |= {
        "refiner": refiner,
        "negative": args.negative,
        "sampling": sampling,
        "shift": args.shift,
        "height": height,
        "width": width,
    }
    seeds = range(args.seed, args.seed + len(prompts))
    batch_size = args.batch_size or pipe.batch_size(height, width)
    columns = args.num_images if args.num_images > 1 else min(len(prompts), 10)
    with one_line_errors(ValueError):
        sheet = draw_files(pipe, prompts, seeds, given, len(times) - 1, batch_size, columns, notes, args.out)
    print(f"{len(prompts)} pictures in {args.out}, side by side in {sheet}")


def main(argv: list[str] | None = None) -> None:
    plain_warnings()
    argv = sys.argv[1:] if argv is None else argv
    commands = {"pairs": write_pairs, "grid": search_grid, "prefer": prefer_pictures}
    if argv and argv[0] in commands:
        commands[argv[0]](argv[1:])
    else:
        draw(argv)


if __name__ == "__main__":
    main()
