"""One library's side of benchmarks/peers.py, in a process of its own.

Reads lines "case paths", answers each with wall seconds and what the call says of itself: those of
the call after one that does not count (another library has just had the caches), for few paths the
median of three. Run by any Python that has the library: only what a case needs is imported, so that
libraries do not share threads, memory or an allocator.

    python benchmarks/peer_process.py ctrl|torch|torchsde|torchdiffeq|jax|diffrax|finhjb THREADS
"""

# Each Python has some of the libraries only.
# pyright: reportMissingImports=false

import functools
import itertools
import statistics
import sys
import time

DIM, STEPS = 8, 200
H = 1 / STEPS
WALL = 1.4  # w of the exit problem
NODES = 401


def ctrl_cases(threads):
    """``simulate`` and ``hjb`` of the installed ctrl, or of the one that PYTHONPATH names."""
    import math

    import torch

    import ctrl

    torch.set_num_threads(threads)
    generator, zero = torch.Generator().manual_seed(0), torch.zeros(())
    sde = ctrl.ControlledSDE(drift=lambda t, x, a: -x, diffusion=lambda t, x: 0.5)
    problem, grid = ctrl.ControlProblem(sde, 1.0), ctrl.uniform_grid(1.0, STEPS)
    policy = ctrl.DeterministicPolicy(lambda t, x: zero.expand(len(x), 1))
    streams = ctrl.noise.PathStreams(0, ("benchmark",))
    start = functools.cache(lambda paths: torch.zeros(paths, DIM))

    def simulated(paths, keep=("states",), **settings):
        return ctrl.simulate(problem, policy, start(paths), grid, keep=keep, **settings)

    def by_path(paths):
        # both are new: an earlier version has neither threads nor the argument
        return simulated(paths, generator=streams, **({"workers": threads} if threads > 1 else {}))

    def ode(paths):
        box = ctrl.BlackBox(lambda t0, t1, x, a: x - H * x)
        return ctrl.simulate(problem, policy, start(paths) + 1, grid, box, keep=("states",))

    def exit_problem(paths):
        from ctrl import hjb, stopping

        fleming = ctrl.ControlProblem(
            ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 1.0), math.inf,
            lambda t, x, a: -0.5 * (a.square().sum(1) + WALL**2),
            domain=stopping.Interval(-1.0, 1.0),
        )  # fmt: skip
        axes, actions = (hjb.Axis(-1.0, 1.0, NODES),), hjb.trapezoid(-2.0, 2.0, 401)
        value = hjb.solve_discounted(fleming, axes, actions).value.table[0]
        exact = (torch.cosh(WALL * axes[0].points()) / math.cosh(WALL)).log()
        return float((value - exact).abs().max())

    return {
        "streams by path": by_path,
        "generator": lambda paths: simulated(paths, generator=generator),
        "ode": ode,
        "exit": exit_problem,
    }


def torch_cases(threads):
    """A plain loop into memory that is kept from call to call."""
    import torch

    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    kept = functools.cache(lambda paths: torch.zeros(STEPS + 1, paths, DIM))

    def loop(paths):
        memory = kept(paths)
        for x, after in itertools.pairwise(memory):
            after.normal_(generator=generator).mul_(0.5 * H**0.5).add_(x, alpha=1 - H)

    return {"loop, memory kept": loop}


