"""Rollouts that the published code produced on tiny random weights, run again through the pipeline.

The files are found, not listed: in the folder GENSTREAM_PARITY_DIR, or beside the checkout.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import pad

from genstream.cli.__main__ import main
from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.schedulers.few_step import FewStepScheduler
from genstream.streaming.controls import PromptControl
from genstream.streaming.noise import GivenNoise
from genstream.streaming.request import StreamRequest
from genstream.streaming.state import StreamState
from genstream.transformer.causal_dit import CausalDiT
from genstream.vae.tiny import TinyVideoVAE

FOLDER = Path(
    os.environ.get("GENSTREAM_PARITY_DIR", Path(__file__).resolve().parents[2] / "shared" / "parity")
)

IMAGE_INPUTS = {"image_embeds": "clip_fea", "image_channels": "y"}
_CONVERTED = tempfile.TemporaryDirectory()


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


@cache
def converted(name: str, preset: str = "self-forcing") -> Path:
    """The folder that `genstream convert` makes of the torch files of a set, as they are published."""
    checkpoint = json.loads((FOLDER / f"{name}.checkpoint.json").read_text())
    folder = Path(_CONVERTED.name) / name
    folder.mkdir()
    content = {key: load_file(FOLDER / file["file"]) for key, file in checkpoint["files"].items()}
    lora = {key: content.pop(key) for key in list(content) if key.endswith("lora")}
    torch.save({**content, "step": 600}, folder / "weights.pt")
    options = ["--preset", preset]
    if lora:
        torch.save(lora, folder / "lora.pt")
        options += ["--lora", str(folder / "lora.pt"), "--lora-alpha", str(checkpoint["lora_alpha"])]
    return convert(folder / "weights.pt", checkpoint["model_config"], *options)


def convert(source: Path, config: dict, *options: str) -> Path:
    """What the command makes of a file, beside which the model is described as Wan does it."""
    (source.parent / "config.json").write_text(json.dumps(config))
    output = source.parent / "model"
    assert main(["convert", str(source), "-o", str(output), *options]) == 0
    return output


@cache
def student(name: str) -> CausalDiT:
    """The transformer that the rollouts of a set were made with."""
    model = CausalDiT.from_pretrained(converted(name) / "transformer")
    return model.requires_grad_(requires_grad=False)


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

    def pipeline(self) -> CausalVideoPipeline:
        """The pipeline that runs like the published code did."""
        scenario, config = self.scenario, self.values["model_config"]
        chunk = scenario.get("frame_per_block") or self.values["frames_per_block"]
        shift = scenario.get("shift") or self.values["timestep_shift"]
        sink, local = scenario["sink"], scenario["local"]
        loaded = CausalVideoPipeline.from_pretrained(
            converted(self.set_name),
            transformer=student(self.set_name),
            vae=_unused_vae(config["out_dim"]),
            scheduler=FewStepScheduler(steps=self.steps, shift=shift, warped=scenario.get("warp", True)),
        )
        return CausalVideoPipeline(
            **loaded.components,
            chunk_frames=chunk,
            sink_frames=sink,
            window_frames=None if local < 0 else local - sink - chunk,
            positions="window" if scenario.get("infinity") else "absolute",
            context_timestep=float(scenario.get("ctx", 0)),
            recache="window" if scenario.get("global_sink") else "all",
            independent_first_frame=scenario.get("iff", False),
            text_tokens=loaded.config.text_tokens,
        )

    def run(self, pipe: CausalVideoPipeline) -> tuple[torch.Tensor, StreamState]:
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
        state = pipe.start(request)
        for number, frame in enumerate(switches, start=1):
            state.submit(PromptControl(prompt_embeds=prompts[[number]]), not_before=1 + 4 * (frame - 1))
        return torch.cat([chunk.latents for chunk in pipe.run(state)], dim=2), state


@dataclass(frozen=True)
class QueueRollout:
    """The rollout of a set made by rolling forcing."""

    set_name: str
    name: str = "rollout"

    @property
    def values(self) -> dict:
        """What the json file says of the set."""
        return json.loads((FOLDER / f"{self.set_name}.json").read_text())

    @property
    def expected(self) -> torch.Tensor:
        """The published code's latents, `[B, C, T, h, w]`."""
        return tensors(self.set_name)["output"].transpose(1, 2)

    def pipeline(self) -> CausalVideoPipeline:
        """The converted model, as the preset runs it."""
        folder, channels = converted(self.set_name, "rolling-forcing"), self.values["model_config"]["out_dim"]
        return CausalVideoPipeline.from_pretrained(folder, vae=_unused_vae(channels))

    def request(self, pipe: CausalVideoPipeline) -> StreamRequest:
        """The recorded stream, with all its noise."""
        values, io = self.values, tensors(self.set_name)
        height, width = (8 * side for side in values["latent_shape_CHW"][1:])
        levels = range(len(values["denoising_step_list"]) - 1)
        renoise = tuple(self._renoise(level) for level in levels)
        return pipe.request(
            prompt_embeds=io["prompt_embeds"],
            num_frames=1 + 4 * (io["noise"].shape[1] - 1),
            height=height,
            width=width,
            noise=GivenNoise(io["noise"].transpose(1, 2), renoise),
            decode=False,
        )

    def _renoise(self, level: int) -> torch.Tensor:
        """The samples that took all blocks from one level to the next, in windows that follow one another."""
        samples = [
            tensors(self.set_name)[f"window{block + level:02d}.renoise.block{block:02d}"]
            for block in range(self.values["num_blocks"])
        ]
        return torch.cat(samples, dim=1).transpose(1, 2)

    def run(self, pipe: CausalVideoPipeline) -> tuple[torch.Tensor, StreamState]:
        """Latents `[B, C, T, h, w]` and the state behind the last chunk."""
        state = pipe.start(self.request(pipe))
        return torch.cat([chunk.latents for chunk in pipe.run(state)], dim=2), state


