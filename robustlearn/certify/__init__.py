"""Certificates: lower bounds on robustness that no attack can pass."""

from robustlearn.certify.base import CERTIFICATES, Certificate, applicable, certify
from robustlearn.certify import linear as _linear  # noqa: F401, I001  files the method

__all__ = ["CERTIFICATES", "Certificate", "applicable", "certify"]
