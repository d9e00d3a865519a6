"""Run the commands: `python -m softcache`, and the program `softcache`."""

import signal
import sys


def main() -> None:
    """Run the command of this process. Ctrl-C ends it with code 130, also while the commands are being imported."""
    try:
        from softcache.stages.main import main as run_command

        run_command()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # only Python's own shutdown is left, which is not to be stopped


if __name__ == "__main__":
    main()
