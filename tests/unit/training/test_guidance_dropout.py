"""Teachers and students are told nothing in the share of clips that guidance asks for."""

import pytest
import torch

from genstream.training.denoiser import Denoiser
from genstream.training.student import StudentTrainee, StudentTrainingSettings
from genstream.training.teacher import TeacherTrainee, TeacherTrainingSettings

SMALL = {
    "vae": "none",
    "clips": 5,
    "evaluation_clips": 4,
    "clip_chunks": 6,
    "chunk_frames": 1,
    "batch_size": 64,
    "width": 48,
    "layers": 1,
    "ffn_width": 48,
    "text_width": 16,
    "text_layers": 1,
    "precision": "fp32",
}


@pytest.mark.parametrize(("share", "seen"), [(0.0, (0, 0)), (0.1, (0.03, 0.2)), (1.0, (1, 1))])
@pytest.mark.parametrize(
    ("kind", "settings", "own"),
    [
        (StudentTrainee, StudentTrainingSettings, {"window_chunks": 1, "first_chunks": 1}),
        (TeacherTrainee, TeacherTrainingSettings, {"horizon_chunks": 3}),
    ],
)
def test_as_many_prompts_are_empty_as_guidance_asks_for(kind, settings, own, share, seen, monkeypatch):
    chosen = settings(**SMALL, **own, without_text=share)
    clips, latents = chosen.clip_set(temporal_ratio=4), torch.randn(9, 4, 6, 2, 2)
    trainee = kind(chosen, Denoiser.new(chosen, 4), clips, latents)
    embed, told = trainee.module.embed, []

    def note(captions):
        told.extend(captions)
        return embed(captions)

    monkeypatch.setattr(trainee.module, "embed", note)
    with torch.no_grad():
        for step in range(4):
            trainee.loss(step)
    assert len(told) == 4 * 64
    assert seen[0] <= sum(not caption for caption in told) / len(told) <= seen[1]
