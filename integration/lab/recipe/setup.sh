#!/bin/sh
# Runs once, in a chroot of the new guest's tree, in namespaces of its own. Everything the guest needs before its first boot is done
# here, on the host's processor, because the guest may be emulated.
set -eu
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin

# --- the system -----------------------------------------------------------------------------------------------------
: >/etc/hostname
echo '127.0.0.1 localhost' >/etc/hosts
mkdir -p /data # a folder of the recipe's that has no file would not be in a checkout
printf '/dev/vda / ext4 rw,noatime 0 0\nLABEL=labdata /data ext4 rw,noatime,noauto 0 0\n' >/etc/fstab
passwd --delete root

systemctl enable systemd-networkd.service lab-boot.service ssh.service
systemctl disable systemd-networkd-wait-online.service e2scrub_reap.service systemd-pstore.service 2>/dev/null || true
# Starting a program costs an emulated guest a third of a second; these do nothing for it.
systemctl mask \
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer logrotate.timer \
    motd-news.timer systemd-tmpfiles-clean.timer \
    getty.target getty@tty1.service serial-getty@ttyS0.service getty-static.service \
    keyboard-setup.service console-setup.service \
    systemd-networkd-wait-online.service systemd-firstboot.service systemd-machine-id-commit.service \
    systemd-random-seed.service systemd-update-utmp.service systemd-update-utmp-runlevel.service \
    systemd-rfkill.service systemd-rfkill.socket systemd-binfmt.service systemd-modules-load.service \
    systemd-network-generator.service systemd-journal-flush.service systemd-sysusers.service systemd-remount-fs.service \
    kmod-static-nodes.service modprobe@configfs.service modprobe@dm_mod.service modprobe@drm.service \
    modprobe@efi_pstore.service modprobe@fuse.service modprobe@loop.service \
    sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount sys-fs-fuse-connections.mount \
    dev-hugepages.mount dev-mqueue.mount

# --- databases ------------------------------------------------------------------------------------------------------
for cluster in $(pg_lsclusters --no-header | awk '{ print $1 "," $2 }'); do
    pg_dropcluster --stop "${cluster%,*}" "${cluster#*,}"
done

make_cluster() { # NAME PORT START
    pg_createcluster 15 "$1" --port "$2" --start-conf "$3" --locale C.UTF-8 --encoding UTF8 -- --no-sync
    mkdir -p "/etc/postgresql/15/$1/conf.d"
    cat >"/etc/postgresql/15/$1/conf.d/lab.conf" <<CONF
listen_addresses = '*'
shared_buffers = $4
max_wal_size = 256MB
checkpoint_timeout = 15min
CONF
    cat >"/etc/postgresql/15/$1/pg_hba.conf" <<CONF
# A closed lab: whoever reaches the guest may be any user.
local all all trust
host all all 0.0.0.0/0 trust
host replication all 0.0.0.0/0 trust
CONF
}

make_cluster main 5432 auto 128MB
make_cluster aux 5433 manual 16MB

as_postgres() { runuser -u postgres -- "$@"; }

pg_ctlcluster 15 main start
as_postgres createdb bench
as_postgres pgbench --quiet --initialize --scale=10 bench
as_postgres createdb app
as_postgres psql --no-psqlrc --set ON_ERROR_STOP=1 --quiet app --command \
    'CREATE TABLE markers (n bigint PRIMARY KEY, at timestamptz NOT NULL DEFAULT clock_timestamp())'
as_postgres psql --no-psqlrc --quiet bench --command 'VACUUM FREEZE' --command 'CHECKPOINT'
pg_ctlcluster 15 main stop --mode fast

pg_ctlcluster 15 aux start
as_postgres createdb --port 5433 app
as_postgres psql --port 5433 --no-psqlrc --set ON_ERROR_STOP=1 --quiet app --command \
    'CREATE TABLE markers (n bigint PRIMARY KEY, at timestamptz NOT NULL DEFAULT clock_timestamp())'
pg_ctlcluster 15 aux stop --mode fast

# The data disk's copy of the aux cluster: same history, a place of its own.
mkdir -p /lab-data/postgresql/15
chown -R postgres:postgres /lab-data/postgresql
cp -a /var/lib/postgresql/15/aux /lab-data/postgresql/15/aux

for cluster in main aux; do
    state=$(/usr/lib/postgresql/15/bin/pg_controldata "/var/lib/postgresql/15/$cluster" | sed -n 's/^Database cluster state: *//p')
    [ "$state" = 'shut down' ] || { echo "cluster $cluster was left '$state'" >&2; exit 1; }
done

# --- boot -----------------------------------------------------------------------------------------------------------
# An initial file system of our own: Debian's starts udev and looks for hardware, which costs an emulated guest five seconds.
kernel=$(basename /lib/modules/*)
initial=$(mktemp -d)
mkdir -p "$initial/bin" "$initial/dev" "$initial/modules" "$initial/root"
cp /bin/busybox "$initial/bin/busybox"
number=10
# Dependencies first, each once; virtio_net is left to udev in the real system.
for file in $(modprobe --set-version "$kernel" --all --show-depends virtio_pci virtio_blk ext4 | awk '$1 == "insmod" { print $2 }'); do
    [ -e "$initial"/modules/??-"$(basename "$file")" ] || cp "$file" "$initial/modules/$number-$(basename "$file")"
    number=$((number + 1))
done
cat >"$initial/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
for module in /modules/*; do /bin/busybox insmod "$module"; done
until /bin/busybox mount -t ext4 -o noatime /dev/vda /root 2>/dev/null; do /bin/busybox sleep 0.1; done
/bin/busybox mount --move /dev /root/dev
exec /bin/busybox switch_root /root /sbin/init
INIT
chmod 755 "$initial/init"
(cd "$initial" && find . | cpio --quiet --create --format=newc) >/boot/initrd-lab
rm -rf "$initial" /boot/initrd.img*

rm -f /var/log/postgresql/*
apt-get clean
rm -rf /var/lib/apt/lists/* /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log
