"""`python -m prefixkit`."""

from prefixkit.cli import main

if __name__ == "__main__":
    main()
