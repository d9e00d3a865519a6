"""`python -m softcache`: the commands."""

from softcache.stages.__main__ import main

if __name__ == "__main__":
    main()
