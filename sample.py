"""Draws pictures: `python sample.py --model runs/digits --prompt "a handwritten seven"`.

`python sample.py pairs --model runs/digits --prompts FILE --num 12800 --out stores/pairs` keeps noise and picture.
`python sample.py grid --model runs/digits --prompts FILE --steps 4` searches the times that suit a model in few steps.
"""

import json
import re
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from cli import (
    Parser,
    add_reading,
    add_sampling,
    finite,
    natural,
    one_line_errors,
    own_device,
    place,
    plain_warnings,
    positive,
    reading_of,
    sampling_of,
)
from data.latents import VAE
from data.raw.pictures import load_picture, save_png, sheet, to_image
from storage.models import find_model

if TYPE_CHECKING:
    from data.store.reader import Store
    from pipeline import Pipeline

SHOWN = 256  # longer side of a picture on the sheet, at most
ENCODED = 128  # prompts that are encoded at once


def parser() -> Parser:
    p = Parser(description=__doc__)
    p.add_argument("--model", type=Path, required=True,
                   help="a model folder, ours or Stable Diffusion 3's; its single file; or a run's folder")  # fmt: skip
    p.add_argument("--prompt", type=str, action="append", default=[], help='repeatable; "" is unconditional')
    p.add_argument("--prompts", type=Path, help="a text file with one prompt a line")
    p.add_argument("--negative", type=str, default="", help="what guidance moves away from")
    p.add_argument("--num-images", type=positive, default=1, help="pictures per prompt")
    p.add_argument("--steps", type=positive, help="sampling steps; default: the model's")
    add_sampling(p)
    p.add_argument("--shift", type=finite, help="shift of the time grid; default: the model's")
    p.add_argument("--height", type=positive, help="in pixels; default: the image's or else the model's")
    p.add_argument("--width", type=positive, help="in pixels; default: the image's or else the model's")
    p.add_argument("--image", type=Path, help="a picture to start from")
    p.add_argument("--strength", type=finite, help="share of the steps that change it; default: 0.6, with a mask 1")
    p.add_argument("--mask", type=Path, help="a picture, white where --image is to be made anew")
    p.add_argument("--picture", type=Path, help="what a network of pictures works from, such as a small one to enlarge")
    p.add_argument("--level", type=finite, default=0.0, help="noise that --picture is given, 0 to 1; default: 0")
    p.add_argument("--seed", type=natural, default=0, help="picture i starts from seed + i")
    p.add_argument("--batch-size", type=positive, help="pictures at a time; default: as many as make 4,096 tokens")
    p.add_argument("--vae-tiling", action="store_true", help="decode large pictures in tiles: less memory")
    p.add_argument("--vae-slicing", action="store_true", help="decode one picture at a time: less memory")
    add_reading(p)
    p.add_argument("--out", type=Path, default=Path("samples"), help="folder for the pictures")
    return p


def pairs_parser() -> Parser:
    p = Parser(prog="sample.py pairs", description="Writes pairs of noise and the picture that a model makes of it.")
    p.add_argument("--model", type=Path, required=True, help="the teacher: a model folder or a run's folder")
    p.add_argument("--prompts", type=Path, required=True,
                   help="what to draw: a text file with one prompt a line, or a store for its captions")  # fmt: skip
    p.add_argument("--num", type=positive, required=True, help="pairs")
    p.add_argument(
        "--invert", type=natural, default=0, help="of these, real samples of the store and the noise they come back to"
    )
    p.add_argument(
        "--held-out", type=natural, default=500, help="samples of the store that are left out, as data.held_out"
    )
    p.add_argument("--steps", type=positive, help="sampling steps; default: the model's")
    add_sampling(p)
    p.add_argument("--seed", type=natural, default=0, help="of the noise and the order of the prompts")
    p.add_argument("--batch-size", type=positive, help="pairs at a time; default: as many as make 4,096 tokens")
    add_reading(p)
    p.add_argument("--out", type=Path, required=True, help="the store; the same command goes on with it")
    return p


