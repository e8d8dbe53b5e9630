"""Every function of tensors on input that does not fit, without type checks at run time.

Run as a program: prints what came through, one line each. What may come through is a finite result
of the right shape (an expanded or non-contiguous tensor is good input).
"""

import sys
from dataclasses import replace

import torch

import ctrl
from ctrl import adjoint_matching as am
from ctrl import chains, phibe
from ctrl import martingale as mg
from ctrl import policy_gradient as pg
from ctrl import q_learning as ql
from ctrl import risk_sensitive as rs
from ctrl import trust_region as tr

SDE = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.5)
PROBLEM = ctrl.ControlProblem(
    SDE, 0.6, lambda t, x, a: -a.square().sum(-1), lambda x: -x.square().sum(-1), 0.3
)
GRID = ctrl.uniform_grid(0.6, 3)
MEAN = ctrl.DeterministicPolicy(lambda t, x: -0.5 * x)
OTHER = ctrl.DeterministicPolicy(lambda t, x: 0.2 * x)
DRAWN = ctrl.GaussianPolicy(MEAN.mean, 0.4)
PATHS = ctrl.simulate(
    PROBLEM, DRAWN, torch.ones(5, 2).double(), GRID, generator=torch.Generator().manual_seed(0)
)
STILL = ctrl.simulate(
    PROBLEM, MEAN, torch.ones(5, 2).double(), GRID, generator=torch.Generator().manual_seed(0)
)
T = torch.tensor(0.2).double()
ROWS = torch.linspace(-0.4, 0.5, 5).double()
SMALL = torch.linspace(0.1, 0.5, 5).double()
STEPS = torch.full((5, 3), 0.1).double()


WARMED = replace(PROBLEM, discount=0.0)
JUMPS = chains.with_diagonal(torch.tensor([[0.0, 0.8], [1.3, 0.0]]).double()).repeat(3, 1, 1)
CHAIN, OTHER_CHAIN = (chains.JumpRates(GRID, share * JUMPS) for share in (1.0, 0.5))
WHEN = torch.tensor([[0.1, 0.3], [0.25, 0.55], [0.2, 0.5]]).double()
WALKED = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1]])


def value(t, x):
    return (1 + t) * x.square().sum(-1)


def q(t, x, a):
    return -a.square().sum(-1)


def tests(paths):
    return paths.states[:, :-1]


def of(paths, **parts):
    return replace(paths, **parts)


