"""What a caption leaves out, and how often a model of the shapes then draws what it asks for.

    python -m benchmarks.omitted --model assets/shapes/model

Two different shapes are asked for in captions that say more and less of the same scene: the shapes, their relation,
colours and sizes. If a fact is omitted, more pictures are right, but the model has to choose the fact itself. Printed
are the share of right pictures, and what is wrong with the others. Noise is the same for all captions. The flags of the
sampler show whether other steps or another guidance mend the errors.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from benchmarks.following import load_shapes
from cli import Parser, add_sampling_flags, natural, one_line_errors, positive, sampling_of
from data.examined import Shapes
from data.order import Use, stream
from data.shapes import RELATIONS, SIZES, Found, Group, Request, fulfils, read, requests
from studies.measure import Setting, draw

BATCH = 64
SAID: dict[str, tuple[str, ...]] = {  # the facts of a caption besides its shapes
    "shapes": (),
    "shapes, relation": ("relation",),
    "shapes, colours": ("colour",),
    "shapes, colours, sizes": ("colour", "size"),
    "all": ("colour", "size", "relation"),
}
ERRORS = ("unreadable", "too few", "too many", "the same twice", "another shape", "another colour, size or place")


def whole(count: int, seed: int) -> list[Request]:
    """Requests that say everything of one large or small shape and another, of two colours."""
    draw = stream(seed, Use.REQUESTS, 0)

    def one(words: Sequence[str]) -> str:
        return words[int(draw.integers(len(words)))]

    return [
        Request(tuple(replace(group, size=one(tuple(SIZES))) for group in asked.groups), one(tuple(RELATIONS)))
        for asked in requests("binding", count, seed)
    ]


def less(asked: Request, *said: str) -> Request:
    """A request with only these of its facts: relation, colour, size."""

    def group(full: Group) -> Group:
        colour, size = full.colour if "colour" in said else None, full.size if "size" in said else None
        return replace(full, colour=colour, size=size)

    return Request(tuple(map(group, asked.groups)), asked.relation if "relation" in said else None)


def error(found: Sequence[Found], asked: Request) -> str | None:
    """What is wrong with a picture of two shapes, one of ERRORS; None if it is right."""
    if fulfils(found, asked):
        return None
    shown, wanted = [one.shape for one in found], {group.shape for group in asked.groups}
    tests: dict[str, bool] = {
        "unreadable": None in shown,
        "too few": len(shown) < 2,
        "too many": len(shown) > 2,
        "the same twice": len(set(shown)) == 1 and set(shown) < wanted,
        "another shape": set(shown) != wanted,
    }
    return next((name for name, true in tests.items() if true), ERRORS[-1])


def main(argv: list[str] | None = None) -> None:
    p = Parser(description=__doc__)
    p.add_argument("--model", type=Path, required=True, help="a model of the shapes: its folder, or a run's")
    p.add_argument("--steps", type=positive, help="of the sampler; default: the model's")
    p.add_argument("--captions", type=positive, default=200, help="of each kind")
    p.add_argument("--seed", type=natural, default=7, help="of the captions and of the first picture")
    add_sampling_flags(p)
    args = p.parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError):
        pipe = load_shapes(args.model)
        sampling = sampling_of(args, pipe.sampling, steps=args.steps)
        sampling.walk(pipe.objective)
    setting = Setting(str(args.model), "", pipe, sampling)
    asked = whole(args.captions, args.seed)
    with tqdm(total=len(SAID) * args.captions, desc="drawing", unit="picture", leave=False) as bar:
        found: dict[str, list[str | None]] = {}
        for name, said in SAID.items():
            examined = Shapes([less(one, *said) for one in asked])
            pictures = draw(setting, examined, args.seed, BATCH, bar.update).pictures.movedim(1, -1).numpy()
            found[name] = [error(read(one), some) for one, some in zip(pictures, examined.asked, strict=True)]
    print(f"| said, % of {args.captions} | right | {' | '.join(ERRORS)} |\n|---|{'---:|' * (1 + len(ERRORS))}")
    for name, shown in found.items():
        cells = [f"{shown.count(kind) / args.captions:.1%}" for kind in (None, *ERRORS)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
