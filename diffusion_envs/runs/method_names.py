"""Methods, optimisers, samplers and prompts by the names that command lines use."""

from collections.abc import Mapping
from typing import Any

from diffusion_envs import objectives, rewards, samplers
from diffusion_envs.cifar10.data import CLASSES
from diffusion_envs.rewards import registry
from diffusion_envs.runs.settings import Unnamed, describe
from diffusion_envs.training import optimisers

JUDGES_OF = {  # where none is named
    name: {"judge": f"{name}-judge"} for name in ("prompt-alignment", "class-confidence")
}
OBJECTIVES = {
    "adjoint-matching": objectives.AdjointMatching,
    "adjoint-matching-zeroth-order": objectives.ZerothOrderAdjointMatching,
    "dxmi-continuous-released": objectives.ContinuousDxMIReleased,
    "dxmi-continuous": objectives.ContinuousDxMI,
    "dxmi": objectives.DxMI,
    "dxmi-continuous-released-from-data": objectives.ContinuousDxMIReleasedFromData,
    "dxmi-continuous-from-data": objectives.ContinuousDxMIFromData,
    "dxmi-from-data": objectives.DxMIFromData,
    "align-prop": objectives.AlignProp,
    "draft": objectives.DRaFT,
    "refl": objectives.ReFL,
    "dense-reward": objectives.DenseReward,
    "d3po": objectives.D3PO,
    "diffusion-dpo": objectives.DiffusionDPO,
    "ddpo": objectives.DDPO,
    "ddpo-sf": objectives.DDPOScoreFunction,
    "distributional": objectives.DistributionalOptimisation,
    "dpok": objectives.DPOK,
    "grpo": objectives.GRPO,
    "grpo-guard": objectives.GRPOGuard,
    "flow-dppo": objectives.FlowDPPO,
    "pcpo": objectives.PCPO,
    "tdpo": objectives.TDPO,
    "tdpo-r": objectives.TDPOReset,
    "nft": objectives.DiffusionNFT,
    "ram": objectives.ReinforceAdjointMatching,
    "tilted-regression": objectives.TiltedRegression,
    "score-as-action": objectives.ScoreAsAction,
    "score-as-action-sampled": objectives.ScoreAsActionSampled,
    "score-as-action-released": objectives.ScoreAsActionReleased,
}
OPTIMISERS = {
    "adamw": optimisers.AdamW,
    "adamw-8bit": optimisers.AdamW8bit,
    "bounded-adamw": optimisers.BoundedAdamW,
    "natural-gradient": optimisers.NaturalGradient,
    "diagonal-metric": optimisers.DiagonalMetric,
    "scaled-lora": optimisers.ScaledLoRA,
}
SAMPLERS: dict[str, samplers.Sampler] = {
    "ddim": samplers.DDIM(),
    "ddim-ode": samplers.DDIM(0.0),
    "dpm++": samplers.Scheduler("DPMSolverMultistepScheduler"),
    "unipc": samplers.Scheduler("UniPCMultistepScheduler"),
    "heun": samplers.Scheduler("HeunDiscreteScheduler"),
    "dxmi-10": samplers.QuadraticVariances(),
    "dxmi-10-learned": samplers.QuadraticVariances(learned_std=True),
    "ours-4": samplers.EqualAngles(),
    "ours-4-learned": samplers.EqualAngles(learned_std=True),
}
CLASS_PROMPTS = tuple(f"a photo of a{'n' if name[0] in 'aeiou' else ''} {name}" for name in CLASSES)


def entry(kind: str, name: str, table: Mapping[str, Any], own: str = "") -> Any:
    """The entry of a table, or an error that suggests the nearest; or your own, by import.

    Raises:
        ValueError: there is no such name.
    """
    if own and ":" in name:
        return rewards.load(name, kind)
    return registry.named(kind, name, table, own)


def sampler_named(kind: str, name: str) -> samplers.Sampler:
    """A sampler by its name, or by that of a class of diffusers.

    Raises:
        ValueError: there is no such name, or the class takes no table of betas.
    """
    if name not in SAMPLERS and name.endswith("Scheduler"):
        return samplers.Scheduler(name)
    return entry(kind, name, SAMPLERS, "")


def class_named(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    """The class of an objective or optimiser."""
    if ":" not in name:
        return entry(kind, name, table)
    if ".py:" in name:
        raise ValueError(
            f"{kind} must be imported, as my_module:MyClass, so that a resumed run has it again, "
            f"got {name!r}"
        )
    return type(entry(kind, name, {}, "my_module:MyClass"))


def name_of(value: Any, table: Mapping[str, Any]) -> str:
    """What to write for an object."""
    known = next((name for name, each in table.items() if each == value), None)
    known = known or registry.name_of(value)
    if known is not None or isinstance(value, Unnamed):
        return known or value.why
    described = describe(value)
    return next((described[k] for k in ("function", "loaded", "class") if k in described), "?")
