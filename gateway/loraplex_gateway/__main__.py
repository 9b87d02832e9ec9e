"""`python -m loraplex_gateway` is the command `loraplex-gateway`."""

from loraplex_gateway.cli import main

main()
