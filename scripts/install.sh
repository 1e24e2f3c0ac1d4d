#!/bin/sh
# Makes a virtual environment with vlarl in it, and the build of torch that suits the machine.
#
#     scripts/install.sh VENV [EXTRAS]        e.g. scripts/install.sh .venv dev
#
# PYTHON: interpreter to build on (default python3). TORCH_INDEX: package index of the torch build to use, for instance
# https://download.pytorch.org/whl/cu126 for an older driver (default: PyPI's CUDA build where an NVIDIA driver answers,
# else PyTorch's CPU index when it can be reached, else whatever pip is configured for).
set -eu

venv=$1
extras=${2:-}
python=${PYTHON:-python3}
torch_index=${TORCH_INDEX:-}
cpu_index=https://download.pytorch.org/whl/cpu

fail() {
    echo "install: $1" >&2
    exit 2
}

has_gpu() {
    command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU
}

make_venv() {
    command -v "$python" >/dev/null 2>&1 || fail "there is no $python. Install Python 3.11 or newer (Debian, Ubuntu: apt-get install python3 python3-venv)."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$python is $("$python" -V), but vlarl needs 3.11 or newer. Name another one: make quickstart PYTHON=python3.12"
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
            apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$package"
        else
            fail "$python lacks its venv module. Install it first (Debian, Ubuntu: sudo apt-get install $package)."
        fi
    fi
    "$python" -m venv "$venv"
}

# What torch.compile builds its kernels with, and its tests want.
need_compiler() {
    missing=$("$venv/bin/python" - <<'PY'
import os, shutil, sys, sysconfig
compiler = any(shutil.which(name) for name in ("g++", "clang++"))
header = os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
print(*[p for p, there in (("g++", compiler), ("python%d.%d-dev" % sys.version_info[:2], header)) if not there])
PY
    )
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $missing; } && return 0
    fi
    echo "install: tests of torch.compile want $missing (Debian, Ubuntu: sudo apt-get install $missing)" >&2
}

reachable() {
    "$venv/bin/python" - "$1" <<'PY'
import sys, urllib.request
try:
    urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=5).close()
except Exception:
    sys.exit(1)
PY
}

[ -x "$venv/bin/pip" ] || make_venv
[ "$extras" != dev ] || need_compiler
if [ -z "$torch_index" ] && ! has_gpu && reachable "$cpu_index"; then
    torch_index=$cpu_index
fi
# A build such as 2.13.0+cpu ranks above PyPI's plain 2.13.0, so an extra index is enough to choose it.
"$venv/bin/pip" install --disable-pip-version-check --quiet ${torch_index:+--extra-index-url "$torch_index"} \
    -c constraints.txt -e ".${extras:+[$extras]}"
if has_gpu && ! "$venv/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    fail "an NVIDIA driver answers, but this build of torch cannot use it. Pick one that suits the driver, for instance:
    make clean && make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cu126"
fi
