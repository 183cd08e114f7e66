"""A folder for each tiny family."""

import pytest

from methods.cases import FAMILIES, make_family


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """Family -> model folder."""
    root = tmp_path_factory.mktemp("families")
    return {family: make_family(root / family.replace(" ", "-"), family) for family in FAMILIES}
