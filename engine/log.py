"""The local log: one JSON object a line; lines are only appended."""

import json
from math import isfinite
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only


class JSONLinesLogger(Logger):
    """Appends metrics to a file. A resumed run appends to the same file; the last line of a step counts.

    Args:
        file: the log.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    @property
    def name(self) -> str:
        return self.file.stem

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.file.parent)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Appends one line: the step and the metrics, null if not finite. Lightning's epoch is left out."""
        values = {name: value if isfinite(value) else None for name, value in metrics.items() if name != "epoch"}
        if values:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a+b") as out:
                if out.tell() and (out.seek(-1, 2), out.read(1))[1] != b"\n":  # a full disk cut the last line short
                    out.write(b"\n")
                out.write((json.dumps({"step": step} | values, allow_nan=False) + "\n").encode())

    @rank_zero_only
    def log_hyperparams(self, *_: Any) -> None:
        """Does nothing: the resolved config is beside the log."""
