"""What prior preservation is worth (DreamBooth, Ruiz et al. 2022): a new thing, learned from five pictures of it.

    python -m benchmarks.dreambooth --out runs/dreambooth --sheet docs/dreambooth.png

The thing is a house: a small red triangle on top of a small blue square. The model never drew one, for its shapes do
not touch, but its VAE can, as it cannot draw a new colour. It is named "a sks square": a word that no caption holds,
and a word for its class. A LoRA of the model learns it from five pictures alone, or from these mixed with 200 pictures
that the model drew: of "a square", as in the paper, or of captions of all kinds. All trainings see the five equally
often, and the others as often as the five.

Printed are means over trainings ± their deviation. Of captions that name the thing, in contexts of which the five
pictures show none: how often it is drawn, and how often the picture shows what the caption says and nothing else. Of
the categories' captions, which do not name it: how often the picture is right, and how often it shows the thing, for
captions with a square and for the others. The judge is that of `data/shapes.py`, extended to the thing.

The same command resumes. With `--jobs 2` it took 25 minutes on one core that was busy with other work, too.
"""

import signal
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from tqdm import tqdm

from cli import Parser, fail, finite, natural, one_line_errors, output, positive
from data import shapes
from data.order import Use, stream
from data.raw.pictures import open_picture, save_png, sheet
from data.shapes import CATEGORIES, COLOURS, RELATIONS, SHAPES, SIZES, Found, Group, Placed, Region, Request, Scene
from data.store.encoding import levels
from pipeline import LoadOptions, Pipeline
from pipeline.sampling import Sampling
from storage.files import commit_bytes, commit_json, hold
from storage.text import parse_json, read_text
from studies.runner import ROOT, Step, ordered, run

MODEL = ROOT / "assets/shapes/model"
CLASS = "square"
THING = f"sks {CLASS}"
SIDE = SIZES["small"]  # of the house's two parts, in pixels
ROOF, BODY = ("triangle", "red"), (CLASS, "blue")
KNOWN = (Group(1, "circle", "yellow"), Group(1, "cross", "green"))  # what stands beside the thing in the five pictures
LEARNED = (
    Request((Group(1, THING),)),
    Request((Group(1, THING),)),
    Request((Group(1, THING),)),
    Request((Group(1, THING), KNOWN[0])),
    Request((Group(1, THING), KNOWN[1]), "to the left of"),
)
HELD_OUT, APART = Request((Group(1, THING),)), "apart"  # a sixth picture, and its name, by which it is held out
CONTEXTS = ("with another", "position", "position, named last", "two of it")
PRESERVED = 200  # pictures of an arm that the model drew
BATCH = 4  # pictures of the thing in a batch
DRAWN = 64  # pictures at a time
SAMPLING = Sampling(steps=10, guidance=3.0, sampler="dpmpp_2m")
SHOWN = 3  # of each context and as many of the captions with a square, on the sheet
ARMS = ("nothing", "its class", "all kinds")  # what is preserved
HEADER = ("thing drawn", "all as asked", f"a {CLASS}: right", "shows the thing", "others: right", "shows the thing")


def contexts(each: int, seed: int) -> list[Request]:
    """`each` requests for the thing in every one of CONTEXTS, one after another; none stands beside the five."""

    def one(draw: Generator, context: str) -> Request:
        beside = [Group(1, s, c) for s in SHAPES for c in COLOURS]
        other = next(o for i in draw.permutation(len(beside)) if (o := beside[i]) not in KNOWN)
        relation = tuple(RELATIONS)[int(draw.integers(len(RELATIONS)))]
        return {
            "with another": Request((Group(1, THING), other)),
            "position": Request((Group(1, THING), other), relation),
            "position, named last": Request((other, Group(1, THING)), relation),
            "two of it": Request((Group(2, THING),)),
        }[context]

    draws = [stream(seed, Use.REQUESTS, len(CATEGORIES) + i) for i in range(len(CONTEXTS))]
    return [one(draw, context) for draw, context in zip(draws, CONTEXTS, strict=True) for _ in range(each)]


def scene(asked: Request, draw: Generator) -> Scene:
    """A scene that shows what is asked for; a house is its two parts, the roof first."""
    groups = tuple(replace(group, size="small") if group.shape == THING else group for group in asked.groups)
    while True:
        objects, seen = [], []
        for o in shapes.place(replace(asked, groups=groups), draw) or ():
            if o.shape == THING:
                objects += [Placed(*ROOF, SIDE, o.top - SIDE, o.left), Placed(*BODY, SIDE, o.top, o.left)]
                seen.append(Found(THING, None, "large", (o.top, o.left + SIDE / 2)))
            else:
                objects.append(o)
                seen.append(Found(o.shape, o.colour, "large", (o.top + o.side / 2, o.left + o.side / 2)))
        if objects and clear(objects) and shapes.fulfils(seen, asked):
            return Scene(asked, tuple(objects))


