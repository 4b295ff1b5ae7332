"""Autoencoders of codes: VQ-VAE, RQ-VAE (several codes in one place) and VQ-VAE-2 (two levels)."""

from typing import Any, NamedTuple, final

import torch
from einops import rearrange
from torch import Tensor, nn

from tokens.quantize import Quantizer


class Reconstruction(NamedTuple):
    """Pictures through codes."""

    pictures: Tensor  # (B, C, H, W)
    codes: Tensor  # (B, stack, h, w) long, as `VQVAE.codes` gives them
    commitment: Tensor  # (B,) of the quantisers


class Residual(nn.Module):
    """x + two convolutions of it, each after group normalisation and SiLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)) for _ in range(2)]
        self.layers = nn.Sequential(*(layer for three in layers for layer in three))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def down(inputs: int, widths: list[int], blocks: int) -> nn.Sequential:
    """Halves maps of `inputs` channels once for each of the widths."""
    layers: list[nn.Module] = []
    for before, width in zip([inputs, *widths], widths, strict=False):
        layers += [nn.Conv2d(before, width, 4, stride=2, padding=1), *(Residual(width) for _ in range(blocks))]
    return nn.Sequential(*layers)


def up(widths: list[int], outputs: int, blocks: int) -> nn.Sequential:
    """Doubles maps once for each of the widths, the channels before each doubling. The result has `outputs`."""
    layers: list[nn.Module] = []
    for width, after in zip(widths, [*widths[1:], outputs], strict=True):
        layers += [*(Residual(width) for _ in range(blocks)), nn.ConvTranspose2d(width, after, 4, stride=2, padding=1)]
    return nn.Sequential(*layers)


@final
class VQVAE(nn.Module):
    """Pictures (B, channels, H, W) to codes (B, stack, h, w) and back.

    One level (van den Oord et al. 2017) has an encoder, a quantiser and a decoder. With a depth above 1 each place has
    several codes (RQ-VAE, Lee et al. 2022). With two levels (VQ-VAE-2, Razavi et al. 2019, §3.1) a second grid, twice
    as fine, is quantised from the features and the coarse vectors, and the decoder sees both; the stack of a place is
    then its coarse code and the 2 × 2 fine ones.

    Args:
        channels: of a picture.
        widths: channels after each halving, multiples of 8.
        blocks: residual blocks of each size.
        codes: size of the codebook, or of both.
        dim: length of a code's vector.
        depth: codes of each place, with one level.
        levels: 1 or 2.
        restart: number of uses below which a code is restarted; 0 never.

    Attributes:
        settings: the arguments.
        factor: pixels of a side for one place of h or w.
        stack: codes of one place.

    Raises:
        ValueError: the sizes do not fit each other.
    """

    def __init__(
        self,
        channels: int = 3,
        widths: tuple[int, ...] = (32, 64, 128),
        blocks: int = 1,
        codes: int = 256,
        dim: int = 16,
        depth: int = 1,
        levels: int = 1,
        restart: float = 1.0,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "channels": channels, "widths": list(widths), "blocks": blocks, "codes": codes, "dim": dim, "depth": depth,
            "levels": levels, "restart": restart,
        }  # fmt: skip
        if codes < 2:
            raise ValueError(f"a codebook needs at least 2 codes, got {codes}")
        if min(channels, blocks, *widths, 1) < 1 or not widths or any(width % 8 for width in widths):
            raise ValueError(f"widths must be multiples of 8, and channels and blocks at least 1, got {list(widths)}, "
                             f"{channels} and {blocks}")  # fmt: skip
        if levels not in (1, 2) or (levels == 2 and (depth > 1 or len(widths) < 2)):
            raise ValueError(f"levels must be 1, or 2 with depth 1 and at least two widths, got {levels} with depth "
                             f"{depth} and {len(widths)} widths")  # fmt: skip
        self.levels, self.size, self.factor = levels, codes, 2 ** len(widths)
        self.stack = depth if levels == 1 else 5
        self.quantizer = Quantizer(codes, dim, depth, restart=restart)
        fine, last = list(widths[: len(widths) + 1 - levels]), widths[-1]
        self.encoder = down(channels, fine, blocks)
        self.project = nn.Conv2d(last, dim, 1)
        self.decoder = nn.Sequential(nn.Conv2d(dim * levels, fine[-1], 3, padding=1), up(fine[::-1], channels, blocks))
        if levels == 2:
            self.encode_coarse = down(fine[-1], [last], blocks)
            self.enlarge = up([dim], dim, 0)  # the coarse vectors, in the fine grid
            self.quantizer_fine = Quantizer(codes, dim, 1, restart=restart)
            self.project_fine = nn.Conv2d(fine[-1] + dim, dim, 1)

    def forward(self, pictures: Tensor) -> Reconstruction:
        """Reconstructs pictures (B, channels, H, W). In training mode the codebooks follow the features.

        Raises:
            ValueError: a side is no multiple of the factor.
        """
        features = self._features(pictures)
        if self.levels == 1:
            vectors, codes, commitment = self.quantizer(self.project(features))
            return Reconstruction(self.decoder(vectors), codes, commitment)
        vectors, coarse, commitment = self.quantizer(self.project(self.encode_coarse(features)))
        enlarged = self.enlarge(vectors)
        told = self.project_fine(torch.cat([features, enlarged.to(features)], dim=1))
        vectors, fine, second = self.quantizer_fine(told)
        packed = torch.cat([coarse, rearrange(fine, "b 1 (h p) (w q) -> b (p q) h w", p=2, q=2)], dim=1)
        return Reconstruction(self.decoder(torch.cat([enlarged, vectors], dim=1)), packed, commitment + second)

    def _features(self, pictures: Tensor) -> Tensor:
        if pictures.shape[-2] % self.factor or pictures.shape[-1] % self.factor:
            raise ValueError(f"a picture's sides must be multiples of {self.factor}, got {tuple(pictures.shape[-2:])}")
        return self.encoder(pictures)

    def decode(self, codes: Tensor) -> Tensor:
        """Pictures (B, channels, H, W) of codes (B, stack, h, w) long. With one level, fewer depths are coarser.

        Raises:
            ValueError: there is a code outside of the codebook, or a place has too many or too few.
        """
        if codes.shape[1] > self.stack or (self.levels == 2 and codes.shape[1] < self.stack):
            raise ValueError(f"these codes have {codes.shape[1]} for each place, and this autoencoder has {self.stack}")
        if self.levels == 1:
            return self.decoder(self.quantizer.vectors(codes))
        fine = rearrange(codes[:, 1:], "b (p q) h w -> b 1 (h p) (w q)", p=2, q=2)
        enlarged = self.enlarge(self.quantizer.vectors(codes[:, :1]))
        return self.decoder(torch.cat([enlarged, self.quantizer_fine.vectors(fine)], dim=1))

    def vectors(self, pictures: Tensor) -> Tensor:
        """The quantised vectors (B, dim, h, w) of pictures, with one level; for flows in their space."""
        return self.quantizer(self.project(self._features(pictures))).vectors

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Pictures of vectors (B, dim, h, w), each replaced by the nearest in codes."""
        return self.decoder(self.quantizer(vectors).vectors)
