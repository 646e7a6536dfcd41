"""What tells a student where its streams go wrong: a teacher and a critic, or a discriminator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from genstream.schedulers.schedule import shifted
from genstream.training.denoiser import Denoiser, velocity_in
from genstream.training.forcing import Context, in_stream
from genstream.training.objectives import (
    add_noise,
    adversarial_loss,
    clean_from,
    discriminator_loss,
    flow_loss,
    guided,
    identity_loss,
    matching_gradient,
    matching_loss,
    roughness,
)
from genstream.training.prompts import Asked


@dataclass(frozen=True)
class Piece:
    """The ends of streams, which are judged.

    Attributes:
        latents: `[B, C, T, h, w]`.
        past: what was streamed in front of them, without gradient; of any length.
    """

    latents: Tensor
    past: Tensor

    def detach(self) -> Piece:
        """The same without gradient."""
        return Piece(self.latents.detach(), self.past)


@dataclass(frozen=True, kw_only=True)
class NoiseLevels:
    """Noise levels that pieces of streams are judged at, the same for all frames of one.

    Attributes:
        shift: timestep shift of what is drawn evenly.
        least: in (0, 1].
        most: likewise.
    """

    shift: float
    least: float
    most: float

    def draw(self, like: Tensor, rng: np.random.Generator) -> Tensor:
        """`[B, T]` for pieces `[B, C, T, h, w]`."""
        levels = shifted(rng.random(len(like)), self.shift)  # type: ignore[arg-type]
        sigma = torch.from_numpy(np.clip(levels, self.least, self.most)).float()
        return sigma.to(like.device)[:, None].expand(-1, like.shape[2])


class Corrector(Protocol):
    """Losses of a student and of the critic that is trained beside it, on pieces of its streams.

    The critic is passed in: it belongs to what is trained.
    """

    @property
    def through_critic(self) -> bool:
        """Whether the student's gradient goes through the critic, which must not learn from it."""
        ...

    def student_loss(self, critic: nn.Module, piece: Piece, asked: Asked, rng: np.random.Generator) -> Tensor:
        """Of a piece with gradient."""

    def critic_loss(self, critic: nn.Module, piece: Piece, asked: Asked, rng: np.random.Generator) -> Tensor:
        """Of a piece without gradient."""

    def distance(self, critic: nn.Module, piece: Piece, asked: Asked, rng: np.random.Generator) -> float:
        """How far the student is from where it should be, as far as the critic knows."""


