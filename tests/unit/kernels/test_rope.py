import math

import pytest
import torch

from genstream.kernels.rope import axis_widths, phases, rotate

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("head_width", "widths"), [(128, (44, 42, 42)), (12, (4, 4, 4)), (32, (12, 10, 10)), (48, (16, 16, 16))]
)
def test_axis_widths(head_width, widths):
    assert axis_widths(head_width) == widths


def test_rotation_is_complex_multiplication():
    """Channel pairs of a token turn by position x frequency: time, row, column."""
    x = torch.randn(2, 3 * 2 * 4, 5, 12)
    rotated = torch.view_as_complex(rotate(x, phases([7, 0, 90], 2, 4, 12, CPU)).unflatten(-1, (-1, 2)))
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    for token, (frame, row, column) in enumerate(
        (frame, row, column) for frame in (7, 0, 90) for row in range(2) for column in range(4)
    ):
        for pair in range(6):
            place = (frame, row, column)[pair // 2]
            angle = place * 10_000 ** -(pair % 2 / 2)
            turn = complex(math.cos(angle), math.sin(angle))
            torch.testing.assert_close(rotated[:, token, :, pair], pairs[:, token, :, pair] * turn)


def test_lengths_stay():
    x = torch.randn(1, 8, 2, 48)
    norms = rotate(x, phases(range(2), 2, 2, 48, CPU)).norm(dim=-1)
    torch.testing.assert_close(norms, x.norm(dim=-1))


@pytest.mark.parametrize("frame", [0, 1, 1023, 1024, 1_000_000, 10**9])
def test_angles_are_exact_at_any_position(frame):
    at = phases([frame], 1, 1, 128, CPU)
    for pair in range(22):
        angle = frame * 10_000 ** -(2 * pair / 44)
        assert at.cos[0, 0, pair] == pytest.approx(math.cos(angle), abs=1e-6)
        assert at.sin[0, 0, pair] == pytest.approx(math.sin(angle), abs=1e-6)


def test_scores_depend_on_distance_only():
    query, key = torch.randn(2, 1, 1, 1, 48)
    scores = {
        shift: (
            rotate(query, phases([shift + 9], 1, 1, 48, CPU)) * rotate(key, phases([shift], 1, 1, 48, CPU))
        ).sum()
        for shift in (0, 1000, 1_000_000)
    }
    torch.testing.assert_close(scores[1000], scores[0])
    torch.testing.assert_close(scores[1_000_000], scores[0], rtol=0, atol=1e-5)


def test_dtype_stays():
    x = torch.randn(1, 1, 1, 12).bfloat16()
    assert rotate(x, phases([3], 1, 1, 12, CPU)).dtype == torch.bfloat16
