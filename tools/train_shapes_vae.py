"""Trains the VAE of the shapes and writes `assets/shapes/vae/`.

    python -m tools.train_shapes_vae

diffusers' `AutoencoderKL` with 4 channels, as in SD1 and SDXL (8 × 8 pixels), narrow enough for a CPU, on scenes
drawn for it. The loss is the sum of |error| over the picture plus a weighted Kullback-Leibler divergence to N(0, 1)
(Rombach et al. 2022, appendix G), whose weight rises linearly over the first fifth of the training. The weight is much
larger than Stable Diffusion's: latents are noisy in training, so that the decoder tolerates a generator's small errors.

At the end it sets shift and scale so that latents are normalised, and prints the quality of decoded unseen scenes. It
takes about ten minutes on one core. The weights are stored in half precision.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cli import Parser
from data import shapes
from data.latents import VAE, Codec
from storage.files import commit_json
from storage.weights import write_tensors
from training.autoencoder import Autoencoder, config, fit

FOLDER = Path(__file__).parents[1] / "assets" / "shapes" / "vae"
SCENES, UNSEEN, SEED = 20_000, 500, 1  # a seed that no store of examples uses
STEPS, BATCH, RATE, KL = 5000, 8, 1.5e-3, 0.01
CONFIG = config(channels=3, latent=4, widths=(16, 16, 32, 64), layers=1, groups=8, side=shapes.SIDE)


def pictures(first: int, count: int) -> Tensor:
    """Scenes (count, 3, 64, 64), uint8."""
    drawn = (np.asarray(shapes.picture(shapes.scene(SEED, i))) for i in range(first, first + count))
    return torch.from_numpy(np.stack(list(drawn))).movedim(-1, 1).contiguous()


def report(codec: Codec, unseen: Tensor) -> None:
    """Prints the error of decoded scenes, and the share in which the judge finds what was drawn."""
    back = torch.cat([codec.decode(codec.encode(part / 255)) for part in unseen.split(100)])
    error = (back - unseen / 255).square().mean((1, 2, 3))
    right = [
        shapes.fulfils(shapes.read(picture.movedim(0, -1).double().numpy()), shapes.scene(SEED, SCENES + i).request)
        for i, picture in enumerate(back)
    ]
    print(f"PSNR {-10 * error.log10().mean():.1f} dB; judged right after encoding and decoding: {np.mean(right):.1%}")


def main() -> None:
    Parser(description=__doc__).parse_args()
    torch.set_num_threads(1)  # a sum's order, hence its last bits, depends on the number of threads
    torch.manual_seed(0)
    scenes = pictures(0, SCENES)
    autoencoder = Autoencoder(CONFIG)

    def batch(step: int) -> Tensor:
        return scenes[torch.randint(SCENES, (BATCH,))] / 127.5 - 1

    fit(autoencoder, batch, STEPS, RATE, lambda step: KL * min(1, 5 * step / STEPS))
    network = autoencoder.vae
    network.eval()
    with torch.no_grad():
        latents = torch.cat([network.encode(part / 127.5 - 1).latent_dist.mean for part in scenes[:2000].split(100)])
    config = CONFIG | {"shift_factor": float(latents.mean()), "scaling_factor": float(1 / latents.std())}
    commit_json(FOLDER / "config.json", {"_class_name": "AutoencoderKL"} | config)
    write_tensors(network.half().state_dict(), FOLDER / "diffusion_pytorch_model.safetensors")
    print(f"latents: mean {latents.mean():.3f}, deviation {latents.std():.3f}")
    report(VAE(FOLDER), pictures(SCENES, UNSEEN))


if __name__ == "__main__":
    main()
