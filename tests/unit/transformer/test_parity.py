"""The transformer and its rollouts, against numbers that the published code produced.

Sets are found, not listed.
"""

import shutil
from pathlib import Path

import pytest
import torch
from rollouts import FOLDER, Rollout, convert, rollouts, sets, student, tensors

from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.schedulers.few_step import FewStepScheduler
from genstream.schedulers.schedule import table_sigma
from genstream.streaming.noise import GivenNoise
from genstream.transformer.causal_dit import CausalDiT
from genstream.transformer.conversion import wan_names
from genstream.vae.tiny import TinyVideoVAE

ATOL = 1e-4
IMAGE_INPUTS = {"image_embeds": "clip_fea", "image_channels": "y"}
WAN, SELF_FORCING = sets("wan"), sets("self_forcing")
ROLLOUTS = rollouts("self_forcing", "longlive")
if not (WAN or ROLLOUTS):
    pytest.skip(f"no parity sets in {FOLDER}: set GENSTREAM_PARITY_DIR", allow_module_level=True)

VARIANTS = [(name, variant) for name, values in WAN.items() for variant in values["variants"]]
MASKED = [(name, case) for name, values in SELF_FORCING.items() for case in values["full_sequence"]]


def padded(context: torch.Tensor, tokens: int) -> torch.Tensor:
    return torch.nn.functional.pad(context, (0, 0, 0, tokens - len(context)))


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_names(name, variant):
    values = WAN[name]["variants"][variant]
    assert wan_names(values["diffusers_config"]) == values["key_map"]


def converted(name: str, variant: str, folder: Path) -> CausalDiT:
    """The transformer of published weights, by way of `genstream convert`."""
    weights = shutil.copy(FOLDER / f"{name}.{variant}_weights.safetensors", folder)
    config = WAN[name]["variants"][variant]["config"]
    model = CausalDiT.from_pretrained(convert(Path(weights), config) / "transformer")
    return model.requires_grad_(requires_grad=False)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_bidirectional_forward(name, variant, tmp_path):
    values, io = WAN[name]["variants"][variant], tensors(name)
    model = converted(name, variant, tmp_path)
    tokens = values["config"]["text_len"]
    x = io[f"{variant}.x"]
    context = torch.stack([padded(io[f"{variant}.context{i}"], tokens) for i in range(len(x))])
    if f"{variant}.y" in io:
        x = torch.cat([x, io[f"{variant}.y"]], dim=1)
    velocity = model(x, io[f"{variant}.timestep"], context, io.get(f"{variant}.clip_fea")).sample
    torch.testing.assert_close(velocity, io[f"{variant}.flow_pred"], rtol=0, atol=ATOL)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_one_step_of_the_pipeline(name, variant, tmp_path):
    """The same velocities, each from a stream of one chunk and one step: x0 = x - sigma v."""
    values, io = WAN[name]["variants"][variant], tensors(name)
    model = converted(name, variant, tmp_path)
    tokens, x = values["config"]["text_len"], io[f"{variant}.x"]
    for row, timestep in enumerate(io[f"{variant}.timestep"].tolist()):
        pipe = CausalVideoPipeline(
            tokenizer=None,
            text_encoder=None,
            transformer=model,
            vae=TinyVideoVAE(encoder_width=4, decoder_widths=(4, 4, 4, 4), latent_channels=x.shape[1]).eval(),
            scheduler=FewStepScheduler(steps=(timestep,), shift=1.0),
            chunk_frames=x.shape[2],
            text_tokens=tokens,
        )
        of_row = {name: io.get(f"{variant}.{file}") for name, file in IMAGE_INPUTS.items()}
        request = pipe.request(
            prompt_embeds=padded(io[f"{variant}.context{row}"], tokens)[None],
            num_frames=1 + 4 * (x.shape[2] - 1),
            height=8 * x.shape[3],
            width=8 * x.shape[4],
            noise=GivenNoise(x[row : row + 1]),
            decode=False,
            **{name: None if given is None else given[row : row + 1] for name, given in of_row.items()},
        )
        (chunk,) = pipe.run(pipe.start(request))
        expected = x[row] - timestep / 1000 * io[f"{variant}.flow_pred"][row]
        torch.testing.assert_close(chunk.latents[0], expected, rtol=0, atol=ATOL)


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
