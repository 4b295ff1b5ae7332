"""The page: its fields, and what happens when a button is pressed."""

import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from data.drawn import recorded
from metrics.page import page as training_page
from metrics.page import read_run
from pipeline import LoadOptions
from pipeline.drawing import entries_in
from pipeline.sampling import GRIDS, GUIDERS, SAMPLERS
from storage.models import find_model
from web.choices import FILE, Pair, choose, open_pairs
from web.form import Form, command
from web.html import gallery, large, said, step, walked
from web.job import WORKER, Ended, Event, Job, Picture, Progress
from web.shelf import Shelf

HISTORY = 60  # pictures
STEPS, GUIDANCE = 100, 12  # the ends of the sliders
NONE = "none"
REFRESH = 10  # seconds between two looks at a training
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
    block_info_text_color="*neutral_600", block_label_text_color="*neutral_700", block_title_text_color="*neutral_700"
)
CSS = """
.small img { image-rendering: pixelated; }
.said { font-size: 1.05em; min-height: 1.6em; }
.said.wrong { color: #b00020; font-weight: 600; }
.dark .said.wrong { color: #ff8a80; }
.said progress { width: 100%; height: 0.6em; }
.walk figure { margin: 0 0 0.8em; }
.one img { max-width: 100%; margin: auto; }
.walk { overflow-x: auto; }
.walk img { max-width: 100%; }
.numbers td, .numbers th { padding: 0.15em 0.8em 0.15em 0; text-align: left; }
footer { display: none !important; }
"""


class Ticket(NamedTuple):
    """One press of the button."""

    name: str
    stop: threading.Event  # ends the drawing


