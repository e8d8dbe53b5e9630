"""Margins: a number this far from an edge is on its side of it, whatever the round-off.

Eigenvalues come out as those of a matrix that differs from the one meant by the round-off of making
and of decomposing it, a modest multiple of dim * eps * size, where size bounds what was added up to
make it ([GV13] 7.5.6 and 8.1.1). A symmetric matrix counts as positive definite, and a linear
system as stable, only where the eigenvalues are beyond that: what is nearer cannot be told from the
edge itself, and an answer would have no correct digit.

Sources  [H02] Higham 2002, Accuracy and Stability of Numerical Algorithms, 2nd ed.
         [GV13] Golub & Van Loan 2013, Matrix Computations, 4th ed.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def margin(dim: int, size: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """16 dim eps size: eigenvalues of a matrix of this size are not known better."""
    return 16 * torch.finfo(size.dtype).eps * dim * size


def cholesky(
    matrix: Float[Tensor, "*batch dim dim"], size: Float[Tensor, "*batch dim"] | None = None
) -> Float[Tensor, "*batch dim dim"]:
    """The lower triangular root of a symmetric matrix; NaN where it is not positive definite.

    Positive definite beyond round-off, once rows and columns are divided by sqrt(size), so that a
    coordinate may be as much smaller than the others as it likes ([H02] Theorem 10.7).

    Args:
        matrix: symmetric.
        size: what was added up to make each diagonal entry, in absolute value; the diagonal itself
            if the matrix is exact.
    """
    size = matrix.diagonal(dim1=-2, dim2=-1) if size is None else size
    proper = torch.isfinite(matrix).all(-1).all(-1) & ((size > 0) & torch.isfinite(size)).all(-1)
    units = torch.where(proper[..., None], size.detach(), 1).sqrt()
    scaled = torch.where(proper[..., None, None], matrix.detach(), 0) / units.unsqueeze(-1)
    eigenvalues = torch.linalg.eigvalsh(scaled / units.unsqueeze(-2))
    beyond = eigenvalues[..., 0] > margin(matrix.shape[-1], eigenvalues.abs().amax(-1).clamp(min=1))
    root, info = torch.linalg.cholesky_ex(matrix)
    return torch.where((proper & beyond & (info == 0))[..., None, None], root, torch.nan)


def require_positive_definite(
    name: str, matrix: Float[Tensor, "*batch dim dim"], otherwise: str
) -> None:
    """Refuse a symmetric matrix that is not positive definite beyond round-off.

    Args:
        name: whose it is.
        matrix: symmetric and finite.
        otherwise: what would follow.

    Raises:
        ValueError: it is not.
    """
    if not bool(torch.isfinite(cholesky(matrix.detach())).all()):
        least = torch.linalg.eigvalsh(matrix.detach()).min()
        raise ValueError(
            f"{name} must be positive definite beyond round-off, {otherwise}; its least eigenvalue "
            f"is {float(least):g}"
        )


def solve(
    matrix: Float[Tensor, "*batch dim dim"],
    right: Float[Tensor, "*batch dim columns"],
    refusal: str,
) -> Float[Tensor, "*batch dim columns"]:
    """The solution of matrix x = right.

    Args:
        matrix: square.
        right: one column for every solution.
        refusal: what to say where there is none.

    Raises:
        ValueError: the matrix is singular, or the solution is not finite.
    """
    solution, info = torch.linalg.solve_ex(matrix, right)
    if bool((info != 0).any()) or not bool(torch.isfinite(solution).all()):
        raise ValueError(refusal)
    return solution
