"""The page in a real browser: headless Chromium, driven by Playwright. Screenshots go to build/screenshots/."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

import sample

ROOT = Path(__file__).parents[1]
SHOTS = ROOT / "build/screenshots"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
SHAPES, DIGITS, STUDENT = "assets/shapes/model", "assets/digits/model", "assets/shapes/student"

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
if not CHROMIUM:
    pytest.skip("there is no Chromium on this machine: apt-get install chromium", allow_module_level=True)


class Server:
    """`python app.py` in a process of its own."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.out, self.lost = folder / "drawn", folder / "lost"
        shutil.copytree(ROOT / DIGITS, self.lost)
        models = [word for path in (SHAPES, STUDENT, DIGITS, str(self.lost)) for word in ("--model", path)]
        self.log = open(folder / "log", "w")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "app.py", *models, "--port", str(self.port), "--out", str(self.out),
             "--runs", str(folder / "runs"), "--device", "cpu"],
            cwd=ROOT, stdout=self.log, stderr=self.log, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.url = f"http://127.0.0.1:{self.port}"
        end = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(self.url, timeout=1)
                return
            except OSError:
                assert time.monotonic() < end, (folder / "log").read_text()
                assert self.process.poll() is None, (folder / "log").read_text()
                time.sleep(0.2)


class Visitor:
    """A browser window on the page, which has no errors in its console and loads nothing from elsewhere."""

    def __init__(self, browser: "playwright.Browser", server: Server, width: int = 1280, height: int = 1200) -> None:
        self.window = browser.new_context(viewport={"width": width, "height": height})
        self.page = self.window.new_page()
        self.page.set_default_timeout(90_000)  # other tests keep the machine busy
        self.faults: list[str] = []
        self.page.on("console", lambda line: self.faults.append(line.text) if line.type == "error" else None)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", lambda request: self.check(request.url, server.url))
        self.page.goto(server.url)
        self.says("weights")

    def check(self, url: str, own: str) -> None:
        if not url.startswith((own, "data:", "blob:", "about:")):
            self.faults.append(f"loads {url}")

    def said(self) -> str:
        return self.page.inner_text(".said >> nth=0")

    def says(self, word: str, seconds: float = 90) -> str:
        """Waits until the status line has a word; returns the line."""
        wait = "word => document.querySelector('.said')?.innerText.toLowerCase().includes(word)"
        try:
            self.page.wait_for_function(wait, arg=word.lower(), timeout=1000 * seconds)
        except playwright.TimeoutError:
            raise AssertionError(f"the page does not say {word!r} but {self.said()!r}") from None
        return self.said()

    def box(self, field: str) -> "playwright.Locator":
        """Where a field is typed, given by the name of `Form`; opens what hides it."""
        box = self.page.locator(f"#{field} textarea, #{field} input:not([type=range])").first
        if not box.is_visible():
            self.page.evaluate("document.querySelectorAll('button.label-wrap:not(.open)').forEach(b => b.click())")
        return box

    def fill(self, field: str, value: str) -> None:
        box = self.box(field)
        box.fill(value)
        box.press("Tab")

    def value(self, field: str) -> str:
        return self.box(field).input_value()

    def reload(self) -> None:
        self.page.reload()
        self.says("weights")
        ended = ("AbortError", "Connection errored out")  # requests that the reload broke off
        self.faults = [fault for fault in self.faults if not any(word in fault for word in ended)]

    def choose(self, field: str, value: str) -> None:
        self.page.locator(f"#{field} input").click()
        self.page.get_by_role("option", name=value, exact=True).click()

    def model(self, name: str) -> None:
        self.choose("model", name)
        self.says(f"{name}: ")

    def draw(self, word: str = " in ", seconds: float = 90) -> str:
        """Presses the button and waits for a word in the status line."""
        self.page.evaluate("document.querySelector('.said').innerText = ''")
        self.page.click("#draw")
        return self.says(word, seconds)

    def begin(self, prompt: str) -> None:
        """Begins a drawing that takes minutes."""
        for field, value in (("prompt", prompt), ("images", "64"), ("steps", "100")):
            self.fill(field, value)
        self.draw("step ")

    def command(self) -> str:
        self.page.wait_for_selector("#line .cm-line")
        return re.sub(r"\s+", " ", " ".join(self.page.locator("#line .cm-line").all_inner_texts()))

    def shot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png", full_page=True)

    def close(self) -> None:
        self.window.close()
        assert not self.faults, self.faults


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("page"))
    yield server
    server.process.terminate()
    server.process.wait(20)
    server.log.close()


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visitor(browser: "playwright.Browser", server: Server) -> Iterator[Visitor]:
    visitor = Visitor(browser, server)
    yield visitor
    visitor.close()


