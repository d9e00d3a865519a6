"""Optional packages: whether they are installed, and the extra of softcache that installs them."""

from importlib.util import find_spec

from .errors import UsageError

_NAMES = {"tensorboard": "TensorBoard"}  # proper names that differ from the module's


def require_extra(wanting: str, extra: str, *libraries: str) -> None:
    """Check that the optional packages of a task are installed.

    Args:
        wanting: The beginning of the message, such as "export needs".
        extra: Name of the extra in pyproject.toml.
        libraries: Names of its modules.

    Raises:
        UsageError: One is not installed; the message has the command that installs it.
    """
    if missing := [_NAMES.get(name, name) for name in libraries if find_spec(name) is None]:
        names = " and ".join(missing)
        raise UsageError(f"{wanting} {names}, which is not installed: pip install -e '.[{extra}]'")
