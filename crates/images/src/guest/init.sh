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
busybox ip link set lo up
insert() {
    for kind; do
        for module in "/lib/modules/$kind"/*.ko; do
            [ -f "$module" ] && busybox insmod "$module" 2>/dev/null
        done
    done
}
# Drivers of what there is, by PCI device or class.
load() {
    busybox grep -q "$1" /sys/bus/pci/devices/*/"$2" 2>/dev/null || return 0
    shift 2
    insert "$@"
}
load 0x1042 device virtio blk
load 0x105a device virtio fs
load 0x1043 device virtio console
load 0x1041 device virtio net
load 0x100e device e1000
networks=
for card in /sys/class/net/eth*; do
    [ -e "$card" ] || continue
    # Nobody else has its address: it need not ask for two seconds before it uses it.
    echo 0 2>/dev/null >"/proc/sys/net/ipv6/conf/${card##*/}/accept_dad"
    busybox ip link set "${card##*/}" up
    # In the background once it has an address, or nobody has answered for three seconds.
    busybox udhcpc -b -t 3 -T 1 -A 10 -i "${card##*/}" -s /etc/dhcp >/dev/null 2>&1 &
    networks="$networks $!"
done
load 0x0106 class sata
load 0x010802 class nvme
# Directories of the host: lodge.shares=TAG,TAG on the kernel's command line.
read -r cmdline </proc/cmdline
case " $cmdline" in
*' lodge.shares='*)
    tags=${cmdline#*lodge.shares=}
    IFS=,
    for tag in ${tags%% *}; do
        busybox mkdir -p "/mnt/$tag"
        busybox mount -t virtiofs "$tag" "/mnt/$tag"
    done
    unset IFS
    ;;
esac
# Does what the host asks for, such as `lodge exec`. The console need not wait for it.
if [ -x /sbin/lodge-agent ]; then
    {
        load 0x1053 device virtio vsock
        exec /sbin/lodge-agent
    } &
fi
# For guests that stay for a while: memory that is free goes back to the host, more memory and disks may come.
{ busybox sleep 3; load 0x1045 device virtio balloon; load 0x1058 device virtio mem; insert virtio blk nvme; } &
# Of what runs beside this, that ends soon.
[ "$networks" ] && wait $networks
exec busybox init
