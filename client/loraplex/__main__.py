"""`python -m loraplex` is the command `loraplex`."""

from loraplex.cli import main

main()
