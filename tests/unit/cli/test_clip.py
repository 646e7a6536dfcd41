"""Lengths, switches and frame counts of a generate run."""

from dataclasses import replace

import pytest

from genstream.cli.__main__ import build_parser
from genstream.cli.clip import GeneratePlan, make_plan
from genstream.io.model_folder import ModelCard

CARD = ModelCard(name="m", description="", height=32, width=64, fps=16, vocabulary={})


def plan_of(*texts: str, card: ModelCard = CARD) -> GeneratePlan:
    return make_plan(build_parser().parse_args(["generate", "a red circle", *texts]), card)


def test_defaults_come_from_the_card():
    plan = plan_of()
    assert (plan.width, plan.height, plan.fps, plan.seconds, plan.num_frames) == (64, 32, 16, 4, None)
    assert plan.total_frames == 64


@pytest.mark.parametrize(("seconds", "frames"), [("1", 16), ("0.5", 8), ("1.03", 16), ("1.04", 17)])
def test_seconds(seconds: str, frames: int):
    assert plan_of("--seconds", seconds).total_frames == frames


def test_size_and_fps_are_needed_the_model_does_not_say():
    with pytest.raises(ValueError, match="--size, --fps"):
        plan_of("--fps", "16", card=replace(CARD, width=None, fps=None))
    assert plan_of("--fps", "16", "--size", "48x32", card=replace(CARD, width=None, fps=None)).width == 48


def test_switches_are_sorted_and_described():
    plan = plan_of("--switch", "3s: green", "--switch", "1.5s:  a blue star ")
    assert [switch.seconds for switch in plan.switches] == [1.5, 3]
    assert plan.described_prompt == "a red circle; 1.5s: a blue star; 3s: green"
