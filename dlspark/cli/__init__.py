"""The command ``dlspark``, one file per command."""
