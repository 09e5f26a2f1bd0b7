#!/bin/busybox sh
# What udhcpc has found out, put to use.
b=/bin/busybox
case $1 in
bound | renew)
    $b ip -4 address flush dev "$interface"
    $b ip address add "$ip/$mask" dev "$interface"
    [ "$router" ] && $b ip route replace default via "${router%% *}" dev "$interface"
    $b mkdir -p /etc
    {
        search=${search:-$domain}
        [ "$search" ] && echo "search $search"
        for server in $dns; do echo "nameserver $server"; done
    } >/etc/resolv.conf
    ;;
esac
