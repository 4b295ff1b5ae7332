"""Pictures from files into the pipeline, and from the pipeline into files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data.prompts import file_stem
from data.raw.pictures import load_picture, save_png, sheet, to_image
from pipeline import Pipeline

SHOWN = 256  # longest side of a picture on the sheet
ENCODED = 128  # prompts that are encoded at once
STRENGTH = 0.6  # default share of the steps that change an image; with a mask it is 1


def read_image(
    pipe: Pipeline, image: Path, mask: Path | None, strength: float | None, height: int | None, width: int | None
) -> dict[str, Any]:
    """The arguments `image`, `strength` and `mask` of `Pipeline`, with pictures read from files.

    Args:
        pipe: the model.
        image: a picture to start from.
        mask: a picture that is white where the image is drawn anew.
        strength: share of the steps that change the image. None means 0.6, or 1 with a mask.
        height: in pixels; None keeps the height of the file, rounded to a size that the model can draw.
        width: the same for the width.

    Raises:
        ValueError: a file cannot be read, or mask and image differ in size.
        FileNotFoundError: there is no such file.
    """
    unit = pipe.network.unit * pipe.codec.factor
    start = load_picture(image, pipe.codec.pixel_channels, height, width, unit)
    if mask is None:
        return {"image": start, "strength": STRENGTH if strength is None else strength}
    redrawn = (load_picture(mask, 1, height, width, unit) >= 0.5).float()
    if redrawn.shape[-2:] != start.shape[-2:]:
        sizes = (f"{tensor.shape[-1]}×{tensor.shape[-2]}" for tensor in (redrawn, start))
        raise ValueError("mask and image must have the same size, got {} and {}".format(*sizes))
    return {"image": start, "strength": 1.0 if strength is None else strength, "mask": redrawn}


def draw_files(
    pipe: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    arguments: dict[str, Any],
    steps: int,
    batch_size: int,
    columns: int,
    notes: dict[str, Any],
    out: Path,
) -> None:
    """Draws one picture for each prompt and writes it as a PNG, with samples.json and sheet.png beside.

    Args:
        pipe: the model.
        prompts: N texts.
        seeds: N seeds.
        arguments: the other arguments of `Pipeline.__call__`, among them `negative` and `sampling`.
        steps: steps of one picture, for the progress bar.
        batch_size: pictures at a time.
        columns: pictures in a row of the sheet.
        notes: what samples.json records of each picture besides file, prompt, seed and size.
        out: an existing folder.

    Raises:
        ValueError: the network overflows.
        OSError: a file cannot be written.
    """
    parts = [slice(i, i + batch_size) for i in range(0, len(prompts), batch_size)]
    pictures, entries = [], []
    with tqdm(total=len(parts) * steps, desc="sampling", unit="step", leave=False) as bar:

        def on_step(done: int, z: Tensor, x0: Tensor) -> None:
            bar.update(1 if done else 0)

        encoded = 0  # many prompts are encoded at once, because the text encoders may be read from disk each time
        for part in parts:
            if part.stop > encoded:
                bar.set_description("encoding prompts")
                encoded = max(part.stop, part.start + ENCODED)
                pipe.text.encode(list(dict.fromkeys([arguments["negative"], *prompts[part.start : encoded]])))
                bar.set_description("sampling")
            batch = pipe(prompts[part], seeds[part], **arguments, callback=on_step)
            side = max(batch.shape[-2:])
            pictures.append(F.interpolate(batch, scale_factor=SHOWN / side, mode="area") if side > SHOWN else batch)
            for prompt, seed, picture in zip(prompts[part], seeds[part], batch, strict=True):
                file = f"{file_stem(prompt)}_{seed}.png"
                save_png(to_image(picture), out / file)
                shape = {"height": picture.shape[-2], "width": picture.shape[-1]}
                entries.append({"file": file, "prompt": prompt, "seed": seed, **notes, **shape})
            text = json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
            (out / "samples.json").write_text(text, encoding="utf-8")
    save_png(sheet(torch.cat(pictures), columns), out / "sheet.png")
