"""Records as tables and plots."""

import pytest

from loract.memory import MIB, Record
from loract.report import comparison, markdown, rows

RECORDS = [
    Record(name="LoRA", saved_bytes=400 * MIB, peak_bytes=500 * MIB, step_seconds=2.0, time_ratio=1.0, cosine=1.0),
    Record(name="ours", saved_bytes=50 * MIB, peak_bytes=60 * MIB, step_seconds=2.2, time_ratio=1.1, cosine=0.99912),
]


def test_rows_are_relative_to_the_first_and_leave_out_what_nobody_measured():
    header, body = rows(RECORDS)
    assert header == ["", "saved MiB", "of LoRA's", "peak MiB", "time", "cosine"]
    assert body[1] == ["ours", "50", "12.5 %", "60", "1.10x", "0.99912"]


def test_markdown_is_a_table():
    lines = markdown(RECORDS).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[3].count("|")
    assert lines[1].startswith("| --- | ---: |")
    assert "12.5 %" in lines[3]


@pytest.mark.parametrize("losses", [None, {"LoRA": [3.0, 2.5], "ours": [3.0, 2.6]}])
def test_the_plot_is_a_png(tmp_path, losses):
    path = comparison(RECORDS, tmp_path / "deep" / "plot.png", losses)
    assert path.read_bytes().startswith(b"\x89PNG")
