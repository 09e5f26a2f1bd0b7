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
for module in /.lodge/net/*.ko; do
    [ -f "$module" ] && $b insmod "$module" 2>/dev/null
done
for card in /sys/class/net/eth*; do
    [ -e "$card" ] || continue
    echo 0 2>/dev/null >"/proc/sys/net/ipv6/conf/${card##*/}/accept_dad"
    $b ip link set "${card##*/}" up
    # In the background once it has an address, or nobody has answered for three seconds.
    $b udhcpc -b -t 3 -T 1 -A 10 -i "${card##*/}" -s /.lodge/dhcp >/dev/null 2>&1
done
# The last console is the one that /dev/console stands for, but only a terminal of its own gives job control.
read -r consoles </sys/class/tty/console/active
tty=/dev/${consoles##* }
[ -c "$tty" ] || tty=/dev/console
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin TERM=${TERM:-linux}
