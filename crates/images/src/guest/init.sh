#!/bin/busybox sh
# Prepares Lodge's default guest, then becomes process 1, which starts /etc/session by /etc/inittab.
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
busybox mkdir -p /dev/pts
busybox mount -t devpts pts /dev/pts
busybox mount -t tmpfs tmp /tmp
busybox --install -s
busybox hostname lodge
exec busybox init
