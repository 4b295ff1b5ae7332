"""Networks that compute the features of pictures. Distances between distributions are measured on these features."""

import hashlib
import json
import pickle
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from metrics.judge import Judge
from storage.configs import CLIP, CLIP_TEXT, CLIP_VISION, PROCESSOR, described, tokenizer_files
from storage.text import read_json
from storage.weights import open_file


class Features(NamedTuple):
    """The features of N pictures, float64 on the CPU.

    Attributes:
        pooled: `(N, F)`, one vector for the whole picture.
        spatial: `(N, S)`, a middle layer without pooling, for the spatial Fréchet distance; None if there is none.
        logits: `(N, K)`, before the softmax over K classes; None if the network has no classes.
    """

    pooled: Tensor
    spatial: Tensor | None
    logits: Tensor | None


def joined(chunks: tuple[Tensor | None, ...]) -> Any:
    """The chunks of one field of `Features` in one tensor, or None if the network has no such field."""
    return None if chunks[0] is None else torch.cat([chunk for chunk in chunks if chunk is not None])


class FeatureNetwork(ABC):
    """Computes the `Features` of pictures `(N, C, H, W)`, floats in [0, 1], a chunk at a time.

    Each picture is processed independently, so chunks and order change only the rounding of float32. The computation
    runs on the device of the weights: `features.network.to("cuda")` moves it.

    Attributes:
        name: name of the network, for the file of results.
        preprocessing: how a picture is prepared for the network, for the same file. Distances can be compared only if
            network and preprocessing are the same.
        num_features: F.
        num_spatial: S, at most F, so that enough pictures for F are enough for S; None without spatial features.
        classifies: whether the classes of the network are the labels of the pictures.
        chunk: pictures at a time, to limit the memory.
        network: the weights.
    """

    name: str
    preprocessing: str
    num_features: int
    num_spatial: int | None
    classifies: bool = False
    chunk: int
    network: nn.Module

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Features:
        """Returns the features of N ≥ 1 pictures. ValueError unless they are `(N, C, H, W)` floats in [0, 1]."""
        if pictures.dim() != 4 or not len(pictures) or not pictures.is_floating_point():
            raise ValueError(f"pictures are floats (N, C, H, W), got {pictures.dtype} {tuple(pictures.shape)}")
        if not (pictures.min() >= 0 and pictures.max() <= 1):  # also true for NaN
            raise ValueError(f"pictures are in [0, 1], got {pictures.min():g} … {pictures.max():g}")
        device = next(self.network.parameters()).device
        chunks = [
            [None if x is None else x.double().cpu() for x in self.forward(chunk.to(device))]
            for chunk in pictures.split(self.chunk)
        ]
        return Features(*map(joined, zip(*chunks, strict=True)))

    @abstractmethod
    def forward(self, pictures: Tensor) -> Features:
        """The features of one chunk, in any float type, on the device of the weights."""


class JudgeFeatures(FeatureNetwork):
    """The 64 features of a `metrics.judge.Judge`.

    The spatial features are the first channels of the last maps of its trunk: 64 numbers, as many as the pooled
    features. The sFID of C. Nash et al., "Generating Images with Sparse Representations", 2021, likewise takes the
    first channels of a middle layer without pooling, about as many numbers as the FID has.

    Args:
        folder: folder of the judge. Errors are those of `Judge.load`; ValueError also for a judge of other pictures.

    Attributes:
        judge: the classifier itself.
        picture: the shape of a picture, (C, H, W).
        channels: channels of the spatial features.
    """

    chunk = 512
    picture: tuple[int, int, int]
    channels: int

    def __init__(self, folder: str | Path) -> None:
        self.judge = self.network = Judge.load(folder)
        known = (self.judge.channels, self.judge.side, self.judge.side)
        if known != self.picture:
            raise ValueError(f"{folder} holds a judge of pictures {known}, not {self.picture}")
        self.num_features = self.judge.num_features
        self.num_spatial = self.channels * self.judge.grid**2

    def forward(self, pictures: Tensor) -> Features:
        if pictures.shape[1:] != self.picture:
            raise ValueError(f"the judge needs pictures of {self.picture}, got {tuple(pictures.shape[1:])}")
        maps = self.judge.maps(pictures)  # (B, 2·width, grid, grid)
        pooled = self.judge.embed(maps)
        spatial = rearrange(maps[:, : self.channels], "b c h w -> b (c h w)")
        return Features(pooled, spatial, self.judge.head(pooled) if self.classifies else None)


