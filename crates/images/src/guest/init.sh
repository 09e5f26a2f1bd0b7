#!/bin/busybox sh
# Process 1 of Lodge's default guest: a shell on the console; when it ends, the machine goes off.
# lodge.exec="COMMAND" on the kernel's command line runs that command in place of the shell.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root PS1='\w # '

busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
busybox mkdir -p /dev/pts
busybox mount -t devpts pts /dev/pts
busybox mount -t tmpfs tmp /tmp
# Commands that are there already, poweroff for one, stay.
busybox --install -s
busybox hostname lodge

# The last console is the one that /dev/console stands for, but only a terminal of its own gives job control.
read -r consoles </sys/class/tty/console/active
tty=/dev/${consoles##* }
[ -c "$tty" ] || tty=/dev/console

read -r cmdline </proc/cmdline
run=
case " $cmdline" in
*' lodge.exec="'*) run=${cmdline#*lodge.exec=\"} run=${run%%\"*} ;;
*' lodge.exec='*) run=${cmdline#*lodge.exec=} run=${run%% *} ;;
esac

read -r _ memory _ </proc/meminfo
read -r _ _ version _ </proc/version
cd "$HOME"
if [ -n "$run" ]; then
    echo "Lodge: Linux $version, $(nproc) CPUs, $((memory / 1024)) MiB."
    setsid -c sh -c "$run" <"$tty" >"$tty" 2>&1
    echo "Lodge: the command ended with status $?."
else
    echo "Lodge: Linux $version, $(nproc) CPUs, $((memory / 1024)) MiB. Type \"poweroff\" to leave."
    setsid -c sh -l <"$tty" >"$tty" 2>&1
fi
sync
exec busybox poweroff -f
