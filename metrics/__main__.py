"""`python -m metrics page RUN [RUN …]`: a training as one HTML page, to look at while it runs or afterwards."""

from pathlib import Path

from cli import Parser, one_line_errors, output


def parser() -> Parser:
    p = Parser(prog="python -m metrics", description="Shows what was measured.")
    command = p.add_subparsers(dest="command", required=True).add_parser(
        "page",
        help="a training as one HTML page",
        description="Writes what runs have logged, and their samples, as one HTML page that loads no other file.",
    )
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run; several are compared")
    command.add_argument("--out", type=output, help="the file; default: page.html in the first run's folder")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError):
        from metrics.page import write

        out = args.out or args.runs[0] / "page.html"
        write(args.runs, out)
    print(f"look at {out}")


if __name__ == "__main__":
    main()
