"""The simulated accelerator keeps what it promises; an unknown torch fails here first."""

import copy
import gc
import io
import pickle
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests.device.counting import counting
from tests.device.memory import NAME, memory_of

HERE = Path(__file__).parent
zeros = lambda *shape: torch.zeros(*shape, dtype=torch.long)


@pytest.fixture
def c(generator):
    return torch.randn(3, 4, generator=generator)


@pytest.fixture
def s(generator):
    return torch.randn(3, 4, generator=generator).to(NAME)


def same(found, expected, **tolerances):
    torch.testing.assert_close(found.cpu(), expected, **tolerances)


REFUSED = {
    "add": lambda c, s: c + s,
    "add_right": lambda c, s: s + c,
    "multiply": lambda c, s: s * c,
    "matmul": lambda c, s: s @ c.T,
    "mm": lambda c, s: torch.mm(s, c.T),
    "cat": lambda c, s: torch.cat([s, c]),
    "stack": lambda c, s: torch.stack([s, c]),
    "stack_of_numbers": lambda c, s: torch.stack([s[0, 0], c[0, 0]]),
    "where": lambda c, s: torch.where(s > 0, s, c),
    "add_": lambda c, s: s.add_(c),
    "add_into_cpu": lambda c, s: c.add_(s),
    "out": lambda c, s: torch.mul(s, s, out=c),
    "addcmul": lambda c, s: torch.addcmul(s, s, c),
    "device_index_into_cpu": lambda c, s: c[s.long()[:, 0].clamp(0, 0)],
    "linear": lambda c, s: functional.linear(s, c),
    "gather": lambda c, s: s.gather(1, c.long().clamp(0, 1)),
    "index_select": lambda c, s: s.index_select(0, torch.tensor([0])),
    "index_add": lambda c, s: s.index_add(0, torch.tensor([0]), s[:1]),
    "scatter": lambda c, s: s.scatter(1, zeros(3, 1).to(NAME), c),
    "lerp": lambda c, s: torch.lerp(s, s, c),
    "masked_fill": lambda c, s: s.masked_fill(c > 0, 1.0),
    "einsum": lambda c, s: torch.einsum("ij,kj->ik", s, c),
    "clamp": lambda c, s: s.clamp(min=c),
    "equal": lambda c, s: torch.equal(s, c),
    "allclose": lambda c, s: torch.allclose(s, c),
    "searchsorted": lambda c, s: torch.searchsorted(s, c),
    "dot": lambda c, s: torch.dot(s[0], c[0]),
    "outer": lambda c, s: torch.outer(s[0], c[0]),
    "embedding": lambda c, s: functional.embedding(zeros(2), s),
    "embedding_of_cpu": lambda c, s: torch.embedding(c, zeros(2).to(NAME)),
    "convolution": lambda c, s: functional.conv1d(s[None], torch.randn(2, 3, 1)),
    "bincount": lambda c, s: torch.bincount(zeros(3).to(NAME), weights=torch.ones(3)),
    "mse": lambda c, s: functional.mse_loss(s, c),
    "cross_entropy": lambda c, s: functional.cross_entropy(s, zeros(3)),
    "normal": lambda c, s: torch.distributions.Normal(c, 1.0).log_prob(s),
}

