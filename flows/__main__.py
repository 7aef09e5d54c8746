"""`python -m flows` is `llamatuner`."""

from flows.cli import main

if __name__ == "__main__":
    main()
