#!/bin/busybox sh
# A 32-bit kernel copies a CD to a disk, both by SATA, on the engine kvm.
set -e
truncate -s 16M /tmp/sata
dd if=/dev/urandom of=/tmp/cd bs=1M count=4 2>/dev/null
copy='until [ -b /dev/sda ] && [ -b /dev/sr0 ]; do sleep 0.1; done; dd if=/dev/sr0 of=/dev/sda bs=64k conv=fsync'
/lodge run --engine kvm --memory 256M --kernel /i386/vmlinuz --initrd /i386/initrd --timeout 100 --stats \
    --disk /tmp/sata,bus=sata --cdrom /tmp/cd --cmdline "console=ttyS0 quiet cryptomgr.notests lodge.exec=\"$copy\""
cmp -n 4194304 /tmp/sata /tmp/cd
echo 'the disk has what the CD had'