def drawn(server: Server) -> list[dict]:
    file = server.out / "samples.json"
    return json.loads(file.read_text()) if file.exists() else []


def test_the_page_s_pictures_are_those_of_the_command_to_the_byte(
    visitor: Visitor, server: Server, tmp_path: Path
) -> None:
    visitor.fill("prompt", "two small red circles above a large blue square")
    visitor.fill("seed", "7")
    visitor.fill("steps", "6")
    visitor.draw("4 pictures in")
    visitor.shot("drawn")
    assert visitor.page.locator("#pictures img").count() == 4
    words = visitor.command()
    assert words.startswith(f"python sample.py --model {SHAPES} --prompt 'two small red circles above")
    import shlex

    sample.main([*shlex.split(words)[2:], "--device", "cpu", "--out", str(tmp_path / "again")])
    for entry in drawn(server)[-4:]:
        assert (tmp_path / "again" / entry["file"]).read_bytes() == (server.out / entry["file"]).read_bytes()
    shown = visitor.page.locator("#pictures img").first.get_attribute("src")
    assert urllib.request.urlopen(shown).read() == (server.out / drawn(server)[-4]["file"]).read_bytes()


def test_a_second_model_walks_from_the_same_noise(visitor: Visitor) -> None:
    visitor.fill("prompt", "a large green triangle")
    visitor.fill("images", "1")
    visitor.choose("compare", STUDENT)
    visitor.draw("2 pictures in")
    rows = visitor.page.locator("#walk tbody tr").all_inner_texts()
    assert [row.split("\t")[:2] for row in rows] == [[SHAPES, "20"], [STUDENT, "4"]]
    assert visitor.page.locator("#walk img").count() == 3
    assert visitor.command().count("python sample.py") == 2
    visitor.shot("compared")


def test_what_is_painted_over_is_drawn_anew(visitor: Visitor, server: Server, tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64), (240, 240, 240))
    image.paste((30, 60, 200), (4, 4, 20, 20))
    image.save(tmp_path / "start.png")
    visitor.fill("prompt", "a large red circle")
    visitor.fill("strength", "")  # opens the panels
    canvas = visitor.page.locator("#painted canvas").first
    canvas.wait_for(state="visible")
    visitor.page.wait_for_timeout(3000)  # before its layers are there Gradio's editor takes no picture
    visitor.page.locator("#painted input[type=file]").first.set_input_files(tmp_path / "start.png")
    visitor.page.wait_for_timeout(3000)
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box
    x, y = box["x"] + 0.62 * box["width"], box["y"] + 0.6 * box["height"]
    visitor.page.mouse.move(x, y)
    visitor.page.mouse.down()
    visitor.page.mouse.move(x + 30, y + 20, steps=5)
    visitor.page.mouse.move(x, y + 40, steps=5)
    visitor.page.mouse.up()
    visitor.page.wait_for_timeout(800)
    visitor.fill("images", "1")
    visitor.fill("steps", "4")
    visitor.draw("1 picture in")
    visitor.shot("painted")
    assert "--image" in visitor.command()
    assert "--mask" in visitor.command()
    entry = drawn(server)[-1]
    mask, kept = Image.open(entry["mask"]), Image.open(entry["image"])
    assert mask.size == kept.size == (64, 64)
    share = sum(mask.histogram()[128:]) / 64**2
    assert 0.005 < share < 0.7


def test_a_drawing_can_be_stopped_and_the_next_begins_at_once(visitor: Visitor, server: Server) -> None:
    before = len(drawn(server))
    visitor.begin("a small yellow circle")
    visitor.page.wait_for_selector("#pictures img")  # while they form
    visitor.shot("forming")
    visitor.page.click("#stop")
    visitor.says("stopped")
    visitor.fill("images", "1")
    visitor.fill("steps", "2")
    visitor.draw("1 picture in")
    assert len(drawn(server)) == before + 1


