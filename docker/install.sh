#!/usr/bin/env bash
# Install sdgp_cusparselt into a virtual environment and prove that it works there.
# The Dockerfiles and the test suite run this same script.
#
#   docker/install.sh [--reuse] VENV [SOURCE]
#
# VENV         the environment, made when it is missing
# SOURCE       a checkout of this repository; without it only torch is installed, so that an image
#              keeps its largest layer when only this project changed
# --reuse      see the packages that PYTHON already has and install only this project (seconds)
#
# PYTHON       interpreter that makes the environment (python3)
# EXTRAS       optional dependencies of pyproject.toml, such as train,bench (none)
# TORCH        requirement for torch, such as torch==2.13.0 (torch)
# TORCH_INDEX  wheel index for torch (pip's own)
# CONSTRAINTS  pip constraints file (none)
set -euo pipefail

fail() {
  echo "install.sh: $1" >&2
  exit 2
}

reuse=0
if [[ "${1:-}" == "--reuse" ]]; then
  reuse=1
  shift
fi
(($# == 1 || $# == 2)) || fail "expected VENV and perhaps SOURCE, got $# arguments"
venv=$1
source_dir=${2:-}
if [[ -n "$source_dir" && ! -f "$source_dir/pyproject.toml" ]]; then
  fail "SOURCE must be a checkout, $source_dir has no pyproject.toml"
fi

python=${PYTHON:-python3}
if [[ ! -x "$venv/bin/python" ]]; then
  "$python" -m venv "$venv"
fi

pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)
options=()
if [[ -n "${CONSTRAINTS:-}" ]]; then
  options+=(--constraint "$CONSTRAINTS")
fi

if ((reuse)); then
  # A .pth line, not --system-site-packages: PYTHON may itself belong to a virtual environment.
  packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  own=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  echo "$packages" >"$own/reused.pth"
  options+=(--no-deps --no-build-isolation)
else
  # torch first and alone: its index may hold nothing else, and its version decides which CUDA
  # libraries come with it.
  index=()
  if [[ -n "${TORCH_INDEX:-}" ]]; then
    index=(--index-url "$TORCH_INDEX")
  fi
  "${pip[@]}" install "${options[@]}" "${index[@]}" "${TORCH:-torch}"
fi

if [[ -z "$source_dir" ]]; then
  exit 0
fi
"${pip[@]}" install "${options[@]}" "$source_dir${EXTRAS:+[$EXTRAS]}"
if ((!reuse)); then
  "${pip[@]}" check
fi

# Outside the checkout, so that the installed package answers and not the folder beside it.
cd /
unset PYTHONPATH
"$venv/bin/python" -m sdgp_cusparselt --version
