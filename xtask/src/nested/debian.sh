#!/bin/busybox sh
# A Debian with systemd starts from its disk on the engine kvm, by SeaBIOS and GRUB, is asked, and shuts down.
set -e
export LODGE_DATA_DIR=/tmp/data
rm -rf /tmp/data
mkdir -p /tmp/data/vms
cp -r /bed /tmp/data/vms
ln -s /dev/nvme0n1 /tmp/data/vms/bed/base.qcow2
/lodge run --name bed --engine kvm --memory 768M --timeout 400 --stats "$@" </dev/null &
vm=$!
until /lodge exec bed -- true 2>/dev/null; do kill -0 $vm; sleep 2; done
date
/lodge exec bed -- sh -c 'until ip route | grep default; do sleep 1; done; ip -br addr; systemctl is-system-running --wait; systemctl --failed; uptime; findmnt -no SOURCE,FSTYPE /; cat /proc/interrupts'
date
/lodge stop bed
wait $vm
date
