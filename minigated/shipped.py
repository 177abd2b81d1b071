"""The trained models that come with the package: the two files of a checkpoint that a use of it needs."""

import importlib
import json
from pathlib import Path

from torch import nn

from minigated.checkpoint import CONFIG, KINDS, WEIGHTS
from minigated.errors import InputError, one_of
from minigated.weights import fitting_weights

SHIPPED = Path(__file__).parent / "data" / "files"


def load_shipped(name: str = "moe_nano") -> nn.Module:
    """A shipped model with its weights, on the CPU, in evaluation mode.

    Raises:
        InputError: it is not there (the message says how to train one), or it is damaged.
    """
    folder = SHIPPED / name
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise InputError(
                f"no trained {name!r} comes with this copy ({folder / file} is missing); train one with "
                f"`python -m minigated train {name} --variant g1_elementwise --text shakespeare --out runs/{name}` "
                f"and give --model runs/{name}"
            )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind, fields = config["kind"], config["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / CONFIG} is damaged: not the JSON that a checkpoint holds ({error})") from error
    one_of(f"model kind in {folder / CONFIG}:", kind, KINDS)
    module, config_class, model_class = (importlib.import_module(KINDS[kind][0]), *KINDS[kind][1:])
    try:
        built = getattr(module, config_class)(**fields)
    except TypeError as error:
        raise InputError(f"{folder / CONFIG} does not describe a model of kind {kind!r}: {error}") from error
    model = getattr(module, model_class)(built)
    model.load_state_dict(fitting_weights(model, folder / WEIGHTS))
    return model.eval()
