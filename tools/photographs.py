"""Writes the photographs of scikit-learn and scikit-image, with captions, as a small data set for trials.

python -m tools.photographs pictures            # a folder: NAME.jpg and NAME.txt
python -m tools.photographs shards --tar        # the same as two WebDataset tars, as img2dataset writes them
"""

import argparse
import io
import json
import tarfile
from collections.abc import Iterator

import numpy as np
from PIL import Image
from skimage import data as skimage_data
from sklearn.datasets import load_sample_image

from cli import Parser, output

# name → caption; the first two are scikit-learn's
CAPTIONS = {
    "china": "a Chinese temple with a golden roof",
    "flower": "a red flower in the sun",
    "astronaut": "a woman in an orange space suit",
    "cat": "the face of a cat",
    "coffee": "a cup of coffee on a table",
    "rocket": "a rocket on its pad at night",
    "camera": "a man with a camera on a tripod",
    "coins": "old coins on a dark ground",
    "moon": "craters of the moon",
    "page": "a page of printed text",
    "hubble_deep_field": "galaxies in the night sky",
    "immunohistochemistry": "brown and blue cells under a microscope",
    "clock": "a clock in motion",
    "brick": "a wall of bricks",
    "grass": "grass from above",
    "gravel": "grey gravel",
    "text": "handwriting on paper",
    "horse": "the outline of a horse",
    "colorwheel": "a wheel of all colours",
    "retina": "the retina of an eye",
}


def photographs() -> Iterator[tuple[str, Image.Image]]:
    """The photographs that are on this machine; some versions of scikit-image download a part of them."""
    for name in CAPTIONS:
        try:
            pixels = load_sample_image(f"{name}.jpg") if name in ("china", "flower") else getattr(skimage_data, name)()
        except Exception as error:  # pooch raises any error of its download
            print(f"{name} is not on this machine: {type(error).__name__}")
            continue
        pixels = np.asarray(pixels)
        pixels = (pixels * 255).astype(np.uint8) if pixels.dtype == bool else pixels
        yield name, Image.fromarray(pixels).convert("RGB")


def main() -> None:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=output)
    p.add_argument("--tar", action="store_true", help="two WebDataset tars instead of single files")
    args = p.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if any(args.folder.iterdir()):
        p.error(f"{args.folder} is not empty: give a new folder")
    for number, (name, picture) in enumerate(photographs()):
        content = io.BytesIO()
        picture.save(content, "JPEG", quality=95)
        caption = CAPTIONS[name]
        members = {"jpg": content.getvalue(), "txt": caption.encode()}
        if not args.tar:
            for field, value in members.items():
                (args.folder / f"{name}.{field}").write_bytes(value)
            continue
        members["json"] = json.dumps({"caption": caption, "key": f"{number:09}"}).encode()
        with tarfile.open(args.folder / f"{number % 2:05}.tar", "a") as tar:
            for field, value in members.items():
                member = tarfile.TarInfo(f"{number:09}.{field}")
                member.size = len(value)
                tar.addfile(member, io.BytesIO(value))
    print(f"Look at {args.folder}")


if __name__ == "__main__":
    main()
