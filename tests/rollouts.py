"""Rollouts that the published code produced on tiny random weights, run again through the pipeline.

The files are found, not listed: in the folder GENSTREAM_PARITY_DIR, or beside the checkout.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file

from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.schedulers.few_step import FewStepScheduler
from genstream.streaming.controls import PromptControl
from genstream.streaming.noise import GivenNoise
from genstream.streaming.state import StreamState
from genstream.transformer.causal_dit import CausalDiT
from genstream.transformer.conversion import from_wan
from genstream.vae.tiny import TinyVideoVAE

FOLDER = Path(
    os.environ.get("GENSTREAM_PARITY_DIR", Path(__file__).resolve().parents[2] / "shared" / "parity")
)


def sets(prefix: str) -> dict[str, dict]:
    """What the json file of each set says, by the set's name."""
    paths = sorted(FOLDER.glob(f"{prefix}_*.json"))
    found = {
        path.stem: json.loads(path.read_text())
        for path in paths
        if path.with_suffix(".safetensors").is_file()
    }
    return {name: values for name, values in found.items() if "set" in values}


@cache
def tensors(file: str) -> dict[str, torch.Tensor]:
    """Tensors of a file, read once; nobody changes them."""
    return load_file(FOLDER / f"{file}.safetensors")


def transformer(weights: dict[str, torch.Tensor], config: dict) -> CausalDiT:
    """The model of a checkpoint under Wan's names."""
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


@cache
def student(name: str) -> CausalDiT:
    """The transformer that the rollouts of a set were made with."""
    checkpoint = json.loads((FOLDER / f"{name}.checkpoint.json").read_text())
    config = config_of(checkpoint["model_config"])
    if "lora_rank" in checkpoint:
        return transformer(_with_lora(checkpoint), config)
    file = checkpoint["files"][checkpoint["use_for_reference"].split()[0]]["file"]
    return transformer(load_file(FOLDER / file), config)


def _with_lora(checkpoint: dict) -> dict[str, torch.Tensor]:
    """The weights of a set with its LoRA merged into them."""
    files, prefixes = checkpoint["files"], checkpoint["strip_prefix"]
    weights = load_file(FOLDER / files["generator"]["file"])
    lora = load_file(FOLDER / files["generator_lora"]["file"])
    scale = checkpoint["lora_alpha"] / checkpoint["lora_rank"]
    for key, down in lora.items():
        if ".lora_A" in key:
            target = key.replace(".lora_A", "").removeprefix(prefixes["generator_lora"])
            weights[prefixes["generator"] + target] += scale * lora[key.replace("lora_A", "lora_B")] @ down
    return weights


class EmbeddedPrompts(CausalVideoPipeline):
    """The prompts of the sets are embeddings only: a prompt is the number of one of them."""

    prompts: torch.Tensor

    def encode_prompt(self, prompt):
        return self.prompts[[int(number) for number in prompt]]


@dataclass(frozen=True)
class Rollout:
    """One scenario of one set."""

    set_name: str
    name: str

    @cached_property
    def values(self) -> dict:
        """What the json file says of the set."""
        return json.loads((FOLDER / f"{self.set_name}.json").read_text())

    @property
    def scenario(self) -> dict:
        """What it says of the scenario."""
        return self.values["scenarios"][self.name]

    def tensor(self, name: str) -> torch.Tensor | None:
        """One of the scenario's tensors, in the file's own layout."""
        return tensors(self.set_name).get(f"{self.name}.{name}")

    @property
    def expected(self) -> torch.Tensor:
        """The published code's latents, `[B, C, T, h, w]`."""
        return self.tensor("output").transpose(1, 2)

    @property
    def given(self) -> torch.Tensor | None:
        """Latents that the stream starts with."""
        initial = self.tensor("initial_latent")
        return None if initial is None else initial.transpose(1, 2)

    @property
    def noise(self) -> GivenNoise:
        """All noise, as it was recorded."""
        blocks = range(self.scenario.get("num_blocks_generated", self.scenario["blocks"]))
        renoise = [
            torch.cat([self.tensor(f"block{block:02d}.step{step}.renoise") for block in blocks], dim=1)
            for step in range(len(self.steps) - 1)
        ]
        first = 0 if self.given is None else self.given.shape[2]
        return GivenNoise(
            self.tensor("noise").transpose(1, 2), tuple(x.transpose(1, 2) for x in renoise), first_frame=first
        )

    @property
    def steps(self) -> list[float]:
        """Denoising steps before the shift."""
        return self.scenario.get("steps") or self.values["denoising_step_list"]

    def pipeline(self) -> EmbeddedPrompts:
        """The pipeline that runs like the published code did."""
        scenario, config = self.scenario, self.values["model_config"]
        chunk = scenario.get("frame_per_block") or self.values["frames_per_block"]
        shift = scenario.get("shift") or self.values["timestep_shift"]
        sink, local = scenario["sink"], scenario["local"]
        return EmbeddedPrompts(
            tokenizer=None,
            text_encoder=None,
            transformer=student(self.set_name),
            vae=TinyVideoVAE(
                encoder_width=4, decoder_widths=(4, 4, 4, 4), latent_channels=config["out_dim"]
            ).eval(),
            scheduler=FewStepScheduler(steps=self.steps, shift=shift, warped=scenario.get("warp", True)),
            chunk_frames=chunk,
            sink_frames=sink,
            window_frames=None if local < 0 else local - sink - chunk,
            positions="window" if scenario.get("infinity") else "absolute",
            context_timestep=float(scenario.get("ctx", 0)),
            recache="window" if scenario.get("global_sink") else "all",
            independent_first_frame=scenario.get("iff", False),
            text_tokens=config["text_len"],
        )

    def run(self, pipe: EmbeddedPrompts) -> tuple[torch.Tensor, StreamState]:
        """Latents `[B, C, T, h, w]` and the state behind the last chunk."""
        switches, prompts = self.scenario.get("switch", ()), self.tensor("prompt_embeds")
        batch = len(self.tensor("noise"))
        height, width = (8 * side for side in self.values["latent_shape_CHW"][1:])
        request = pipe.request(
            prompt_embeds=prompts[:batch],
            num_frames=1 + 4 * (self.expected.shape[2] - 1),
            height=height,
            width=width,
            noise=self.noise,
            initial_latents=self.given,
            decode=False,
        )
        pipe.prompts = prompts
        state = pipe.start(request)
        for number, frame in enumerate(switches, start=1):
            state.submit(PromptControl(prompt=str(number)), not_before=1 + 4 * (frame - 1))
        return torch.cat([chunk.latents for chunk in pipe.run(state)], dim=2), state


def rollouts(*prefixes: str) -> list[Rollout]:
    """All scenarios of all sets whose names start so."""
    return [
        Rollout(name, scenario)
        for prefix in prefixes
        for name, values in sets(prefix).items()
        for scenario in values["scenarios"]
    ]


DTYPES = (torch.bfloat16, torch.float16)


def error_shares(rollout: Rollout, dtypes: Sequence[torch.dtype]) -> list[float]:
    """Root mean square error of the latents in each dtype, as a share of their size in float32."""
    pipe = rollout.pipeline()
    exact, _ = rollout.run(pipe)
    shares = []
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        for dtype in dtypes:
            latents, _ = rollout.run(EmbeddedPrompts.from_pretrained(folder, dtype=dtype))
            assert latents.dtype == dtype
            error = (latents.float() - exact).square().mean() / exact.square().mean()
            shares.append(float(error.sqrt()))
    return shares
