#!/bin/busybox sh
# Finds the disk with the root file system, and goes on with the system on it.
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
for module in /lib/modules/*.ko; do
    [ ! -f "$module" ] || /bin/busybox insmod "$module"
done
# The first disk's; by its label only where that is of another kind, for other disks may have systems of ours too.
root=/dev/vda3
tries=0
until [ -b $root ] || root=$(/bin/busybox findfs LABEL=lodge-root 2>/dev/null); do
    root=/dev/vda3
    tries=$((tries + 1))
    if [ $tries = 200 ]; then
        echo "lodge: none of the disks has the file system \"lodge-root\""
        /bin/busybox poweroff -f
    fi
    /bin/busybox usleep 50000
done
/bin/busybox mount -t ext4 "$root" /root
for tree in proc sys dev; do
    /bin/busybox mount -o move /$tree /root/$tree
done
exec /bin/busybox switch_root /root /sbin/init
