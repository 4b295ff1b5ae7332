"""Stochastic refinement: a network learns what a regressor leaves of the pictures (Whang et al. 2022)."""

from dataclasses import dataclass
from pathlib import Path

import torch

from data.latents import Codec
from data.module import Data
from data.text.encoder import TextEncoder
from flow.target import X0
from mmdit.network import Condition, Network
from pipeline.residual import Regressor
from training.teacher import read_frozen

MEASURED = 256  # pictures, at least


@dataclass(frozen=True)
class Residuals:
    """Learn the scaled residual (x0 − mean)·scale in place of x0. The model's folder holds the regressor, too.

    Args:
        regressor: a model folder or a run's folder of a model that gives the mean of what a picture may come from
            (`configs/picture/regressor.yaml`). It is shown the same condition as the network.
        scale: none is one over the residual's standard deviation, over the first pictures of the training. Checkpoints
            keep that, also for runs that begin with `--from`.
    """

    regressor: Path
    scale: float | None = None

    def load(self, codec: Codec, text: TextEncoder, network: Network) -> Regressor:
        """Loads the regressor. Its scale is 1 as long as it has to be measured.

        Args:
            codec: of the training.
            text: of the training.
            network: learns the residual.

        Raises:
            ValueError: in one line, if the model is no regressor, or does not fit the training.
            FileNotFoundError: there is no model.
        """
        named = f"residual.regressor {self.regressor}"
        own, process = read_frozen(named, self.regressor, codec, text)
        target = type(process.target).__name__
        if not isinstance(process.target, X0) or process.path(torch.ones(()))[0] > 1e-3:
            raise ValueError(f"{named} is no regressor: it learned {target} on {type(process.path).__name__}, and one "
                             "learns X0 of noise alone: train one with configs/picture/regressor.yaml")  # fmt: skip
        regressor = Regressor(own, 1.0 if self.scale is None else self.scale)
        regressor.check(network)
        return regressor

    def measure(self, regressor: Regressor, data: Data, device: torch.device) -> None:
        """Sets the regressor's scale, unless it is given. ValueError if nothing is left of the pictures."""
        if self.scale is not None:
            return
        regressor.network.to(device)
        data.setup("fit")
        squares, count, pictures = 0.0, 0, 0
        for batch in data.train_dataloader():
            batch = data.on_after_batch_transfer(batch.to(device), 0)
            left = regressor.residual(Condition(**batch.condition()), batch.x0.shape).of(batch.x0)
            squares, count = squares + left.double().square().sum().item(), count + left.numel()
            pictures += len(left)
            if pictures >= MEASURED:
                break
        if not squares:
            raise ValueError(f"residual.regressor {self.regressor} leaves nothing of the pictures to be learned")
        regressor.scale, regressor.measured = (count / squares) ** 0.5, True
