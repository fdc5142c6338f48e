"""What went wrong is the accelerator, and not the program. Imports no torch: drivers look for it as well."""


class DeviceError(ValueError):
    """The accelerator failed; another process may do better."""
