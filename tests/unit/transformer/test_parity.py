"""The transformer and its rollouts, against numbers that the published code produced.

Sets are found, not listed.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from genstream.cache.layout import PositionPolicy
from genstream.cli.__main__ import main
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.schedulers.few_step import FewStepScheduler
from genstream.streaming.controls import PromptControl
from genstream.streaming.engine import CacheEngine
from genstream.streaming.noise import GivenNoise
from genstream.streaming.request import StreamSettings
from genstream.transformer.causal_dit import CausalDiT
from genstream.transformer.conversion import wan_names
from genstream.vae.tiny import TinyVideoVAE

ATOL = 1e-4
FOLDER = Path(
    os.environ.get("GENSTREAM_PARITY_DIR", Path(__file__).resolve().parents[4] / "shared" / "parity")
)


def sets(prefix: str) -> dict[str, dict]:
    paths = sorted(FOLDER.glob(f"{prefix}_*.json"))
    found = {
        path.stem: json.loads(path.read_text())
        for path in paths
        if path.with_suffix(".safetensors").is_file()
    }
    return {name: values for name, values in found.items() if "set" in values}


WAN, SELF_FORCING, LONGLIVE = sets("wan"), sets("self_forcing"), sets("longlive")
if not (WAN or SELF_FORCING or LONGLIVE):
    pytest.skip(f"no parity sets in {FOLDER}: set GENSTREAM_PARITY_DIR", allow_module_level=True)

VARIANTS = [(name, variant) for name, values in WAN.items() for variant in values["variants"]]
ROLLOUTS = [(name, scenario) for name, values in SELF_FORCING.items() for scenario in values["scenarios"]]
SWITCHES = [(name, scenario) for name, values in LONGLIVE.items() for scenario in values["scenarios"]]
MASKED = [(name, case) for name, values in SELF_FORCING.items() for case in values["full_sequence"]]


def tensors(file: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / f"{file}.safetensors")


@pytest.fixture(scope="module")
def data():
    """Tensors of all sets, read once."""
    return {name: tensors(name) for name in (*WAN, *SELF_FORCING, *LONGLIVE)}


def tiny_vae(latent_channels: int) -> TinyVideoVAE:
    widths = {"encoder_width": 4, "decoder_widths": (4, 4, 4, 4)}
    return TinyVideoVAE(latent_channels=latent_channels, **widths).eval()


def converted(folder: Path, source: str, config: dict, *options: str) -> Path:
    """What the command makes of a file in `folder`, beside which the model is described as Wan does it."""
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["convert", str(folder / source), "-o", str(folder / "model"), *options]) == 0
    return folder / "model"


def published(name: str, folder: Path) -> list[str]:
    """Write the torch files of a set as they are published; gives the options that convert them."""
    checkpoint = json.loads((FOLDER / f"{name}.checkpoint.json").read_text())
    content = {key: load_file(FOLDER / file["file"]) for key, file in checkpoint["files"].items()}
    lora = {key: content.pop(key) for key in list(content) if key.endswith("lora")}
    torch.save({**content, "step": 600}, folder / "weights.pt")
    if not lora:
        return []
    torch.save(lora, folder / "lora.pt")
    return ["--lora", str(folder / "lora.pt"), "--lora-alpha", str(checkpoint["lora_alpha"])]


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """The pipelines of the rollouts, one for each set, converted from what is published."""
    pipes = {}
    for name, values in (SELF_FORCING | LONGLIVE).items():
        folder = tmp_path_factory.mktemp(name)
        options = published(name, folder)
        model = converted(folder, "weights.pt", values["model_config"], *options)
        vae = tiny_vae(values["model_config"]["out_dim"])
        pipes[name] = CausalVideoPipeline.from_pretrained(model, vae=vae)
    return pipes


def padded(context: torch.Tensor, tokens: int) -> torch.Tensor:
    return torch.nn.functional.pad(context, (0, 0, 0, tokens - len(context)))


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_names(name, variant):
    values = WAN[name]["variants"][variant]
    assert wan_names(values["diffusers_config"]) == values["key_map"]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_bidirectional_forward(name, variant, data, tmp_path):
    values, io = WAN[name]["variants"][variant], data[name]
    weights = shutil.copy(FOLDER / f"{name}.{variant}_weights.safetensors", tmp_path)
    folder = converted(tmp_path, Path(weights).name, values["config"])
    model = CausalDiT.from_pretrained(folder / "transformer").requires_grad_(requires_grad=False)
    tokens = values["config"]["text_len"]
    x = io[f"{variant}.x"]
    context = torch.stack([padded(io[f"{variant}.context{i}"], tokens) for i in range(len(x))])
    if f"{variant}.y" in io:
        x = torch.cat([x, io[f"{variant}.y"]], dim=1)
    velocity = model(x, io[f"{variant}.timestep"], context, io.get(f"{variant}.clip_fea")).sample
    torch.testing.assert_close(velocity, io[f"{variant}.flow_pred"], rtol=0, atol=ATOL)


@pytest.mark.parametrize(("name", "case"), MASKED)
def test_masked_forward(name, case, data, students):
    values, io = SELF_FORCING[name]["full_sequence"][case], data[name]
    model = students[name].transformer
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


def rollout_settings(scenario: dict) -> StreamSettings:
    chunk, sink, local = (scenario[name] for name in ("frame_per_block", "sink", "local"))
    return StreamSettings(
        chunk_frames=chunk,
        sink_frames=sink,
        window_frames=None if local < 0 else local - sink - chunk,
        context_timestep=float(scenario["ctx"]),
        independent_first_frame=scenario["iff"],
    )


def given_noise(scenario: dict, io: dict, prefix: str) -> GivenNoise:
    blocks = range(scenario["num_blocks_generated"])
    renoise = [
        torch.cat([io[f"{prefix}.block{block:02d}.step{step}.renoise"] for block in blocks], dim=1).transpose(
            1, 2
        )
        for step in range(len(scenario["steps"]) - 1)
    ]
    return GivenNoise(io[f"{prefix}.noise"].transpose(1, 2), tuple(renoise), first_frame=scenario["init"])


@pytest.mark.parametrize(("name", "prefix"), ROLLOUTS)
def test_rollout(name, prefix, data, students):
    values, io = SELF_FORCING[name], data[name]
    scenario = values["scenarios"][prefix]
    pipe = students[name]
    shift = scenario["shift"] if scenario["warp"] else 1.0
    pipe.scheduler = FewStepScheduler(steps=scenario["steps"], shift=shift)
    noise = given_noise(scenario, io, prefix)
    initial = io.get(f"{prefix}.initial_latent")
    height, width = (8 * side for side in values["latent_shape_CHW"][1:])
    request = pipe.request(
        prompt_embeds=io[f"{prefix}.prompt_embeds"],
        num_frames=1 + 4 * (scenario["init"] + noise.noise.shape[2] - 1),
        height=height,
        width=width,
        noise=noise,
        initial_latents=None if initial is None else initial.transpose(1, 2),
        settings=rollout_settings(scenario),
        decode=False,
    )
    state = pipe.start(request)
    latents = torch.cat([chunk.latents for chunk in pipe.run(state)], dim=2)
    torch.testing.assert_close(latents.transpose(1, 2), io[f"{prefix}.output"], rtol=0, atol=ATOL)
    check_cache(state, io, prefix)


@pytest.mark.parametrize(("name", "prefix"), SWITCHES)
def test_prompt_switch(name, prefix, data, students):
    values, io = LONGLIVE[name], data[name]
    scenario = values["scenarios"][prefix]
    chunk = values["frames_per_block"]
    pipe = students[name]
    pipe.scheduler = FewStepScheduler(steps=values["denoising_step_list"], shift=values["timestep_shift"])
    settings = StreamSettings(
        chunk_frames=chunk,
        sink_frames=scenario["sink"],
        window_frames=scenario["local"] - scenario["sink"] - chunk,
        positions=PositionPolicy("window" if scenario.get("infinity") else "absolute"),
    )
    embeds = io[f"{prefix}.prompt_embeds"]
    noise = given_noise(
        {"num_blocks_generated": scenario["blocks"], "steps": values["denoising_step_list"], "init": 0},
        io,
        prefix,
    )
    height, width = (8 * side for side in values["latent_shape_CHW"][1:])
    request = pipe.request(
        prompt_embeds=embeds[:1],
        num_frames=1 + 4 * (scenario["blocks"] * chunk - 1),
        height=height,
        width=width,
        noise=noise,
        settings=settings,
        decode=False,
    )
    # The prompts of this set are embeddings only; a control names one by its number.
    engine = CacheEngine(pipe.transformer, pipe.vae, lambda prompts: embeds[int(prompts[0])][None])
    state = engine.start(request)
    for segment, frame in enumerate(scenario.get("switch", ()), start=1):
        control = PromptControl(prompt=str(segment), keep_sinks=scenario["global_sink"])
        state.submit(control, not_before=1 + 4 * (frame - 1))
    latents = torch.cat([chunk.latents for chunk in engine.run(state)], dim=2)
    torch.testing.assert_close(latents.transpose(1, 2), io[f"{prefix}.output"], rtol=0, atol=ATOL)


def check_cache(state, io, prefix):
    """The kept keys and values at the end: sinks, then the window in order of time."""
    layout, per_frame = state.kv.layout, state.kv.shape.tokens_per_frame
    count = io[f"{prefix}.final_kv.layer0.k"].shape[1] // per_frame
    frames = [*range(layout.sink_frames), *range(state.frame - count + layout.sink_frames, state.frame)]
    rows = torch.cat(
        [
            torch.arange(layout.slot(frame) * per_frame, (layout.slot(frame) + 1) * per_frame)
            for frame in frames
        ]
    )
    for layer in range(state.kv.shape.layers):
        for kind, ours in (("k", state.kv.keys), ("v", state.kv.values)):
            expected = io[f"{prefix}.final_kv.layer{layer}.{kind}"]
            torch.testing.assert_close(ours[layer][:, rows], expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", SELF_FORCING)
def test_scheduler_tables(name, data):
    for shift in (5, 8):
        table = data[name].get(f"scheduler.shift{shift}.timesteps")
        if table is not None:
            steps = [1000 - index for index in range(1000)]
            ours = FewStepScheduler(steps=steps, shift=float(shift)).timesteps
            torch.testing.assert_close(ours, table, rtol=0, atol=1e-3)
