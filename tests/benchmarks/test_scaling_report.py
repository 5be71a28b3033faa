"""The page that `benchmarks.scaling_report` makes."""

from __future__ import annotations

from benchmarks.scaling_report import network_rows, search_rows


def test_hours_and_efficiency_stand_beside_each_other() -> None:
    rows = [
        {"what": "search of 256 variants", "processes": 2, "value": 1.5, "unit": "h"},
        {"what": "its efficiency", "processes": 2, "value": 0.9, "unit": ""},
    ]
    assert search_rows(rows) == [{"workers": 2, "hours": 1.5, "efficiency": 0.9}]


def test_a_network_has_a_column_and_what_was_not_reckoned_is_empty() -> None:
    rows = [
        {"what": "DDP, reckoned, slow", "processes": 2, "value": 0.8, "unit": ""},
        {"what": "DDP, reckoned, fast", "processes": 2, "value": 0.9, "unit": ""},
        {"what": "DDP, reckoned, fast", "processes": 4, "value": 0.7, "unit": ""},
    ]
    assert network_rows(rows) == [
        {"processes": 2, "slow": 0.8, "fast": 0.9},
        {"processes": 4, "slow": "", "fast": 0.7},
    ]
