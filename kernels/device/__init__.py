"""What every kernel shares on the device: rounding, and how a kernel is launched."""