# name -> (function of the tensors, the tensors)
CASES = {
    "Noise": (
        lambda increments, actions: ctrl.Noise(increments, actions).increments,
        {"increments": PATHS.increments, "actions": PATHS.actions},
    ),
    "TimeGrid": (lambda nodes: ctrl.TimeGrid(nodes).steps, {"nodes": GRID.nodes}),
    "brownian_increments": (
        lambda h: ctrl.noise.brownian_increments(h, 4, generator=torch.Generator()),
        {"h": GRID.steps},
    ),
    "gauss_hermite": (
        lambda h: ctrl.noise.gauss_hermite(h, nodes=2).increments, {"h": GRID.steps}
    ),
    "coarsen": (
        lambda dw, fine, coarse: ctrl.noise.coarsen(dw, fine, coarse),
        {"dw": PATHS.increments, "fine": GRID.nodes, "coarse": GRID.nodes[[0, 1, 3]]},
    ),
    "refine": (
        lambda dw, coarse, fine: ctrl.noise.refine(
            dw, coarse, fine, generator=torch.Generator()
        ),
        {"dw": PATHS.increments[:, :2], "coarse": GRID.nodes[[0, 1, 3]], "fine": GRID.nodes},
    ),
    "simulate": (
        lambda start: ctrl.simulate(
            PROBLEM, DRAWN, start, GRID, generator=torch.Generator()
        ).states,
        {"start": torch.ones(5, 2).double()},
    ),
    "simulate_end": (
        lambda start: ctrl.simulate_end(PROBLEM, DRAWN, start, GRID, generator=torch.Generator()),
        {"start": torch.ones(5, 2).double()},
    ),
    "path_kl": (
        lambda states: ctrl.girsanov.path_kl(SDE, MEAN, OTHER, of(STILL, states=states)),
        {"states": STILL.states},
    ),
    "girsanov.log_ratio": (
        lambda states, increments: ctrl.girsanov.log_ratio(
            SDE, MEAN, OTHER, of(STILL, states=states, increments=increments)
        ),
        {"states": STILL.states, "increments": STILL.increments},
    ),
    "importance_weights": (ctrl.girsanov.importance_weights, {"log_ratio": ROWS}),
    "effective_sample_size": (
        lambda weights: torch.tensor(ctrl.girsanov.effective_sample_size(weights)),
        {"weights": torch.full((5,), 0.2).double()},
    ),
    "Estimate": (lambda values: torch.tensor(ctrl.Estimate.of(values).mean), {"values": ROWS}),
    "returns_to_go": (
        lambda states, actions: ctrl.returns_to_go(
            PROBLEM, of(PATHS, states=states, actions=actions)
        ),
        {"states": PATHS.states, "actions": PATHS.actions},
    ),
    "observed rewards": (
        lambda rewards: ctrl.returns_to_go(
            replace(PROBLEM, running_reward=None), of(PATHS, rewards=rewards)
        ),
        {"rewards": STEPS},
    ),
    "martingale_loss": (
        lambda states, actions: mg.martingale_loss(
            value, PROBLEM, of(PATHS, states=states, actions=actions)
        ),
        {"states": PATHS.states, "actions": PATHS.actions},
    ),
    "ctd_lambda": (
        lambda states: mg.ctd_lambda(value, PROBLEM, of(PATHS, states=states), 0.5),
        {"states": PATHS.states},
    ),
    "orthogonality": (
        lambda states: mg.orthogonality(tests, value, PROBLEM, of(PATHS, states=states)),
        {"states": PATHS.states},
    ),
    "q_rate": (
        lambda states, actions: ql.q_rate(PROBLEM, value, T, states, actions),
        {"states": PATHS.states[:, 0], "actions": PATHS.actions[:, 0]},
    ),
    "q martingale_loss": (
        lambda states, actions: ql.martingale_loss(
            value, q, PROBLEM, of(PATHS, states=states, actions=actions)
        ),
        {"states": PATHS.states, "actions": PATHS.actions},
    ),
    "return_gradient": (
        lambda states, actions: pg.return_gradient(
            PROBLEM, DRAWN, of(PATHS, states=states, actions=actions)
        ),
        {"states": PATHS.states, "actions": PATHS.actions},
    ),
    "q_rate_gradient": (
        lambda states, actions: pg.q_rate_gradient(
            PROBLEM, DRAWN, value, of(PATHS, states=states, actions=actions)
        ),
        {"states": PATHS.states, "actions": PATHS.actions},
    ),
    "continuous_gae": (
        lambda values, rewards, h: pg.continuous_gae(values, rewards, h, 1.0),
        {"values": PATHS.states[..., 0], "rewards": STEPS, "h": GRID.steps},
    ),
    "clipped_surrogate": (
        pg.clipped_surrogate, {"log_ratio": ROWS, "advantage": ROWS, "half_width": SMALL}
    ),
    "penalised_surrogate": (
        lambda log_ratio, advantage, kl: tr.penalised_surrogate(log_ratio, advantage, kl, 0.5),
        {"log_ratio": ROWS, "advantage": ROWS, "kl": SMALL},
    ),
    "trust_region.bounded": (
        lambda oscillation, path_kl: tr.bounded(oscillation, path_kl, GRID),
        {"oscillation": STEPS, "path_kl": STEPS},
    ),
    "trust_region.chi_square": (
        lambda variance, chi2: tr.chi_square(variance, chi2, GRID),
        {"variance": STEPS, "chi2": STEPS},
    ),
    "log_prob": (
        lambda states, actions: DRAWN.log_prob(T, states, actions),
        {"states": PATHS.states[:, 0], "actions": PATHS.actions[:, 0]},
    ),
    "phibe.generator": (
        lambda states, ahead: phibe.generator(value, T, states, ahead, 0.2),
        {"states": PATHS.states[:, 0], "ahead": PATHS.states[:, 1:3]},
    ),
    "certainty_equivalent": (
        lambda returns, weights: rs.certainty_equivalent(returns, -0.7, weights),
        {"returns": ROWS, "weights": torch.full((5,), 0.2).double()},
    ),
    "tilting_weights": (
        lambda returns, weights: rs.tilting_weights(returns, -0.7, weights),
        {"returns": ROWS, "weights": torch.full((5,), 0.2).double()},
    ),
    "risk_sensitive.increments": (
        lambda states, actions: rs.increments(
            value, q, WARMED, of(PATHS, states=states, actions=actions), -0.7
        ),
        {"states": PATHS.states, "actions": PATHS.actions},
    ),
    "adjoints": (
        lambda states, increments: am.adjoints(
            PROBLEM, MEAN, of(STILL, states=states, increments=increments)
        ).second,
        {"states": STILL.states, "increments": STILL.increments},
    ),
    "lean_adjoints": (
        lambda states, actions: am.lean_adjoints(
            PROBLEM, of(STILL, states=states, actions=actions)
        ),
        {"states": STILL.states, "actions": STILL.actions},
    ),
    "noise_matching_loss": (
        lambda first: am.noise_matching_loss(PROBLEM, MEAN, STILL, first),
        {"first": STILL.states[:, 1:]},
    ),
    "JumpRates": (
        lambda matrices: chains.JumpRates(GRID, matrices).transitions(), {"matrices": JUMPS}
    ),
    "chains.path_kl": (
        lambda start: chains.path_kl(CHAIN, OTHER_CHAIN, start),
        {"start": torch.tensor([0.3, 0.7]).double()},
    ),
    "chains.log_ratio": (
        lambda times: chains.log_ratio(
            CHAIN, OTHER_CHAIN, chains.JumpPaths(times, WALKED, GRID)
        ),
        {"times": WHEN},
    ),
    "chains.tilt": (
        lambda terminal, running: chains.tilt(CHAIN, 0.5, terminal, running).values,
        {"terminal": torch.tensor([0.3, 0.7]).double(), "running": torch.ones(3, 2).double()},
    ),
}  # fmt: skip

