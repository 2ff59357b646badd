# Sourced by the other scripts: goes to the repository's root and puts the project's environment first on PATH.
#
# Normally that is .venv, made on first use. With PYTHON=... set, that interpreter is used as it is and nothing is
# installed: for a machine that already has torch, Triton and the tools, perhaps without a network.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -n "${PYTHON:-}" ]]; then
  PYTHON="$(command -v "$PYTHON")" || { echo "PYTHON: no such interpreter" >&2; exit 2; }
  export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
else
  ./scripts/install >&2
  PYTHON="$PWD/.venv/bin/python"
fi
PATH="$(dirname "$PYTHON"):$PATH"
export PATH