class DigitsJudge(JudgeFeatures):
    """The classifier of 8 × 8 digits: its features, and logits of the ten digits. Spatial: 16 channels of 2 × 2."""

    name = "judge"
    preprocessing = "none: 8×8 grey pictures in [0, 1] as they are"
    classifies = True
    picture = (1, 8, 8)
    channels = 16


class ShapesJudge(JudgeFeatures):
    """The classifier of the scenes of `data/shapes.py`: features of counts, shapes, colours, sizes and positions.

    It has no logits, because a scene belongs to no single class. Spatial: 4 channels of 4 × 4.
    """

    name = "shapes"
    preprocessing = "none: 64×64 RGB pictures in [0, 1] as they are"
    picture = (3, 64, 64)
    channels = 4


def rgb_bytes(pictures: Tensor) -> Tensor:
    """Pictures `(B, 1 or 3, H, W)` in [0, 1] → uint8 `(B, 3, H, W)`, as in a PNG. ValueError for other channels."""
    if pictures.shape[1] not in (1, 3):
        raise ValueError(f"pictures have 1 or 3 channels, got {pictures.shape[1]}")
    return pictures.mul(255).round().to(torch.uint8).expand(-1, 3, -1, -1)


class Inception(FeatureNetwork):
    """The Inception network of the FID: M. Heusel et al., 2017, with the weights of 2015-12-05.

    2,048 pooled features ("pool_3"); the 1,008 logits without bias, on which torch-fidelity computes the Inception
    score. Spatial: the first 7 channels of the 17 × 17 maps that TensorFlow's graph calls "mixed_6/conv", which is
    branch1x1 of PyTorch's Mixed_6d, 2,023 numbers: the sFID of Nash et al., 2021, as computed by the evaluator of
    P. Dhariwal and A. Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021.

    Args:
        weights_file: `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity's release v0.2.0. Its name in the
            results ends with the first 8 digits of the file's SHA-256.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or holds something else.
    """

    preprocessing = "8 bits, grey repeated to RGB, resized to 299×299 as TensorFlow 1 does (bilinear), (x − 128) / 128"
    num_features = 2048
    num_spatial = 7 * 17 * 17
    chunk = 32

    def __init__(self, weights_file: str | Path) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        file = Path(weights_file)
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing: it should be torch-fidelity's Inception weights, "
                "weights-inception-2015-12-05-6726825d.pth of its release v0.2.0, "
                "which pytorch-fid names pt_inception-2015-12-05-6726825d.pth"
            )
        try:
            torch.load(file, map_location="cpu", weights_only=True)  # the next line would run code hidden in the file
            self.network: nn.Module = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file)
            )
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, EOFError, pickle.PickleError) as error:
            raise ValueError(
                f"{file} is damaged or not torch-fidelity's pt_inception-2015-12-05: {first_line(error)}"
            ) from error
        with file.open("rb") as stream:
            self.name = f"inception-{hashlib.file_digest(stream, 'sha256').hexdigest()[:8]}"

    def forward(self, pictures: Tensor) -> Features:
        maps: list[Tensor] = []
        layer: Any = self.network.Mixed_6d
        with layer.branch1x1.register_forward_hook(lambda _module, _inputs, output: maps.append(output[:, :7])):
            pooled, logits = self.network(rgb_bytes(pictures))
        return Features(pooled, rearrange(maps[0], "b c h w -> b (c h w)"), logits)


