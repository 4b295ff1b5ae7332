"""Encodes captioned pictures into a store: `python encode.py --config configs/shapes.yaml`. The same command goes on.

Under `torchrun` every process encodes its share of the units.
"""

from jsonargparse import Namespace

from cli import fail, one_line_errors, own_device, place, plain_warnings
from data.latents import Codec
from data.store.encoding import Encoding, StoreEncoder
from data.text.encoder import TextEncoder
from training.experiment import Parser, parser, plain


def wanted(argv: list[str] | None) -> tuple[Encoding, Codec, TextEncoder]:
    """What the config's sections `encode`, `codec` and `text` name. The rest of it is checked, but not built."""
    config = parser(__doc__ or "").parse_args(argv)
    if config.encode is None:
        fail("the config has no section encode, which says what to encode: see data.store.encoding.Encoding")
    part = Parser()
    part.add_subclass_arguments(TextEncoder, "text")
    part.add_subclass_arguments(Codec, "codec")
    part.add_argument("--encode", type=Encoding)
    built = part.instantiate(Namespace(text=config.text, codec=config.codec, encode=config.encode))
    return built.encode, built.codec, built.text


def main(argv: list[str] | None = None) -> None:
    plain_warnings()
    with one_line_errors(ValueError, FileNotFoundError, NotADirectoryError):
        rank, world, local = place()
        try:
            how, codec, text = wanted(argv)
        except ValueError as error:
            raise ValueError(plain(str(error))) from None
        device = own_device(how.device, local)
        encoder = StoreEncoder(how, codec.to(device), text.to(device))
        report = encoder.run(rank, world)
    if report is None:
        print(f"rank {rank} is done; the last one to finish completes {how.store}")
        return
    print(f"{report['kept']} of {report['inputs']} pictures are in {how.store}")
    for name, count in sorted(report["dropped"].items(), key=lambda pair: -pair[1]):
        print(f"{count:8} left out: {name}")
    for name, count in report["buckets"].items():
        print(f"{count:8} of {name} pixels, height x width")
    if report["dropped"]:
        print(f"{how.store / 'dropped.jsonl'} lists what was left out")
    if not report["kept"]:
        fail(f"no picture of the source could be used: {how.store} is empty")


if __name__ == "__main__":
    main()
