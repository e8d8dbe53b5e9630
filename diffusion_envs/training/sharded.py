"""Weights sharded among processes: each holds a part of every tensor, of its gradient and moments.

By torch's own ``fully_shard`` (FSDP2), on any device that torch.distributed has a backend for: CUDA
with NCCL, the CPU with gloo. (accelerate prepares FSDP on accelerators alone: on the CPU it makes
DistributedDataParallel of the model, whatever plugin it is given.)

Calls        A network in shards gathers its weights layer by layer, so all processes must call it
             equally often. In updates ``Shards.in_step`` makes them. Elsewhere (sampling,
             evaluation, export) the weights are whole on every process for as long as it takes:
             ``Shards.unsharded``; then they may call it as often as they like.
Gradients    Reduced by FSDP to means over the processes, as each loss is differentiated.
Checkpoints  Whole tensors, of any number of processes: ``gathered`` and ``scattered``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

# torch.distributed.tensor takes a second to import: only where something is sharded


@runtime_checkable
class InShards(Protocol):
    """A model whose weights may be sharded."""

    @property
    def shards(self) -> "Shards":
        """Which they are."""
        ...


class Shards:
    """Networks whose weights are sharded among the processes; without networks nothing is.

    Args:
        networks: the one that trains first.
    """

    def __init__(self, networks: Sequence[nn.Module] = ()) -> None:
        self.networks = networks
        self._depth = 0  # of contexts within which they are whole

    @classmethod
    def of(
        cls, network: Any, frozen: Any, device: torch.device, *, offloaded: bool = False
    ) -> "Shards":
        """Shard a UNet of diffusers and its frozen copy, in place, layer by layer.

        Args:
            network: that trains; the same on all processes.
            frozen: its pretrained self.
            device: where both are.
            offloaded: keep the frozen one's shards in the CPU's memory between calls.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        mesh = init_device_mesh(device.type, (processes(),))
        on_host = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offloaded else None
        for one, policy in ((network, None), (frozen, on_host)):
            for part in _layers(one):
                fully_shard(
                    part,
                    mesh=mesh,
                    reshard_after_forward=True,
                    offload_policy=policy or OffloadPolicy(),
                )
        return cls([network, frozen])

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Within this context every process holds all weights; all of them enter and leave it.

        Processes may call the networks as often as they like then, and differentiate with respect
        to what goes in, but not to the weights.
        """
        self._depth += 1
        try:
            if self._depth == 1:
                self._gather()
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._release()

    def refresh(self) -> None:
        """After the shards have changed: change the whole weights too, if there are any now."""
        if self._depth:
            self._release()
            self._gather()

    def values(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The parameters of the network that trains, as plain tensors; in ``unsharded``."""
        if not self.networks:
            return [*parameters]
        self._require_whole()
        return [*self.networks[0].parameters()]

    def plain(self, network: Any) -> Any:
        """The same network without shards, which shares its memory; in ``unsharded``."""
        if not self.networks:
            return network
        self._require_whole()
        with torch.device("meta"):
            twin = type(network).from_config(network.config)  # FSDP makes the class beneath its own
        tensors = [*network.named_parameters(), *network.named_buffers()]
        kept = twin.state_dict().keys()
        twin.load_state_dict({k: t.detach() for k, t in tensors if k in kept}, assign=True)
        return twin.requires_grad_(False).eval()

    def _require_whole(self) -> None:
        if not self._depth:
            raise ValueError(
                "the weights are sharded: enter trainer.averaged() or Shards.unsharded() on all "
                "processes first"
            )

    def _gather(self) -> None:
        for part in self._parts():
            part.set_reshard_after_forward(False, recurse=False)
            part.set_reshard_after_backward(False, recurse=False)
            part.unshard()

    def _release(self) -> None:
        for part in self._parts():
            part.set_reshard_after_forward(True, recurse=False)
            part.set_reshard_after_backward(True, recurse=False)
            part.reshard()

    def _parts(self) -> Iterator[Any]:
        if self.networks:
            from torch.distributed.fsdp import FSDPModule

            for network in self.networks:
                yield from (part for part in network.modules() if isinstance(part, FSDPModule))

    def in_step(self, losses: Iterator[Tensor], spare: Callable[[], Tensor]) -> Iterator[Tensor]:
        """As many losses on every process, where weights are sharded: else their calls would hang.

        A process that has no more takes a spare one times zero, until no process has more. Then all
        have made one that no one needs, whose gradient is not taken.

        Args:
            losses: of this process, each made when it is asked for.
            spare: makes another, calling the networks as often as those do.
        """
        if not self.networks:
            yield from losses
            return
        while True:
            loss = next(losses, None)
            more = torch.tensor(loss is not None)
            if loss is None:
                loss = 0 * spare()
            more = more.to(loss.device, torch.float32)
            torch.distributed.all_reduce(more)
            if not more:
                return
            yield loss


