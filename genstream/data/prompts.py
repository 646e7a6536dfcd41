"""The fixed prompts on which models are scored."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from genstream.data import vocabulary
from genstream.data.captions import COMPLETE_STYLE, describe
from genstream.data.scene import DIRECTION, Scene, place_apart

_PROMPT_SEED: Final = 20_240
_CARDINALS: Final = ("left", "right", "up", "down")


@dataclass(frozen=True, kw_only=True)
class EvaluationPrompt:
    """A caption and the scene it describes; where the objects start and how fast they go is left open."""

    caption: str
    scene: Scene


def evaluation_prompts(count: int = 200) -> list[EvaluationPrompt]:
    """The first `count` of an endless fixed list of prompts; colours and shapes come equally often.

    Every combination may come, held-out ones too (`prompt.scene.held_out`); one in ten has two objects.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    return [_prompt(index) for index in range(count)]


def _prompt(index: int) -> EvaluationPrompt:
    generator = np.random.default_rng((_PROMPT_SEED, index))
    colours, shapes = tuple(vocabulary.COLOURS), tuple(vocabulary.SHAPES)
    first = (colours[index % 8], shapes[index // 8 % 4], _size(generator), _motion(generator))
    looks = [first]
    if index % 10 == 9:
        others = tuple(colour for colour in colours if colour != first[0])
        looks.append(
            (
                str(generator.choice(others)),
                str(generator.choice(shapes)),
                _size(generator),
                _motion(generator),
            )
        )
    scene = Scene(
        objects=place_apart(generator, looks),
        background=str(generator.choice(tuple(vocabulary.BACKGROUNDS))),
        phrasing_seed=index,
    )
    return EvaluationPrompt(caption=describe(scene, generator, COMPLETE_STYLE), scene=scene)


def _size(generator: np.random.Generator) -> str:
    return str(generator.choice(tuple(vocabulary.SIZES)))


def _motion(generator: np.random.Generator) -> str:
    kind = generator.random()
    if kind < 0.6:
        return str(generator.choice(_CARDINALS))
    if kind < 0.8:
        return str(generator.choice([name for name in DIRECTION if name not in _CARDINALS]))
    return str(generator.choice(tuple(vocabulary.OTHER_MOTIONS)))
