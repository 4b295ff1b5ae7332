"""Drawn pictures by their rewards: choices between them (`sample.py prefer`), the best of them (`sample.py rerank`)."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from data.raw.pictures import load_picture, save_png, sheet
from flow.preference import DPO
from pipeline.drawing import entries_in
from storage.files import commit_bytes, replace_folder
from training.experiment import Parser
from training.rewards import Reward, total

DESCRIPTION = """Judges the pictures of a folder by rewards and writes choices between those of one prompt.

The best picture is preferred to the worst, the second best to the second worst. Equally good ones are left out.
encode.py makes a store of the choices, from which `judgement.loss: DPO` learns."""


RERANKED = """Keeps the best pictures of each prompt by rewards, as DALL·E does by CLIP (Ramesh et al. 2021, §2.6).

They are copied into another folder, with their settings and a sheet, one prompt a row and the best first."""


class Rated(NamedTuple):
    """A prompt with its pictures and their rewards."""

    caption: str
    files: list[str]
    rewards: torch.Tensor  # (n,)


def parser(name: str, description: str) -> Parser:
    """What both commands are told: a folder, and the rewards."""
    p = Parser(prog=f"sample.py {name}", description=description)
    p.add_argument("folder", type=Path, help="a folder that sample.py drew into, several pictures for each prompt")
    p.add_argument("--rewards", type=list[Reward], required=True,
                   help="as in judgement.rewards: '[{class_path: RightShapes}]'; several are added")  # fmt: skip
    return p


def groups(folder: Path, least: int = 2) -> dict[str, list[str]]:
    """The files of each prompt of which a folder has at least so many pictures.

    Raises:
        FileNotFoundError: nothing was drawn there.
        ValueError: there is no such prompt.
    """
    if not (folder / "samples.json").is_file():
        raise FileNotFoundError(f"{folder} has no samples.json: give a folder that sample.py drew into")
    found: dict[str, list[str]] = {}
    for entry in entries_in(folder):
        found.setdefault(entry["prompt"], []).append(entry["file"])
    kept = {caption: files for caption, files in found.items() if len(files) >= least}
    if not kept:
        raise ValueError(f"{folder} has one picture of each prompt, and choices need two: draw with --num-images 4")
    return kept


def judged(folder: Path, rewards: Sequence[Reward], least: int = 2) -> Iterator[Rated]:
    """All prompts of a folder with at least so many pictures, judged."""
    for caption, files in tqdm(groups(folder, least).items(), desc="judging", unit="prompt"):
        with Image.open(folder / files[0]) as first:
            channels = 1 if first.mode == "L" else 3
        pictures = [load_picture(folder / file, channels, None, None, 1) for file in files]
        found = torch.cat([total(rewards, picture, [caption]) for picture in pictures])
        yield Rated(caption, files, found)


def choices(one: Rated) -> list[dict[str, Any]]:
    """The choices between the pictures of a prompt, as DPO pairs a group."""
    order, worth = DPO().advice(one.rewards[None])
    rows = []
    for (better, worse), unequal in zip(order[0].view(-1, 2).tolist(), worth[0, ::2].tolist(), strict=True):
        if unequal:
            rewards = [one.rewards[better].item(), one.rewards[worse].item()]
            rows.append(
                {"caption": one.caption, "better": one.files[better], "worse": one.files[worse], "rewards": rewards}
            )
    return rows


def prefer(argv: list[str]) -> None:
    """The command `prefer`."""
    p = parser("prefer", DESCRIPTION)
    p.add_argument("--out", type=Path, help="the file of choices; default: FOLDER/choices.jsonl")
    p.add_argument("--overwrite", action="store_true", help="replace the file")
    args = p.instantiate(p.parse_args(argv))
    out = args.out or args.folder / "choices.jsonl"
    if out.exists() and not args.overwrite:
        raise FileExistsError(f"{out} exists: give --overwrite, or another --out")
    if out.parent.resolve() != args.folder.resolve():
        raise ValueError(f"--out {out} must lie in {args.folder}, since it names pictures there")
    found = list(judged(args.folder, args.rewards))
    rows = [row for one in found for row in choices(one)]
    if not rows:
        raise ValueError(f"the rewards find all pictures of each prompt in {args.folder} equally good: draw more")
    commit_bytes(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    mean = torch.cat([one.rewards for one in found]).mean()
    print(f"{len(rows)} choices from {len(found)} prompts are in {out}; the mean reward is {mean:.3f}")


def rerank(argv: list[str]) -> None:
    """The command `rerank`."""
    p = parser("rerank", RERANKED)
    p.add_argument("--keep", type=int, default=1, help="pictures of each prompt; default: 1")
    p.add_argument("--out", type=Path, help="a folder that is not there yet; default: FOLDER/best")
    args = p.instantiate(p.parse_args(argv))
    out = args.out or args.folder / "best"
    if args.keep < 1:
        raise ValueError(f"--keep must be at least 1, got {args.keep}")
    if out.exists():
        raise FileExistsError(f"{out} exists: remove it, or give another --out")
    few = {caption: len(files) for caption, files in groups(args.folder, 1).items() if len(files) < args.keep}
    if few:
        caption, count = next(iter(few.items()))
        raise ValueError(f"there are {count} pictures of {caption!r}: give --keep up to that")
    found = list(judged(args.folder, args.rewards, 1))
    kept = [(one, one.rewards.argsort(descending=True, stable=True)[: args.keep].tolist()) for one in found]
    files = [one.files[number] for one, numbers in kept for number in numbers]
    entries = {entry["file"]: entry for entry in entries_in(args.folder)}
    text = json.dumps([entries[file] for file in files], indent=2, ensure_ascii=False) + "\n"
    first, *others = [load_picture(args.folder / file, 3, None, None, 1) for file in files]
    pictures = [first, *(F.interpolate(other, size=first.shape[-2:], mode="area") for other in others)]

    def fill(new: Path) -> None:
        for file in files:
            commit_bytes(new / file, (args.folder / file).read_bytes())
        commit_bytes(new / "samples.json", text.encode())
        save_png(sheet(torch.cat(pictures), args.keep), new / "sheet.png")

    replace_folder(out, fill)
    best = torch.cat([one.rewards[numbers] for one, numbers in kept]).mean()
    print(f"{len(files)} of {sum(len(one.files) for one in found)} pictures are in {out}, their mean reward is "
          f"{best:.3f}, that of all {torch.cat([one.rewards for one in found]).mean():.3f}")  # fmt: skip
