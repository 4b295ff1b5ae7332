"""A page to try models: `python app.py`, or `make app`, which installs what it needs."""

import os
import socket
import sys
from pathlib import Path

from cli import Parser, fail, one_line_errors, output, plain_warnings, positive
from storage.models import find_model

MODELS = [Path("assets/shapes/model"), Path("assets/shapes/student"), Path("assets/digits/model")]
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}


def parser() -> Parser:
    p = Parser(description=__doc__)
    p.add_argument("--model", type=Path, action="append", metavar="FOLDER",
                   help="a model folder, a run's folder or a single file; repeatable; default: those in assets/ and "
                        "runs/")  # fmt: skip
    p.add_argument("--runs", type=Path, default=Path("runs"), help="folder whose trainings the page shows")
    p.add_argument("--out", type=output, default=Path("samples"), help="folder for the pictures; none is replaced")
    p.add_argument("--device", help="cpu, cuda, …; default: cuda if there is a GPU")
    p.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; with 0.0.0.0 everyone in the network can draw"
    )
    p.add_argument("--port", type=positive, default=7860)
    return p


def check_port(host: str, port: int) -> None:
    """ValueError, in one line, if no server can listen there."""
    if port > 65535:
        raise ValueError(f"--port must be at most 65535, got {port}")
    try:
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind((host, port))
    except OSError as error:
        raise ValueError(f"cannot listen at {host}, port {port} ({error.strerror}): give another --port") from None


def main(argv: list[str] | None = None) -> None:
    plain_warnings()
    args = parser().parse_args(sys.argv[1:] if argv is None else argv)
    os.environ |= QUIET
    with one_line_errors(ValueError, FileNotFoundError):
        for model in args.model or ():
            find_model(model)
        check_port(args.host, args.port)
        try:
            import gradio  # noqa: F401
        except ImportError:
            fail('the page needs Gradio: pip install -e ".[app]", or make app')
        from cli import find_device
        from web.page import Page, launch
        from web.shelf import models_in

        device = find_device(args.device)
        models = args.model or [*(path for path in MODELS if path.is_dir()), *models_in([args.runs])]
        if not models:
            raise ValueError("there is no model: give --model FOLDER, or train one with make demo")
        page = Page([str(path) for path in models], args.runs, args.out, device)
        served = launch(page, args.host, args.port)
    print(f"The page is at http://{args.host}:{args.port}; Ctrl+C ends it.", flush=True)
    try:
        served.block_thread()
    finally:
        page.close()


if __name__ == "__main__":
    main()
