"""Certificates: lower bounds on robustness that no attack can pass."""

from robustlearn.certify import linear as _linear  # noqa: F401  files the method
from robustlearn.certify import networks as _networks  # noqa: F401  and those of networks
from robustlearn.certify.base import CERTIFICATES, Certificate, applicable, certify

__all__ = ["CERTIFICATES", "Certificate", "applicable", "certify"]
