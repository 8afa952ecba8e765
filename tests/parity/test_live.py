"""The golden files against `transformers` itself, run here and now (extra `parity`)."""

from pathlib import Path

import numpy as np
import pytest

from tests.parity.cases import CASES, Case

pytest.importorskip("torch", reason="the live comparison needs the extra `parity`")
pytest.importorskip("transformers", reason="the live comparison needs the extra `parity`")

# Another CPU's sums may differ in the last bits; the tests against the golden files allow 2e-4.
TOLERANCE = 2e-5


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden_file_is_what_transformers_says(case: Case, tmp_path: Path) -> None:
    from tests.parity.reference import reference_arrays
    from tests.parity.test_golden import GOLDEN

    arrays = reference_arrays(case, tmp_path)
    with np.load(GOLDEN / f"{case.name}.npz") as golden:
        np.testing.assert_array_equal(arrays.pop("greedy"), golden["greedy"])
        assert arrays.keys() <= set(golden.files)
        for name, logits in arrays.items():
            pairs = golden[f"{name}_positions"]
            difference = np.abs(logits[pairs[:, 0], pairs[:, 1]] - golden[name]).max()
            assert difference <= TOLERANCE * golden[name].std(), name
