"""The report: renders the document that an evaluation leaves; computes nothing of its own.

The document is plain data (``report.json``, described by ``schema.json``), so that a report can
be drawn again, joined or compared without the model, the data or torch.
"""

from robustlearn.report.comparison import SCHEMA, compared, comparison_table, conclusion, load
from robustlearn.report.detection import detection_page, lead, write_detection
from robustlearn.report.files import plain, write
from robustlearn.report.page import comparison_page, page
from robustlearn.report.table import figure, table
from robustlearn.report.training import training_page, write_training

__all__ = [
    "SCHEMA",
    "compared",
    "comparison_page",
    "comparison_table",
    "conclusion",
    "detection_page",
    "figure",
    "lead",
    "load",
    "page",
    "plain",
    "table",
    "training_page",
    "write",
    "write_detection",
    "write_training",
]
