"""Trainings of a small random released model by the shipped configs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny

import train
from training.generator import Generator

ROOT = Path(__file__).parents[1]
FINETUNE, LORA, FEWSTEP, NFT = (
    ROOT / f"configs/sd3/{name}.yaml" for name in ("finetune", "lora", "fewstep-lora", "nft-lora")
)


def settings(base: Path, store: Path, configs: tuple[Path, ...], folder: Path, steps: int) -> list[str]:
    """Flags that make the shipped configs small."""
    argv = [arg for config in configs for arg in ("--config", str(config))]
    changes = {
        "run.folder": folder, "run.steps": steps, "run.validate_every": 2, "run.checkpoint_every": 2,
        "run.log_every": 1, "run.precision": "32-true", "run.accelerator": "cpu",
        "text.init_args.folder": base, "codec.init_args.path": base, "network.init_args.path": base,
        "text.init_args.tokens_dim": tiny.TOKENS, "text.init_args.pooled_dim": tiny.POOLED,
        "text.init_args.dtype": "float32", "text.init_args.max_sequence_length": 8,
        "encode.store": store, "data.store": store, "data.held_out": 3, "data.workers": 0,
        "optimization.warmup": 1, "optimization.lr": 1e-3, "ema.decay": 0.5,
        "sampling.steps": 2, "grid.columns": 1,
    }  # fmt: skip
    for name, value in changes.items():
        argv += [f"--{name}", str(value)]
    return argv


def fit(
    base: Path, store: Path, folder: Path, *flags: str, configs: tuple[Path, ...] = (FINETUNE,), steps: int = 4
) -> None:
    train.main(["fit", *settings(base, store, configs, folder, steps), *flags])


@contextmanager
def faulty_after(step: int) -> Iterator[None]:
    """Within it a training ends with an error after so many steps."""
    draw = Generator.draw_samples

    def fault(self: Generator) -> None:
        if self.global_step == step:
            raise OSError("the disk fell off")
        draw(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "draw_samples", fault)
        with pytest.raises(SystemExit):
            yield
