"""MLPs of image tokens that are convolutions: the formula, what they see, files, and a training."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import inputs, plain, stirred
from trials import ROOT, fit, refused, small

from mmdit import checkpoint
from mmdit.layers import ConvMlp
from mmdit.model import MMDiT
from storage.weights import open_file, write_tensors


def convolved(x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A 3×3 convolution written out, x (B, rows, columns, channels)."""
    around = F.pad(x, (0, 0, 1, 1, 1, 1))
    shifted = [
        around[:, i : i + x.shape[1], j : j + x.shape[2]] @ kernel[:, :, i, j].T for i in range(3) for j in range(3)
    ]
    return torch.stack(shifted).sum(0) + bias


def test_tokens_are_convolved_over_their_places() -> None:
    mlp, x = stirred(ConvMlp(8)), torch.randn(2, 15, 8, generator=torch.Generator().manual_seed(0))
    assert mlp.conv1.bias is not None
    assert mlp.conv2.bias is not None
    hidden = F.silu(convolved(x.reshape(2, 3, 5, 8), mlp.conv1.weight, mlp.conv1.bias))  # 3 rows of 5 tokens
    expected = convolved(hidden, mlp.conv2.weight, mlp.conv2.bias).reshape(2, 15, 8)
    torch.testing.assert_close(mlp(x, (3, 5)), expected, atol=1e-5, rtol=1e-5)


def test_one_mlp_sees_two_tokens_far() -> None:
    x = torch.randn(1, 81, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    stirred(ConvMlp(8))(x, (9, 9))[0, 40].sum().backward()  # the token in the middle
    assert x.grad is not None
    seen = x.grad[0].abs().sum(-1).reshape(9, 9) > 0
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[2:7, 2:7] = True
    assert torch.equal(seen, expected)


def test_every_block_has_one_for_the_image_and_learns_it() -> None:
    network = stirred(plain(conv_mlp=True))
    z, t, condition = inputs()
    network(z, t, condition).square().sum().backward()
    layers = {name: module for name, module in network.named_modules() if isinstance(module, ConvMlp)}
    assert set(layers) == {"blocks.0.image.mlp", "blocks.1.image.mlp"}
    for weight in (weight for layer in layers.values() for weight in layer.parameters()):
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0


def test_it_starts_as_any_network_at_zero() -> None:
    z, t, condition = inputs()
    assert not plain(conv_mlp=True)(z, t, condition).any()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_it_comes_back_from_disk(tmp_path: Path, kind: str) -> None:
    network = stirred(plain(conv_mlp=True))
    if kind == "folder":
        checkpoint.save(network, tmp_path / "transformer")
        back = checkpoint.load(tmp_path)
        assert "MMDiT" in (tmp_path / "transformer/config.json").read_text()  # diffusers cannot read it
    else:
        write_tensors(checkpoint.single_file(network), tmp_path / "model.safetensors")
        _, arguments = checkpoint.infer(open_file(tmp_path / "model.safetensors").under(checkpoint.PREFIX))
        assert arguments["conv_mlp"]
        back = checkpoint.load(tmp_path / "model.safetensors")
    z, t, condition = inputs()
    assert back.conv_mlp
    assert torch.equal(back(z, t, condition), network(z, t, condition))


def test_the_overlay_trains(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fit(small(tmp_path), "--config", str(ROOT / "configs/network/conv.yaml"))
    network = checkpoint.load(tmp_path / "run")
    assert isinstance(network, MMDiT)
    assert network.conv_mlp
    assert "network.init_args.conv_mlp is True there and False now" in refused(capsys, small(tmp_path))
