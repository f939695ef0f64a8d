"""The report: renders the document that an evaluation leaves; computes nothing of its own.

The document is plain data (``report.json``, described by ``schema.json``), so that a report can
be drawn again, joined or compared without the model, the data or torch.
"""

from robustlearn.report.files import SCHEMA, plain, write
from robustlearn.report.page import page
from robustlearn.report.table import figure, table

__all__ = ["SCHEMA", "figure", "page", "plain", "table", "write"]
