#!/bin/bash
# install.sh [DESTDIR]: puts vmsnap in place, with the versions it is tested with, as 'make install' and the Debian package do.
#   /opt/vmsnap                the program in a Python environment of its own
#   /usr/bin/vmsnap            a link to it
#   /lib/systemd, /usr/lib     units, and what systemd makes of users and folders
# Nothing is started, and nothing replaced that runs. Needs Debian's python3-venv, and a C compiler,
# python3-dev and libvirt-dev for libvirt's binding.
set -euo pipefail
cd "$(dirname "$0")/.."

destination=$(realpath -m "${1:-/}")
destination=${destination%/}
place=/opt/vmsnap
target=$destination$place

# A running program loads parts of itself later. What it does must not end in the middle for want of them.
if [ -z "$destination" ] && packaging/running.sh "$place" >&2; then
    echo "install.sh: these run from $place, which is about to be replaced. Nothing was changed." >&2
    echo "What to do: stop vmsnap.service and the timers, and wait for the rest: 'vmsnap removable' says for what." >&2
    exit 1
fi
rm -rf "$target"
# Debian's own Python: the one that the package depends on.
/usr/bin/python3 -m venv "$target"
"$target/bin/python3" -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt .
"$target/bin/python3" -m pip uninstall --quiet --yes --disable-pip-version-check pip setuptools

# What is left says nothing of the place where it was built.
find "$target/bin" -mindepth 1 ! -name 'python*' ! -name vmsnap -delete
sed -i "1s|^#!.*|#!$place/bin/python3|" "$target/bin/vmsnap"
sed -i '/^command = /d' "$target/pyvenv.cfg"
find "$target" -name direct_url.json -delete
find "$target" -path '*.dist-info/RECORD' -exec sed -i '/direct_url.json/d' {} +
/usr/bin/python3 -m compileall -q -j0 --invalidation-mode unchecked-hash -s "$destination" -p / "$target/lib"

install -d "$destination/usr/bin" "$destination/etc"
ln -sfn "$place/bin/vmsnap" "$destination/usr/bin/vmsnap"
install -D -m 644 -t "$destination/lib/systemd/system" systemd/*.service systemd/*.timer
install -D -m 644 -t "$destination/usr/lib/systemd/network" systemd/00-vmsnap.network
install -D -m 644 systemd/vmsnap-networkmanager.conf "$destination/usr/lib/NetworkManager/conf.d/vmsnap.conf"
install -D -m 644 packaging/sysusers.conf "$destination/usr/lib/sysusers.d/vmsnap.conf"
install -D -m 644 packaging/tmpfiles.conf "$destination/usr/lib/tmpfiles.d/vmsnap.conf"
install -D -m 644 -t "$destination/usr/share/doc/vmsnap" README.md CHANGELOG.md docs/*.md
install -D -m 644 -t "$destination/usr/share/doc/vmsnap/examples" policies/*.toml
install -D -m 644 -t "$destination/usr/share/doc/vmsnap/monitoring" monitoring/*