def write_pairs(argv: list[str]) -> None:
    """The command `pairs`. Under torchrun every process makes its share."""
    args = pairs_parser().parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError, FileExistsError, NotADirectoryError):
        path = find_model(args.model)
        if args.lora or (path / "adapter_config.json").is_file():
            raise ValueError("pairs are made by a whole model: export it with its LoRA merged first")
        rank, world, local = place()
        source = prompts_of(args.prompts)
        from pipeline import Pipeline, Reading
        from pipeline.pairs import Captions, Coupling, PairMaker
        from storage.models import fingerprint

        args.device = own_device(args.device, local)
        pipe = Pipeline.load(path, Reading(**reading_of(args)))
        sampling = sampling_of(args, pipe.sampling, steps=args.steps, sampler=args.sampler)
        how = Coupling(args.num, args.invert, args.seed, args.batch_size or pipe.batch_size(), sampling)
        maker = PairMaker(pipe, fingerprint(path), Captions(source, args.seed, args.held_out), how, args.out)
        report = maker.run(rank, world)
    if report is None:
        print(f"rank {rank} is done; the last one to finish completes {args.out}")
    else:
        print(f"{report['kept']} pairs are in {args.out}")


def grid_parser() -> Parser:
    p = Parser(prog="sample.py grid", description="Searches the times at which Euler's method needs few steps.")
    p.add_argument("--model", type=Path, required=True, help="a model folder or a run's folder")
    p.add_argument("--prompts", type=Path, required=True,
                   help="what to draw: a text file with one prompt a line, or a store for its captions")  # fmt: skip
    p.add_argument("--steps", type=positive, nargs="+", default=[4], help="of the walks that are to be good")
    p.add_argument("--num", type=positive, default=256, help="walks: half to search on, half to test on")
    p.add_argument("--fine", type=positive, default=64, help="steps of the walks that count as right")
    add_sampling(p)
    p.add_argument("--seed", type=natural, default=0, help="walk i starts from seed + i; also the prompts' order")
    p.add_argument("--batch-size", type=positive, help="walks at a time; default: as many as make 4,096 tokens")
    add_reading(p)
    p.add_argument("--out", type=Path, help="a JSON file for the times and distances")
    return p


def search_grid(argv: list[str]) -> None:
    """The command `grid`."""
    args = grid_parser().parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError, FileExistsError, NotADirectoryError):
        path = find_model(args.model)
        source = prompts_of(args.prompts)
        from pipeline import Pipeline, Reading
        from pipeline.pairs import Captions
        from pipeline.times import GridSearch, Request, table
        from storage.weights import write_json

        if args.out and args.out.is_dir():
            raise ValueError(f"--out is a JSON file, and {args.out} is a folder")
        pipe = Pipeline.load(path, Reading(**reading_of(args)))
        sampling = sampling_of(args, replace(pipe.sampling, sampler="euler"), sampler=args.sampler)
        request = Request(tuple(args.steps), args.num, args.fine, args.seed, args.batch_size, sampling)
        found = GridSearch(pipe, Captions(source, args.seed), request).run()
        print(table(found))
        if args.out:
            write_json({"model": str(path), "prompts": str(args.prompts), **asdict(request), "found": found}, args.out)


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """The prompts of the command line and of the file, whose empty lines do not count. ValueError if there are none."""
    if file and not file.is_file():
        raise FileNotFoundError(f"there is no prompt file {file}")
    try:
        lines = file.read_text(encoding="utf-8").splitlines() if file else []
    except UnicodeDecodeError:
        raise ValueError(f"{file} is no text in UTF-8") from None
    prompts = given + [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError("there is nothing to draw: give --prompt TEXT or --prompts FILE with at least one line")
    return prompts


def prompts_of(place: Path) -> "list[str] | Store":
    """A text file's prompts, or the store in a folder. Errors as theirs."""
    if not place.is_dir():
        return read_prompts([], place)
    from data.store.reader import Store

    return Store(place)


def slug(prompt: str) -> str:
    """A prompt as part of a file name."""
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60] or "unconditional"


def starting_point(args: Namespace, pipe: "Pipeline") -> dict[str, Any]:
    """What `Pipeline` is given of pictures: to start from, and to work from.

    ValueError or FileNotFoundError if they do not fit.
    """
    given: dict[str, Any] = {}
    if args.picture:
        given = {"picture": load_picture(args.picture, pipe.codec.pixel_channels, None, None, 1), "level": args.level}
    elif args.level or pipe.network.picture_channels:
        raise ValueError(
            "--level needs a --picture" if args.level else "this model works from a picture: give --picture"
        )
    if args.image is None:
        if args.mask or args.strength is not None:
            raise ValueError(f"{'--mask' if args.mask else '--strength'} needs an --image")
        return given
    unit = pipe.network.unit * pipe.codec.factor
    image = load_picture(args.image, pipe.codec.pixel_channels, args.height, args.width, unit)
    default = 1.0 if args.mask else 0.6
    given |= {"image": image, "strength": default if args.strength is None else args.strength}
    if args.mask:
        mask = (load_picture(args.mask, 1, args.height, args.width, unit) >= 0.5).float()
        if mask.shape[-2:] != image.shape[-2:]:
            sizes = (f"{tensor.shape[-1]}×{tensor.shape[-2]}" for tensor in (mask, image))
            raise ValueError("mask and image must have the same size, got {} and {}".format(*sizes))
        given["mask"] = mask
    return given


