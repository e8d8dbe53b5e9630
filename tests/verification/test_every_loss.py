"""A factor planted into each shipped loss, and into each piece that losses are made of.

Whatever the objectives' modules define or import, the environment, the critic and the samplers is
found by introspection, so that a new method is covered as it is written: what it returns is changed
in the source, by a factor or by an offset, and some claim that calls it must fail.
"""

import ast
import inspect
import pkgutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from types import CodeType, FunctionType

import pytest

import diffusion_envs.objectives
import diffusion_envs.samplers
from diffusion_envs.objectives.protocol import Objective
from tests.verification.scaled_returns import changed_returns, functions_of, returns_numbers
from verification import tolerances
from verification.claim import Check, Claim, Setting
from verification.claims import CLAIMS
from verification.planting import _function, planted

TABLE = tolerances.load()["float64"]
# what losses are made of; other claims are asked only if none of these sees a change
ABOUT = (
    "losses-of-steps",
    "losses-of-score-as-action",
    "losses-of-targets",
    "losses-of-values",
    "losses-of-noised-data",
    "losses-through-the-sampler",
    "advantages",
    "choices-and-settings",
    "critic",
    "energy-of-data",
    "value-network",
    "roll-outs",
    "training-loop",
    "adjoint-matching",
    "predictions",
    "schedules",
    "tables-of-samplers",
    "samplers-of-few-steps",
    "ddim-transitions",
    "flow-sde",
    "sampler-kl",
    "eta-family",
)
OTHERS = [
    name
    for name, claim in CLAIMS.items()
    if claim.theme in ("fine_tuning", "denoising") and name not in ABOUT
]
MODULES = [
    *(
        f"{package.__name__}.{module.name}"
        for package in (diffusion_envs.objectives, diffusion_envs.samplers)
        for module in pkgutil.iter_modules(package.__path__)
    ),
    "diffusion_envs.denoising",
    "diffusion_envs.environment",
    "diffusion_envs.noise_schedules",
    "diffusion_envs.preferences",
    "diffusion_envs.rewards.rounding",
    "diffusion_envs.training.critic",
    "diffusion_envs.training.energy",
    "diffusion_envs.training.value_network",
]
_LOGGED = "is only logged"
_REFUSES = "only decides what is refused"
_LEARNED = "a network of pictures: its weights are learned, a factor among them"
UNSEEN = {  # nothing sees a change of these, and why
    "diffusion_envs.objectives.*.clipped": _LOGGED,
    "diffusion_envs.objectives.*.numbers": _LOGGED,
    "diffusion_envs.objectives.path_steps.PathObjective.action_std": _REFUSES,
    "diffusion_envs.objectives.path_steps.PathObjective.half_width": "infinite: no clip",
    "diffusion_envs.objectives.path_steps.log_ratio_rounding": _REFUSES,
    "diffusion_envs.objectives.path_steps.score_rounding": _REFUSES,
    "diffusion_envs.objectives.preflight.*": _REFUSES,
    "diffusion_envs.samplers.*._resolution": _REFUSES,
    "diffusion_envs.environment.Environment.ask": "what judges say is only reported",
    "diffusion_envs.preferences.Recorded.__call__": "people's choices, as a file has them",
    "diffusion_envs.training.energy.EnergyOfPictures.forward": _LEARNED,
    "diffusion_envs.training.energy._Block.forward": _LEARNED,
    "diffusion_envs.training.value_network.ResidualValue.forward": _LEARNED,
}


def _imported(module: str) -> Iterator[str]:
    """Functions of ours that a module of losses imports, wherever they are."""
    for each in vars(sys.modules[module]).values():
        if isinstance(each, FunctionType) and each.__module__ != module:
            whole = f"{each.__module__}.{each.__qualname__}"
            if each.__module__.startswith(("ctrl.", "diffusion_envs.")):
                node = ast.parse(inspect.getsource(inspect.unwrap(each))).body[0]
                assert isinstance(node, ast.FunctionDef)
                if returns_numbers(node):
                    yield whole


def _targets() -> list[str]:
    own = [name for m in MODULES for name, node in functions_of(m) if returns_numbers(node)]
    imported = [name for m in MODULES if "objectives" in m for name in _imported(m)]
    return list(dict.fromkeys([*own, *imported]))


TARGETS = _targets()


@dataclass(frozen=True)
class Called:
    """Which claims call a function, the quickest first."""

    claims: dict[CodeType, list[str]]

    def by(self, target: str) -> list[str]:
        """Those that call this one."""
        return self.claims.get(_function(target).__code__, [])


@pytest.fixture(scope="module")
def called() -> Called:
    """Every claim that is about losses, run once on the right code, by what it calls."""
    claims, cost = defaultdict[CodeType, list[str]](list), dict[str, float]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxtyping.config.jaxtyping_disable", True)  # as users run it
        for name in ABOUT:
            codes, began = set[CodeType](), time.perf_counter()
            sys.setprofile(
                lambda frame, event, _, codes=codes: (
                    codes.add(frame.f_code) if event == "call" else None
                )
            )
            try:
                failed = fails(CLAIMS[name])
            finally:
                sys.setprofile(None)
            assert failed is None, f"{name} fails on the right code: {failed}"
            cost[name] = time.perf_counter() - began
            for code in codes:
                claims[code].append(name)
    return Called({code: sorted(names, key=cost.__getitem__) for code, names in claims.items()})


def fails(claim: Claim) -> str | None:
    """The first check that fails; None if all hold, or the code raised before one did."""
    try:
        for check in claim.body(Setting()):
            held = isinstance(check, Check) and TABLE[claim.name][check.name].tolerance
            if isinstance(check, Check) and not check.deviation <= held:
                return check.name
    except Exception:  # a mistake that raises is seen, but not by a check
        return None
    return None


def seen(target: str, claims: list[str]) -> str | None:
    """The claim that fails where what the function returns is changed."""
    for how in ("scaled", "shifted"):
        edit = changed_returns(target, how)
        assert edit is not None
        with planted(edit):
            for name in claims:
                if fails(CLAIMS[name]) is not None:
                    return name
    return None


@pytest.mark.filterwarnings("default")  # wrong formulas may divide by zero
@pytest.mark.parametrize("target", TARGETS)
def test_a_change_of_what_it_returns_makes_a_claim_fail(target, called, as_users_run_it):
    by = seen(target, called.by(target))
    if any(fnmatch(target, pattern) for pattern in UNSEEN):
        assert by is None, f"{by} sees {target}: take it off the list of what nothing sees"
    else:
        assert by or seen(target, OTHERS), f"a factor in {target} moves no claim"


def test_every_objectives_loss_is_among_them():
    concrete = [
        kind
        for name in diffusion_envs.objectives.__all__
        if isinstance(kind := getattr(diffusion_envs.objectives, name), type)
        and issubclass(kind, Objective)
        and not inspect.isabstract(kind)
    ]
    assert len(concrete) >= 26
    for kind in concrete:
        loss = inspect.unwrap(inspect.getattr_static(kind, "loss"))
        assert f"{loss.__module__}.{loss.__qualname__}" in TARGETS, kind.__name__


def test_every_pattern_of_what_nothing_sees_is_of_something():
    for pattern in UNSEEN:
        assert any(fnmatch(target, pattern) for target in TARGETS), pattern