def test_a_second_press_takes_the_place_of_the_first(visitor: Visitor, server: Server) -> None:
    before = len(drawn(server))
    visitor.begin("a large black square")
    visitor.fill("prompt", "a small black square")
    visitor.fill("images", "1")
    visitor.fill("steps", "2")
    visitor.draw("1 picture in")
    assert [entry["prompt"] for entry in drawn(server)[before:]] == ["a small black square"]


def test_after_a_reload_the_history_leads_back_to_the_settings(visitor: Visitor) -> None:
    visitor.model(DIGITS)
    visitor.fill("prompt", "a handwritten four")
    visitor.fill("seed", "11")
    visitor.fill("steps", "5")
    visitor.fill("images", "1")
    visitor.draw("1 picture in")
    visitor.reload()
    visitor.page.locator("#history img").first.click()
    visitor.says("the settings of")
    shown = [visitor.value(name) for name in ("model", "prompt", "seed", "steps")]
    assert shown == [DIGITS, "a handwritten four", "11", "5"]
    visitor.draw("1 picture in")


WRONG = [
    ({"prompt": "x" * 10_000}, "10,000 characters: take at most 2,000"),
    ({"sampler": "warp"}, "sampler"),
    ({"sampler": "ddim:eta=2"}, "0 <= eta <= 1"),
    ({"sampler": "ddpm"}, "needs a discrete path"),
    ({"sampler": "meanflow"}, "needs a network of two times"),
    ({"spacing": "leading"}, "needs a discrete path"),
    ({"spacing": "given:times=1/2"}, "given spacing has 2 times"),
    ({"height": "7"}, "height must be a multiple of"),
    ({"width": "6400"}, "width must be at most"),
    ({"shift": "-1"}, "-1"),
    ({"shift": "much"}, "--shift: invalid finite value"),
    ({"guide_from": "0.9", "guide_to": "0.1"}, "from <= to"),
    ({"strength": "0.5"}, "needs an --image"),
    ({"guider": "apf"}, "there is no guider"),
    ({"rescale": "2"}, "rescale must be between 0 and 1"),
    ({"guidance": "1", "negative": "blue"}, "--negative needs guidance"),
    ({"guidance": "0"}, "guidance 0 would ignore the prompt"),
    ({"lora": "nowhere.safetensors"}, "nowhere.safetensors"),
    ({"control": "nowhere"}, "its picture is missing"),
    ({"seed": "1.5"}, "--seed: invalid natural value"),
]


def test_every_wrong_input_is_said_and_none_ends_the_server(visitor: Visitor, server: Server) -> None:
    before = len(drawn(server))
    visitor.fill("prompt", "a large red circle")
    for fields, message in WRONG:
        right = {name: visitor.value(name) for name in fields}
        for name, value in fields.items():
            visitor.fill(name, value)
        assert "\n" not in visitor.draw(message).strip()
        assert visitor.page.locator(".said.wrong").count() == 1
        for name, value in right.items():
            visitor.fill(name, value)
    visitor.shot("wrong")
    assert len(drawn(server)) == before
    assert server.process.poll() is None


def test_a_model_that_vanishes_is_named_and_the_page_lives_on(visitor: Visitor, server: Server) -> None:
    moved = server.lost.with_name("moved")
    server.lost.rename(moved)
    visitor.choose("model", str(server.lost))
    visitor.says(f"{server.lost} cannot be loaded: ")
    visitor.draw("is no model folder")
    moved.rename(server.lost)
    visitor.draw("pictures in")


def test_html_in_a_prompt_is_text(visitor: Visitor) -> None:
    visitor.model(DIGITS)
    visitor.fill("prompt", "<img src=x onerror='window.hacked = 1'><b>(seven:1.3)</b>")
    visitor.draw("weights as in")  # a warning, which has the word
    assert visitor.page.evaluate("window.hacked") is None
    assert "<img src=x" in visitor.command()


