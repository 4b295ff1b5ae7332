"""Draws pictures: `python sample.py --model runs/digits --prompt "a handwritten seven"`."""

import json
import re
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from cli import (
    Parser,
    add_sampling,
    find_device,
    find_model,
    finite,
    natural,
    one_line_errors,
    plain_warnings,
    positive,
    sampling_of,
)
from data.pictures import save_png, sheet, to_image


def parser() -> Parser:
    p = Parser(description=__doc__)
    p.add_argument("--model", type=Path, required=True, help="a model folder, or a run's folder with one inside")
    p.add_argument("--prompt", type=str, action="append", default=[], help='repeatable; "" is unconditional')
    p.add_argument("--prompts", type=Path, help="a text file with one prompt a line")
    p.add_argument("--negative", type=str, default="", help="what guidance moves away from")
    p.add_argument("--num-images", type=positive, default=1, help="pictures per prompt")
    p.add_argument("--steps", type=positive, help="sampling steps; default: the model's")
    add_sampling(p)
    p.add_argument("--shift", type=finite, help="shift of the time grid; default: the model's")
    p.add_argument("--height", type=positive, help="in pixels; default: the model's")
    p.add_argument("--width", type=positive, help="in pixels; default: the model's")
    p.add_argument("--seed", type=natural, default=0, help="picture i starts from seed + i")
    p.add_argument("--batch-size", type=positive, default=64, help="pictures at a time; does not change them")
    p.add_argument("--device", type=str, help="cpu, cuda, …; default: cuda where there is one")
    p.add_argument("--out", type=Path, default=Path("samples"), help="folder for the pictures")
    return p


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


def slug(prompt: str) -> str:
    """A prompt as part of a file name."""
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60] or "unconditional"


def main(argv: list[str] | None = None) -> None:
    plain_warnings()
    args = parser().parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError, FileExistsError, NotADirectoryError):
        folder = find_model(args.model)
        prompts = [p for p in read_prompts(args.prompt, args.prompts) for _ in range(args.num_images)]
        args.out.mkdir(parents=True, exist_ok=True)
        import torch  # the slow imports come after the mistakes that need none

        from pipeline import Pipeline

        pipe = Pipeline.load(folder, find_device(args.device))
        sampling = sampling_of(args, pipe.sampling, steps=args.steps, sampler=args.sampler)
        pipe.latent_size(args.height, args.width)  # what cannot be should fail before anything is drawn
        sampling.walk(pipe.objective, args.shift)
    seeds = [args.seed + i for i in range(len(prompts))]
    starts = range(0, len(prompts), args.batch_size)
    pictures, entries = [], []
    with one_line_errors(), tqdm(total=len(starts) * sampling.steps, desc="sampling", unit="step", leave=False) as bar:
        for start in starts:
            part = slice(start, start + args.batch_size)
            batch = pipe(
                prompts[part], seeds[part], args.negative, sampling, args.shift, args.height, args.width,
                callback=lambda done, z, x0: bar.update(1 if done else 0),
            )  # fmt: skip
            pictures.append(batch)
            for prompt, seed, picture in zip(prompts[part], seeds[part], batch, strict=True):
                file = f"{slug(prompt)}_{seed}.png"
                save_png(to_image(picture), args.out / file)
                entries.append(
                    {
                        "file": file,
                        "prompt": prompt,
                        "negative": args.negative,
                        "seed": seed,
                        **asdict(sampling),
                        "shift": pipe.objective.shift if args.shift is None else args.shift,
                        "height": picture.shape[-2],
                        "width": picture.shape[-1],
                        "model": str(folder),
                    }
                )
        columns = args.num_images if args.num_images > 1 else min(len(prompts), 10)
        save_png(sheet(torch.cat(pictures), columns), args.out / "sheet.png")
        (args.out / "samples.json").write_text(
            json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    print(f"{len(entries)} pictures in {args.out}, side by side in {args.out / 'sheet.png'}")


if __name__ == "__main__":
    main()
