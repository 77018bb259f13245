"""Every key of the configuration is told about: by its description, on a page, in a schema."""

import pytest
from pydantic import BaseModel

from fastrepa.config import Config


def sections(model: type[BaseModel]) -> set[type[BaseModel]]:
    """The model and all that are in it."""
    found = {model}
    for field in model.model_fields.values():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= sections(kind)
    return found


@pytest.mark.parametrize("section", sorted(sections(Config), key=str), ids=lambda s: s.__name__)
def test_every_key_has_a_description(section):
    assert section.__doc__ and section.__doc__.strip()
    for name, field in section.model_fields.items():
        is_section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        assert field.description or is_section, (
            f"{section.__name__}.{name}: give it Field(..., description=...): what it is, its unit,"
            f" and what null, 0 or auto mean"
        )
