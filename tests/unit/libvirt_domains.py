"""Domains as libvirt 9 describes running guests, put together from parts, for the tests of the libvirt driver.

Everything of the host that a part names is production's; a clone may keep none of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vmsnap.hypervisors.libvirt.inspect import guest_from_xml
from vmsnap.hypervisors.libvirt.xml import parse
from vmsnap.model.capture import CapturePlan, CaptureSettings
from vmsnap.model.guest import Guest, GuestState
from vmsnap.model.ids import RunId

RUN = RunId("0123456789")
UUID = "0b0f1e4c-7d2d-4f0e-8a3e-2f6f2d9d3c11"
SIZE_BYTES = 10 << 30
CLONE_NVRAM = "/run/vmsnap/0123456789/nvram.clone.fd"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of ``<devices>``. ``breach``: the audit must object to it in the original."""

    xml: str
    breach: bool = True


# What virt-install gives every Linux guest.
DISK_QCOW2 = """
<disk type='file' device='disk'>
  <driver name='qemu' type='qcow2' cache='none' discard='unmap'/>
  <source file='/srv/images/db1.qcow2' index='3'/>
  <backingStore type='file' index='4'>
    <format type='qcow2'/>
    <source file='/srv/images/debian-12.qcow2'/>
    <backingStore type='file' index='5'>
      <format type='raw'/>
      <source file='/srv/images/seed.raw'/>
      <backingStore/>
    </backingStore>
  </backingStore>
  <target dev='vda' bus='virtio'/>
  <iotune><total_iops_sec>500</total_iops_sec></iotune>
  <serial>DB1-ROOT</serial>
  <boot order='1'/>
  <alias name='virtio-disk0'/>
  <address type='pci' domain='0x0000' bus='0x04' slot='0x00' function='0x0'/>
</disk>
"""
NIC_BRIDGE = """
<interface type='bridge'>
  <mac address='52:54:00:AA:00:01'/>
  <source bridge='br-prod'/>
  <target dev='vnet3'/>
  <model type='virtio'/>
  <driver name='vhost' queues='4'/>
  <mtu size='9000'/>
  <alias name='net0'/>
  <address type='pci' domain='0x0000' bus='0x01' slot='0x00' function='0x0'/>
</interface>
"""

