"""Optional parts: the extras of the package, and one line for those that are missing."""

from importlib.util import find_spec

from softcache.base.errors import UsageError

_NAMES = {"tensorboard": "TensorBoard"}  # as people know them, where that is not the module's name


def require_extra(wanting: str, extra: str, *libraries: str) -> None:
    """Raise UsageError, with what to do, when a library of an extra is missing. wanting: `export needs`."""
    if missing := [_NAMES.get(name, name) for name in libraries if find_spec(name) is None]:
        names = " and ".join(missing)
        raise UsageError(f"{wanting} {names}, which is not installed: pip install 'softcache[{extra}]'")
