import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder in diffusers layout with a card and a few weights; enough for all that loads no model."""
    folder = tmp_path / "tiny"
    (folder / "transformer").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    index = {
        "_class_name": "CausalVideoPipeline",
        "transformer": ["genstream", "CausalDiT"],
        "scheduler": ["genstream", "FewStepScheduler"],
        "image_encoder": [None, None],
        "default_height": 32,
        "default_width": 64,
        "default_fps": 16,
    }
    card = {
        "name": "tiny",
        "description": "four weights",
        "vocabulary": {"colours": ["red", "blue"], "shapes": ["circle"]},
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "model_card.json").write_text(json.dumps(card))
    (folder / "transformer" / "config.json").write_text("{}")
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    save_file({"a": np.zeros((2, 1000), np.float32)}, folder / "transformer" / "model.safetensors")
    return folder
