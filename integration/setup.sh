#!/bin/bash
# Installs what vmsnap, its tests and its demonstration need on Debian 12.
#   setup.sh system   Debian packages, as root or with sudo
#   setup.sh venv     the Python environment in .venv
# May be repeated; does nothing where everything is there.
set -euo pipefail
cd "$(dirname "$0")/.."

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -- "$@"; fi
}

install_packages() {
    local wanted missing
    wanted=$(grep -v '^#' integration/lab/packages.txt)
    missing=$(for package in $wanted; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || echo "$package"
    done)
    [ -z "$missing" ] && return
    echo "installing: $(echo $missing)"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -q update
    # shellcheck disable=SC2086 # one argument a package
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends $missing
}

install_venv() {
    local stamp=.venv/installed
    if [ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt constraints.txt ]; then return; fi
    # Debian's own Python: the one that the package would use.
    /usr/bin/python3 -m venv .venv
    .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
    touch "$stamp"
}

case "${1:-}" in
    system) install_packages ;;
    venv) install_venv ;;
    *) echo "usage: setup.sh system|venv" >&2; exit 2 ;;
esac
