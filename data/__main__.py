"""The latent store: `python -m data info STORE` lists its content, `python -m data verify STORE` checks every byte."""

import json
import sys
from typing import TYPE_CHECKING

from cli import Parser, one_line_errors, plain_warnings

if TYPE_CHECKING:
    from data.store.reader import Store


def parser() -> Parser:
    p = Parser(prog="python -m data", description=__doc__)
    commands = p.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, help in (
        ("info", "list samples, buckets, dropped inputs and the encoders"),
        ("verify", "read everything and check every checksum; exit status 1 if there is a fault"),
    ):
        command = commands.add_parser(name, help=help, description=help)
        command.add_argument("store", help="a folder, or a URL as in s3://bucket/store")
    return p


def main(argv: list[str] | None = None) -> None:
    plain_warnings()
    args = parser().parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError):
        from data.store.reader import Store  # slow

        store = Store(args.store)
        if args.command == "info":
            print(info(store))
        elif faults := store.verify():
            print(*faults, sep="\n")
            print("to repair a unit, remove its .parquet file and run encode.py again:")
            print("it makes it again and all later parts of its shard (the second number in a unit's name)")
            sys.exit(1)
        else:
            print(f"{args.store}: {len(store)} samples without a fault")


def info(store: "Store") -> str:
    """A short table of a store's content."""
    report = store.report
    rows = [
        ("samples", f"{report['kept']} of {report['inputs']} inputs, {report['captions']} captions"),
        *((f"  {size}", str(count)) for size, count in report["buckets"].items()),
        ("dropped", str(sum(report["dropped"].values()))),
        *((f"  {reason}", str(count)) for reason, count in report["dropped"].items()),
        ("latents", f"{store.plan.get('latents')}, {store.plan['channels']} channels, factor {store.plan['factor']}"),
        ("masks of loss", "the last channel" if store.has_masks else "none"),
        *((section, json.dumps(store.plan.get(section), ensure_ascii=False)) for section in ("codec", "text")),
        ("encoded text", " and ".join(["pooled"] * store.has_pooled + ["tokens"] * store.has_tokens) or "none"),
        ("bytes", f"{store.size():,}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


if __name__ == "__main__":
    main()