class CLIPFeatures(FeatureNetwork):
    """The projected image embeddings of a CLIP model (A. Radford et al., 2021). It has no classes.

    It has no spatial features either, because every token of a vision transformer depends on the whole picture.

    Args:
        folder: folder of a transformers CLIPModel: `config.json`, `model.safetensors` and `preprocessor_config.json`;
            for captions also the tokenizer's files.

    Attributes:
        folder: folder of the CLIPModel.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or of another kind of model.
    """

    num_spatial = None
    chunk = 64

    def __init__(self, folder: str | Path) -> None:
        from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

        self.folder = Path(folder)
        files = [self.folder / name for name in ("config.json", "model.safetensors", "preprocessor_config.json")]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file} is missing: a CLIP folder holds config.json, model.safetensors, preprocessor_config.json"
                )
        config, tensors = read_json(files[0]), dict(open_file(files[1]))
        try:
            if (kind := config.get("model_type")) != "clip":
                raise ValueError(f"its model_type is {kind!r} instead of 'clip'")
            towers: dict[str, Any] = {
                name: described(config[name], keys)
                for part, keys in (("text", CLIP_TEXT), ("vision", CLIP_VISION))
                for name in (f"{part}_config", f"{part}_config_dict")  # the latter in old files
                if config.get(name) is not None
            }
            rest = described(config, CLIP)
            self.clip = CLIPModel(CLIPConfig(**towers, **rest))
            with torch.device("meta"):  # computes nothing; some values fail only in use
                one = {name: tower | {"num_hidden_layers": 1} for name, tower in towers.items()}
                blank: Any = CLIPModel(CLIPConfig(**one, **rest))
                side = blank.config.vision_config.image_size
                blank.get_image_features(torch.empty(1, 3, side, side))
                blank.get_text_features(torch.ones(1, 2, dtype=torch.long))
        except Exception as error:  # wrong settings may raise anything
            raise ValueError(f"{files[0]} describes no CLIP model: {first_line(error)}") from error
        try:
            missing = self.clip.load_state_dict(tensors, strict=False).missing_keys
        except RuntimeError as error:
            raise ValueError(f"{files[1]} is damaged or of another model: {first_line(error)}") from error
        if missing:
            raise ValueError(f"{files[1]} is of another model: {len(missing)} weights are absent, such as {missing[0]}")
        try:
            self.processor = CLIPImageProcessor(**described(read_json(files[2]), PROCESSOR))
            self.processor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), input_data_format="channels_first")
        except Exception as error:  # as above
            raise ValueError(f"{files[2]} is no CLIP image processor's: {first_line(error)}") from error
        self.network = self.clip.eval().requires_grad_(False)
        self.name = f"clip-{self.folder.resolve().name}"
        self.num_features = self.clip.visual_projection.out_features
        kept = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_normalize")
        settings = json.loads(self.processor.to_json_string())
        self.preprocessing = "8 bits, grey repeated to RGB, CLIPImageProcessor " + json.dumps(
            {name: settings[name] for name in kept}
        )

    def forward(self, pictures: Tensor) -> Features:
        inputs = self.processor(
            rgb_bytes(pictures), input_data_format="channels_first", device=pictures.device, return_tensors="pt"
        )
        return Features(self.clip.get_image_features(inputs.pixel_values).pooler_output, None, None)

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> Tensor:
        """Returns the projected embeddings `(N, F)` of N ≥ 1 captions, float64. Long captions are truncated.

        FileNotFoundError if the folder has no tokenizer, ValueError if it is damaged.
        """
        from transformers import CLIPTokenizer

        if not any((self.folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise FileNotFoundError(f"{self.folder / 'tokenizer.json'} is missing: captions need CLIP's tokenizer")
        try:
            with tokenizer_files(self.folder, CLIPTokenizer.vocab_files_names.values()) as files:
                tokenizer = CLIPTokenizer.from_pretrained(files, local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise ValueError(f"{self.folder} holds no readable CLIP tokenizer: {first_line(error)}") from error
        length = self.clip.text_model.embeddings.position_embedding.num_embeddings
        parts = []
        for i in range(0, len(captions), self.chunk):
            chunk = list(captions[i : i + self.chunk])
            batch = tokenizer(chunk, padding=True, truncation=True, max_length=length, return_tensors="pt")
            batch = batch.to(self.clip.device)
            parts.append(self.clip.get_text_features(batch.input_ids, batch.attention_mask).pooler_output)
        return torch.cat(parts).double().cpu()


KINDS: dict[str, type[JudgeFeatures] | type[Inception] | type[CLIPFeatures]] = {
    "judge": DigitsJudge,
    "shapes": ShapesJudge,
    "inception": Inception,
    "clip": CLIPFeatures,
}


def load_features(spec: str) -> FeatureNetwork:
    """Returns the network of "shapes:FOLDER", "judge:FOLDER" (of digits), "inception:FILE" or "clip:FOLDER".

    ValueError for any other kind. FileNotFoundError or ValueError in one line if its files are missing or damaged.
    """
    kind, _, place = spec.partition(":")
    if kind not in KINDS or not place:
        raise ValueError(f"features are shapes:FOLDER, judge:FOLDER, inception:FILE or clip:FOLDER, got {spec!r}")
    return KINDS[kind](place)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
