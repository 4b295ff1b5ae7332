"""Networks with a second time or a guidance scale as inputs: the same function at first, and kept on disk."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel, SD3Transformer2DModel
from networks import inputs, plain, relative, stirred
from torch import Tensor

from flow.meanflow import MeanFlow
from flow.objective import Interval, Objective
from mmdit import checkpoint
from mmdit.model import EMBEDDINGS, Condition, MMDiT
from storage.text import read_json
from storage.weights import open_file, write_tensors

TOLD = [("two_times",), ("guidance_embeds",), ("level_embeds",), ("two_times", "guidance_embeds")]


def fully_told(network: MMDiT, t: Tensor, condition: Condition) -> tuple[Condition, Tensor | None]:
    if network.guidance_embeds:
        condition = condition._replace(guidance=torch.linspace(1, 7, len(t)))
    if network.level_embeds:
        condition = condition._replace(level=torch.linspace(0, 1, len(t)))
    return condition, t / 3 if network.two_times else None


@torch.no_grad()
@pytest.mark.parametrize("numbers", TOLD, ids="+".join)
def test_a_network_with_further_inputs_starts_as_the_same_function(numbers: tuple[str, ...], tmp_path: Path) -> None:
    network = stirred(plain())
    z, t, condition = inputs()
    before = network(z, t, condition)
    checkpoint.save(network, tmp_path)
    loaded = checkpoint.load(tmp_path, **dict.fromkeys(numbers, True))
    for number in numbers:
        network.grow(**{number: True})
    for some in (network, loaded):
        assert [number for number in EMBEDDINGS if getattr(some, number)] == list(numbers)
        more, end = fully_told(some, t, condition)
        assert torch.equal(some(z, t, more, end), before)
    half = checkpoint.load(tmp_path, "bfloat16", **dict.fromkeys(numbers, True))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_adding_an_input_twice_changes_nothing() -> None:
    network = stirred(plain(**dict.fromkeys(EMBEDDINGS, True)))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for number in EMBEDDINGS:
        network.grow(**{number: True})
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@torch.no_grad()
def test_the_output_depends_on_a_learned_embedding() -> None:
    z, t, condition = inputs()
    network = stirred(plain())
    network.grow(two_times=True)
    network.span.fc2.weight.normal_(std=0.1)
    out = network(z, t, condition)
    assert torch.equal(network(z, t, condition, t), out)  # none is t itself
    ends = [network(z, t, condition, share * t) for share in (0.0, 0.5, 0.9)]
    assert all(relative(end, out) > 1e-3 for end in ends)
    assert relative(ends[0], ends[1]) > 1e-3

    network = stirred(plain())
    network.grow(guidance_embeds=True)
    network.guidance.fc2.weight.normal_(std=0.1)
    outs = [network(z, t, condition._replace(guidance=torch.full((4,), scale))) for scale in (1.0, 1.2, 4.0, 7.0)]
    assert all(relative(a, b) > 1e-3 for a, b in pairwise(outs))
    mixed = network(z, t, condition._replace(guidance=torch.tensor([1.0, 4.0, 7.0, 1.0])))
    picked = torch.stack([outs[0][0], outs[2][1], outs[3][2], outs[0][3]])
    assert relative(mixed, picked) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("name", "turns"), [("two_times", 10.0), ("guidance_embeds", 1.0), ("level_embeds", 1000.0)])
def test_a_number_is_embedded_as_t_is_at_a_scale_of_its_own(name: str, turns: float) -> None:
    """With the weights of t's embedding, a number and t may change places: both are added up."""
    network = stirred(plain(**{name: True}))
    network.get_submodule(EMBEDDINGS[name]).load_state_dict(network.time.state_dict())
    z, t, condition = inputs()
    number = torch.linspace(0.2, 0.8, 4)

    def output(t: Tensor, number: Tensor) -> Tensor:
        if name == "two_times":
            return network(z, t, condition, t - number)
        return network(z, t, condition._replace(**{EMBEDDINGS[name]: number}))

    assert relative(output(t, number), output(turns / 1000 * number, 1000 / turns * t)) < 1e-3
    assert relative(output(t, number), output(t, number + 0.1)) > 1e-3


def test_a_network_refuses_missing_and_unexpected_inputs() -> None:
    z, t, condition = inputs()
    scaled = condition._replace(guidance=torch.full((4,), 4.0))
    for network, told_it, end, said in (
        (plain(), condition, t, "takes one time and got an end: set two_times"),
        (plain(guidance_embeds=True), scaled, t, "takes one time and got an end: set two_times"),
        (plain(guidance_embeds=True), condition, None, "has guidance_embeds and needs a condition with guidance"),
        (plain(), scaled, None, "no guidance_embeds: leave guidance out"),
        (plain(two_times=True), scaled, t, "no guidance_embeds: leave guidance out"),
    ):
        with pytest.raises(ValueError, match=said) as refusal:
            network(z, t, told_it, end)
        assert "\n" not in str(refusal.value)


