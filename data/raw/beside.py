"""Pictures that lie beside the inputs, under the same names: hints from files, and masks of the loss."""

from pathlib import Path
from typing import Any, final

from PIL import Image, ImageOps

from data.raw.base import EXTENSIONS, Raw, original
from data.raw.pictures import PictureError, open_picture, size_of


def stem(name: str) -> str:
    """The id of an input without what stands for its variants and its format."""
    return str(Path(original(name)).with_suffix(""))


class Beside:
    """The pictures of a folder, by the inputs that they belong to.

    Args:
        folder: `FOLDER/a/b.png` belongs to the input `a/b.jpg`; with an ending, `FOLDER/a/bENDING.png` does.
        what: each of them is.
        ending: of their names, before the dot; other files are ignored.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: two of them belong to one input.
    """

    def __init__(self, folder: Path, what: str, ending: str = "") -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder} of {what}s")
        self.folder, self.files = folder, dict[str, Path]()
        for file in sorted(f for f in folder.rglob("*") if f.suffix[1:].lower() in EXTENSIONS):
            name = str(file.relative_to(folder).with_suffix(""))
            if name.endswith(ending) and self.files.setdefault(name.removesuffix(ending), file) != file:
                raise ValueError(f"{file} has the name of another {what}, in another format: remove one of them")

    def of(self, raw: Raw) -> Path | None:
        """The file that belongs to an input, if there is one."""
        return self.files.get(stem(raw.id))

    def describe(self) -> dict[str, int]:
        """The files' names and sizes in bytes, as JSON."""
        return {name: file.stat().st_size for name, file in self.files.items()}


@final
class Masks:
    """Pictures in grey that say how much each place of a picture counts in the loss: white all, black nothing.

    A mask has the size of its picture. Its transparent pixels are black.

    Args:
        folder: `FOLDER/a/b.png` is the mask of the input `a/b.jpg`.
        ending: of the masks' names, as in `b.mask.png` for `.mask`. Then the folder may be that of the pictures: an
            input whose name ends so is no picture.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: two masks belong to one input, or there are none.
    """

    def __init__(self, folder: Path, ending: str = "") -> None:
        self.ending, self.beside = ending, Beside(folder, "mask", ending)
        if not self.beside.files:
            raise ValueError(f"{folder} has no masks: give the folder of NAME{ending}.png for each picture NAME.*")

    def is_mask(self, name: str) -> bool:
        """Whether the input of this id is a mask that lies among the pictures."""
        return bool(self.ending) and stem(name).endswith(self.ending)

    def __call__(self, raw: Raw, size: tuple[int, int]) -> Image.Image:
        """The mask of an input, "L".

        Args:
            raw: the input.
            size: height and width of its upright picture, in pixels.

        Raises:
            PictureError: there is none, or it has another size.
        """
        file = self.beside.of(raw)
        if file is None:
            raise PictureError("no mask", f"{self.beside.folder} has no mask of this name")
        if (own := size_of(file)) != size:
            (h, w), (mask_h, mask_w) = size, own
            raise PictureError("mask size", f"its mask has {mask_h}×{mask_w} pixels and the picture {h}×{w}")
        found = open_picture(file, 1)
        return ImageOps.mirror(found) if raw.mirrored else found

    def describe(self) -> dict[str, Any]:
        """A description, as JSON. It changes if masks change."""
        return {"ending": self.ending, "files": self.beside.describe()}