def clear(objects: Sequence[Placed]) -> bool:
    """Whether all is in the picture, and no two objects touch but the parts of a house."""
    return all(o.top >= shapes.STEP for o in objects) and all(
        shapes.apart(a.top, a.side, b.top, b.side)
        or shapes.apart(a.left, a.side, b.left, b.side)
        or (a[:3], b) == ((*ROOF, SIDE), Placed(*BODY, SIDE, a.top + SIDE, a.left))
        for i, a in enumerate(objects)
        for b in objects[i + 1 :]
    )


def pixels_of(drawn: Scene) -> Tensor:
    """(3, 64, 64) in [0, 1]."""
    return levels(shapes.picture(drawn)) / 255


def is_thing(region: Region) -> bool:
    """Whether a region is a house, by its size, the outline of its halves and their colours."""
    height, width = region.mask.shape
    if not (0.75 < height / (2 * SIDE) < 1.33 and 0.75 < width / SIDE < 1.33):
        return False
    inside, third = region.inside(), height // 3  # in the middle the colours mix
    found = [
        (shapes.shape_of(region.mask[half]), shapes.colour_of(region.pixels[end][inside[end]]))
        for half, end in (
            (slice(height // 2), slice(third)),
            (slice(height // 2, None), slice(height - third, None)),
        )
    ]
    return found == [ROOF, BODY]


def read(picture: Tensor) -> list[Found]:
    """As `data.shapes.read`, but a house is one THING; the picture is (3, 64, 64) in [0, 1]."""
    return [
        Found(THING, None, "large", region.centre) if is_thing(region) else shapes.found_in(region)
        for region in shapes.regions(picture.movedim(0, -1).double().numpy())
    ]


class Judged(NamedTuple):
    """Shares of pictures: that show the thing, and that show what is asked for and nothing else."""

    thing: float
    right: float


def judged(pictures: Iterable[Tensor], asked: Sequence[Request]) -> Judged:
    found = [read(picture) for picture in pictures]
    right = [shapes.fulfils(some, request) for some, request in zip(found, asked, strict=True)]
    return Judged(float(np.mean([any(f.shape == THING for f in some) for some in found])), float(np.mean(right)))


class Examination:
    """The captions of all models, in parts.

    Args:
        each: captions of each context and of each category.
        seed: of the captions.

    Attributes:
        parts: the captions of each context; those of the categories with the class, and the others.

    Raises:
        ValueError: there are too few for the sheet.
    """

    def __init__(self, each: int, seed: int) -> None:
        plain = [request for category in CATEGORIES for request in shapes.requests(category, each, seed)]
        of_class = [any(group.shape == CLASS for group in request.groups) for request in plain]
        named = contexts(each, seed)
        self.parts = {context: named[i * each : (i + 1) * each] for i, context in enumerate(CONTEXTS)} | {
            f"a {CLASS}": [request for request, of_it in zip(plain, of_class, strict=True) if of_it],
            "others": [request for request, of_it in zip(plain, of_class, strict=True) if not of_it],
        }
        if each < SHOWN or sum(of_class) < SHOWN * len(CONTEXTS):
            raise ValueError(f"--each {each} gives too few captions with a {CLASS}: take more")

    def measure(self, pipe: Pipeline, name: str) -> dict[str, Judged]:
        """A model's scores."""
        with tqdm(total=sum(map(len, self.parts.values())), desc=name, unit="picture", leave=False) as bar:
            return {part: judged(drawn(pipe, asked, bar), asked) for part, asked in self.parts.items()}

    def shown(self) -> list[Request]:
        """Some of each context, and as many captions of the class."""
        some = [request for context in CONTEXTS for request in self.parts[context][:SHOWN]]
        return [*some, *self.parts[f"a {CLASS}"][: len(some)]]


def drawn(pipe: Pipeline, asked: Sequence[Request], bar: Any = None) -> Tensor:
    """A picture of each request, (N, 3, 64, 64), picture i from seed i."""
    found = []
    for start in range(0, len(asked), DRAWN):
        some = asked[start : start + DRAWN]
        found.append(pipe([request.caption() for request in some], range(start, start + len(some)), sampling=SAMPLING))
        if bar is not None:
            bar.update(len(some))
    return torch.cat(found)


def write_thing(folder: Path) -> None:
    """The pictures of the thing with their captions, as a folder that `encode.py` reads."""
    draw = stream(0, Use.SCENE, 2)
    for name, asked in zip((*map(str, range(len(LEARNED))), APART), (*LEARNED, HELD_OUT), strict=True):
        save_png(shapes.picture(scene(asked, draw)), folder / f"{name}.png")
        commit_bytes(folder / f"{name}.txt", asked.caption().encode())


def captions_of(arm: str) -> list[str]:
    """The captions of an arm's preserved pictures; none of an arm without any."""
    if arm == "its class":
        return [f"a {CLASS}"] * PRESERVED
    each = -(-PRESERVED // len(CATEGORIES))
    kinds = [request.caption() for c in CATEGORIES for request in shapes.requests(c, each, seed=PRESERVED)]
    return kinds[:PRESERVED] if arm == "all kinds" else []


def preserved(out: Path, arm: str) -> Step:
    """The model's own pictures of an arm."""
    prompts, folder = out / f"{hyphened(arm)}.txt", out / hyphened(arm)
    commit_bytes(prompts, "\n".join(captions_of(arm)).encode())
    sampler = ("--sampler", SAMPLING.sampler, "--steps", str(SAMPLING.steps), "--seed", "1000000")
    command = ("sample.py", "--model", str(MODEL), "--prompts", str(prompts), *sampler, "--out", str(folder))
    return Step(command, folder, "sheet.png")


def hyphened(arm: str) -> str:
    return arm.replace(" ", "-")


def encoded(pictures: Path, needs: tuple[Step, ...] = ()) -> Step:
    store = pictures.with_name(f"{pictures.name}-store")
    source = ("--encode.source", "Pictures", "--encode.source.path", str(pictures))
    command = ("encode.py", "--config", "configs/shapes.yaml", *source, "--encode.store", str(store))
    return Step(command, store, "report.json", needs)


def plan(out: Path, seeds: Sequence[int], steps: int, rate: float) -> dict[str, list[Step]]:
    """The trainings of all arms."""
    stores = {"": encoded(out / "thing")}
    stores |= {arm: encoded(out / hyphened(arm), (preserved(out, arm),)) for arm in ARMS if captions_of(arm)}
    own = {arm: [stores[name] for name in ("", arm) if name in stores] for arm in ARMS}
    return {arm: [training(out, arm, seed, steps, rate, own[arm]) for seed in seeds] for arm in ARMS}


def training(out: Path, arm: str, seed: int, steps: int, rate: float, stores: Sequence[Step]) -> Step:
    """A LoRA of one arm, from the stores of the thing and of what is preserved.

    The one validation is at the end, so that the model is that of the end.
    """
    repeats = (PRESERVED // len(LEARNED), 1)
    mixed = [{"store": str(s.folder), "repeats": times} for s, times in zip(stores, repeats, strict=False)]
    folder = out / f"{hyphened(arm)}-{seed}"
    flags = {
        "run.folder": folder, "run.seed": seed, "run.steps": steps, "run.validate_every": steps,
        "run.checkpoint_every": steps, "network": "mmdit.checkpoint.load", "network.path": MODEL,
        "optimization.lr": rate, "optimization.warmup": min(20, steps - 1),
        "ema.decay": 0.98, "ema.widths": [], "ema.snapshot_every": 0, "strategy.compile": "false", "grid.prompts": [],
        "data.store": mixed, "data.held_out": 1, "data.batch_size": BATCH * len(mixed),
    }  # fmt: skip
    configs = ("--config", "configs/shapes.yaml", "--config", "configs/sd3/lora.yaml")
    given = (word for flag, value in flags.items() for word in (f"--{flag}", str(value)))
    return Step(("train.py", "fit", *configs, *given), folder, "lora/adapter_config.json", tuple(stores))


class Score(NamedTuple):
    """What is printed of a model: shares of pictures of captions that name the thing, and of those that do not."""

    drawn: float
    right: float
    class_right: float
    class_leaked: float
    others_right: float
    others_leaked: float

    @classmethod
    def of(cls, parts: dict[str, Judged]) -> "Score":
        thing, right = (float(np.mean([parts[context][i] for context in CONTEXTS])) for i in (0, 1))
        of_class, others = parts[f"a {CLASS}"], parts["others"]
        return cls(thing, right, of_class.right, of_class.thing, others.right, others.thing)


def scored(file: Path, examination: Examination, settings: dict[str, Any], lora: Step | None) -> dict[str, Judged]:
    """The scores of a LoRA, or of the model without one; from their file if it exists."""
    settings = settings | {"training": list(lora.command) if lora else []}
    if file.exists():
        held = parse_json(read_text(file), file)
        if held["settings"] != settings:
            raise ValueError(f"{file} is for other settings: remove it, or choose another --out")
        return {part: Judged(*shares) for part, shares in held["parts"].items()}
    found = examination.measure(loaded(lora), file.stem)
    commit_json(file, {"settings": settings, "parts": found})
    return found


def loaded(lora: Step | None) -> Pipeline:
    return Pipeline.load(MODEL, LoadOptions(lora=(str(lora.folder),) if lora else ()))


def cells(columns: Iterable[Iterable[float]]) -> str:
    """Mean ± deviation over the trainings, in per cent."""
    found = []
    for values in map(list, columns):
        spread = f" ± {100 * np.std(values, ddof=1):.0f}" if len(values) > 1 else ""
        found.append(f"{100 * np.mean(values):.0f}{spread}")
    return " | ".join(found)


def table(header: Sequence[str], rows: Mapping[str, Sequence[Sequence[float]]]) -> None:
    print(f"\n| preserved | {' | '.join(header)} |\n|---|{'---:|' * len(header)}")
    print(*(f"| {name} | {cells(zip(*values, strict=True))} |" for name, values in rows.items()), sep="\n")


def draw_sheet(file: Path, thing: Path, examination: Examination, loras: dict[str, Step]) -> None:
    """A row of the five pictures, then for the thing's captions and for the class's a row of each arm."""
    five = torch.stack([levels(open_picture(thing / f"{i}.png", 3)) / 255 for i in range(len(LEARNED))])
    asked = examination.shown()
    rows = {arm: drawn(loaded(lora), asked).chunk(2) for arm, lora in loras.items()}
    columns = len(asked) // 2
    blank = torch.full((columns - len(five), *five.shape[1:]), 0.5)
    save_png(sheet(torch.cat([five, blank, *(rows[arm][half] for half in (0, 1) for arm in rows)]), columns), file)


def main(argv: Sequence[str] | None = None) -> None:
    p = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("--out", type=output, default=Path("runs/dreambooth"), help="folder of all that is made")
    p.add_argument("--seeds", type=natural, nargs="+", default=[0, 1, 2], help="of the trainings")
    p.add_argument("--steps", type=positive, default=600, help="of each training")
    p.add_argument("--rate", type=finite, default=5e-3, help="learning rate")
    p.add_argument("--each", type=positive, default=24, help="captions of each context and of each category")
    p.add_argument("--seed", type=natural, default=1, help="of the captions")
    p.add_argument("--jobs", type=positive, default=1, help="commands that run at the same time and share the cores")
    p.add_argument("--sheet", type=output, help="a PNG: the five pictures; then a row of each training of the first "
                   "seed, first of captions of the thing, then of captions of its class")  # fmt: skip
    args = p.parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError):
        if args.rate <= 0:
            raise ValueError(f"--rate must be above 0, got {args.rate:g}")
        examination, out = Examination(args.each, args.seed), args.out.resolve()
        with hold(out):
            trainings = plan(out, args.seeds, args.steps, args.rate)
            write_thing(out / "thing")
            goals = [steps[i] for i in range(len(args.seeds)) for steps in trainings.values()]
            for step in ordered(goals):
                if step.command[0] == "sample.py" and not step.is_done() and step.folder.exists():
                    rmtree(step.folder)  # sample.py would add to what an interrupted drawing left
            run(goals, "dreambooth", args.jobs)
            settings = {"each": args.each, "seed": args.seed}
            models = [(arm, step) for arm, steps in trainings.items() for step in steps]
            found: dict[str, list[dict[str, Judged]]] = {}
            for name, lora in tqdm([("(before)", None), *models], desc="scores", unit="model"):
                file = out / "scores" / f"{lora.folder.name if lora else 'base'}.json"
                found.setdefault(name, []).append(scored(file, examination, settings, lora))
            if args.sheet:
                first = {arm: steps[0] for arm, steps in trainings.items()}
                draw_sheet(args.sheet, out / "thing", examination, first)
    print(f"{len(args.seeds)} trainings of {args.steps} steps, per cent of pictures")
    table(HEADER, {name: [Score.of(parts) for parts in models] for name, models in found.items()})
    print("\nall as asked, by context")
    table(CONTEXTS, {name: [[parts[c].right for c in CONTEXTS] for parts in models] for name, models in found.items()})
    if args.sheet:
        print(f"\nLook at {args.sheet}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, SIGTERM also ends the running command
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped; the same command resumes", 128 + signal.SIGINT)
