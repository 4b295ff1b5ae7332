"""Exports a model for other tools: a diffusers folder, or a single file like the released ones, with a model card."""

import re
from pathlib import Path
from typing import Any

import yaml

from data.latents import PREFIX as VAE_PREFIX
from mmdit import checkpoint, control
from mmdit.checkpoint import PREFIX
from pipeline import Pipeline
from pipeline.folder import opens_in_diffusers, single_file, write
from pipeline.networks import parts_of
from storage.files import replace_folder
from storage.text import parse_json, read_json, read_text, read_yaml, split_lines
from storage.weights import write_tensors

DIFFUSERS = """```python
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained("{place}")
image = pipe("{prompt}", num_inference_steps={steps}, guidance_scale={guidance}).images[0]
```"""
TRANSFORMER = """```python
from diffusers import SD3Transformer2DModel

network = SD3Transformer2DModel.from_pretrained("{place}", subfolder="transformer")
```"""
FILE = """The tensors of `{place}.safetensors` have the names of the released single files. It holds no tokenizers:
give `--parts` a diffusers folder that holds them.

```sh
python sample.py --model {place}/{place}.safetensors --parts FOLDER --prompt "{prompt}"
```"""
FOLDER = """```sh
python sample.py --model {place} --prompt "{prompt}"{picture}
```"""


TAGS = "tags: [text-to-image, rectified-flow, mmdit]"  # a line of every model card
PART = re.compile(  # what an export holds
    r"README\.md|.+\.safetensors|(model_index|checksums)\.json|transformer|controlnet|unet|vae|scheduler|"
    r"regressor|image_encoder|(text_encoder|tokenizer)(_[23])?"
)


