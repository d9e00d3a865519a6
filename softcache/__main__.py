"""Run the commands: `python -m softcache`."""

from softcache.stages.main import main

if __name__ == "__main__":
    main()
