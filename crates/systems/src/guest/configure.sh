#!/bin/sh
# Configures the packages of a new system, in which it runs. All of them are unpacked. The argument is the root file system's device.
set -e
root=$1
export DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true DEBCONF_NOWARNINGS=yes
export HOME=/root LC_ALL=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
# The initial RAM disk is made once, at the end.
export INITRD=No

packages=$(grep -c '^Package:' /var/lib/dpkg/status)
echo "@lodge steps $packages configuring packages"
# base-files and others use awk before its package has said which one it is.
ln -sf mawk /usr/bin/awk
# Services are not started here, and keys are each machine's own.
printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
for kind in rsa ecdsa ed25519; do
    : >/etc/ssh/ssh_host_${kind}_key
done

# What would have run before each was unpacked.
for script in /var/lib/dpkg/info/*.preinst; do
    package=$(basename "$script" .preinst)
    DPKG_MAINTSCRIPT_PACKAGE=${package%:*} DPKG_MAINTSCRIPT_ARCH=amd64 DPKG_MAINTSCRIPT_NAME=preinst \
        "$script" install >/dev/null
done
# Opened once more, for dpkg makes it non-blocking, which the scripts' output must not be.
exec 3>/dev/console
dpkg --force-unsafe-io --force-depends --status-fd 3 --configure base-passwd base-files libc6
dpkg --force-unsafe-io --status-fd 3 --configure --pending
[ -z "$(dpkg --audit)" ] || { dpkg --audit; exit 1; }

echo "@lodge step making its initial RAM disk"
COMPRESSLEVEL=1 update-initramfs -c -k all

echo "@lodge step installing GRUB"
# Loaded here, for the kernel would look for them outside.
modprobe -a vfat nls_cp437 nls_ascii
mkdir -p /boot/efi /dev/disk/by-uuid
mount -t vfat "${root%[0-9]}2" /boot/efi
# What udev would have made: by it the configuration names the root file system.
ln -s "$root" "/dev/disk/by-uuid/$(blkid -s UUID -o value "$root")"
grub-install --target=i386-pc "${root%[0-9]}"
grub-install --target=x86_64-efi --removable --no-nvram
update-grub
umount /boot/efi

echo "@lodge step cleaning up"
systemctl enable --quiet systemd-networkd.service lodge-seed.service
# It looks for snapshots of logical volumes at every start, and there are none.
systemctl disable --quiet e2scrub_reap.service e2scrub_all.timer
# SSH over sockets that this machine does not have.
mkdir -p /etc/systemd/system-generators
ln -s /dev/null /etc/systemd/system-generators/systemd-ssh-generator
rm -f /usr/sbin/policy-rc.d /etc/ssh/ssh_host_* /usr/lib/lodge/configure
rm -f /var/lib/systemd/random-seed /var/lib/dpkg/*-old /var/cache/debconf/*-old /var/cache/ldconfig/aux-cache
rm -f /var/log/bootstrap.log /var/log/dpkg.log /var/log/alternatives.log /var/log/apt/*
# Each machine gets its own at its first start.
: >/etc/machine-id
# Nothing in /usr is newer than what was made of it.
touch /etc/.updated /var/.updated
