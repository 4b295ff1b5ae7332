"""Which noise a picture is paired with: independent draws, or the nearest of several (immiscible diffusion)."""

import numpy as np
import torch
from torch import Tensor

from data.order import Use, normal

MOST_DRAWS = 1024


def check_draws(draws: int) -> None:
    """ValueError if a sample cannot have so many draws."""
    if not 1 <= draws <= MOST_DRAWS:
        raise ValueError(f"data.noise_draws must be from 1 to {MOST_DRAWS:,}, got {draws}")


def nearest_noise(x0: Tensor, seed: int, step: int, positions: np.ndarray, draws: int) -> Tensor:
    """argmin over εᵢ of ‖εᵢ − x0‖, with ε₁ … ε_draws ~ N(0, 1), for each sample; shaped like x0 (b, C, H, W).

    Immiscible diffusion (Li et al. 2024) in the form of its k-nearest-noise variant (Li et al. 2025): pictures and
    noise that are paired lie nearer to each other, so fewer trajectories cross. With one draw the noise is independent
    of the picture. A sample's draws are a function of (seed, step, position), and the first is that of one draw.
    """
    noise = normal(seed, Use.NOISE, step, positions, (draws, *x0.shape[1:]))
    if draws == 1:
        return noise[:, 0]
    distances = (noise - x0[:, None].float()).square().flatten(2).sum(2)  # (b, draws)
    return noise[torch.arange(len(x0)), distances.argmin(1)]
