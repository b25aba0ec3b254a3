"""Every error this package raises on purpose, as one tree.

PrefixkitError                 one line: where, expected, found, next step
├── InputError                 the user's input is at fault: exit code 2
│   ├── FormatError            a prefix file breaks schemas/README.md
│   ├── MismatchError          a prefix meets a backbone it was not made for
│   ├── BackboneError          a model folder is unusable or its architecture unsupported
│   ├── DataError              a data file, named with its line
│   └── ConfigError            an option or a configuration file
└── ParityError                an export disagrees with PyTorch: exit code 1
"""


class PrefixkitError(Exception):
    """A problem told in one line: where it is, what was expected, what was found, what to do next."""

    def __init__(self, where: object, *, expected: str = "", found: str = "", next_step: str = "") -> None:
        self.where, self.expected, self.found, self.next_step = str(where), expected, found, next_step
        told = [f"expected {expected}" if expected else "", f"found {found}" if found else "", next_step]
        sentence = "; ".join(part for part in told if part)
        line = f"{self.where}: {sentence}" if sentence else self.where
        super().__init__(" ".join(line.split()))


class InputError(PrefixkitError):
    """The user's input is at fault. Exit code 2."""


class FormatError(InputError):
    """A prefix file breaks the specification in schemas/README.md."""


class MismatchError(InputError):
    """A prefix meets a backbone that it was not made for."""


class BackboneError(InputError):
    """A backbone folder cannot be used, or its architecture is not supported."""


class DataError(InputError):
    """A data file is missing, empty or malformed; the message names the line."""


class ConfigError(InputError):
    """An option or a configuration file is wrong."""


class ParityError(PrefixkitError):
    """An exported graph disagrees with PyTorch by more than the tolerance. Exit code 1."""
