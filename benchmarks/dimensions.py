"""How long and how much memory exact linear-quadratic answers and q-rates take as dimensions grow.

    python -m benchmarks.dimensions

Prints one JSON line a case, in processor seconds of one thread. Linear-quadratic problems are
compared with scipy's algebraic Riccati solver on the same matrices, in the same run; q-rates with
as many plain evaluations of the value network as they have directions.
"""

import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator

import scipy.linalg
import torch
from torch import Tensor

import ctrl
from ctrl.linear import LinearQuadratic

RUNS = 5
DIMENSIONS = (10, 30, 100)
STATES = (100, 1000)
PATHS, STEPS, PROBES = 256, 5, 8


def seconds(function: Callable[[], object], runs: int = RUNS) -> dict[str, float]:
    """Median, least and most processor seconds of a few runs, after one that is not counted."""
    function()
    durations = []
    for _ in range(runs):
        began = time.process_time()
        function()
        durations.append(time.process_time() - began)
    return {
        "seconds": statistics.median(durations),
        "least": min(durations),
        "most": max(durations),
    }


def problems(n: int) -> Iterator[tuple[str, LinearQuadratic]]:
    """Agents that average over a random graph, a mean field, and random matrices."""
    g = torch.Generator().manual_seed(n)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    eye, ones = torch.eye(n).double(), torch.ones(n, n).double() / n
    links = (drawn(n, n) > 1).double().triu(1)
    links = links + links.T
    laplacian = torch.diag(links.sum(1)) - links
    few = max(1, n // 3)
    common = {"sigma": 0.4 * eye, "M": eye}
    yield "consensus", LinearQuadratic(A=-0.3 * laplacian, B=eye, N=eye, **common)
    yield "mean field", LinearQuadratic(A=-0.2 * eye + 0.5 * ones, B=eye, N=eye, **common)
    yield (
        "random",
        LinearQuadratic(
            A=drawn(n, n) / n**0.5 - eye, B=drawn(n, few), N=torch.eye(few).double(),
            R=0.1 * drawn(few, n) / n**0.5, p=drawn(n), f=drawn(n), temperature=0.1, **common,
        ),
    )  # fmt: skip


def slope(lq: LinearQuadratic) -> Tensor:
    """The derivative of the best average reward in the drift's matrix."""
    A = lq.A.clone().requires_grad_()
    shifted = LinearQuadratic(A, lq.B, lq.sigma, lq.M, lq.N, lq.R, lq.p)
    reward = ctrl.linear.solve_lq_ergodic(shifted).average_reward
    assert reward is not None
    return torch.autograd.grad(reward, A)[0]


def linear_quadratic() -> Iterator[dict[str, object]]:
    """Ergodic and finite-horizon solutions, and the derivative of the ergodic reward."""
    times = torch.linspace(0, 1, 11).double()
    for n in DIMENSIONS:
        for name, lq in problems(n):
            arrays = [each.numpy() for each in (lq.A, lq.B, lq.M, lq.N)]
            cross = lq.R.mT.numpy()
            peer = seconds(lambda a=arrays, s=cross: scipy.linalg.solve_continuous_are(*a, s=s))
            for kind, solve in {
                "ergodic": lambda lq=lq: ctrl.linear.solve_lq_ergodic(lq),
                "ergodic, with its derivative in A": lambda lq=lq: slope(lq),
                "finite horizon": lambda lq=lq: ctrl.linear.solve_lq(lq, times),
            }.items():
                spent = seconds(solve)
                over = spent["seconds"] / peer["seconds"]
                yield {"case": f"{kind}, {name}", "dim": n, **spent, "over_scipy_care": over}


def q_rates() -> Iterator[dict[str, object]]:
    """Exact and estimated traces along paths, with a small network as value."""
    for dim in STATES:
        g = torch.Generator().manual_seed(dim)
        network = torch.nn.Sequential(
            torch.nn.Linear(dim, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)
        ).double()
        sde = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 1.0)
        problem = ctrl.ControlProblem(sde, 1.0)
        policy = ctrl.GaussianPolicy(lambda t, x: -0.1 * x, 1.0)
        start = torch.zeros(PATHS, dim).double()
        grid = ctrl.uniform_grid(1.0, STEPS)
        paths = ctrl.simulate(problem, policy, start, grid, generator=g)
        signs = ctrl.noise.random_signs(PATHS, STEPS, PROBES, dim, like=start, generator=g)
        states = paths.states[:, :-1].reshape(-1, dim)

        def value(t: Tensor, x: Tensor, network: torch.nn.Module = network) -> Tensor:
            return network(x)[:, 0]

        with torch.no_grad():
            call = seconds(lambda network=network, states=states: network(states))["seconds"]
            for kind, probes, directions in (("exact", None, dim), ("probes", signs, PROBES)):
                began = time.process_time()
                ctrl.q_learning.q_rates(problem, value, paths, probes)
                spent = time.process_time() - began
                yield {
                    "case": f"q-rates, {kind}", "dim": dim, "seconds": spent,
                    "over_network_calls": spent / (call * directions),
                    "peak_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                }  # fmt: skip


def main() -> None:
    """Print one line a case."""
    torch.set_num_threads(1)
    for line in (*q_rates(), *linear_quadratic()):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
