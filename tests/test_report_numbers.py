"""Numbers and drawings of the HTML report."""

import pytest

from afpq._report_numbers import bytes_text, number_text, percent_text
from afpq._svg import axis_ticks, element, power_ticks, text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (0.0123456, "0.0123"),
        (3.31e-5, "3.31\u00b710\u207b\u2075"),
        (1e-6, "10\u207b\u2076"),
        (48.77, "48.8"),
        (999.7, "1,000"),
        (12345.6, "12,346"),
        (-0.5, "-0.5"),
    ],
)
def test_numbers_have_three_digits(value: float, expected: str) -> None:
    assert number_text(value) == expected


def test_sizes_and_shares_have_units() -> None:
    assert [bytes_text(n) for n in (12, 1500, 313_364, 13_970_236)] == [
        "12 bytes", "1.50 kB", "313.4 kB", "13.97 MB",
    ]  # fmt: skip
    assert [percent_text(x) for x in (0, 0.00043, 0.984, 0.99999, 1)] == [
        "0 %", "0.043 %", "98.4 %", "> 99.9 %", "100 %",
    ]  # fmt: skip


def test_svg_escapes_what_it_is_given() -> None:
    assert text(1, 2.25, "a<b") == '<text x="1" y="2.2">a&lt;b</text>'
    assert element("g", class_='"&', data_i=None) == '<g class="&quot;&amp;"/>'


def test_ticks_are_round_and_inside() -> None:
    assert axis_ticks(0.3, 2.2) == pytest.approx([0.5, 1, 1.5, 2])
    assert axis_ticks(3, 3) == [3]
    assert power_ticks(3e-6, 0.2) == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
    assert power_ticks(0.9, 6) == pytest.approx([1, 2, 5])
