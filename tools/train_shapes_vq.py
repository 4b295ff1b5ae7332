"""Trains the autoencoder of the shapes' codes and writes `assets/shapes/vq/`.

    python -m tools.train_shapes_vq

A VQ-VAE (`tokens.vqvae`) of one code for each of 8 × 8 places, on scenes drawn for it. At the end it prints the quality
of decoded unseen scenes and the use of the codebook. It takes about five minutes on one core. The weights are stored in
half precision.
"""

import torch
from torch import Tensor

from cli import Parser
from tokens.codec import VQ
from tokens.quantize import usage
from tokens.vqvae import VQVAE
from tools.train_shapes_vae import FOLDER as VAE_FOLDER
from tools.train_shapes_vae import SCENES, UNSEEN, pictures, report
from tools.train_vae import write_coded
from training.autoencoder import COMMITMENT, CodedAutoencoder, fit

FOLDER = VAE_FOLDER.parent / "vq"
STEPS, BATCH, RATE = 3000, 16, 2e-3


def main() -> None:
    Parser(description=__doc__).parse_args()
    torch.set_num_threads(1)  # a sum's order, hence its last bits, depends on the number of threads
    torch.manual_seed(0)
    scenes = pictures(0, SCENES)
    autoencoder = CodedAutoencoder(VQVAE(widths=(32, 32, 64)))

    def batch(step: int) -> Tensor:
        return scenes[torch.randint(SCENES, (BATCH,))] / 127.5 - 1

    fit(autoencoder, batch, STEPS, RATE, lambda step: COMMITMENT)
    vqvae = autoencoder.vqvae.eval().half().float()  # what is stored
    write_coded(vqvae, (part / 127.5 - 1 for part in scenes[:2000].split(100)), FOLDER, torch.float16)
    codec, unseen = VQ(FOLDER), pictures(SCENES, UNSEEN)
    report(codec, unseen)
    perplexity, share = usage(torch.cat([codec.encode(part / 255).long() for part in unseen.split(100)]), vqvae.size)
    print(f"perplexity of the codes {perplexity:.0f}, {share:.0%} of them in use")


if __name__ == "__main__":
    main()
