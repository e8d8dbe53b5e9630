"""Evaluation of a fine-tuned model on held-out seeds, paired with the pretrained one."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from ctrl import DeterministicPolicy, Estimate
from diffusion_envs import rewards
from diffusion_envs.digests import read_tensors, write_tensors
from diffusion_envs.environment import Environment, Sample
from diffusion_envs.prompt import described
from diffusion_envs.rollout import Rollout
from diffusion_envs.runs.checkpoint import CheckpointError
from diffusion_envs.training import memory, parallel
from diffusion_envs.training.sharded import shards_of

HELD_OUT = "held-out"  # the stream's name: training never draws from it
WATCHED = "watched"  # another, for what decides when to stop: the last evaluation never sees it
_SAME = 1e-3  # of a reward and of its standard deviation: a device may round otherwise
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One number per held-out sample, in the order of their index."""

    rewards: Float[Tensor, " n"]
    judged: Mapping[str, Float[Tensor, " n"]]  # by name of a reward that was not trained on
    path_kl: Float[Tensor, " n"]  # nats; infinite of an ODE, NaN of a black box: it is not known
    chain_kl: Float[Tensor, " n"]  # that of the chain that was sampled, not of the SDE
    images: Float[Tensor, " n *picture"]
    prompts: list[str]
    # of the reward, by name; empty if it has none
    parts: Mapping[str, Float[Tensor, " n"]] = field(default_factory=dict)

    def first(self, n: int) -> "Evaluation":
        """The first n samples only."""
        return Evaluation(
            rewards=self.rewards[:n],
            judged={name: values[:n] for name, values in self.judged.items()},
            path_kl=self.path_kl[:n],
            chain_kl=self.chain_kl[:n],
            images=self.images[:n],
            prompts=self.prompts[:n],
            parts={name: values[:n] for name, values in self.parts.items()},
        )


def evaluate(
    environment: Environment,
    samples: int,
    *,
    judges: Mapping[str, rewards.Reward] | None = None,
    batch: int = 32,
    pretrained: bool = False,
    stream: str = HELD_OUT,
    accelerator: Accelerator | None = None,
) -> Evaluation:
    """Sample held-out seeds and score them; costs are not counted.

    Several processes share the samples out by their index, and all get the whole. The numbers are
    those of one process where the network's are the same in any batch, bit for bit; elsewhere up to
    their round-off (``objectives.path_steps.score_rounding``), as with another ``batch``.

    Args:
        environment: with the sampler to evaluate.
        samples: how many; sample i has prompt i modulo the number of prompts, and its own noise,
            the same for every model, step count and eta of one seed.
        judges: rewards that only judge, by name.
        batch: samples rolled out at once; fewer from then on where memory runs out.
        pretrained: evaluate the model without its adapter.
        stream: names the noise.
        accelerator: processes that share the samples; None: this one makes all.
    """
    at_once = memory.AtMost(environment, batch)

    def made(own: range) -> dict[str, Tensor]:
        with not_counted(environment), environment.pretrained() if pretrained else nullcontext():
            parts = environment.in_pieces(
                lambda c: sample_in_turn(environment, own[c], stream),
                at_once,
                "held-out samples",
                rows=len(own),
            )
        images = torch.cat([part.images.cpu() for part in parts])
        asked = [prompt for part in parts for prompt in part.prompts]
        named = (judges or {}).items()
        evaluation = Evaluation(
            rewards=torch.cat([part.rollout.rewards.cpu() for part in parts]),
            judged={name: _judged(environment, judge, images, asked) for name, judge in named},
            path_kl=torch.cat([_path_kl(part.rollout).cpu() for part in parts]),
            chain_kl=torch.cat([_chain_kl(environment, part.rollout).cpu() for part in parts]),
            images=images,
            prompts=asked,
            parts=_parts([part.rollout for part in parts]),
        )
        return _named(evaluation)

    with shards_of(environment.model).unsharded():
        every = parallel.of_all(made, samples, accelerator)
    return _evaluation(every, environment, judges or {})


def _named(evaluation: Evaluation) -> dict[str, Tensor]:
    """Its tensors by name, as they are stored."""
    tensors = {"rewards": evaluation.rewards, "images": evaluation.images}
    tensors |= {"path_kl": evaluation.path_kl, "chain_kl": evaluation.chain_kl}
    tensors |= {f"judged.{name}": value for name, value in evaluation.judged.items()}
    return tensors | {f"part.{name}": value for name, value in evaluation.parts.items()}


