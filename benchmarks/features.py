"""How the features of scenes react to faults: Fréchet distances to held-out scenes over that of the training scenes.

python -m benchmarks.features
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from cli import Parser
from data.examined import Shapes, scenes
from data.latents import VAE
from metrics.distance import Measure
from metrics.features import load_features

COUNT, FRESH = 1000, 21  # scenes, and a seed that nothing else uses


def through(codec: VAE) -> Callable[[Tensor], Tensor]:
    return lambda pictures: torch.cat([codec.decode(codec.encode(part)) for part in pictures.split(50)])


def blurred(sigma: float) -> Callable[[Tensor], Tensor]:
    return lambda pictures: gaussian_blur(pictures, [9, 9], [sigma, sigma])


def main() -> None:
    Parser(description=__doc__).parse_args()
    fresh = scenes(FRESH, COUNT)
    real = Shapes.held_out(COUNT, COUNT).real
    measure = Measure(load_features(Shapes.features), real["train"], real["held_out"])
    faults: dict[str, Callable[[Tensor], Tensor]] = {
        "as they are": lambda pictures: pictures,
        "through the VAE": through(VAE("assets/shapes/vae")),
        "blurred by 0.7 pixels": blurred(0.7),
        "blurred by 1 pixel": blurred(1.0),
        "moved by 1 pixel": lambda pictures: pictures.roll((1, 1), (2, 3)),
    }
    for name, fault in faults.items():
        print(f"{name:24}{measure.floor(fault(fresh).clamp(0, 1)):8.2f}")


if __name__ == "__main__":
    main()
