#!/.lodge/busybox sh
# Process 1 of a guest that runs an OCI image's command: what follows this part is of the image.
b=/.lodge/busybox
for dir in proc sys dev tmp run; do [ -d /$dir ] || $b mkdir -p /$dir; done
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
$b mkdir -p /dev/pts /dev/shm
$b mount -t devpts pts /dev/pts
$b mount -t tmpfs shm /dev/shm
[ -e /dev/fd ] || $b ln -s /proc/self/fd /dev/fd
$b hostname lodge
[ -e /etc/hosts ] || echo '127.0.0.1 localhost' >/etc/hosts
$b ip link set lo up
# The last console is the one that /dev/console stands for, but only a terminal of its own gives job control.
read -r consoles </sys/class/tty/console/active
tty=/dev/${consoles##* }
[ -c "$tty" ] || tty=/dev/console
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin TERM=${TERM:-linux}
