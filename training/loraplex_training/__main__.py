"""`python -m loraplex_training`: the console script without its name."""

from loraplex_training.cli import main

if __name__ == "__main__":
    main()
