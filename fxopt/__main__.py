"""`python -m fxopt`: the command line."""

from fxopt.cli import main

main()
