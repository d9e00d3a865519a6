"""`softcache losses`: list every loss with its parameters, their defaults, and what it reads.

The list is a file, written from the losses by `docs/make_loss_list.py`: importing them takes 3 s, since they import
PyTorch.
"""

import json
from importlib.resources import files

from softcache.stages.cli.configs import ListConfig
from softcache.stages.cli.console import Console


def run(config: ListConfig) -> None:
    """Print each loss: its first line of documentation, its parameters, and what it reads."""
    console = Console(config.json)
    descriptions = json.loads(files(__package__).joinpath("losses.json").read_text(encoding="utf-8"))
    if config.json:
        return console.print_json(json.dumps(descriptions))
    for name, description in descriptions.items():
        console.print(f"{name}: {description['what']}")
        console.print("    " + ", ".join(f"{parameter}={value}" for parameter, value in description["knobs"].items()))
        console.print(f"    reads {', '.join(description['reads'])}")
