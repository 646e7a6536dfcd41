"""The transformer and its rollouts, against numbers that the published code produced.

Sets are found, not listed.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.schedulers.few_step import FewStepScheduler
from genstream.streaming.controls import PromptControl
from genstream.streaming.engine import CacheEngine
from genstream.streaming.noise import GivenNoise
from genstream.streaming.settings import RecachePolicy
from genstream.transformer.causal_dit import CausalDiT
from genstream.transformer.conversion import from_wan, wan_names
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


def transformer(weights: dict[str, torch.Tensor], config: dict) -> CausalDiT:
    model = CausalDiT(**config).eval().requires_grad_(requires_grad=False)
    model.load_state_dict(from_wan(weights, config))
    return model


def config_of(wan: dict) -> dict:
    """Our arguments for a text-to-video configuration under Wan's names."""
    assert wan["model_type"] == "t2v" and wan["qk_norm"]
    return {
        "patch_size": tuple(wan["patch_size"]),
        "num_attention_heads": wan["num_heads"],
        "attention_head_dim": wan["dim"] // wan["num_heads"],
        "in_channels": wan["in_dim"],
        "out_channels": wan["out_dim"],
        **{
            name: wan[name]
            for name in ("text_dim", "freq_dim", "ffn_dim", "num_layers", "cross_attn_norm", "eps")
        },
    }


@pytest.fixture(scope="module")
def students():
    """The transformers of the rollouts, one for each set."""
    models = {}
    for name, values in SELF_FORCING.items():
        checkpoint = json.loads((FOLDER / f"{name}.checkpoint.json").read_text())
        file = checkpoint["files"][checkpoint["use_for_reference"].split()[0]]["file"]
        models[name] = transformer(load_file(FOLDER / file), config_of(values["model_config"]))
    for name, values in LONGLIVE.items():
        models[name] = transformer(with_lora(name), config_of(values["model_config"]))
    return models


def with_lora(name: str) -> dict[str, torch.Tensor]:
    """The weights of a set with its LoRA merged into them."""
    checkpoint = json.loads((FOLDER / f"{name}.checkpoint.json").read_text())
    files, prefixes = checkpoint["files"], checkpoint["strip_prefix"]
    weights = load_file(FOLDER / files["generator"]["file"])
    lora = load_file(FOLDER / files["generator_lora"]["file"])
    scale = checkpoint["lora_alpha"] / checkpoint["lora_rank"]
    for key, down in lora.items():
        if ".lora_A" in key:
            target = key.replace(".lora_A", "").removeprefix(prefixes["generator_lora"])
            weights[prefixes["generator"] + target] += scale * lora[key.replace("lora_A", "lora_B")] @ down
    return weights


def padded(context: torch.Tensor, tokens: int) -> torch.Tensor:
    return torch.nn.functional.pad(context, (0, 0, 0, tokens - len(context)))


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_names(name, variant):
    values = WAN[name]["variants"][variant]
    assert wan_names(values["diffusers_config"]) == values["key_map"]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_bidirectional_forward(name, variant, data):
    values, io = WAN[name]["variants"][variant], data[name]
    model = transformer(tensors(f"{name}.{variant}_weights"), values["diffusers_config"])
    tokens = values["config"]["text_len"]
    x = io[f"{variant}.x"]
    context = torch.stack([padded(io[f"{variant}.context{i}"], tokens) for i in range(len(x))])
    if f"{variant}.y" in io:
        x = torch.cat([x, io[f"{variant}.y"]], dim=1)
    velocity = model(x, io[f"{variant}.timestep"], context, io.get(f"{variant}.clip_fea")).sample
    torch.testing.assert_close(velocity, io[f"{variant}.flow_pred"], rtol=0, atol=ATOL)


@pytest.mark.parametrize(("name", "case"), MASKED)
def test_masked_forward(name, case, data, students):
    values, io, model = SELF_FORCING[name]["full_sequence"][case], data[name], students[name]
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


def rollout_pipeline(values: dict, scenario: dict, model: CausalDiT) -> CausalVideoPipeline:
    chunk, sink, local = (scenario[name] for name in ("frame_per_block", "sink", "local"))
    return CausalVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=model,
        vae=TinyVideoVAE(
            encoder_width=4, decoder_widths=(4, 4, 4, 4), latent_channels=model.out_channels
        ).eval(),
        scheduler=FewStepScheduler(
            steps=scenario["steps"], shift=scenario["shift"] if scenario["warp"] else 1.0
        ),
        chunk_frames=chunk,
        sink_frames=sink,
        window_frames=None if local < 0 else local - sink - chunk,
        context_timestep=float(scenario["ctx"]),
        independent_first_frame=scenario["iff"],
        text_tokens=values["model_config"]["text_len"],
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
    pipe = rollout_pipeline(values, scenario, students[name])
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
    pipe = CausalVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=students[name],
        vae=TinyVideoVAE(encoder_width=4, decoder_widths=(4, 4, 4, 4)).eval(),
        scheduler=FewStepScheduler(steps=values["denoising_step_list"], shift=values["timestep_shift"]),
        chunk_frames=chunk,
        sink_frames=scenario["sink"],
        window_frames=scenario["local"] - scenario["sink"] - chunk,
        positions="window" if scenario.get("infinity") else "absolute",
        text_tokens=values["model_config"]["text_len"],
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
        decode=False,
    )
    # The prompts of this set are embeddings only; a control names one by its number.
    engine = CacheEngine(pipe.transformer, pipe.vae, lambda prompts: embeds[int(prompts[0])][None])
    state = engine.start(request)
    for segment, frame in enumerate(scenario.get("switch", ()), start=1):
        control = PromptControl(
            prompt=str(segment),
            recache=RecachePolicy.WINDOW if scenario["global_sink"] else RecachePolicy.ALL,
        )
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
