"""CLIP's image tower as a codec: pixels → standardised image embeddings, latents of 1 × 1."""

import os
from pathlib import Path
from typing import Any, Self, final

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from data.codec import Codec
from storage.configs import CLIP_VISION, described
from storage.files import commit_json
from storage.text import read_json
from storage.weights import check_tensors, digest, open_file, open_folder, write_tensors

CONFIG, STEM, STATISTICS = "config.json", "model", "statistics.safetensors"
# Of the pixels' channels, as in all of CLIP's towers (Radford et al. 2021, their code).
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@final
class CLIPImage(Codec):
    """The frozen image tower of a CLIP (Radford et al. 2021), for a prior (Ramesh et al. 2022, §2.2).

    The latent of a picture is its embedding, scaled to length 1 and then standardised: (e − mean)/std, with mean and
    deviation of each of the D numbers. Without that, their deviation would be about D^−½, and that of the noise is 1.
    Everything is computed in float32, without gradients, on the device of the weights.

    Args:
        folder: holds `config.json` and `model.safetensors` of transformers' `CLIPVisionModelWithProjection`, and
            `statistics.safetensors` with mean and std (D,), as `write` measures them.

    Attributes:
        channels: D.
        factor: side of a picture in pixels; the tower reads no other size.
        tower: the network.
        mean: of each number of unit embeddings, (D,).
        std: the deviation, (D,).

    Raises:
        FileNotFoundError, ValueError: in one line, if a file is missing, damaged or of another kind.
    """

    pixel_channels, decodes = 3, False
    shift, scale = 0.0, 1.0  # mean and std are in their place

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        folder = Path(folder)
        try:
            self.settings = described(read_json(folder / CONFIG), CLIP_VISION)
            if (kind := self.settings.get("model_type")) != CLIPVisionConfig.model_type:
                raise ValueError(f"its model_type is {kind!r}, not {CLIPVisionConfig.model_type!r}")
            config: Any = CLIPVisionConfig.from_dict(self.settings)
            self.channels, self.factor = int(config.projection_dim), int(config.image_size)
            with torch.device("meta"):  # takes no random numbers
                self.tower = CLIPVisionModelWithProjection(config)
                self.tower(torch.empty(1, self.pixel_channels, self.factor, self.factor))
        except FileNotFoundError:
            raise
        except Exception as error:  # a wrong value may raise anything where it is used
            reason = " ".join(str(error).split())
            raise ValueError(f"{folder / CONFIG} describes no image tower of a CLIP: {reason}") from None
        stored = open_folder(folder, STEM).renamed(lambda name: None if name.endswith("position_ids") else name)
        shapes = {name: tuple(value.shape) for name, value in self.tower.named_parameters()}
        check_tensors(stored, shapes, "this image tower's config")
        state = {name: stored[name].to(torch.float32, copy=True) for name in shapes}
        self.tower.load_state_dict(state, strict=False, assign=True)
        embeddings = self.tower.vision_model.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions)[None]  # (1, N); in no file
        self.tower.eval().requires_grad_(False)
        statistics = open_file(folder / STATISTICS)
        check_tensors(statistics, {"mean": (self.channels,), "std": (self.channels,)}, "this image tower")
        self.mean, self.std = (statistics[name].to(torch.float32, copy=True) for name in ("mean", "std"))
        if not (self.mean.isfinite().all() and self.std.isfinite().all() and (self.std > 0).all()):
            raise ValueError(f"{folder / STATISTICS} has a mean that is not finite, or a std that is not above 0")

    def to(self, device: torch.device | str) -> Self:
        self.tower.to(device)  # type: ignore[arg-type]  # the decorator of `to` hides that it is a method
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    def encode(self, pixels: Tensor) -> Tensor:
        """Standardised embeddings (B, D, 1, 1) of pixels (B, 3, factor, factor).

        Raises:
            ValueError: the pictures have another size, or a number is not finite.
        """
        wanted = (self.pixel_channels, self.factor, self.factor)
        if pixels.shape[1:] != wanted:
            raise ValueError(f"the image tower reads pictures {wanted}, got {tuple(pixels.shape[1:])}")
        if not pixels.isfinite().all():
            raise ValueError("the image tower was given numbers that are not finite")
        return self.latents(unit_embeddings(self.tower, pixels.to(self.mean)))

    def embedding(self, latents: Tensor) -> Tensor:
        """Unit embeddings (B, D) of latents (B, D, 1, 1), which may be generated. ValueError for another shape."""
        if latents.shape[1:] != (self.channels, 1, 1):
            raise ValueError(f"embeddings are latents {(self.channels, 1, 1)}, got {tuple(latents.shape[1:])}")
        return normalize(latents.to(self.mean).flatten(1) * self.std + self.mean, dim=-1)

    def latents(self, embeddings: Tensor) -> Tensor:
        """Latents (B, D, 1, 1) of unit embeddings (B, D). ValueError for another shape."""
        if embeddings.shape[1:] != (self.channels,):
            raise ValueError(f"embeddings have {self.channels} numbers, got the shape {tuple(embeddings.shape)}")
        return ((embeddings.to(self.mean) - self.mean) / self.std)[..., None, None]

    def decode(self, latents: Tensor) -> Tensor:
        """ValueError: an embedding has no pixels."""
        raise ValueError("an image embedding has no pixels: draw embeddings with pipeline.prior.draw")

    def save(self, folder: Path) -> None:
        _save(folder, self.settings, self.tower, self.mean, self.std)

    def index(self) -> list[str]:
        return ["data.clip", "CLIPImage"]

    def fingerprint(self) -> dict[str, Any]:
        tensors = dict(self.tower.named_parameters()) | {"mean": self.mean, "std": self.std}
        return {"class": "CLIPImage", "weights": digest(tensors), "config": self.settings}


