"""The flags of `sample.py` as a drawing: all that is checked before the first step."""

import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cli import check_count, load_options_of, sampling_of
from data.latents import VAE
from data.prompts import read_prompts, weighted
from data.raw.pictures import load_picture
from mmdit.control import Controlled
from pipeline import LoadOptions, Pipeline, Refiner
from pipeline.cascade import stages, upscalers
from pipeline.drawing import Drawing, read_image
from pipeline.folder import INDEX, learned
from pipeline.gradients import pulled
from pipeline.prior import text_embeddings
from pipeline.sampling import Sampling
from pipeline.steering import Steering, autoguided, interval_of, steer
from storage.models import find_model
from storage.updates import Adapter

HANDOVER = 0.2  # SDXL's refiner learned the lowest 200 of 1,000 noise levels
RECORDED = ("parts", "text_dtype", "max_sequence_length", "image", "mask", "picture", "prior")  # if they are given
OPTIONAL = (  # recorded as they were given
    "lora", "embedding", "control", "control_interval", "autoguidance", "classifier", "clip_guidance",
    "gradient_interval", "upscale", "upscale_prompt", "upscale_steps",
)  # fmt: skip
PLAIN: dict[str, Any] = {"lora": (), "embedding": (), "parts": None}  # how a second model is loaded


def plan(args: Namespace, load: Callable[[Path, LoadOptions], Pipeline] = Pipeline.load) -> Drawing:
    """Loads the models of a command and checks all that needs no drawing.

    Args:
        args: the flags of `cli.add_drawing_flags`.
        load: loads the main model; a page keeps models.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotADirectoryError: in one line, what does not fit.
    """
    path = find_model(args.model)
    given_prompts = read_prompts(args.prompt, args.prompts)
    check_count("--num-images", len(given_prompts) * args.num_images)
    prompts = [prompt for prompt in given_prompts for _ in range(args.num_images)]
    asked = stages(args.upscale or (), args.upscale_prompt or (), args.upscale_steps or ())
    if found := weighted([*given_prompts, args.negative, *(args.upscale_prompt or ())]):
        warnings.warn(f"weights as in {found!r} are text like any other: no word is stressed", stacklevel=1)
    options = LoadOptions(**load_options_of(args))
    pipe = load(path, options)
    given = input_pictures(args, pipe)
    prior = prior_of(args, pipe)
    sampling = sampling_of(args, pipe.sampling, steps=args.steps)
    height, width = given["image"].shape[-2:] if "image" in given else (args.height, args.width)
    pipe.check_drawn("image" in given)
    warn_of_learned(args, path, sampling)
    pipe = autoguided(pipe, args.autoguidance, options)
    refiner = refiner_of(args)
    _, _, times = pipe.plan(sampling, args.shift, height, width, given.get("strength", 1.0))
    pipe, hints = steered(args, pipe, times, height, width)
    gradients = (args.classifier, args.clip_guidance, args.gradient_interval, given_prompts, height, width)
    pipe = pulled(pipe, *gradients)
    pipe.check_prompts(sampling, given_prompts)
    given |= hints
    if refiner:
        refiner = refiner._replace(pipe=pulled(refiner.pipe, *gradients))
        pipe.check_refiner(refiner, sampling, times, height, width)
    models = (pipe, refiner.pipe) if refiner else (pipe,)
    if args.negative and any(model.network.guidance_embeds for model in models):
        raise ValueError("--negative has no effect on a network that has learned its guidance: leave it out")
    if args.negative and sampling.guidance == 1:
        raise ValueError("--negative needs guidance, which is 1 (off): give another --guidance")
    first_height, first_width = (side * pipe.codec.factor for side in pipe.latent_size(height, width))
    plain = replace(options, **PLAIN)
    cascade = upscalers(asked, plain, pipe, (first_height, first_width), given_prompts)
    if args.vae_tiling or args.vae_slicing:
        codecs = [each.codec for each in (pipe, *(upscaler.pipe for upscaler in cascade))]
        if not (vaes := [codec for codec in codecs if isinstance(codec, VAE)]):
            raise ValueError("--vae-tiling and --vae-slicing need a model with a VAE: leave them out")
        for vae in vaes:
            vae.save_memory(args.vae_tiling, args.vae_slicing)
    notes: dict[str, Any] = {
        "negative": args.negative,
        **asdict(sampling),
        "shift": pipe.shift(height, width) if args.shift is None else args.shift,
        "dtype": str(next(pipe.network.parameters()).dtype).removeprefix("torch."),
        "model": str(path),
        **{name: found for name in OPTIONAL if (found := getattr(args, name))},
        **{name: str(value) for name in RECORDED if (value := getattr(args, name)) is not None},
        **{name: given[name] for name in ("strength", "level") if name in given},
        **({"refiner": str(args.refiner), "handover": refiner.handover} if refiner else {}),
    }
    given |= {
        "refiner": refiner,
        "negative": args.negative,
        "sampling": sampling,
        "shift": args.shift,
        "height": height,
        "width": width,
    }
    seeds = range(args.seed, args.seed + len(prompts))
    sizes = [pipe.batch_size(height, width), *(upscaler.pipe.batch_size() for upscaler in cascade)]
    batch_size = args.batch_size or min(sizes)
    columns = args.num_images if args.num_images > 1 else min(len(prompts), 10)
    return Drawing(pipe, prompts, seeds, given, times, batch_size, columns, notes, cascade, prior)


