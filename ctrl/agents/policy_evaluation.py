"""Policy evaluation: descend any loss of ``ctrl.martingale`` or ``ctrl.q_learning``."""

from collections.abc import Callable, Iterator

from torch import Tensor
from torch.optim import Optimizer

from ctrl.agents.descent import descend, expectation
from ctrl.paths import Paths


def evaluate(
    loss: Callable[[Paths], Tensor],
    sample: Callable[[], Paths],
    optimiser: Optimizer,
    updates: int,
) -> Iterator[Paths]:
    """Learn the value function of the policy that ``sample`` follows.

    For a linear value ``martingale.clstd`` has the answer without a loop.

    Args:
        loss: paths -> one number a path; for example
            ``lambda paths: martingale.martingale_loss(value, problem, paths)``.
        sample: fresh paths.
        optimiser: of the value's parameters.
        updates: how many.

    Yields:
        The paths of every update, after it.

    Raises:
        FloatingPointError: a loss or gradient is not finite.
    """
    for _ in range(updates):
        paths = sample()
        descend(expectation(loss(paths), paths), optimiser)
        yield paths