def test_two_visitors_draw_one_after_the_other(browser: "playwright.Browser", server: Server) -> None:
    one, other = Visitor(browser, server), Visitor(browser, server)
    one.fill("images", "16")
    other.model(DIGITS)
    other.fill("prompt", "a three")
    one.fill("prompt", "a small red circle")
    one.page.click("#draw")
    one.says("step")
    other.page.click("#draw")
    other.says("waiting")
    other.says("4 pictures in", 120)
    one.says("16 pictures in")
    assert {entry["model"] for entry in drawn(server)[-20:]} == {SHAPES, DIGITS}
    one.close()
    other.close()


def test_a_window_that_is_closed_ends_its_drawing(browser: "playwright.Browser", server: Server) -> None:
    before = len(drawn(server))
    one, other = Visitor(browser, server), Visitor(browser, server)
    one.begin("three small green squares")
    one.close()
    other.model(DIGITS)
    other.fill("prompt", "a one")
    start = time.monotonic()
    other.draw("4 pictures in")
    assert time.monotonic() - start < 30  # the other one needs minutes
    assert len(drawn(server)) == before + 4
    other.close()


def test_choices_are_kept_beside_the_pictures(visitor: Visitor, server: Server) -> None:
    visitor.model(DIGITS)
    visitor.fill("prompt", "a handwritten nine <b>")
    visitor.draw("4 pictures in")
    visitor.page.get_by_role("tab", name="Choose").click()
    while "nine" not in visitor.page.inner_text("#caption"):
        visitor.page.get_by_role("button", name="Skip").click()
        visitor.page.wait_for_timeout(500)
    visitor.shot("choose")
    visitor.page.get_by_role("button", name="The other is better").click()
    visitor.page.wait_for_function("document.querySelector('#choices').innerText.includes('1 choice in')")
    (line,) = (server.out / "chosen.jsonl").read_text().splitlines()
    one, other = (entry["file"] for entry in drawn(server)[-4:-2])
    assert json.loads(line) == {"caption": "a handwritten nine <b>", "better": other, "worse": one}


def test_a_training_is_shown_while_it_runs(visitor: Visitor, server: Server) -> None:
    run = server.out.parent / "runs/first"
    (run / "samples").mkdir(parents=True)
    entries = [{"step": step, "train/loss": 1 / step, "perf/images_per_s": 100 + step} for step in range(1, 20)]
    (run / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    Image.new("RGB", (8, 8), "red").save(run / "samples/step-0000010.png")
    visitor.reload()
    visitor.page.get_by_role("tab", name="Training").click()
    visitor.page.get_by_label("Trainings").click()
    visitor.page.get_by_role("option", name=str(run), exact=True).click()
    frame = visitor.page.frame_locator("iframe[title=training]")
    frame.get_by_text("step 10").wait_for(timeout=20_000)
    assert frame.locator("figure img").count() >= 2
    visitor.shot("training")


@pytest.mark.parametrize(("name", "width", "height"), [("phone", 390, 844), ("desktop", 1440, 900)])
def test_it_fits_a_phone_and_a_desktop(
    browser: "playwright.Browser", server: Server, name: str, width: int, height: int
) -> None:
    visitor = Visitor(browser, server, width, height)
    visitor.model(DIGITS)
    visitor.fill("prompt", "a handwritten eight")
    visitor.draw("4 pictures in")
    visitor.page.wait_for_selector("#walk img")
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= width
    visitor.shot(name)
    visitor.close()


def test_it_can_be_used_by_keyboard_and_every_field_has_a_label(visitor: Visitor) -> None:
    visitor.model(DIGITS)
    visitor.page.focus("#prompt textarea")
    visitor.page.keyboard.type("a two")
    visitor.page.keyboard.press("Shift+Enter")
    visitor.says("4 pictures in")
    visitor.fill("strength", "")
    unlabelled = visitor.page.evaluate(
        """() => [...document.querySelectorAll('input:not([type=file]), textarea, select, button')]
        .filter(e => e.offsetParent && !(e.labels?.length || e.ariaLabel || e.title || e.innerText?.trim()
          || e.closest('label') || e.getAttribute('aria-labelledby'))).map(e => e.outerHTML.slice(0, 120))"""
    )
    assert not unlabelled
