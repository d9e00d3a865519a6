"""Optional dependencies: the extras of the package."""

from importlib.util import find_spec

from softcache.base.errors import UsageError

_NAMES = {"tensorboard": "TensorBoard"}  # proper names that differ from the module's


def require_extra(wanting: str, extra: str, *libraries: str) -> None:
    """Raise UsageError, with the command that installs them, where a library of an extra is missing.

    Args:
        wanting: the beginning of the message, such as "export needs".
        extra: name of the extra in pyproject.toml.
        libraries: names of its modules.
    """
    if missing := [_NAMES.get(name, name) for name in libraries if find_spec(name) is None]:
        names = " and ".join(missing)
        raise UsageError(f"{wanting} {names}, which is not installed: pip install -e '.[{extra}]'")
