"""A laboratory for vmsnap: a private libvirtd with real guests that leaves nothing behind. See README.md here."""
