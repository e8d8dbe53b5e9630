"""How far from an edge a computed number must be, that round-off does not decide on which side.

Eigenvalues come out as those of a matrix that differs from the one meant by the round-off of making
and of decomposing it, a modest multiple of dim * eps * size, where size bounds what was added up to
make it ([H02] 3.5, [GV13] 7.5.6, 8.1.1). A symmetric matrix counts as positive definite, and a
linear system as stable, only where the eigenvalues are beyond that: what is nearer cannot be told
from the edge itself, and an answer would have no correct digit.

Sources  [H02] Higham 2002, Accuracy and Stability of Numerical Algorithms, 3.5 and 10.1.
         [GV13] Golub & Van Loan 2013, Matrix Computations, 4th ed.
         [D89] Demmel 1989, on floating-point errors in Cholesky, LAPACK working note 14.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

ROUND_OFF = 16 * torch.finfo(torch.float64).eps


def margin(dim: int, size: Float[Tensor, " *batch"]) -> Float[Tensor, " *batch"]:
    """16 dim eps size: eigenvalues of a matrix of this size are not known better."""
    return ROUND_OFF * dim * size


def is_positive_definite(
    matrix: Float[Tensor, "*batch dim dim"], size: Float[Tensor, "*batch dim"] | None = None
) -> Bool[Tensor, " *batch"]:
    """Whether a symmetric matrix is positive definite beyond round-off, in whatever units.

    Decided of the matrix with rows and columns divided by sqrt(size), so that a coordinate may be
    as much smaller than the others as it likes ([D89]: so does Cholesky's decomposition).

    Args:
        matrix: symmetric.
        size: what was added up to make each diagonal entry, in absolute value; the diagonal itself
            if the matrix is exact.
    """
    matrix = matrix.detach()
    size = matrix.diagonal(dim1=-2, dim2=-1) if size is None else size.detach()
    proper = torch.isfinite(matrix).all(-1).all(-1) & ((size > 0) & torch.isfinite(size)).all(-1)
    safe = torch.where(proper[..., None], size, 1).sqrt()
    scaled = torch.where(proper[..., None, None], matrix, 0) / safe.unsqueeze(-1)
    eigenvalues = torch.linalg.eigvalsh(scaled / safe.unsqueeze(-2))
    largest = eigenvalues.abs().amax(-1).clamp(min=1)
    return proper & (eigenvalues[..., 0] > margin(matrix.shape[-1], largest))


def require_positive_definite(
    name: str, matrix: Float[Tensor, "*batch dim dim"], otherwise: str
) -> None:
    """Refuse a symmetric matrix that is not positive definite beyond round-off.

    Args:
        name: whose it is.
        matrix: symmetric and finite.
        otherwise: what would follow, and the remedy.

    Raises:
        ValueError: it is not.
    """
    if not bool(is_positive_definite(matrix).all()):
        least = torch.linalg.eigvalsh(matrix.detach()).min()
        raise ValueError(
            f"{name} must be positive definite, {otherwise}; its least eigenvalue is "
            f"{float(least):g}, which is not positive beyond round-off"
        )


def exceeds_round_off(
    least: Float[Tensor, " *batch"], dim: int, size: Float[Tensor, " *batch"]
) -> Bool[Tensor, " *batch"]:
    """Whether the least eigenvalue of a symmetric matrix is positive beyond round-off.

    Args:
        least: the eigenvalue.
        dim: of the matrix.
        size: of what was added up to make the matrix.
    """
    return least > margin(dim, size)


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
    found, info = torch.linalg.solve_ex(matrix, right)
    if bool((info != 0).any()) or not bool(torch.isfinite(found).all()):
        raise ValueError(refusal)
    return found
