"""The acceptance run on a machine with a GPU: ``make gpu``."""
