"""What each command of the CLI does, as a plain function."""
