"""Plans as HTML: a self-contained report, and what notebooks show."""

from alpa_lite.passes.html.page import report_page as report_page
from alpa_lite.passes.html.snippets import plan_snippet as plan_snippet
from alpa_lite.passes.html.snippets import timeline_snippet as timeline_snippet
