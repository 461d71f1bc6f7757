#!/bin/sh
# enter.sh TREE COMMAND...: runs COMMAND in a chroot of TREE with /proc, /dev and shared memory.
# To be started in mount and PID namespaces of its own, so that nothing it mounts or starts outlives it.
set -eu
tree=$1
shift
mount -t proc proc "$tree/proc"
mount --bind /dev "$tree/dev"
mount -t tmpfs -o mode=1777 shm "$tree/dev/shm"
exec chroot "$tree" "$@"
