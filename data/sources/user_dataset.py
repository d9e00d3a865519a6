"""`--data my_package.module:factory`: a map-style dataset, or one of each split, that code of the user makes."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from softcache.base.errors import UsageError
from softcache.base.user_code import locate_definition, user_code
from softcache.base.user_modules import import_attribute, is_importable_name, keep_global_state, name_type
from softcache.data.images.dataset_items import MapDataset


def is_dataset_spec(data: str) -> bool:
    """Return whether a text has the form `my_package.module:factory`."""
    module, _, factory = data.partition(":")
    return is_importable_name(module) and is_importable_name(factory)


def make_user_dataset(data: str, root: Path) -> MapDataset | Mapping[str, MapDataset]:
    """Import a module of the user, and return the dataset that a factory in it makes.

    Args:
        data: `my_package.module:factory`, a function or a class. It is called with `root=…` where it has a parameter
            of that name, else without arguments. It may also be a dataset, or a mapping of datasets, itself.
        root: Folder of data sets, the option --data-root.

    Returns:
        A map-style dataset, or {"train": …, "val": …, "test": …}, as `load_dataset` takes them.

    Raises:
        UsageError: The module cannot be imported, has no such name, the factory fails or needs other arguments.
    """
    module, _, name = data.partition(":")
    with keep_global_state():
        _, factory = import_attribute("data", module, name)
        if not callable(factory) or isinstance(factory, Mapping) or _is_dataset(factory):
            return _check_dataset(data, factory)
        arguments = _choose_arguments(data, factory, root)
        with user_code(f"the factory of --data '{data}' failed", locate_definition(factory)):
            dataset = factory(**arguments)
    return _check_dataset(data, dataset)


def _is_dataset(value: Any) -> bool:
    """Return whether a value is an instance of a dataset; a class that makes datasets is none."""
    return not isinstance(value, type) and hasattr(value, "__getitem__") and hasattr(value, "__len__")


def _choose_arguments(data: str, factory: Any, root: Path) -> dict[str, str]:
    """Return the keyword arguments of a factory, by its signature."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # some built-in functions have no signature
        return {}
    missing = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and (parameter.name != "root" or parameter.kind is parameter.POSITIONAL_ONLY)
    ]
    if missing:
        raise UsageError(
            f"--data '{data}' needs the arguments {', '.join(missing)}: it is called without any, or with root=…, the"
            " folder --data-root, where it takes that. Write a function that calls it with the others"
        )
    return {"root": str(root)} if any(parameter.name == "root" for parameter in parameters) else {}


def _check_dataset(data: str, dataset: Any) -> MapDataset | Mapping[str, MapDataset]:
    """Return what may be a dataset or a mapping of datasets; `load_dataset` checks it and its items further."""
    if isinstance(dataset, (str, bytes)) or not hasattr(dataset, "__len__"):
        raise UsageError(
            f"--data '{data}' is {name_type(dataset)}: expected a map-style dataset, with __len__ and __getitem__, or"
            " a mapping of datasets with the keys train, val and test"
        )
    return cast(MapDataset | Mapping[str, MapDataset], dataset)
