"""Where a model came from: a record, what follows from it, and the forms in which it is told."""
