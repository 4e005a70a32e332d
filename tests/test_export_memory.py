"""The memory of export and import does not grow with the model; measured in separate processes."""

import pytest

from tools.bench_export import compare


@pytest.mark.slow
def test_peak_memory_is_bounded_by_the_largest_tensor(tmp_path):
    found = compare(tmp_path, 1024, rounds=1)
    assert found["bytes"] > 0.9 * 2**30
    limit = 3 * found["largest_bytes"] + 300 * 2**20
    assert limit < 0.8 * found["bytes"]  # otherwise the bound would be meaningless
    for task in ("export", "export and verify", "import"):
        assert found[f"{task} bytes above baseline"] < limit, task
