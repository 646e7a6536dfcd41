"""What a distillation takes of each GPU, found without weights and GPUs: a dry run on meta tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from genstream.cache.kv_cache import KVCache
from genstream.pipelines.allocation import Allocated, AttentionResult, allocated
from genstream.streaming.settings import ContextPolicy
from genstream.training.denoiser import set_attention
from genstream.training.model_config import ModelConfig
from genstream.training.rollout import Copies, GradientCache
from genstream.training.self_forcing import Judged, SelfForcingSettings, check_models
from genstream.transformer.attention import AttentionMask, AttentionProcessor
from genstream.transformer.causal_dit import CausalDiT
from genstream.vae.wrapping import module_of

_FLOAT = 4
_HALF = 2
_TRAINED_COPIES = 5
"""Weights, gradients, the two moments of AdamW, and the average."""
_GATHERED_BLOCKS = 2
"""The one that is computed, and the next."""
_LOWERED = (nn.Linear, nn.Conv3d)
"""Layers of a transformer that autocast computes in bfloat16, with a copy of their weights."""


@dataclass(frozen=True, kw_only=True)
class DistillationMemory:
    """Bytes on each GPU, and on the host.

    What is kept is in float32 whatever the precision is; with "bf16" autocast computes passes in bfloat16.

    Attributes:
        trained_bytes: of student and critic with all that belongs to them.
        frozen_bytes: of the teacher and the text encoders; one that both models have counts once.
        gathered_bytes: of blocks that are whole while they are computed.
        cache_bytes: of the stream's keys and values.
        student_bytes: besides, while the student learns: its chunks with gradient, teacher and critic; with
            "bf16" also the copies that autocast keeps of the weights of student and critic.
        critic_bytes: besides, while the critic learns; likewise with copies of its own.
        host_bytes: of each process on its host, where all models are whole before they are cut into shards.
    """

    trained_bytes: int
    frozen_bytes: int
    gathered_bytes: int
    cache_bytes: int
    student_bytes: int
    critic_bytes: int
    host_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Most at once on a GPU."""
        kept = self.trained_bytes + self.frozen_bytes + self.gathered_bytes + self.cache_bytes
        return kept + max(self.student_bytes, self.critic_bytes)


def distillation_memory(settings: SelfForcingSettings, processes: int) -> DistillationMemory:
    """Memory of `distill_student` with "dmd" on each of so many GPUs with FSDP.

    Workspaces of libraries and what an allocator loses to gaps are not in it.

    Args:
        settings: of the run; teacher and initial need no weights.
        processes: GPUs; everything is whole on a single one.

    Raises:
        ValueError: a folder is no model, or the settings do not fit them.
    """
    if settings.objective != "dmd":
        raise ValueError(f"objective must be 'dmd' for a dry run, got {settings.objective!r}")
    if processes < 1:
        raise ValueError(f"processes (--processes) must be at least 1, got {processes}")
    judged = check_models(settings)
    teacher, student = judged.teacher, judged.student
    built, taught = student.transformer_of(), teacher.transformer_of()
    readers = (student,) if judged.same_text else (student, teacher)
    encoders = [encoder for model in readers if (encoder := model.text_encoder()) is not None]
    trained = _TRAINED_COPIES * (_count(built) + _count(taught))  # the critic is as large as its teacher
    frozen = _count(taught) + sum(map(_count, encoders))
    largest = max(_count(block) for block in (*built.blocks, *taught.blocks))
    vaes = [module_of(model.vae()) for model in (student, teacher)]
    passes = _Passes(settings, judged)
    chunk, critic = passes.chunk(), passes.critic()
    graphs = passes.horizon_chunks * chunk.held_bytes + passes.copied_bytes
    lowered = passes.lowered_bytes(built) + passes.lowered_bytes(taught)
    return DistillationMemory(
        trained_bytes=_FLOAT * trained // processes,
        frozen_bytes=_FLOAT * frozen // processes,
        gathered_bytes=0 if processes == 1 else _FLOAT * _GATHERED_BLOCKS * largest,
        cache_bytes=passes.cache_bytes,
        # Both learn in one step: the graphs of the student's chunks wait while the critic is computed.
        student_bytes=graphs + max(critic.peak_bytes, chunk.peak_bytes - chunk.held_bytes) + lowered,
        critic_bytes=critic.peak_bytes + passes.lowered_bytes(taught),
        host_bytes=_FLOAT * (_count(built) + _count(taught) + frozen + sum(map(_count, vaes))),
    )


