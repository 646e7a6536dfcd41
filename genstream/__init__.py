"""Stream generated video in real time from one GPU, or a small model from a laptop CPU."""

from importlib import import_module as _import_module
from pathlib import Path as _Path

__version__ = "0.1.0"

# A wheel holds pipelines/, vae/, kernels/ and app/ inside this package; a checkout keeps them one
# level up. Only a checkout has pyproject.toml there.
_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))

# Public names, resolved on first use so that `import genstream` stays free of torch. diffusers loads
# components through these names (`model_index.json` says ["genstream", "CausalDiT"]) and looks for the
# mixins beside them.
_EXPORTS = {
    "CausalDiT": "genstream.transformer.causal_dit",
    "CausalVideoPipeline": "genstream.pipelines.causal_video",
    "CausalVideoVAE": "genstream.vae.causal",
    "ContextPolicy": "genstream.streaming.settings",
    "Control": "genstream.streaming.controls",
    "FewStepScheduler": "genstream.schedulers.few_step",
    "FlowEulerScheduler": "genstream.schedulers.few_step",
    "GivenNoise": "genstream.streaming.noise",
    "LiveFrames": "genstream.streaming.source",
    "LoraControl": "genstream.streaming.controls",
    "LoraUse": "genstream.transformer.adapters",
    "MotionNoise": "genstream.streaming.intake",
    "NoiseSource": "genstream.streaming.noise",
    "PauseControl": "genstream.streaming.controls",
    "PositionPolicy": "genstream.cache.layout",
    "PromptControl": "genstream.streaming.controls",
    "RecachePolicy": "genstream.streaming.settings",
    "ResetControl": "genstream.streaming.controls",
    "ResumeControl": "genstream.streaming.controls",
    "SeededNoise": "genstream.streaming.noise",
    "StopControl": "genstream.streaming.controls",
    "StreamRequest": "genstream.streaming.request",
    "StreamSettings": "genstream.streaming.settings",
    "StreamState": "genstream.streaming.state",
    "TinyVideoVAE": "genstream.vae.tiny",
    "ToyWorld": "genstream.data.toyworld",
    "TurboVAED": "genstream.vae.turbo",
    "WanImageProcessor": "genstream.conditioning.wan_image",
    "WanVideoVAE": "genstream.vae.wan",
    "ImageProcessingMixin": "transformers",
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
    "DiffusionPipeline": "diffusers",
}


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'genstream' has no attribute {name!r}")
    return getattr(_import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