def _layers(network: nn.Module) -> list[nn.Module]:
    """What gathers its weights by itself, inner parts first: residual and transformer blocks."""
    lists = ("down_blocks", "up_blocks", "resnets", "attentions", "transformer_blocks")
    named = [
        module
        for name, module in network.named_modules()
        if name == "mid_block" or name.rpartition(".")[0].rpartition(".")[2] in lists
    ]
    return [*reversed(named), network]


def processes() -> int:
    """How many of them share the work."""
    distributed = torch.distributed
    started = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if started else 1


def shards_of(model: Any) -> Shards:
    """What is sharded of a model: of most, nothing."""
    return model.shards if isinstance(model, InShards) else Shards()


def is_shard(tensor: Tensor) -> bool:
    """Whether this process holds a part of it only."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part of it; all of it, where it is not sharded."""
    return tensor.to_local() if is_shard(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]  # a DTensor


def gathered(state: Any, *, keep: bool) -> Any:
    """A state with whole tensors on the host, where some are sharded; one after another.

    All processes call this.

    Args:
        state: nested containers of tensors and whatever else.
        keep: whether this process wants them; where not, they are empty.
    """
    if isinstance(state, Tensor):
        if not is_shard(state):
            return state
        whole = state.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]  # a DTensor
        return whole.cpu() if keep else whole.new_empty(0)
    if isinstance(state, Mapping):
        return {name: gathered(value, keep=keep) for name, value in state.items()}
    if isinstance(state, tuple | list):
        return type(state)(gathered(value, keep=keep) for value in state)
    return state


def scattered(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor sharded as another one: every process takes its part of its own copy."""
    if not is_shard(like) or is_shard(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # pyright: ignore[reportAttributeAccessIssue]  # a DTensor
    part = distribute_tensor(value.to(like.device), mesh, placements, src_data_rank=None)
    return part.clone()  # so that the whole one is not kept


def scattered_moments(state: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """The state of one of torch's optimisers with its moments sharded as the parameters are."""
    if not any(is_shard(p) for p in parameters):
        return state
    moments = {
        k: {
            name: scattered(value, parameters[k])
            if isinstance(value, Tensor) and value.shape == parameters[k].shape
            else value
            for name, value in each.items()
        }
        for k, each in state["state"].items()
    }
    return state | {"state": moments}


def clip_gradients(parameters: Sequence[nn.Parameter], most: float) -> float:
    """Scale gradients down to this norm, that of all shards; the norm before."""
    split = [[p for p in parameters if is_shard(p) is kind] for kind in (True, False)]
    if not split[0]:
        return nn.utils.clip_grad_norm_(parameters, most).item()
    square = 0.0
    for some in split:
        norm = nn.utils.get_total_norm([p.grad for p in some if p.grad is not None])
        whole = norm.full_tensor() if is_shard(norm) else norm  # pyright: ignore[reportAttributeAccessIssue]  # a DTensor
        square += whole.item() ** 2
    norm = square**0.5
    factor = min(1.0, most / (norm + 1e-6))  # as torch's own
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
    return norm
