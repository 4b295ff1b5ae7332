"""A network that is fitted into memory computes the same: recomputed activations, compiled blocks, skeletons."""

import torch
from networks import stirred
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from trials import assert_near, assert_same

from engine.strategy import Strategy, skeleton
from mmdit.model import Condition, MMDiT


def network(depth: int = 4) -> MMDiT:
    """A small network with every weight random, so that nothing is hidden behind a zero gate."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = MMDiT(in_channels=1, depth=depth, width=16, heads=1, text_dim=8, pooled_dim=8, sample_size=8,
                     pos_embed_max_size=8)  # fmt: skip
    return stirred(made).train()


def computed(model: MMDiT) -> tuple[Tensor, dict[str, Tensor], int, int]:
    """Loss, gradients, how many numbers were kept for the backward pass by autograd itself, and FLOPs."""
    draw = torch.Generator().manual_seed(1)
    z, t = torch.randn(3, 1, 8, 8, generator=draw), torch.rand(3, generator=draw)
    condition = Condition(torch.randn(3, 5, 8, generator=draw), torch.randn(3, 8, generator=draw))
    parameters = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with FlopCounterMode(display=False) as counted:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(z, t, condition).square().mean()
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, sum(kept.values()), counted.get_total_flops()


def test_activation_checkpointing_keeps_less_and_changes_nothing() -> None:
    loss, gradients, kept, flops = computed(network())
    found = {}
    for how, every in (("full", 1), ("full", 2), ("selective", 1), ("full", 9)):
        model = network()
        Strategy(activation_checkpointing=how, activation_checkpointing_every=every).prepare(model)  # type: ignore[arg-type]
        assert model.state_dict().keys() == network().state_dict().keys()
        *same, found[how, every], again = computed(model)
        assert_same(tuple(same), (loss, gradients))
        assert (again > flops) == (how == "full")
    assert found["full", 1] < found["full", 2] < found["full", 9] < kept
    assert found["selective", 1] < kept


def test_blocks_are_compiled_in_place() -> None:
    model = network(1)
    names = [name for name, _ in model.named_parameters()]
    loss, gradients, *_ = computed(model)
    model.zero_grad()
    Strategy(compile=True, activation_checkpointing="selective").prepare(model)
    assert [name for name, _ in model.named_parameters()] == list(names)
    assert model.state_dict().keys() == network(1).state_dict().keys()
    compiled, theirs, *_ = computed(model)
    torch.testing.assert_close(compiled, loss, rtol=1e-5, atol=0)
    assert_near(theirs, gradients, 1e-5)


def test_a_skeleton_has_parameters_without_memory() -> None:
    model = network(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learning = [p.requires_grad for p in model.parameters()]
    bare = skeleton(model)
    assert [*bare.state_dict()] == [*model.state_dict()]
    assert all(tensor.is_meta for tensor in (*bare.parameters(), *bare.buffers()))
    assert [tensor.shape for tensor in bare.state_dict().values()] == [tensor.shape for tensor in before.values()]
    assert not any(p.requires_grad for p in bare.parameters())
    assert not bare.training
    assert_same(dict(model.state_dict()), before)
    assert [p.requires_grad for p in model.parameters()] == learning
