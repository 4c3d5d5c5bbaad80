"""The report of a transform or of training runs: values → document → Markdown, a page, JSON. Measures nothing.

`value` says what a report is given, `content`, `evidence` and `trained` what it says, `charts` and `diagram` draw,
`markdown`, `page` and `plain` write.
"""

from __future__ import annotations

from repbnn_cli.report.content import document
from repbnn_cli.report.document import Document, Picture
from repbnn_cli.report.markdown import file_name, markdown
from repbnn_cli.report.page import page
from repbnn_cli.report.plain import as_dict, runs_as_list
from repbnn_cli.report.svg import Plot
from repbnn_cli.report.trained import document as runs_document
from repbnn_cli.report.value import Evidence, Report, ReportInput, Standing, build

__all__ = [
    "Document", "Evidence", "Picture", "Plot", "Report", "ReportInput", "Standing", "as_dict", "build", "document",
    "file_name", "markdown", "page", "runs_as_list", "runs_document",
]  # fmt: skip
