"""The commands: each parses its options, makes one call to the layers below, and gives back an exit code."""
