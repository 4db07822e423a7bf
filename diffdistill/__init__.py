"""diffdistill: distillation of diffusion models through one objective."""

__version__ = "0.1.0"
