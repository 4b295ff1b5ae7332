"""Trains an autoencoder of your pictures, as `encode.py` and `evaluate.py --likelihood` read it.

    python -m tools.train_vae --data pictures/ --side 64 --out runs/vae
    python -m tools.train_vae --data digits --out runs/vae-digits
    python -m tools.train_vae --data pictures/ --side 64 --codes 256 --code-depth 4 --out runs/vq

For a folder of pictures the loss is the sum of |error| plus --kl times the divergence of the latents from N(0, I), and
with --perceptual also LPIPS, as in Stable Diffusion without its adversarial part. For the digits, and with --levels, it
is the evidence lower bound, and the folder also holds the decoder's variance. With --codes the latents are codes, by a
VQ-VAE, with --code-depth an RQ-VAE or with --two-levels a VQ-VAE-2, trained on the square error. Other latents come out
normalised. The same command resumes a training that was interrupted.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from cli import (
    Parser,
    add_overwrite_flag,
    find_device,
    finite,
    natural,
    one_line_errors,
    output,
    plain_warnings,
    positive,
    positives,
    purpose_of,
)
from data import digits
from data.latents import CONFIG, LIKELIHOOD, STEM
from data.raw.pictures import load_picture
from pipeline.likelihood import on_levels
from storage.files import commit_json, hold
from storage.purpose import claim_folder
from storage.weights import write_tensors
from tokens.codec import LATENTS, write_vqvae
from tokens.quantize import usage
from tokens.vqvae import VQVAE
from training.autoencoder import COMMITMENT, Autoencoder, CodedAutoencoder, config, fit, perceptual_network

STATE = "unfinished.pt"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MEASURED = 1000  # pictures that set shift and scale of the latents
RISE = 5  # the weight of the divergence rises over one RISE-th of the training


def parser() -> Parser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help="a folder with pictures, also in folders in it; or digits")
    p.add_argument("--out", type=output, required=True, help="folder of the autoencoder")
    p.add_argument("--side", type=positive, help="resize and crop pictures to this side in pixels; default: 256")
    p.add_argument("--latent", type=positive,
                   help="channels of the latents, or of the vector of a code; default: 4, of a code 16")  # fmt: skip
    p.add_argument("--widths", type=positives,
                   help="channels of each level, the last at the latents' size; default: 32,64,128,128; with --codes "
                        "after each halving; default: 32,64,128")  # fmt: skip
    p.add_argument("--layers", type=positive, default=1, help="residual blocks of a level; default: 1")
    p.add_argument("--groups", type=positive, default=8, help="groups of group normalisation; default: 8")
    p.add_argument("--codes", type=positive, help="make codes of the pictures, of a codebook of this size")
    p.add_argument("--code-depth", type=positive, help="codes of each place; default: 1")
    p.add_argument("--two-levels", action="store_true", help="codes on two grids, one twice as fine as the other")
    p.add_argument("--levels", type=positive, help="train on the evidence lower bound of pictures of so many levels")
    p.add_argument("--kl", type=finite, help="weight of the divergence; default: 0.01, with levels 1")
    p.add_argument("--perceptual", type=finite, default=0.0,
                   help="weight of LPIPS, whose VGG16 must be in torch's cache; default: 0")  # fmt: skip
    p.add_argument("--steps", type=positive, default=5000, help="default: 5000")
    p.add_argument("--batch-size", type=positive, default=32, help="default: 32")
    p.add_argument("--rate", type=finite, default=1.5e-3, help="highest learning rate; default: 0.0015")
    p.add_argument("--seed", type=natural, default=0, help="default: 0")
    p.add_argument("--device", help="cpu, cuda, …; default: cuda if there is a GPU")
    add_overwrite_flag(p)
    return p


def reader(args: argparse.Namespace) -> tuple[Callable[[int], Tensor], int, int]:
    """Number → picture (C, side, side) in [0, 1], how many there are, and the side. Errors are those of bad input."""
    if args.data == "digits":
        if args.side not in (None, digits.SIDE):
            raise ValueError(f"digits have a side of {digits.SIDE}: leave --side out")
        pixels = digits.load("train").pixels
        return pixels.__getitem__, len(pixels), digits.SIDE
    side, folder = args.side or 256, Path(args.data)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: give one with pictures, or digits")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"{folder} holds no pictures ({', '.join(SUFFIXES)})")
    load_picture(files[0], 3, side, side, 1)  # fails now if it can't be read
    return lambda i: load_picture(files[i], 3, side, side, 1)[0], len(files), side


def check(args: argparse.Namespace, side: int, picture: Tensor) -> None:
    """ValueError in one line if the sizes do not fit each other."""
    if args.codes:
        if args.levels or args.perceptual or args.kl is not None or args.groups != 8:
            raise ValueError("--codes goes without --levels, --kl, --perceptual and --groups: leave them out")
    elif args.code_depth or args.two_levels:
        raise ValueError("--code-depth and --two-levels need --codes: give the size of the codebook")
    halvings = len(args.widths) - (0 if args.codes else 1)
    if side % 2**halvings:
        raise ValueError(f"a side of {side} cannot be halved {halvings} times: give fewer --widths")
    if any(width % args.groups for width in args.widths):
        raise ValueError(f"--widths must be multiples of --groups {args.groups}, got {args.widths}")
    if args.perceptual < 0 or (args.perceptual and (args.levels or args.data == "digits")):
        raise ValueError("--perceptual must be at least 0, and does not go with --levels nor with digits")
    if args.perceptual and side < 16:
        raise ValueError(f"LPIPS halves pictures four times: give a --side of at least 16, not {side}")
    if args.levels == 1:
        raise ValueError("--levels must be at least 2")
    if args.levels:
        on_levels(picture, args.levels)
    if args.rate <= 0 or (args.kl is not None and args.kl < 0):
        raise ValueError(f"--rate must be above 0 and --kl at least 0, got {args.rate:g} and {args.kl}")


def train(args: argparse.Namespace, picture: Callable[[int], Tensor], count: int, side: int, device: str) -> None:
    """Trains and writes the autoencoder."""
    torch.manual_seed(args.seed)
    channels = len(picture(0))

    def batch(step: int) -> Tensor:
        # The seed of the step is also that of the posterior's noise, so that a resumed training is the same.
        torch.manual_seed(((args.seed << 32) + step) % 2**63)
        rows = torch.randint(count, (args.batch_size,)).tolist()
        return 2 * torch.stack([picture(row) for row in rows]).to(device) - 1

    def some() -> Iterator[Tensor]:
        return (2 * picture(i)[None].to(device) - 1 for i in range(min(count, MEASURED)))

    if args.codes:
        coded = coded_of(args, channels).to(device)
        fit(coded, batch, args.steps, args.rate, lambda step: COMMITMENT, args.out / STATE)
        used = write_coded(coded.vqvae.eval(), some(), args.out)
        (args.out / STATE).unlink(missing_ok=True)
        print(f"{args.out}: {used:.0%} of {args.codes} codes in use, {coded.vqvae.stack} for each place, "
              f"factor {coded.vqvae.factor}")  # fmt: skip
        return
    levels = args.levels or (digits.LEVELS if args.data == "digits" else None)
    kl = (1.0 if levels else 0.01) if args.kl is None else args.kl
    sizes = config(channels, args.latent, args.widths, args.layers, args.groups, side)
    autoencoder = Autoencoder(sizes, levels, args.perceptual).to(device)
    state = args.out / STATE
    fit(autoencoder, batch, args.steps, args.rate, lambda step: kl * min(1, RISE * (step + 1) / args.steps), state)
    vae = autoencoder.vae.eval()
    with torch.no_grad():
        latents = torch.cat([vae.encode(one).latent_dist.mean for one in some()])
    moments = {"shift_factor": float(latents.mean()), "scaling_factor": float(1 / latents.std())}
    write_tensors(vae.state_dict(), args.out / f"{STEM}.safetensors")
    if autoencoder.log_variance is not None:
        spread = {"levels": levels, "log_variance": float(autoencoder.log_variance)}
        commit_json(args.out / LIKELIHOOD, spread)
    commit_json(args.out / CONFIG, {"_class_name": "AutoencoderKL"} | sizes | moments)
    (args.out / STATE).unlink(missing_ok=True)
    print(f"{args.out}: an autoencoder with {args.latent} channels, factor {2 ** (len(args.widths) - 1)}")


def coded_of(args: argparse.Namespace, channels: int) -> CodedAutoencoder:
    """The autoencoder of codes of these sizes; ValueError in one line if they do not fit."""
    vqvae = VQVAE(channels, tuple(args.widths), args.layers, args.codes, args.latent, args.code_depth or 1,
                  2 if args.two_levels else 1)  # fmt: skip
    return CodedAutoencoder(vqvae)


def write_coded(vqvae: VQVAE, pictures: Iterable[Tensor], folder: Path, dtype: torch.dtype = torch.float32) -> float:
    """Writes an autoencoder of codes. Returns the share of its codes that occur in the pictures, each in [−1, 1]."""
    codes, vectors = [], [torch.zeros(1)]
    with torch.no_grad():
        for picture in pictures:
            codes.append(vqvae(picture).codes.flatten())
            if vqvae.levels == 1:
                vectors.append(vqvae.vectors(picture).flatten().cpu())
    numbers = torch.cat(vectors)[1:]
    shift, scale = (float(numbers.mean()), float(1 / numbers.std())) if len(numbers) else (0.0, 1.0)
    write_vqvae(vqvae.to(dtype), folder, shift, scale)
    return usage(torch.cat(codes), vqvae.size)[1]


def main(argv: list[str] | None = None) -> None:
    plain_warnings()
    args = parser().parse_args(argv)
    with one_line_errors(ValueError, FileNotFoundError):
        picture, count, side = reader(args)
        args.widths = args.widths or ([32, 64, 128] if args.codes else [32, 64, 128, 128])
        args.latent = args.latent or (16 if args.codes else 4)
        check(args, side, picture(0))
        device = find_device(args.device)
        if args.perceptual:
            perceptual_network()  # fails now if it is not there
        if args.codes:
            coded_of(args, len(picture(0)))  # likewise
        with hold(args.out):
            purpose = purpose_of("tools.train_vae", args) | {"batch_size": args.batch_size}
            claim_folder(args.out, purpose, [STATE, LIKELIHOOD, LATENTS, f"{STEM}.safetensors", CONFIG], args.overwrite)
            if (args.out / CONFIG).exists():  # written last
                print(f"{args.out} is trained already; --overwrite only replaces one of other settings")
                return
            train(args, picture, count, side, device)


if __name__ == "__main__":
    main()
