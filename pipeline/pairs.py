"""Reflow's coupling: pairs of noise and the picture that a model makes from it, as a store to train from.

Liu et al. 2022, algorithm 1: pairs (z at t = 1, z at t = 0) of a model's own trajectories. A network that learns them
has straighter trajectories, and a network that learns its pairs has still straighter ones. The noise is the same on
every machine, and pairs are made in blocks, so that a store is a function of model, prompts and settings alone.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.order import Use, normal, order, stream
from data.store import samples as stored
from data.store.mixture import divided, held_out
from data.store.reader import VERSION, Sample, Store, Writer
from data.store.samples import PAIR
from data.text.encoder import Text
from pipeline import Pipeline
from pipeline.sampling import Sampling

UNIT, SHARD = 512, 2048  # pairs


class Captions:
    """The prompts of the pairs: the lines of a text file, or the captions of a store's samples.

    Args:
        source: prompts; or a store, whose samples can also be inverted.
        seed: seed of the order, and of the choice among the captions of a sample.
        apart: number of held-out samples, which are not used: those that training with this `data.held_out` leaves out.

    Raises:
        ValueError: the store has no other samples.
    """

    def __init__(self, source: Sequence[str] | Store, seed: int = 0, apart: int = 0) -> None:
        self.source, self.seed = source, seed
        if isinstance(source, Store):
            if not 0 <= apart < len(source):
                raise ValueError(f"held-out must be from 0 to below the store's {len(source)} samples, got {apart}")
            self.rows = np.concatenate(divided(source, held_out(source, apart), False))
            self.identity: dict[str, Any] = {"store": source.report["index"], "held_out": apart}
        else:
            self.rows = np.arange(len(source))
            self.identity = {"prompts": sha256("\n".join(source).encode()).hexdigest()[:16]}
        self.rows = self.rows[order(seed, len(self.rows), 0)]

    def row(self, number: int) -> int:
        """The line or sample of pair `number`. After the last row the first one follows again."""
        return int(self.rows[number % len(self.rows)])

    def __getitem__(self, number: int) -> str:
        row = self.row(number)
        if not isinstance(self.source, Store):
            return self.source[row]
        u = stream(self.seed, Use.CAPTION, 0, number).random()
        return self.source.captions(row)[stored.chosen(self.source.weights(row), u)]

    def check_invertible(self, size: tuple[int, int], codec: dict[str, Any]) -> None:
        """ValueError unless the samples are single latents of this codec and of pictures of this size (H, W)."""
        if not isinstance(self.source, Store) or self.source.plan["latents"] not in ("mean", "draw"):
            raise ValueError("only samples of a store with latents mean or draw can be inverted: leave out --invert")
        self.source.expect(codec=codec)
        sizes = [s for i, s in enumerate(self.source.buckets) if len(self.source.members(i))]
        if sizes != [size]:
            raise ValueError(
                f"only pictures of {size[0]}×{size[1]} can be inverted, and {self.source.source} has other sizes"
            )

    def latents(self, numbers: np.ndarray) -> Tensor:
        """The latents of the samples of these pairs, (n, C, h, w) float32."""
        assert isinstance(self.source, Store)
        return self.source.latents(np.array([self.row(int(n)) for n in numbers])).float()


@dataclass(frozen=True)
class Coupling:
    """How many pairs are made, and how.

    Args:
        num: number of all pairs.
        inverted: how many of them, the last ones, are real samples of a store with their noise, found by solving the
            model's ODE backward (Lee et al. 2024; Kim et al. 2025, "Balanced Conic Rectified Flow").
        seed: seed of the noise.
        batch_size: pairs in a block; another size rounds differently.
        sampling: how the model is sampled; the student also learns its guidance.
    """

    num: int
    inverted: int
    seed: int
    batch_size: int
    sampling: Sampling

    def __post_init__(self) -> None:
        if not 0 <= self.inverted <= self.num:
            raise ValueError(f"inverted pairs must be from 0 to all {self.num}, got {self.inverted}")


class PairMaker:
    """Fills a store with pairs. Shards that are done are not made again.

    Args:
        pipe: the model.
        fingerprint: hash of its weights (`storage.models.fingerprint`); the training checks that its teacher has it.
        captions: the prompts.
        how: number of pairs, seed and sampling.
        folder: folder of the store.

    Raises:
        ValueError: the folder holds a store of other pairs, or the sampling does not fit.
    """

    def __init__(self, pipe: Pipeline, fingerprint: str, captions: Captions, how: Coupling, folder: Path) -> None:
        self.pipe, self.captions, self.how = pipe, captions, how
        self.latent, _, _ = pipe.plan(how.sampling)
        height, width = (side * pipe.codec.factor for side in self.latent)
        self.size = height, width
        how.sampling.refuse_noise()
        if how.inverted:
            captions.check_invertible((height, width), pipe.codec.fingerprint())
            how.sampling.walk(pipe.objective, pipe.shift(), backward=True)
        pipe.refuse_codes()
        plan = {
            "version": VERSION,
            "codec": pipe.codec.fingerprint(),
            "text": pipe.text.fingerprint(),
            "tokens": True,
            "latents": PAIR,
            "seed": how.seed,
            "factor": pipe.codec.factor,
            "channels": 2 * pipe.codec.channels,
            "buckets": {"side": height, "step": pipe.codec.factor, "max_aspect": 1.0, "sizes": [[height, width]]},
            "teacher": fingerprint,
            "source": {"sampling": asdict(how.sampling), "shift": pipe.shift(), **captions.identity},
            "pairs": {"num": how.num, "inverted": how.inverted, "batch_size": how.batch_size},
        }
        tokens, pooled = pipe.text.encode([""])
        self.writer = Writer(folder, plan, Text(tokens[0].cpu(), pooled[0].cpu()))

    def run(self, rank: int = 0, world: int = 1) -> dict[str, Any] | None:
        """Makes this rank's shards. Returns the store's report if the shards of all ranks are done, otherwise None."""
        shards = -(-self.how.num // SHARD)
        own = [range(s * SHARD, min((s + 1) * SHARD, self.how.num)) for s in range(shards)]
        total = sum(len(own[shard]) for shard in range(rank, shards, world))
        with tqdm(total=total, desc="pairs", unit="pair") as bar:
            for shard in range(rank, shards, world):
                with self.writer.hold(shard):
                    self._fill(shard, own[shard], bar)
        return self.writer.finish(shards, None)

    def _fill(self, shard: int, own: range, bar: tqdm) -> None:
        """Makes the rest of a shard's pairs."""
        _, start, finished = self.writer.position(shard)
        bar.update(start)
        while not finished:
            numbers = np.array(own[start : start + UNIT])
            samples = []
            for block in np.split(numbers, range(self.how.batch_size, len(numbers), self.how.batch_size)):
                samples += self.block(block)
                bar.update(len(block))
            start += len(numbers)
            finished = start >= len(own)
            self.writer.write(shard, samples, [], len(numbers), finished)

    def noise(self, numbers: np.ndarray) -> Tensor:
        """The noise of the pairs with these numbers, (n, C, h, w), rounded to bfloat16 as the store holds it."""
        return normal(self.how.seed, Use.PAIR, 0, numbers, (self.pipe.codec.channels, *self.latent)).bfloat16().float()

    def block(self, numbers: np.ndarray) -> list[Sample]:
        """Makes the pairs of one block, for consecutive numbers."""
        captions = [self.captions[int(number)] for number in numbers]
        real = numbers >= self.how.num - self.how.inverted
        x0, noise = (torch.empty(len(numbers), self.pipe.codec.channels, *self.latent) for _ in range(2))
        for inverted in np.unique(real):
            chosen = np.flatnonzero(real == inverted)
            start = self.captions.latents(numbers[chosen]) if inverted else self.noise(numbers[chosen])
            prompts = [captions[i] for i in chosen]
            ended = self.pipe.integrate(start, prompts, self.how.sampling, backward=bool(inverted)).cpu()
            x0[chosen], noise[chosen] = (start, ended) if inverted else (ended, start)
        text = self.pipe.text.encode(captions)
        tokens, pooled = (part.to(torch.bfloat16).cpu().split(1) for part in text)
        rows = zip(numbers, captions, torch.cat([x0, noise], dim=1), pooled, tokens, strict=True)
        return [
            Sample(f"{number:08d}", (caption,), (1.0,), 0, self.size, (0, 0), 0, pair, *encoded)
            for number, caption, pair, *encoded in rows
        ]
