"""Encodes captioned pictures into a store: `python encode.py --config configs/shapes.yaml`. The same command resumes.

Under `torchrun` or `srun` every process encodes its share.
"""

from jsonargparse import Namespace

from cli import device_of_rank, fail, one_line_errors, own_ranks, plain_warnings
from data.latents import Codec
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


def main(argv: list[str] | None = None) -> None:
    plain_warnings()
    with one_line_errors(ValueError, FileNotFoundError, NotADirectoryError):
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
