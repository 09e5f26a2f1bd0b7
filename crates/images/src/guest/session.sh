#!/bin/busybox sh
# A shell on the console; when it ends, the machine goes off.
# lodge.exec="COMMAND" on the kernel's command line runs that command in place of the shell.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root PS1='\w # '
cd "$HOME"

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
[ -n "$run" ] || leave=' Type "poweroff" to leave.'
echo "Lodge: Linux $version, $(nproc) CPUs, $((memory / 1024)) MiB.$leave"
if [ -n "$run" ]; then
    # The end of a session throws away what its terminal has not written yet; setting the terminal waits for that.
    setsid -c sh -c 'sh -c "$1"; status=$?; stty opost; exit $status' sh "$run" <"$tty" >"$tty" 2>&1
    echo "Lodge: the command ended with status $?."
else
    setsid -c sh -l <"$tty" >"$tty" 2>&1
fi
sync
poweroff -f
