#!/bin/busybox sh
# A guest with every device that its kernel has a driver for, on the engine kvm, seen from both sides, over a reset.
set -e
mkdir /tmp/src
cp /guest.sh /tmp/src
dd if=/dev/urandom of=/tmp/src/data bs=1M count=4 2>/dev/null
for disk in split packed nvme; do truncate -s 32M /tmp/$disk; done
/lodge run --engine kvm --name one --cpus 2 --memory 256M --kernel /vmlinuz --initrd /initrd --timeout 220 --stats \
    --console virtio --disk /tmp/split --disk /tmp/packed,bus=virtio-packed --disk /tmp/nvme,bus=nvme --share /tmp/src:src \
    --cmdline 'console=ttyS0 console=hvc0 quiet cryptomgr.notests lodge.shares=src lodge.exec="sh /mnt/src/guest.sh"' &
vm=$!
until [ -e /tmp/src/ready ]; do kill -0 $vm; sleep 1; done
status=0
/lodge exec one -- sh -c 'echo "exec in $(hostname)"; exit 3' || status=$?
[ $status = 3 ]
truncate -s 16M /tmp/hot
/lodge disk attach one /tmp/hot,format=raw,serial=hot
/lodge exec one -- sh -c 'until [ -b /dev/vdc ]; do sleep 0.2; done; dd if=/mnt/src/data of=/dev/vdc bs=1M conv=fsync'
/lodge disk detach one hot --timeout 60
cmp -n 4194304 /tmp/hot /tmp/src/data
echo 'a disk came and went'
until /lodge memory one 128M; do kill -0 $vm; sleep 1; done
until /lodge memory one --json | grep -q '"has": *134217728'; do kill -0 $vm; sleep 1; done
touch /tmp/src/go
wait $vm
for disk in split packed nvme; do dd if=/tmp/$disk bs=1M skip=1 count=4 2>/dev/null | cmp - /tmp/src/data; done
echo 'the disks are as the guest left them'
