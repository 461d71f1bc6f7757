"""The store ``packs``: snapshots as digest-named objects, in S3 or in a directory."""