@torch.no_grad()
@pytest.mark.parametrize("numbers", [(), *TOLD], ids=lambda numbers: "+".join(numbers) or "plain")
def test_further_inputs_are_kept_in_a_folder_and_a_single_file(numbers: tuple[str, ...], tmp_path: Path) -> None:
    network = stirred(plain(dual_attention_layers=(1,), **dict.fromkeys(numbers, True)))
    z, t, condition = inputs()
    condition, end = fully_told(network, t, condition)
    checkpoint.save(network, tmp_path / "folder")
    write_tensors(checkpoint.single_file(network), tmp_path / "one.safetensors")
    naming, arguments = checkpoint.infer(open_file(tmp_path / "one.safetensors").under(checkpoint.PREFIX))
    assert naming == "original"
    assert [number for number in EMBEDDINGS if arguments[number]] == list(numbers)
    for place in ("folder", "one.safetensors"):
        back = checkpoint.load(tmp_path / place)
        assert [number for number in EMBEDDINGS if getattr(back, number)] == list(numbers)
        state = network.state_dict()
        assert back.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in back.state_dict().items())
        if place == "folder":  # the other does not tell the size of the training pictures, only the table
            assert torch.equal(back(z, t, condition, end), network(z, t, condition, end))
        again = checkpoint.load(tmp_path / place, two_times=True, guidance_embeds=True)  # what is there stays
        for name, tensor in back.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)


def test_only_a_plain_network_goes_by_diffusers_name(tmp_path: Path) -> None:
    checkpoint.save(plain(), tmp_path / "plain")
    assert read_json(tmp_path / "plain" / "config.json")["_class_name"] == "SD3Transformer2DModel"
    assert not {"time_scale", *EMBEDDINGS} & read_json(tmp_path / "plain" / "config.json").keys()
    assert isinstance(AutoModel.from_pretrained(str(tmp_path / "plain")), SD3Transformer2DModel)
    for numbers in TOLD:
        folder = tmp_path / "+".join(numbers)
        checkpoint.save(plain(**dict.fromkeys(numbers, True)), folder)
        config = read_json(folder / "config.json")
        assert config["_class_name"] == "MMDiT"
        assert dict.fromkeys(numbers, True) == {n: config[n] for n in EMBEDDINGS if n in config}
        with pytest.raises(ValueError, match="MMDiT"):
            AutoModel.from_pretrained(str(folder))


@torch.no_grad()
def test_the_time_scale_is_a_factor_on_t_and_comes_back(tmp_path: Path) -> None:
    z, t, condition = inputs()
    slow, fast = (stirred(plain(two_times=True, time_scale=scale)) for scale in (10.0, 1000.0))
    fast.load_state_dict(slow.state_dict())
    assert relative(slow(z, t, condition, t / 3), fast(z, t, condition, t / 3)) > 1e-3
    span = 2 / 3 * t  # is told on a scale of its own
    assert relative(slow(z, t, condition, t - span), fast(z, t / 100, condition, t / 100 - span)) < 1e-4
    checkpoint.save(slow, tmp_path)
    assert read_json(tmp_path / "config.json")["_class_name"] == "MMDiT"
    back = checkpoint.load(tmp_path)
    assert torch.equal(back(z, t, condition, t / 3), slow(z, t, condition, t / 3))
    with pytest.raises(ValueError, match="cannot store time_scale 10: write a folder"):
        checkpoint.single_file(slow)
    with pytest.raises(ValueError, match="time_scale must be > 0, got 0"):
        plain(time_scale=0)


def test_weights_that_do_not_match_the_config_are_refused(tmp_path: Path) -> None:
    checkpoint.save(plain(two_times=True), tmp_path / "two")
    checkpoint.save(plain(), tmp_path / "one")
    for config, weights, said in (("two", "one", "span_embedder"), ("one", "two", "span_embedder")):
        folder = tmp_path / f"{config}-{weights}"
        folder.mkdir()
        (folder / "config.json").write_bytes((tmp_path / config / "config.json").read_bytes())
        file = f"{checkpoint.STEM}.safetensors"
        (folder / file).write_bytes((tmp_path / weights / file).read_bytes())
        with pytest.raises(ValueError, match=said) as refusal:
            checkpoint.load(folder)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("numbers", TOLD, ids="+".join)
def test_every_parameter_learns_after_the_first_steps(numbers: tuple[str, ...]) -> None:
    network = plain(**dict.fromkeys(numbers, True))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    z, t, condition = inputs()
    condition, end = fully_told(network, t, condition)
    objective = MeanFlow() if network.two_times else Objective()
    interval = None if end is None else Interval.between(end, t)
    for _ in range(5):  # zero output, gates and the last layer of what is told hold the gradient back for a step each
        optimizer.zero_grad()
        objective.loss(network, z, z.flip(0), t, condition, interval).mean().backward()
        optimizer.step()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
