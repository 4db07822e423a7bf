"""Reading examples, ordering them for the whole run, and caching their encodings."""