@dataclass(frozen=True)
class OneStep:
    """Velocities of a variant of Wan, each from a stream of one chunk and one step: x0 = x - sigma v."""

    set_name: str
    name: str

    @property
    def values(self) -> dict:
        """What the json file says of the variant."""
        return json.loads((FOLDER / f"{self.set_name}.json").read_text())["variants"][self.name]

    def tensor(self, name: str) -> torch.Tensor | None:
        """One of the variant's tensors."""
        return tensors(self.set_name).get(f"{self.name}.{name}")

    @property
    def timesteps(self) -> list[float]:
        """That of each stream."""
        return self.tensor("timestep").tolist()

    @property
    def expected(self) -> torch.Tensor:
        """The latents behind the step, `[B, C, T, h, w]`."""
        sigma = torch.tensor(self.timesteps).view(-1, 1, 1, 1, 1) / 1000
        return self.tensor("x") - sigma * self.tensor("flow_pred")

    @property
    def prompt_embeds(self) -> torch.Tensor:
        """Filled up with zeros, `[B, tokens, C]`."""
        length = self.values["config"]["text_len"]
        given = [self.tensor(f"context{row}") for row in range(len(self.timesteps))]
        return torch.stack([pad(embeds, (0, 0, 0, length - len(embeds))) for embeds in given])

    def transformer(self) -> CausalDiT:
        """Of the published weights, by way of `genstream convert`."""
        return _wan_transformer(self.set_name, self.name)

    def pipeline(self) -> CausalVideoPipeline:
        """A stream of one step; the timestep is that of the first row."""
        x = self.tensor("x")
        return CausalVideoPipeline(
            tokenizer=None,
            text_encoder=None,
            transformer=self.transformer(),
            vae=_unused_vae(x.shape[1]),
            scheduler=FewStepScheduler(steps=(self.timesteps[0],), shift=1.0),
            chunk_frames=x.shape[2],
            text_tokens=self.values["config"]["text_len"],
        )

    def run(self, pipe: CausalVideoPipeline) -> tuple[torch.Tensor, None]:
        """Latents `[B, C, T, h, w]`, each row with the timestep of its own."""
        rows = []
        for row, timestep in enumerate(self.timesteps):
            pipe.scheduler = FewStepScheduler(steps=(timestep,), shift=1.0)
            (chunk,) = pipe.run(pipe.start(self._request(pipe, row)))
            rows.append(chunk.latents)
        return torch.cat(rows), None

    def _request(self, pipe: CausalVideoPipeline, row: int) -> StreamRequest:
        x, dtype = self.tensor("x")[[row]], pipe.transformer.dtype
        given = {name: self.tensor(file) for name, file in IMAGE_INPUTS.items()}
        image = {name: None if values is None else values[[row]].to(dtype) for name, values in given.items()}
        return pipe.request(
            prompt_embeds=self.prompt_embeds[[row]],
            num_frames=1 + 4 * (x.shape[2] - 1),
            height=8 * x.shape[3],
            width=8 * x.shape[4],
            noise=GivenNoise(x),
            decode=False,
            **image,
        )


@cache
def _wan_transformer(name: str, variant: str) -> CausalDiT:
    config = json.loads((FOLDER / f"{name}.json").read_text())["variants"][variant]["config"]
    folder = Path(_CONVERTED.name) / f"{name}.{variant}"
    folder.mkdir()
    weights = shutil.copy(FOLDER / f"{name}.{variant}_weights.safetensors", folder)
    model = CausalDiT.from_pretrained(convert(Path(weights), config) / "transformer")
    return model.requires_grad_(requires_grad=False)


def _unused_vae(channels: int) -> TinyVideoVAE:
    """Small; latents are asked for and nothing is decoded."""
    return TinyVideoVAE(encoder_width=4, decoder_widths=(4, 4, 4, 4), latent_channels=channels).eval()


Case = Rollout | QueueRollout | OneStep


def every_case() -> list[Case]:
    """All that the published students' and Wan's own code computed."""
    wan = [OneStep(name, variant) for name, values in sets("wan").items() for variant in values["variants"]]
    queues = [QueueRollout(name) for name in sets("rolling_forcing")]
    return [*rollouts("self_forcing", "longlive"), *queues, *wan]


def rollouts(*prefixes: str) -> list[Rollout]:
    """All scenarios of all sets whose names start so."""
    return [
        Rollout(name, scenario)
        for prefix in prefixes
        for name, values in sets(prefix).items()
        for scenario in values["scenarios"]
    ]


DTYPES = (torch.bfloat16, torch.float16)


def error_shares(case: Case, dtypes: Sequence[torch.dtype]) -> list[float]:
    """Root mean square error of the latents in each dtype, as a share of their size in float32."""
    pipe = case.pipeline()
    exact, _ = case.run(pipe)
    shares = []
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        for dtype in dtypes:
            latents, _ = case.run(CausalVideoPipeline.from_pretrained(folder, dtype=dtype))
            assert latents.dtype == dtype
            error = (latents.float() - exact).square().mean() / exact.square().mean()
            shares.append(float(error.sqrt()))
    return shares
