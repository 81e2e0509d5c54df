"""`python -m loract` is the `loract` command."""

from loract.cli import main

main()
