"""`python -m softcache`: the commands."""

from softcache.stages.main import main

if __name__ == "__main__":
    main()
