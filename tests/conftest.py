"""For every lane."""

import os

#: Tests say themselves which files of ``fusedmoe tune`` the planner reads: not those of whoever runs them.
os.environ.setdefault("FUSEDMOE_TUNED", "none")
