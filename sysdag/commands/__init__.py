"""The commands of `sysdag`, one file each; heavy libraries are imported when a command runs."""
