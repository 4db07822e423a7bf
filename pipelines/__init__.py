"""Model families: the only code that knows diffusers, transformers or a tokenizer."""
