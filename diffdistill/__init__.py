"""diffdistill: distillation of diffusion models, and of language models, through one objective."""

__version__ = "0.1.0"
