"""Weights in eight bits, for GPUs that are too small for sixteen."""

from enum import StrEnum

from diffusers import PipelineQuantizationConfig, TorchAoConfig
from diffusers.utils import is_torchao_available

# Where one value decides about a whole latent frame, bits matter more than bytes.
KEPT = ("patch_embedding", "condition_embedder", "proj_out")


class WeightFormat(StrEnum):
    """How the linear layers of the transformer's blocks are stored. They compute in the pipeline's dtype."""

    INT8 = "int8"
    """Eight-bit integers with one scale for each output."""
    FP8 = "fp8"
    """Eight-bit floats (e4m3) with one scale for each output."""


def quantization(weights: WeightFormat) -> PipelineQuantizationConfig:
    """What `CausalVideoPipeline.from_pretrained` takes as `quantization_config`; give it a `dtype`, too.

    Raises:
        ImportError: torchao is not installed.
    """
    if not is_torchao_available():
        raise ImportError(f"{weights} weights need torchao: pip install 'genstream[quantization]'")
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    kinds = {WeightFormat.INT8: Int8WeightOnlyConfig, WeightFormat.FP8: Float8WeightOnlyConfig}
    config = TorchAoConfig(kinds[weights](), modules_to_not_convert=list(KEPT))
    return PipelineQuantizationConfig(quant_mapping={"transformer": config})