BAD = {
    "nan": lambda v: torch.where(torch.arange(v.numel()).view(v.shape) == 0, torch.nan, v),
    "inf": lambda v: torch.where(torch.arange(v.numel()).view(v.shape) == 0, torch.inf, v),
    "one row too few": lambda v: v[:-1],
    "one row, to be broadcast": lambda v: v[:1],
    "another axis": lambda v: v.unsqueeze(-1),
    "no axis": lambda v: v.flatten()[0],
    "integers": lambda v: v.long(),
    "empty": lambda v: v[:0],
}
GOOD = {
    "not contiguous": lambda v: torch.stack([v, v], dim=-1)[..., 0],
    "with a gradient": lambda v: v.clone().requires_grad_(),
}


# One step or one row at a time, inside loops, vmap and compiled graphs, where a look at values
# would cost a synchronisation each: what is not finite goes through, and is refused where paths
# are born and before an optimiser steps.
POINTWISE = (
    "q_rate", "log_prob", "phibe.generator", "continuous_gae", "clipped_surrogate",
    "penalised_surrogate",
)  # fmt: skip
# an infinite term makes a bound infinite, which is right
UNBOUNDED = ("trust_region.bounded", "trust_region.chi_square")
FEWER = ("one row too few", "one row, to be broadcast")


def allowed(name, arguments, kind, result):
    """Whether a result of bad input is a right answer."""
    if kind in ("nan", "inf") and (name in POINTWISE or (kind == "inf" and name in UNBOUNDED)):
        return True
    # fewer paths, or events of another shape, where nothing else has to fit them
    alone = len(arguments) == 1 or name in ("coarsen", "refine")
    return finite(result) and (
        (alone and kind in FEWER) or (kind == "another axis" and name in SHAPELESS)
    )


SHAPELESS = ("Noise", "coarsen", "refine", "simulate", "simulate_end")


def finite(result):
    return bool(torch.isfinite(result.detach()).all()) and result.numel() > 0


def main():
    """Print every bad input that was taken, and every good one that was refused."""
    collected = []
    for name, (function, arguments) in CASES.items():
        right = function(**arguments)
        assert finite(right), name
        for argument in arguments:
            for kind, spoil in BAD.items():
                spoilt = arguments | {argument: spoil(arguments[argument])}
                try:
                    result = function(**spoilt)
                except (ValueError, TypeError):
                    continue
                except RuntimeError:
                    if kind == "another axis":  # raised by the caller's own drift
                        continue
                    collected.append(f"{name}: {argument} {kind}: RuntimeError")
                    continue
                except Exception as error:
                    collected.append(f"{name}: {argument} {kind}: {type(error).__name__}: {error}")
                    continue
                fits = finite(result) and result.shape == right.shape
                if not fits and not allowed(name, arguments, kind, result):
                    collected.append(
                        f"{name}: {argument} {kind} gave {list(result.shape)} {result}"
                    )
            for kind, same in GOOD.items():
                result = function(**arguments | {argument: same(arguments[argument])})
                if not torch.allclose(result.detach(), right.detach(), rtol=1e-12, atol=1e-12):
                    collected.append(f"{name}: {argument} {kind} gave another answer")
    sys.stdout.writelines(line.replace("\n", " ")[:160] + "\n" for line in collected)
    return bool(collected)


if __name__ == "__main__":
    sys.exit(main())
