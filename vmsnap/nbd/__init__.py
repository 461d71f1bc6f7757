"""The NBD protocol (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md), server side, read-only. Sans-IO."""
