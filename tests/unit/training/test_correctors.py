"""What corrects students, on pieces of random numbers."""

import numpy as np
import pytest
import torch

from genstream.training.correctors import Adversarial, Discriminator, Matching, NoiseLevels, Piece
from genstream.training.denoiser import Denoiser, DenoiserSettings
from genstream.training.forcing import Context
from genstream.training.prompts import Asked
from genstream.training.starting import load_model

SMALL = DenoiserSettings(width=48, layers=1, ffn_width=48, text_width=16, text_layers=1)
LEVELS = NoiseLevels(shift=3.0, least=0.1, most=0.9)
CAPTIONS = ["a red circle", "a blue square"]
SHAPE = (2, 4, 3, 4, 4)


def denoiser(seed):
    torch.manual_seed(seed)
    return Denoiser.new(SMALL, 4)


def piece(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def alone(x):
    """A piece with nothing in front of it."""
    return Piece(x, x.detach()[:, :, :0])


def loss_of(corrector, critic, x, asked, kind="student_loss"):
    torch.manual_seed(0)
    return getattr(corrector, kind)(critic, alone(x), asked, np.random.default_rng(0))


def distance_of(corrector, critic, x, asked):
    torch.manual_seed(0)
    return corrector.distance(critic, alone(x.detach()), asked, np.random.default_rng(0))


def noted(monkeypatch, *denoisers):
    """The arguments that the velocities of these are asked with, as they come."""
    seen = []
    for each in denoisers:
        velocity = each.velocity

        def note(*given, velocity=velocity):
            seen.append(given)
            return velocity(*given)

        monkeypatch.setattr(each, "velocity", note)
    return seen


def test_noise_levels_stay_between_their_ends():
    levels = NoiseLevels(shift=12.0, least=0.5, most=0.9)
    sigma = levels.draw(torch.zeros(500, 4, 3, 2, 2), np.random.default_rng(0))
    assert sigma.shape == (500, 3)
    assert torch.equal(sigma, sigma[:, :1].expand(-1, 3))
    assert (sigma.min(), sigma.max()) == (0.5, pytest.approx(0.9))


@pytest.mark.parametrize("objective", ["dmd", "sid"])
def test_where_critic_and_teacher_agree_there_is_nothing_to_learn(objective):
    teacher, critic, other = denoiser(0), denoiser(0), denoiser(1)
    corrector, x, asked = Matching(teacher, LEVELS, objective), piece(), Asked(CAPTIONS)
    assert loss_of(corrector, critic, x, asked).item() == pytest.approx(0, abs=1e-6)
    assert distance_of(corrector, critic, x, asked) == pytest.approx(0, abs=1e-6)
    loss_of(corrector, other, x, asked).backward()
    assert x.grad.abs().max() > 0
    assert distance_of(corrector, other, x, asked) > 1e-3


class Knowing(Denoiser):
    """Sees one clean sample in all noise, another one when it is told nothing."""

    def __init__(self, told: float, untold: float = 0.0) -> None:
        torch.nn.Module.__init__(self)
        self.text_encoder, self.tokenizer, self.text_tokens = torch.nn.Identity(), None, 0
        self.told, self.untold = told, untold

    def embed(self, captions):
        return torch.tensor([self.told if caption else self.untold for caption in captions])

    def velocity(self, x, sigma, embeds, positions=None, mask=None):
        return (x - embeds[:, None, None, None, None]) / sigma[:, None, :, None, None]


@pytest.mark.parametrize("past_chunks", [0, 1, 4])
def test_a_streaming_teacher_sees_each_chunk_under_noise_in_its_clean_context(monkeypatch, past_chunks):
    teacher, critic = denoiser(0), denoiser(1)
    asked = noted(monkeypatch, teacher, critic)
    stream = torch.randn(2, 4, 2 * (past_chunks + 2), 4, 4)
    piece = Piece(stream[:, :, 2 * past_chunks :].clone().requires_grad_(), stream[:, :, : 2 * past_chunks])
    corrector = Matching(teacher, LEVELS, context=Context(2, 1))
    rng, whole = np.random.default_rng(0), []
    for kind in ("student_loss", "critic_loss"):
        getattr(corrector, kind)(critic, piece, Asked(CAPTIONS), rng)
    for number, (seen, told, _, positions, mask) in enumerate(asked):
        chunk = past_chunks + number % 2
        kept = {0: [], 1: [0]}.get(chunk, [0, chunk - 1])
        frames = [2 * place + frame for place in kept for frame in range(2)]
        assert torch.equal(seen[:, :, : len(frames)], stream[:, :, frames])
        assert not told[:, : len(frames)].any()
        assert told[:, len(frames) :].min() >= LEVELS.least
        assert positions == list(range(len(frames) + 2))
        assert mask[len(frames) :].all()
        assert not mask[: len(frames), len(frames) :].any()
        whole.append(seen[:, :, len(frames) :])
    assert len(whole) == 6  # critic and teacher for the student, the critic for itself
    assert torch.equal(whole[0], whole[2])
    assert torch.equal(whole[1], whole[3])
    assert not torch.equal(whole[0], whole[4])


def test_the_critic_of_a_streaming_teacher_learns_the_flow_of_chunks_in_context():
    critic, corrector = denoiser(0), Matching(denoiser(1), LEVELS, context=Context(1, 1))
    torch.nn.init.normal_(critic.transformer.proj_out.weight, std=0.1)
    chunk, rest = torch.randn(2, 4, 1, 4, 4), torch.randn(2, 4, 4, 4, 4)
    seen, hidden = rest.clone(), rest.clone()
    seen[:, :, 3], hidden[:, :, 1] = 7, 7  # in the window, and between it and the sink
    losses = []
    for past in (rest, seen, hidden):
        torch.manual_seed(0)
        asked, rng = Asked(CAPTIONS), np.random.default_rng(0)
        losses.append(corrector.critic_loss(critic, Piece(chunk, past), asked, rng).item())
    assert losses[0] != losses[1]
    assert losses[0] == losses[2]


@pytest.mark.parametrize("context", [None, Context(1, 1)], ids=["whole", "streaming"])
@pytest.mark.parametrize(("guidance", "real"), [(1.0, 0.7), (3.0, -0.2 + 3 * (0.7 + 0.2))])
def test_students_go_to_where_the_guided_teacher_is_and_away_from_the_critic(guidance, real, context):
    teacher, critic, x = Knowing(0.7, untold=-0.2), Knowing(0.1, untold=5.0), piece()
    corrector = Matching(teacher, LEVELS, guidance=guidance, context=context)
    loss_of(corrector, critic, x, Asked(CAPTIONS)).backward()
    distance = (x.detach() - real).abs().flatten(1).mean(1).view(-1, 1, 1, 1, 1)
    expected = ((0.1 - real) / distance).expand_as(x) / x.numel()
    torch.testing.assert_close(x.grad, expected, rtol=1e-3, atol=1e-9)
    assert (x.grad < 0).all()  # descending it raises the student toward the teacher


def test_matching_asks_both_at_the_same_noise(monkeypatch):
    teacher, critic = denoiser(0), denoiser(1)
    seen = noted(monkeypatch, teacher, critic)
    loss_of(Matching(teacher, LEVELS, guidance=3.0), critic, piece(), Asked(CAPTIONS))
    assert len(seen) == 3
    for x, sigma, _ in seen:
        assert torch.equal(x, seen[0][0])
        assert torch.equal(sigma, seen[0][1])


def test_without_guidance_the_teacher_is_asked_once(monkeypatch):
    teacher = denoiser(0)
    seen = noted(monkeypatch, teacher)
    loss_of(Matching(teacher, LEVELS), denoiser(1), piece(), Asked(CAPTIONS))
    assert len(seen) == 1


def test_the_critic_learns_the_flow_of_what_it_is_shown():
    critic, corrector, x = denoiser(0), Matching(denoiser(1), LEVELS), piece().detach()
    optimizer = torch.optim.AdamW(critic.parameters(), lr=3e-3)
    before = loss_of(corrector, critic, x, Asked(CAPTIONS), "critic_loss").item()
    for _ in range(15):
        optimizer.zero_grad()
        loss_of(corrector, critic, x, Asked(CAPTIONS), "critic_loss").backward()
        optimizer.step()
    assert loss_of(corrector, critic, x, Asked(CAPTIONS), "critic_loss").item() < 0.9 * before


def test_a_discriminator_learns_to_tell_and_the_student_to_deceive():
    torch.manual_seed(0)
    critic, corrector = Discriminator(denoiser(0)), Adversarial(LEVELS, smoothness=0.01)
    made, asked = piece(), Asked(CAPTIONS, pieces=piece(1).detach() + 2)
    distance = distance_of(corrector, critic, made, asked)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        loss_of(corrector, critic, made.detach(), asked, "critic_loss").backward()
        optimizer.step()
    told = distance_of(corrector, critic, made, asked)
    assert told > distance + 0.5
    moving = torch.optim.Adam([made], lr=0.1)
    for _ in range(10):
        moving.zero_grad()
        loss_of(corrector, critic, made, asked).backward()
        moving.step()
    assert distance_of(corrector, critic, made, asked) < told


def test_smoothness_counts_for_the_discriminator_alone():
    torch.manual_seed(0)
    critic, made = Discriminator(denoiser(0)), piece()
    torch.nn.init.normal_(critic.denoiser.transformer.proj_out.weight)
    asked = Asked(CAPTIONS, pieces=piece(1).detach())
    smooth, rough = Adversarial(LEVELS, smoothness=1.0), Adversarial(LEVELS, smoothness=0.0)
    assert torch.equal(loss_of(smooth, critic, made, asked), loss_of(rough, critic, made, asked))
    more, less = (loss_of(each, critic, made.detach(), asked, "critic_loss") for each in (smooth, rough))
    assert more > less


def test_slopes_are_not_lost_in_bfloat16():
    torch.manual_seed(0)
    critic = Discriminator(Denoiser.of(load_model("teacher", "toyworld")))
    torch.nn.init.normal_(critic.head[1].weight, std=0.1)
    torch.nn.init.constant_(critic.head[1].bias, 3.0)
    real, made = torch.randn(2, 4, 16, 3, 16, 16)
    asked, gradients = Asked(CAPTIONS * 2, pieces=real), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            torch.manual_seed(0)
            *_, slope = Adversarial(LEVELS, smoothness=1.0)._logits(
                critic, alone(made), asked, np.random.default_rng(0)
            )
        gradients.append(torch.autograd.grad(slope, critic.head[1].weight)[0].flatten())
    exact, rounded = gradients
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.85
    assert rounded.norm() == pytest.approx(exact.norm(), rel=0.5)


def test_a_discriminator_needs_clips():
    with pytest.raises(ValueError, match="prompts must come with clips"):
        loss_of(Adversarial(LEVELS, 0.0), Discriminator(denoiser(0)), piece(), Asked(CAPTIONS))
