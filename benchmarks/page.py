"""The page against the command line: what showing pictures while they form costs, and seconds to a first picture.

    python -m benchmarks.page

For a model, plain drawings and drawings of the page's job take turns in the same thread, with the same flags; the
median over turns of the ratio of their seconds is the overhead. Then the page is served and opened in headless
Chromium, and the seconds from pressing the button to the pictures are measured, warm. Needs Playwright and Chromium.
"""

import argparse
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from playwright.sync_api import sync_playwright

from app import MODELS, check_port
from pipeline.command import plan
from pipeline.drawing import draw_files
from storage.files import commit_json
from web.form import parsed
from web.job import WORKER, Ended, Job
from web.page import Page, launch
from web.shelf import Shelf

PROMPTS = {"shapes": "two small red circles above a large blue square", "digits": "a handwritten seven"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def prompt_of(model: Path) -> str:
    return next((prompt for name, prompt in PROMPTS.items() if name in str(model)), "")


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def overhead(model: Path, images: int, steps: int | None, turns: int) -> tuple[float, float]:
    """Seconds of a plain drawing, and the ratio of a drawing of the page to it (medians)."""
    argv = ["--model", str(model), "--prompt", prompt_of(model), "--num-images", str(images)]
    argv += ["--steps", str(steps)] if steps else []
    shelf = Shelf()
    plain, ratios = [], []
    with tempfile.TemporaryDirectory() as folder:

        def command() -> None:
            WORKER.submit(lambda: draw_files(plan(parsed(argv, None), shelf.load), Path(folder))).result()

        def page() -> None:
            *_, ended = Job([argv], shelf.load, Path(folder), None, threading.Event()).events()
            assert isinstance(ended, Ended)
            assert not ended.error, ended.error

        for turn in range(turns + 1):  # the first one loads the model
            one, other = seconds(command), seconds(page)
            if turn:
                plain.append(one)
                ratios.append(other / one)
    return statistics.median(plain), statistics.median(ratios)


def first_picture(models: list[Path], port: int, turns: int) -> dict[str, float]:
    """Median seconds from the button to one picture in a browser, for each model with its own steps."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not executable:
        raise SystemExit("error: there is no Chromium on this machine: apt-get install chromium")
    found = {}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        page = Page([str(model) for model in models], Path(folder) / "runs", Path(folder) / "drawn", "cpu")
        served = launch(page, "127.0.0.1", port)
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        for model in models:
            window = browser.new_page()
            window.goto(f"http://127.0.0.1:{port}")
            window.wait_for_function("document.querySelector('.said')?.innerText.includes('weights')")
            window.click("#model input")
            window.get_by_role("option", name=str(model), exact=True).click()
            window.wait_for_function("m => document.querySelector('.said').innerText.startsWith(m)", arg=str(model))
            window.fill("#prompt textarea", prompt_of(model))
            window.fill("#images input[type=number]", "1")
            window.press("#images input[type=number]", "Tab")
            times = []
            for _ in range(turns + 1):
                window.evaluate("document.querySelector('.said').innerText = ''")
                start = time.perf_counter()
                window.click("#draw")
                window.wait_for_function("document.querySelector('.said').innerText.startsWith('1 picture in')")
                times.append(time.perf_counter() - start)
            found[str(model)] = statistics.median(times[1:])
            window.close()
        browser.close()
        served.close()
    return found


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--turns", type=int, default=7)
    p.add_argument("--port", type=int, default=7893)
    p.add_argument("--out", type=Path, help="a JSON file for the numbers")
    args = p.parse_args(argv)
    check_port("127.0.0.1", args.port)
    rows = []
    for model in MODELS:
        for images, steps in ((1, None), (16, None), (16, 50)):
            plain, ratio = overhead(model, images, steps, args.turns)
            rows.append({"model": str(model), "images": images, "steps": steps, "seconds": plain, "ratio": ratio})
            print(f"{model}, {images} pictures, steps {steps or 'its own'}: {plain:.2f} s, the page {ratio:.3f} ×")
    pressed = first_picture(list(MODELS), args.port, args.turns)
    for name, time_ in pressed.items():
        print(f"{name}: {time_:.2f} s from the button to a picture in the browser")
    if args.out:
        machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        commit_json(args.out, machine | {"overhead": rows, "browser": pressed})


if __name__ == "__main__":
    main()
