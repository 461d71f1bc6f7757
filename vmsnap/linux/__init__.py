"""What vmsnap asks of the Linux kernel by itself. Every driver may use it; it knows nothing of vmsnap."""
