"""Certificates: lower bounds on robustness that no attack can pass."""

from robustlearn.certify import enclosure as _enclosure  # noqa: F401  files the method
from robustlearn.certify import linear as _linear  # noqa: F401  files the method
from robustlearn.certify import lipschitz as _lipschitz  # noqa: F401
from robustlearn.certify import networks as _networks  # noqa: F401
from robustlearn.certify import smoothing as _smoothing  # noqa: F401
from robustlearn.certify import trees as _trees  # noqa: F401
from robustlearn.certify.base import (
    CERTIFICATES,
    Certificate,
    applicable,
    certified_radius,
    certify,
)

__all__ = ["CERTIFICATES", "Certificate", "applicable", "certified_radius", "certify"]
