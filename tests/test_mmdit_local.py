"""MLPs that see the neighbouring image tokens: the convolution, growth, files, and a training."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import inputs, plain, stirred
from torch import nn
from trials import ROOT, fit, refused, small

from mmdit import checkpoint
from mmdit.layers import LocalMlp
from mmdit.model import MMDiT
from storage.weights import open_file, write_tensors


def grown() -> LocalMlp:
    mlp = LocalMlp(8)
    mlp.grow()
    return stirred(mlp)


def test_each_hidden_channel_is_convolved_over_the_places_of_the_tokens() -> None:
    mlp, x = grown(), torch.randn(2, 15, 8, generator=torch.Generator().manual_seed(0))
    assert mlp.local is not None
    assert mlp.local.bias is not None
    hidden = mlp.fc1(x).reshape(2, 3, 5, 32)  # 3 rows of 5 tokens
    around = F.pad(hidden, (0, 0, 1, 1, 1, 1))
    kernel = mlp.local.weight[:, 0]  # channels 3 3
    for row in range(3):
        for column in range(5):
            window = around[:, row : row + 3, column : column + 3]  # b 3 3 channels
            conv = torch.einsum("bijc,cij->bc", window, kernel) + mlp.local.bias
            expected = mlp.fc2(F.gelu(hidden[:, row, column] + conv, approximate="tanh"))
            torch.testing.assert_close(mlp(x, (3, 5))[:, 5 * row + column], expected, atol=1e-5, rtol=1e-5)


def test_only_neighbours_are_seen_in_one_mlp() -> None:
    mlp = grown()
    x = torch.randn(1, 49, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mlp(x, (7, 7))[0, 24].sum().backward()  # the token in the middle
    assert x.grad is not None
    seen = x.grad[0].abs().sum(-1).reshape(7, 7) > 0
    expected = torch.zeros(7, 7, dtype=torch.bool)
    expected[2:5, 2:5] = True
    assert torch.equal(seen, expected)


def test_a_network_grows_it_without_a_change_of_its_function() -> None:
    network = stirred(plain())
    z, t, condition = inputs(8, 6)
    before = network(z, t, condition)
    network.grow(local_mlp=True)
    assert torch.equal(network(z, t, condition), before)
    network.grow(local_mlp=True)  # which it has
    assert torch.equal(network(z, t, condition), before)
    assert not torch.equal(stirred(network)(z, t, condition), before)


def test_each_image_mlp_has_one_and_it_gets_a_gradient_from_zero() -> None:
    network = plain(local_mlp=True)
    for name, weight in network.named_parameters():
        if "local" not in name:
            weight.data += 0.1 * torch.randn_like(weight)
    z, t, condition = inputs()
    network(z, t, condition).square().sum().backward()
    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    assert set(layers) == {"blocks.0.image.mlp.local", "blocks.1.image.mlp.local"}
    assert all(layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0 for layer in layers.values())


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_it_comes_back_from_disk(tmp_path: Path, kind: str) -> None:
    network = stirred(plain(local_mlp=True))
    if kind == "folder":
        checkpoint.save(network, tmp_path / "transformer")
        back = checkpoint.load(tmp_path)
        assert "MMDiT" in (tmp_path / "transformer/config.json").read_text()  # diffusers cannot read it
    else:
        write_tensors(checkpoint.single_file(network), tmp_path / "model.safetensors")
        _, arguments = checkpoint.infer(open_file(tmp_path / "model.safetensors").under(checkpoint.PREFIX))
        assert arguments["local_mlp"]
        back = checkpoint.load(tmp_path / "model.safetensors")
    z, t, condition = inputs()
    assert back.local_mlp
    assert torch.equal(back(z, t, condition), network(z, t, condition))


def test_a_released_network_grows_it_as_it_is_read(tmp_path: Path) -> None:
    network = stirred(plain())
    checkpoint.save(network, tmp_path / "transformer")
    z, t, condition = inputs()
    assert torch.equal(checkpoint.load(tmp_path, local_mlp=True)(z, t, condition), network(z, t, condition))


def test_the_overlay_trains(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    overlay = ["--config", str(ROOT / "configs/network/local.yaml")]
    fit(small(tmp_path), *overlay)
    network = checkpoint.load(tmp_path / "run")
    assert isinstance(network, MMDiT)
    assert network.local_mlp
    assert any(weight.abs().sum() > 0 for name, weight in network.named_parameters() if name.endswith("local.weight"))
    assert "network.init_args.local_mlp is True there and False now" in refused(capsys, small(tmp_path))
