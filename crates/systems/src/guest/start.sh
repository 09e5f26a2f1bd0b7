#!/bin/sh
# Runs at every start of the machine; $1 is where the seed is. It comes with the seed, so it may change while systems do not.
seed=$1

# Directories of the host.
if [ -f "$seed/shares" ]; then
    while read -r tag; do
        mkdir -p "/mnt/$tag"
        mount -t virtiofs "$tag" "/mnt/$tag"
    done <"$seed/shares"
fi

# Memory that the host gives (virtio-mem) is to be used at once, as kernels that Lodge loads are told.
online=/sys/devices/system/memory/auto_online_blocks
if grep -q 0x1058 /sys/bus/pci/devices/*/device && ! grep -q memhp_default_state= /proc/cmdline && [ -f $online ]; then
    policy=/sys/module/memory_hotplug/parameters/online_policy
    [ -f $policy ] && echo auto-movable >$policy
    echo online >$online
fi

# Lodge's agent. In /run nothing may be executed, on some systems.
[ -f "$seed/agent" ] || exit 0
mkdir -p /var/lib/lodge
agent=/var/lib/lodge/agent
cmp -s "$seed/agent" $agent || install -m 700 "$seed/agent" $agent
mkdir -p /run/systemd/system
cat >/run/systemd/system/lodge-agent.service <<'END'
[Unit]
Description=Lodge's agent, which does what the host asks for

[Service]
ExecStartPre=-/sbin/modprobe vmw_vsock_virtio_transport
ExecStart=/var/lib/lodge/agent
Restart=on-failure
RestartSec=1
# What runs for the host ends with it.
KillMode=control-group
END
systemctl start --no-block lodge-agent.service
