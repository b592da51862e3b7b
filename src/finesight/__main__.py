"""`python -m finesight` is the command `finesight`."""

from finesight.cli import main

if __name__ == "__main__":
    main()
