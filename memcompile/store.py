"""Reports of this process, and those on disk beside torch's cache.

A second process whose graphs torch serves from its cache plans nothing; its report is
read back under a key of the captured graph and everything the plan depends on.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from memcompile.folders import replace_text, reports_folder
from memcompile.report import Report

_reports: list[Report] = []


def reports() -> list[Report]:
    """The reports of the graphs compiled in this process, oldest first."""
    return list(_reports)


def add(report: Report) -> None:
    """Append a report, numbered."""
    report.index = len(_reports)
    _reports.append(report)


def clear() -> None:
    """Forget the reports of this process; those on disk stay."""
    _reports.clear()


def _path(key: str) -> Path:
    return reports_folder() / f"{key}.json"


def save(key: str, report: Report) -> None:
    """Keep a report for later processes. A folder that cannot be written is no error."""
    with contextlib.suppress(OSError):
        replace_text(_path(key), report.to_json())


def load(key: str) -> Report | None:
    """The report an earlier process saved, or ``None``."""
    try:
        report = Report.from_json(_path(key).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    report.cached = True
    return report
