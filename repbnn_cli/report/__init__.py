"""The report of a transform, training runs or a sweep: values → document → Markdown, a page, JSON. Measures nothing.

`value` says what a report is given, `content`, `evidence`, `trained` and `swept` what it says, `charts` and `diagram`
draw, `markdown`, `page` and `plain` write.
"""

from __future__ import annotations

from repbnn_cli.report.content import document
from repbnn_cli.report.document import Document, Picture
from repbnn_cli.report.markdown import file_name, markdown
from repbnn_cli.report.page import page
from repbnn_cli.report.plain import as_dict, runs_as_list, sweep_as_dict
from repbnn_cli.report.svg import Plot
from repbnn_cli.report.swept import COLUMNS as SWEEP_COLUMNS
from repbnn_cli.report.swept import document as sweep_document
from repbnn_cli.report.swept import explanation as sweep_explanation
from repbnn_cli.report.swept import figures as sweep_figures
from repbnn_cli.report.trained import document as runs_document
from repbnn_cli.report.value import Evidence, Report, ReportInput, Standing, build

__all__ = [
    "SWEEP_COLUMNS", "Document", "Evidence", "Picture", "Plot", "Report", "ReportInput", "Standing", "as_dict", "build",
    "document", "file_name", "markdown", "page", "runs_as_list", "runs_document", "sweep_as_dict", "sweep_document",
    "sweep_explanation", "sweep_figures",
]  # fmt: skip
