"""Memory that is used again, and only once nobody can see it."""

import gc
import threading

import pytest
import torch

import ctrl
from ctrl import reused_memory as memory

LIKE = torch.empty(0)
SHAPE = (512, 1024)  # 2 MiB


@pytest.fixture(autouse=True)
def _no_idle_memory():
    gc.collect()
    memory.release()
    yield
    memory.release()


def filled(value: float) -> torch.Tensor:
    return memory.uninitialised(SHAPE, LIKE).fill_(value)


def test_memory_of_a_dead_tensor_is_used_again():
    first = filled(1.0)
    place = first.data_ptr()
    del first
    assert memory.idle() > 2**21
    second = filled(2.0)
    assert second.data_ptr() == place
    assert memory.idle() == 0
    assert filled(3.0).data_ptr() != place
    assert bool((second == 2).all())


HOLDERS = {
    "the tensor": lambda x: x,
    "a view": lambda x: x[3:5, 7].movedim(0, -1),
    "another dtype of it": lambda x: x.view(torch.int32),
    "an array": lambda x: x[1:].numpy(),
    "a view of an array": lambda x: x.numpy()[::2],
    "its storage": lambda x: x.untyped_storage(),
    "another library's view": lambda x: torch.from_dlpack(x[2:]),
    "a graph": lambda x: (x * torch.ones(1, requires_grad=True)).grad_fn,
    "a parameter": lambda x: torch.nn.Parameter(x),
    "a detached copy of the reference": lambda x: x.detach(),
    "the path-major view of paths": lambda x: ctrl.Paths(
        x[:3, :, None].movedim(0, 1), None, None, ctrl.uniform_grid(1.0, 2)
    ),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_that_somebody_can_see_is_never_used_again(holder):
    tensor = filled(1.0)
    place = tensor.data_ptr()
    held = HOLDERS[holder](tensor)
    del tensor
    gc.collect()
    assert memory.idle() == 0
    assert filled(2.0).data_ptr() != place
    del held
    gc.collect()
    assert memory.idle() > 2**21


def test_paths_of_an_earlier_roll_out_keep_their_numbers():
    sde = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.5)
    problem, policy = ctrl.ControlProblem(sde, 1.0), ctrl.DeterministicPolicy(lambda t, x: 0.1 * x)
    start, grid = torch.zeros(4096, 4), ctrl.uniform_grid(1.0, 20)
    generator = torch.Generator().manual_seed(0)

    def run() -> ctrl.Paths:
        return ctrl.simulate(problem, policy, start, grid, generator=generator)

    first = run()
    ends, copy = first.states[:, -1], first.states[:, -1].clone()
    increments = first.increments
    del first
    gc.collect()
    others = [run() for _ in range(3)]
    assert torch.equal(ends, copy)
    assert increments is not None
    places = {one.states.untyped_storage().data_ptr() for one in others}
    assert len(places | {ends.untyped_storage().data_ptr()}) == 4
    del others
    again = run()  # in memory of one of them, with numbers of its own
    assert again.states.untyped_storage().data_ptr() in places


def test_shapes_dtypes_and_alignment_are_those_that_were_asked_for():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        tensor = memory.uninitialised((3, 2**19, 1), torch.empty(0, dtype=dtype))
        assert (tensor.shape, tensor.dtype) == ((3, 2**19, 1), dtype)
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0


def test_little_waits_and_what_has_waited_longest_goes_first(monkeypatch):
    monkeypatch.setattr(memory, "_limit", lambda: 5 * 2**20)
    tensors = [filled(1.0) for _ in range(4)]
    tensors.clear()
    assert 2 * 2**21 <= memory.idle() <= 5 * 2**20
    memory.uninitialised((4, *SHAPE), LIKE)  # 8 MiB: more than may wait
    assert memory.idle() <= 5 * 2**20
    memory.release()
    assert memory.idle() == 0


def test_threads_never_share_memory():
    def check(value: float) -> None:
        for _ in range(50):
            tensor = filled(value)
            if not bool((tensor == value).all()):
                failed.append(value)

    failed: list[float] = []
    threads = [threading.Thread(target=check, args=(float(k),)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
