# Installs the packages that the host has fetched. They are on a disk that is a tar archive; in needed/ are those that were not asked for.
install_packages() (
    device=$(grep -slx packages /sys/block/*/serial | head -n 1 | cut -d / -f 4)
    [ -n "$device" ] || { echo "lodge: the disk with the packages is not there" >&2; exit 1; }
    dir=$(mktemp -d /var/tmp/packages.XXXXXX) || exit
    trap 'rm -rf "$dir"' EXIT
    export DEBIAN_FRONTEND=noninteractive HOME=/root LC_ALL=C.UTF-8
    tar -xf "/dev/$device" -C "$dir" || exit
    # Where an earlier try was interrupted.
    dpkg --configure --pending || exit
    # Its sandbox is for what comes from a network.
    find "$dir" -name '*.deb' -exec apt-get install -qq -y --no-install-recommends -o APT::Sandbox::User=root \
        -o Dpkg::Use-Pty=0 -o Dpkg::Options::=--force-confold {} + || exit
    [ ! -d "$dir/needed" ] || ls "$dir/needed" | sed 's/\.deb$//' | xargs apt-mark -qq auto
)
install_packages || { status=$?; echo "lodge: not all packages could be installed" >&2; }
