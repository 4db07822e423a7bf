"""The ``provenance`` section of a config file."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(kw_only=True)
class ProvenanceSettings:
    """What is known of the models of a run that they do not say themselves.

    Attributes:
        policy: What becomes of an obligation that is open, and of terms that nobody knows: ``warn``
            says so and writes it into the record, ``error`` refuses to train and to export.
        name: The name under which the result will be published; terms that ask for a name are
            checked against it. None takes the name of the folder it is exported to.
        license: The license of the result, by its id on the hub; your choice. None states none.
        terms: By role or reward, the entry of ``diffdistill provenance --terms`` that holds for its
            model, where that is not what the model says, or it says nothing.
        acknowledged: Obligations that you have met, or that do not hold for you, by their id.
    """

    policy: Literal["warn", "error"] = "warn"
    name: str | None = None
    license: str | None = None
    terms: dict[str, str] = field(default_factory=dict)
    acknowledged: list[str] = field(default_factory=list)
