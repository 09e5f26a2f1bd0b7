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
# Drivers of the disks that there are, by their controllers' device or class.
load() {
    busybox grep -q "$1" /sys/bus/pci/devices/*/"$2" 2>/dev/null || return 0
    for module in "/lib/modules/$3"/*.ko; do
        [ -f "$module" ] && busybox insmod "$module" 2>/dev/null
    done
}
load 0x1042 device virtio
load 0x0106 class sata
load 0x010802 class nvme
exec busybox init
