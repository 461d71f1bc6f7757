"""DHCP messages and the responder's state machine, without input or output."""
