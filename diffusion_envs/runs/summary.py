"""What a finished run has to show: estimates on held-out seeds, an export, a report."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from jaxtyping import Float
from torch import Tensor

from ctrl import Estimate
from diffusion_envs.runs.evaluation import Evaluation, by_prompt
from diffusion_envs.runs.over_optimisation import Verdict, verdict
from diffusion_envs.runs.report import write_report
from diffusion_envs.runs.run_folder import write_json, write_lines
from diffusion_envs.runs.run_frontier import RunFrontier
from diffusion_envs.runs.tracking import OVER_OPTIMISATION, read_metrics
from diffusion_envs.training.phase import phase

BY_PROMPT = "by_prompt.jsonl"
_EACH_END = 10  # prompts of the largest and of the smallest gains in summary and report
_ByName: TypeAlias = Mapping[str, Float[Tensor, " n"]]


@dataclass(frozen=True, repr=False)
class Run:
    """What a finished run has to show, in a few lines where it is printed or shown in a notebook.

    Estimates are over held-out seeds.
    """

    folder: Path
    exported: Path  # the file that the model's own library loads
    report: Path
    reward_before: Estimate
    reward: Estimate
    reward_gain: Estimate  # after minus before, paired by seed
    path_kl: Estimate | None  # from the pretrained model, nats; None of an ODE or a black box
    judge_gains: Mapping[str, Estimate]  # after minus before, by held-out reward
    part_gains: Mapping[str, Estimate]  # the same of each part of the reward; empty if it has none
    metrics: Mapping[str, Estimate]  # of runs/over_optimisation.py: diversity and distance too
    over_optimisation: Verdict  # of the exported model
    update: int  # after which the exported model was taken
    frontier: RunFrontier | None = None  # how near the best possible; None off the main process
    stopped: str | None = None  # why the stop rule ended the run, if it did

    def __repr__(self) -> str:
        """The run in a few lines: the frontier alone would fill a screen with its numbers."""
        kl = "" if self.path_kl is None else f", at a path KL of {self.path_kl} nats"
        gains = [
            f"{what} {name}: {gain} higher than the pretrained model's"
            for what, each in (("part", self.part_gains), ("judge", self.judge_gains))
            for name, gain in each.items()
        ]
        lines = [
            f"Run {self.folder}, exported after update {self.update}",
            f"reward {self.reward_before} -> {self.reward}, paired gain {self.reward_gain}{kl}",
            *gains,
            self.over_optimisation.sentence,
            *([] if self.stopped is None else [f"stopped: {self.stopped}"]),
            f"exported: {self.exported}",
            f"report:   {self.report}",
        ]
        return "\n".join(lines)


@phase("report")
def summarise(
    folder: Path,
    exported: Path,
    before: Evaluation,
    after: Evaluation,
    metrics: Mapping[str, Estimate],
    *,
    update: int,
    stop: Mapping[str, Any] | None,
    write: bool,
    frontier: RunFrontier | None = None,
) -> Run:
    """Say how a run went; write ``summary.json``, ``frontier.json`` and the report.

    Args:
        folder: of the run.
        exported: the file that was exported.
        before: the pretrained model.
        after: the exported model, on the same seeds.
        metrics: over-optimisation metrics of the exported model.
        update: after which the exported model was taken.
        stop: what the stop rule did, if there is one.
        write: False on all processes but the main one, which has the logs.
        frontier: how near the exported model is to the best possible.
    """
    judge_gains = _gains(before.judged, after.judged)
    part_gains = _gains(before.parts, after.parts)
    lines = read_metrics(folder / OVER_OPTIMISATION) if write else []
    last = {name: value.as_dict() for name, value in metrics.items()} | {"update": update}
    judgement = verdict([line for line in lines if line["update"] < update] + [last])
    assert judgement is not None  # there is a line
    run = Run(
        folder=folder,
        exported=exported,
        report=folder / "report.html",
        reward_before=Estimate.of(before.rewards),
        reward=Estimate.of(after.rewards),
        reward_gain=Estimate.of(after.rewards - before.rewards),
        path_kl=metrics.get("path_kl"),
        judge_gains=judge_gains,
        part_gains=part_gains,
        metrics=metrics,
        over_optimisation=judgement,
        update=update,
        frontier=frontier,
        stopped=None if stop is None else stop["reason"],
    )
    if write:
        every = [
            {"prompt": prompt, **{part: value.as_dict() for part, value in parts.items()}}
            for prompt, parts in by_prompt(before, after).items()
        ]
        write_lines(folder / "evaluation" / BY_PROMPT, every)
        summary = {
            "update": update,
            "stop": stop,
            **({} if run.path_kl is None else {"path_kl": run.path_kl.as_dict()}),
            "reward": _compared(run.reward_before, run.reward, run.reward_gain),
            **({"parts": _all_compared(before.parts, after.parts)} if part_gains else {}),
            "judges": _all_compared(before.judged, after.judged),
            "prompts": len(every),
            "by_prompt": extremes(every),
            "over_optimisation_metrics": {n: value.as_dict() for n, value in metrics.items()},
            "over_optimisation": dataclasses.asdict(judgement),
        }
        if frontier is not None:
            summary["frontier"] = frontier.as_dict()
            write_json(folder / "frontier.json", frontier.drawn())
        write_json(folder / "summary.json", summary)
        write_report(folder)
    return run


def extremes(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rewards by prompt, largest gain first: of all prompts, or those at both ends of many."""
    ordered = sorted(lines, key=lambda line: -line["difference"]["mean"])
    if len(ordered) > 2 * _EACH_END:
        ordered = ordered[:_EACH_END] + ordered[-_EACH_END:]
    return {
        line["prompt"]: {part: value for part, value in line.items() if part != "prompt"}
        for line in ordered
    }


def _gains(before: _ByName, after: _ByName) -> dict[str, Estimate]:
    return {name: Estimate.of(value - before[name]) for name, value in after.items()}


def _all_compared(before: _ByName, after: _ByName) -> dict[str, dict[str, Any]]:
    return {
        name: _compared(Estimate.of(before[name]), Estimate.of(after[name]), gain)
        for name, gain in _gains(before, after).items()
    }


def _compared(before: Estimate, after: Estimate, difference: Estimate) -> dict[str, Any]:
    """The same as plain JSON."""
    named = {"before": before, "after": after, "difference": difference}
    return {name: value.as_dict() for name, value in named.items()}
