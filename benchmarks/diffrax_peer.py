"""diffrax's side of benchmarks/simulate.py, for a Python that has diffrax.

Reads lines "case steps", answers each with the processor time and the wall time of one call, in
seconds. A process of its own, so that jax and torch do not share threads or memory.
"""

import functools
import sys
import time

import diffrax  # pyright: ignore[reportMissingImports]  # in an environment of its own
import jax  # pyright: ignore[reportMissingImports]  # in an environment of its own
import jax.numpy as jnp  # pyright: ignore[reportMissingImports]  # in an environment of its own
import lineax  # pyright: ignore[reportMissingImports]  # in an environment of its own

PATHS, DIM = 4096, 8


def solve(key, shape, steps, tree, whole):
    """dX = -X dt + 0.5 dW from 0 by Euler, for a state of any shape."""
    if tree:
        motion = diffrax.VirtualBrownianTree(0.0, 1.0, tol=0.5 / steps, shape=shape, key=key)
    else:
        motion = diffrax.UnsafeBrownianPath(shape=shape, key=key)
    half = lineax.DiagonalLinearOperator(jnp.full(shape, 0.5))
    terms = diffrax.MultiTerm(
        diffrax.ODETerm(lambda t, y, args: -y), diffrax.ControlTerm(lambda t, y, args: half, motion)
    )
    return diffrax.diffeqsolve(
        terms, diffrax.Euler(), 0.0, 1.0, 1 / steps, jnp.zeros(shape),
        saveat=diffrax.SaveAt(t0=True, steps=True) if whole else diffrax.SaveAt(t1=True),
        max_steps=steps, adjoint=diffrax.ForwardMode(), throw=False,
    ).ys  # fmt: skip


def scan(key, steps, whole):
    """jax alone."""

    def step(x, k):
        x = x - x / steps + 0.5 * steps**-0.5 * jax.random.normal(k, x.shape)
        return x, x if whole else None

    end, path = jax.lax.scan(step, jnp.zeros((PATHS, DIM)), jax.random.split(key, steps))
    return path if whole else end


@functools.cache
def compiled(case, steps):
    """A jitted function of a key; what it does is in its name."""
    settings = {"steps": steps, "tree": "tree" in case, "whole": "end" not in case}
    if "scan" in case:
        return jax.jit(lambda key: scan(key, steps, settings["whole"]))
    if "batch" in case:
        return jax.jit(lambda key: solve(key, (PATHS, DIM), **settings))
    one = functools.partial(solve, shape=(DIM,), **settings)
    return jax.jit(lambda key: jax.vmap(one)(jax.random.split(key, PATHS)))


def main():
    """Answer until the input ends."""
    for count, line in enumerate(sys.stdin):
        case, steps = line.rsplit(maxsplit=1)
        run, key = compiled(case.strip(), int(steps)), jax.random.PRNGKey(count)
        cpu, wall = time.process_time(), time.perf_counter()
        jax.block_until_ready(run(key))
        print(time.process_time() - cpu, time.perf_counter() - wall, flush=True)


if __name__ == "__main__":
    main()
