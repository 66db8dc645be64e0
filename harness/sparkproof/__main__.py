"""`python -m sparkproof`."""

from sparkproof.cli import main

if __name__ == "__main__":
    main()