def _evaluation(
    stored: Mapping[str, Tensor], environment: Environment, judges: Mapping[str, rewards.Reward]
) -> Evaluation:
    """The evaluation with these tensors.

    Raises:
        KeyError: one is missing.
    """
    prompts = environment.prompts
    return Evaluation(
        rewards=stored["rewards"],
        judged={name: stored[f"judged.{name}"] for name in judges},
        path_kl=stored["path_kl"],
        # runs of before stored none: 0 of the pretrained model, if it is known
        chain_kl=stored.get("chain_kl", stored["path_kl"]),
        images=stored["images"],
        prompts=[prompts[i % len(prompts)] for i in range(len(stored["rewards"]))],
        parts={name: stored[f"part.{name}"] for name in environment.part_weights},
    )


def _judged(
    environment: Environment, judge: rewards.Reward, images: Tensor, prompts: Sequence[str]
) -> Float[Tensor, " n"]:
    """What a judge says of all pictures, at once or in as many pieces as memory asks for."""
    ask = rewards.limited(environment.reward_timeout, rewards.score)
    parts = environment.in_pieces(
        lambda c: ask(judge, images[c], prompts[c]),
        environment.judged,
        f"the judge {rewards.reward_name(judge)}",
        rows=len(images),
    )
    return torch.cat(parts)


def _parts(rollouts: Sequence[Rollout]) -> dict[str, Float[Tensor, " n"]]:
    """Each part of the rewards, one roll-out after another."""
    columns = [r.reward_parts.cpu() for r in rollouts if r.reward_parts is not None]
    if not columns:
        return {}
    return dict(zip(rollouts[0].part_weights, torch.cat(columns).unbind(1), strict=True))


@contextmanager
def not_counted(environment: Environment) -> Iterator[None]:
    """Within it costs are not counted; nor are those of what is interrupted."""
    spent = environment.reward_queries, environment.model.calls
    try:
        yield
    finally:
        environment.reward_queries, environment.model.calls = spent


def sample_in_turn(
    environment: Environment, samples: range, stream: str, *, reference: bool = True
) -> Sample:
    """Some samples of the model as it is now; sample i has prompt i modulo their number.

    Args:
        environment: with the sampler.
        samples: global indices; each names its own noise.
        stream: names the noise.
        reference: whether path KLs are computed.
    """
    condition = torch.tensor([i % len(environment.prompts) for i in samples])
    return environment.sample(
        lambda mean, _: DeterministicPolicy(mean),
        samples,
        condition,
        stream=stream,
        reference=reference,
    )


def _path_kl(rollout: Rollout) -> Float[Tensor, " n"]:
    """Path KL of each path, nats; NaN where its steps are not known."""
    known = rollout.costs.shape[1] > 0
    return rollout.costs.sum(1) if known else torch.full_like(rollout.rewards, math.nan)


def _chain_kl(environment: Environment, rollout: Rollout) -> Float[Tensor, " n"]:
    """The sum of each path's transition KLs, nats; NaN where its steps are not known."""
    if rollout.reference_scores is None or not rollout.costs.shape[1]:
        return torch.full_like(rollout.rewards, math.nan)
    return environment.steps.chain_kl(rollout.means, rollout.reference_scores).sum(1)


def by_prompt(before: Evaluation, after: Evaluation) -> dict[str, dict[str, Estimate]]:
    """Reward of each prompt before and after, and the paired difference.

    Prompts with other columns are other prompts, and their columns are told with them.

    Args:
        before: the pretrained model.
        after: the fine-tuned model on the same seeds.
    """
    parts = {
        "before": before.rewards,
        "after": after.rewards,
        "difference": after.rewards - before.rewards,
    }
    members: dict[str, list[int]] = {}
    for row, prompt in enumerate(after.prompts):
        members.setdefault(described(prompt), []).append(row)
    return {
        prompt: {part: Estimate.of(values[rows]) for part, values in parts.items()}
        for prompt, rows in members.items()
    }


# -- the pretrained model's, kept in the folder of a run -------------------------------------------


