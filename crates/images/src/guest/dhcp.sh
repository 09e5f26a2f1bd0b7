#!/bin/busybox sh
# What udhcpc has found out, put to use.
case $1 in
bound | renew)
    busybox ip -4 address flush dev "$interface"
    busybox ip address add "$ip/$mask" dev "$interface"
    [ "$router" ] && busybox ip route replace default via "${router%% *}" dev "$interface"
    {
        [ "$search" ] && echo "search $search"
        for server in $dns; do echo "nameserver $server"; done
    } >/etc/resolv.conf
    ;;
esac