PARTS: dict[str, Part] = {
    "disk raw": Part(
        xml="""
        <disk type='file' device='disk'>
          <driver name='qemu' type='raw' cache='none' io='native'/>
          <source file='/srv/images/db1-data.raw' index='2'>
            <seclabel model='dac' relabel='no'/>
          </source>
          <backingStore/>
          <target dev='vdb' bus='virtio'/>
        </disk>"""
    ),
    "disk block": Part(
        xml="""
        <disk type='block' device='disk' snapshot='no'>
          <driver name='qemu' type='raw' cache='none'/>
          <source dev='/dev/vg0/db1-wal' index='1'/>
          <backingStore/>
          <target dev='sdb' bus='scsi'/>
        </disk>"""
    ),
    "cdrom empty": Part(
        xml="""
        <disk type='file' device='cdrom'>
          <driver name='qemu'/>
          <target dev='sda' bus='sata'/>
          <readonly/>
        </disk>""",
        breach=False,
    ),
    "cdrom with iso": Part(
        xml="""
        <disk type='file' device='cdrom'>
          <driver name='qemu' type='raw'/>
          <source file='/srv/iso/debian-12.iso' index='6' startupPolicy='optional'/>
          <backingStore/>
          <target dev='sdc' bus='sata'/>
          <readonly/>
        </disk>""",
        breach=False,
    ),
    "nic network": Part(
        xml="""
        <interface type='bridge' trustGuestRxFilters='yes'>
          <mac address='52:54:00:aa:00:02'/>
          <source network='ovs-prod' portgroup='databases' portid='3b1f4f9e-7c5f-4a3a-9d6e-6a2f4d9c9f10' bridge='ovsbr0'/>
          <bandwidth><inbound average='1000' peak='5000' burst='1024'/></bandwidth>
          <vlan><tag id='4042'/></vlan>
          <virtualport type='openvswitch'><parameters interfaceid='11f0b3a2-7d77-4e4b-8f55-7d6d3f6e0a01'/></virtualport>
          <target dev='vnet4'/>
          <model type='e1000e'/>
          <filterref filter='clean-traffic'><parameter name='IP' value='192.0.2.44'/></filterref>
          <backend tap='/dev/net/tun' vhost='/dev/vhost-net'/>
          <port isolated='yes'/>
        </interface>"""
    ),
    "nic ethernet": Part(
        xml="""
        <interface type='ethernet'>
          <mac address='52:54:00:aa:00:03'/>
          <script path='/etc/qemu-ifup-prod'/>
          <target dev='tap-prod' managed='no'/>
          <ip family='ipv4' address='192.0.2.45' prefix='24'/>
          <route family='ipv4' address='0.0.0.0' gateway='192.0.2.254'/>
          <model type='virtio'/>
        </interface>"""
    ),
    "spice": Part(
        xml="""
        <graphics type='spice' port='5907' tlsPort='5908' autoport='yes' listen='192.0.2.2' passwd='geheim'>
          <listen type='address' address='192.0.2.2'/>
          <image compression='off'/>
          <gl enable='no'/>
        </graphics>"""
    ),
    "vnc": Part(
        xml="""
        <graphics type='vnc' port='5909' autoport='yes' websocket='5709' listen='0.0.0.0' keymap='de' passwd='geheim'>
          <listen type='address' address='0.0.0.0'/>
        </graphics>"""
    ),
    "vnc on a socket": Part(
        xml="""
        <graphics type='vnc' socket='/srv/consoles/db1.vnc'>
          <listen type='socket' socket='/srv/consoles/db1.vnc'/>
        </graphics>"""
    ),
    "spice channel": Part(
        xml="<channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0' state='disconnected'/></channel>",
        breach=False,
    ),
    "usb redirection": Part(xml="<redirdev bus='usb' type='spicevmc'><alias name='redir0'/></redirdev>", breach=False),
    "agent": Part(
        xml="""
        <channel type='unix'>
          <source mode='bind' path='/var/lib/libvirt/qemu/channel/target/domain-4-db1/org.qemu.guest_agent.0'/>
          <target type='virtio' name='org.qemu.guest_agent.0' state='connected'/>
        </channel>"""
    ),
    "custom channel": Part(
        xml="""
        <channel type='unix'>
          <source mode='connect' path='/srv/monitoring/channel/db1.sock'/>
          <target type='virtio' name='org.example.monitor'/>
        </channel>"""
    ),
    "serial pty": Part(
        xml="""
        <serial type='pty'>
          <source path='/dev/pts/7'/>
          <log file='/var/log/db1-serial.log' append='on'/>
          <target type='isa-serial' port='0'/>
        </serial>
        <console type='pty' tty='/dev/pts/7'>
          <source path='/dev/pts/7'/>
          <target type='serial' port='0'/>
        </console>"""
    ),
    "serial file": Part(
        xml="<serial type='file'><source path='/var/log/db1.console' append='on'/><target port='1'/></serial>"
    ),
    "serial tcp": Part(
        xml="""
        <serial type='tcp'>
          <source mode='connect' host='192.0.2.7' service='4555' tls='yes'/>
          <protocol type='telnet'/>
          <target port='2'/>
        </serial>"""
    ),
    "serial unix": Part(
        xml="<serial type='unix'><source mode='bind' path='/srv/consoles/db1.serial'/><target port='3'/></serial>"
    ),
    "parallel dev": Part(xml="<parallel type='dev'><source path='/dev/parport0'/><target port='0'/></parallel>"),
    "vsock": Part(xml="<vsock model='virtio'><cid auto='yes' address='3'/></vsock>"),
    "tablet": Part(xml="<input type='tablet' bus='usb'/><input type='mouse' bus='ps2'/>", breach=False),
    "sound to the host": Part(
        xml="<sound model='ich9'/><audio id='1' type='pulseaudio' serverName='/run/pulse/native'/>"
    ),
    "qxl": Part(xml="<video><model type='qxl' ram='65536' heads='1' primary='yes'/></video>", breach=False),
    "rng": Part(
        xml="<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>",
        breach=False,
    ),
    "watchdog": Part(xml="<watchdog model='i6300esb' action='reset'/>", breach=False),
    "dimm": Part(
        xml="<memory model='dimm'><target><size unit='KiB'>524288</size><node>0</node></target></memory>", breach=False
    ),
    "tpm": Part(
        xml="<tpm model='tpm-crb'><backend type='emulator' version='2.0' persistent_state='yes'/></tpm>", breach=False
    ),
    "tpm of the host": Part(
        xml="<tpm model='tpm-tis'><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>"
    ),
    "tpm at a path": Part(
        xml="<tpm model='tpm-crb'><backend type='emulator'><source type='dir' path='/srv/tpm'/></backend></tpm>"
    ),
    "hostdev": Part(
        xml="""
        <hostdev mode='subsystem' type='pci' managed='yes'>
          <source><address domain='0x0000' bus='0x06' slot='0x00' function='0x0'/></source>
        </hostdev>"""
    ),
    "virtiofs": Part(
        xml="""
        <filesystem type='mount'>
          <driver type='virtiofs'/><source dir='/srv/shared'/><target dir='shared'/>
        </filesystem>"""
    ),
    "shmem": Part(xml="<shmem name='prod'><model type='ivshmem-plain'/><size unit='M'>4</size></shmem>"),
    "nvdimm": Part(
        xml="""
        <memory model='nvdimm'>
          <source><path>/srv/images/db1.pmem</path></source><target><size unit='KiB'>524288</size></target>
        </memory>"""
    ),
    "evdev": Part(xml="<input type='evdev'><source dev='/dev/input/event3'/></input>"),
    "input passthrough": Part(xml="<input type='passthrough' bus='virtio'><source evdev='/dev/input/event4'/></input>"),
    "usb over tcp": Part(
        xml="<redirdev bus='usb' type='tcp'><source mode='connect' host='192.0.2.9' service='4000'/></redirdev>"
    ),
    "entropy daemon": Part(
        xml="""
        <rng model='virtio'>
          <backend model='egd' type='udp'><source mode='connect' host='192.0.2.8' service='708'/></backend>
        </rng>"""
    ),
    "fixed vsock": Part(xml="<vsock model='virtio'><cid auto='no' address='42'/></vsock>"),
    "macvtap": Part(
        xml="""
        <interface type='direct'>
          <mac address='52:54:00:aa:00:09'/><source dev='eno1' mode='bridge'/><model type='virtio'/>
        </interface>"""
    ),
    "vhost-user video": Part(
        xml="<video><driver name='vhostuser'/><model type='virtio'/></video>",
    ),
}
# What preflight refuses; everything else can be cloned, each alone and all together.
REFUSED = frozenset(
    {
        "tpm of the host", "tpm at a path",
        "hostdev", "virtiofs", "shmem", "nvdimm", "evdev", "input passthrough", "usb over tcp", "entropy daemon",
        "vsock", "fixed vsock", "macvtap", "vhost-user video",
    }
)  # fmt: skip
CLONABLE = tuple(sorted(PARTS.keys() - REFUSED))

