"""The bench as one page to look at: a single HTML file that needs no network.

Charts are inline SVG from small templates: a plotting library inlined would be several megabytes, out of the keyboard's
reach, and blind to the reader's colour scheme and screen width. `jinja2` escapes whatever a name or a message holds.
"""

from adacorr_deploy.quality.report.page import ReportFacts, report_html

__all__ = ["ReportFacts", "report_html"]
