"""Draws pictures: `python sample.py --model runs/digits --prompt "a handwritten seven"`.

`python sample.py pairs --model runs/digits --prompts FILE --num 12800 --out stores/pairs` writes pairs of noise and
picture to train from. `python sample.py grid --model runs/digits --prompts FILE --steps 4` searches the best times for
a few steps of Euler's method. `python sample.py prefer samples --rewards '[{class_path: RightShapes}]'` judges drawn
pictures and writes choices between them to learn from; `rerank` keeps the best of each prompt.
"""

import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from cli import (
    Parser,
    add_drawing_flags,
    add_model_flags,
    add_overwrite_flag,
    add_sampling_flags,
    check_count,
    device_of_rank,
    fail,
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
from data.prompts import prompts_or_store, read_prompts
from storage.files import commit_json
from storage.models import find_model, fingerprint
from storage.purpose import KEY, check_result

PROMPTS = "a text file with one prompt a line, or a store: its captions are the prompts"
REPEATABLE = (  # flags that would be added to the defaults of --like
    "lora", "embedding", "control", "upscale", "upscale_prompt", "upscale_steps",
)  # fmt: skip


def parser() -> Parser:
    p = Parser(description=__doc__)
    add_drawing_flags(p)
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
    with one_line_errors(ValueError, FileNotFoundError):
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
        sampling = sampling_of(args, pipe.sampling, steps=args.steps)
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
    with one_line_errors(ValueError, FileNotFoundError):
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
        sampling = sampling_of(args, replace(pipe.sampling, sampler="euler"))
        request = Request(tuple(args.steps), args.num, args.fine, args.seed, args.batch_size, sampling)
        captions = Captions(source, args.seed)
        sampling.check_prompts([captions[0]])
        found = GridSearch(pipe, captions, request).run()
        print(table(found))
        if args.out:
            settings = {"model": str(path), "prompts": str(args.prompts), **asdict(request)}
            commit_json(args.out, {KEY: purpose, **settings, "found": found})


def judge_pictures(name: str, argv: list[str]) -> None:
    """The command `prefer` or `rerank`."""
    from training import prefer
    from training.experiment import short_cause

    with one_line_errors(ValueError, FileNotFoundError):
        try:
            {"prefer": prefer.prefer, "rerank": prefer.rerank}[name](argv)
        except ValueError as error:
            raise ValueError(short_cause(str(error))) from None


def parse(argv: list[str]) -> Namespace:
    """The flags of the command without a name, with the defaults of `--like`."""
    args = parser().parse_args(argv)
    if args.like:
        with one_line_errors(ValueError, FileNotFoundError):
            flags = recorded(args.like)
        texts = {name: value for name, value in flags.items() if name not in ("prompt", *REPEATABLE)}
        p = parser()
        p.set_defaults(**texts)
        left_out = [name for name in REPEATABLE if not getattr(args, name)]
        again = [f"--{name.replace('_', '-')}={value}" for name in left_out for value in flags.get(name, ())]
        args = p.parse_args([*again, *argv])
        args.prompt = args.prompt or ([] if args.prompts else [flags["prompt"]])
    if args.model is None:
        fail("the following arguments are required: --model, or --like PICTURE")
    return args


def draw(argv: list[str]) -> None:
    """The command without a name."""
    args = parse(argv)
    with one_line_errors(ValueError, FileNotFoundError):
        find_model(args.model)  # these two before the slow imports
        read_prompts(args.prompt, args.prompts)
        from pipeline.command import plan
        from pipeline.drawing import draw_files, entries_in

        entries_in(args.out)
        drawing = plan(args)
        args.out.mkdir(parents=True, exist_ok=True)
    with one_line_errors(ValueError):
        drawn = draw_files(drawing, args.out)
    print(f"{len(drawn.pictures)} pictures in {args.out}, side by side in {drawn.sheet}")


def main(argv: list[str] | None = None) -> None:
    plain_warnings()
    argv = sys.argv[1:] if argv is None else argv
    commands: dict[str, Callable[[list[str]], None]] = {
        "pairs": write_pairs,
        "grid": search_grid,
        "prefer": partial(judge_pictures, "prefer"),
        "rerank": partial(judge_pictures, "rerank"),
    }
    if argv and argv[0] in commands:
        commands[argv[0]](argv[1:])
    else:
        draw(argv)


if __name__ == "__main__":
    main()
