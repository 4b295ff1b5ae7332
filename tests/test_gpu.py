"""The checks of `python -m benchmarks.gpu`, as tests. They need a GPU: what a CPU can tell is in test_device_waits."""

import pytest
import torch

from benchmarks.gpu.correctness import CHECKS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str) -> None:
    for check in CHECKS[name](torch.device("cuda")):
        assert check.found <= check.most, check