def check_place(out: Path, model: Path, overwrite: bool) -> None:
    """Checks that an export can be written to a folder, before any work.

    Args:
        out: the folder.
        model: the model that is exported.
        overwrite: another export may be replaced.

    Raises:
        ValueError: there is something that may not be replaced.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    readme = out / "README.md"
    if not readme.is_file() or TAGS not in split_lines(read_text(readme)):
        raise ValueError(f"{out} exists and is no export: choose another --out")
    if model.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{out} holds the model that is exported: choose another --out")
    if others := [path.name for path in out.iterdir() if not PART.fullmatch(path.name)]:
        raise ValueError(f"{out} also holds {others[0]}, which is no part of an export: choose another --out")
    if not overwrite:
        raise ValueError(f"{out} exists already: choose another --out, or replace it with --overwrite")


def as_folder(pipe: Pipeline, out: Path, run: Path, name: str) -> str:
    """Writes a folder in diffusers' layout with its model card. Returns a line that says which program opens it.

    Raises:
        OSError: the folder cannot be written; no part of it is left behind.
    """
    whole = opens_in_diffusers(pipe.parts)
    stored = parts_of(pipe.network)
    library, kind = next(iter(stored.values())).entry
    transformer = TRANSFORMER if kind == checkpoint.DIFFUSERS_CLASS else ""
    plain = whole and control.FOLDER not in stored
    usage = "\n\n".join(filter(None, (FOLDER, DIFFUSERS if plain else transformer)))
    write(pipe.parts, out, {"README.md": card(pipe, run, name, usage)})
    if whole:
        return f"opens in diffusers' {'StableDiffusion3Pipeline' if plain else 'StableDiffusion3ControlNetPipeline'}"
    if library != "diffusers":
        return f"is for sample.py: diffusers has no {kind} of this kind"
    what = f"the {'transformer' if transformer else 'network'} opens in diffusers' {kind}"
    return f"{what}; the whole is for sample.py, since codec, text or process are not those of Stable Diffusion 3"


def as_file(pipe: Pipeline, out: Path, run: Path, name: str) -> str:
    """Writes a folder with a single file and its model card. Returns a line that says what the file holds.

    Raises:
        ValueError: the single-file format cannot describe the network or the VAE.
        OSError: the folder cannot be written; no part of it is left behind.
    """
    tensors = single_file(pipe.parts)
    readme = card(pipe, run, name, FILE)

    def fill(new: Path) -> None:
        write_tensors(tensors, new / f"{name}.safetensors")
        (new / "README.md").write_text(readme, encoding="utf-8")

    replace_folder(out, fill)
    kinds = {PREFIX: "the network", VAE_PREFIX: "the VAE", "text_encoders.": "text encoders"}
    held = [kind for prefix, kind in kinds.items() if any(name.startswith(prefix) for name in tensors)]
    return f"holds {' and '.join(held)}"


def card(pipe: Pipeline, run: Path, name: str, usage: str) -> str:
    """The model card in Markdown: what the model is, how to use it, its data, its training and its measured quality.

    Args:
        pipe: the model.
        run: the folder of its training; the card reports `config.yaml`, `log.jsonl` and `evaluation/results.json` if
            they exist.
        name: the name of the model.
        usage: how to use it, with the fields {place}, {prompt}, {steps}, {guidance} and {picture}.
    """
    network, s = pipe.network, pipe.sampling
    count = sum(p.numel() for p in network.parameters())
    kind = type(network).__name__
    if network.depth:
        kind += f", {network.depth} blocks of width {network.width}"
    side = network.sample_size * pipe.codec.factor
    config = _config(run)
    prompt = next(iter(config.get("grid", {}).get("prompts", ())), "a picture")
    lines = [
        "---",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        TAGS,
        "---",
        "",
        f"# {name}",
        "",
        f"A text-to-image model: {kind}, {count:,} parameters, for pictures of {side}×{side} pixels.",
        f"It learned {type(pipe.objective.target).__name__} on the path {type(pipe.objective.path).__name__}, with a "
        f"resolution shift of {pipe.shift():g} at this size, and is sampled by {s.sampler} in {s.steps} steps "
        f"({s.spacing} spacing, guidance {s.guidance:g}) by default.",
        "",
        "## Use",
        "",
        usage.format(
            place=name,
            prompt=prompt,
            steps=s.steps,
            guidance=s.guidance,
            picture=" --picture PICTURE" if network.picture_channels or pipe.image_encoder else "",
        ),
        "",
        *_data(config),
        *_results(run),
        *_training(config),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _config(run: Path) -> dict[str, Any]:
    file = run / "config.yaml"
    content = read_yaml(file) if file.is_file() else None
    return content if isinstance(content, dict) else {}


def _data(config: dict[str, Any]) -> list[str]:
    if "data" not in config:
        return []
    arguments = dict(config["data"]["init_args"])
    stores = []
    if "store" in arguments:
        given = arguments["store"]
        several = [given] if isinstance(given, str) else given
        parts: list[dict[str, Any]] = [
            {"store": part} if isinstance(part, str) else part.get("init_args", part) for part in several
        ]
        stores = [Path(part["store"]) for part in parts]
        times = (
            f" × {part['repeats']}" if (part.get("repeats") or 1) > 1
            else f" (weight {part['weight']:g})" if part.get("weight") is not None else ""
            for part in parts
        )  # fmt: skip
        arguments["store"] = " and ".join(f"{path}{count}" for path, count in zip(stores, times, strict=True))
    settings = ", ".join(f"{key} {value}" for key, value in arguments.items() if value not in (None, [], False))
    if config["data"]["class_path"].endswith("Digits"):
        source = (
            "The handwritten digits of the UCI Machine Learning Repository (E. Alpaydin and C. Kaynak), as shipped "
            "with scikit-learn, with captions"
        )
    else:
        plans = [file for store in stores if (file := store / "store.json").is_file()]
        described = [read_json(file)["source"] for file in plans]
        names = ", ".join(str(one[key]) for one in described for key in ("kind", "path", "count") if key in one)
        source = f"Pictures and captions ({names})" if names else "Pictures and captions"
    return ["## Data", "", f"{source}; {settings}.", ""]


def _results(run: Path) -> list[str]:
    lines: list[str] = []
    log = run / "log.jsonl"
    if log.is_file():
        entries = [parse_json(line, log) for line in split_lines(read_text(log)) if line.strip()]
        losses = [(entry["val/loss"], int(entry["step"])) for entry in entries if entry.get("val/loss") is not None]
        if losses:
            loss, step = min(losses)
            lines += [
                f"Best validation loss, on held-out samples at eight fixed times: {loss:.4f}, at step {step:,}.",
                "",
            ]
    file = run / "evaluation" / "results.json"
    if file.is_file():
        record = read_json(file)
        columns = [
            c for c in ("sampler", "steps", "evaluations", "accuracy", "distance_ratio") if c in record["rows"][0]
        ]
        lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        for row in record["rows"]:
            values = (f"{row[c]:.4g}" if isinstance(row[c], float) else str(row[c]) for c in columns)
            lines.append("| " + " | ".join(values) + " |")
        lines.append("")
    return ["## Measured", "", *lines] if lines else []


def _training(config: dict[str, Any]) -> list[str]:
    if not config:
        return []
    return [
        "## Training",
        "",
        "```yaml",
        yaml.safe_dump(config, sort_keys=False, allow_unicode=True).rstrip(),
        "```",
        "",
    ]


def upload(folder: Path, repository: str) -> str:
    """Uploads a folder to the Hugging Face hub and returns its address. A new repository is private.

    Raises:
        OSError: in one line, if the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True, private=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # the hub's errors and those of its HTTP client have no common base class
        cause = str(error).strip().partition("\n")[0]
        raise OSError(f"could not upload to {repository}: {cause}; the export is in {folder}") from None
    return f"https://huggingface.co/{repository}"
