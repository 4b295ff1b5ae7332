"""A drawing in the thread of the models, which shows the pictures while they form and can be stopped."""

import queue
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from cli import memory_is_full
from data.raw.pictures import to_image
from pipeline import LoadOptions, Pipeline
from pipeline.command import plan
from pipeline.drawing import Drawing, Drawn, draw_files, entries_in
from web.form import parsed
from web.walk import Walk

SHARE = 0.05  # of the time of the steps may be spent on showing pictures while they form
APART = 0.2  # seconds between two of them, at least
FORMING = 16  # pictures shown while they form, at most
# All that models compute happens in one thread: on a CPU every thread has an OpenMP pool of its own, and a second pool
# in the process, even an idle one, slows small networks.
WORKER = ThreadPoolExecutor(1, "models")


class Stopped(Exception):
    """The user stopped the drawing."""


class Progress(NamedTuple):
    """A step was done, or a model is loaded."""

    text: str
    done: int
    total: int
    forming: list[Image.Image]  # the pictures that the model expects at this step; empty if it shows none


class Picture(NamedTuple):
    """One command is done."""

    drawn: Drawn
    walk: Walk
    film: Image.Image  # of the walk
    seconds: float  # for the steps and the files, without loading


@dataclass
class Ended:
    """All is done, or nothing more will be: an error or a stop."""

    error: str | None
    warnings: list[str]


Event = Progress | Picture | Ended


class Preview:
    """Says when a picture may be shown while it forms, so that showing costs a small share of the time."""

    def __init__(self) -> None:
        self.begun = self.last = time.perf_counter()
        self.spent = self.cost = 0.0

    def due(self) -> bool:
        now = time.perf_counter()
        return now - self.last >= APART and self.spent + self.cost <= SHARE * (now - self.begun)

    def show(self, pipe: Pipeline, x0: Tensor) -> list[Image.Image]:
        """The pictures of estimated latents."""
        start = time.perf_counter()
        images = [to_image(picture) for picture in pipe.codec.decode(x0[:FORMING]).cpu()]
        self.last = time.perf_counter()
        self.cost = self.last - start
        self.spent += self.cost
        return images


class Job:
    """Draws the pictures of one or two commands, one after the other.

    Args:
        commands: flags of `sample.py`, each for another model.
        load: loads a model.
        out: folder of the pictures.
        device: where it draws; none is the best there is.
        stop: set by the page to end the job.
    """

    def __init__(
        self,
        commands: list[list[str]],
        load: Callable[[Path, LoadOptions], Pipeline],
        out: Path,
        device: str | None,
        stop: threading.Event,
    ) -> None:
        self.commands, self.load, self.out, self.device, self.stop = commands, load, out, device, stop
        self.queue: queue.Queue[Event] = queue.Queue()

    def events(self) -> Iterator[Event]:
        """What happens, up to `Ended`. If the reader goes away, the job stops."""
        WORKER.submit(self._run)
        try:
            while True:
                event = self.queue.get()
                yield event
                if isinstance(event, Ended):
                    return
        finally:
            self.stop.set()

    def _run(self) -> None:
        ended = Ended("the drawing broke off (more stands in the terminal)", [])
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                error = self._attempt()
            own = [str(item.message) for item in caught if issubclass(item.category, UserWarning)]
            ended = Ended(error, list(dict.fromkeys(own)))
        finally:
            self.queue.put(ended)  # in any case, or the reader would wait for ever

    def _attempt(self) -> str | None:
        """Draws; returns what went wrong, in one line."""
        try:
            for argv in self.commands:
                self._draw(argv)
        except Stopped:
            return "stopped: nothing more was drawn"
        except (ValueError, OSError) as found:
            return " ".join(str(found).split())
        except Exception as found:  # full memory, or a fault of this program: the page lives on
            if memory_is_full(found):
                return "the device has not enough memory: fewer or smaller pictures need less"
            traceback.print_exc()
            return f"{type(found).__name__}: {found} (more stands in the terminal)"
        return None

    def _draw(self, argv: list[str]) -> None:
        self._check()
        args = parsed(argv, self.device)
        self.queue.put(Progress(f"loading {args.model}", 0, 1, []))
        entries_in(self.out)
        drawing = plan(args, self.load)
        walk, start = Walk(str(args.model), drawing.pipe, drawing.times), time.perf_counter()
        self.out.mkdir(parents=True, exist_ok=True)
        drawn = draw_files(drawing, self.out, self._shower(drawing, walk))
        seconds = time.perf_counter() - start
        self.queue.put(Picture(drawn, walk, walk.film(), seconds))

    def _shower(self, drawing: Drawing, walk: Walk) -> Callable[[int, Tensor, Tensor], None]:
        """A callback of the drawing: records the first walk, reports, and stops when it is asked to."""
        preview, batches = Preview(), -(-len(drawing.prompts) // drawing.batch_size)
        steps, batch = len(drawing.times) - 1, 0

        def on_step(done: int, z: Tensor, x0: Tensor) -> None:
            nonlocal batch
            self._check()
            batch += done == 0
            if batch == 1:
                walk.add(done, z, x0)
            forming = preview.show(drawing.pipe, x0) if done and preview.due() else []
            if forming or done in (0, steps):
                number = (batch - 1) * steps + done
                self.queue.put(Progress(f"step {number} of {batches * steps}", number, batches * steps, forming))

        return on_step

    def _check(self) -> None:
        if self.stop.is_set():
            raise Stopped
