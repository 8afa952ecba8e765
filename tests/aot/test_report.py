"""The document of the schedules: made, read back, updated in part."""

from benchmarks.tpu_compile import Figures
from benchmarks.tpu_schedule import Lines, Row, read_report, report

FIGURES = Figures(
    kernel="dsv3_b",
    kernel_bytes=819_000,
    by_hand=True,
    program_bytes=1_000_000,
    ideal_bytes=800_000,
    copied_bytes=0,
    vmem_bytes=3 << 20,
    vmem_limit_bytes=16 << 20,
    bundles=3000,
    spills=4,
    fills=5,
    inner_spills=1,
    inner_fills=2,
)


def test_row() -> None:
    # 819 kB take a microsecond at v5e's 819 GB/s, 1500 cycles of 1.5 GHz.
    row = Row("dsv3_b", "M = 1", "v5e", None, FIGURES)
    assert str(row) == "| M = 1 | v5e | 3,000 | 1,500* | 2.00 | 4 / 5 (1 / 2) | 3.0 of 16 | 1.00 | 1.250 |"


def test_report_is_read_back(libtpu: None) -> None:
    lines: Lines = {
        ("dsv3_b", "M = 16"): {"v6e": "| M = 16 | v6e | 1 |", "v5e": "| M = 16 | v5e | 2 |"},
        ("dsv3_a", "x, y"): {"v5e": str(Row("dsv3_a", "x, y", "v5e", "E1001: too large", None))},
        ("dsv3_b", "M = 1"): {"tpu7x": "| M = 1 | tpu7x | 3 |"},
    }
    text = report(lines)
    assert read_report(text) == lines
    assert text.index("dsv3_a") < text.index("dsv3_b")
    # Shapes stay in the order of the cases, chips in that of their generations.
    assert text.index("16 | v5e") < text.index("16 | v6e") < text.index("M = 1 |")
    assert report(read_report(text)) == text
