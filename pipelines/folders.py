"""A pipeline's folder: loaded with clear errors, saved and uploaded with card, licence and adapter."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from huggingface_hub import create_repo, upload_folder

from genstream.io.hub_card import ADAPTER_FOLDER, CARD_NAME, copy_companions
from genstream.io.model_folder import (
    INDEX_NAME,
    check_model_folder,
    installed_folder,
    installed_models,
    only_variant,
    read_json,
)
from genstream.pipelines.lora import LoraLoaderMixin
from genstream.pipelines.tensors import check_part
from genstream.transformer.adapters import loaded_loras

_UPLOADING = ("repo_id", "commit_message", "private", "token", "create_pr")


class FolderPipeline(DiffusionPipeline, LoraLoaderMixin):
    """What loads and saves a pipeline with a transformer, and the LoRAs on it."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:  # noqa: ANN401
        """Load a model with all its components; options are those of `DiffusionPipeline.from_pretrained`.

        Args:
            pretrained_model_name_or_path: name of an installed model ("toyworld"), a folder in diffusers
                layout, or a repository on the Hugging Face Hub.
            **kwargs: such as `dtype`, float32 for all parts when not given, or a component to use instead of
                the folder's.

        Raises:
            ValueError: a file of the folder is missing or cut off, or a tensor of the transformer is missing,
                superfluous or of another shape than its configuration says, or one of VAE or text encoder
                missing or of another shape; the message names it.
        """
        folder = installed_folder(str(pretrained_model_name_or_path)) or Path(pretrained_model_name_or_path)
        if "torch_dtype" not in kwargs:
            # Else transformers loads the text encoder as its file is, and diffusers the rest in float32.
            kwargs.setdefault("dtype", torch.float32)
        if not folder.is_dir():
            _check_repository(str(pretrained_model_name_or_path))
            loaded: Self = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
            return loaded
        check_model_folder(folder, kwargs, cls.__name__)
        index = read_json(folder / INDEX_NAME)
        kwargs.setdefault("variant", only_variant(folder))
        parts = {name: index.get(name) or (None, None) for name in ("transformer", "text_encoder", "vae")}
        for name, pair in parts.items():
            if len(pair) != 2:
                raise ValueError(
                    f"{str(folder / INDEX_NAME)!r} must say [library, class] of {name}, got {pair}"
                )
        if "vae" not in kwargs and parts["vae"][0] is None:
            raise ValueError(
                f"model folder {str(folder)!r} has no vae: give vae=..., or make a folder that has one with "
                f"genstream convert {folder} --vae PATH -o NEW_FOLDER"
            )
        try:
            for name, (library, part) in parts.items():
                if library and part and name not in kwargs and kwargs["variant"] is None:
                    check_part(folder / name, library, part)
            loaded = super().from_pretrained(folder, **kwargs)
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(
                f"model folder {str(folder)!r} has a configuration that a part cannot be made from: {error!r}"
            ) from error
        return loaded

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:  # noqa: ANN401
        """The parts of another pipeline in a new one; options are those of `DiffusionPipeline.from_pipe`."""
        # diffusers takes over what has exactly the annotated type; any VAE will do here.
        made: Self = super().from_pipe(pipeline, **{"vae": pipeline.vae, **kwargs})
        return made

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # noqa: ANN401
        """Save the pipeline, with card, licence and adapter of the folder that it was loaded from.

        Args:
            save_directory: folder to write to.
            **kwargs: those of `DiffusionPipeline.save_pretrained`.

        Raises:
            ValueError: LoRAs are loaded: the transformer would be saved with their layers in it. Or the
                adapter of the folder is fused and would stay there beside weights that contain it.
        """
        if kwargs.pop("push_to_hub", False):
            upload = {name: kwargs.pop(name) for name in _UPLOADING if name in kwargs}
            self.save_pretrained(save_directory, **kwargs)
            self._upload(Path(save_directory), **{"repo_id": Path(save_directory).name, **upload})
            return
        if loras := loaded_loras(self.transformer):
            raise ValueError(
                f"LoRAs {loras} are loaded, and a model folder holds none: call unload_lora_weights() first, "
                "and fuse_lora() before that to keep what they do"
            )
        source = self._loaded_from
        if source is None:
            super().save_pretrained(save_directory, **kwargs)
            return
        fused = self._has_fused(source / ADAPTER_FOLDER)
        if fused and source.resolve() == Path(save_directory).resolve():
            raise ValueError(
                f"save_directory must be another folder: {str(source / ADAPTER_FOLDER)!r} is fused, and "
                "would stay there beside weights that contain it"
            )
        changes = self._changes_since(source)
        super().save_pretrained(save_directory, **kwargs)
        copy_companions(source, Path(save_directory), changes, with_adapter=not fused)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> str:
        """Upload the pipeline; the card, which tells licence and origin of the weights, goes with it.

        Args:
            repo_id: name of the repository, owner/name; made where it does not exist.
            commit_message: of the upload.
            private: make the repository private; by the owner's default when None.
            token: for the Hub; the stored one when None.
            create_pr: upload as a pull request.
            **kwargs: those of `DiffusionPipeline.save_pretrained`.
        """
        if self._loaded_from is None or not (self._loaded_from / CARD_NAME).is_file():
            url: str = super().push_to_hub(repo_id, commit_message, private, token, create_pr, **kwargs)
            return url
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            return self._upload(Path(folder), repo_id, commit_message, private, token, create_pr=create_pr)

    def _upload(
        self,
        folder: Path,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        *,
        create_pr: bool = False,
    ) -> str:
        """Upload a folder as it is; gives its address."""
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        return str(
            upload_folder(
                repo_id=repo_id,
                folder_path=str(folder),
                commit_message=commit_message or f"Upload {type(self).__name__}",
                token=token,
                create_pr=create_pr,
            )
        )

    @property
    def _loaded_from(self) -> Path | None:
        """Folder that the pipeline was loaded from; None for one that was built, or came from the Hub."""
        name = self.name_or_path
        return Path(name) if name is not None and Path(name).is_dir() else None

    def _changes_since(self, source: Path) -> list[str]:
        """What was done to the pipeline since it was loaded from `source`, a sentence each."""
        configs = [(self.config, read_json(source / INDEX_NAME))]
        described = source / "scheduler" / SCHEDULER_CONFIG_NAME
        if described.is_file():
            configs.append((self.scheduler.config, read_json(described)))
        changes = []
        for ours, before in configs:
            now = json.loads(json.dumps(dict(ours), default=str))
            changes += [
                f"`{name}` is {now[name]!r}, it was {before[name]!r}"
                for name in sorted(now.keys() & before.keys())
                if not name.startswith("_") and now[name] != before[name]
            ]
        if self.fused_loras:
            changes.append(f"LoRAs fused into the transformer: {', '.join(sorted(self.fused_loras))}")
        return changes


def _check_repository(name: str) -> None:
    """Only a name like owner/name can be a repository; anything else would only be searched in vain."""
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise ValueError(
            f"pretrained_model_name_or_path must be an installed model ({', '.join(installed_models())}), "
            f"a folder or a repository owner/name, got {name!r}"
        )
