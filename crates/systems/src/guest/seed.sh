#!/bin/sh
# Applies the machine's seed: a file system with the label CIDATA (cloud-init's NoCloud), of which are understood
#   meta-data   the lines "instance-id: ID" and "local-hostname: NAME"
#   user-data   if it is a script ("#!"): it runs once for each instance-id, as root
#   start       if it is there: it runs at every start, and is told where the seed is
# The machine also gets host keys of its own here.
set -u
state=/var/lib/lodge
mkdir -p $state

disk=$(blkid -t LABEL=CIDATA -o device || blkid -t LABEL=cidata -o device)
disk=$(echo "$disk" | head -n 1)
id= name= run=
if [ -n "$disk" ]; then
    seed=$(mktemp -d /run/seed.XXXXXX)
    mount -o ro "$disk" "$seed"
    value() { sed -n "s/^$1:[[:space:]]*//p" "$seed/meta-data" | head -n 1 | tr -d "\"'"; }
    id=$(value instance-id) name=$(value local-hostname)
    if [ "$id" != "$(cat $state/instance-id 2>/dev/null)" ]; then
        run=yes
        rm -f /etc/ssh/ssh_host_*_key /etc/ssh/ssh_host_*_key.pub
        [ ! -f "$seed/user-data" ] || install -m 700 "$seed/user-data" $state/user-data
    fi
    [ ! -f "$seed/start" ] || sh "$seed/start" "$seed"
    umount "$seed"
    rmdir "$seed"
fi

# Not RSA, whose keys take a long time to make.
for kind in ed25519 ecdsa; do
    key=/etc/ssh/ssh_host_${kind}_key
    [ -s $key ] || { rm -f $key; ssh-keygen -q -t $kind -N '' -C "root@${name:-debian}" -f $key; }
done
[ -n "$run" ] || exit 0

if [ -n "$name" ]; then
    echo "$name" >/etc/hostname
    hostname "$name"
    sed -i "s/^127\.0\.1\.1.*/127.0.1.1 $name/" /etc/hosts
fi
# Where Lodge starts the kernel it tells systemd the ID; where GRUB does, systemd has made one up, good until now.
case $id in
*[!0-9a-f]*) ;;
????????????????????????????????) [ "$id" = "$(cat /etc/machine-id)" ] || echo "$id" >/etc/machine-id ;;
esac
status=0
case $(head -c 2 $state/user-data 2>/dev/null) in
'#!') $state/user-data || { status=$?; echo "lodge: the seed's script ended with status $status" >&2; } ;;
'') ;;
*) echo "lodge: the seed's user-data is no script, and nothing else is understood" >&2 ;;
esac
echo "$id" >$state/instance-id
exit $status
