#!/bin/busybox sh
# Process 1 of the machine in which a system is made: on /dev/vda, from the tar archive that /dev/vdb is.
# Lines that begin with "@lodge" tell the host how far it is.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
/bin/busybox --install -s
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /target
mount -t devpts pts /dev/pts
mount -t tmpfs shm /dev/shm

build() {
    set -e
    for module in /lib/modules/*.ko; do
        [ ! -f "$module" ] || insmod "$module"
    done
    echo "@lodge step making the file system"
    root=$(sed 's/.*lodge.root=\([^ ]*\).*/\1/' /proc/cmdline)
    # A new disk reads as zero, and so does what is not written now.
    /usr/lib/mke2fs -q -F -t ext4 -L lodge-root -E nodiscard,assume_storage_prezeroed=1 "$root"
    # What is lost with the power now is thrown away anyway.
    mount -t ext4 -o noatime,nobarrier,commit=600,data=writeback "$root" /target
    echo "@lodge step writing files"
    tar -xf /dev/vdb -C /target
    for tree in proc sys dev; do
        mount -o rbind /$tree /target/$tree
    done
    mount -t tmpfs run /target/run
    mount -t tmpfs tmp /target/tmp
    chmod 1777 /target/tmp
    chroot /target /usr/lib/lodge/configure "$root" </dev/null
    umount /target/run /target/tmp
    for tree in dev/shm dev/pts dev sys proc; do
        umount /target/$tree
    done
    echo "@lodge step writing to the disk"
    umount /target
}

# In a shell of its own, which ends at the first failure.
(build) 2>&1
case $? in
0) echo "@lodge done" ;;
*) echo "@lodge failed" ;;
esac
poweroff -f
