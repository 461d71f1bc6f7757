"""Real DHCP clients in the namespace of a stand-in, each with files of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

from integration.networld import StandIn

# A read-only /sys says that no udev will name its links; the rest stands at fixed places.
_PRIVATE_PLACES = "mount -t sysfs -o ro none /sys && mount -t tmpfs none /run && mount -t tmpfs none /var/lib"


class Client:
    """A real DHCP client in the clone's namespace."""

    interfaces: tuple[str, ...] = ("eth0",)

    def __init__(self, clone: StandIn, folder: Path) -> None:
        self.clone = clone
        self.folder = folder

    def start(self) -> subprocess.Popen[bytes]:
        raise NotImplementedError


class Dhcpcd(Client):
    def start(self) -> subprocess.Popen[bytes]:
        config = self.folder / "dhcpcd.conf"
        config.write_text("noarp\nnoipv6\nnodev\nnohook resolv.conf, hostname, timesyncd\n")
        # Its lease and pid files stand at fixed places: each run gets private ones.
        script = (
            f"{_PRIVATE_PLACES} && mkdir /run/dhcpcd /var/lib/dhcpcd && "
            f"exec /usr/sbin/dhcpcd -B -f {config} {' '.join(self.interfaces)}"
        )
        return self.clone.start("unshare", "--mount", "sh", "-c", script)


class Dhclient(Client):
    def start(self) -> subprocess.Popen[bytes]:
        script = self.folder / "script"
        script.write_text(
            "#!/bin/sh\ncase $reason in BOUND|RENEW|REBIND|REBOOT)\n"
            "ip addr flush dev $interface; ip addr add $new_ip_address/$new_subnet_mask dev $interface;;\n"
            "EXPIRE|FAIL|RELEASE|STOP) ip addr flush dev $interface;; esac\n"
        )
        script.chmod(0o755)
        (self.folder / "dhclient.conf").write_text(f'script "{script}";\ntimeout 30;\n')
        # Its files stand at fixed places, where its own 'dhclient -r' looks for them: each run gets private ones.
        places = (
            f"{_PRIVATE_PLACES} && mkdir /var/lib/dhcp && mount --bind {self.folder} /etc/dhcp && "
            "{ setpriv --pdeathsig TERM /usr/sbin/dhclient -4 -d eth0 & } && exec sleep infinity"
        )
        return self.clone.start("unshare", "--mount", "sh", "-c", places)


class Udhcpc(Client):
    def start(self) -> subprocess.Popen[bytes]:
        script = self.folder / "script"
        script.write_text(
            "#!/bin/sh\ncase $1 in bound|renew) ip addr flush dev $interface\n"
            f"ip addr add $ip/$mask dev $interface; [ $1 = renew ] && touch {self.folder}/renewed;;\n"
            "deconfig) ip addr flush dev $interface;; esac\n"
        )
        script.chmod(0o755)
        command = f"mount -t sysfs -o ro none /sys && exec udhcpc -f -i eth0 -s {script}"
        return self.clone.start("unshare", "--mount", "sh", "-c", command)


class Networkd(Client):
    def start(self) -> subprocess.Popen[bytes]:
        (self.folder / "eth0.network").write_text(
            "[Match]\nName=eth0\n[Network]\nDHCP=ipv4\nIPv6AcceptRA=no\nLinkLocalAddressing=no\n"
        )
        # Private /run and /etc, no bus. A read-only /sys tells networkd that no udev will name its links.
        script = (
            "mount -t tmpfs none /run && mkdir -p /run/systemd/netif/links /run/systemd/netif/leases && "
            "mkdir -p /run/systemd/netif/lldp && chown -R systemd-network /run/systemd/netif && "
            "mount -t sysfs -o ro none /sys && mount --bind "
            f"{self.folder} /etc/systemd/network && exec /lib/systemd/systemd-networkd"
        )
        return self.clone.start("unshare", "--mount", "--uts", "sh", "-c", script)


class NetworkManager(Client):
    """With its internal client, on a system bus of its own."""

    def start(self) -> subprocess.Popen[bytes]:
        (self.folder / "bus.conf").write_text(
            "<busconfig><type>system</type><listen>unix:path=/run/dbus/system_bus_socket</listen>"
            '<auth>EXTERNAL</auth><policy context="default"><allow own="*"/><allow send_destination="*"/>'
            '<allow receive_sender="*"/></policy></busconfig>'
        )
        config, connection = self.folder / "NetworkManager.conf", self.folder / "eth0.nmconnection"
        config.write_text(
            "[main]\nplugins=keyfile\ndhcp=internal\ndns=none\nrc-manager=unmanaged\nhostname-mode=none\n"
            "no-auto-default=*\n[device]\nmatch-device=*\nmanaged=true\n"
        )
        connection.write_text(
            "[connection]\nid=eth0\nuuid=6f1a2e0c-5f0e-4a55-9a53-2b8f6f1f9e11\ntype=ethernet\ninterface-name=eth0\n"
            "[ipv4]\nmethod=auto\n[ipv6]\nmethod=disabled\n"
        )
        connection.chmod(0o600)
        # A read-only /sys tells it that no udev will name its links, as with networkd.
        script = (
            "mount -t tmpfs none /run && mkdir /run/dbus && mount -t tmpfs none /var/lib && "
            "mkdir /var/lib/NetworkManager && mount -t tmpfs none /etc/NetworkManager && "
            "mkdir /etc/NetworkManager/system-connections && mount -t sysfs -o ro none /sys && "
            f"cp {config} /etc/NetworkManager/ && cp {connection} /etc/NetworkManager/system-connections/ && "
            f"{{ setpriv --pdeathsig KILL dbus-daemon --config-file={self.folder}/bus.conf --nofork & }} && "
            "while [ ! -S /run/dbus/system_bus_socket ]; do sleep 0.1; done && "
            "exec /usr/sbin/NetworkManager --no-daemon"
        )
        return self.clone.start("unshare", "--mount", "--uts", "--ipc", "sh", "-c", script)


CLIENTS = {
    "dhcpcd": Dhcpcd,
    "networkd": Networkd,
    "dhclient": Dhclient,
    "udhcpc": Udhcpc,
    "NetworkManager": NetworkManager,
}
