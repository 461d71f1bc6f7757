#!/bin/bash
# Installs what vmsnap, its tests and its demonstration need on Debian 12.
#   setup.sh system   Debian packages for vmsnap and the lab, as root or with sudo
#   setup.sh tests    further Debian packages that only the tests need
#   setup.sh peers    Debian packages that `make bench NAME=store` measures vmsnap against
#   setup.sh venv     the Python environment in .venv
#   setup.sh plots    what draws the benchmark's picture, into .venv
#   setup.sh qemu     Debian's backport of QEMU, unpacked into build/qemu and not installed: for the lab (VMSNAP_LAB_QEMU)
# May be repeated; does nothing where everything is there. No service is started: the lab and the tests start their own.
set -euo pipefail
cd "$(dirname "$0")/.."

POLICY=/usr/sbin/policy-rc.d

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -- "$@"; fi
}

install_packages() {
    local wanted missing
    wanted=$(cat "$1")
    missing=$(for package in $wanted; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || echo "$package"
    done)
    [ -z "$missing" ] && return
    echo "installing:" $missing
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -q update
    # Debian's packages start their services when installed, unless this file says no (invoke-rc.d(8)).
    if [ ! -e "$POLICY" ]; then
        trap 'as_root rm -f "$POLICY"' EXIT
        printf '#!/bin/sh\nexit 101\n' | as_root tee "$POLICY" >/dev/null
        as_root chmod 755 "$POLICY"
    fi
    # shellcheck disable=SC2086 # one argument a package
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends $missing
}

# Transcripts of Windows that the conformance test of the WinRM endpoint reads; they are not ours to copy.
fetch_oracle() {
    local version
    [ -x .venv/bin/python ] || return 0
    version=$(sed -n 's/^pypsrp==//p' constraints.txt)
    [ -e "build/oracle/pypsrp-$version.tar.gz" ] && return
    .venv/bin/python -m pip download -q --disable-pip-version-check --no-deps --no-binary pypsrp -d build/oracle "pypsrp==$version"
}

install_venv() {
    local stamp=.venv/installed
    if [ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt constraints.txt ]; then return; fi
    # Debian's own Python: the one that the package would use.
    /usr/bin/python3 -m venv .venv
    .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
    touch "$stamp"
}

unpack_qemu() {
    local root=$PWD/build/qemu lists mirror codename
    [ -e "$root/unpacked" ] && return
    # shellcheck disable=SC1091 # every Debian has it
    codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' "Codename: $codename" | head -n 1)
    rm -rf "$root"
    lists=$root/lists
    mkdir -p "$lists/partial" "$root/packages"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $codename-backports main" >"$root/sources"
    local apt=(apt-get -q -o "Dir::Etc::SourceList=$root/sources" -o Dir::Etc::SourceParts=/dev/null
        -o "Dir::State::Lists=$lists" -o APT::Sandbox::User=root)
    "${apt[@]}" update
    (cd "$root/packages" && "${apt[@]}" download qemu-system-x86 qemu-system-common qemu-system-data seabios)
    for package in "$root"/packages/*.deb; do dpkg-deb --extract "$package" "$root"; done
    "$root/usr/bin/qemu-system-x86_64" --version
    touch "$root/unpacked"
}

case "${1:-}" in
    system) install_packages integration/lab/packages.txt ;;
    tests) install_packages integration/lab/packages-tests.txt && fetch_oracle ;;
    peers) install_packages integration/lab/packages-bench.txt ;;
    venv) install_venv ;;
    plots) .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]' ;;
    qemu) unpack_qemu ;;
    *) echo "usage: setup.sh system|tests|peers|venv|plots|qemu" >&2; exit 2 ;;
esac
