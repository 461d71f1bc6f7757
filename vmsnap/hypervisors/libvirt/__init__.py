"""libvirt/KVM: the only code that knows libvirt."""