def evaluate_pretrained(
    environment: Environment,
    samples: int,
    path: Path,
    *,
    judges: Mapping[str, rewards.Reward],
    batch: int,
    accelerator: Accelerator | None = None,
) -> Evaluation:
    """The pretrained model on the held-out seeds: read from ``path``, or made and written there.

    What is read is scored again, so that no gain is ever measured between two rewards. A file that
    is damaged is made anew. Of several processes the main one reads and writes.

    Raises:
        ValueError: the reward or a judge scores the stored pictures otherwise.
        CheckpointError: the file cannot be written.
    """
    main = accelerator is None or accelerator.process_index == 0
    stored = None
    if main and path.is_file():
        try:
            stored = _named(_read(path, environment, samples, judges))
        except (KeyError, ValueError, OSError) as error:
            _log.warning("%s is damaged and is made anew: %s", path, error)
    if accelerator is not None:
        stored = parallel.from_main(stored, accelerator)
    if stored is not None:
        read = _evaluation(stored, environment, judges)
        require_same_rewards(read, environment, judges, batch, path, accelerator)
        return read
    made = evaluate(
        environment,
        samples,
        judges=judges,
        batch=batch,
        pretrained=True,
        accelerator=accelerator,
    )
    if not main:
        return made
    try:
        write_tensors(path, _named(made))
    except OSError as error:
        raise CheckpointError(
            f"could not write the pretrained model's evaluation to {path}: {error}. Free space or "
            "choose another output folder, then resume"
        ) from error
    return made


def require_the_runs_reward(environment: Environment, path: Path, batch: int) -> None:
    """Refuse a reward that scores the pictures in ``path`` otherwise than when they were made.

    Raises:
        ValueError: it does.
        RewardError: the reward raises or returns something unusable.
    """
    try:
        stored = _read(path, environment, None, {})
    except (KeyError, ValueError, OSError):  # nothing to compare with: it is damaged
        return
    require_same_rewards(stored, environment, {}, batch, path)


def _read(
    path: Path, environment: Environment, samples: int | None, judges: Mapping[str, rewards.Reward]
) -> Evaluation:
    read = _evaluation(read_tensors(path), environment, judges)
    samples = len(read.rewards) if samples is None else samples
    every = (read.rewards, read.images, *read.judged.values(), *read.parts.values())
    if {len(value) for value in every} != {samples}:
        raise ValueError(f"it does not hold {samples} samples")
    return read


def require_same_rewards(
    stored: Evaluation,
    environment: Environment,
    judges: Mapping[str, rewards.Reward],
    batch: int,
    path: Path,
    accelerator: Accelerator | None = None,
) -> None:
    """Refuse a reward or judge that scores stored pictures otherwise than when they were made.

    One that does not agree with itself either, asked twice, is random: of it nothing is known.
    Several processes share the pictures out, and all refuse, or none.
    """

    def scores(reward: rewards.Reward, size: int, where: torch.device) -> Tensor:
        def asked(own: range) -> dict[str, Tensor]:
            pieces = (own[k : k + size] for k in range(0, len(own), size))
            told = [
                environment.ask(
                    reward,
                    stored.images[c.start : c.stop].to(where),
                    stored.prompts[c.start : c.stop],
                    c,
                ).cpu()
                for c in pieces
            ]
            return {"scores": torch.cat(told)}

        return parallel.of_all(asked, len(stored.images), accelerator)["scores"]

    whole, cpu = len(stored.images), torch.device("cpu")
    asked = {"reward": (environment.reward, stored.rewards, batch, environment.device)}
    asked |= {f"judge {n}": (judge, stored.judged[n], whole, cpu) for n, judge in judges.items()}
    for name, (reward, then, size, where) in asked.items():
        now, width = scores(reward, size, where), _SAME * then.std()
        differ = (now - then).abs() > _SAME * then.abs() + width
        if not bool(differ.any()):
            continue
        again = scores(reward, size, where)
        if bool(((again - now).abs() > _SAME * now.abs() + width).any()):
            continue
        k = int(differ.nonzero()[0])
        raise ValueError(
            f"{name} is not the one that this run was started with: picture {k} "
            f"({stored.prompts[k]!r}) of {path} scored {then[k]:.6g} then and scores {now[k]:.6g} "
            "now; resume with the reward and judges of the start, or start a new run"
        )
