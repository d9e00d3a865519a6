"""Published recipes for students, which `--recipe NAME` fills in, and `softcache recipes`, which lists them.

An option that is typed on the command line takes precedence over the recipe.
"""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from softcache.base.errors import UsageError, unknown_name_error
from softcache.stages.cli.configs import ListConfig, StudentConfig
from softcache.stages.cli.console import Console


@dataclass(frozen=True)
class Recipe:
    """How a paper trains a student.

    Attributes:
        source: the paper, and the section.
        settings: {option of a student: value}.
        cache: options of teacher-cache that are part of the recipe.
        note: what the paper leaves open, or does differently.
    """

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
_VIEWS = "--views crop-flip --draws 240"
_SMALL_NETWORKS = "for mobilenet_v2 and the shufflenets --learning-rate 0.01"

RECIPES: dict[str, Recipe] = {
    "cifar100-kd": Recipe(
        source="Tian et al. 2020 (arXiv 1910.10699, appendix): the training of the CIFAR-100 benchmark, with plain KD",
        settings={**_BENCHMARK, "loss": ("hard:weight=0.1", "kd:temperature=4,weight=0.9")},
        cache=_VIEWS,
        note=f"{_SMALL_NETWORKS}; other losses of that table are hard and the loss at its default weight: for CRD"
        " --loss hard --loss crd:teacher=LAYER,student=LAYER",
    ),
    "hinton-mnist": Recipe(
        source="Hinton, Vinyals and Dean 2015 (arXiv 1503.02531, section 3)",
        settings={
            "arch": "mlp:800,800",
            "loss": ("hard:weight=0.1", "kd:temperature=20,weight=0.9"),
            "epochs": 20,
            "batch_size": 128,
            "learning_rate": 0.05,
        },
        cache="--teacher mlp:1200,1200 --views none --draws 1",
        note="the paper gives no epochs, batch size or learning rate, and of the hard targets' weight only that it is"
        " considerably lower: these are softcache's. Its teacher has dropout, constrained weights and jittered images",
    ),
    "dkd": Recipe(
        source="Zhao et al. 2022 (arXiv 2203.08679, section 4): the benchmark's training, target 1, nontarget 8",
        settings={**_BENCHMARK, "loss": ("hard", "dkd:temperature=4,target=1,nontarget=8,weight=0->1@20")},
        cache=_VIEWS,
        note="nontarget is 6 for vgg13 and for wrn_40_2 with a student of its kind, 2 for resnet56 and 110;"
        f" {_SMALL_NETWORKS}",
    ),
    "ls-kd": Recipe(
        source="Sun et al. 2024 (arXiv 2403.01427, section 5): z-scored logits",
        settings={**_BENCHMARK, "loss": ("hard:weight=0.1", "kd:standardize=true,temperature=2,weight=9")},
        cache=_VIEWS,
        note=_SMALL_NETWORKS,
    ),
    "f1": Recipe(
        source="not from a paper: lambda KL + (1 - lambda) (1 - F1), lambda 0.5, with the teacher's class prior"
        " removed",
        settings={"map": "prior", "loss": ("kd:temperature=4,weight=0.5", "soft_f1:weight=0.5")},
        cache="--imbalance 100 --head-size 1000, or images that are imbalanced already",
        note="the prior is that of the training rows; --map prior:tau=0 keeps it",
    ),
    "patient": Recipe(
        source="Beyer et al. 2022 (arXiv 2106.05237, section 3): the same mixed views for both, and a long training",
        settings={
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
        cache="--views resized-crop-flip:min_scale=0.05,mixup=1 --draws 300",
        note="the paper draws a new view in every epoch, and searches learning rate, weight decay and temperature for"
        " each data set; its weight decay of 1e-4 is not multiplied by the learning rate, that of AdamW is",
    ),
}


# Names of earlier versions that are not taken any more, and why.
_RENAMED = {
    "crd": "the training of the CRD paper's benchmark with plain KD, without the CRD loss, is --recipe cifar100-kd;"
    " for the CRD loss give its layers too: --recipe cifar100-kd --loss hard --loss crd:teacher=LAYER,student=LAYER",
}


def apply_recipe(config: StudentConfig, explicit: set[str]) -> StudentConfig:
    """Fill in the options of the recipe that `config.recipe` names, except those that were typed.

    Args:
        config: the options of a student.
        explicit: the names of the options that were typed on the command line.

    Raises:
        UsageError: when there is no recipe of that name, or it has another name now.
    """
    if not config.recipe:
        return config
    if config.recipe in _RENAMED:
        raise UsageError(f"no recipe '{config.recipe}': {_RENAMED[config.recipe]}")
    if config.recipe not in RECIPES:
        raise unknown_name_error("recipe", config.recipe, RECIPES)
    settings = RECIPES[config.recipe].settings
    return replace(config, **{name: value for name, value in settings.items() if name not in explicit})


def run(config: ListConfig) -> None:
    """Print each recipe: its source, its losses and options, and notes."""
    console = Console(config.json)
    if config.json:
        return console.print_json(json.dumps({name: asdict(recipe) for name, recipe in RECIPES.items()}))
    for name, recipe in RECIPES.items():
        options = [(option, value) for option, value in recipe.settings.items() if option != "loss"]
        console.print(f"{name}: {recipe.source}")
        console.print("    " + " ".join(f"--loss {spec}" for spec in recipe.settings["loss"]))
        console.print("    " + ", ".join(f"{option.replace('_', ' ')} {value}" for option, value in options))
        if recipe.cache:
            console.print(f"    cache: {recipe.cache}")
        if recipe.note:
            console.print(f"    note: {recipe.note}")
