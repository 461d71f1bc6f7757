"""``python -m vmsnap``."""

from vmsnap.cli.main import main

if __name__ == "__main__":
    main()
