"""Inception's features are torch-fidelity's, and a damaged file is refused."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from metrics.features import Inception, load_features


class RandomInception(FeatureExtractorInceptionV3):
    """torch-fidelity's own network with the weights it is born with."""

    def load_state_dict(self, state_dict, strict=True, assign=False):
        return None


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, file)
    torch.manual_seed(0)
    born = RandomInception("inception", ["2048"], feature_extractor_weights_path=str(file))
    torch.save(born.state_dict(), file)
    return file


def test_inception_gives_what_torch_fidelity_computes(inception_file: Path):
    """Grey pictures as RGB, 8 bits, and the layers by their own names."""
    inception = load_features(f"inception:{inception_file}")
    inception.chunk = 2
    grey = torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    pooled, spatial, logits = inception(grey)
    assert spatial is not None
    assert logits is not None
    own = FeatureExtractorInceptionV3(
        "own", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_file)
    )
    maps: list[Tensor] = []
    own.Mixed_6d.register_forward_hook(lambda _module, _inputs, output: maps.append(output))
    features, expected = own(torch.cat([grey, grey, grey], dim=1).mul(255).round().byte())
    scale = features.std().item()
    torch.testing.assert_close(pooled.float(), features, rtol=1e-3, atol=1e-3 * scale)
    torch.testing.assert_close(logits.float(), expected, rtol=1e-3, atol=1e-3 * expected.std().item())
    torch.testing.assert_close(spatial.float(), maps[0][:, :7].flatten(1), rtol=1e-3, atol=1e-3 * maps[0].std().item())
    assert (pooled.shape[1], spatial.shape[1]) == (inception.num_features, inception.num_spatial) == (2048, 2023)
    assert inception.name.startswith("inception-")
    with pytest.raises(ValueError, match="1 or 3 channels, got 4"):
        inception(torch.zeros(1, 4, 12, 12))


class Code:
    """Makes a folder as soon as it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("fault", ["missing", "truncated", "empty", "text", "foreign", "code"])
def test_damaged_inception_is_one_clear_line(inception_file: Path, tmp_path: Path, fault: str):
    file, words = tmp_path / "weights.pth", "is damaged or not torch-fidelity's"
    match fault:
        case "missing":
            words = "is missing: .*inception-2015-12-05"
        case "truncated":
            file.write_bytes(inception_file.read_bytes()[:-100_000])
        case "empty":
            file.write_bytes(b"")
        case "text":
            file.write_text("<html>not found</html>")
        case "foreign":
            torch.save({"weight": torch.zeros(3)}, file)
        case "code":
            torch.save({"weight": Code(tmp_path / "trace")}, file)
    with pytest.raises(FileNotFoundError if fault == "missing" else ValueError, match=words) as error:
        Inception(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "trace").exists()
