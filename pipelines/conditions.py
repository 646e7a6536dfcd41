"""What a caller gives to condition a video, checked and as the tensors that a stream takes."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, CLIPVisionModel, PreTrainedTokenizerBase, UMT5EncoderModel

from genstream.conditioning.image import as_pixels, check_pixels, image_tokens
from genstream.conditioning.text import check_prompts, encode_prompts
from genstream.shapes import check_count, check_exclusive, check_same_size, frames_of, latent_frames_covering
from genstream.streaming.intake import encode_start
from genstream.streaming.settings import StreamSettings
from genstream.transformer.causal_dit import CausalDiT
from genstream.vae.protocol import StreamingVAE
from genstream.vae.wrapping import module_of

_STEADY_LATENT_FRAMES = 32
"""Wan's encoder reaches back 28 latent frames: behind an image and so many empty ones nothing changes."""


class ConditionsMixin:
    """Prompts, images and latents, for a pipeline with the parts named here."""

    config: FrozenDict
    tokenizer: PreTrainedTokenizerBase | None
    text_encoder: UMT5EncoderModel | None
    transformer: CausalDiT
    vae: ModelMixin
    image_processor: BaseImageProcessor | None
    image_encoder: CLIPVisionModel | None

    @property
    @abstractmethod
    def streaming_vae(self) -> StreamingVAE:
        """The VAE as it streams."""

    def encode_prompt(self, prompt: str | list[str]) -> Tensor:
        """Prompt embeddings `[B, text_tokens, text_dim]`.

        Raises:
            ValueError: a prompt is empty or longer than `text_tokens`, or there is no text encoder.
        """
        if self.tokenizer is None or self.text_encoder is None:
            raise ValueError(
                "prompt needs a text encoder, which this pipeline was loaded without; give prompt_embeds, or "
                "make a folder that has one with genstream convert FOLDER --text-encoder PATH -o NEW_FOLDER"
            )
        prompts = [prompt] if isinstance(prompt, str) else prompt
        check_prompts(prompts, self.tokenizer, self.config.text_tokens)
        return self._encode(prompts)

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Tensor:
        embeds = encode_prompts(prompts, self.tokenizer, self.text_encoder, self.config.text_tokens)
        self._offload_encoders()
        return embeds

    def _offload_encoders(self) -> None:
        """With `enable_model_cpu_offload`, take them off the GPU: prompts change seldom."""
        for hook in getattr(self, "_all_hooks", ()):  # set by diffusers when offloading is enabled
            hook.offload()

    def encode_image(self, image: Image.Image | Tensor, height: int, width: int, batch_size: int) -> Tensor:
        """An image as the first latent frame `[B, C, 1, h, w]`.

        Raises:
            ValueError: the image has another size than the video.
        """
        pixels = self._image_pixels(image, height, width, batch_size)
        module: Any = module_of(self.vae)  # of diffusers, whose `device` is right for offloaded ones too
        frames = pixels.unsqueeze(2).to(module.device, module.dtype)  # [B, 3, 1, H, W]
        latent: Tensor = self.streaming_vae.encode(frames)
        return latent.expand(batch_size, -1, -1, -1, -1)

    def _prompts(
        self, prompt: str | list[str] | None, prompt_embeds: Tensor | None, repeats: int = 1
    ) -> tuple[list[str], Tensor]:
        """Prompts and their embeddings, each `repeats` times."""
        check_count("num_videos_per_prompt", repeats)
        if prompt is None and prompt_embeds is None:
            raise ValueError("prompt or prompt_embeds must be given")
        prompts = [prompt] if isinstance(prompt, str) else prompt or []
        if not isinstance(prompts, list | tuple) or not all(isinstance(text, str) for text in prompts):
            raise ValueError(f"prompt must be a text or a list of texts, got {prompt!r}")
        if prompt_embeds is None:
            if not prompts:
                raise ValueError("prompt must name at least one prompt, got an empty list")
            prompt_embeds = self.encode_prompt(prompts)
        elif prompts and len(prompts) != len(prompt_embeds):
            raise ValueError(
                f"prompt_embeds must have one row for each prompt: {len(prompts)}, got {len(prompt_embeds)}"
            )
        self._check_embeds("prompt_embeds", prompt_embeds)
        repeated = [text for text in prompts for _ in range(repeats)]
        return repeated, prompt_embeds.repeat_interleave(repeats, dim=0)

    def _check_embeds(self, name: str, embeds: Tensor) -> None:
        _check_tensor(name, embeds)
        tokens, width = self.config.text_tokens, self.transformer.config.text_dim
        if embeds.ndim != 3 or tuple(embeds.shape[1:]) != (tokens, width):
            raise ValueError(f"{name} must be [B, {tokens}, {width}], got {list(embeds.shape)}")
        _check_finite(name, embeds)

    def _negative_embeds(
        self, prompt: str | None, given: Tensor | None, settings: StreamSettings, batch_size: int
    ) -> Tensor | None:
        """What guidance leads away from, `[B, text_tokens, text_dim]`; None without guidance."""
        scale = settings.guidance_scale
        check_exclusive(negative_prompt=prompt, negative_prompt_embeds=given)
        if not isinstance(prompt, str | None):
            raise ValueError(f"negative_prompt must be one text for the whole batch, got {prompt!r}")
        if scale == 1:
            if prompt is not None or given is not None:
                raise ValueError(f"negative_prompt needs a guidance_scale above 1, got {scale}")
            return None
        if given is not None:
            self._check_embeds("negative_prompt_embeds", given)
            if len(given) not in (1, batch_size):
                raise ValueError(
                    f"negative_prompt_embeds must be one or one for each of {batch_size} videos, "
                    f"got {len(given)}"
                )
            return given.expand(batch_size, -1, -1)
        if self.tokenizer is None or self.text_encoder is None:
            raise ValueError(
                "guidance_scale above 1 needs a text encoder or negative_prompt_embeds, "
                f"and this pipeline lacks the one; got {scale} without the other"
            )
        if prompt is not None:
            return self.encode_prompt([prompt] * batch_size)
        return self._encode([""] * batch_size)

    def _check_latents(
        self, latents: Tensor, batch_size: int, height: int, width: int, num_frames: int | None
    ) -> None:
        _check_tensor("initial_latents", latents)
        spec = self.streaming_vae.spec
        size = [batch_size, spec.latent_channels, height // spec.spatial_ratio, width // spec.spatial_ratio]
        shape = list(latents.shape)
        if len(shape) != 5 or [*shape[:2], *shape[3:]] != size:
            batch, channels, rows, columns = size
            raise ValueError(
                f"initial_latents must be [{batch}, {channels}, T, {rows}, {columns}], got {shape}"
            )

        _check_finite("initial_latents", latents)
        given = frames_of(shape[2], spec.temporal_ratio)
        if num_frames is not None and given > num_frames:
            raise ValueError(
                f"initial_latents must not be longer than the video, {num_frames} frames, got {given}"
            )

    def _image_pixels(self, image: Image.Image | Tensor, height: int, width: int, batch_size: int) -> Tensor:
        """`[1 or B, 3, H, W]` in [-1, 1]."""
        if not isinstance(image, Tensor):
            return as_pixels("image", image, height, width)[None]
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"image must be [B, 3, {height}, {width}], got {list(image.shape)}")
        check_same_size("image", (image.shape[2], image.shape[3]), (height, width))
        if len(image) not in (1, batch_size):
            raise ValueError(f"image must be one or one for each of {batch_size} videos, got {len(image)}")
        check_pixels("image", image)
        return image

    @property
    def _takes_images(self) -> bool:
        """Whether the transformer was trained to be told about an image."""
        config = self.transformer.config
        return config.image_dim is not None or config.in_channels > self.transformer.out_channels

    def _image_tokens(self, pixels: Tensor | None, given: Tensor | None, batch_size: int) -> Tensor | None:
        """CLIP tokens `[B, tokens, image_dim]`; None for a transformer that takes none."""
        width = self.transformer.config.image_dim
        if width is None:
            if given is not None:
                raise ValueError("image_embeds must not be given: this model takes no image tokens")
            return None
        if given is None:
            if pixels is None:
                raise ValueError("image or image_embeds must be given: this model starts from an image")
            if self.image_encoder is None or self.image_processor is None:
                raise ValueError(
                    "image_embeds must be given: this model takes CLIP tokens, and the pipeline was loaded"
                    " without image_encoder and image_processor (genstream convert --image-encoder adds them)"
                )
            given = image_tokens(pixels, self.image_processor, self.image_encoder)
            self._offload_encoders()
        _check_tensor("image_embeds", given)
        if given.ndim != 3 or len(given) not in (1, batch_size) or given.shape[2] != width:
            raise ValueError(f"image_embeds must be [{batch_size}, tokens, {width}], got {list(given.shape)}")
        positions = self.transformer.config.pos_embed_seq_len
        if positions is not None and given.shape[1] != positions:
            raise ValueError(
                f"image_embeds must be [{batch_size}, {positions}, {width}], the tokens of a first and a last"
                f" image, got {list(given.shape)}"
            )
        _check_finite("image_embeds", given)
        return given.expand(batch_size, -1, -1)

    def _image_channels(
        self, pixels: Tensor | None, given: Tensor | None, batch_size: int, num_frames: int | None
    ) -> Tensor | None:
        """Channels behind those of the noisy latents; None for a transformer that takes none."""
        count = self.transformer.config.in_channels - self.transformer.out_channels
        if count == 0:
            if given is not None:
                raise ValueError("image_channels must not be given: this model takes no image channels")
            return None
        if given is None:
            if pixels is None:
                raise ValueError("image or image_channels must be given: this model starts from an image")
            given = self._channels_of(pixels, count, num_frames)
        return given.expand(batch_size, -1, -1, -1, -1) if len(given) == 1 else given

    def _check_channels(self, channels: Tensor, batch_size: int, height: int, width: int) -> None:
        _check_tensor("image_channels", channels)
        count = self.transformer.config.in_channels - self.transformer.out_channels
        ratio = self.streaming_vae.spec.spatial_ratio
        size, shape = [batch_size, count, height // ratio, width // ratio], list(channels.shape)
        if len(shape) != 5 or [*shape[:2], *shape[3:]] != size or shape[2] == 0:
            raise ValueError(
                f"image_channels must be [{batch_size}, {count}, T, {size[2]}, {size[3]}], got {shape}"
            )
        _check_finite("image_channels", channels)

    @torch.no_grad()
    def _channels_of(self, pixels: Tensor, count: int, num_frames: int | None) -> Tensor:
        """`[1 or B, r + C, T, h, w]`: which frames are given, then latents of the image and grey behind it.

        Of the r mask channels of a latent frame, one for each of its frames, those of the first latent frame
        are 1 (Wan 2.1, arXiv 2503.20314).
        """
        vae = self.streaming_vae
        spec = vae.spec
        if count != spec.temporal_ratio + spec.latent_channels:
            raise ValueError(
                f"image_channels must be given: this model takes {count} channels for an image, of which its"
                f" VAE makes {spec.temporal_ratio} for the mask and {spec.latent_channels} for the image"
            )
        latent_frames = _STEADY_LATENT_FRAMES
        if num_frames is not None:
            latent_frames = min(latent_frames, latent_frames_covering(num_frames, spec.temporal_ratio))
        module: Any = module_of(self.vae)
        image = pixels.unsqueeze(2).to(module.device, module.dtype)  # [B, 3, 1, H, W]
        state = vae.init_state("encode", len(image), image.shape[3], image.shape[4])
        grey = torch.zeros_like(image).expand(-1, -1, spec.temporal_ratio, -1, -1)
        parts = [encode_start(vae, image, state)]
        parts += [vae.encode_chunk(grey, state) for _ in range(latent_frames - 1)]
        latents = torch.cat([*parts, vae.flush(state)], dim=2)
        mask = torch.zeros_like(latents[:, :1]).repeat(1, spec.temporal_ratio, 1, 1, 1)
        mask[:, :, 0] = 1
        return torch.cat([mask, latents], dim=1)


def _check_tensor(name: str, values: object) -> None:
    if not isinstance(values, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(values).__name__}")


def _check_finite(name: str, values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