def input_pictures(args: Namespace, pipe: Pipeline) -> dict[str, Any]:
    """The arguments of `Pipeline` that come from picture files. ValueError or FileNotFoundError if they do not fit."""
    given: dict[str, Any] = {}
    if args.picture and not (pipe.network.picture_channels or pipe.image_encoder or args.control):
        raise ValueError("--picture is for a model that works from a picture, and this one does not: leave it out")
    if args.picture:
        size: tuple[int | None, int | None] = (None, None)
        if isinstance(pipe.network, Controlled):  # as --control and the data do it
            height, width = (side * pipe.codec.factor for side in pipe.latent_size(args.height, args.width))
            size = height, width
        elif pipe.image_encoder:  # as the data do it
            size = pipe.image_encoder.factor, pipe.image_encoder.factor
        channels = (pipe.image_encoder or pipe.codec).pixel_channels
        given = {"picture": load_picture(args.picture, channels, *size, 1)}
    if args.picture or args.prior:
        given["level"] = args.level
        if args.level and not pipe.network.level_embeds:
            raise ValueError("--level is for a network with level_embeds, and this one has none: leave it out")
    elif args.level:
        raise ValueError("--level needs a --picture or a --prior: give one, or leave --level out")
    elif pipe.network.picture_channels and not args.control:
        raise ValueError("this model works from a picture: give --picture")
    if args.image:
        return given | read_image(pipe, args.image, args.mask, args.strength, args.height, args.width)
    if args.mask or args.strength is not None:
        raise ValueError(f"{'--mask' if args.mask else '--strength'} needs an --image: give one, or leave it out")
    return given


def prior_of(args: Namespace, pipe: Pipeline) -> Pipeline | None:
    """The model of `--prior`. ValueError or FileNotFoundError if there is none, or it draws other embeddings."""
    if args.prior is None:
        return None
    if args.picture:
        raise ValueError("--prior draws the embedding, and --picture has one: leave one of them out")
    if not pipe.image_encoder:
        raise ValueError("--prior is for a model that takes image embeddings, and this one takes none: leave it out")
    prior = Pipeline.load(find_model(args.prior), replace(LoadOptions(**load_options_of(args)), **PLAIN))
    if prior.codec.fingerprint() != pipe.image_encoder.fingerprint():
        raise ValueError(f"{args.prior} does not draw the embeddings that {args.model} takes: give its own prior")
    text_embeddings(prior, [""])
    return prior


def refiner_of(args: Namespace) -> Refiner | None:
    """The model of `--refiner` with its handover. ValueError or FileNotFoundError if there is none."""
    if args.refiner is None:
        if args.handover is not None:
            raise ValueError("--handover needs a --refiner: give one, or leave it out")
        return None
    options = replace(LoadOptions(**load_options_of(args)), **PLAIN)
    return Refiner(
        Pipeline.load(find_model(args.refiner), options), HANDOVER if args.handover is None else args.handover
    )


def steered(
    args: Namespace, pipe: Pipeline, times: Tensor, height: int | None, width: int | None
) -> tuple[Pipeline, dict[str, Any]]:
    """The pipeline with the ControlNets of `--control`, and its argument `picture`. ValueError if they do not fit."""
    if not args.control:
        if args.control_interval:
            raise ValueError("--control-interval needs a --control: give one, or leave it out")
        return pipe, {}
    if args.picture and not pipe.network.picture_channels:
        raise ValueError("--picture is for a model that works from a picture, and --control has its own: leave one out")
    interval = interval_of(args.control_interval, times) if args.control_interval else (0.0, 1.0)
    pipe, picture = steer(pipe, [Steering.parse(text) for text in args.control], interval, height, width)
    return pipe, {"picture": picture}


def warn_of_learned(args: Namespace, path: Path, sampling: Sampling) -> None:
    """Warns if a LoRA learned other steps or another guidance than those with which it is sampled."""
    updates = [Adapter.parse(text).path for text in args.lora or ()]
    for update in updates if path.is_file() or (path / INDEX).is_file() else [path, *updates]:
        process = learned(update)
        if process and (process[1].steps, process[1].guidance) != (sampling.steps, sampling.guidance):
            asked, own = (f"{how.steps} steps with guidance {how.guidance:g}" for how in (sampling, process[1]))
            warnings.warn(f"{update} learned {own}, not {asked}: pictures may be worse", stacklevel=2)