def main(argv: list[str] | None = None) -> None:
    plain_warnings()
    argv = sys.argv[1:] if argv is None else argv
    commands = {"pairs": write_pairs, "grid": search_grid}
    if argv and argv[0] in commands:
        commands[argv[0]](argv[1:])
        return
    args = parser().parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError, FileExistsError, NotADirectoryError):
        path = find_model(args.model)
        prompts = [p for p in read_prompts(args.prompt, args.prompts) for _ in range(args.num_images)]
        args.out.mkdir(parents=True, exist_ok=True)
        import torch  # the slow imports come after the mistakes that need none
        import torch.nn.functional as F

        from pipeline import Pipeline, Reading

        pipe = Pipeline.load(path, Reading(**reading_of(args)))
        start = starting_point(args, pipe)
        sampling = sampling_of(args, pipe.sampling, steps=args.steps, sampler=args.sampler)
        height, width = start["image"].shape[-2:] if "image" in start else (args.height, args.width)
        _, _, times = pipe.plan(sampling, args.shift, height, width, start.get("strength", 1.0))
        if args.negative and pipe.network.guidance_embeds:
            raise ValueError("--negative is nothing to a network that has learned its guidance: leave it out")
        if args.negative and sampling.guidance == 1:
            raise ValueError("--negative needs guidance, which is 1: none; give another --guidance")
        if args.vae_tiling or args.vae_slicing:
            if not isinstance(pipe.codec, VAE):
                raise ValueError("--vae-tiling and --vae-slicing are for models with a VAE, which this one has not")
            pipe.codec.save_memory(args.vae_tiling, args.vae_slicing)
    seeds = [args.seed + i for i in range(len(prompts))]
    batch_size = args.batch_size or pipe.batch_size(height, width)
    parts = [slice(i, i + batch_size) for i in range(0, len(prompts), batch_size)]
    pictures, entries = [], []
    settings: dict[str, Any] = {
        "negative": args.negative,
        **asdict(sampling),
        "shift": pipe.shift(height, width) if args.shift is None else args.shift,
        "dtype": str(next(pipe.network.parameters()).dtype).removeprefix("torch."),
        "model": str(path),
        **{name: str(value) for name in ("lora", "image", "mask", "picture") if (value := getattr(args, name))},
        **{name: start[name] for name in ("strength", "level") if name in start},
    }
    with (
        one_line_errors(ValueError),
        tqdm(total=len(parts) * (len(times) - 1), desc="sampling", unit="step", leave=False) as bar,
    ):
        encoded = 0  # prompts go through the text encoders many at a time, since each time these must be read
        for part in parts:
            if part.stop > encoded:
                bar.set_description("encoding prompts")
                encoded = max(part.stop, part.start + ENCODED)
                pipe.text.encode(list(dict.fromkeys([args.negative, *prompts[part.start : encoded]])))
                bar.set_description("sampling")
            batch = pipe(
                prompts[part], seeds[part], args.negative, sampling, args.shift, height, width, **start,
                callback=lambda done, z, x0: bar.update(1 if done else 0),
            )  # fmt: skip
            side = max(batch.shape[-2:])
            pictures.append(F.interpolate(batch, scale_factor=SHOWN / side, mode="area") if side > SHOWN else batch)
            for prompt, seed, picture in zip(prompts[part], seeds[part], batch, strict=True):
                file = f"{slug(prompt)}_{seed}.png"
                save_png(to_image(picture), args.out / file)
                shape = {"height": picture.shape[-2], "width": picture.shape[-1]}
                entries.append({"file": file, "prompt": prompt, "seed": seed, **settings, **shape})
            text = json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
            (args.out / "samples.json").write_text(text, encoding="utf-8")
        columns = args.num_images if args.num_images > 1 else min(len(prompts), 10)
        save_png(sheet(torch.cat(pictures), columns), args.out / "sheet.png")
    print(f"{len(entries)} pictures in {args.out}, side by side in {args.out / 'sheet.png'}")


if __name__ == "__main__":
    main()
