"""Half precision against float32, on rollouts of the published students' code."""

import pytest
import torch
from rollouts import DTYPES, FOLDER, error_shares, rollouts

ROLLOUTS = rollouts("self_forcing", "longlive")
if not ROLLOUTS:
    pytest.skip(f"no parity sets in {FOLDER}: set GENSTREAM_PARITY_DIR", allow_module_level=True)

# Twice what was measured, about two units in the last place: benchmarks/precision.md.
BOUNDS = {torch.bfloat16: 0.015, torch.float16: 0.002}


@pytest.mark.parametrize("rollout", ROLLOUTS, ids=lambda rollout: f"{rollout.set_name}-{rollout.name}")
def test_error_of_half_precision(rollout):
    for dtype, share in zip(DTYPES, error_shares(rollout, DTYPES), strict=True):
        assert torch.finfo(dtype).eps / 16 < share < BOUNDS[dtype]
