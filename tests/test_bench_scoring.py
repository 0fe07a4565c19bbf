"""bench_scoring.py: the rate without the start, and the memory of a run."""

import pytest

from scripts.studies import bench_scoring
from tests.models import tiny_bundle


@pytest.mark.parametrize(
    ("ends", "rows", "rate"),
    [
        ([9, 10, 11, 12, 14, 16, 18, 20], [5] * 7 + [1], 2),  # 16 rows from 12 to 20
        ([1, 2, 3, 4], [5] * 4, float("nan")),
    ],
)
def test_the_rate_leaves_out_the_start(ends, rows, rate):
    assert bench_scoring.steady_rate(ends, rows, 2) == pytest.approx(rate, nan_ok=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_memory_of_a_run_is_measured(tmp_path, capfd):
    bundle = tiny_bundle(tmp_path / "bundle")
    bench_scoring.measure_memory(tmp_path, bundle.path, 1000)
    [figures] = [line.split()[1:] for line in capfd.readouterr().out.splitlines() if line.split()[:1] == ["1,000"]]
    assert len(figures) == 4 and all(float(figure.replace(",", "")) > 0 for figure in figures)
