"""A module's `forward` as data: see `program`."""
