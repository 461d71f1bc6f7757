"""DHCP messages, ARP and the responder's state machine. Sans-IO: bytes and messages in, messages out."""
