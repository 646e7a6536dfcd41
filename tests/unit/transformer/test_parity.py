"""The transformer and its rollouts, against numbers that the published code produced.

Sets are found, not listed.
"""

import pytest
import torch
from rollouts import FOLDER, OneStep, Rollout, rollouts, sets, student, tensors

from genstream.schedulers.few_step import FewStepScheduler
from genstream.schedulers.schedule import table_sigma
from genstream.transformer.conversion import wan_names

ATOL = 1e-4
WAN, SELF_FORCING = sets("wan"), sets("self_forcing")
ROLLOUTS = rollouts("self_forcing", "longlive")
if not (WAN or ROLLOUTS):
    pytest.skip(f"no parity sets in {FOLDER}: set GENSTREAM_PARITY_DIR", allow_module_level=True)

VARIANTS = [(name, variant) for name, values in WAN.items() for variant in values["variants"]]
WAN_CASES = [OneStep(name, variant) for name, variant in VARIANTS]
MASKED = [(name, case) for name, values in SELF_FORCING.items() for case in values["full_sequence"]]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_names(name, variant):
    values = WAN[name]["variants"][variant]
    assert wan_names(values["diffusers_config"]) == values["key_map"]


@pytest.mark.parametrize("case", WAN_CASES, ids=lambda case: f"{case.set_name}-{case.name}")
def test_bidirectional_forward(case):
    x = case.tensor("x")
    if (channels := case.tensor("y")) is not None:
        x = torch.cat([x, channels], dim=1)
    velocity = case.transformer()(
        x, case.tensor("timestep"), case.prompt_embeds, case.tensor("clip_fea")
    ).sample
    torch.testing.assert_close(velocity, case.tensor("flow_pred"), rtol=0, atol=ATOL)


@pytest.mark.parametrize("case", WAN_CASES, ids=lambda case: f"{case.set_name}-{case.name}")
def test_one_step_of_the_pipeline(case):
    latents, _ = case.run(case.pipeline())
    torch.testing.assert_close(latents, case.expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize(("name", "case"), MASKED)
def test_masked_forward(name, case):
    values, io, model = SELF_FORCING[name]["full_sequence"][case], tensors(name), student(name)
    x, timestep = io[f"{case}.x"], io[f"{case}.timestep"]
    positions = list(range(x.shape[2]))
    if values["teacher_forcing"]:
        x = torch.cat([io[f"{case}.clean_x"], x], dim=2)
        timestep = torch.cat([torch.zeros_like(timestep), timestep], dim=1)
        positions = 2 * positions
    velocity = model(
        x,
        timestep,
        io["full.prompt_embeds"],
        frame_positions=positions,
        attention_mask=io[f"{case}.frame_mask"].bool(),
    ).sample
    expected = io[f"{case}.flow_pred"]
    torch.testing.assert_close(velocity[:, :, -expected.shape[2] :], expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("rollout", ROLLOUTS, ids=lambda rollout: f"{rollout.set_name}-{rollout.name}")
def test_rollout(rollout):
    latents, state = rollout.run(rollout.pipeline())
    torch.testing.assert_close(latents, rollout.expected, rtol=0, atol=ATOL)
    check_cache(state, rollout)


def check_cache(state, rollout: Rollout):
    """The kept keys and values at the end: sinks, then the window in order of time."""
    layout, per_frame = state.kv.layout, state.kv.shape.tokens_per_frame
    count = rollout.tensor("final_kv.layer0.k").shape[1] // per_frame
    end = state.frame - state.kv.origin
    frames = [*range(layout.sink_frames), *range(end - count + layout.sink_frames, end)]
    rows = torch.cat(
        [
            torch.arange(layout.slot(frame) * per_frame, (layout.slot(frame) + 1) * per_frame)
            for frame in frames
        ]
    )
    for layer in range(state.kv.shape.layers):
        kinds = {"k": state.kv.keys, "v": state.kv.values}
        if rollout.scenario.get("infinity"):
            del kinds["k"]  # not rotated in the published code's cache
        for kind, ours in kinds.items():
            expected = rollout.tensor(f"final_kv.layer{layer}.{kind}")
            torch.testing.assert_close(ours[layer][:, rows], expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", SELF_FORCING)
def test_scheduler_tables(name):
    for shift in (5, 8):
        table = tensors(name).get(f"scheduler.shift{shift}.timesteps")
        if table is not None:
            steps = [1000 - index for index in range(1000)]
            ours = FewStepScheduler(steps=steps, shift=float(shift)).timesteps
            torch.testing.assert_close(ours, table, rtol=0, atol=1e-3)
            sigmas = tensors(name)[f"scheduler.shift{shift}.sigmas"]
            for timestep in (1000.0, 757.0, 522.0, 0.0):
                nearest = sigmas[(table - timestep).abs().argmin()]
                assert table_sigma(timestep, shift) == pytest.approx(float(nearest), abs=1e-6)