NVRAM_TEXT = "<nvram template='/usr/share/OVMF/OVMF_VARS.fd'>/var/lib/libvirt/qemu/nvram/db1_VARS.fd</nvram>"
NVRAM_SOURCE = "<nvram type='file'><source file='/var/lib/libvirt/qemu/nvram/db1_VARS.fd'/></nvram>"
LOADER = "<loader readonly='yes' secure='no' type='pflash'>/usr/share/OVMF/OVMF_CODE.fd</loader>"

AROUND = """
<title>The first database</title>
<description>ask Anna before touching /srv/images</description>
<metadata>
  <libosinfo:libosinfo xmlns:libosinfo="http://libosinfo.org/xmlns/libvirt/domain/1.0">
    <libosinfo:os id="http://debian.org/debian/12"/>
  </libosinfo:libosinfo>
</metadata>
<memory unit='KiB'>1048576</memory>
<currentMemory unit='KiB'>1048576</currentMemory>
<vcpu placement='static'>2</vcpu>
<iothreads>1</iothreads>
<cputune>
  <shares>2048</shares>
  <vcpupin vcpu='0' cpuset='4'/>
  <emulatorpin cpuset='1-3'/>
  <cachetune vcpus='0'><cache id='0' level='3' type='both' size='3' unit='MiB'/></cachetune>
</cputune>
<blkiotune><device><path>/dev/sda</path><weight>800</weight></device></blkiotune>
<numatune><memory mode='strict' nodeset='1'/></numatune>
<resource><partition>/machine/production</partition></resource>
<sysinfo type='smbios'><system><entry name='uuid'>{uuid}</entry><entry name='serial'>S-1</entry></system></sysinfo>
<features><acpi/><apic/></features>
<clock offset='utc'/>
<on_poweroff>destroy</on_poweroff>
<on_reboot>restart</on_reboot>
<on_crash>preserve</on_crash>
<seclabel type='dynamic' model='apparmor' relabel='yes'>
  <label>libvirt-{uuid}</label><imagelabel>libvirt-{uuid}</imagelabel>
</seclabel>
<seclabel type='static' model='dac' relabel='no'><label>+5000:+5000</label></seclabel>
"""


