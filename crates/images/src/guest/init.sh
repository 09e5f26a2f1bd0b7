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
# Drivers, if there is a virtual disk.
if busybox grep -q 0x1042 /sys/bus/pci/devices/*/device 2>/dev/null; then
    for module in /lib/modules/*.ko; do
        [ -f "$module" ] && busybox insmod "$module"
    done
fi
exec busybox init
