"""Policy iteration: evaluate, take the Gibbs policy of the q-rate, again ([TZ24]).

For linear-quadratic problems this is Newton's method (Kleinman's) and converges quadratically.

Sources  [TZ24] Tang & Zhou 2024, regret of exploratory policy improvement and q-learning,
         arXiv 2411.01302.
"""

from collections.abc import Callable, Iterator

from ctrl.policy import Policy
from ctrl.value import Value


def policy_iteration(
    policy: Policy,
    evaluate: Callable[[Policy], Value],
    improve: Callable[[Value], Policy],
    iterations: int,
) -> Iterator[tuple[Value, Policy]]:
    """Alternate evaluation and improvement.

    Args:
        policy: to begin with; an admissible one.
        evaluate: policy -> its value function; ``martingale.clstd`` on sampled paths, or exactly.
        improve: value -> better policy; ``q_learning.gibbs_policy`` where q is quadratic in the
            action.
        iterations: how many.

    Yields:
        The value of each policy, and the policy that improves on it.

    Raises:
        ValueError: ``iterations`` is not positive.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    for _ in range(iterations):
        value = evaluate(policy)
        policy = improve(value)
        yield value, policy
