"""diffusers pipelines over the streaming core."""

from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

# diffusers then writes the short name "genstream" into model_index.json and accepts it when loading.
LOADABLE_CLASSES.setdefault(
    "genstream",
    {
        "ModelMixin": ["save_pretrained", "from_pretrained"],
        "SchedulerMixin": ["save_pretrained", "from_pretrained"],
    },
)
