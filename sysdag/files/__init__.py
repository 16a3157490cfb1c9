"""What lies on a disk, and how it gets there whole."""
