"""Published recipes for students, as `--recipe NAME` fills them in; whatever the command line says goes before."""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from softcache.base.errors import unknown_name_error
from softcache.stages.cli.configs import ListConfig, StudentConfig
from softcache.stages.cli.console import Console


@dataclass(frozen=True)
class Recipe:
    """source: the paper; settings: of a student; cache: what to say to teacher-cache beside, where that is part of it;
    note: what the paper leaves open or does besides."""

    source: str
    settings: dict[str, Any]
    cache: str = ""
    note: str = ""


_BENCHMARK: dict[str, Any] = {
    "epochs": 240,
    "batch_size": 64,
    "optimizer": "sgd",
    "learning_rate": 0.05,
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 5e-4,
    "schedule": "step",
    "milestones": "0.625,0.75,0.875",
    "warmup": 0.0,
}
_SMALLER = " for mobilenet_v2 and the shufflenets --learning-rate 0.01"
_VIEWS = "--views crop-flip --draws 240"

RECIPES: dict[str, Recipe] = {
    "crd": Recipe(
        "Tian et al. 2020 (arXiv 1910.10699, appendix): the CIFAR-100 benchmark, its plain KD",
        {**_BENCHMARK, "loss": ("hard:weight=0.1", "kd:temperature=4,weight=0.9")},
        _VIEWS,
        "for mobilenet_v2 and the shufflenets --learning-rate 0.01; other losses of that table: hard, and the loss at"
        " its default weight",
    ),
    "hinton-mnist": Recipe(
        "Hinton, Vinyals and Dean 2015 (arXiv 1503.02531, section 3)",
        {
            "arch": "mlp:800,800",
            "loss": ("kd:temperature=20",),
            "epochs": 20,
            "batch_size": 128,
            "learning_rate": 0.05,
        },
        "--teacher mlp:1200,1200 --views none --draws 1",
        "the paper gives no epochs, batch size or learning rate; these are ours",
    ),
    "dkd": Recipe(
        "Zhao et al. 2022 (arXiv 2203.08679, section 4): the benchmark's training, target 1, nontarget 8",
        {**_BENCHMARK, "loss": ("hard", "dkd:temperature=4,target=1,nontarget=8,weight=0->1@20")},
        _VIEWS,
        "nontarget is 6 for vgg13 and for wrn_40_2 with a student of its kind, 2 for resnet56 and 110;" + _SMALLER,
    ),
    "ls-kd": Recipe(
        "Sun et al. 2024 (arXiv 2403.01427, section 5): z-scored logits",
        {**_BENCHMARK, "loss": ("hard:weight=0.1", "kd:standardize=true,temperature=2,weight=9")},
        _VIEWS,
        _SMALLER.strip(),
    ),
    "f1": Recipe(
        "of no paper: lambda KL + (1 - lambda) (1 - F1), lambda 0.5, from a teacher without its prior",
        {"map": "prior", "loss": ("kd:temperature=4,weight=0.5", "soft_f1:weight=0.5")},
        "--imbalance 100 --head-size 1000, or data that are imbalanced as they are",
        "the prior is of the training rows; --map prior:tau=0 leaves it in",
    ),
    "patient": Recipe(
        "Beyer et al. 2022 (arXiv 2106.05237, section 3): the same mixed views for both, and a long training",
        {
            "loss": ("kd:temperature=1",),
            "epochs": 1200,
            "optimizer": "adamw",
            "learning_rate": 1e-3,
            "weight_decay": 0.1,
            "schedule": "cosine",
            "warmup": 0.02,
            "clip_norm": 1.0,
            "batch_size": 512,
        },
        "--views resized-crop-flip:mixup=1 --draws 300",
        "the paper draws a new view in every epoch, and searches rate, decay and temperature for each data set;"
        " its decay of 1e-4 is not multiplied by the learning rate, AdamW's is",
    ),
}


def apply_recipe(config: StudentConfig, said: set[str]) -> StudentConfig:
    """The settings with those of its recipe that were not said. Raises UsageError for a recipe there is none of."""
    if not config.recipe:
        return config
    if config.recipe not in RECIPES:
        raise unknown_name_error("recipe", config.recipe, RECIPES)
    return replace(config, **{k: v for k, v in RECIPES[config.recipe].settings.items() if k not in said})


def run(config: ListConfig) -> None:
    """`softcache recipes`: what there is, and where it is from."""
    console = Console(config.json)
    if config.json:
        return console.print_json(json.dumps({name: asdict(recipe) for name, recipe in RECIPES.items()}))
    for name, recipe in RECIPES.items():
        console.print(f"{name}: {recipe.source}")
        knobs = [(k, v) for k, v in recipe.settings.items() if k != "loss"]
        console.print("    " + " ".join([*(f"--loss {spec}" for spec in recipe.settings["loss"])]))
        console.print("    " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in knobs))
        for what, text in (("cache", recipe.cache), ("note", recipe.note)):
            if text:
                console.print(f"    {what}: {text}")
