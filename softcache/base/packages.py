"""Optional packages: whether they are installed, and the extra of softcache that installs them."""

from importlib.util import find_spec

from .errors import UsageError


def require_package(task: str, extra: str, package: str) -> None:
    """Check that an optional package is installed.

    Args:
        task: What needs it, the beginning of the message, such as "--data parquet:a.parquet needs".
        extra: Name of the extra in pyproject.toml.
        package: Name of the module.

    Raises:
        UsageError: It is not installed; the message has the command that installs it.
    """
    if find_spec(package) is None:
        raise UsageError(f"{task} {package}, which is not installed: pip install -e '.[{extra}]'")
