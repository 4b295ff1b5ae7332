"""The classical backbone: a U-Net (Ho et al. 2020, appendix B) with cross attention (Rombach et al. 2022, §3.3)."""

import json
from operator import index
from pathlib import Path
from typing import Any, final

from diffusers.models import UNet2DConditionModel
from torch import Tensor, nn

from mmdit.network import Condition, Network
from storage.files import commit_json
from storage.text import read_json
from storage.weights import check_tensors, open_folder, shorten, write_tensors

CONFIG, STEM = "config.json", "diffusion_pytorch_model"


@final
class UNet(Network):
    """diffusers' `UNet2DConditionModel` with the contract of the transformer: model(z, t, condition) → y.

    Every level and the middle have self attention and cross attention to the text tokens. The pooled vector goes
    through one linear layer and is added to the time embedding, which has `channels[0]` features of the step 1000·t.
    The last convolution starts at zero, as in Ho et al.'s code (init_scale 0) but not in diffusers, so that the network
    starts at y = 0 as the transformer does; all else starts as in diffusers. The default sizes are those of Stable
    Diffusion 1, which has no attention at its lowest level and no pooled vector.

    With `adm` the blocks are those of ADM and GLIDE (Dhariwal & Nichol 2021, §3; Nichol et al. 2022): the time
    scales and shifts behind group normalisation (AdaGN), halving and doubling happen inside residual blocks as in
    BigGAN, and one attention layer reads image and text tokens together.

    Args:
        in_channels: channels of the latent.
        out_channels: channels of y; none means in_channels. A learned variance takes twice as many.
        channels: channels of each level, from the finest; each level halves height and width.
        layers_per_block: residual blocks per level on the way down; one more on the way up.
        heads: attention heads, the same number at every level; with `adm` those of the finest level, of whose width the
            heads of all levels are.
        text_dim: channels of a text token.
        pooled_dim: channels of the pooled text vector.
        sample_size: side of the latent at the base resolution, for the pipeline; it does not change the function.
        norm_num_groups: number of groups in group normalisation.
        adm: whether the blocks are ADM's.

    Raises:
        ValueError: a size is below 1; a level's channels are not a multiple of heads or do not form groups of at least
            two (normalising a group of one removes the time embedding); or sample_size cannot be halved often enough.

    Attributes:
        unit: height and width of a latent are multiples of it, 2^(levels − 1).
        largest: height or width of the largest latent; none means no limit.
    """

    largest: int | None = None

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int | None = None,
        channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        heads: int = 8,
        text_dim: int = 768,
        pooled_dim: int = 768,
        sample_size: int = 64,
        norm_num_groups: int = 32,
        adm: bool = False,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        sizes = (in_channels, out_channels, *channels, layers_per_block, heads, text_dim, pooled_dim, sample_size,
                 norm_num_groups)  # fmt: skip
        if not channels or min(sizes) < 1:
            raise ValueError(f"channels must not be empty and sizes must be at least 1, got {min(sizes)}")
        head_dim = channels[0] // heads
        unit = head_dim if adm and head_dim else heads
        if channels[0] % heads or any(c % unit or c % norm_num_groups or c == norm_num_groups for c in channels):
            raise ValueError(
                "channels must be multiples of heads and of norm_num_groups, two or more times the latter, "
                f"got {tuple(channels)}, {heads} heads and {norm_num_groups} groups"
            )
        self.unit = 2 ** (len(channels) - 1)
        if sample_size % self.unit:
            raise ValueError(f"sample_size must be a multiple of {self.unit} with {len(channels)} levels, "
                             f"got {sample_size}")  # fmt: skip
        self.in_channels, self.out_channels, self.sample_size = in_channels, out_channels, sample_size
        self.text_dim, self.pooled_dim = text_dim, pooled_dim
        self.settings: dict[str, Any] = {
            "sample_size": sample_size,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "down_block_types": ["CrossAttnDownBlock2D"] * len(channels),
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "up_block_types": ["CrossAttnUpBlock2D"] * len(channels),
            "block_out_channels": list(channels),
            "layers_per_block": layers_per_block,
            "attention_head_dim": heads,  # misnamed in diffusers: the number of heads
            "cross_attention_dim": text_dim,
            "norm_num_groups": norm_num_groups,
            "class_embed_type": "simple_projection",
            "projection_class_embeddings_input_dim": pooled_dim,
        }
        if adm:
            self.settings |= {
                "down_block_types": ["SimpleCrossAttnDownBlock2D"] * len(channels),
                "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
                "up_block_types": ["SimpleCrossAttnUpBlock2D"] * len(channels),
                "attention_head_dim": head_dim,  # in these blocks it is what it says
                "resnet_time_scale_shift": "scale_shift",
            }
        self.net = UNet2DConditionModel(**self.settings)
        nn.init.zeros_(self.net.conv_out.weight)
        nn.init.zeros_(self.net.conv_out.bias)

    def forward(self, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's output at (z, t).

        Args:
            z: noisy latents, (B, C, H, W); H and W multiples of `unit`.
            t: times in [0, 1], (B,) float32.
            condition: text of the same batch size; its mask needs a true token in every row.

        Returns:
            (B, out_channels, H, W).

        Raises:
            ValueError: H or W is not a multiple of `unit`.
        """
        self.check_condition(condition)
        if z.shape[-2] % self.unit or z.shape[-1] % self.unit:
            raise ValueError(f"latent {z.shape[-2]}×{z.shape[-1]} is not a multiple of {self.unit}")
        return self.net(
            z, 1000 * t, condition.text, class_labels=condition.pooled, encoder_attention_mask=condition.mask,
            return_dict=False,
        )[0]  # fmt: skip

    def save(self, folder: Path) -> None:
        """Writes config and weights so that `UNet2DConditionModel.from_pretrained` reads them. OSError on failure."""
        commit_json(folder / CONFIG, {"_class_name": "UNet2DConditionModel"} | self.settings)
        write_tensors(self.net.state_dict(), folder / f"{STEM}.safetensors")

    @classmethod
    def load(cls, folder: Path) -> "UNet":
        """Reads the folder of a U-Net of this kind, written by `save` or by diffusers.

        Returns:
            The network in evaluation mode, float32.

        Raises:
            FileNotFoundError, ValueError: a file is missing, truncated or of another kind, or names or shapes do not
                fit. The network is loaded whole or not at all.
        """
        network = cls._from_config(folder / CONFIG)
        weights = open_folder(folder, STEM)
        shapes = {name: tuple(t.shape) for name, t in network.net.state_dict().items()}
        check_tensors(weights, shapes, "this U-Net's config")
        network.net.load_state_dict(dict(weights))
        return network.eval()

    @classmethod
    def _from_config(cls, file: Path) -> "UNet":
        """A new network with the settings in the file. ValueError if this class does not support one of them."""
        config = read_json(file)
        if config.get("_class_name") != "UNet2DConditionModel":
            raise ValueError(f"{file} describes a {config.get('_class_name')}, not a UNet2DConditionModel")
        try:
            adm = config.get("resnet_time_scale_shift", "default") == "scale_shift"
            head_dim = index(config["attention_head_dim"])
            network = cls(
                in_channels=index(config["in_channels"]),
                out_channels=index(config["out_channels"]),
                channels=tuple(map(index, config["block_out_channels"])),
                layers_per_block=index(config["layers_per_block"]),
                heads=index(config["block_out_channels"][0]) // head_dim if adm else head_dim,
                text_dim=index(config["cross_attention_dim"]),
                pooled_dim=index(config["projection_class_embeddings_input_dim"]),
                sample_size=index(config["sample_size"]),
                norm_num_groups=index(config["norm_num_groups"]),
                adm=adm,
            )
        except (TypeError, ZeroDivisionError) as error:
            raise ValueError(f"{file} has a value of the wrong type: {error}") from None
        except KeyError as error:
            raise ValueError(f"{file} lacks {error}; is it a U-Net with text?") from None
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        ours = json.loads(network.net.to_json_string())
        given = {name: value for name, value in config.items() if not name.startswith("_")}
        wrong = [name for name in sorted(given.keys() | network.settings) if name not in given
                   or name not in ours or given[name] != ours[name]]  # fmt: skip
        if wrong:
            raise ValueError(f"{file} has unsupported or missing settings: {shorten(wrong)}")
        return network
