"""Cholesky's factors straight from LAPACK: at a hundred columns the usual wrappers cost as much."""

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dpotrf, dpotrs

Array = NDArray[np.float64]


def factored(matrix: Array) -> Array:
    """Return the factor of a symmetric positive definite matrix, which it overwrites.

    Raises
    ------
    np.linalg.LinAlgError where the matrix is not positive definite, or not finite.
    """
    factor, failed = dpotrf(matrix.T, lower=True, clean=False, overwrite_a=True)
    if failed or not np.isfinite(factor[-1, -1]):
        raise np.linalg.LinAlgError("the matrix is not positive definite")
    return factor


def solved(factor: Array, right: Array) -> Array:
    """Return (LLᵀ)⁻¹·right, of one column or many."""
    return dpotrs(factor, right, lower=True)[0]


def definite(matrix: Array, right: Array) -> Array:
    """Solve with a positive definite matrix, whatever the sizes of its columns."""
    size = np.sqrt(np.diag(matrix))
    return solved(factored(matrix / size[:, None] / size), right / size) / size
