"""Encodes captioned pictures into a store: `python encode.py --config configs/shapes.yaml`. The same command resumes.

Under `torchrun` or `srun` every process encodes its share.

`python encode.py hint --hint Edges --picture photo.png --out edges.png` makes the hint of one picture, to draw from.
"""

import sys
from pathlib import Path

from jsonargparse import Namespace

from cli import device_of_rank, fail, one_line_errors, output, own_ranks, plain_warnings
from data.latents import Codec
from data.raw.base import Raw
from data.raw.hints import Hint
from data.raw.pictures import open_picture, save_png
from data.store.encoding import Encoding, StoreEncoder
from data.text.encoder import TextEncoder
from training.experiment import Parser, parser, short_cause


def build_sections(argv: list[str] | None) -> tuple[Encoding, Codec, TextEncoder]:
    """The objects of the config's sections `encode`, `codec` and `text`. The other sections are only checked."""
    config = parser(__doc__ or "").parse_args(argv)
    if config.encode is None:
        fail("the config has no section encode: add one, with the arguments of data.store.encoding.Encoding")
    part = Parser()
    part.add_subclass_arguments(TextEncoder, "text")
    part.add_subclass_arguments(Codec, "codec")
    part.add_argument("--encode", type=Encoding)
    built = part.instantiate(Namespace(text=config.text, codec=config.codec, encode=config.encode))
    return built.encode, built.codec, built.text


def write_hint(argv: list[str]) -> None:
    """The command `hint`. The picture keeps its size."""
    p = Parser(prog="encode.py hint", description="Makes the hint of a picture as `encode.hint` does it for a store.")
    p.add_subclass_arguments(Hint, "hint", required=True)
    p.add_argument("--picture", type=Path, required=True, help="a picture in colour or grey")
    p.add_argument("--out", type=output, required=True, help="a PNG, which must not exist yet")
    args = p.parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError):
        if args.out.exists():
            raise FileExistsError(f"{args.out} exists already: choose another --out")
        image = open_picture(args.picture, 3)
        made = p.instantiate(Namespace(hint=args.hint)).hint(Raw(args.picture.name, args.picture, ("",), (1.0,)), image)
        save_png(made, args.out)
    print(f"The hint of {args.picture} is {args.out}")


def main(argv: list[str] | None = None) -> None:
    plain_warnings()
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["hint"]:
        write_hint(argv[1:])
        return
    with one_line_errors(ValueError, FileNotFoundError):
        rank, world, local_rank = own_ranks()
        try:
            settings, codec, text = build_sections(argv)
        except ValueError as error:
            raise ValueError(short_cause(str(error))) from None
        device = device_of_rank(settings.device, local_rank)
        encoder = StoreEncoder(settings, codec.to(device), text.to(device))
        report = encoder.run(rank, world)
    if report is None:
        print(f"rank {rank} is done; the last one to finish completes {settings.store}")
        return
    print(f"{report['kept']} of {report['inputs']} pictures are in {settings.store}")
    for name, count in sorted(report["dropped"].items(), key=lambda pair: -pair[1]):
        print(f"{count:8} left out: {name}")
    for name, count in report["buckets"].items():
        print(f"{count:8} of {name} pixels, height x width")
    if report["dropped"]:
        print(f"{settings.store / 'dropped.jsonl'} lists what was left out")
    if not report["kept"]:
        fail(f"no picture of the source could be used, so {settings.store} is empty: see its dropped.jsonl")


if __name__ == "__main__":
    main()
