"""Numbers with units."""

import pytest

from alpa_lite.passes.units import format_bytes, format_seconds


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"), (4, "4 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.50 KiB"),
        (12.34 * 2**20, "12.3 MiB"), (123.4 * 2**30, "123 GiB"), (5000 * 2**40, "5000 TiB"),
    ],
)  # fmt: skip
def test_format_bytes(num_bytes, text):
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 us"), (5e-7, "0.50 us"), (2.5e-3, "2.50 ms"), (1, "1 s"), (75.2, "75.2 s")],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text
