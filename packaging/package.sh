#!/bin/bash
# package.sh: builds the Debian package from what git knows of this checkout, in build/package, and prints its name.
# Needs debhelper, and what install.sh needs. May be repeated; does nothing where nothing has changed.
set -euo pipefail
cd "$(dirname "$0")/.."

mapfile -d '' files < <(git ls-files -z --cached --others --exclude-standard -- \
    CHANGELOG.md LICENSE Makefile README.md constraints.txt debian docs monitoring packaging policies pyproject.toml systemd vmsnap)
state=$(sha256sum -- "${files[@]}" | sha256sum | cut -d ' ' -f 1)
if ! [ "$(cat build/package/state 2>/dev/null)" = "$state" ]; then
    rm -rf build/package
    mkdir -p build/package/vmsnap
    printf '%s\0' "${files[@]}" | tar --create --null --files-from - | tar --extract --directory build/package/vmsnap
    (cd build/package/vmsnap && dpkg-buildpackage --build=binary --unsigned-source --unsigned-changes) >build/package/log 2>&1 || {
        tail -n 40 build/package/log >&2
        exit 1
    }
    rm -rf build/package/vmsnap
    echo "$state" >build/package/state
fi
ls build/package/vmsnap_*.deb
