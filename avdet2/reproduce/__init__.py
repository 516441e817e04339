# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
from avdet2.reproduce.figures import draw_figure, figure_evaluations  # noqa: F401
from avdet2.reproduce.paper import PAPER_TABLES, PaperTable  # noqa: F401
from avdet2.reproduce.report import report_json, report_markdown  # noqa: F401
from avdet2.reproduce.runs import Evaluation, Runs  # noqa: F401
from avdet2.reproduce.suites import SUITES, Column, Source, Suite, SuiteTable  # noqa: F401
