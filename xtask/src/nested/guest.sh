# What the guest of devices.sh does; it is in the share.
cd /mnt/src || exit
disks='vda vdb nvme0n1'
if ! [ -e again ]; then
    for disk in $disks; do dd if=data of=/dev/$disk bs=1M seek=1 conv=fsync 2>/dev/null || exit; done
    touch again
    reboot -f
fi
for disk in $disks; do dd if=/dev/$disk bs=1M skip=1 count=4 2>/dev/null | cmp - data || exit; done
echo "after the reset, on $(tty), packed: $(cut -c 35 /sys/block/vdb/device/features)"
cat /proc/interrupts
touch ready
until [ -e go ]; do sleep 1; done
