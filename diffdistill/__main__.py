"""``python -m diffdistill`` is the command line."""

from diffdistill.cli import main

if __name__ == "__main__":
    main()
