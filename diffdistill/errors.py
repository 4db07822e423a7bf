"""The errors that a user can do something about; the CLI prints them as one line."""


class UserError(ValueError):
    """Something the user gave is wrong. The message says what, where and what to do."""


class MissingExtra(UserError):  # noqa: N818 - says what is missing
    """A feature needs a package that is not installed."""

    def __init__(self, package: str, feature: str, extra: str | None = None) -> None:
        install = f'pip install "diffdistill[{extra}]"' if extra else f"pip install {package}"
        super().__init__(f"{feature} needs the package {package!r}, not installed here: {install}")
