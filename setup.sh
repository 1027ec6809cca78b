#!/usr/bin/env bash
# bash setup.sh demo    install fledge into .venv and run the demo recipe
# bash setup.sh test    install fledge with its development tools into .venv and run the tests
# Needs Python 3.11 or newer. Everything goes into .venv (or $FLEDGE_VENV); the system's Python is left as it is.
set -euo pipefail
cd "$(dirname "$0")"
venv=${FLEDGE_VENV:-.venv}

find_python() {
  for name in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "$name"
      return
    fi
  done
  echo "fledge needs Python 3.11 or newer and found none; install it, or name it: PYTHON=/path/to/python bash setup.sh" >&2
  exit 2
}

make_venv() {
  local python
  python=$(find_python)
  if ! "$python" -m venv "$venv" 2>/dev/null; then # Debian and Ubuntu ship venv's pip as a package of its own
    rm -rf "$venv"
    if "$python" -m pip --version >/dev/null 2>&1; then # pip from outside can install into a venv that has none
      "$python" -m venv --without-pip "$venv"
      "$python" -m pip --python "$venv" install --quiet pip
    elif command -v apt-get >/dev/null; then
      version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
      sudo=$([ "$(id -u)" = 0 ] || echo sudo)
      $sudo apt-get update -qq && $sudo apt-get install -qq -y "python$version-venv"
      "$python" -m venv "$venv"
    else
      echo "$python cannot make a virtual environment; install its venv module and try again" >&2
      exit 2
    fi
  fi
}

[ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1 || make_venv
case "${1:-}" in
  demo)
    "$venv/bin/python" -m pip install --quiet -e .
    exec "$venv/bin/fledge" run demo "${@:2}"
    ;;
  test)
    "$venv/bin/python" -m pip install --quiet -e '.[dev]'
    exec env OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$venv/bin/python" -m pytest "${@:2}"
    ;;
  *)
    echo "usage: bash setup.sh demo | test" >&2
    exit 2
    ;;
esac
