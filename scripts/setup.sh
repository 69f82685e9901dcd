#!/usr/bin/env bash
# Creates or updates .venv. Does nothing (no pip, no network) if the pinned versions have not changed since the last run.
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/videox-setup-stamp
key=$(cat requirements.txt pyproject.toml scripts/setup.sh | cksum)
in_range='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'

if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ] && .venv/bin/python -c "$in_range" 2>/dev/null; then
  exit 0
fi

# Hides a warning that pip prints once per search folder that it skips.
pip_install() {
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" 2>&1 | sed '/WARNING: Location .* is ignored/d'
}

if ! .venv/bin/python -c "$in_range" 2>/dev/null; then
  python=
  for candidate in python3.11 python3.12 python3.13 python3; do
    if "$candidate" -c "$in_range; import ensurepip, venv" 2>/dev/null; then
      python=$candidate
      break
    fi
  done
  if [ -z "$python" ]; then
    echo "error: setup: no python3.11, 3.12 or 3.13 with venv and pip found on PATH. Fix: install one of them." >&2
    exit 1
  fi
  echo "setup 1/3: creating .venv with $("$python" --version)"
  "$python" -m venv --clear .venv
fi

torch=$(head -n 1 requirements.txt)
echo "setup 2/3: installing $torch (a large download)"
pip_install "$torch"
echo "setup 3/3: installing the other requirements, the demo data and the test tools (about a minute)"
# torch is installed first and pinned again here, so that no other package replaces it by another build.
pip_install "$torch" -r requirements.txt -e ".[demo,dev,heif,optimizers]"
mkdir -p .venv/hf_home .venv/torch_extensions
echo "$key" > "$stamp"
echo "setup finished in $SECONDS s"
