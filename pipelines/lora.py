"""LoRA adapters on a pipeline's transformer, in the manner of diffusers' pipelines."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from diffusers.loaders.lora_base import LoraBaseMixin, _fetch_state_dict
from diffusers.utils import is_peft_available
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # its client's, whichever it is
from safetensors import SafetensorError
from torch import Tensor

from genstream.io.model_folder import read_json
from genstream.transformer.adapters import loaded_loras, peft_adapter
from genstream.transformer.causal_dit import CausalDiT

_ADAPTER_NAME = re.compile(r"\w[\w-]*")
_PEFT_CONFIG = "adapter_config.json"
_USER_AGENT = {"file_type": "attn_procs_weights", "framework": "pytorch"}


class LoraLoaderMixin(LoraBaseMixin):
    """Loads LoRAs for the transformer; diffusers' `set_adapters` and its like work on them.

    A stream takes over what is in use when it is requested; `LoraControl` changes it for that stream alone.
    """

    _lora_loadable_modules: ClassVar[list[str]] = ["transformer"]
    transformer_name = "transformer"
    transformer: CausalDiT
    _lora_sources: Mapping[str, str] = MappingProxyType({})
    """File, folder or repository of each LoRA, by its name; none for one that was given as tensors."""

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool | None = None,
    ) -> None:
        """Load a LoRA and put it in use, instead of those that are.

        Its names may be those of diffusers, of PEFT or of the original Wan code, as LongLive publishes it.

        Args:
            pretrained_model_name_or_path_or_dict: a .safetensors file, a folder or a repository that holds
                one, or its tensors. Pickles are not read: `genstream convert` turns them into a folder.
            adapter_name: for `set_adapters` and `LoraControl`; "default_0" and so on when None.
            weight_name: of the file in the folder or repository, where it holds several.
            subfolder: of the repository.
            revision: of the repository.
            token: for the Hugging Face Hub.
            local_files_only: look nothing up on the Hub.

        Raises:
            ImportError: peft is not installed.
            FileNotFoundError: there is no such file or folder, and no repository could be read.
            ValueError: the LoRA is for other layers, or the name is taken, or the file is cut off; nothing is
                changed.
        """
        if not is_peft_available():
            raise ImportError("load_lora_weights needs peft: pip install 'genstream[lora]'")
        self._check_name(adapter_name)
        source = _source(pretrained_model_name_or_path_or_dict)
        try:
            tensors, metadata = _fetch_state_dict(
                source,
                weight_name=weight_name,
                use_safetensors=True,
                local_files_only=local_files_only,
                cache_dir=None,
                force_download=False,
                proxies=None,
                token=token,
                revision=revision,
                subfolder=subfolder,
                user_agent=_USER_AGENT,
                allow_pickle=False,
            )
        except SafetensorError as error:
            raise ValueError(f"LoRA {source!r} must be a whole .safetensors file: {error}") from error
        except (OSError, HTTPError) as error:
            if isinstance(source, dict) or Path(source).exists():
                raise
            raise FileNotFoundError(
                f"LoRA {source!r} is no file or folder here, nor a repository that the Hub gives: {error}"
            ) from error
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"LoRA must be finite, got NaN or infinity in {name!r}")
        trained = metadata or _peft_config(pretrained_model_name_or_path_or_dict)
        trained = {name.removeprefix(f"{self.transformer_name}."): value for name, value in trained.items()}
        adapter, config = peft_adapter(tensors, self.transformer, trained)
        before = set(loaded_loras(self.transformer))
        with warnings.catch_warnings():
            # Several at once are what adapters are for.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            self.transformer.load_lora_adapter(
                adapter, prefix=None, adapter_name=adapter_name, metadata=config, _pipeline=self
            )
        if isinstance(source, str):
            added = set(loaded_loras(self.transformer)) - before
            self._lora_sources = {**self._lora_sources, **dict.fromkeys(added, source)}

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Add the LoRAs in use to the weights, until `unfuse_lora`, as in diffusers' pipelines.

        Args:
            components: that have LoRAs; the transformer when None.
            lora_scale: factor on what they add.
            safe_fusing: refuse what would make weights that are not finite.
            adapter_names: those to fuse; all in use when None.
            **kwargs: those of diffusers.
        """
        super().fuse_lora(
            list(components or self._lora_loadable_modules), lora_scale, safe_fusing, adapter_names, **kwargs
        )

    def unfuse_lora(self, components: Sequence[str] | None = None, **kwargs: Any) -> None:  # noqa: ANN401
        """Take the LoRAs out of the weights again.

        Args:
            components: that have LoRAs; the transformer when None.
            **kwargs: those of diffusers.
        """
        super().unfuse_lora(list(components or self._lora_loadable_modules), **kwargs)

    def _has_fused(self, folder: Path) -> bool:
        """Whether a LoRA that lies in `folder` is fused."""
        sources = [self._lora_sources[name] for name in self.fused_loras if name in self._lora_sources]
        return any(_lies_in(Path(source), folder) for source in sources)

    def _check_name(self, name: str | None) -> None:
        if name is None:
            return
        if not _ADAPTER_NAME.fullmatch(name):
            raise ValueError(f"adapter_name must be letters, digits, - and _, got {name!r}")
        if name in getattr(self.transformer, "peft_config", {}):
            raise ValueError(f"adapter_name must be a new one, got {name!r}, which is loaded")


def _lies_in(path: Path, folder: Path) -> bool:
    return path.exists() and path.resolve().is_relative_to(folder.resolve())


def _source(source: str | Path | Mapping[str, Tensor]) -> str | dict[str, Tensor]:
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    if path.suffix == ".safetensors" and not path.is_file():
        raise FileNotFoundError(f"LoRA {str(path)!r} does not exist")
    if path.is_file() and path.suffix != ".safetensors":
        raise ValueError(f"LoRA must be a .safetensors file (genstream convert makes one), got {str(path)!r}")
    return str(source)


def _peft_config(source: str | Path | Mapping[str, Tensor]) -> dict[str, Any]:
    """What PEFT writes beside an adapter, as far as it is a local one."""
    if isinstance(source, Mapping):
        return {}
    path = Path(source)
    beside = (path if path.is_dir() else path.parent) / _PEFT_CONFIG
    return dict(read_json(beside)) if beside.is_file() else {}
