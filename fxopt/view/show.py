"""Looking at a model or a report: a page in a notebook, a table in a terminal, a file by `.save("report.html")`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fxopt.view.explain import Explanation, explain
from fxopt.view.report import Report


def view(what: Report | Explanation | Callable[..., Any], /, *inputs: Any, **kwargs: Any) -> Report:
    """What happened to a model, to be looked at: a notebook shows the result as a page, `print` as a table.

    `what` is a report (what `fxopt.record()` gives), an explanation, or a model: that is then compiled afresh and
    called once on `inputs`, as `fxopt.explain` does. Raises TypeError for a model without inputs.
    """
    if isinstance(what, (Report, Explanation)):
        if inputs or kwargs:
            raise TypeError("view(report) takes no inputs: they are for view(model, *inputs)")
        return what if isinstance(what, Report) else what.report
    if not callable(what):
        raise TypeError(f"view() takes a model with its inputs, or a report, not {type(what).__name__}")
    if not inputs and not kwargs:
        raise TypeError("view(model) needs the model's inputs too, to compile it: view(model, *inputs)")
    return explain(what, *inputs, **kwargs).report