def domain_xml(
    *parts: str, name: str = "db1", disks: str = DISK_QCOW2, nics: str = NIC_BRIDGE, boot: str = "", around: str = ""
) -> str:
    """The live XML of a guest with these parts beside one qcow2 disk and one NIC. ``boot`` goes into ``<os>``."""
    return f"""
<domain type='kvm' id='4'>
  <name>{name}</name>
  <uuid>{UUID}</uuid>
  {AROUND.format(uuid=UUID)}
  {around}
  <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type>{boot}<boot dev='hd'/></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    {disks}
    {nics}
    {"".join(PARTS[part].xml for part in parts)}
    <controller type='usb' index='0' model='qemu-xhci'/>
    <memballoon model='virtio'/>
  </devices>
</domain>
"""


def guest_of(xml: str) -> Guest:
    """The guest that such an XML describes, each disk of `SIZE_BYTES`."""
    root = parse(xml)
    targets = [target.get("dev", "") for target in root.findall("devices/disk/target")]
    return guest_from_xml(root, state=GuestState.RUNNING, sizes=dict.fromkeys(targets, SIZE_BYTES), addresses={})


def plan_of(xml: str, *, settings: CaptureSettings | None = None) -> CapturePlan:
    """A capture of that guest. Block devices get their overlays in ``/srv/overlays``."""
    guest = guest_of(xml)
    needs_folder = any(disk.kind == "block" for disk in guest.disks)
    return CapturePlan(
        run=RUN,
        guest=guest,
        settings=settings or CaptureSettings(overlay_dir="/srv/overlays" if needs_folder else None),
    )


def all_strings(xml: str) -> frozenset[str]:
    """Every text and every attribute's value in an XML."""

    def walk() -> Iterable[str]:
        for element in parse(xml).iter():
            yield (element.text or "").strip()
            yield from element.attrib.values()

    return frozenset(walk()) - {""}
