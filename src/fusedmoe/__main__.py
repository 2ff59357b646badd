"""``python -m fusedmoe`` is the command ``fusedmoe``."""

from fusedmoe.cli import main

if __name__ == "__main__":
    main()
