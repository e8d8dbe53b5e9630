"""Further rewards of the pretrained model, beyond the held-out samples: kept in a run's folder."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from diffusion_envs.digests import read_tensors, write_tensors
from diffusion_envs.environment import Environment
from diffusion_envs.runs.evaluation import (
    Evaluation,
    not_counted,
    require_same_rewards,
    sample_in_turn,
)
from diffusion_envs.runs.progress import progress_bar
from diffusion_envs.training import parallel
from diffusion_envs.training.phase import phase
from diffusion_envs.training.sharded import shards_of

STREAM = "frontier"  # neither training nor any evaluation draws from it
_PICTURES = 8  # kept of all samples, to know the reward by
_log = logging.getLogger(__name__)


@phase("evaluation")
def further_rewards(
    environment: Environment,
    samples: int,
    path: Path,
    *,
    batch: int,
    progress: bool = False,
    accelerator: Accelerator | None = None,
) -> Float[Tensor, " samples"]:
    """Rewards of the pretrained model on a stream of its own; costs are not counted.

    What ``path`` has is not sampled again, and what is sampled is written there after every batch.
    A file that is damaged, or whose pictures the reward scores otherwise by now, is made anew; one
    that cannot be written is done without. Of several processes each makes its share of every batch
    of all, and the main one reads and writes.

    Args:
        environment: with the run's sampler, reward and prompts.
        samples: how many; sample i has prompt i modulo the number of prompts.
        path: of the file.
        batch: samples rolled out at once.
        progress: show a bar.
        accelerator: processes that share the samples; None: this one makes all.

    Raises:
        RewardError: the reward raises or returns something unusable.
        ValueError: the sampler's standard deviations are trained, so that it is not the pretrained
            model's any more.
    """
    require_pretrained_sampler(environment, samples)
    if not samples:
        return torch.zeros(0)
    main = accelerator is None or accelerator.process_index == 0
    kept = _read(environment, path, batch) if main else None
    if accelerator is not None:
        kept = parallel.from_main(kept, accelerator)
        batch *= accelerator.num_processes
    rewards, images = ([], []) if kept is None else ([kept["rewards"]], [kept["images"]])
    done = sum(len(part) for part in rewards)
    if done >= samples:
        return torch.cat(rewards)[:samples]
    starts = range(done, samples, batch)
    with (
        not_counted(environment),
        environment.pretrained(),
        shards_of(environment.model).unsharded(),
        progress_bar("the pretrained model", len(starts), shown=progress) as tick,
    ):
        write = _writer(path)
        for first in starts:
            indices = range(first, min(first + batch, samples))

            def made(own: range, indices: range = indices) -> dict[str, Tensor]:
                some = indices[own.start : own.stop]
                sample = sample_in_turn(environment, some, STREAM, reference=False)
                return {"rewards": sample.rollout.rewards.cpu(), "images": sample.images.cpu()}

            every = parallel.of_all(made, len(indices), accelerator)
            rewards.append(every["rewards"])
            images = [torch.cat([*images, every["images"]])[:_PICTURES]]
            if main:
                write({"rewards": torch.cat(rewards), "images": images[0].contiguous()})
            tick("")
    return torch.cat(rewards)


def require_pretrained_sampler(environment: Environment, samples: int) -> None:
    """Refuse samples of the pretrained model where the sampler itself is trained.

    Raises:
        ValueError: its standard deviations are parameters, and samples are asked for.
    """
    if samples and environment.sampler.parameters:
        raise ValueError(
            "frontier_samples are drawn from the pretrained model once the run is done, and by "
            "then the sampler's standard deviations are trained: leave out frontier_samples, or "
            "take more evaluation_samples, which are drawn before the first update"
        )


def _read(environment: Environment, path: Path, batch: int) -> dict[str, Tensor] | None:
    """What an earlier part of the run has kept, if it can be used."""
    if not path.is_file():
        return None
    try:
        kept = read_tensors(path)
        first = len(kept["images"])
        if first != min(_PICTURES, len(kept["rewards"])):
            raise ValueError("it has not the pictures of its first samples")
        seen = Evaluation(
            rewards=kept["rewards"][:first],
            judged={},
            path_kl=torch.zeros(first),
            chain_kl=torch.zeros(first),
            images=kept["images"],
            prompts=[environment.prompts[i % len(environment.prompts)] for i in range(first)],
        )
        require_same_rewards(seen, environment, {}, batch, path)
    except (KeyError, ValueError, OSError) as error:
        _log.warning("%s cannot be used and is made anew: %s", path, error)
        return None
    return kept


def _writer(path: Path) -> Callable[[dict[str, Tensor]], None]:
    """Writes the file whole or not at all; after a failure, which is told, no more."""
    failed = False

    def write(tensors: dict[str, Tensor]) -> None:
        nonlocal failed
        if failed:
            return
        try:
            write_tensors(path, tensors)
        except OSError as error:
            failed = True
            _log.warning("%s cannot be written and is done without: %s", path, error)

    return write
