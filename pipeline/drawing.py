"""Pictures from files into the pipeline, and from the pipeline into files."""

import json
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data.drawn import png_notes
from data.prompts import file_stem
from data.raw.pictures import load_masked, load_picture, save_png, sheet, to_image
from flow.sampler import Callback
from pipeline import Pipeline
from pipeline.cascade import Upscaler, enlarge
from pipeline.prior import draw
from storage.files import BusyError, commit_bytes, commit_path, hold, stage
from storage.text import parse_json, read_text

SHOWN = 256  # longest side of a picture on the sheet
ENCODED = 128  # prompts that are encoded at once
PATIENCE = 60.0  # seconds in which another process that writes to the same folder should be done
STRENGTH = 0.6  # default share of the steps that change an image; with a mask it is 1


def read_image(
    pipe: Pipeline, image: Path, mask: Path | None, strength: float | None, height: int | None, width: int | None
) -> dict[str, Any]:
    """The arguments `image`, `strength` and `mask` of `Pipeline`, with pictures read from files.

    Args:
        pipe: the model.
        image: a picture to start from.
        mask: a picture of the image's shape that is white, or else transparent, where the image is drawn anew.
        strength: share of the steps that change the image. None means 0.6, or 1 with a mask.
        height: in pixels; None keeps the height of the file, rounded to a size that the model can draw.
        width: the same for the width.

    Raises:
        ValueError: a file cannot be read, or mask and image differ in shape.
        FileNotFoundError: there is no such file.
    """
    unit = pipe.network.unit * pipe.codec.factor
    channels = pipe.codec.pixel_channels
    if mask is None:
        start = load_picture(image, channels, height, width, unit)
        return {"image": start, "strength": STRENGTH if strength is None else strength}
    start, redrawn = load_masked(image, mask, channels, height, width, unit)
    if redrawn.min() == redrawn.max():
        all_of_it, kept = ("everything", "nothing") if redrawn.max() else ("nothing", "all")
        warnings.warn(f"the mask {mask} selects {all_of_it}: {kept} of {image} is kept", stacklevel=2)
    return {"image": start, "strength": 1.0 if strength is None else strength, "mask": redrawn}


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Holds a folder in which others may write, too; waits for them. BusyError if one of them takes a minute."""
    end = time.monotonic() + PATIENCE
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(hold(out))
                break
            except BusyError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)
        yield


def entries_in(out: Path) -> list[dict[str, Any]]:
    """What samples.json says of the pictures in a folder. ValueError if it is no list of them."""
    file = out / "samples.json"
    found = parse_json(read_text(file), file) if file.exists() else []
    texts = ("file", "prompt")
    if not isinstance(found, list) or not all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in texts) for entry in found
    ):
        raise ValueError(f"{file} is no list of samples: move it away, or choose another --out")
    return found


def free(out: Path, stem: str) -> Path:
    """The first of STEM.png, STEM-2.png, STEM-3.png, … that does not exist."""
    names = (f"{stem}{'' if number == 1 else f'-{number}'}.png" for number in count(1))
    return next(out / name for name in names if not (out / name).exists())


class Drawing(NamedTuple):
    """All that is known of pictures before they are drawn."""

    pipe: Pipeline
    prompts: Sequence[str]
    seeds: Sequence[int]  # one for each prompt
    arguments: dict[str, Any]  # the others of `Pipeline.__call__`, among them `negative` and `sampling`
    times: Tensor  # of the sampler, (steps + 1,)
    batch_size: int  # pictures at a time
    columns: int  # pictures in a row of the sheet
    notes: dict[str, Any]  # what is recorded of each picture besides file, prompt, seed and size: see `png_notes`
    cascade: Sequence[Upscaler] = ()  # models that enlarge the pictures
    prior: Pipeline | None = None  # draws an image embedding for each prompt


class Drawn(NamedTuple):
    """The files of a drawing."""

    pictures: list[Path]
    sheet: Path


def draw_files(drawing: Drawing, out: Path, callback: Callback | None = None) -> Drawn:
    """Draws one picture for each prompt and writes it as a PNG, and all of them as a sheet.

    The settings stand in the PNG and in samples.json. No file is replaced: samples.json grows, and the names of
    further pictures and sheets are numbered.

    Args:
        drawing: what is drawn.
        out: a folder.
        callback: as of `Pipeline.__call__`, for each batch.

    Raises:
        ValueError: the network overflows, or the folder holds another samples.json.
        BusyError: another process holds the folder for a minute.
        OSError: a file cannot be written.
    """
    pipe, prompts, seeds, arguments, times, batch_size, columns, notes, cascade, prior = drawing
    steps = len(times) - 1 + sum(upscaler.pipe.sampling.steps for upscaler in cascade)
    parts = [slice(i, i + batch_size) for i in range(0, len(prompts), batch_size)]
    pictures, files = [], []
    with tqdm(total=len(parts) * steps, desc="sampling", unit="step", leave=False) as bar:

        def on_step(done: int, z: Tensor, x0: Tensor) -> None:
            bar.update(1 if done else 0)
            if callback:
                callback(done, z, x0)

        encoded = 0  # many prompts are encoded at once, because the text encoders may be read from disk each time
        for part in parts:
            if part.stop > encoded:
                bar.set_description("encoding prompts")
                encoded = max(part.stop, part.start + ENCODED)
                pipe.text.encode(list(dict.fromkeys([arguments["negative"], *prompts[part.start : encoded]])))
                bar.set_description("sampling")
            embedding = draw(prior, prompts[part], seeds[part]) if prior else None
            first = pipe(prompts[part], seeds[part], **arguments, embedding=embedding, callback=on_step)
            batch = enlarge(first, cascade, prompts[part], seeds[part], on_step)
            side = max(batch.shape[-2:])
            pictures.append(F.interpolate(batch, scale_factor=SHOWN / side, mode="area") if side > SHOWN else batch)
            with writing(out), stage(out) as new:
                entries = entries_in(out)
                for prompt, seed, picture in zip(prompts[part], seeds[part], batch, strict=True):
                    file = free(out, f"{file_stem(prompt)}_{seed}")
                    shape = {"height": first.shape[-2], "width": first.shape[-1]}
                    entry = {"file": file.name, "prompt": prompt, "seed": seed, **notes, **shape}
                    save_png(to_image(picture), new / file.name, png_notes(entry))
                    (new / file.name).rename(file)
                    entries.append(entry)
                    files.append(file)
                text = json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
                commit_bytes(out / "samples.json", text.encode())
    with writing(out):
        file = free(out, "sheet")
        commit_path(file, lambda part: save_png(sheet(torch.cat(pictures), columns), part))
    return Drawn(files, file)