ALLOWED = {
    "number": lambda c, s: s + torch.tensor(2.0),
    "number_left": lambda c, s: torch.tensor(2.0) * s,
    "power": lambda c, s: s.pow(torch.tensor(2.0)),
    "maximum": lambda c, s: torch.maximum(s, torch.tensor(0.0)),
    "where": lambda c, s: torch.where(s > 0, s, torch.tensor(0.0)),
    "lerp": lambda c, s: torch.lerp(s, s, torch.tensor(0.5)),
    "clamp": lambda c, s: s.clamp(min=torch.tensor(0.0)),
    "isclose": lambda c, s: torch.isclose(s, torch.tensor(0.0)),
    "cpu_index": lambda c, s: s[torch.tensor([0, 2])],
    "cpu_mask": lambda c, s: s[c[:, 0] > 0],
    "copy_in": lambda c, s: s.copy_(c),
    "copy_out": lambda c, s: c.copy_(s),
    "index_put": lambda c, s: s.index_put_((torch.tensor([0]),), torch.tensor(1.0)),
    "masked_fill": lambda c, s: s.masked_fill(s > 0, torch.tensor(1.0)),
    "fill": lambda c, s: s.fill_(torch.tensor(1.0)),
    "set_number": lambda c, s: s.__setitem__(0, torch.tensor(1.0)),
    "set_row": lambda c, s: s.__setitem__(0, c[0]),
    "set_rows": lambda c, s: s.__setitem__(torch.tensor([0, 1]), torch.tensor(1.0)),
    "set_row_of_cpu": lambda c, s: c.__setitem__(0, s[0]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_two_devices_may_not_meet(name, c, s):
    with pytest.raises((RuntimeError, ValueError), match=r"device|should be the same"):
        REFUSED[name](c, s)


@pytest.mark.parametrize("name", ALLOWED)
def test_two_devices_may_meet_where_cuda_lets_them(name, c, s):
    ALLOWED[name](c, s)


@pytest.mark.parametrize("of", [lambda x: x.numpy(), np.asarray, np.sin])
def test_numpy_does_not_see_the_device(of, s):
    with pytest.raises(TypeError, match="sim"):
        of(s)


DRAWS = {
    "randn": lambda x, g: torch.randn(3, device=x.device, generator=g),
    "rand": lambda x, g: torch.rand(3, device=x.device, generator=g),
    "randint": lambda x, g: torch.randint(3, (2,), device=x.device, generator=g),
    "randperm": lambda x, g: torch.randperm(3, device=x.device, generator=g),
    "normal_": lambda x, g: x.normal_(generator=g),
    "bernoulli": lambda x, g: torch.bernoulli(x.sigmoid(), generator=g),
    "multinomial": lambda x, g: torch.multinomial(x.exp(), 1, generator=g),
}


@pytest.mark.parametrize("name", DRAWS)
def test_generators_belong_to_their_device(name, c, s):
    ours, cpus = torch.Generator(NAME).manual_seed(1), torch.Generator().manual_seed(1)
    assert isinstance(ours, torch.Generator)
    assert ours.device.type == NAME
    same(DRAWS[name](s, ours), DRAWS[name](s.cpu(), cpus))
    for x, wrong in ((s, cpus), (c, ours)):
        with pytest.raises(RuntimeError, match="generator"):
            DRAWS[name](x, wrong)


def test_factories_make_tensors_where_they_are_asked_to(s):
    made = [f(2, 3, device=NAME) for f in (torch.zeros, torch.ones, torch.empty, torch.rand)]
    made += [
        torch.arange(3, device=NAME),
        torch.linspace(0, 1, 5, device=NAME),
        torch.logspace(0, 1, 3, device=NAME),
        torch.eye(3, device=NAME),
        torch.full((2,), 1.0, device=NAME),
        torch.tril_indices(3, 3, device=NAME),
        torch.tensor([1.0, 2.0], device=NAME),
        torch.as_tensor(3.0, device=NAME),
    ]
    made += [s.new_empty(3), s.new_zeros(2), s.new_tensor([1.0])]
    made += [torch.zeros_like(s), torch.randn_like(s), torch.full_like(s, 2.0)]
    with torch.device(NAME):
        made.append(torch.ones(2))
    assert {x.device.type for x in made} == {NAME}
    assert torch.zeros_like(s, device="cpu").device.type == "cpu"
    same(torch.tensor([1.0, 2.0], device=NAME), torch.tensor([1.0, 2.0]))


def test_views_share_their_memory():
    def written(device):
        x = torch.zeros(4, 3, 2, device=device)
        x[1].fill_(2.0)
        x.movedim(0, 1)[0, 2] = 5.0
        x.view(-1)[0] = 7.0
        for row in x.unbind():
            row.add_(1)
        first, _ = x.view(-1).split([2, 22])
        first.mul_(3)
        torch.mul(x[0], 2.0, out=x[1])
        return x

    same(written(NAME), written("cpu"))
    x = torch.zeros(3, 4, device=NAME)
    assert x[1]._base is x
    assert x.T.stride() == (1, 4)
    assert not x.T.is_contiguous()


def test_complex_numbers_and_their_conjugates():
    z = torch.view_as_complex(torch.randn(3, 2).to(NAME))
    same(z.conj(), z.cpu().conj())


def test_operations_in_place_may_change_the_geometry():
    def changed(device):
        x = torch.arange(6.0, device=device).view(2, 3)
        x.t_().unsqueeze_(0).squeeze_(0)
        out = torch.empty(0, device=device)
        torch.add(x, x, out=out)
        grown = torch.ones(2, device=device).resize_(5).fill_(1.0)
        swapped = torch.ones(2, device=device)
        swapped.data = torch.ones(3, device=device)
        return torch.cat([out.reshape(-1), grown, swapped, x.clone().set_(x).reshape(-1)])

    same(changed(NAME), changed("cpu"))


def test_autograd_knows_what_was_overwritten(s):
    y = s.requires_grad_().exp()
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        y.sum().backward()


def test_modules_train_as_on_the_cpu():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(), nn.Linear(288, 5))
    network = nn.Sequential(*layers, nn.LayerNorm(5), nn.Softmax(1))
    twin = copy.deepcopy(network)
    before = [id(p) for p in network.parameters()]
    network.to(NAME)
    assert [id(p) for p in network.parameters()] == before
    x = torch.randn(2, 3, 8, 8)
    for one, inputs in ((network, x.to(NAME)), (twin, x)):
        optimiser = torch.optim.AdamW(one.parameters(), 1e-2)
        for _ in range(3):
            optimiser.zero_grad()
            one(inputs).square().sum().backward()
            nn.utils.clip_grad_norm_(one.parameters(), 1.0)
            optimiser.step()
    for ours, cpus in zip(network.parameters(), twin.parameters(), strict=True):
        same(ours.detach(), cpus.detach())
    with pytest.raises(RuntimeError, match=r"device|should be the same"):
        network(x)
    twin.load_state_dict(network.state_dict())
    network.load_state_dict(twin.state_dict())
    assert next(copy.deepcopy(network).parameters()).device.type == NAME
    network.cpu()
    assert next(network.parameters()).device.type == "cpu"


def test_frozen_modules_go_to_and_fro():
    layer, x = nn.Linear(3, 3).requires_grad_(False), torch.randn(2, 3)
    for device in (NAME, "cpu", NAME, "cpu"):
        layer.to(device)(x.to(device))


def test_tensors_are_saved_pickled_copied_and_printed(s):
    file = io.BytesIO()
    torch.save({"x": s}, file)
    file.seek(0)
    same(torch.load(file, map_location="cpu")["x"], s.cpu())
    same(pickle.loads(pickle.dumps(s)), s.cpu())
    same(copy.deepcopy(s.requires_grad_()).detach(), s.detach().cpu())
    assert NAME in repr(s)


def test_attention_is_that_of_the_cpu():
    q = torch.randn(2, 4, 8, 16, requires_grad=True)
    s = q.detach().to(NAME).requires_grad_()
    for x in (q, s):
        functional.scaled_dot_product_attention(x, x, x).square().sum().backward()
    same(s.grad, q.grad, atol=1e-4, rtol=1e-4)
    mask = torch.ones(8, 8, device=NAME).bool()
    with torch.no_grad():
        functional.scaled_dot_product_attention(s, s, s, attn_mask=mask)
    whole = nn.MultiheadAttention(16, 2, batch_first=True).to(NAME)
    x = torch.randn(2, 5, 16).to(NAME)
    whole(x, x, x)[0].sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activations_are_computed_again(reentrant):
    layer, x = nn.Linear(3, 3).to(NAME), torch.randn(2, 3).to(NAME).requires_grad_()
    again = lambda y: functional.dropout(layer(y).tanh())
    checkpoint(again, x, use_reentrant=reentrant).sum().backward()
    assert x.grad.device.type == NAME


def test_autocast_lowers_what_cuda_lowers():
    layer, x = nn.Linear(3, 3).to(NAME), torch.randn(2, 3).to(NAME)
    with torch.autocast(NAME, dtype=torch.bfloat16):
        y = layer(x + 1)
        assert y.dtype == torch.bfloat16
        assert y.softmax(-1).dtype == torch.float32
        with torch.autocast(NAME, enabled=False):
            assert layer(x).dtype == torch.float32
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_function_transforms_agree_with_the_cpu():
    func = torch.func
    x = torch.randn(5, 3)
    s, f = x.to(NAME), lambda row: (row.sin() * row.cumsum(0)).sum()
    for transform in (lambda y: func.vmap(f)(y), lambda y: func.vmap(func.grad(f))(y)):
        same(transform(s), transform(x))
    for transform in (
        lambda y: func.vmap(func.hessian(f))(y),
        lambda y: func.jvp(f, (y[0],), (y[1],))[1],
        lambda y: func.jacrev(torch.sin)(y[0]),
        lambda y: func.jacfwd(torch.sin)(y[0]),
        lambda y: func.vmap(lambda a, b: a @ b)(y, y),
    ):
        same(transform(s), transform(x))
    layer = nn.Linear(3, 2).to(NAME)
    loss = lambda p, row: func.functional_call(layer, p, (row,)).square().sum()
    each = func.vmap(func.grad(loss), (None, 0))(dict(layer.named_parameters()), s)
    assert each["weight"].shape == (5, 2, 3)
    with pytest.raises(RuntimeError, match="device"):
        func.vmap(lambda a, b: a * b)(s, x)


def test_gradients_of_gradients_and_hooks():
    x = torch.randn(3).to(NAME).requires_grad_()
    (slope,) = torch.autograd.grad(x.pow(3).sum(), x, create_graph=True)
    slope.sum().backward()
    same(x.grad, 6 * x.detach().cpu())
    x.grad = None
    y = x.sigmoid().exp()
    y.register_hook(lambda g: 2 * g)
    y.sum().backward()
    assert bool(x.grad.isfinite().all())


def test_inference_mode():
    with torch.inference_mode():
        x = torch.randn(3).to(NAME)
        x.add_(1).view(3, 1)
        (x @ x).item()


WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "float": lambda x: float(x[0]),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "equal": lambda x: torch.equal(x, x),
    "unique": lambda x: x.unique(),
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=NAME),
    "cpu_index": lambda x: x[torch.tensor([0, 2])],
}