def centred(pixels: Tensor) -> Tensor:
    """What the tower reads of pixels (B, 3, H, W) in [0, 1]: each channel less its mean, by its deviation."""
    mean, std = (torch.tensor(part, device=pixels.device)[:, None, None] for part in (PIXEL_MEAN, PIXEL_STD))
    return (pixels - mean) / std


@torch.no_grad()
def unit_embeddings(tower: CLIPVisionModelWithProjection, pixels: Tensor) -> Tensor:
    """Embeddings of length 1, (B, D), of pixels (B, 3, H, W) in [0, 1], in float32."""
    with torch.autocast(pixels.device.type, enabled=False):
        return normalize(tower(centred(pixels)).image_embeds, dim=-1)


def write(folder: Path, tower: CLIPVisionModelWithProjection, pixels: Tensor) -> None:
    """Writes a tower, its weights in their type, and the statistics of the embeddings of pictures.

    Args:
        folder: the folder, as `CLIPImage` reads it.
        tower: the trained tower.
        pixels: pictures like those to come, (N, 3, side, side) uint8.
    """
    stored = {name: value.detach().clone() for name, value in tower.named_parameters()}
    tower.float().eval()
    found = torch.cat([unit_embeddings(tower, part / 255) for part in pixels.split(256)]).double()
    for name, value in tower.named_parameters():
        value.data = stored[name]
    _save(folder, described(tower.config.to_dict(), CLIP_VISION), tower, found.mean(0).float(), found.std(0).float())


def _save(
    folder: Path, settings: dict[str, Any], tower: CLIPVisionModelWithProjection, mean: Tensor, std: Tensor
) -> None:
    names = {"_class_name": "CLIPImage", "architectures": [CLIPVisionModelWithProjection.__name__]}
    commit_json(folder / CONFIG, names | settings)
    write_tensors(dict(tower.named_parameters()), folder / f"{STEM}.safetensors")
    write_tensors({"mean": mean, "std": std}, folder / STATISTICS)
