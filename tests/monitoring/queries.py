"""PromQL as our tests look at it: variables filled in, metrics and selectors taken out."""

from __future__ import annotations

import promql_parser
from prometheus_client import Histogram

from serve_app.metrics import ROWS, MetricRow

_SUFFIXES = ("_bucket", "_sum", "_count")


def filled_in(expression: str, application: str = ".*") -> str:
    """The expression as Grafana sends it for one application, or for all."""
    chosen = {"$namespace": ".*", "$application": application, "$__rate_interval": "20s"}
    for variable, value in chosen.items():
        expression = expression.replace(variable, value)
    promql_parser.parse(expression)
    return expression


def names_in(expression: str) -> set[str]:
    """The metrics and the recorded series that an expression reads."""
    return {str(selector.name) for selector in _selectors(promql_parser.parse(expression))}


def matchers_in(expression: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """What an expression narrows its metrics by: metric, label, and the values that are written out."""
    return [
        (str(selector.name), matcher.name, tuple(matcher.value.split("|")))
        for selector in _selectors(promql_parser.parse(expression))
        for matcher in selector.matchers.matchers
    ]


def selectors(expression: str) -> list[str]:
    """What an expression reads, each as an expression of its own."""
    return [selector.prettify() for selector in _selectors(promql_parser.parse(expression))]


def _selectors(node: object) -> list[promql_parser.VectorSelector]:
    if isinstance(node, promql_parser.VectorSelector):
        return [node]
    if isinstance(node, promql_parser.MatrixSelector):
        return _selectors(node.vector_selector)
    inner = [getattr(node, name, None) for name in ("expr", "lhs", "rhs")]
    inner += list(getattr(node, "args", None) or ())
    return [found for each in inner if each is not None for found in _selectors(each)]


def row_of(name: str) -> MetricRow | None:
    """The row that declares a metric of this name; None where none does."""
    for row in ROWS:
        exposed = [row.exposed_name]
        if row.kind is Histogram:
            exposed = [f"{row.name}{suffix}" for suffix in _SUFFIXES]
        if name in exposed:
            return row
    return None