class Matching:
    """Distribution matching: the difference of what a frozen teacher and a critic see under the same noise.

    The critic is a denoiser that learns what the student makes (DMD, arXiv 2311.18828; SiD, 2404.04057).
    Where the teacher streams, both see every chunk of a piece by itself, in its context in the stream.

    Args:
        teacher: frozen.
        levels: of the noise.
        objective: "dmd" or "sid".
        guidance: guidance scale of the teacher; 1 is off.
        alpha: weight of the squared difference in "sid".
        context: what a streaming teacher sees of the past; None for one of whole pieces.
    """

    def __init__(
        self,
        teacher: Denoiser,
        levels: NoiseLevels,
        objective: Literal["dmd", "sid"] = "dmd",
        guidance: float = 1.0,
        alpha: float = 1.0,
        context: Context | None = None,
    ) -> None:
        self.teacher = teacher.requires_grad_(requires_grad=False)
        self.levels = levels
        self.objective = objective
        self.guidance = guidance
        self.alpha = alpha
        self.context = context
        self._untold: dict[tuple[int, bool], Tensor] = {}

    @property
    def through_critic(self) -> bool:
        """Whether the student's gradient goes through the critic."""
        return self.objective == "sid"

    def student_loss(self, critic: nn.Module, piece: Piece, asked: Asked, rng: np.random.Generator) -> Tensor:
        """Takes the piece to where the teacher finds more of its kind than the critic does."""
        if self.objective == "sid":
            real, fake = self._seen(critic, piece, asked, rng)
            return identity_loss(piece.latents, real, fake, self.alpha)
        with torch.no_grad():
            real, fake = self._seen(critic, piece, asked, rng)
        return matching_loss(piece.latents, real, fake)

    def critic_loss(self, critic: nn.Module, piece: Piece, asked: Asked, rng: np.random.Generator) -> Tensor:
        """Flow matching on what the student makes."""
        assert isinstance(critic, Denoiser)
        clean = piece.latents
        sigma, noise = self.levels.draw(clean, rng), torch.randn_like(clean)
        told = asked.embedded(critic)
        velocity = self._velocity(critic, add_noise(clean, noise, sigma), sigma, told, piece)
        return flow_loss(velocity, clean, noise)

    def distance(self, critic: nn.Module, piece: Piece, asked: Asked, rng: np.random.Generator) -> float:
        """Mean absolute difference of teacher and critic, in errors of the teacher."""
        real, fake = self._seen(critic, piece, asked, rng)
        return matching_gradient(piece.latents, real, fake).abs().mean().item()

    def _seen(
        self, critic: nn.Module, piece: Piece, asked: Asked, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Clean samples that teacher and critic see in a piece under noise."""
        assert isinstance(critic, Denoiser)
        clean = piece.latents
        sigma = self.levels.draw(clean, rng)
        noisy = add_noise(clean, torch.randn_like(clean), sigma)
        fake = self._velocity(critic, noisy, sigma, asked.embedded(critic), piece)
        real = self._velocity(self.teacher, noisy, sigma, asked.embedded(self.teacher), piece)
        if self.guidance > 1:
            away = self._velocity(self.teacher, noisy, sigma, self._nothing(noisy), piece)
            real = guided(real, away, self.guidance)
        return clean_from(noisy, real, sigma), clean_from(noisy, fake, sigma)

    def _nothing(self, like: Tensor) -> Tensor:
        """What the teacher is told without a prompt: the same in all steps, and in all evaluations."""
        # Those compute in another precision than steps do.
        key = (len(like), torch.is_autocast_enabled(like.device.type))
        if key not in self._untold:
            self._untold[key] = self.teacher.embed([""] * len(like))
        return self._untold[key]

    def _velocity(
        self, denoiser: Denoiser, noisy: Tensor, sigma: Tensor, embeds: Tensor, piece: Piece
    ) -> Tensor:
        """Of a piece under noise, as the denoiser sees it."""
        if self.context is None:
            return denoiser.velocity(noisy, sigma, embeds)
        stream = torch.cat([piece.past, piece.latents.detach()], dim=2)
        size, first = self.context.chunk_frames, piece.past.shape[2]
        velocities = []
        for start in range(0, noisy.shape[2], size):
            sequence = in_stream((first + start) // size, self.context)
            context, own = stream[:, :, sequence.clean_frames], slice(start, start + size)
            velocities.append(
                velocity_in(denoiser, context, noisy[:, :, own], sigma[:, own], embeds, sequence)
            )
        return torch.cat(velocities, dim=2)


class Discriminator(nn.Module):
    """A denoiser with a head that tells real pieces under noise from made ones.

    Args:
        denoiser: with a teacher's weights; what its last layer sees is judged.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        width = denoiser.transformer.proj_out.in_features
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, noisy: Tensor, sigma: Tensor, embeds: Tensor) -> Tensor:
        """Logits `[B]`, high for real ones."""
        seen: list[Tensor] = []
        transformer = self.denoiser.transformer
        hook = transformer.norm_out.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            velocity = self.denoiser.velocity(noisy, sigma, embeds)
        finally:
            hook.remove()
        features = seen[0].float().mean(dim=(1, 2))  # [B, T, L, C]
        with torch.autocast(features.device.type, enabled=False):  # slopes are small differences of logits
            logits: Tensor = self.head(features)
        # Weights in shards are gathered for the gradient where it enters at the transformer's own result.
        return logits[:, 0] + 0 * velocity.mean(dim=(1, 2, 3, 4))


class Adversarial:
    """A discriminator that is shown real pieces of the same prompts (R3GAN, arXiv 2501.05441).

    Args:
        levels: of the noise, the same for a real piece and a made one.
        smoothness: weight of the discriminator's squared slope at either.
        step: deviation of the noise along which that slope is taken; in bfloat16 less is lost in rounding.
    """

    def __init__(self, levels: NoiseLevels, smoothness: float, step: float = 0.1) -> None:
        self.levels = levels
        self.smoothness = smoothness
        self.step = step

    @property
    def through_critic(self) -> bool:
        """It does."""
        return True

    def student_loss(self, critic: nn.Module, piece: Piece, asked: Asked, rng: np.random.Generator) -> Tensor:
        """Takes the piece to where it looks as real as the real one."""
        real, fake, _ = self._logits(critic, piece, asked, rng)
        return adversarial_loss(real, fake)

    def critic_loss(self, critic: nn.Module, piece: Piece, asked: Asked, rng: np.random.Generator) -> Tensor:
        """Tells both apart, without steep slopes."""
        real, fake, slope = self._logits(critic, piece, asked, rng)
        return discriminator_loss(real, fake) + self.smoothness * slope

    def distance(self, critic: nn.Module, piece: Piece, asked: Asked, rng: np.random.Generator) -> float:
        """How much more real the real pieces look."""
        real, fake, _ = self._logits(critic, piece, asked, rng)
        return (real - fake).mean().item()

    def _logits(
        self, critic: nn.Module, piece: Piece, asked: Asked, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the real pieces, of the made ones, and the squared slopes at both."""
        assert isinstance(critic, Discriminator)
        if asked.pieces is None:
            raise ValueError("prompts must come with clips for an adversarial objective, got prompts alone")
        made = piece.latents
        real = asked.pieces.to(made)
        sigma = self.levels.draw(made, rng)
        both = torch.cat([add_noise(each, torch.randn_like(each), sigma) for each in (real, made)])
        told, levels = critic.denoiser.embed(asked.captions * 2), torch.cat([sigma, sigma])
        logits = critic(both, levels, told)
        slope = logits.new_zeros(())
        if self.smoothness > 0 and not made.requires_grad:
            disturbed = critic(both + self.step * torch.randn_like(both), levels, told)
            slope = roughness(logits, disturbed, self.step)
        of_real, of_made = logits.chunk(2)
        return of_real, of_made, slope
