"""`python -m repbnn_cli`: the command line."""

from repbnn_cli.cli import main

main()