class _FusedAttention(AttentionProcessor):
    """Attention as the kernels of GPUs compute it: without a matrix of scores."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(
        self,
        attention: nn.Module,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: AttentionMask | None = None,
    ) -> Tensor:
        """Attend on `[B, L, N, D]`."""
        del attention, mask
        given = (x.to(self.dtype) for x in (query, keys, values))
        result: Tensor = AttentionResult.apply(*given)  # type: ignore[no-untyped-call]
        return result.flatten(2)


def _lower(transformer: nn.Module) -> None:
    """Let it compute as with autocast on a GPU, which takes no tensors without data.

    Its weights in bfloat16 stand for the copies that autocast makes of them, which all passes share.
    """
    for part in transformer.modules():
        if isinstance(part, _LOWERED):
            part.to(torch.bfloat16).register_forward_pre_hook(partial(_given_in, torch.bfloat16))
        elif isinstance(part, nn.RMSNorm):
            part.register_forward_pre_hook(partial(_given_in, torch.float32))


def _given_in(dtype: torch.dtype, _: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
    return (given[0].to(dtype),)


class _Passes:
    """The passes of a step through models of one and of two blocks; the others take as much as the second."""

    def __init__(self, settings: SelfForcingSettings, judged: Judged) -> None:
        self.settings, self.student, self.teacher = settings, judged.student, judged.teacher
        student = judged.student
        self.chunk_frames = student.chunk_frames
        self.horizon_chunks = judged.horizon_chunks
        # A streaming teacher sees every chunk of a piece in a pass of its own.
        self.judging_passes = 1 if judged.context is None else judged.horizon_chunks
        ratio = student.vae().spec.spatial_ratio
        height, width = student.size_px
        self.size = (height // ratio, width // ratio)
        self.shares_copies = student.settings.context is ContextPolicy.CLEAN
        self.layout = student.settings.layout(settings.stream_chunks * self.chunk_frames)
        self.lowers = settings.precision == "bf16"

    def lowered_bytes(self, transformer: CausalDiT) -> int:
        """Of the copies that autocast makes of weights that learn: whole, also where those are in shards.

        Without checkpointing the graphs keep them; with it they are gone before the gradient, but count.
        """
        layers = [part for part in transformer.modules() if isinstance(part, _LOWERED)]
        return _HALF * sum(map(_count, layers)) if self.lowers else 0

    @property
    def cache_bytes(self) -> int:
        """Of all blocks."""
        layers: int = self.student.transformer["num_layers"]
        return layers * self._cache(self.student.transformer_of(1)).nbytes

    @property
    def copied_bytes(self) -> int:
        """Of all past frames that the chunks with gradient see, and of the sinks in each place of theirs.

        0 where each pass makes its own.
        """
        if not self.shares_copies:
            return 0
        layout, chunks = self.layout, self.horizon_chunks
        seen_frames = layout.capacity_frames + (chunks - 2) * layout.chunk_frames
        seen_frames += (chunks - 1) * layout.sink_frames
        layers: int = self.student.transformer["num_layers"]
        cache = self._cache(self.student.transformer_of(1))
        frame_bytes = (cache.keys[0].nbytes + cache.values[0].nbytes) // layout.capacity_frames
        return layers * seen_frames * frame_bytes

    def chunk(self) -> Allocated:
        """The pass of a chunk with gradient, in full context, and its gradient; copies of the past apart."""
        return self._of_all_layers(self._chunk, self.student)

    def critic(self) -> Allocated:
        """What critic or teacher make of a whole piece, and its gradient."""
        one = self._of_all_layers(self._piece, self.teacher)
        waiting = (self.judging_passes - 1) * one.held_bytes
        return Allocated(one.peak_bytes + waiting, one.held_bytes + waiting)

    def _chunk(self, transformer: CausalDiT) -> Allocated:
        cache = self._cache(self.student.transformer_of(len(transformer.blocks)))  # in float32
        x, frames = self._latents(transformer, self.chunk_frames), self.chunk_frames
        start = 2 * self.chunk_frames * cache.layout.capacity_frames

        copies: Copies = {}

        def velocity() -> Tensor:
            context = GradientCache(cache, copies if self.shares_copies else {})
            context.begin(start, frames)
            return self._velocity(transformer, x, range(start, start + frames), context)

        with torch.no_grad():
            velocity()  # copies the past, which the passes of all chunks share
        return self._with_gradient(velocity, transformer, [x, *cache.tensors().values()])

    def _piece(self, transformer: CausalDiT) -> Allocated:
        frames = self.horizon_chunks * self.chunk_frames
        x = self._latents(transformer, frames)
        return self._with_gradient(
            partial(self._velocity, transformer, x, range(frames), None), transformer, [x]
        )

    def _velocity(
        self, transformer: CausalDiT, x: Tensor, positions: range, context: GradientCache | None
    ) -> Tensor:
        times = x.new_zeros(len(x), x.shape[2])
        text = x.new_zeros(len(x), self.student.text_tokens, transformer.config.text_dim)
        velocity: Tensor = transformer(
            x, times, text, frame_positions=positions, kv_cache=context, return_dict=False
        )[0]
        return velocity

    def _with_gradient(
        self, velocity: Callable[[], Tensor], transformer: CausalDiT, others: Iterable[Tensor]
    ) -> Allocated:
        given = [*transformer.parameters(), *transformer.buffers(), *others]
        held = allocated(velocity, given, gradient=True).held_bytes
        gradients = [torch.empty_like(weight) for weight in transformer.parameters()]
        for weight, gradient in zip(transformer.parameters(), gradients, strict=True):
            weight.grad = gradient
        taken = allocated(lambda: velocity().sum().backward(), [*given, *gradients], gradient=True)
        return Allocated(max(taken.peak_bytes, held), held)

    def _of_all_layers(self, measure: Callable[[CausalDiT], Allocated], model: ModelConfig) -> Allocated:
        one, two = (measure(self._build(model, layers)) for layers in (1, 2))
        others = model.transformer["num_layers"] - 1
        return Allocated(
            one.peak_bytes + others * (two.peak_bytes - one.peak_bytes),
            one.held_bytes + others * (two.held_bytes - one.held_bytes),
        )

    def _build(self, model: ModelConfig, layers: int) -> CausalDiT:
        transformer: CausalDiT = model.transformer_of(layers).train()
        set_attention(transformer, _FusedAttention(torch.bfloat16 if self.lowers else torch.float32))
        if self.lowers:
            _lower(transformer)
        if self.settings.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        return transformer

    def _cache(self, transformer: CausalDiT) -> KVCache:
        return transformer.kv_cache(self.layout, self.settings.batch_size, *self.size)

    def _latents(self, transformer: CausalDiT, frames: int) -> Tensor:
        shape = (self.settings.batch_size, transformer.config.in_channels, frames, *self.size)
        return torch.empty(shape, device="meta")


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