@pytest.mark.parametrize("name", WAITS)
def test_what_makes_the_host_wait_is_counted_with_its_line(name):
    x = torch.randn(4).to(NAME)
    with counting(HERE) as counts:
        WAITS[name](x)
    assert counts.synchronised == 1, counts.lines()
    ((_, site),) = counts.synchronisations
    assert site.startswith("device/test_accelerator.py:")


def test_what_does_not_wait_is_not_counted():
    x, host = torch.randn(4).to(NAME), torch.randn(4)
    with counting(HERE) as counts:
        (x + 1) * 2
        x[1:3].view(1, 2)
        x.copy_(host, non_blocking=True)
        host.to(NAME, non_blocking=True)
    assert (counts.synchronised, counts.launched, counts.asynchronous_copies) == (0, 2, 2)


def test_fused_kernels_are_one_launch():
    parameters = [nn.Parameter(torch.randn(3).to(NAME)) for _ in range(20)]
    optimiser = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.randn(3).to(NAME)
    optimiser.step()
    q = torch.randn(2, 4, 8, 16).to(NAME)
    for most, call in (
        (20, optimiser.step),
        (15, lambda: nn.utils.clip_grad_norm_(parameters, 1.0)),
        (1, lambda: functional.scaled_dot_product_attention(q, q, q)),
    ):
        with counting() as counts:
            call()
        assert counts.launched <= most, counts.operations


def test_memory_is_freed():
    gc.collect()
    gc.disable()
    try:
        x = torch.randn(1000).to(NAME)
        memory = weakref.ref(memory_of(x.untyped_storage()))
        y = x[3:]
        torch.cat([y.add_(1), y])
        del x
        assert memory() is not None
        del y
        assert memory() is None
    finally:
        gc.enable()
