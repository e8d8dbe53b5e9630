"""Kinds of mistakes of several processes, on threads that stand for them."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_envs.objectives import ScoreAsAction
from diffusion_envs.training import parallel
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize
from tests.verification.kinds_of_mistakes import Kinds, by_words
from verification.claim import Setting
from verification.problems.training_loop import Process, trainer

KINDS = Kinds()
SETTING = Setting()


class World:
    """Threads that stand for processes: what one gathers, all have handed over."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size, timeout=60)
        self.handed: list[Tensor] = [torch.empty(0)] * size

    def exchange(self, index: int, value: Tensor) -> list[Tensor]:
        self.handed[index] = value.detach().clone()
        self.barrier.wait()
        everyone = list(self.handed)
        self.barrier.wait()
        return everyone


class Member(Process):
    """One process of a world."""

    def __init__(self, index: int, world: World) -> None:
        super().__init__(index, world.size)
        self.world = world

    def gather(self, tensor):
        return torch.cat(self.world.exchange(self.process_index, tensor))

    def reduce(self, tensor, reduction="sum", scale=1.0):
        return torch.stack(self.world.exchange(self.process_index, tensor)).sum(0)


def of_world(size: int, ask: Callable[[Process], object]) -> list:
    """What each process of a world says."""
    world = World(size)
    answers: list = [None] * size
    failed: list[BaseException] = []

    def run(index: int) -> None:
        try:
            answers[index] = ask(Member(index, world) if size > 1 else Process())
        except BaseException as error:
            failed.append(error)  # the first is the cause, the others waited for that one
            world.barrier.abort()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(size)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if failed:
        raise failed[0]
    return answers


def updated(accelerator: Process, *, clip: float = 1e9) -> dict[str, Tensor]:
    """What an update sees and leaves; four processes have two or three of its paths."""
    made = trainer(SETTING)
    made = Trainer(
        made.environment,
        ScoreAsAction(kl_weight=2.3, learning_rate=1e-3),
        UpdateSize(
            samples=10,
            batch=4,
            minibatches=2,
            max_gradient_norm=clip,
            value_epochs=2,
            value_batch=20,
        ),
        accelerator=accelerator,
    )
    made.update = 3
    made.environment.reward = by_words
    told = made.step()
    state = {f"adapter {k}": p.detach().clone() for k, p in enumerate(made.parameters)}
    state |= {f"gradient {k}": p.grad.clone() for k, p in enumerate(made.parameters)}
    state |= {f"critic {k}": v.clone() for k, v in made.critic.network.state_dict().items()}
    numbers = {k: torch.tensor(float(getattr(v, "mean", v))) for k, v in told.items()}
    return state | {k: v for k, v in numbers.items() if k not in ("seconds", "memory")}


@KINDS.sees(r"""
diffusion_envs.training.critic.Critic._fit
    value's batches named by the process | update, epoch, 0) => update, epoch, self.accelerator.process_index)
    value's gradients clipped before they are added | parallel.add_gradients(parameters, self.accelerator)
        => nn.utils.clip_grad_norm_(parameters, 1e-3)\n                parallel.add_gradients(parameters, self.accelerator)
    value's batches of this process's rows | everyones = torch.randperm(place.of * place.size
        => everyones = place.paths.start + torch.randperm(len(place.paths)
    value's loss divided by this process's rows | of=len(batch) => of=max(1, len(part))
diffusion_envs.training.trainer.Trainer._improve_adapter
    minibatches named by the process | self.update, epoch, 0) => self.update, epoch, self.accelerator.process_index)
diffusion_envs.training.gradients.Gradients.of
    gradients clipped before they are added | parallel.add_gradients(self.parameters, self.accelerator)
        => sharded.clip_gradients(self.parameters, most)\n            parallel.add_gradients(self.parameters, self.accelerator)
diffusion_envs.training.trainer.Trainer._over_all
    advantages by this process's values | values=whole(rollout.values) => values=rollout.values
diffusion_envs.training.trainer.Trainer.sample
    every process makes the first samples | range(first + share.paths.start, first + share.paths.stop)
        => range(first, first + len(share.paths))
    training's prompts from the first in every process | for i in indices]) => for i in range(len(indices))])
diffusion_envs.objectives.path_steps.PathLosses.__init__
    advantages of the first process | self.rollout.place.own(everyones) => everyones[: len(self.rollout.rewards)]
diffusion_envs.training.update_numbers.Earned.of
    what this process's paths earned | earned = parallel.gather(earned, accelerator).cpu() => earned = earned.cpu()
diffusion_envs.training.update_numbers.means
    means of means | every[:, :1] / every[:, 0].sum() => 1 / len(every)
diffusion_envs.training.parallel.gather
    processes in another order | .split(max(lengths) or 1) => .split(max(lengths) or 1)[::-1]
    filled up rows kept | rows[:length] for rows => rows for rows
diffusion_envs.training.parallel.add_gradients
    means over processes for sums | view_as(parameter).clone() if => view_as(parameter) / accelerator.num_processes if
diffusion_envs.rollout.Share.even
    what is left over goes to nobody | groups * k // processes => groups // processes * k
""")
def several_processes_do_as_one(folder) -> None:
    """Four of them, whose shares differ, in updates whose gradient is clipped and not."""
    for clip in (1e9, 0.05):
        (alone,) = of_world(1, lambda world, clip=clip: updated(world, clip=clip))
        for told in of_world(4, lambda world, clip=clip: updated(world, clip=clip)):
            for name, value in alone.items():
                # float32, in sums of another order
                assert (told[name] - value).norm() <= 1e-4 * value.norm(), name


@KINDS.sees(r"""
diffusion_envs.training.parallel.broadcast_from_main
    the last process decides | accelerator)[0]) => accelerator)[-1])
diffusion_envs.training.parallel.from_main
    every process hands over | accelerator.process_index == 0 else None => True else None
diffusion_envs.training.parallel.total
    sum times the processes | accelerator.reduce(value, "sum")
        => accelerator.reduce(value * accelerator.num_processes, "sum")
diffusion_envs.training.parallel.share
    shares that overlap | n * (k + 1) // processes => n * (k + 1) // processes + (k == 0)
diffusion_envs.training.parallel.add
    counts of one process | total.update(theirs) => total.update(dict(counts))
diffusion_envs.training.parallel.of_all
    every process asks for the first | own = share(n, accelerator) => own = range(len(share(n, accelerator)))
""")
def processes_agree(folder) -> None:
    """What is broadcast, added and gathered, against what each process holds."""

    def ask(world: Process) -> dict[str, object]:
        k = world.process_index
        named = parallel.from_main({"a": torch.tensor([1.0 + k])}, world)
        every = parallel.of_all(lambda own: {"i": torch.tensor(list(own))}, 5, world)
        return {
            "main": parallel.broadcast_from_main(10 + k, world),
            "from": named["a"].tolist(),
            "total": parallel.total(torch.tensor([1.0 + k]), world).tolist(),
            "counts": parallel.add({"x": 1 + k, f"own {k}": 1}, world),
            "all": every["i"].tolist(),
        }

    for told in of_world(2, ask):
        assert told == {
            "main": 10,
            "from": [1.0],
            "total": [3.0],
            "counts": {"x": 3, "own 0": 1, "own 1": 1},
            "all": [0, 1, 2, 3, 4],
        }


test_the_right_code_is_right, test_the_planted_mistake_is_seen = KINDS.tests()
