"""python -m relssl, and torchrun -m relssl, are the command relssl."""

from relssl.cli import main

main()