class Page:
    """The page and what it keeps: the models, and what each visitor draws.

    Args:
        models: paths of the models to choose from.
        runs: folder of the trainings.
        out: folder of the pictures.
        device: where the models draw.
    """

    def __init__(self, models: list[str], runs: Path, out: Path, device: str) -> None:
        self.models, self.runs, self.out, self.device = models, runs, out, device
        self.shelf = Shelf()
        self.tickets: dict[str, Ticket] = {}  # of the last press of each visitor

    # What happens.

    def press(self, request: gr.Request) -> tuple[str, str]:
        """A visitor asks for pictures: ends what is drawn for this visitor, and begins to wait.

        Returns the status and the name of the ticket, which the browser sends with the form.
        """
        self.halt(request)
        ticket = self.tickets[str(request.session_hash)] = Ticket(uuid.uuid4().hex, threading.Event())
        return said("waiting for the drawings of others"), ticket.name

    def halt(self, request: gr.Request) -> None:
        """Stops what is drawn for a visitor."""
        if ticket := self.tickets.get(str(request.session_hash)):
            ticket.stop.set()

    def close(self) -> None:
        """Stops all that is drawn."""
        for ticket in self.tickets.values():
            ticket.stop.set()

    def leave(self, request: gr.Request) -> None:
        """A visitor closed the window."""
        self.halt(request)
        self.tickets.pop(str(request.session_hash), None)

    def draw(self, request: gr.Request, name: str, other: str, *values: Any) -> Iterator[dict[Any, Any]]:
        """Draws what the form says; yields what changes on the page. Nothing, if the button was pressed again since."""
        ticket, form = self.tickets.get(str(request.session_hash)), Form(*values)
        if ticket is None or ticket.name != name:
            return
        try:
            commands = [form.argv(self.out / "inputs")]
            if other != NONE:
                commands.append(self.other(form, other).argv(self.out / "inputs"))
        except ValueError as error:
            yield {self.status: said(str(error), wrong=True)}
            return
        yield {self.line: "\n".join(map(command, commands))}
        done: list[Picture] = []
        for event in Job(commands, self.shelf.load, self.out, self.device, ticket.stop).events():
            if isinstance(event, Picture):
                done.append(event)
            yield self.shown(event, done)

    def other(self, form: Form, model: str) -> Form:
        """The form of a second model, with its own sampler, steps and guidance and the same noise."""
        return form._replace(
            model=model, steps="", guidance="", sampler="", spacing="", shift="", guide_from="",
            guide_to="", guider="", rescale="", negative="", lora="", control="", hint=None,
        )  # fmt: skip

    def shown(self, event: Event, done: list[Picture]) -> dict[Any, Any]:
        """What an event changes on the page."""
        if isinstance(event, Progress):
            changes: dict[Any, Any] = {self.status: step(event)}
            return changes | ({self.gallery: gallery(event.forming)} if event.forming else {})
        files = [str(file) for picture in done for file in picture.drawn.pictures]
        if isinstance(event, Ended):
            count = f"{len(files)} picture{'s' * (len(files) != 1)} in {self.out}"
            text = said(event.error, True, event.warnings) if event.error else said(count, notes=event.warnings)
            return {self.status: text} | ({self.history: self.recent()} if files else {})
        return {self.gallery: gallery(files), self.walk: walked(done)}

    def choose(self, model: str) -> dict[Any, Any]:
        """A model was chosen: loads it and shows its own settings."""
        try:
            options = LoadOptions(device=self.device)
            pipe = WORKER.submit(self.shelf.load, find_model(Path(model)), options).result()
        except (ValueError, OSError) as error:
            return {self.status: said(f"{model} cannot be loaded: {error}", wrong=True)}
        own = pipe.sampling
        height, width = (side * pipe.codec.factor for side in pipe.latent_size(None, None))
        weights = sum(weight.numel() for weight in pipe.network.parameters())
        text = f"{model}: {weights:,} weights, pictures of {height}×{width} pixels, {own.steps} steps of {own.sampler}"
        values = {"steps": own.steps, "guidance": own.guidance, "sampler": own.sampler, "spacing": own.spacing}
        return {self.status: said(text)} | {self.fields[name]: value for name, value in values.items()}

    def recent(self) -> list[str]:
        """The files of the last pictures, the newest first."""
        try:
            files = [self.out / entry["file"] for entry in reversed(entries_in(self.out))]
        except (ValueError, OSError):
            return []
        return [str(file) for file in files[:HISTORY] if file.is_file()]

    def offered(self, folder: str) -> str:
        """The model of the page that lies in a folder. ValueError if none does."""
        for name in self.models:
            with suppress(ValueError, OSError):
                if str(find_model(Path(name))) == folder:
                    return name
        raise ValueError(f"{folder} is no model of this page: start it with --model {folder}")

    def go_back(self, chosen: gr.SelectData) -> dict[Any, Any]:
        """Shows a picture of the history, and sets the form to what drew it."""
        file = self.out / Path(chosen.value["image"]["path"]).name
        try:
            flags = recorded(file)
            form = Form.recorded(flags | {"model": self.offered(str(flags.get("model")))})
            if float(form.steps or 1) > STEPS or float(form.guidance or 1) > GUIDANCE:
                raise ValueError(f"{file.name} has more steps or guidance than the page has: sample.py --like draws it")
        except (ValueError, OSError) as error:
            return {self.status: said(str(error), wrong=True)}
        left = sorted(flags.keys() - ({*Form._fields, "interval", "dtype"} - {"control"}))
        left += ["a second LoRA"] * (len(flags.get("lora", ())) > 1)
        note = f"; it also had {', '.join(left)}, which you have to give again" if left else ""
        fields = form._asdict()
        return {self.fields[name]: value for name, value in fields.items()} | {
            self.compare: NONE,
            self.gallery: gallery([str(file)]),
            self.line: command(["--like", str(file)]),
            self.status: said(f"the settings of {file.name}{note}"),
        }

    def pair(self, skipped: int) -> dict[Any, Any]:
        """The next two pictures to choose from, after those that were skipped."""
        try:
            pairs = open_pairs(self.out)
            found = pairs[skipped % len(pairs)] if pairs else None
            sides = [large(self.out / file) for file in found[1:]] if found else ["", ""]
        except (ValueError, OSError) as error:
            return {self.caption: said(str(error), wrong=True), self.shown_pair: None} | dict.fromkeys(self.sides, "")
        caption = found.caption if found else "draw two pictures or more of a prompt, then choose here"
        return {self.caption: said(caption), self.shown_pair: found, **dict(zip(self.sides, sides, strict=True))}

    def prefer(self, pair: Pair | None, side: int, skipped: int) -> dict[Any, Any]:
        """Keeps a choice between two pictures, and shows the next ones."""
        if pair is None:
            return self.pair(0)
        caption, *files = pair
        try:
            count = choose(self.out, caption, files[side], files[1 - side])
        except (ValueError, OSError) as error:
            return self.pair(skipped) | {self.choices: said(str(error), wrong=True)}
        text = said(f"{count} choice{'s' * (count != 1)} in {self.out / FILE}")
        return self.pair(skipped) | {self.choices: text}

    def trainings(self) -> list[str]:
        """The runs that have a log."""
        return [str(log.parent) for log in sorted(self.runs.glob("*/log.jsonl"))]

    def follow(self, runs: list[str]) -> str:
        """The page of trainings, in a frame."""
        if not runs:
            return said("choose a training" if self.trainings() else f"there is no training in {self.runs}")
        try:
            content = training_page([read_run(Path(run)) for run in runs])
        except (ValueError, OSError) as error:
            return said(str(error), wrong=True)
        return (
            f'<iframe title="training" sandbox="allow-scripts" srcdoc="{escape(content)}" '
            'style="width: 100%; height: 80vh; border: 0"></iframe>'
        )

    # What is on it.

    def build(self) -> gr.Blocks:
        """The page for Gradio to serve."""
        with gr.Blocks(title="mmdit", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
            with gr.Tab("Draw"), gr.Row():
                with gr.Column(scale=2):
                    self._fields()
                with gr.Column(scale=3):
                    self.status = gr.HTML(said("choose a model, describe a picture, press Draw"))
                    self.gallery = gr.Gallery(
                        label="Pictures", elem_id="pictures", height=360, columns=4, object_fit="contain"
                    )
                    self.line = gr.Code(
                        label="As a command",
                        elem_id="line",
                        language="shell",
                        interactive=False,
                        lines=1,
                        wrap_lines=True,
                    )
                    with gr.Accordion("The walk of the first picture", open=True):
                        self.walk = gr.HTML(elem_id="walk")
                    self.history = gr.Gallery(
                        self.recent, label="History: choose a picture to go back to its settings", elem_id="history",
                        columns=8, height=220, allow_preview=False, object_fit="contain", interactive=False,
                    )  # fmt: skip
            with gr.Tab("Choose"):
                self._choices(page)
            with gr.Tab("Training"):
                runs = gr.Dropdown(self.trainings(), multiselect=True, label="Trainings", value=[])
                figures = gr.HTML(lambda: self.follow([]))
                timer = gr.Timer(REFRESH)
            self._events(page)
            gr.on(
                [runs.change, timer.tick], self.follow, runs, figures, show_progress="hidden", api_visibility="private"
            )
            page.load(lambda: gr.Dropdown(self.trainings()), None, runs, api_visibility="private")
        return page

    def _fields(self) -> None:
        """The fields of the form; `fields` has them by the names of `Form`."""
        model = gr.Dropdown(self.models, value=self.models[0], label="Model")
        prompt = gr.Textbox(label="Prompt", lines=2, placeholder="a large red circle")
        with gr.Row():
            self.go = gr.Button("Draw", variant="primary", elem_id="draw")
            self.stop = gr.Button("Stop", elem_id="stop")
        with gr.Row():
            steps = gr.Slider(1, STEPS, 20, step=1, label="Steps")
            guidance = gr.Slider(0, GUIDANCE, 3, step=0.1, label="Guidance")
        with gr.Row():
            seed = gr.Textbox("0", label="Seed")
            images = gr.Slider(1, 64, 4, step=1, label="Pictures")
        self.compare = gr.Dropdown(
            [NONE, *self.models], value=NONE, label="Compare with", elem_id="compare",
            info="a second model, with its own steps and guidance, from the same noise",
        )  # fmt: skip
        negative = gr.Textbox(label="Negative prompt", info="guidance moves away from it")
        with gr.Accordion("Sampler and times", open=False):
            sampler = gr.Dropdown(
                [*SAMPLERS, "ddim:eta=1"], label="Sampler", allow_custom_value=True,
                info="with options after a colon, as in ddim:eta=1",
            )  # fmt: skip
            spacing = gr.Dropdown(
                [*GRIDS],
                label="Time grid",
                allow_custom_value=True,
                info="such as karras:rho=5",
            )
            shift = gr.Textbox(label="Shift", info="empty: the model's")
            with gr.Row():
                guide_from = gr.Textbox(label="Guidance from t", info="empty: 0, the picture")
                guide_to = gr.Textbox(label="Guidance to t", info="empty: 1, the noise")
            guider = gr.Dropdown(
                [*GUIDERS],
                value="",
                label="Guider",
                allow_custom_value=True,
                info="such as apg:threshold=5; empty: the model's",
            )
            rescale = gr.Textbox(label="Guidance rescale", info="0 to 1")
            with gr.Row():
                height = gr.Textbox(label="Height", info="pixels; empty: the model's")
                width = gr.Textbox(label="Width", info="pixels; empty: the model's")
        with gr.Accordion("Start from a picture", open=False):
            painted = gr.ImageEditor(
                label="Picture; paint over what is to be drawn anew", type="pil", format="png",
                brush=gr.Brush(colors=["#ffffff"], color_mode="fixed"), transforms=(), sources=("upload", "clipboard"),
            )  # fmt: skip
            strength = gr.Textbox(label="Strength", info="share of the steps that change it; empty: 0.6, if painted 1")
        with gr.Accordion("LoRA and ControlNet", open=False):
            lora = gr.Textbox(label="LoRA", info="a file or a folder")
            lora_strength = gr.Textbox(label="LoRA strength", info="empty: 1")
            control = gr.Textbox(label="ControlNet", info="a folder")
            hint = gr.Image(label="Picture that it follows", type="pil", sources=["upload", "clipboard"])
            control_scale = gr.Textbox(label="ControlNet scale", info="empty: 1")
        found = (
            model, prompt, negative, steps, guidance, seed, images, sampler, spacing, shift, guide_from, guide_to,
            guider, rescale, height, width, painted, strength, lora, lora_strength, control, hint, control_scale,
        )  # fmt: skip
        self.fields: dict[str, gr.components.Component] = dict(zip(Form._fields, found, strict=True))
        for name, field in self.fields.items():
            field.elem_id = name

    def _choices(self, page: gr.Blocks) -> None:
        """Two pictures of a prompt, and a button for each."""
        hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        self.caption, self.shown_pair, skipped = gr.HTML(elem_id="caption"), gr.State(), gr.State(0)
        with gr.Row():
            self.sides = [gr.HTML(), gr.HTML()]
        with gr.Row():
            buttons = [gr.Button(text, variant="primary") for text in ("This one is better", "The other is better")]
            skip = gr.Button("Skip")
        self.choices = gr.HTML(elem_id="choices")
        changed = [self.caption, self.shown_pair, *self.sides]
        for side, button in enumerate(buttons):
            prefer = partial(self.prefer, side=side)
            button.click(
                lambda pair, skipped, prefer=prefer: prefer(pair, skipped=skipped),
                [self.shown_pair, skipped], [*changed, self.choices], **hidden,
            )  # fmt: skip
        skip.click(lambda number: number + 1, skipped, skipped, **hidden).then(self.pair, skipped, changed, **hidden)
        gr.on([page.load, self.history.change], self.pair, skipped, changed, **hidden)

    def _events(self, page: gr.Blocks) -> None:
        """Which button does what."""
        form = list(self.fields.values())
        hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        changed = [self.status, self.gallery, self.line, self.walk, self.history]
        prompt, model = self.fields["prompt"], self.fields["model"]
        assert isinstance(prompt, gr.Textbox)
        assert isinstance(model, gr.Dropdown)
        ticket, often = gr.Textbox(visible=False), {"trigger_mode": "multiple"} | hidden
        pressed = gr.on([self.go.click, prompt.submit], self.press, None, [self.status, ticket], queue=False, **often)
        drawn = pressed.then(
            self.draw, [ticket, self.compare, *form], changed, concurrency_limit=1, concurrency_id="draw", **often
        )
        failed = said("that was not possible: more stands in the terminal", wrong=True)
        drawn.failure(lambda: failed, None, self.status, **hidden)
        self.stop.click(self.halt, None, None, queue=False, **hidden)
        own = [self.status, *(self.fields[name] for name in ("steps", "guidance", "sampler", "spacing"))]
        gr.on([model.input, page.load], self.choose, model, own, **hidden)
        self.history.select(self.go_back, None, [*form, self.compare, self.gallery, self.line, self.status], **hidden)
        page.unload(self.leave)


def launch(page: Page, host: str, port: int) -> gr.Blocks:
    """Serves the page in threads of their own. The result's `close` ends it."""
    blocks = page.build()
    blocks.queue(max_size=32).launch(
        server_name=host, server_port=port, share=False, ssr_mode=False, show_error=True,
        allowed_paths=[str(page.out.resolve())], theme=THEME, css=CSS, quiet=True, prevent_thread_lock=True,
    )  # fmt: skip
    return blocks
