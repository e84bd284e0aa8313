"""Dynamic sample dropout and layer-wise optimization for speech separation."""

__version__ = "0.1.0"
