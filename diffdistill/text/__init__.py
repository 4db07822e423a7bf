"""Methods for autoregressive language models, one file per paper."""
