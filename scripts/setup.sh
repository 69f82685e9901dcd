#!/usr/bin/env bash
# Serves the Makefile: builds .venv from nothing, or does nothing at all (no pip, no network) while the pins are unchanged.
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/videox-setup-stamp
key=$(cat requirements.txt pyproject.toml scripts/setup.sh | cksum)
in_range='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'

if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ] && .venv/bin/python -c "$in_range" 2>/dev/null; then
  exit 0
fi

# pip repeats one warning per search folder it skips; everything else it says is for the reader.
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
    echo "error: set-up: no python3.11, 3.12 or 3.13 with venv and pip on PATH. Fix: install one of them." >&2
    exit 1
  fi
  echo "set-up 1/3: .venv with $("$python" --version)"
  "$python" -m venv --clear .venv
fi

torch=$(head -n 1 requirements.txt)
echo "set-up 2/3: $torch (as long as its download takes)"
pip_install "$torch"
echo "set-up 3/3: the rest of requirements.txt, demo and test tools (about a minute)"
# torch first and pinned again: no other package may bring another build of it.
pip_install "$torch" -r requirements.txt -e ".[demo,dev,optimizers]"
mkdir -p .venv/hf_home .venv/torch_extensions
echo "$key" > "$stamp"
echo "set-up done in $SECONDS s"