def torchsde_cases(threads):
    """As its documentation calls it, and told the size of its steps."""
    import torch
    import torchsde

    torch.set_num_threads(threads)

    class Equation(torch.nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def f(self, t, y):
            return -y

        def g(self, t, y):
            return torch.full_like(y, 0.5)

    def solve(paths, told):
        start, brownian = torch.zeros(paths, DIM), None
        if told:
            brownian = torchsde.BrownianInterval(0.0, 1.0, size=(paths, DIM), dt=H)
        times = torch.linspace(0, 1, STEPS + 1)
        with torch.no_grad():
            torchsde.sdeint(Equation(), start, times, method="euler", dt=H, bm=brownian)

    return {
        "euler, default": lambda paths: solve(paths, told=False),
        "euler, told its dt": lambda paths: solve(paths, told=True),
    }


def torchdiffeq_cases(threads):
    """Ordinary differential equations are all that it solves."""
    import torch
    import torchdiffeq

    torch.set_num_threads(threads)

    def ode(paths):
        times = torch.linspace(0, 1, STEPS + 1)
        with torch.no_grad():
            torchdiffeq.odeint(lambda t, y: -y, torch.ones(paths, DIM), times, method="euler")

    return {"ode": ode}


def jax_cases(threads):
    """A scan, its normals by Threefry."""
    import jax
    import jax.numpy as jnp

    @functools.cache
    def compiled(paths):
        def step(x, key):
            x = x - H * x + 0.5 * H**0.5 * jax.random.normal(key, x.shape)
            return x, x

        def whole(key):
            return jax.lax.scan(step, jnp.zeros((paths, DIM)), jax.random.split(key, STEPS))[1]

        return jax.jit(whole)

    return {"scan": _keyed(compiled)}


def diffrax_cases(threads):
    """Its fastest Brownian path, in its usual form (vmap) and with the batch as one state."""
    import jax
    from diffrax_peer import solve

    @functools.cache
    def batch(paths):
        return jax.jit(lambda key: solve(key, (paths, DIM), STEPS, tree=False, whole=True))

    @functools.cache
    def mapped(paths):
        one = functools.partial(solve, shape=(DIM,), steps=STEPS, tree=False, whole=True)
        return jax.jit(lambda key: jax.vmap(one)(jax.random.split(key, paths)))

    return {"euler, batch": _keyed(batch), "euler, vmap": _keyed(mapped)}


def _keyed(compiled):
    """Calls of jitted functions, each with a new key."""
    import jax

    count = itertools.count()
    return lambda paths: jax.block_until_ready(compiled(paths)(jax.random.PRNGKey(next(count))))


def finhjb_cases(threads):
    """The exit problem as a model of finhjb: its own example has an endogenous boundary."""
    from dataclasses import dataclass

    import finhjb
    import jax.numpy as jnp

    class Parameter(finhjb.AbstractParameter):
        w: float = WALL

    class Policy(finhjb.AbstractPolicy):
        @staticmethod
        def initialize(grid, p):
            return {"action": jnp.zeros_like(grid.s)}

        @staticmethod
        @finhjb.explicit_policy(order=1)
        def action(grid):
            grid.policy["action"] = grid.dv
            return grid

    class Model(finhjb.AbstractModel):
        @staticmethod
        def hjb_residual(v, dv, d2v, s, policy, jump, boundary, p):
            a = policy["action"]
            return a * dv + 0.5 * d2v - 0.5 * (a**2 + p.w**2)

    @dataclass
    class Boundary(finhjb.AbstractBoundary):
        pass

    @functools.cache
    def solver():
        walls = Boundary(p=Parameter(), s_min=-1.0, s_max=1.0, v_left=0.0, v_right=0.0)
        guess = finhjb.LinearInitialValue(p=Parameter(), boundary=walls.frozen_boundary)
        return finhjb.Solver(
            boundary=walls, model=Model(policy=Policy()), value_guess=guess, number=NODES,
            config=finhjb.Config(pi_tol=1e-10),
        )  # fmt: skip

    def exit_problem(paths):
        state, _ = solver().solve()
        x = jnp.linspace(-1.0, 1.0, NODES)
        exact = jnp.log(jnp.cosh(WALL * x) / jnp.cosh(WALL))
        return float(jnp.abs(state.grid.v - exact).max())

    return {"exit": exit_problem}


def main():
    """Answer until the input ends."""
    library, threads = sys.argv[1], int(sys.argv[2])
    cases = globals()[f"{library}_cases"](threads)
    print("ready", flush=True)
    for line in sys.stdin:
        case, paths = line.rsplit(maxsplit=1)
        cases[case](int(paths))
        seconds, result = [], None
        for _ in range(3 if int(paths) < 10_000 else 1):
            result = None  # its memory is free, as it is where results are used one by one
            begin = time.perf_counter()
            result = cases[case](int(paths))
            seconds.append(time.perf_counter() - begin)
        said = result if isinstance(result, float) else "-"
        del result
        print(statistics.median(seconds), said, flush=True)


if __name__ == "__main__":
    main()
