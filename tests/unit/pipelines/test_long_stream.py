"""Thousands of latent frames with layers of the published size: Wan's position table ended at 1,024."""

import gc

import pytest
import torch

from genstream.pipelines.causal_video import CausalVideoPipeline
from genstream.schedulers.few_step import FewStepScheduler
from genstream.streaming.presets import PRESETS
from genstream.transformer.causal_dit import CausalDiT
from genstream.vae.tiny import TinyVideoVAE

LATENT_FRAMES = 2000


def live_bytes() -> int:
    """Memory of all tensors that are alive."""
    gc.collect()
    # Not isinstance: it would wake every lazy module among the objects.
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.mark.slow
def test_two_thousand_latent_frames():
    torch.manual_seed(0)
    transformer = CausalDiT(num_layers=1).eval().requires_grad_(requires_grad=False)
    pipe = CausalVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=transformer.to(torch.bfloat16),
        vae=TinyVideoVAE(encoder_width=4, decoder_widths=(4, 4, 4, 4), latent_channels=16).eval(),
        scheduler=FewStepScheduler(steps=(1000.0,)),
        text_tokens=16,
    )
    embeds = torch.randn(1, 16, 4096, generator=torch.Generator().manual_seed(1))
    settings = PRESETS["longlive"].settings
    request = pipe.request(
        prompt_embeds=embeds,
        num_frames=1 + 4 * (LATENT_FRAMES - 1),
        height=16,
        width=16,
        settings=settings,
        decode=False,
    )
    state, sizes, spreads = pipe.start(request), {}, []
    while not state.finished:
        latents = pipe.step(state).latents
        assert latents.isfinite().all()
        spreads.append(float(latents.float().std()))
        if state.chunk_index in (20, 341, 342, 660):  # 342: latent frames 1,023 to 1,025
            sizes[state.chunk_index] = live_bytes()
    assert state.frame >= LATENT_FRAMES
    assert len(set(sizes.values())) == 1, sizes
    early, late = (torch.tensor(part).mean() for part in (spreads[20:120], spreads[-100:]))
    torch.testing.assert_close(late, early, rtol=0.1, atol=0)
