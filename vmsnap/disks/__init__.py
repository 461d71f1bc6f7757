"""Read-only views of disk images, and what their file systems say."""
