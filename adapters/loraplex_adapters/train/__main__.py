"""`python -m loraplex_adapters.train`: the console script without its name."""

from loraplex_adapters.train.cli import main

if __name__ == "__main__":
    main()
