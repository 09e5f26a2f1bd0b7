#!/bin/busybox sh
# A guest that grows, again after a reset, and shrinks, on the engine kvm. It also touches what is not plugged, which is harmless.
set -e
/lodge run --engine kvm --name grow --memory 192M,max=320M --kernel /vmlinuz --initrd /initrd --timeout 220 --stats --cmdline \
    'console=ttyS0 quiet cryptomgr.notests lodge.exec="devmem 0x104000000 64 7; devmem 0x107fffff8 64; sleep 300"' &
vm=$!
guest() { /lodge exec grow -- sh -c "$1"; }
has() { until /lodge memory grow --json | grep -q "\"has\": *$1,"; do kill -0 $vm; sleep 1; done; }
until /lodge memory grow 320M 2>/dev/null; do kill -0 $vm; sleep 1; done
has 335544320
# More than it began with.
guest 'mount -o remount,size=90% /tmp; dd if=/dev/zero of=/tmp/file bs=1M count=150 && reboot -f' || true
until guest '! [ -e /tmp/file ]' 2>/dev/null; do kill -0 $vm; sleep 1; done
has 335544320
echo 'the guest grew, and again after the reset'
/lodge memory grow 192M
has 201326592
held=$(/lodge memory grow --json | sed -n 's/.*"held": *\([0-9]*\).*/\1/p')
[ "$held" -lt 201326592 ]
guest 'poweroff -f' || true
wait $vm
echo 'the host has its memory back'
